"""How values between 0 and 1 are stored in whole numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["PROBABILITY_CODES", "ProbabilityCode"]


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
            probability: (H, W), clipped to 0-1.
            valid: (H, W).
        """
        code = np.rint(np.clip(probability, 0, 1) * self.steps)
        # A pixel that is not valid may hold NaN, which has no whole number.
        stored: npt.NDArray[np.unsignedinteger] = np.where(valid, code, self.nodata).astype(
            self.dtype
        )
        return stored


#: By ``products.probability_bits``.
PROBABILITY_CODES = {
    8: ProbabilityCode(200, 255, "uint8"),
    16: ProbabilityCode(10_000, 65_535, "uint16"),
}
