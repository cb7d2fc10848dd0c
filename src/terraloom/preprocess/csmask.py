"""Clouds and their shadows by the networks of ukis-csmask.

The PyPI wheel ``ukis-csmask`` 1.0.0 (Apache-2.0, German Aerospace Center) ships ONNX models for
reflectance at the top of the atmosphere (L1C) and at the surface (L2A). They are read from the
wheel and run with ONNX Runtime; the package itself is not imported, because it holds all windows of
an image at once. Method: Wieland, Li and Martinis (2019), Remote Sensing of Environment 230, 1-12,
doi:10.1016/j.rse.2019.05.022.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from terraloom.errors import SceneError

__all__ = ["CSMASK_BANDS", "Level", "csmask_classes"]

Level = Literal["l1c", "l2a"]
F32 = npt.NDArray[np.float32]

#: Bands of the model in its order: blue, green, red, nir, swir16, swir22.
CSMASK_BANDS = ("B02", "B03", "B04", "B08", "B11", "B12")
#: Width of the model's window, and how much neighbours share.
_TILE_PX, _OVERLAP_PX = 256, 52
_EXTRA = (
    "pip install 'terraloom[csmask]' and pip install --no-deps ukis-csmask==1.0.0, or choose "
    "another of masks.methods"
)


def csmask_classes(
    bands: Mapping[str, npt.NDArray[Any]], *, level: Level = "l2a"
) -> npt.NDArray[np.uint8]:
    """Class of every pixel by the model of six bands.

    The model was trained on pixels of about 30 m; 20 m works as well. Windows of 256 px overlap by
    a fifth and are blended, so memory does not grow with the number of windows.

    Args:
        bands: (H, W) reflectance 0-1 of :data:`CSMASK_BANDS`, NaN missing.
        level: ``l1c`` top of atmosphere, ``l2a`` surface.

    Returns:
        (H, W) uint8: 0 neither, 1 cloud, 2 cloud shadow. Missing pixels are 0.

    Raises:
        SceneError: A band is absent, or the extra is not installed.
    """
    absent = [b for b in CSMASK_BANDS if b not in bands]
    if absent:
        raise SceneError(
            f"no band {', '.join(absent)}",
            where="masks.methods csmask",
            allowed=f"all of {', '.join(CSMASK_BANDS)}",
            fix="choose another of masks.methods, or a source that has these bands",
        )
    session, mean, std = _model(level)
    shape = np.shape(bands["B02"])
    starts = [_starts(n) for n in shape]
    weight = _weight()
    total = np.zeros((3, *shape), dtype=np.float32)
    norm = np.zeros(shape, dtype=np.float32)
    for r in starts[0]:
        for c in starts[1]:
            window = slice(r, r + _TILE_PX), slice(c, c + _TILE_PX)
            tile = _tile(bands, window, mean, std)
            if tile is None:
                continue
            logits = session.run(None, {session.get_inputs()[0].name: tile})[0][0]
            h, w = total[0][window].shape
            total[:, window[0], window[1]] += (_softmax(logits) * weight)[:, :h, :w]
            norm[window] += weight[:h, :w]
    out: npt.NDArray[np.uint8] = total.argmax(axis=0).astype(np.uint8)
    out[norm == 0] = 0
    missing = np.logical_or.reduce([~np.isfinite(bands[b]) for b in CSMASK_BANDS])
    out[missing] = 0
    return out


def _starts(length: int) -> list[int]:
    """First pixels of windows that cover a length; the last ends at its end where it can."""
    if length <= _TILE_PX:
        return [0]
    step = _TILE_PX - _OVERLAP_PX
    return [*range(0, length - _TILE_PX, step), length - _TILE_PX]


def _weight() -> F32:
    """(256, 256) weight of a window: one inside, falling towards its edges, never 0."""
    ramp = np.minimum(np.arange(_TILE_PX) + 1, np.arange(_TILE_PX)[::-1] + 1) / _OVERLAP_PX
    edge = np.minimum(ramp, 1.0).astype(np.float32)
    return edge[:, None] * edge[None, :]


def _tile(
    bands: Mapping[str, npt.NDArray[Any]], window: tuple[slice, slice], mean: F32, std: F32
) -> F32 | None:
    """(1, 6, 256, 256) normalised input; None where the window holds no data at all.

    What is missing becomes the mean of the training images, and short windows are mirrored.
    """
    stack = np.stack([np.asarray(bands[b][window], dtype=np.float32) for b in CSMASK_BANDS])
    known = np.isfinite(stack)
    if not known.all(axis=0).any():
        return None
    stack = (stack - mean[:, None, None]) / std[:, None, None]
    stack[~known] = 0.0
    short = [(0, _TILE_PX - n) for n in stack.shape[1:]]
    return np.pad(stack, [(0, 0), *short], mode="symmetric")[None].astype(np.float32)


def _softmax(logits: F32) -> F32:
    e = np.exp(logits - logits.max(axis=0))
    out: F32 = e / e.sum(axis=0)
    return out


@lru_cache(maxsize=2)
def _model(level: Level) -> tuple[Any, F32, F32]:
    """Session, band means and standard deviations."""
    try:
        import onnxruntime  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as err:
        raise SceneError(
            "onnxruntime is not installed", where="masks.methods csmask", fix=_EXTRA
        ) from err
    spec = importlib.util.find_spec("ukis_csmask")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / f"model_6b_{level}.onnx"
        if not file.is_file():
            continue
        record = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        mean, std = record["data"]["dataset_statistics"]["img"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(file), sess_options=options, providers=["CPUExecutionProvider"]
        )
        return session, np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)
    raise SceneError(
        f"the model file of ukis-csmask for {level} is not installed",
        where="masks.methods csmask",
        fix=_EXTRA,
    )
