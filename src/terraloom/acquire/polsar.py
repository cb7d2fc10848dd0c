"""Folders of PolSARpro: one raw file per element of a covariance or coherency matrix.

A folder holds ``T11.bin``, ``T12_real.bin``, ``T12_imag.bin`` and so on (float32, rows from the
top), with an ENVI header beside each file, or with ``config.txt`` alone. The format is that of the
PolSARpro software (Pottier and others, ESA), as its products and those of SNAP have it.
"""

from __future__ import annotations

import re
from pathlib import Path

from terraloom.errors import SceneError

__all__ = ["MATRIX_BANDS", "folder_size", "matrix_files", "matrix_kind"]

_FILE = {"re": "real", "im": "imag"}


def _bands(letter: str, order: int) -> tuple[str, ...]:
    names = []
    for i in range(1, order + 1):
        names.append(f"{letter}{i}{i}")
        for j in range(i + 1, order + 1):
            names += [f"{letter}{i}{j}_re", f"{letter}{i}{j}_im"]
    return tuple(names)


#: Bands of each kind of matrix: the real diagonal, and real and imaginary parts above it.
MATRIX_BANDS = {
    kind: _bands(kind[0], int(kind[1])) for kind in ("C2", "T2", "C3", "T3", "C4", "T4")
}


def matrix_kind(names: set[str]) -> str | None:
    """Kind of matrix (``C2``, ``T3``, ...) whose bands are exactly ``names``; None for others."""
    return next((kind for kind, bands in MATRIX_BANDS.items() if set(bands) == names), None)


def matrix_files(folder: Path) -> dict[str, Path]:
    """Files of the matrix in a folder, by band.

    Other products in the folder (entropy, vegetation indices) are left alone.

    Raises:
        SceneError: No matrix in the folder, or one with an element missing.
    """
    present = {p.name for p in folder.iterdir() if p.is_file()}
    best: tuple[int, str, list[str]] | None = None
    for kind, bands in MATRIX_BANDS.items():
        files = {b: _file_name(b) for b in bands}
        absent = [f for f in files.values() if f not in present]
        if not absent:
            # C2 is a part of C3, which is a part of C4: the largest complete one is meant.
            larger = [k for k in MATRIX_BANDS if k[0] == kind[0] and k[1] > kind[1]]
            if not any(_file_name(f"{k[0]}{k[1]}{k[1]}") in present for k in larger):
                return {b: folder / f for b, f in files.items()}
        found = len(files) - len(absent)
        if found and (best is None or found > best[0]):
            best = (found, kind, absent)
    if best is None:
        raise SceneError(
            "no covariance or coherency matrix in this folder",
            where=folder.as_posix(),
            allowed="C11.bin, C12_real.bin, C12_imag.bin, ... or T11.bin, ...",
            fix="name the folder that holds the .bin files (often called C3 or T3)",
        )
    raise SceneError(
        f"the matrix {best[1]} is without {', '.join(best[2])}",
        where=folder.as_posix(),
        fix="export the matrix again with all its elements",
    )


def _file_name(band: str) -> str:
    element, _, part = band.partition("_")
    return f"{element}_{_FILE[part]}.bin" if part else f"{element}.bin"


def folder_size(folder: Path) -> tuple[int, int]:
    """Rows and columns of a folder's files, from ``config.txt``.

    Raises:
        SceneError: No ``config.txt``, or one without the two numbers.
    """
    path = folder / "config.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows, columns = (re.search(rf"{k}\s+(\d+)", text) for k in ("Nrow", "Ncol"))
    if rows is None or columns is None:
        raise SceneError(
            "neither ENVI headers nor a readable config.txt",
            where=folder.as_posix(),
            allowed="T11.bin.hdr or T11.hdr beside each file, or config.txt with Nrow and Ncol",
            fix="export the folder again with its headers",
        )
    return int(rows[1]), int(columns[1])
