"""Files of published weights: read from disk, nothing but tensors, nothing fetched."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from terraloom.errors import ModelError

__all__ = ["read_weights"]


def read_weights(path: Path | str, fix: str) -> dict[str, Any]:
    """The state dict of a file: safetensors, or a torch file of which only tensors are read.

    Args:
        path: The file.
        fix: Which file would do, for the error.

    Raises:
        ModelError: No such file, or no state dict.
    """
    where = str(path)
    if not Path(path).is_file():
        raise ModelError("no such file of weights", where=where, fix=fix)
    try:
        if Path(path).suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, SafetensorError) as err:
        raise ModelError(f"no file of torch weights ({type(err).__name__})", where=where,
                         fix="fetch it again") from err  # fmt: skip
    if not isinstance(state, Mapping):
        raise ModelError(f"a {type(state).__name__}", where=where, allowed="a state dict")
    return {str(k): v for k, v in state.items()}
