"""The rehearsal simulator: a small region with known truth, as a static STAC catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from terraloom.config.simulation import Simulation

__all__ = ["simulate_region"]


def simulate_region(sim: Simulation, out_dir: Path) -> Path:
    """Simulate a region: scenes, labels and truth.

    The region is built beside ``out_dir`` and renamed when complete; an older one is replaced.

    Args:
        sim: Settings; the same settings give the same bytes on the same machine kind.
        out_dir: Folder of the region.

    Returns:
        Path of the STAC ``catalog.json`` inside ``out_dir``.
    """
    from terraloom.acquire.simulate.write import build_region

    return build_region(sim, Path(out_dir))
