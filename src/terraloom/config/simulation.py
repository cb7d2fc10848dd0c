"""Settings of the rehearsal simulator: a region with known truth, made offline."""

from __future__ import annotations

from pydantic import Field

from terraloom.config.base import Section

__all__ = ["Simulation"]


class Simulation(Section):
    """A simulated region: landscape, scenes, labels and the truth behind them."""

    seed: int = Field(
        2022, ge=0, description="Seed of the region; the same seed gives the same bytes (integer)."
    )
    size_px: int = Field(
        768, ge=384, le=15_360, multiple_of=384,
        description="Height and width of the area of interest in 10 m pixels; a multiple of 384.",
    )  # fmt: skip
    year: int = Field(
        2022, ge=2017, le=2035,
        description="Year of the map; scenes run from November of the year before to the end of "
        "October (year). With 2022 they lie on both sides of the Sentinel-2 offset of 25 January.",
    )  # fmt: skip
    optical_dates: int = Field(
        14, ge=4, le=72, description="Optical (Sentinel-2 like) scenes in the period (count)."
    )
    sar_dates: int = Field(
        6, ge=0, le=60, description="Radar (Sentinel-1 like) scenes in the period (count)."
    )
    cloud_share: float = Field(
        0.3, ge=0, le=0.8, description="Mean share of cloud over all optical scenes (0-1)."
    )
    snow: bool = Field(True, description="One winter scene has snow on the ground (yes/no).")
    noise_sd: float = Field(
        0.004, ge=0, le=0.1,
        description="Standard deviation of the optical sensor noise (reflectance, 0-1).",
    )  # fmt: skip
    haze: float = Field(
        0.012, ge=0, le=0.2,
        description="Mean path reflectance that haze adds to the blue band (reflectance, 0-1).",
    )  # fmt: skip
    shift_sd_px: float = Field(
        0.35, ge=0, le=1.2,
        description="Standard deviation of the misregistration of each optical scene, per axis; "
        "shifts are clipped to 1.2 (10 m pixels).",
    )  # fmt: skip
    sar_looks: float = Field(
        4.4, ge=1, le=200, description="Equivalent number of looks of the radar speckle (count)."
    )
    relief_m: float = Field(
        120, ge=5, le=1500, description="Height of the hills above the valley floor (metres)."
    )
    parcel_ha: float = Field(
        3.0, ge=1, le=8, description="Typical area of a field parcel (hectares)."
    )
    label_share_pct: float = Field(
        18, gt=0, le=100, description="Share of the parcels that carry a label (percent)."
    )
    label_noise_pct: float = Field(
        15, ge=0, le=60, description="Share of the labels that name a wrong class (percent)."
    )
    label_change_pct: float = Field(
        4, ge=0, le=40,
        description="Share of the parcels that change class within the period, so that labels "
        "dated before are outdated (percent).",
    )  # fmt: skip
    height_plots_per_km2: float = Field(
        16, gt=0, le=200,
        description="Density of canopy height plots of 30 m x 30 m (plots per square kilometre).",
    )  # fmt: skip
    height_noise_m: float = Field(
        0.8, ge=0, le=10,
        description="Standard deviation of the measured height of a forest plot (metres).",
    )  # fmt: skip
