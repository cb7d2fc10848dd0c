"""Keys of the probability sample: how it is drawn, labelled and answered."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from terraloom.config.base import Section

__all__ = ["Cluster", "LabellingPage", "Sample"]


class Cluster(Section):
    """Two-stage sampling: blocks of land, then pixels inside them."""

    block_m: float = Field(
        480, ge=20, description="Side of a block, the primary unit (metres, whole pixels)."
    )
    per_block: int = Field(5, ge=2, le=1000, description="Pixels drawn in each block (count).")
    icc: float = Field(
        0.1, ge=0, le=1,
        description="How much alike the errors of one block are expected to be, for the size from "
        "`sample.target_se`: 0 not at all, 1 all or none (intra-cluster correlation).",
    )  # fmt: skip


class LabellingPage(Section):
    """The offline page on which people answer the sample."""

    chip_px: int = Field(
        64, ge=16, le=256, multiple_of=8,
        description="Side of the images around a point (10 m pixels).",
    )  # fmt: skip
    dates: int = Field(
        4, ge=1, le=12, description="Most periods or dates shown per point, spread evenly (count)."
    )
    max_mb: float = Field(
        20,
        gt=0,
        le=200,
        description="Largest file; images are packed harder to stay below it (megabytes).",
    )
    show_map: bool = Field(
        False,
        description="Put the map's class on the page, to be shown with a key. It biases answers.",
    )


class Sample(Section):
    """A probability sample for accuracy and area."""

    design: Literal["simple", "stratified", "systematic", "cluster"] = Field(
        "stratified",
        description="`stratified`: pixels at random in each map class (or in `sample.strata`). "
        "`simple`: pixels at random. `systematic`: a square grid with a random start. `cluster`: "
        "blocks by their area, then pixels in each.",
    )
    size: int = Field(400, ge=20, le=100_000, description="Number of sample units (count).")
    target_se: float | None = Field(
        None, gt=0, lt=0.5,
        description="Instead of `sample.size`: standard error wanted for overall accuracy (0-1).",
    )  # fmt: skip
    expected_ua: float | dict[str, float] = Field(
        0.75,
        description="User's accuracy to expect, one value or by class name; used by `target_se` "
        "and `neyman` (0-1).",
    )
    allocation: Literal["proportional", "equal", "neyman", "rare"] = Field(
        "rare", description="How the units are divided over the strata."
    )
    min_per_stratum: int = Field(30, ge=2, description="Least units per stratum (count).")
    strata: str | None = Field(
        None,
        description="Strata other than the map classes: a raster of codes on the pixels of the map "
        "or polygons.",
    )
    strata_column: str = Field(
        "stratum", description="Column of polygon strata with the name of the stratum."
    )
    cluster: Cluster = Field(default_factory=Cluster, description="Blocks, with design `cluster`.")
    overhead: float = Field(
        1.0, ge=1, le=3,
        description="Units drawn per unit wanted; those above 1 are a reserve that stands in for "
        "units that cannot be told.",
    )  # fmt: skip
    drawn: str | None = Field(
        None,
        description="Use a sample drawn before: folder (or GeoPackage) with its design.json, or "
        "points of your own with the column inclusion_prob. Then nothing is drawn.",
    )
    answers: str | list[str] | None = Field(
        None,
        description="Files with answers (CSV or GeoJSON with id, class and, if wanted, "
        "interpreter, confidence, date, comment, and value_TASK with what was measured for a task "
        "of values); `truth`: the simulated region answers. Without "
        "answers the areas are map areas.",
    )
    primary: str | None = Field(
        None,
        description="Interpreter whose answer counts where interpreters differ and no `consensus` "
        "or majority decides.",
    )
    max_unclear_pct: float = Field(
        10,
        ge=0,
        le=50,
        description="More units than this that cannot be told are refused (percent).",
    )
    page: LabellingPage = Field(
        default_factory=LabellingPage, description="The labelling page, labelling.html."
    )

    @field_validator("expected_ua")
    @classmethod
    def _shares(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        every = value.values() if isinstance(value, dict) else [value]
        if not all(0 <= v <= 1 for v in every):
            raise ValueError("user's accuracies lie between 0 and 1")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Sample:
        given = self.model_fields_set
        if self.target_se is not None and "size" in given:
            raise ValueError("give either size or target_se")
        if self.strata is not None and self.design != "stratified":
            raise ValueError("strata belong to design `stratified`")
        if "cluster" in given and self.design != "cluster":
            raise ValueError("`cluster` belongs to design `cluster`")
        if self.overhead > 1 and self.design in ("systematic", "cluster"):
            raise ValueError("a reserve needs design `simple` or `stratified`")
        return self

    @property
    def answer_paths(self) -> list[str]:
        """Files with answers; empty for none and for `truth`."""
        if self.answers in (None, "truth"):
            return []
        return [self.answers] if isinstance(self.answers, str) else list(self.answers or [])
