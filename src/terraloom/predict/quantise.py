"""Networks in whole numbers of 8 bits: which layers, at which ranges of their values.

Static quantisation of the convolutions: weights per channel, inputs by the ranges that chips show.
Some layers, mostly the first and the last, lose too much and stay in float32. Which ones is chosen
on chips of their own: layers in the order of what each does to the predictions alone, and of these
as few as the whole ensemble needs to agree. Other chips judge the result.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from terraloom.errors import ModelError, StateError
from terraloom.io import atomic
from terraloom.log import get_logger
from terraloom.models.mapnet import MapNet
from terraloom.predict.agreement import OnPixels, chips_to_compare, on_pixels
from terraloom.predict.ensemble import Ensemble
from terraloom.predict.onnx_runtime import EXTRA, INT8, OnnxMember, onnx_path, open_session
from terraloom.train.windows import inputs_of

__all__ = ["fewest_kept", "quantise_ensemble", "split_chips"]

#: Most chips whose values give the ranges and choose the layers (count).
_CALIBRATE = 24
#: Of them those that each layer by itself is tried on (count).
_TRY = 4
#: What is aimed at where layers are chosen, above the limits of the verdict on other chips: share
#: of the same class, overlap of the two class maps, mean difference of values.
_AIM_SAME, _AIM_IOU, _AIM_MEAN = 0.993, 0.993, 0.01

F32 = npt.NDArray[np.float32]
log = get_logger(__name__)


def split_chips(n: int) -> tuple[list[int], list[int]]:
    """Numbers of the chips that give ranges and choose layers, and of those that judge.

    Raises:
        StateError: There are too few.
    """
    choose = list(range(1, n, 3))
    if not choose:
        raise StateError(f"{n} chip(s)", where="results/chips/chips.zip", allowed="2 or more",
                         fix="use more labels, or set predict.runtime to onnx")  # fmt: skip
    judge = [i for i in range(n) if i % 3 != 1]
    some = np.linspace(0, len(choose) - 1, min(len(choose), _CALIBRATE)).astype(int)
    return [choose[i] for i in some], [judge[i] for i in chips_to_compare(len(judge))]


def quantise_ensemble(
    files: Sequence[Path], nets: Sequence[MapNet], reference: Ensemble, chips: xr.Dataset,
    threads: int,
) -> list[str]:  # fmt: skip
    """Write the file in 8 bits of each member beside that in float32.

    Args:
        files: Weights of the members, whose files in float32 are there.
        nets: Their networks.
        reference: The same members in torch.
        chips: Chips to choose on.
        threads: Threads (count).

    Returns:
        Names of the layers that stay in float32, the most sensitive first.

    Raises:
        ModelError: An extra is not installed.
    """
    try:
        import onnxruntime.quantization  # noqa: F401
        from onnx import load_model
    except ImportError as err:
        raise ModelError("onnx and onnxruntime are not installed", where="export-model",
                         fix=EXTRA) from err  # fmt: skip
    sessions = [OnnxMember(n, open_session(onnx_path(f), threads))
                for f, n in zip(files, nets, strict=True)]  # fmt: skip
    windows = list(_windows(chips))
    layers = [n.name for n in load_model(str(onnx_path(files[0]))).graph.node
              if n.op_type == "Conv"]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        caches = [Path(folder) / f"{i}.json" for i in range(len(files))]

        def write(member: int, path: Path, kept: Collection[str]) -> None:
            _quantise(onnx_path(files[member]), path, sessions[member], windows, kept,
                      caches[member])  # fmt: skip

        def damage(layer: str) -> float:
            path = Path(folder) / "one.onnx"
            write(0, path, set(layers) - {layer})
            other = OnnxMember(nets[0], open_session(path, threads))
            return _damage(sessions[0], other, windows[:_TRY])

        order = sorted(layers, key=_noted(damage), reverse=True)

        def agrees(n_kept: int) -> bool:
            members = []
            for i, (file, net) in enumerate(zip(files, nets, strict=True)):
                path = onnx_path(file, INT8)
                with atomic(path) as tmp:
                    write(i, tmp, order[:n_kept])
                members.append(OnnxMember(net, open_session(path, threads)))
            other = Ensemble(tuple(members), reference.calibrations, reference.digest)
            found = on_pixels(reference, other, chips)
            log.info("%d of %d layers in float32: %s", n_kept, len(layers), found.told())
            return _good(found)

        n_kept = fewest_kept(len(layers), agrees)
        agrees(n_kept)  # the files of the last trial are those of another number
    return order[:n_kept]


def fewest_kept(n: int, agrees: Callable[[int], bool]) -> int:
    """The fewest of n layers to keep so that the rest agrees, by halving; all but one at most."""
    low, high = 0, n - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if agrees(middle) else (middle + 1, high)
    return low


def _noted(damage: Callable[[str], float]) -> Callable[[str], float]:
    def one(layer: str) -> float:
        value = damage(layer)
        log.info("layer %s alone in 8 bits: predictions differ by %.2g on average", layer, value)
        return value

    return one


def _good(found: OnPixels) -> bool:
    means = [v for k, v in found.mean.items() if k not in found.same]
    return (
        min(found.same.values(), default=1.0) >= _AIM_SAME
        and min(found.iou.values(), default=1.0) >= _AIM_IOU
        and max(means, default=0) <= _AIM_MEAN
    )


def _windows(chips: xr.Dataset) -> Iterator[dict[str, torch.Tensor]]:
    for i in range(chips.sizes["n"]):
        yield inputs_of(chips.isel(n=[i]).load())


def _damage(
    reference: OnnxMember, other: OnnxMember, windows: Sequence[Mapping[str, torch.Tensor]]
) -> float:
    """Mean difference of the predictions, the largest of the tasks; of values over 1 + |value|."""
    worst: dict[str, float] = {}
    for x in windows:
        a, b = reference.predict(x), other.predict(x)
        for task in reference.spec.tasks:
            p, q = (v[task.name].numpy() for v in (a, b))
            if task.kind == "regression":
                p, q = p[:, :1], q[:, :1]
            off = np.abs(p - q) / (1 + np.abs(p) if task.kind == "regression" else 1)
            worst[task.name] = worst.get(task.name, 0.0) + float(off.mean()) / len(windows)
    return max(worst.values())


class _Readings:
    """Inputs for ONNX Runtime to find the ranges of values with."""

    def __init__(self, member: OnnxMember, windows: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self._rest = (member.whole(x)[0] for x in windows)

    def get_next(self) -> Mapping[str, F32] | None:
        """The next window, or None at the end."""
        return next(self._rest, None)


def _quantise(
    source: Path, path: Path, member: OnnxMember, windows: Sequence[Mapping[str, torch.Tensor]],
    kept: Collection[str], cache: Path,
) -> None:  # fmt: skip
    """Write the network of a file in 8 bits, some layers in float32."""
    from onnxruntime import quantization as q

    noisy: Any = logging.getLogger()
    before = noisy.level
    noisy.setLevel(logging.ERROR)  # it advises, by a warning, what needs another package
    try:
        q.quantize_static(
            str(source), str(path), _Readings(member, windows), quant_format=q.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"], per_channel=True, reduce_range=True,
            activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
            nodes_to_exclude=sorted(kept), calibration_cache_path=str(cache),
        )  # fmt: skip
    finally:
        noisy.setLevel(before)
