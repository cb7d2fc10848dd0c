"""What is to be predicted: tasks, their labels, folds and training windows."""

from __future__ import annotations

import datetime as dt
from typing import Literal

from pydantic import Field, model_validator

from terraloom.config.base import Name, Section, TaskKind

__all__ = ["Chips", "Folds", "LabelSource", "Loss", "Task"]


class LabelSource(Section):
    """Where a task's labels come from."""

    file: str = Field(
        description="Path from the project folder: a vector file (polygons, lines, points; any "
        "coordinate system), a raster (.tif, .vrt), or a table (.csv) of points or pixel series."
    )
    layer: str | None = Field(None, description="Layer of a vector file; default: the only one.")
    column: str | None = Field(
        None,
        description="Column with the class or the value; not needed for boundaries and rasters.",
    )
    x_column: str = Field("longitude", description="Of a table: column with the x coordinate.")
    y_column: str = Field("latitude", description="Of a table: column with the y coordinate.")
    crs: str | None = Field(
        None,
        description="Coordinate system of a table, or of a file that states none; default of "
        "tables: EPSG:4326.",
    )
    date_column: str | None = Field(
        None, description="Column with the label's date, or its first day (ISO 8601)."
    )
    date_end_column: str | None = Field(
        None, description="Column with the last day on which the label is true (ISO 8601)."
    )
    date: dt.date | None = Field(
        None, description="Date of all labels, where there is no column (YYYY-MM-DD)."
    )
    group_column: str | None = Field(
        None,
        description="Labels with the same text here stay in one fold (parcel, survey, tile).",
    )
    mapping: dict[str, str] = Field(
        default_factory=dict,
        description="Value in the column: class name of the legend, where they differ.",
    )
    drop: list[str] = Field(
        default_factory=list, description="Values of the column that are left out on purpose."
    )
    policy: Literal["centre", "all_touched", "fractions"] = Field(
        "centre",
        description="Which pixels a polygon labels: those whose centre it covers, all it touches, "
        "or by the exact share it covers.",
    )
    min_purity: float = Field(
        0.5, gt=0, le=1,
        description="With `fractions`: pixels in which no class (with `soft`: all classes "
        "together) covers this share have no label (0-1).",
    )  # fmt: skip
    soft: bool = Field(
        False,
        description="With `fractions`: train on the shares of all classes in a pixel (yes/no).",
    )
    line_width_m: float = Field(
        10, gt=0, le=500, description="Lines label a strip of this width (metres)."
    )
    erode_m: float = Field(
        0, ge=0, le=500,
        description="Polygons are shrunk by this much: positional error and mixed edge pixels "
        "are ignored in training (metres).",
    )  # fmt: skip
    tau_days: float | None = Field(
        None, gt=0,
        description="A label this far in time from the images counts 37 %; default: gaps do not "
        "count (days).",
    )  # fmt: skip
    drop_changed: float | None = Field(
        None, gt=0, le=1,
        description="Labels whose ground changed after their date with at least this probability "
        "are left out; default: none is (0-1).",
    )  # fmt: skip
    clean: Literal["none", "drop", "weigh"] = Field(
        "none",
        description="Labels that spatially held-out predictions contradict are left out of "
        "training, or weigh less; `none`: they are only listed.",
    )

    @model_validator(mode="after")
    def _fits(self) -> LabelSource:
        if self.soft and self.policy != "fractions":
            raise ValueError("`soft` needs `policy: fractions`")
        if self.date is not None and self.date_column is not None:
            raise ValueError("give either `date` or `date_column`")
        if self.date_end_column is not None and self.date_column is None:
            raise ValueError("`date_end_column` needs `date_column`")
        return self

    @property
    def dated(self) -> bool:
        """Whether the labels say when they were true."""
        return self.date is not None or self.date_column is not None


class Loss(Section):
    """How a task's predictions are held against its labels."""

    name: Literal[
        "auto", "ce", "gce", "sce", "forward", "soft_bootstrap", "hard_bootstrap", "focal",
        "ordinal", "gaussian", "huber", "quantile",
    ] = Field(
        "auto",
        description="Segmentation: `ce`, `focal`, `ordinal` (classes in their order), or one that "
        "wrong labels mislead less: `gce`, `sce`, `forward`, `soft_bootstrap`, "
        "`hard_bootstrap`. Regression: `gaussian`, `huber`, `quantile`. `auto`: `ce` or "
        "`gaussian`.",
    )  # fmt: skip
    dice: float = Field(
        0, ge=0, le=10, description="Weight of a soft Dice loss beside it; segmentation (ratio)."
    )
    smoothing: float = Field(0, ge=0, lt=1, description="Label smoothing; segmentation (0-1).")
    forget: float = Field(
        0, ge=0, lt=1,
        description="Share of labelled pixels, those with the largest loss, that training learns "
        "to leave out; segmentation (0-1).",
    )  # fmt: skip
    transform: Literal["standardise", "log1p"] = Field(
        "standardise",
        description="Scale on which values are learnt; `log1p` for skewed values >= 0.",
    )


