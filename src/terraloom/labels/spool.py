"""Arrays that grow on disk: chips are cut one by one and never all in memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from terraloom.errors import StateError
from terraloom.scratch import prefix, staging

__all__ = ["Spool"]


class Spool:
    """Rows of several arrays, appended to files of a folder that vanishes at the end.

    Args:
        parent: Where the folder is made.
    """

    def __init__(self, parent: Path) -> None:
        place = staging(parent)
        place.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=prefix("spool"), dir=place))
        self._files: dict[str, IO[bytes]] = {}
        self._like: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self.count = 0

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._folder)

    def add(self, row: Mapping[str, Any]) -> None:
        """One row of every array; all rows have the arrays, shapes and types of the first."""
        for name, value in row.items():
            a = np.asarray(value)
            if self.count == 0:
                self._like[name] = a.dtype, a.shape
                self._files[name] = (self._folder / f"{name}.bin").open("wb")
            if self._like.get(name) != (a.dtype, a.shape):
                raise StateError(f"{a.dtype} {a.shape}", where=f"row {self.count} of {name}",
                                 allowed=str(self._like.get(name)))  # fmt: skip
            self._files[name].write(a.tobytes())
        if len(row) != len(self._like):
            raise StateError(f"{sorted(row)}", where=f"row {self.count}",
                             allowed=f"{sorted(self._like)}")  # fmt: skip
        self.count += 1

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays (count, ...), mapped from their files."""
        for file in self._files.values():
            file.flush()
        return {
            name: np.memmap(self._folder / f"{name}.bin", dtype, "r", shape=(self.count, *shape))
            for name, (dtype, shape) in self._like.items()
        }
