"""Polarimetric radar: covariance and coherency matrices as complex arrays.

Matrices travel through the pipeline as real bands (``T11``, ``T12_re``, ``T12_im``, ...), because
averages, warps and composites are linear in the elements. This module turns bands into matrices
``(M, M, H, W)`` and back, and gives the quantities that stay the same under a change of basis.

Source: S. R. Cloude and E. Pottier, "An entropy based classification scheme for land applications
of polarimetric SAR", IEEE TGRS 35(1), 1997; J.-S. Lee and E. Pottier, "Polarimetric Radar Imaging",
CRC Press 2009, chapters 3 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from terraloom.acquire.polsar import MATRIX_BANDS, matrix_kind
from terraloom.errors import SceneError

__all__ = [
    "coherency_of",
    "complex_matrix",
    "covariance_of",
    "entropy_anisotropy_alpha",
    "hermitian_error",
    "matrix_bands",
    "multilook",
    "span",
    "upper_triangle",
]  # fmt: skip

Complex = npt.NDArray[np.complexfloating]
Real = npt.NDArray[np.floating]

#: Unitary change from the lexicographic basis (HH, sqrt 2 HV, VV) to the Pauli basis
#: (HH + VV, HH - VV, 2 HV) / sqrt 2; Lee and Pottier 2009, equation 3.29.
PAULI = np.array([[1, 0, 1], [1, 0, -1], [0, np.sqrt(2), 0]]) / np.sqrt(2)


def complex_matrix(values: Real, names: Sequence[str]) -> npt.NDArray[np.complex64]:
    """Matrices from their bands.

    Args:
        values: (B, H, W) real, linear power; NaN where missing.
        names: Band names in the order of ``values``; all of C2, T2, C3, T3, C4 or T4, in any order.

    Returns:
        (M, M, H, W) complex64, Hermitian by construction; a pixel with any band missing is NaN in
        all elements.

    Raises:
        SceneError: The names are not the bands of one matrix.
    """
    kind = matrix_kind(set(names))
    if kind is None or len(names) != len(values) or len(set(names)) != len(names):
        raise SceneError(
            f"bands {', '.join(names)} are not one matrix",
            where="polarimetric bands",
            allowed="; ".join(f"{k}: {', '.join(b)}" for k, b in MATRIX_BANDS.items()),
            fix="choose all bands of the matrix in sources[].bands",
        )
    order = int(kind[1])
    at = {name: values[n] for n, name in enumerate(names)}
    out = np.empty((order, order, *values.shape[1:]), dtype=np.complex64)
    for i in range(order):
        out[i, i] = at[f"{kind[0]}{i + 1}{i + 1}"]
        for j in range(i + 1, order):
            element = f"{kind[0]}{i + 1}{j + 1}"
            out[i, j].real, out[i, j].imag = at[f"{element}_re"], at[f"{element}_im"]
            out[j, i] = out[i, j].conj()
    out[..., ~np.isfinite(values).all(axis=0)] = np.complex64(complex(np.nan, np.nan))
    return out


def matrix_bands(matrix: Complex, letter: str) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Bands of matrices and their names: inverse of :func:`complex_matrix`.

    Args:
        matrix: (M, M, H, W) complex.
        letter: ``C`` for covariance, ``T`` for coherency.

    Returns:
        (B, H, W) float32 with B = M * M, and the B names.
    """
    names = list(MATRIX_BANDS[f"{letter}{len(matrix)}"])
    planes = []
    for name in names:
        element = matrix[int(name[1]) - 1, int(name[2]) - 1]
        planes.append(element.imag if name.endswith("_im") else element.real)
    return np.stack(planes).astype(np.float32), names


def upper_triangle(matrix: Complex) -> npt.NDArray[np.complex64]:
    """Elements on and above the diagonal as channels: 11, 12, .., 22, 23, ..

    Returns:
        (M * (M + 1) / 2, H, W) complex64: the input of complex-valued networks.
    """
    rows, columns = np.triu_indices(len(matrix))
    return np.ascontiguousarray(matrix[rows, columns]).astype(np.complex64)


def hermitian_error(matrix: Complex) -> npt.NDArray[np.float32]:
    """Largest departure of each matrix from its own conjugate transpose, as a share of the span.

    Returns:
        (H, W) float32, 0 for Hermitian matrices; NaN where missing or where the span is not
        positive.
    """
    difference = np.abs(matrix - matrix.swapaxes(0, 1).conj()).max(axis=(0, 1))
    total = span(matrix)
    positive = total > 0
    return np.where(positive, difference / np.where(positive, total, 1), np.nan).astype(np.float32)


