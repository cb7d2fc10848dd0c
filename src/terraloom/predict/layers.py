"""What a tile keeps of the members' predictions: encoded layers, pixel by pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.config.base import TaskKind
from terraloom.config.labels import Task
from terraloom.legend import IGNORE_INDEX
from terraloom.models.mapnet import FEATURES
from terraloom.predict.calibration import calibrated_parts, most_probable
from terraloom.predict.encoding import (
    PROBABILITY_CODES,
    REGRESSION_NODATA,
    ProbabilityCode,
    encode_sets,
)
from terraloom.predict.members import encode_members, member_layer
from terraloom.predict.trust import Trust
from terraloom.train.ensemble import Calibration
from terraloom.uncertainty.conformal import ClassSets, Interval
from terraloom.uncertainty.decompose import (
    EntropyParts,
    decompose_regression,
    encode_entropy,
)

__all__ = ["Layers"]
#: Names of the dimension before rows and columns.
_FIRST = {
    "probabilities": "class", "uncertainty": "kind", "conformal_set": "set",
    "applicability": "domain",
}  # fmt: skip

F32 = npt.NDArray[np.float32]
Valid = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Layers:
    """The layers of a campaign's tiles. Each pixel is encoded by itself.

    Attributes:
        tasks: Tasks of the campaign.
        calibrations: Per segmentation task.
        probability_bits: Of stored probabilities, 8 or 16.
        trust: Sets, intervals and applicability.
        spread: Whether means of the single members are kept, for totals of regions.
    """

    tasks: Sequence[Task]
    calibrations: Mapping[str, Calibration]
    probability_bits: int = 8
    trust: Trust = field(default_factory=Trust)
    spread: bool = False

    def encode(self, values: Mapping[str, F32], valid: Valid) -> dict[str, npt.NDArray[Any]]:
        """Layers of a window, encoded as in the products.

        Args:
            values: Members' predictions per task, (M, c, h, w), and what applicability needs.
            valid: (h, w); other pixels get no prediction.

        Returns:
            (h, w) or (n, h, w) per layer: ``class_index`` (255 = none), ``probabilities``,
            ``uncertainty``, and one of the name of each further task; what :attr:`trust` knows:
            ``conformal_set``, ``applicability``, bounds of values. With :attr:`spread` also
            :func:`member_layer` of classes and values, (M, c, h / 6, w / 6).
        """
        out: dict[str, npt.NDArray[Any]] = {}
        code = PROBABILITY_CODES[self.probability_bits]
        for task in self.tasks:
            members = values[task.name]
            if task.kind is TaskKind.SEGMENTATION:
                sets = self.trust.sets.get(task.name)
                kept = np.empty_like(members, order="C") if self.spread else None
                found = calibrated_parts(members, self.calibrations[task.name], kept)
                out.update(_classes(found, code, valid, sets))
                if kept is not None:
                    out[member_layer(task)] = encode_members(kept, valid, task.kind)
            elif task.kind is TaskKind.REGRESSION:
                span = self.trust.intervals.get(task.name)
                out[task.name] = _regression(members, valid, task.range, span)
                if self.spread:
                    out[member_layer(task)] = encode_members(members[:, :1], valid, task.kind)
            else:
                out[task.name] = code.encode(members.mean(axis=0)[0], valid)
        if FEATURES in values:
            out["applicability"] = self.trust.judge(values[FEATURES], valid)
        return out

    @staticmethod
    def dims(name: str, ndim: int) -> tuple[str, ...]:
        """Names of a layer's dimensions in the store of a tile."""
        if ndim == 4:
            # Of classes and of a value there are not the same number of channels.
            return ("member", f"{name}_channel", "y_cell", "x_cell")
        return ("y", "x") if ndim == 2 else (_FIRST.get(name, "part"), "y", "x")


def _classes(
    parts: EntropyParts, code: ProbabilityCode, valid: Valid, sets: ClassSets | None
) -> dict[str, npt.NDArray[Any]]:
    k = len(parts.mean)
    top = most_probable(parts.mean)
    index = np.where(valid, top, np.uint8(IGNORE_INDEX))
    entropies = [encode_entropy(e, k, valid) for e in
                 (parts.total, parts.aleatoric, parts.epistemic)]  # fmt: skip
    out = {
        "class_index": index,
        "probabilities": code.encode(parts.mean, valid),
        "uncertainty": np.stack(entropies),
    }
    if sets is not None:
        out["conformal_set"] = encode_sets(sets.contains(parts.mean, top), valid)
    return out


def _regression(
    members: F32, valid: Valid, allowed: tuple[float, float] | None, span: Interval | None
) -> F32:
    parts = decompose_regression(members[:, 0], members[:, 1])
    mean = parts.mean if allowed is None else np.clip(parts.mean, *allowed)
    layers = [mean, parts.aleatoric_sd, parts.epistemic_sd]
    if span is not None:
        ends = members[:, 2:].mean(axis=0) if span.kind == "quantile" else (parts.mean, parts.sd)
        bounds = span.bounds(*ends)
        layers += list(bounds if allowed is None else np.clip(bounds, *allowed))
    out = np.stack(layers).astype(np.float32)
    out[:, ~valid] = REGRESSION_NODATA
    return out
