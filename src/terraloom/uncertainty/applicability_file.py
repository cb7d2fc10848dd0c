"""The file of the area of applicability beside the networks, and its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from terraloom.errors import ModelError
from terraloom.io import atomic, read_json, write_json
from terraloom.log import get_logger
from terraloom.uncertainty.applicability import CELL_PX, Applicability, Space

__all__ = ["FILE", "read_applicability", "write_applicability"]

#: Name of the file below the model folder; its card has the same name and ends in .json.
FILE = "applicability.safetensors"
_PARTS = ("centre", "turn", "points")

log = get_logger(__name__)


def write_applicability(
    folder: Path, what: Applicability, networks: list[str], training: npt.NDArray[Any]
) -> None:
    """Write the file and its card.

    Args:
        folder: The model's.
        what: Spaces and threshold.
        networks: Names of the networks of the spaces, as ``fold-0/member-0``.
        training: (S,) DI of the training pixels behind the threshold.
    """
    path = folder / FILE
    data = {
        f"{name}/{part}": np.ascontiguousarray(getattr(space, part))
        for name, space in zip(networks, what.spaces, strict=True)
        for part in _PARTS
    }
    with atomic(path) as tmp:
        tmp.write_bytes(save(dict(sorted(data.items()))))
    di = np.asarray(training, dtype=np.float64)
    inside_pct = 100 * float((di <= what.threshold).mean())
    card = {
        "networks": networks, "threshold": what.threshold, "cell_px": CELL_PX,
        "points": [len(s.points) for s in what.spaces],
        "training": {
            "pixels": len(di), "inside_pct": inside_pct,
            "quartiles": [float(q) for q in np.percentile(di, (25, 50, 75))],
            "max": float(di.max()),
        },
    }  # fmt: skip
    write_json(path.with_suffix(".json"), card)
    log.info("area of applicability: dissimilarity up to %.3f, as for %.1f %% of %d held-out "
             "pixels", what.threshold, inside_pct, len(di))  # fmt: skip


def read_applicability(folder: Path) -> tuple[Applicability, list[str]]:
    """What :func:`write_applicability` wrote, and the names of its networks.

    Raises:
        ModelError: The files cannot be read.
    """
    path = folder / FILE
    try:
        card: Mapping[str, Any] = read_json(path.with_suffix(".json"))
        data = load_file(path)
        spaces = tuple(Space(*(data[f"{n}/{p}"] for p in _PARTS)) for n in card["networks"])
        return Applicability(spaces, float(card["threshold"])), list(card["networks"])
    except (KeyError, TypeError, ValueError, SafetensorError) as err:
        raise ModelError(f"a file that cannot be read ({err!r})", where=str(path),
                         fix="run target `model` again") from err  # fmt: skip
