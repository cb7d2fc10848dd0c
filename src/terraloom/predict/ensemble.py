"""The networks of a model and their calibration, as one thing that predicts windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import avg_pool2d

from terraloom.config.campaign import Campaign
from terraloom.errors import ModelError
from terraloom.io import digest_json, read_json, sha256
from terraloom.log import get_logger
from terraloom.models.devices import be_exact, choose_device
from terraloom.models.mapnet import FEATURES, MapNet
from terraloom.models.registry import load_member
from terraloom.predict.dropout import drop_channels, dropout_pass
from terraloom.predict.folding import folded
from terraloom.predict.onnx_runtime import OnnxMember, digest_of, onnx_members, require_agreement
from terraloom.predict.trust import Trust
from terraloom.predict.windows import Place
from terraloom.train.ensemble import Calibration
from terraloom.uncertainty.applicability import CELL_PX

__all__ = ["MODEL", "Ensemble", "member_files", "set_up_torch", "workers_of"]

MODEL = Path("results/model")
_CPU = torch.device("cpu")
#: Most windows that are worked on side by side; more threads share a window (count).
_MOST_WORKERS = 4

F32 = npt.NDArray[np.float32]
log = get_logger(__name__)


def member_files(folder: Path = MODEL) -> list[Path]:
    """Weights of all members below a model folder, in the order that they predict in.

    Raises:
        ModelError: No member is there.
    """
    files = sorted(folder.glob("fold-*/member-*.safetensors"))
    if not files:
        raise ModelError("no member is there", where=str(folder), fix="run target `model`")
    return files


def set_up_torch(threads: int, device: torch.device) -> None:
    """Threads of this process, and arithmetic that gives the same numbers every time."""
    torch.set_num_threads(threads)
    be_exact(device)
    # Every layer writes all of its output; filling it before costs 10-15 % of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def workers_of(threads: int, device: torch.device) -> int:
    """Windows that are worked on side by side (count).

    On processors a window per thread is faster than all threads in each layer, which wait for
    each other at its end. A GPU works on one window.
    """
    return min(threads, _MOST_WORKERS) if device.type == "cpu" else 1


@dataclass(frozen=True)
class Ensemble:
    """All members and their calibration.

    Attributes:
        members: Networks in evaluation mode, on :attr:`device`, or in ONNX Runtime.
        calibrations: Per segmentation task, found on held-out folds.
        digest: Digest of weights, calibration and trust.
        device: Where the networks run.
        bf16: Whether they run in bfloat16.
        passes: Passes with dropout per member (count); 0: one pass without.
        trust: Sets, intervals and applicability.
        described: Positions of the members whose features :attr:`trust` needs.
    """

    members: tuple[MapNet | OnnxMember, ...]
    calibrations: Mapping[str, Calibration]
    digest: str
    device: torch.device = _CPU
    bf16: bool = False
    passes: int = 0
    trust: Trust = field(default_factory=Trust)
    described: tuple[int, ...] = ()

    @classmethod
    def load(cls, folder: Path = MODEL, campaign: Campaign | None = None) -> Ensemble:
        """Read all members below a model folder.

        Args:
            folder: The model's.
            campaign: Says how to predict, and sets torch up for it; and which layers of trust are
                wanted; without it as
                :class:`Ensemble` does by default.

        Raises:
            ModelError: No member is there, members differ in channels, or a task has no
                calibration. The device is not there, or dropout is wanted of networks without.
            StateError: Networks in ONNX Runtime are wanted that were not exported and compared.
        """
        files = member_files(folder)
        nets = tuple(folded(load_member(f)[0]) for f in files)
        if len({str(m.spec.channels) for m in nets}) > 1:
            raise ModelError("members of different kinds", where=str(folder), fix="train again")
        record = read_json(folder / "calibration.json")
        digest = digest_json([record, [sha256(f) for f in files]])
        found = {k: Calibration.from_record(v) for k, v in record.get("tasks", {}).items()}
        maps = {t.name for t in nets[0].spec.tasks if t.kind == "segmentation"}
        if maps - set(found):
            raise ModelError(f"no calibration of {', '.join(sorted(maps - set(found)))}",
                             where=str(folder), fix="run target `model` again")  # fmt: skip
        if campaign is None:
            return cls(nets, found, digest)
        how = campaign.predict
        onnx = how.runtime != "torch"
        device = _CPU if onnx else choose_device(how.device, "predict.device")
        set_up_torch(how.threads, device)
        if how.dropout_passes:
            nets = tuple(drop_channels(m, campaign.seed, i) for i, m in enumerate(nets))
        nets = tuple(m.to(device) for m in nets)
        members: tuple[MapNet | OnnxMember, ...] = nets
        if onnx:
            require_agreement(folder, files, how.runtime)
            each = how.threads // workers_of(how.threads, device)
            members = onnx_members(files, nets, each, how.runtime)
            digest = digest_json([digest, digest_of(files, how.runtime)])
        if how.precision == "bf16":
            log.warning("bf16: a few per cent of the pixels get another class than with fp32")
        trust = Trust.load(campaign, folder)
        names = [f.relative_to(folder).with_suffix("").as_posix() for f in files]
        if set(trust.networks) - set(names):
            raise ModelError(f"applicability of {', '.join(trust.networks)}", where=str(folder),
                             allowed=", ".join(names), fix="run target `model` again")  # fmt: skip
        return cls(
            members, found, digest_json([digest, trust.digest]), device, how.precision == "bf16",
            how.dropout_passes, trust, tuple(names.index(n) for n in trust.networks),
        )  # fmt: skip

    def on(self, device: str) -> Ensemble:
        """The same ensemble on another kind of device; this one stays where it is."""
        if device == self.device.type:
            return self
        members = tuple(deepcopy(m).to(device) for m in self.members if isinstance(m, MapNet))
        return replace(self, members=members, device=torch.device(device))

    @property
    def stride_px(self) -> int:
        """Corners of the windows to predict are multiples of this, in pixels of the grid."""
        cell = CELL_PX if self.described else 1
        return math.lcm(cell, *(m.stride_px for m in self.members))

    @property
    def halo_px(self) -> int:
        """Pixels to read around a window: what a pixel sees, up to whole strides."""
        return math.ceil(max(m.halo_px() for m in self.members) / self.stride_px) * self.stride_px

    @property
    def values_per_px(self) -> float:
        """Values that :meth:`predict` takes and gives per pixel (count), for bounds of memory."""
        net = self.members[0]
        taken = sum(at.stop - at.start for _, at in net.feature_slices().values())
        given = sum(t.channels for t in net.spec.tasks)
        given += net.spec.widths[0] if self.described else 0
        return float(taken + given * len(self.members) * max(self.passes, 1))

    def predict(
        self, inputs: Mapping[str, F32], within: Sequence[Place] | None = None
    ) -> dict[str, F32]:
        """Members' predictions of N windows, which may be called from several threads at once.

        Args:
            inputs: Per group (N, C, h / factor, w / factor), NaN = missing.
            within: Rows and columns that are wanted of each window, of one size; with
                applicability whole cells. None: all.

        Returns:
            Per task (M, N, c, h, w); see :meth:`MapNet.predict`; of classes (those of
            :attr:`calibrations`) the logits. With dropout M counts the passes of all members.
            Where applicability is wanted also :data:`FEATURES`, of the first pass of the members
            :attr:`described`: means of cells, (F, N, D, h / CELL_PX, w / CELL_PX).
        """
        tensors = {g: torch.from_numpy(x).to(self.device) for g, x in inputs.items()}
        n = len(next(iter(inputs.values())))
        places = within or [(slice(None), slice(None))] * n
        out: dict[str, F32] = {}
        total, described = len(self.members) * max(self.passes, 1), 0
        for i, found in enumerate(self._each(tensors)):
            for name, values in found.items():
                parts = [values[k : k + 1, :, r, c] for k, (r, c) in enumerate(places)]
                if name == FEATURES:
                    parts = [avg_pool2d(v.float(), CELL_PX) for v in parts]
                size, at = (total, i) if name != FEATURES else (len(self.described), described)
                if name not in out:
                    out[name] = np.empty((size, n, *parts[0].shape[1:]), np.float32)
                for target, part in zip(out[name][at], parts, strict=True):
                    torch.from_numpy(target).copy_(part[0])
            described += FEATURES in found
        return out

    def _each(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        """Predictions of each member, of each pass."""
        fast: Any = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        numbers: list[int | None] = list(range(self.passes)) or [None]
        for i, member in enumerate(self.members):
            for number in numbers:
                describe = i in self.described and number in (None, 0)
                with fast, dropout_pass(number):
                    found = member.predict(tensors, describe=describe, logits=True)
                yield found
