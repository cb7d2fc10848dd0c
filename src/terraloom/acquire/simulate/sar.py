"""Radar scenes: terrain-corrected backscatter (gamma nought, linear power) with speckle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np

from terraloom.acquire.simulate.fields import F32, stream
from terraloom.acquire.simulate.landscape import (
    SCENE_MARGIN_PX,
    WORK_MARGIN_PX,
    Landscape,
    height_map,
    period,
)
from terraloom.acquire.simulate.phenology import vegetation
from terraloom.config.simulation import Simulation

__all__ = ["POLARISATIONS", "SarScene", "backscatter_db", "render_sar", "sar_scenes", "speckle"]

POLARISATIONS = ("VV", "VH")

#: Backscatter (dB) of bare ground and gain (dB) of full vegetation, by class index.
_BASE_DB = {
    "VV": ((-21, 0), (-9.5, 0.3), (-9, 0), (-10.5, -3.0), (-11.5, 2.0), (-12.5, 1), (-5.5, 0)),
    "VH": ((-28, 0), (-16, 0.8), (-15.5, 0), (-18, 1.5), (-19.5, 4.5), (-19.5, 1.5), (-13, 0)),
}
#: Gain between 5 m and 30 m of canopy height, dB: volume scattering, above all cross-polarised.
_HEIGHT_DB = {"VV": 2.0, "VH": 5.0}


@dataclass(frozen=True)
class SarScene:
    """A radar acquisition.

    Attributes:
        id: STAC item id.
        index: Position in time; selects the random stream.
        when: Day of acquisition.
        wet_db: Soil moisture effect outside forest, dB.
        wind_db: Roughness effect on water, dB.
    """

    id: str
    index: int
    when: date
    wet_db: float
    wind_db: float


def sar_scenes(sim: Simulation) -> list[SarScene]:
    """Dates and weather of all radar scenes, in order of time."""
    rng = stream(sim.seed, "sar")
    first, last = period(sim)
    days = np.linspace(12, (last - first).days - 12, sim.sar_dates).round().astype(int)
    wet, wind = rng.normal(0, 0.5, sim.sar_dates), rng.normal(0, 1.2, sim.sar_dates)
    dates = [first + timedelta(days=int(d)) for d in days]
    return [
        SarScene(f"SIM_S1_{d:%Y%m%d}", i, d, float(wet[i]), float(wind[i]))
        for i, d in enumerate(dates)
    ]


def backscatter_db(land: Landscape, scene: SarScene, polarisation: str) -> F32:
    """Backscatter without speckle, (H, W) on the work grid, gamma nought in dB."""
    day = land.day(scene.when)
    classes = land.parcels.classes_on(day)
    share = vegetation(land.parcels, classes, scene.when.timetuple().tm_yday)
    base, gain = np.array(_BASE_DB[polarisation], dtype=np.float32).T
    weather = np.array([scene.wind_db, 0, 0, *[scene.wet_db] * 3, 0], dtype=np.float32)
    echo = land.parcels.echo_db[:, POLARISATIONS.index(polarisation)]
    p = land.parcels
    ground = base + weather
    own = ground[classes] + gain[classes] * share
    other = ground[p.partner] + gain[p.partner] * share
    level = own + p.mix * (other - own) + echo
    tall = height_map(land, day)
    canopy = np.where(tall > 0, (tall - 17.5) / 25, 0)
    built = (classes == 6)[land.parcel]
    rough = np.where(built, 2.0, 0.3) * land.grain
    out = level[land.parcel] + np.float32(_HEIGHT_DB[polarisation]) * canopy + rough
    return np.asarray(out, dtype=np.float32)


def speckle(rng: np.random.Generator, shape: tuple[int, ...], looks: float) -> F32:
    """Multiplicative speckle of an intensity image: gamma, mean 1, variance 1 / looks."""
    noise = rng.standard_gamma(looks, shape).astype(np.float32)
    return noise / np.float32(looks)


def render_sar(sim: Simulation, land: Landscape, scene: SarScene) -> Iterator[tuple[str, F32]]:
    """Linear power of VV and VH in turn on the scene grid, (H, W), speckle included."""
    rng = stream(sim.seed, "speckle", scene.index)
    cut = WORK_MARGIN_PX - SCENE_MARGIN_PX
    for polarisation in POLARISATIONS:
        level = backscatter_db(land, scene, polarisation)[cut:-cut, cut:-cut]
        power = np.float32(10) ** (level / 10) * speckle(rng, level.shape, sim.sar_looks)
        yield polarisation, np.asarray(power, dtype=np.float32)
