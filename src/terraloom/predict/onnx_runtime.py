"""Members of an ensemble that run in ONNX Runtime, from the files that `export-model` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from terraloom.errors import ModelError, StateError
from terraloom.io import digest_json, read_json, sha256
from terraloom.models.fusion import FusionSpec
from terraloom.models.mapnet import FEATURES, MapNet
from terraloom.models.registry import card_path
from terraloom.preprocess.groups import group_factor, group_order

__all__ = ["EXTRA", "FP32", "INT8", "ONNX", "OnnxMember", "agreement_path", "digest_of",
           "onnx_members", "onnx_path", "open_session", "remedy", "require_agreement"]  # fmt: skip

#: Folder of the files, below that of the model.
ONNX = "onnx"
#: Values of ``predict.runtime``: as the networks are, and in 8 bits.
FP32, INT8 = "onnx", "onnx-int8"
EXTRA = "pip install 'terraloom[onnx]', or set predict.runtime to torch"
_AGAIN = "run terraloom export-model"

F32 = npt.NDArray[np.float32]


def onnx_path(member: Path, runtime: str = FP32) -> Path:
    """The ONNX file of a member: ``onnx/fold-0-member-0.onnx`` beside its fold's folder.

    Args:
        member: Its weights, ``fold-0/member-0.safetensors``.
        runtime: :data:`INT8`: ``onnx/fold-0-member-0.int8.onnx``.
    """
    kind = ".int8.onnx" if runtime == INT8 else ".onnx"
    return member.parent.parent / ONNX / f"{member.parent.name}-{member.stem}{kind}"


def agreement_path(folder: Path, runtime: str = FP32) -> Path:
    """What was found when the files of a runtime were compared with the networks."""
    return folder / ONNX / ("agreement-int8.json" if runtime == INT8 else "agreement.json")


def digest_of(files: Sequence[Path], runtime: str = FP32) -> str:
    """Digest of the ONNX files of members."""
    return digest_json([sha256(onnx_path(f, runtime)) for f in files])


@dataclass(frozen=True)
class OnnxMember:
    """A network in ONNX Runtime, with the geometry and the outputs of the one it was made from.

    Attributes:
        net: That network, for what is known of it; it is not run.
        session: Session of ONNX Runtime; several threads may use it at once.
    """

    net: MapNet
    session: Any

    @property
    def spec(self) -> FusionSpec:
        """What the network takes and predicts."""
        return self.net.spec

    @property
    def stride_px(self) -> int:
        """See :class:`MapNet`."""
        return self.net.stride_px

    def halo_px(self) -> int:
        """See :class:`MapNet`."""
        return self.net.halo_px()

    def feature_slices(self) -> dict[str, tuple[int, slice]]:
        """See :class:`MapNet`."""
        return self.net.feature_slices()

    def predict(
        self, inputs: Mapping[str, Tensor], *, describe: bool = False, logits: bool = False
    ) -> dict[str, Tensor]:
        """Physical predictions per task; see :meth:`MapNet.predict`.

        Windows that are no whole strides are padded with NaN and cut back.
        """
        whole, (height, width) = self.whole(inputs)
        names = [*(t.name for t in self.spec.tasks), *([FEATURES] if describe else [])]
        found = self.session.run(names, whole)
        out = {k: torch.from_numpy(v[..., :height, :width])
               for k, v in zip(names, found, strict=True)}  # fmt: skip
        for task in self.spec.tasks:
            if logits and task.classed:  # the files give probabilities, for use elsewhere
                out[task.name] = out[task.name].log_()
        return out

    def whole(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, F32], tuple[int, int]]:
        """All groups in whole strides, padded with NaN, and height and width before."""
        known = {g: x.numpy() for g, x in inputs.items() if g in self.spec.channels}
        if not known:
            raise ModelError(f"inputs {sorted(inputs)}", allowed=", ".join(self.spec.channels))
        height, width = _size(known)
        h, w = (-(-v // self.stride_px) * self.stride_px for v in (height, width))
        n = len(next(iter(known.values())))
        return {
            g: _whole(known.get(g), (n, len(names), h // group_factor(g), w // group_factor(g)), g)
            for g, names in self.spec.channels.items()
        }, (height, width)


def _size(inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[int, int]:
    """Height and width at 10 m, of the finest group."""
    g = group_order(inputs)[0]
    f = group_factor(g)
    return f * inputs[g].shape[2], f * inputs[g].shape[3]


def _whole(x: npt.NDArray[Any] | None, shape: tuple[int, int, int, int], group: str) -> F32:
    """Values of a group, padded with NaN to a shape."""
    if x is None:
        return np.full(shape, np.nan, np.float32)
    if x.shape[1] != shape[1] or any(a > b for a, b in zip(x.shape[2:], shape[2:], strict=True)):
        raise ModelError(f"input of shape {x.shape}", where=group, allowed=f"{shape} or less")
    if x.shape == shape:
        return np.ascontiguousarray(x, dtype=np.float32)
    out = np.full(shape, np.nan, np.float32)
    out[:, :, : x.shape[2], : x.shape[3]] = x
    return out


def open_session(path: Path, threads: int) -> Any:
    """A session of a file in ONNX Runtime.

    Args:
        path: The file.
        threads: Threads of a run (count).

    Raises:
        ModelError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as err:
        raise ModelError("onnxruntime is not installed", where="predict.runtime onnx",
                         fix=EXTRA) from err  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(path), sess_options=options, providers=["CPUExecutionProvider"]
    )


