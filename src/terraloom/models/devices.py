"""Where networks compute, and with which numbers, so that equal inputs give equal bytes."""

from __future__ import annotations

import os

import torch

from terraloom.errors import ModelError

__all__ = ["be_exact", "choose_device", "number_of"]

_NUMBERS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(wanted: str, key: str = "model.device") -> torch.device:
    """The device that a key of the campaign names.

    Raises:
        ModelError: A GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "no GPU that torch can use", where=f"{key}: cuda", allowed="auto, cpu",
            fix=f"set {key} to auto, or install a CUDA build of torch on a machine with a GPU",
        )  # fmt: skip
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def number_of(precision: str, device: torch.device) -> torch.dtype | None:
    """Number format of the forward pass in training; None: as the weights are.

    Args:
        precision: ``auto`` (bf16 on a GPU that has it), ``fp32``, ``bf16`` or ``fp16``.
        device: Where the network computes.

    Raises:
        ModelError: fp16 on a processor.
    """
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else None
    if precision == "fp16" and device.type == "cpu":
        raise ModelError("fp16 on a processor", where="model.precision",
                         allowed="auto, fp32, bf16")  # fmt: skip
    return _NUMBERS.get(precision)


def be_exact(device: torch.device) -> None:
    """Let equal inputs give equal bytes on this machine; call it once, before any computation.

    On a GPU, products keep all bits of fp32 (no TF32) and convolutions are not chosen by a
    stopwatch. An operation that has no repeatable form there warns; on a processor it is an error.

    Args:
        device: Where the networks compute.
    """
    # cuBLAS reads it at its first use; without it its sums may come in any order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
