"""How probabilities, sets of classes and applicability are stored in whole numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "APPLICABILITY_NODATA", "APPLICABILITY_SCALES", "MOST_IN_MASK", "PROBABILITY_CODES",
    "REGRESSION_NODATA", "SET_NODATA", "ProbabilityCode", "encode_sets", "set_dtype",
]  # fmt: skip

#: Classes that have a bit of their own in a set (count); of more only the size is published.
MOST_IN_MASK = 32
#: No set is empty: the most probable class is in it.
SET_NODATA = 0
APPLICABILITY_NODATA = 65535
REGRESSION_NODATA = -9999.0
#: Value of one step of ``dissimilarity``, ``density`` (count) and ``inside``.
APPLICABILITY_SCALES = (1e-3, 0.1, 1.0)


@dataclass(frozen=True)
class ProbabilityCode:
    """Probabilities in equal steps from 0 to 1.

    Attributes:
        steps: Stored value of 1; the scale is ``1 / steps``.
        nodata: Stored value that means missing.
        dtype: Numpy type.
    """

    steps: int
    nodata: int
    dtype: str

    def encode(
        self, probability: npt.NDArray[np.floating], valid: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.unsignedinteger]:
        """Nearest step of each probability; ``nodata`` where not ``valid``.

        Args:
            probability: (..., H, W), clipped to 0-1.
            valid: (H, W).
        """
        code = np.multiply(probability, np.float32(self.steps), dtype=np.float32)
        np.rint(code, out=code)
        # fmin, fmax: a pixel that is not valid may hold NaN, which has no whole number.
        np.fmax(code, np.float32(0), out=code)
        np.fmin(code, np.float32(self.steps), out=code)
        stored: npt.NDArray[np.unsignedinteger] = code.astype(self.dtype)
        if not valid.all():
            stored[..., ~valid] = self.nodata
        return stored


#: By ``products.probability_bits``.
PROBABILITY_CODES = {
    8: ProbabilityCode(200, 255, "uint8"),
    16: ProbabilityCode(10_000, 65_535, "uint16"),
}


def set_dtype(n_classes: int) -> str:
    """Data type that holds a bit per class; or the size alone, of very many classes."""
    return "uint16" if n_classes <= 16 or n_classes > MOST_IN_MASK else "uint32"


def encode_sets(inside: npt.NDArray[np.bool_], valid: npt.NDArray[np.bool_]) -> Any:
    """Layer ``conformal_set``.

    Args:
        inside: (K, h, w).
        valid: (h, w).

    Returns:
        (2, h, w) size and members, bit k for class index k; (1, h, w) size alone of more than
        32 classes; 0 where there is no prediction.
    """
    k = len(inside)
    kind = np.dtype(set_dtype(k))
    layers = [inside.view(np.uint8).sum(axis=0, dtype=np.uint8).astype(kind)]
    if k <= MOST_IN_MASK:
        mask = np.zeros(valid.shape, kind)
        for i in range(k):
            mask |= inside[i] * kind.type(1 << i)
        layers.append(mask)
    out = np.stack(layers)
    if not valid.all():
        out[:, ~valid] = SET_NODATA
    return out
