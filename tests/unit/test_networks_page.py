"""The page of networks against the networks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from terraloom.config.model import Model
from terraloom.models.reference import networks_text

PAGE = Path(__file__).parents[2] / "docs/reference/networks.md"


def test_page_is_generated() -> None:
    """Rewrite: python -c 'from terraloom.models.reference import *; print(networks_text())'."""
    assert PAGE.read_text(encoding="utf-8") == networks_text() + "\n"


def test_page_has_every_network_that_can_be_chosen() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \| [\d,]+ \| (\d+) \| (\d+) \|", networks_text())
    networks = list(get_args(Model.model_fields["network"].annotation))
    assert [r[0] for r in rows] == [n for n in networks if n != "backbone"]
    assert "`network: backbone`" in networks_text(), "its figures depend on the encoder"
    assert Model().width == 12 and Model().depth == 4, "the page says so"
    assert all(10 * int(px) == int(m) for _, px, m in rows)
