"""Clouds and their shadows by OmniCloudMask.

The PyPI package ``omnicloudmask`` (MIT; 1.8.1 was read) works on red, green and near infrared of
10-50 m at any processing level. It downloads its weights at first use, so it needs the internet
once. Method: Wright et al. (2025), Remote Sensing of Environment 322, 114694.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from terraloom.errors import SceneError

__all__ = ["OMNICLOUD_BANDS", "omnicloud_classes"]

#: Bands of the model in its order: red, green, near infrared.
OMNICLOUD_BANDS = ("B04", "B03", "B08")
#: The package refuses smaller pictures and works poorly on slightly larger ones.
_LEAST_PX = 64
_PATCH_PX, _OVERLAP_PX = 1000, 300


def omnicloud_classes(bands: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    """Class of every pixel.

    Args:
        bands: (H, W) reflectance 0-1 of :data:`OMNICLOUD_BANDS`, NaN missing.

    Returns:
        (H, W) uint8: 0 clear, 1 thick cloud, 2 thin cloud, 3 cloud shadow. Missing pixels are 0.

    Raises:
        SceneError: A band is absent, the extra is not installed, or the package answers with
            something else than these classes.
    """
    absent = [b for b in OMNICLOUD_BANDS if b not in bands]
    if absent:
        raise SceneError(
            f"no band {', '.join(absent)}",
            where="masks.methods omnicloudmask",
            allowed=f"all of {', '.join(OMNICLOUD_BANDS)}",
            fix="choose another of masks.methods, or a source that has these bands",
        )
    predict = _predictor()
    image = np.stack([np.asarray(bands[b], dtype=np.float32) for b in OMNICLOUD_BANDS])
    known = np.isfinite(image).all(axis=0)
    h, w = known.shape
    if not known.any():
        return np.zeros((h, w), dtype=np.uint8)
    # 0 is the package's value for no data; dark water may be 0 after correction, or below.
    image = np.where(known, np.maximum(image, 1e-4), 0.0)
    short = [(0, max(0, _LEAST_PX - n)) for n in (h, w)]
    image = np.pad(image, [(0, 0), *short], mode="symmetric")
    patch = min(_PATCH_PX, *image.shape[1:])
    answer = np.asarray(
        predict(
            image, patch_size=patch, patch_overlap=min(_OVERLAP_PX, patch // 2),
            inference_device="cpu", no_data_value=0,
        )
    )  # fmt: skip
    classes = answer[0] if answer.ndim == 3 and len(answer) == 1 else answer
    if classes.shape != image.shape[1:] or not np.isin(classes, (0, 1, 2, 3)).all():
        raise SceneError(
            f"omnicloudmask answered with shape {answer.shape}, values {answer.min()} to "
            f"{answer.max()}",
            where="masks.methods omnicloudmask",
            allowed=f"(1, {image.shape[1]}, {image.shape[2]}) with classes 0 to 3",
            fix="install the version that was tried: pip install omnicloudmask==1.8.1",
        )
    return np.where(known, classes[:h, :w], 0).astype(np.uint8)


def _predictor() -> Any:
    try:
        return importlib.import_module("omnicloudmask").predict_from_array
    except ImportError as err:
        raise SceneError(
            "omnicloudmask is not installed",
            where="masks.methods omnicloudmask",
            fix="pip install 'terraloom[omnicloudmask]', or choose another of masks.methods",
        ) from err
