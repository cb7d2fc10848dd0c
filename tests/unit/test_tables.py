"""Tables as text come back as they were given."""

from __future__ import annotations

import csv
import io

from terraloom.tables import csv_text, markdown_table


def test_csv_keeps_names_with_commas_and_quotes() -> None:
    rows = [('forest, "old"', 1.5), ("a\nb", "")]
    found = list(csv.reader(io.StringIO(csv_text(("name", "ha"), rows))))
    assert found == [["name", "ha"], ['forest, "old"', "1.5"], ["a\nb", ""]]


def test_markdown_cells_cannot_end_a_column() -> None:
    assert markdown_table(("a", "b"), [("x|y", "z")]) == "| a | b |\n| --- | --- |\n| x/y | z |\n"
