"""Networks as ONNX files, and the proof that these predict the same."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from terraloom.config.campaign import Campaign
from terraloom.errors import ModelError
from terraloom.io import atomic, read_json, read_store, sha256, write_json
from terraloom.log import get_logger
from terraloom.models.fusion import FusionNet
from terraloom.models.mapnet import FEATURES, MapNet
from terraloom.models.registry import architecture_of, card_path
from terraloom.predict.agreement import chips_to_compare, compared
from terraloom.predict.ensemble import MODEL, Ensemble, member_files, set_up_torch
from terraloom.predict.onnx_runtime import (
    EXTRA,
    FP32,
    INT8,
    agreement_path,
    digest_of,
    onnx_members,
    onnx_path,
    remedy,
)
from terraloom.predict.quantise import quantise_ensemble, split_chips
from terraloom.preprocess.groups import group_factor, group_order
from terraloom.train.model_files import CHIPS

__all__ = ["OPSET", "export_member", "export_model"]

#: Operator set of the files.
OPSET = 17
_FORMAT = 1
log = get_logger(__name__)


class _Whole(nn.Module):
    """A network from raw inputs to physical predictions as one graph without branches.

    Windows are whole strides: :meth:`MapNet.prepare`, without padding and strips.
    """

    def __init__(self, net: MapNet) -> None:
        super().__init__()
        self.net = net
        self.groups = group_order(net.spec.channels)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Predictions in the order of the tasks, then features; inputs in that of the groups."""
        parts: dict[int, list[Tensor]] = {}
        for g, raw in zip(self.groups, inputs, strict=True):
            valid = torch.isfinite(raw)
            x = self.net.features(g, torch.where(valid, raw, math.nan))
            x = (x - self.net.get_buffer(f"mean_{g}")) / self.net.get_buffer(f"std_{g}")
            x = torch.where(torch.isnan(x), torch.zeros_like(x), x).clamp(-8, 8)
            mask = valid.to(x.dtype).mean(1, keepdim=True)
            parts.setdefault(group_factor(g), []).extend([x, mask])
        prepared = {f: torch.cat(p, 1) for f, p in parts.items()}
        if not any(f % 2 for f in prepared):  # something must enter at 10 m
            f, like = next(iter(prepared.items()))
            n, _, h, w = like.shape
            prepared[1] = like.new_zeros((n, 1, h * f, w * f))
        with self.net._watched(True) as seen:
            raw_outputs = self.net.forward_prepared(prepared)
        out = []
        for task in self.net.spec.tasks:
            head: Any = self.net.heads[task.name]
            out.append(head.physical(raw_outputs[task.name]))
        return (*out, seen[0])


def _nearest(g: Any, x: Any, size: Any, scales: Any) -> Any:
    """Repetition by whole factors, which the exporter of torch does not know by this name."""
    from torch.onnx import symbolic_helper

    factors = symbolic_helper._maybe_get_const(scales, "fs")
    empty = g.op("Constant", value_t=torch.tensor([], dtype=torch.float32))
    times = g.op("Constant", value_t=torch.tensor([1.0, 1.0, *factors]))
    return g.op(
        "Resize", x, empty, times, mode_s="nearest",
        coordinate_transformation_mode_s="asymmetric", nearest_mode_s="floor",
    )  # fmt: skip


def export_member(net: MapNet, member: Path) -> Path:
    """Write the ONNX file of a member and its contract.

    Args:
        net: The network, folded.
        member: Its weights; see :func:`onnx_path`.

    Returns:
        The file.

    Raises:
        ModelError: Networks of this kind cannot be exported, or an extra is not installed.
    """
    if type(net) is not FusionNet:
        raise ModelError(
            f"network {architecture_of(net.spec)} cannot be exported", where=str(member),
            allowed="fusion, fpn, context", fix="set predict.runtime to torch",
        )  # fmt: skip
    try:
        import onnx  # noqa: F401
    except ImportError as err:
        raise ModelError("onnx is not installed", where="export-model", fix=EXTRA) from err
    groups, tasks = group_order(net.spec.channels), [*(t.name for t in net.spec.tasks), FEATURES]
    side = 2 * net.stride_px
    inputs = tuple(
        torch.rand(1, len(net.spec.channels[g]), side // group_factor(g), side // group_factor(g))
        for g in groups
    )
    sizes = {g: {0: "n", 2: f"height_{g}", 3: f"width_{g}"} for g in groups}
    given = {t: {0: "n", 2: "height", 3: "width"} for t in tasks}
    path = onnx_path(member)
    register: Any = torch.onnx.register_custom_op_symbolic  # type: ignore[attr-defined]
    register("aten::_upsample_nearest_exact2d", _nearest, 11)
    with atomic(path) as tmp, warnings.catch_warnings(), torch.no_grad():
        # The exporter by tracing: that by dynamo takes a minute per network.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Whole(net).eval(), inputs, str(tmp), dynamo=False, opset_version=OPSET,
            input_names=groups, output_names=tasks, dynamic_axes=sizes | given,
        )  # fmt: skip
    write_contract(path, net, member)
    return path