_CLASS_LOSSES = {
    "ce",
    "gce",
    "sce",
    "forward",
    "soft_bootstrap",
    "hard_bootstrap",
    "focal",
    "ordinal",
}
_VALUE_LOSSES = {"gaussian", "huber", "quantile"}


class Task(Section):
    """One thing to predict. All tasks share one encoder."""

    name: Name = Field(description="Name of the task, used in file names.")
    kind: TaskKind = Field(description="`segmentation`, `regression` or `boundary`.")
    labels: LabelSource = Field(description="Where the labels come from.")
    classes: str | None = Field(
        None,
        description="CSV with code,name,color (and parent, for a hierarchy) of the legend; only "
        "for segmentation.",
    )
    unit: str = Field("", description="Unit of the predicted value; only for regression.")
    range: tuple[float, float] | None = Field(
        None, description="Allowed values, in the unit; only for regression."
    )
    weight: float = Field(1.0, gt=0, le=100, description="Weight of the task's loss (ratio).")
    loss: Loss = Field(default_factory=Loss, description="The task's loss.")

    @model_validator(mode="after")
    def _fits(self) -> Task:
        if (self.kind is TaskKind.SEGMENTATION) != (self.classes is not None):
            raise ValueError("`classes` belongs to kind `segmentation`, and only to it")
        timed = self.labels.tau_days is not None or self.labels.drop_changed is not None
        if timed and not self.labels.dated:
            raise ValueError("`labels.tau_days` and `labels.drop_changed` need a date")
        raster = self.labels.file.lower().endswith((".tif", ".tiff", ".vrt"))
        if self.kind is not TaskKind.BOUNDARY and self.labels.column is None and not raster:
            raise ValueError("`labels.column` is needed for this kind of task")
        if self.kind is not TaskKind.SEGMENTATION and (
            self.labels.policy == "fractions" or self.labels.clean != "none"
        ):
            raise ValueError("`labels.policy: fractions` and `labels.clean` need classes")
        if self.loss.name in _CLASS_LOSSES and self.kind is not TaskKind.SEGMENTATION:
            raise ValueError(f"`loss.name: {self.loss.name}` needs classes")
        if self.loss.name in _VALUE_LOSSES and self.kind is not TaskKind.REGRESSION:
            raise ValueError(f"`loss.name: {self.loss.name}` needs kind `regression`")
        return self


class Folds(Section):
    """Parts of the labels that are held out in turn; a polygon is never divided between folds."""

    method: Literal["blocks", "knndm", "regions", "years"] = Field(
        "blocks",
        description="`blocks`: square blocks, dealt so that classes are balanced; `knndm`: blocks "
        "dealt so that held-out labels lie as far from the others as the map's pixels do; "
        "`regions`: each fold holds out whole regions; `years`: each fold holds out the labels "
        "of some years.",
    )
    count: int = Field(4, ge=2, le=20, description="Number of folds (count).")
    block_m: float | Literal["auto"] = Field(
        1280.0,
        description="Width and height of a spatial block; `auto`: from the range over which what "
        "a simple model gets wrong is correlated (metres).",
    )
    buffer_m: float = Field(
        0, ge=0, le=1e5,
        description="Labels closer than this to a held-out label are not trained on (metres).",
    )  # fmt: skip
    regions: str | None = Field(
        None, description="Vector file of the regions; only with method `regions`."
    )

    @model_validator(mode="after")
    def _fits(self) -> Folds:
        if self.block_m != "auto" and not 0 < float(self.block_m) <= 1e6:
            raise ValueError("`block_m` must be above 0 and at most 1e6, or `auto`")
        if (self.method == "regions") != (self.regions is not None):
            raise ValueError("`regions` belongs to method `regions`, and only to it")
        return self


class Chips(Section):
    """Training windows."""

    size_px: int = Field(
        192, ge=96, le=1536, multiple_of=48,
        description="Chip height and width in 10 m pixels; a multiple of 48.",
    )  # fmt: skip