def onnx_members(
    files: Sequence[Path], nets: Sequence[MapNet], threads: int, runtime: str = FP32
) -> tuple[OnnxMember, ...]:
    """Sessions of the ONNX files of members.

    Args:
        files: Weights of the members.
        nets: Their networks.
        threads: Threads of each session (count).
        runtime: :data:`FP32` or :data:`INT8`.

    Raises:
        ModelError: ONNX Runtime is not installed, or a file was made from other weights.
        StateError: A file is missing or damaged.
    """
    out = []
    for file, net in zip(files, nets, strict=True):
        path = onnx_path(file, runtime)
        _check(path, file, net)
        out.append(OnnxMember(net, open_session(path, threads)))
    return tuple(out)


def _check(path: Path, member: Path, net: MapNet) -> None:
    """Refuse a file that is not what its contract says, or not of this member."""
    if not path.is_file():
        raise StateError("the ONNX file is missing", where=str(path), fix=_AGAIN)
    contract = read_json(card_path(path))
    if contract["sha256"] != sha256(path):
        raise StateError("the ONNX file differs from its contract", where=str(path), fix=_AGAIN)
    if contract["weights"] != read_json(card_path(member))["sha256"]:
        raise ModelError("made from other weights than the member's", where=str(path),
                         fix=_AGAIN)  # fmt: skip
    takes = {g: list(i["channels"]) for g, i in contract["inputs"].items()}
    if takes != {g: list(c) for g, c in net.spec.channels.items()}:
        raise ModelError("takes other channels than the member", where=str(path), fix=_AGAIN)


def require_agreement(folder: Path, files: Sequence[Path], runtime: str = FP32) -> None:
    """Refuse ONNX files whose agreement with the networks was not shown.

    Args:
        folder: The model's.
        files: Weights of the members.
        runtime: :data:`FP32` or :data:`INT8`.

    Raises:
        StateError: They were not compared, or changed since.
        ModelError: They do not agree.
    """
    path = agreement_path(folder, runtime)
    missing = [str(p) for f in files if not (p := onnx_path(f, runtime)).is_file()]
    if missing or not path.is_file():
        raise StateError("the networks were not exported",
                         where=missing[0] if missing else str(path), fix=_AGAIN)  # fmt: skip
    record = read_json(path)
    if record.get("digest") != digest_of(files, runtime):
        raise StateError("the ONNX files are not those that were compared", where=str(path),
                         fix=_AGAIN)  # fmt: skip
    if not record["passed"]:
        raise ModelError(f"the ONNX files do not agree with the networks: {record['failed']}",
                         where=str(path), fix=remedy(runtime))  # fmt: skip


def remedy(runtime: str) -> str:
    """What to do when the files of a runtime do not agree with the networks."""
    return f"set predict.runtime to {'onnx or torch' if runtime == INT8 else 'torch'}"
