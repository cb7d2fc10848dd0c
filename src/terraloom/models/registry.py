"""Member files: weights as safetensors and a JSON card beside them; nothing executable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from terraloom.errors import ModelError, StateError
from terraloom.io import atomic, read_json, sha256, write_json
from terraloom.models.fusion import FusionNet, FusionSpec, Normalisation

__all__ = ["ARCHITECTURES", "build", "card_path", "load_member", "ready", "save_member"]

#: Networks by the name that stands in a member's card.
ARCHITECTURES: dict[str, type[FusionNet]] = {"fusion": FusionNet}
_FORMAT = 1


def card_path(path: Path | str) -> Path:
    """``member.safetensors`` to ``member.json``."""
    return Path(path).with_suffix(".json")


def build(
    spec: FusionSpec,
    normalisation: Mapping[str, Normalisation] | None = None,
    architecture: str = "fusion",
) -> FusionNet:
    """A network of a registered architecture with fresh weights."""
    if architecture not in ARCHITECTURES:
        raise ModelError(f"architecture {architecture!r}", allowed=", ".join(ARCHITECTURES))
    return ARCHITECTURES[architecture](spec, normalisation)


def save_member(
    path: Path | str,
    state: Mapping[str, Tensor],
    spec: FusionSpec,
    normalisation: Mapping[str, Normalisation],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write ``path`` (safetensors) and its card (JSON), each atomically, the card last.

    Args:
        path: File name ending in ``.safetensors``.
        state: The network's state dict.
        spec: The network.
        normalisation: Training statistics per modality.
        extra: More entries of the card, e.g. the history; no clock times, so that equal training
            gives equal bytes.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ModelError(f"file name {path.name}", allowed="*.safetensors")
    net = build(spec, normalisation)
    data = save({k: v.detach().cpu().contiguous() for k, v in sorted(state.items())})
    with atomic(path) as tmp:
        tmp.write_bytes(data)
    card = {
        "format": _FORMAT,
        "architecture": "fusion",
        "spec": spec.to_json(),
        "normalisation": {g: asdict(n) for g, n in normalisation.items()},
        "receptive_field_px": net.receptive_field_px(),
        "halo_px": net.halo_px(),
        "stride_px": net.stride_px,
        "parameters": sum(p.numel() for p in net.parameters()),
        "sha256": sha256(path),
        **(extra or {}),
    }
    write_json(card_path(path), card)


def load_member(path: Path | str) -> tuple[FusionNet, dict[str, Any]]:
    """The network of a member file, in evaluation mode and channels-last, and its card.

    Raises:
        StateError: Weights or card are missing, or the weights are not those of the card.
        ModelError: The weights do not fit the described network.
    """
    path = Path(path)
    card = read_json(card_path(path))
    if not path.is_file():
        raise StateError("the weights are missing", where=str(path), fix="fetch or retrain them")
    if card.get("format") != _FORMAT:
        raise ModelError(f"card format {card.get('format')}", where=str(path), allowed=str(_FORMAT))
    if sha256(path) != card["sha256"]:
        raise StateError("weights differ from their card", where=str(path),
                         fix="fetch both files of the same version")  # fmt: skip
    normalisation = {
        g: Normalisation(tuple(n["mean"]), tuple(n["std"]), bool(n["decibel"]))
        for g, n in card["normalisation"].items()
    }
    net = build(FusionSpec.from_json(card["spec"]), normalisation, card["architecture"])
    try:
        net.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as err:
        raise ModelError(f"weights do not fit: {err}", where=str(path), fix="retrain") from err
    return ready(net), card


def ready(net: FusionNet) -> FusionNet:
    """The network for prediction: evaluation mode, channels-last (1.4-1.8x faster on CPUs)."""
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net.eval()
