"""The networks of a model and their calibration, as one thing that predicts windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from terraloom.errors import ModelError
from terraloom.io import digest_json, read_json, sha256
from terraloom.models.mapnet import MapNet
from terraloom.models.registry import load_member
from terraloom.train.ensemble import Calibration

__all__ = ["MODEL", "Ensemble", "member_files"]

MODEL = Path("results/model")


def member_files(folder: Path = MODEL) -> list[Path]:
    """Weights of all members below a model folder, in the order that they predict in.

    Raises:
        ModelError: No member is there.
    """
    files = sorted(folder.glob("fold-*/member-*.safetensors"))
    if not files:
        raise ModelError("no member is there", where=str(folder), fix="run target `model`")
    return files


@dataclass(frozen=True)
class Ensemble:
    """All members and their calibration.

    Attributes:
        members: Networks in evaluation mode.
        calibrations: Per segmentation task, found on held-out folds.
        digest: Digest of weights and calibration.
    """

    members: tuple[MapNet, ...]
    calibrations: Mapping[str, Calibration]
    digest: str

    @classmethod
    def load(cls, folder: Path = MODEL) -> Ensemble:
        """Read all members below a model folder.

        Raises:
            ModelError: No member is there, members differ in channels, or a task has no
                calibration.
        """
        files = member_files(folder)
        members = tuple(load_member(f)[0] for f in files)
        if len({str(m.spec.channels) for m in members}) > 1:
            raise ModelError("members of different kinds", where=str(folder), fix="train again")
        record = read_json(folder / "calibration.json")
        digest = digest_json([record, [sha256(f) for f in files]])
        found = {k: Calibration.from_record(v) for k, v in record.get("tasks", {}).items()}
        maps = {t.name for t in members[0].spec.tasks if t.kind == "segmentation"}
        if maps - set(found):
            raise ModelError(f"no calibration of {', '.join(sorted(maps - set(found)))}",
                             where=str(folder), fix="run target `model` again")  # fmt: skip
        return cls(members, found, digest)

    @property
    def halo_px(self) -> int:
        """Pixels to read around a tile."""
        stride = math.lcm(*(m.stride_px for m in self.members))
        return math.ceil(max(m.halo_px() for m in self.members) / stride) * stride

    def predict(
        self, inputs: Mapping[str, npt.NDArray[np.float32]]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Members' predictions of N windows.

        Args:
            inputs: Per group (N, C, h / factor, w / factor), NaN = missing.

        Returns:
            Per task (M, N, c, h, w); see :meth:`MapNet.predict`.
        """
        tensors = {g: torch.from_numpy(x) for g, x in inputs.items()}
        outs = [m.predict(tensors) for m in self.members]
        return {name: np.stack([o[name].numpy() for o in outs]) for name in outs[0]}
