"""The networks and how they are trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from terraloom.config.base import Section

__all__ = ["Augment", "Model", "Search"]


class Augment(Section):
    """Random changes of training windows, like those that imaging conditions make."""

    flips: bool = Field(True, description="Flips and turns by 90 degrees (yes/no).")
    gain: float = Field(
        0.05, ge=0, le=1, description="Common brightening or darkening, half-width (ratio)."
    )
    bias: float = Field(
        0.03, ge=0, le=3, description="Shift of each band (standard deviations of the band)."
    )
    noise: float = Field(
        0, ge=0, le=3, description="Noise of each pixel (standard deviations of the band)."
    )
    haze: float = Field(
        0, ge=0, le=1,
        description="Share of windows over which smooth haze is laid; visible bands most (0-1).",
    )  # fmt: skip
    cloud: float = Field(
        0, ge=0, le=1,
        description="Share of windows that lose pixels under cloud shapes and their shadows (0-1).",
    )  # fmt: skip
    drop_band: float = Field(
        0.01,
        ge=0,
        le=0.9,
        description="Share of features dropped: a band or index of a period (0-1).",
    )
    drop_date: float = Field(
        0, ge=0, le=0.9, description="Share of periods or dates dropped (0-1)."
    )
    drop_sensor: float = Field(
        0.02,
        ge=0,
        le=0.9,
        description="Share of groups dropped: a sensor's bands of one pixel size; one stays (0-1).",
    )
    shift_px: float = Field(
        0, ge=0, le=3, description="Largest shift of a sensor against the labels (10 m pixels)."
    )


class Search(Section):
    """Search for a better setting; it sees training folds only."""

    trials: int = Field(20, ge=1, le=10_000, description="Settings that are tried (count).")
    minutes: float = Field(
        60, gt=0,
        description="Computing time of each fold's search, all jobs together, after which no "
        "trial is started (minutes).",
    )  # fmt: skip
    folds: int = Field(
        1, ge=1,
        description="Training folds on which a setting is scored; from 2 on poor settings end "
        "early (count).",
    )  # fmt: skip


class Model(Section):
    """The ensemble of light networks."""

    network: Literal[
        "fusion", "fpn", "context", "backbone", "utae", "convgru", "convlstm", "ltae",
        "tempcnn", "gru", "presto",
    ] = Field(
        "fusion",
        description="`fusion`: a light U-Net that fuses sensors at their own pixel sizes; "
        "`fpn`: the same with a pyramid of outputs; `context`: with wide (dilated) context; "
        "`backbone`: around an encoder of another library. "
        "Over time: `utae`, `convgru`, `convlstm` (windows), `ltae`, `tempcnn`, `gru` (single "
        "pixels), `presto` (pre-trained, single pixels).",
    )  # fmt: skip
    preset: Literal["none", "auto"] = Field(
        "none",
        description="`auto`: network, width, batch, epochs and sampling follow from the labels by "
        "rules of thumb, where they are not given here.",
    )
    backbone: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Encoder of network `backbone`: a convolutional one of timm or "
        "segmentation-models-pytorch, such as `resnet18`; needs the extra `backbones`.",
    )  # fmt: skip
    weights: str | None = Field(
        None,
        description="Pre-trained weights for `presto`, or those of the encoder of `backbone`; path "
        "from the project folder. Nothing is fetched.",
    )
    adapt: Literal["fine-tune", "frozen", "lora"] = Field(
        "fine-tune", description="What training changes of pre-trained weights."
    )
    members: int = Field(
        3, ge=1, le=20,
        description="Networks per fold (count); the ensemble has folds.count x members networks.",
    )  # fmt: skip
    width: int = Field(12, ge=4, le=256, description="Channels of the first level (count).")
    depth: int = Field(4, ge=2, le=7, description="Levels, each half as fine (count).")
    dropout: float = Field(0.05, ge=0, lt=1, description="Share of features dropped (0-1).")
    epochs: int = Field(12, ge=1, le=2000, description="Passes over the training chips (count).")
    batch: int = Field(
        4, ge=1, le=256,
        description="Training windows per step (count); fewer give more steps per pass, which "
        "helps where there are few chips.",
    )  # fmt: skip
    accumulate: int = Field(
        1, ge=1, le=256, description="Batches whose gradients make one step (count)."
    )
    learning_rate: float = Field(5e-3, gt=0, le=1, description="Peak learning rate (ratio).")
    weight_decay: float = Field(1e-2, ge=0, le=1, description="Weight decay (ratio).")
    ema: float = Field(
        0.97, ge=0, lt=1, description="Decay of the moving average of the weights per step (0-1)."
    )
    patience: int = Field(
        0, ge=0, le=1000,
        description="Epochs without a better score on a further held-out fold, after which "
        "training ends; 0: never (count).",
    )  # fmt: skip
    sampling: Literal["class", "area"] = Field(
        "area",
        description="Training windows are drawn evenly over the labelled area, or around each "
        "class as often as around any other.",
    )
    balance: Literal["equal", "uncertainty", "famo", "pcgrad", "upgrad"] = Field(
        "equal",
        description="How the losses of several tasks are weighed: by their first value, by learnt "
        "uncertainty, or so that tasks do not pull against each other.",
    )
    augment: Augment = Field(default_factory=Augment, description="Changes of training windows.")
    co_teaching: bool = Field(
        False,
        description="Train two networks together, each on the labels that the other chose by their "
        "small loss; the first is kept. Takes twice the time; needs `loss.forget` of a task.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Number format of training; `auto`: bf16 on a GPU that has it, else fp32.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where networks are trained; `auto`: a GPU where there is one."
    )
    processes: int = Field(
        1, ge=1, le=64, description="Processes that train one network together (count)."
    )
    calibration: Literal["temperature", "vector"] = Field(
        "temperature",
        description="Calibration of class probabilities: one number, or a scale and shift per "
        "class.",
    )
    label_noise: Literal["ignored", "estimated"] = Field(
        "ignored",
        description="`estimated`: probabilities are calibrated for the true class, through the "
        "label noise that held-out predictions reveal; `ignored`: for the label as given.",
    )
    baseline: bool = Field(
        True, description="Also fit a per-pixel random forest on the same folds (yes/no)."
    )
    search: Search | None = Field(
        None,
        description="With it, width, depth, learning rate, epochs, batch, class weights and "
        "balance are searched for each held-out fold, inside its training folds.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Model:
        if self.network == "presto" and self.weights is None:
            raise ValueError("network `presto` needs `weights`")
        if self.weights is not None and self.network not in ("presto", "backbone"):
            raise ValueError("`weights` belongs to the networks `presto` and `backbone`")
        if (self.network == "backbone") != (self.backbone is not None):
            raise ValueError("`backbone` belongs to network `backbone`, and only to it")
        if self.network != "presto" and self.adapt != "fine-tune":
            raise ValueError(f"network `{self.network}` knows `adapt: fine-tune` only")
        if self.processes > 1 and self.batch % self.processes:
            raise ValueError("`batch` must be a multiple of `processes`")
        return self
