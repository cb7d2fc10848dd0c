"""What networks take of a cube: its channels, and their names.

A store is opened through xarray (:func:`terraloom.io.read_store`), or as its arrays are stored
(:func:`terraloom.preprocess.tilestore.open_arrays`), which starts in half the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr

from terraloom.preprocess.groups import group_order

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["channel_names", "cube_inputs"]


def cube_inputs(dataset: xr.Dataset) -> dict[str, npt.NDArray[np.float32]]:
    """Inputs of the networks: per group (C, h, w) float32, NaN = missing.

    C is periods x bands, or dates x bands, in the order of :func:`channel_names`.
    """
    inputs: dict[str, npt.NDArray[np.float32]] = {}
    for group in _input_groups(dataset):
        values = dataset[group].to_numpy().astype(np.float32)
        inputs[group] = values.reshape(-1, *values.shape[-2:])
    return inputs


def channel_names(store: xr.Dataset | zarr.Group) -> dict[str, list[str]]:
    """Names ``period/band``, ``date/band`` or ``band`` (static) of the channels of each group."""
    names: dict[str, list[str]] = {}
    for group in _input_groups(store):
        bands = [str(b) for b in _coordinate(store, f"band_{group}")]
        over = _first_dim(store[group])
        if over == f"band_{group}":
            names[group] = bands
            continue
        steps = [str(s)[:10] if over != "period" else str(s) for s in _coordinate(store, over)]
        names[group] = [f"{s}/{b}" for s in steps for b in bands]
    return names


def _input_groups(store: xr.Dataset | zarr.Group) -> list[str]:
    """Groups of bands in a store, finest first; the order of the store's files does not matter."""
    return group_order(str(v) for v in store if f"band_{v}" in store)


def _first_dim(variable: Any) -> str:
    stored = isinstance(variable, zarr.Array)
    return str((variable.metadata.dimension_names if stored else variable.dims)[0])


def _coordinate(store: xr.Dataset | zarr.Group, name: str) -> npt.NDArray[Any]:
    """Names or days along a dimension; days are stored as counts since 1970."""
    variable: Any = store[name]
    days = isinstance(variable, zarr.Array) and "units" in variable.attrs
    values = np.asarray(variable[...])
    return values.astype("datetime64[D]") if days else values
