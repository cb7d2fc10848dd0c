"""Arrays that grow on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from terraloom.errors import StateError
from terraloom.labels.spool import Spool


def test_rows_come_back_and_the_folder_vanishes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"a": rng.random((3, 4)), "b": np.int64(i)} for i in range(7)]
    with Spool(tmp_path) as spool:
        for row in rows:
            spool.add(row)
        arrays = {k: np.array(v) for k, v in spool.arrays().items()}
        assert spool.count == 7
    assert np.array_equal(arrays["a"], np.stack([r["a"] for r in rows]))
    assert arrays["b"].tolist() == list(range(7))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("row", [{"a": np.zeros(3)}, {"a": np.zeros(2, np.float32)}, {}])
def test_rows_of_another_form_are_refused_and_nothing_is_left(
    tmp_path: Path, row: dict[str, np.ndarray]
) -> None:
    with pytest.raises(StateError), Spool(tmp_path) as spool:
        spool.add({"a": np.zeros(2)})
        spool.add(row)
    assert not list(tmp_path.iterdir())