def write_contract(path: Path, net: MapNet, member: Path, numbers: str = "fp32") -> None:
    """Say beside an ONNX file what it takes and gives, and which weights it was made from."""
    write_json(card_path(path), {
        "format": _FORMAT, "opset": OPSET, "numbers": numbers,
        "weights": read_json(card_path(member))["sha256"], "sha256": sha256(path),
        "stride_px": net.stride_px, "halo_px": net.halo_px(),
        "missing": "NaN",
        "sizes": f"multiples of {net.stride_px} pixels of 10 m; pad with NaN",
        "inputs": {
            g: {"channels": list(net.spec.channels[g]), "pixel_factor": group_factor(g)}
            for g in group_order(net.spec.channels)
        },
        "outputs": {
            t.name: {"kind": t.kind, "channels": t.channels, "classes": list(t.classes),
                     "unit": t.unit}
            for t in net.spec.tasks
        },
    })  # fmt: skip


def export_model(campaign: Campaign, folder: Path = MODEL) -> str:
    """Export all members, compare them with the networks on chips, and write what was found.

    With ``predict.runtime: torch`` they are for use elsewhere; with ``onnx-int8`` there are also
    those in 8 bits.

    Args:
        campaign: The campaign.
        folder: The model's.

    Returns:
        What was found, for people; all of it is in ``agreement.json``.

    Raises:
        ModelError: What was exported does not agree; names the figures.
    """
    how = campaign.predict
    files, reference = member_files(folder), Ensemble.load(folder)
    set_up_torch(how.threads, reference.device)
    nets = [m for m in reference.members if isinstance(m, MapNet)]
    for file, net in zip(files, nets, strict=True):
        log.info("wrote %s", export_member(net, file))
    chips = read_store(CHIPS)
    chosen = chips_to_compare(chips.sizes["n"])
    told = _judged(FP32, folder, files, nets, reference, chips, chosen, how.threads)
    if how.runtime == INT8:
        choose, judge = split_chips(chips.sizes["n"])
        kept = quantise_ensemble(files, nets, reference, chips.isel(n=choose), how.threads)
        for file, net in zip(files, nets, strict=True):
            write_contract(onnx_path(file, INT8), net, file, "int8")
        more = {"kept_in_fp32": kept, "chosen_on": choose}
        told += "\n" + _judged(
            INT8, folder, files, nets, reference, chips, judge, how.threads, more
        )
    return told


def _judged(
    runtime: str, folder: Path, files: Sequence[Path], nets: Sequence[MapNet],
    reference: Ensemble, chips: xr.Dataset, chosen: Sequence[int], threads: int,
    more: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """Compare the files of a runtime with the networks and write what was found."""
    members = onnx_members(files, nets, threads, runtime)
    other = Ensemble(members, reference.calibrations, reference.digest)
    found = compared(reference, other, files, chips.isel(n=list(chosen)), int8=runtime == INT8)
    found |= {"opset": OPSET, "chips": list(chosen), "digest": digest_of(files, runtime)}
    path = agreement_path(folder, runtime)
    write_json(path, found | dict(more or {}))
    if not found["passed"]:
        raise ModelError(found["failed"], where=str(path), allowed=found["limits"],
                         fix=remedy(runtime))  # fmt: skip
    return _told(runtime, found)


def _told(runtime: str, found: dict[str, Any]) -> str:
    parts = [f"{k} by {v:.2g} at most" for k, v in found["largest_difference"].items()]
    parts += [f"same class of {k} at {100 * v:.3f} %" for k, v in found["same_class"].items()]
    for name, r in found["held_out"].items():
        parts.append(f"held-out mean IoU of {name} {r['miou_before']:.2f} -> "
                     f"{r['miou_after']:.2f} %, calibration error {r['ece_before']:.4f} -> "
                     f"{r['ece_after']:.4f}")  # fmt: skip
    return f"{runtime} agrees with torch: " + ", ".join(parts)