def span(matrix: Complex) -> npt.NDArray[np.float32]:
    """Total power, the trace of each matrix: (H, W) float32, in the unit of the matrix."""
    total: npt.NDArray[np.float32] = np.einsum("iihw->hw", matrix).real.astype(np.float32)
    return total


def coherency_of(covariance: Complex) -> npt.NDArray[np.complex64]:
    """T3 from C3: the same targets in the Pauli basis. Trace and eigenvalues stay.

    Args:
        covariance: (3, 3, H, W) complex, basis (HH, sqrt 2 HV, VV).

    Raises:
        SceneError: Not 3 x 3 matrices.
    """
    return _change(covariance, PAULI)


def covariance_of(coherency: Complex) -> npt.NDArray[np.complex64]:
    """C3 from T3: inverse of :func:`coherency_of`."""
    return _change(coherency, PAULI.T)


def _change(matrix: Complex, basis: npt.NDArray[np.float64]) -> npt.NDArray[np.complex64]:
    if matrix.shape[:2] != (3, 3):
        raise SceneError(
            f"a matrix of {matrix.shape[0]} x {matrix.shape[1]}",
            where="change between C3 and T3",
            allowed="3 x 3: full polarisation with HV = VH",
        )
    changed: npt.NDArray[np.complex64] = np.einsum(
        "ij,jkhw,lk->ilhw", basis, matrix.astype(np.complex128), basis.conj()
    ).astype(np.complex64)
    return changed


def multilook(matrix: Complex, rows: int, columns: int) -> npt.NDArray[np.complex64]:
    """Average of blocks of pixels: fewer pixels, less speckle.

    Args:
        matrix: (M, M, H, W) complex, linear power.
        rows: Rows of a block.
        columns: Columns of a block; rows and columns left over at the lower and right edge are
            dropped.

    Returns:
        (M, M, H // rows, W // columns) complex64: mean over the pixels of a block that are there;
        NaN for blocks without any.
    """
    height, width = matrix.shape[2] // rows, matrix.shape[3] // columns
    if rows < 1 or columns < 1 or not height or not width:
        raise SceneError(
            f"blocks of {rows} x {columns} px in {matrix.shape[2]} x {matrix.shape[3]} px",
            where="multilook",
            allowed="blocks of at least one pixel that fit into the image",
        )
    blocks = matrix[..., : height * rows, : width * columns].reshape(
        *matrix.shape[:2], height, rows, width, columns
    )
    there = np.isfinite(blocks).all(axis=(0, 1))
    total = np.where(there, blocks, 0).astype(np.complex128).sum(axis=(3, 5))
    count = there.sum(axis=(1, 3))
    some = count > 0
    mean: npt.NDArray[np.complex128] = total / np.where(some, count, 1)
    mean[..., ~some] = complex(np.nan, np.nan)
    return mean.astype(np.complex64)


def entropy_anisotropy_alpha(
    coherency: Complex,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Entropy, anisotropy and mean alpha angle of Cloude and Pottier (1997).

    Args:
        coherency: (3, 3, H, W) complex T3.

    Returns:
        Three (H, W) float32: entropy 0-1 (one mechanism to none preferred), anisotropy 0-1 (second
        against third eigenvalue), alpha in degrees 0-90 (surface, volume, double bounce). NaN where
        missing or without power.
    """
    if coherency.shape[:2] != (3, 3):
        raise SceneError("entropy and alpha are of T3", where="entropy_anisotropy_alpha")
    pixels = np.moveaxis(coherency, (0, 1), (-2, -1)).astype(np.complex128)
    good = np.isfinite(span(coherency)) & (span(coherency) > 0)
    values, vectors = np.linalg.eigh(pixels[good])  # ascending
    values = np.clip(values[:, ::-1], 0, None)
    first = np.clip(np.abs(vectors[:, 0, ::-1]), 0, 1)
    share = values / values.sum(axis=1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=1) / np.log(3)
    minor = values[:, 1] + values[:, 2]
    anisotropy = np.where(
        minor > 0, (values[:, 1] - values[:, 2]) / np.where(minor > 0, minor, 1), 0
    )
    alpha = np.rad2deg((share * np.arccos(first)).sum(axis=1))
    out = np.full((3, *good.shape), np.nan, dtype=np.float32)
    out[:, good] = entropy, anisotropy, alpha
    return out[0], out[1], out[2]
