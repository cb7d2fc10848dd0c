"""Optical scenes: surface, terrain light, snow, haze, clouds with their shadows, shift, noise.

Azimuths count clockwise from the grid's north (the up direction of the raster).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

import numpy as np
import numpy.typing as npt
from pyproj import Transformer

from terraloom.acquire.simulate.fields import F32, Shift, block_mean, fractal, move, stream
from terraloom.acquire.simulate.landscape import (
    BROADLEAF,
    BUILT,
    CONIFER,
    SCENE_MARGIN_PX,
    WATER,
    WORK_MARGIN_PX,
    Landscape,
    class_map,
    edge_mask,
    height_map,
    period,
)
from terraloom.acquire.simulate.phenology import (
    BANDS,
    BANDS_20M,
    SPECTRA,
    end_members,
    vegetation,
)
from terraloom.acquire.sun import sun_position
from terraloom.config.simulation import Simulation

__all__ = [
    "OFFSET_DATE",
    "Scene",
    "Sky",
    "decode_dn",
    "encode_dn",
    "make_sky",
    "optical_scenes",
    "render",
    "shadow_offset_px",
    "sky_codes",
    "surface",
]

#: First day of processing baseline 04.00: from here on DN carry an offset of +1000.
OFFSET_DATE = date(2022, 1, 25)
OFFSET_DN = 1000
SCALE = 1e-4
NODATA_DN = 0
MAX_SHIFT_PX = 1.2

#: Largest relative loss of reflectance between 5 m and 30 m of canopy height, per band: taller
#: canopies are rougher and cast more shadow, most of all in the infrared.
_HEIGHT_LOSS = dict(
    zip(BANDS, (0.12, 0.24, 0.18, 0.28, 0.36, 0.40, 0.42, 0.42, 0.52, 0.52), strict=True)
)
#: Light left in full cloud shadow: the sky still lights the ground, most of all in the blue.
_SHADE = dict(zip(BANDS, (0.50, 0.45, 0.41, 0.40, 0.38, 0.37, 0.36, 0.36, 0.32, 0.30), strict=True))
#: Path reflectance of haze relative to the blue band (Rayleigh-like to Mie-like).
_HAZE = dict(zip(BANDS, (1, 0.72, 0.52, 0.45, 0.38, 0.33, 0.28, 0.26, 0.05, 0.02), strict=True))
#: Share of a tree row, track or ditch bank in a pixel that touches a parcel edge.
_EDGE_SHARE = 0.3
#: Variation within a parcel, by class index: of the vegetation share, and relative of brightness.
_VEGETATION_SD = np.array([0, 0.05, 0.05, 0.09, 0.09, 0.09, 0.14], dtype=np.float32)
_ROUGHNESS = np.array([0.01, 0.07, 0.07, 0.05, 0.05, 0.05, 0.2], dtype=np.float32)
#: Thresholds of the truth codes: opacity of cloud, depth of shadow, share of snow.
CLOUD_FROM, SHADOW_FROM, SNOW_FROM = 0.10, 0.25, 0.5
#: Share of the optical scenes that are nearly free of cloud.
_CLEAR_SHARE = 0.4


@dataclass(frozen=True)
class Scene:
    """What is known of an optical scene before it is rendered.

    Attributes:
        id: STAC item id.
        index: Position in time; selects the random streams.
        when: Day of acquisition.
        shift: Movement of the content, (down, right) in 10 m pixels.
        cover: Share of cloud aimed at, 0-1.
        snow: Whether snow lies on the ground.
        cloud_height_m: Height of the clouds above ground, metres.
        sun_azimuth_deg: Clockwise from grid north.
        sun_elevation_deg: Above the horizon.
    """

    id: str
    index: int
    when: date
    shift: Shift
    cover: float
    snow: bool
    cloud_height_m: float
    sun_azimuth_deg: float
    sun_elevation_deg: float

    @property
    def offset_dn(self) -> int:
        """Offset in the digital numbers: 1000 from ``OFFSET_DATE`` on."""
        return OFFSET_DN if self.when >= OFFSET_DATE else 0


@dataclass(frozen=True)
class Sky:
    """What lies between ground and sensor, and on the ground; (H, W), 0-1, true grid.

    Attributes:
        cloud: Opacity of cloud.
        shadow: Depth of cloud shadow.
        snow: Share of the ground under snow.
        haze: Path reflectance in the blue band.
    """

    cloud: F32
    shadow: F32
    snow: F32
    haze: F32


def shadow_offset_px(height_m: float, azimuth_deg: float, elevation_deg: float) -> Shift:
    """Where a cloud's shadow falls from the cloud as seen from above, (down, right) in px.

    The shadow lies away from the sun at ``height x tan(zenith angle)``.
    """
    length_px = height_m / np.tan(np.radians(elevation_deg)) / 10
    azimuth = np.radians(azimuth_deg)
    return float(np.cos(azimuth) * length_px), float(-np.sin(azimuth) * length_px)


def optical_scenes(sim: Simulation, land: Landscape) -> list[Scene]:
    """Dates, sun, weather and shift of all optical scenes, in order of time."""
    rng = stream(sim.seed, "optical")
    first, last = period(sim)
    n = sim.optical_dates
    days = np.linspace(0, (last - first).days - 6, n).round().astype(int)
    # Two scenes at least lie before the offset of the processing baseline.
    days[1] = min(days[1], (date(sim.year, 1, 20) - first).days)
    dates = [first + timedelta(days=int(d)) for d in days]
    steps = np.floor(_CLEAR_SHARE * (np.arange(n + 1)) + rng.random())
    clear = np.diff(steps) > 0
    heavy = np.clip(sim.cloud_share / (1 - _CLEAR_SHARE) * rng.uniform(0.5, 1.5, n), 0, 0.9)
    cover = np.where(clear, np.minimum(rng.uniform(0, 0.015, n), sim.cloud_share), heavy)
    winter = int(np.argmin([abs((d - date(sim.year, 1, 15)).days) for d in dates]))
    if sim.snow:
        cover[winter] = min(cover[winter], 0.15)
    shifts = rng.normal(0, 1, (n, 2)) * sim.shift_sd_px
    shifts = shifts.clip(-MAX_SHIFT_PX, MAX_SHIFT_PX).round(4)
    heights = rng.uniform(1000, 3000, n).round()
    lon, lat = _center(land)
    scenes = []
    for i, when in enumerate(dates):
        instant = datetime(when.year, when.month, when.day, 10, 12, tzinfo=UTC)
        azimuth, elevation = sun_position(instant, lon, lat)
        scenes.append(
            Scene(
                id=f"SIM_S2_{when:%Y%m%d}", index=i, when=when,
                shift=(float(shifts[i, 0]), float(shifts[i, 1])), cover=float(cover[i]),
                snow=sim.snow and i == winter, cloud_height_m=float(heights[i]),
                sun_azimuth_deg=round(azimuth, 3), sun_elevation_deg=round(elevation, 3),
            )
        )  # fmt: skip
    return scenes


def _center(land: Landscape) -> tuple[float, float]:
    b = land.geobox.boundingbox
    x, y = (b.left + b.right) / 2, (b.bottom + b.top) / 2
    lon, lat = Transformer.from_crs(str(land.geobox.crs), "EPSG:4326", always_xy=True).transform(
        x, y
    )
    return float(lon), float(lat)


def make_sky(sim: Simulation, land: Landscape, scene: Scene) -> Sky:
    """Clouds, their shadows, snow and haze of a scene on the true grid."""
    rng = stream(sim.seed, "sky", scene.index)
    h, w = land.geobox.shape
    cloud, shadow = _clouds(rng, scene, (h, w))
    veil = 1 + 0.35 * fractal(rng, (h, w), scale_px=400, power=3)
    haze = np.clip(sim.haze * rng.lognormal(-0.1, 0.5) * veil, 0, None).astype(np.float32)
    snow = np.zeros((h, w), dtype=np.float32)
    if scene.snow:
        classes = class_map(land, land.day(scene.when))
        cold = fractal(rng, (h, w), scale_px=250, power=3)
        high = (land.elevation - land.elevation.mean()) / max(float(land.elevation.std()), 1e-3)
        snow = np.clip(0.95 + 0.25 * cold + 0.15 * high + 0.05 * land.grain, 0, 1)
        # Snow falls through canopies, melts in villages and does not lie on water.
        hold = np.ones(7, dtype=np.float32)
        hold[[WATER, BROADLEAF, CONIFER, BUILT]] = 0, 0.6, 0.25, 0.55
        snow = (snow * hold[classes]).astype(np.float32)
    return Sky(cloud, shadow, snow, haze)


def _clouds(rng: np.random.Generator, scene: Scene, shape: tuple[int, int]) -> tuple[F32, F32]:
    """Opacity of cloud and depth of shadow; clouds beyond the border cast shadows too."""
    down, right = shadow_offset_px(
        scene.cloud_height_m, scene.sun_azimuth_deg, scene.sun_elevation_deg
    )
    dy, dx = round(down), round(right)
    h, w = shape
    canvas = (h + abs(dy), w + abs(dx))
    field = fractal(rng, canvas, scale_px=150, power=2.9)
    if scene.cover < 0.001:
        empty = np.zeros(shape, dtype=np.float32)
        return empty, empty
    r, c = max(dy, 0), max(dx, 0)  # the scene's corner within the canvas
    seen = field[r : r + h, c : c + w]
    level = np.quantile(seen[::4, ::4], 1 - scene.cover)
    opacity = 1 - np.exp(-3.5 * np.clip(field - level, 0, None))
    cloud = opacity[r : r + h, c : c + w]
    shadow = opacity[r - dy : r - dy + h, c - dx : c - dx + w]
    return cloud.astype(np.float32), shadow.astype(np.float32)


def _light(land: Landscape, scene: Scene) -> F32:
    """Brightness factor of the terrain: cosine of incidence, softened by diffuse light."""
    dy, dx = np.gradient(land.elevation, 10.0)
    azimuth, elevation = np.radians([scene.sun_azimuth_deg, scene.sun_elevation_deg])
    # Surface normal (-dz/dx, -dz/dnorth, 1); rows run south.
    cos_i = np.sin(elevation) + np.cos(elevation) * (-dx * np.sin(azimuth) + dy * np.cos(azimuth))
    cos_i /= np.sqrt(1 + dx**2 + dy**2)
    soft = 0.6
    gain = ((cos_i + soft) / (np.sin(elevation) + soft)).clip(0.7, 1.3)
    return np.asarray(gain, dtype=np.float32)


def surface(land: Landscape, scene: Scene) -> Iterator[tuple[str, F32]]:
    """Surface reflectance (H, W) of each band in turn on the true grid, before snow and sky."""
    day = land.day(scene.when)
    classes = land.parcels.classes_on(day)
    share = vegetation(land.parcels, classes, scene.when.timetuple().tm_yday)
    kind = classes[land.parcel]
    veg_sd, rough = _VEGETATION_SD[kind], _ROUGHNESS[kind]
    cover = share[land.parcel] + veg_sd * (land.texture + np.float32(0.6) * land.grain)
    cover = np.clip(cover, 0, 1)
    gain = _light(land, scene) * (1 + rough * land.grain)
    tall = (height_map(land, day) - 5).clip(0) / 25
    edge = np.where(edge_mask(land) & (kind != WATER), np.float32(_EDGE_SHARE), np.float32(0))
    for b, band in enumerate(BANDS):
        veg, bare = end_members(land.parcels, classes, b)
        field = bare[land.parcel]
        field = field + cover * (veg[land.parcel] - field)
        field *= 1 - np.float32(_HEIGHT_LOSS[band]) * tall
        row = 0.5 * (SPECTRA["leaf"][b] + SPECTRA["straw"][b])
        field += edge * (np.float32(row) - field)
        field *= gain
        yield band, field


def render(sim: Simulation, land: Landscape, scene: Scene, sky: Sky) -> Iterator[tuple[str, F32]]:
    """Reflectance of each band as the sensor delivers it, on the scene grid.

    Yields:
        Band key and (H, W) reflectance at 10 m, or (H/2, W/2) at 20 m, noise included.
    """
    rng = stream(sim.seed, "sensor", scene.index)
    bright = (0.82 + 0.26 * sky.cloud).astype(np.float32)
    for b, (band, field) in enumerate(surface(land, scene)):
        if scene.snow:
            field += sky.snow * (np.float32(SPECTRA["snow"][b]) - field)
        field *= 1 - sky.shadow * np.float32(1 - _SHADE[band])
        field += np.float32(_HAZE[band]) * sky.haze
        field += sky.cloud * (np.float32(SPECTRA["cloud"][b]) * bright - field)
        out = _crop(move(field, scene.shift))
        if band in BANDS_20M:
            out = block_mean(out, 2)
        out += rng.standard_normal(out.shape, dtype=np.float32) * np.float32(sim.noise_sd)
        yield band, out


def _crop(field: F32) -> F32:
    cut = WORK_MARGIN_PX - SCENE_MARGIN_PX
    return field[cut:-cut, cut:-cut]


def sky_codes(scene: Scene, sky: Sky) -> npt.NDArray[np.uint8]:
    """Truth of a scene as delivered, (H, W): 0 clear, 1 cloud, 2 shadow, 3 snow."""
    snow = _crop(move(sky.snow, scene.shift)) >= SNOW_FROM
    shadow = _crop(move(sky.shadow, scene.shift)) >= SHADOW_FROM
    cloud = _crop(move(sky.cloud, scene.shift)) >= CLOUD_FROM
    return np.select([cloud, shadow, snow], [1, 2, 3], 0).astype(np.uint8)


def encode_dn(reflectance: F32, offset_dn: int) -> npt.NDArray[np.uint16]:
    """Digital numbers of a reflectance (0-1); never 0, which means no data."""
    dn = np.rint(reflectance / np.float32(SCALE)) + offset_dn
    return np.asarray(dn.clip(1, 65_535), dtype=np.uint16)


def decode_dn(dn: npt.NDArray[np.uint16], offset_dn: int) -> F32:
    """Reflectance of digital numbers; NaN where there is no data."""
    value = (dn.astype(np.float32) - offset_dn) * np.float32(SCALE)
    return np.where(dn == NODATA_DN, np.float32(np.nan), value).astype(np.float32)
