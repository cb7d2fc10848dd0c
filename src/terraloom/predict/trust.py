"""Layers that say how far a prediction can be trusted: sets, intervals, applicability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from terraloom.config.campaign import Campaign
from terraloom.errors import ModelError
from terraloom.io import digest_json, read_json, sha256
from terraloom.predict.encoding import APPLICABILITY_NODATA, APPLICABILITY_SCALES
from terraloom.uncertainty.applicability import CELL_PX, Applicability
from terraloom.uncertainty.applicability_file import FILE, read_applicability
from terraloom.uncertainty.conformal import ClassSets, Interval

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Trust", "TrustFacts"]


@dataclass(frozen=True)
class Trust:
    """What is known of the reliability of a model's predictions.

    Attributes:
        sets: Per segmentation task.
        intervals: Per regression task.
        applicability: None where it is not wanted.
        networks: Names of the networks that applicability needs the features of.
        digest: Digest of all this.
    """

    sets: Mapping[str, ClassSets] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    applicability: Applicability | None = None
    networks: tuple[str, ...] = ()
    digest: str = ""

    @classmethod
    def load(cls, campaign: Campaign, folder: Path) -> Trust:
        """Read what the campaign wants of a model folder.

        Raises:
            ModelError: A file that is wanted is not there, or cannot be read.
        """
        record: dict[str, Any] = {}
        if campaign.uncertainty.sets:
            record = _wanted(folder / "conformal.json", "sets")["tasks"]
        try:
            sets = {n: ClassSets.from_record(r) for n, r in record.items() if r["kind"] == "sets"}
            spans = {n: Interval.from_record(r) for n, r in record.items() if r["kind"] != "sets"}
        except (KeyError, TypeError, ValueError) as err:
            raise ModelError(f"a record that cannot be read ({err!r})",
                             where=str(folder / "conformal.json"),
                             fix="run target `model` again") from err  # fmt: skip
        applicability, networks, digest = None, list[str](), digest_json(record)
        if campaign.uncertainty.applicability:
            _wanted((folder / FILE).with_suffix(".json"), "applicability")
            applicability, networks = read_applicability(folder)
            digest = digest_json([digest, sha256(folder / FILE), applicability.threshold])
        return cls(sets, spans, applicability, tuple(networks), digest)

    def judge(
        self, features: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.uint16]:
        """Layer ``applicability`` of a window.

        Args:
            features: (F, D, h / CELL_PX, w / CELL_PX) of the cells, of :attr:`networks`.
            valid: (h, w).

        Returns:
            (3, h, w): dissimilarity, density and inside; steps of ``APPLICABILITY_SCALES``.
        """
        if self.applicability is None:
            raise ModelError("no reference of training", where="applicability")
        found = self.applicability.judge([f.reshape(len(f), -1).T for f in features])
        parts = np.stack([found.dissimilarity, found.density, found.inside.astype(np.float32)])
        steps = parts / np.array(APPLICABILITY_SCALES, np.float32)[:, None]
        code = np.rint(np.nan_to_num(steps)).clip(0, APPLICABILITY_NODATA - 1).astype(np.uint16)
        h, w = valid.shape
        out = code.reshape(3, h // CELL_PX, w // CELL_PX)
        out = out.repeat(CELL_PX, axis=1).repeat(CELL_PX, axis=2)
        if not valid.all():
            out[:, ~valid] = APPLICABILITY_NODATA
        return out


def _wanted(path: Path, key: str) -> dict[str, Any]:
    if not path.exists():
        raise ModelError(
            "the model has no such file", where=str(path),
            fix=f"run target `model` again, or set uncertainty.{key}: no",
        )  # fmt: skip
    record: dict[str, Any] = read_json(path)
    return record


class TrustFacts:
    """What ``map.json`` says of the layers of trust, summed tile by tile.

    Args:
        codes: Codes of the classes, in the order of their index.
    """

    def __init__(self, codes: Sequence[int]) -> None:
        self._codes = codes
        self._inside_m2 = dict.fromkeys(codes, 0.0)
        self._tiles: dict[str, float | None] = {}
        self._px = np.zeros(2, np.int64)
        self._sizes = np.zeros(len(codes) + 1, np.int64)
        self._has_sets = False

    def add(self, tile: str, store: xr.Dataset, row_area: npt.NDArray[np.float64]) -> None:
        """Add a predicted tile; ``row_area`` is the area of a pixel per row (square metres)."""
        index = store["class_index"].to_numpy()
        mapped = index < len(self._codes)
        if "conformal_set" in store:
            self._has_sets = True
            size = store["conformal_set"].to_numpy()[0][mapped]
            self._sizes += np.bincount(size, minlength=len(self._sizes))
        if "applicability" in store:
            inside = mapped & (store["applicability"].to_numpy()[2] == 1)
            for k, code in enumerate(self._codes):
                here = (inside & (index == k)).sum(axis=1)
                self._inside_m2[code] += float((here * row_area).sum())
            px = np.array([inside.sum(), mapped.sum()])
            self._px += px
            self._tiles[tile] = 100 * float(px[0] / px[1]) if px[1] else None

    def record(self) -> dict[str, Any]:
        """Entries of ``map.json``; none for a layer that there is not."""
        out: dict[str, Any] = {}
        n = int(self._sizes.sum())
        if self._has_sets:
            share = self._sizes / max(n, 1)
            out["conformal_set"] = {
                "size_pct": {str(i): 100 * float(s) for i, s in enumerate(share) if i},
                "mean_size": float((share * np.arange(len(share))).sum()) if n else None,
            }
        if self._tiles:
            inside, whole = self._px.tolist()
            out["applicability"] = {
                "inside_pct": 100 * inside / whole if whole else None,
                "inside_ha": {str(c): a / 1e4 for c, a in self._inside_m2.items()},
                "tiles_inside_pct": self._tiles,
            }
        return out
