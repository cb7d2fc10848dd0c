"""The page docs/reference/networks.md, written from the networks themselves."""

from __future__ import annotations

from typing import Any

from terraloom.models.heads import TaskSpec
from terraloom.models.registry import build, make_spec

__all__ = ["BACKBONES", "networks_text"]

_PERIODS = ("2018-05", "2018-08")
_S2_10 = ("B02", "B03", "B04", "B08")
_S2_20 = ("B05", "B06", "B07", "B8A", "B11", "B12")


def _dated(bands: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{p}/{b}" for p in _PERIODS for b in bands)


#: Two periods of Sentinel-1 and -2, and elevation.
_TYPICAL = {
    "s2_10": _dated(_S2_10), "s1_10": _dated(("VV", "VH")), "dem_10": ("DEM",),
    "s2_20": _dated(_S2_20),
}  # fmt: skip
_TASK = TaskSpec("cover", "segmentation", ("water", "built", "crop", "grass", "forest", "bare"))

#: What each network is for.
_USES = {
    "fusion": "the first choice: few periods, few labels",
    "fpn": "objects of very different sizes; fewer weights, more work at 10 m",
    "context": "classes that their surroundings tell apart; tiles need a wide margin",
    "utae": "many dates with gaps, labels that cover areas",
    "convgru": "as `utae`, where the order of what happens tells the classes apart",
    "convlstm": "as `convgru`, with a longer memory and more weights",
    "ltae": "many dates with gaps, labels of points",
    "tempcnn": "as `ltae`, regular dates",
    "gru": "as `ltae`, few dates",
    "presto": "as `ltae`, very few labels; needs weights (here without elevation)",
}

#: Figures of some encoders by name and depth, parameters and receptive field (10 m pixels): their
#: library may not be installed where the page is written, so a test compares them.
BACKBONES: dict[tuple[str, int], tuple[int, int]] = {
    ("resnet18", 4): (850_490, 64),
    ("resnet18", 5): (3_013_082, 136),
    ("resnet34", 4): (1_515_322, 104),
    ("resnet50", 4): (1_646_138, 60),
    ("resnet50", 5): (8_868_826, 164),
    ("mobilenetv2_100", 4): (1_867_002, 44),
    ("regnetx_002", 4): (72_602, 22),
    ("convnext_atto", 4): (229_746, 86),
}

_HEAD = """# Networks

`model.network` picks one; any number of bands, at their own pixel sizes. The figures are those of
the default size (`width` 12, `depth` 4) for two periods of Sentinel-2 (10 bands) and
Sentinel-1 (2 bands), with elevation and six classes. The receptive field is the largest distance
at which an input can change the prediction of a pixel; 1: the Sentinel-2 pixel of 20 m around it.
Prediction reads that much around each tile, so that maps have no seams; no layer looks at the
window as a whole.

| `network` | parameters | receptive field (10 m pixels) | (m) | for |
|---|---|---|---|---|
"""

_TAIL = """
`fusion`, `fpn` and `context` share one encoder and differ in the decoder. Each level of the
encoder has pixels twice as large as the one before, and a sensor joins at the level of its own
pixel size. Local means and standard deviations of the inputs enter every level.

- `fusion`: a light U-Net; each level is lifted, added to the next finer one and convolved.
- `fpn`: all levels are brought to one width, summed from coarse to fine, and the output of every
  level is brought to 10 m and summed.
- `context`: at the deepest level, 3x3 convolutions with pixels 1, 2 and 4 apart stand side by
  side; their result goes straight to the 20 m and 10 m levels.

The networks over time weigh or order the dates of each pixel by their day. A date that is invalid
has no influence. Three look at windows, date by date through one U-Net: `utae` weighs the dates at
its deepest level; `convgru` and `convlstm` go through them in order of time, with a convolutional
cell at each level. The others look at single pixels.

## Encoders of other libraries

`network: backbone` with `backbone: resnet18` puts an encoder of timm or segmentation-models-pytorch
in the place of ours ([how-to](../how-to/use-a-backbone.md)). Its stages of 20 m, 40 m ... are the
levels below 10 m; `depth` says how many. All bands enter at 10 m, with a mask per sensor. How far
each stage looks is found by following one missing pixel through the encoder, so that maps have no
seams here either. Encoders that look at the window as a whole (EfficientNet, MobileNetV3,
attention) or further than 512 pixels are refused. Some, with the same inputs as above:

| `backbone` | `depth` | parameters | receptive field (10 m pixels) |
|---|---|---|---|
{backbones}

## What is missing

A pixel, band or date without a value is no zero and no guess: its features are left at the centre
of the training data, and a mask tells the network which share of the sensor's bands is valid. A
sensor that is absent from a campaign's scene counts as invalid everywhere. Training drops bands
and sensors at random (`model.augment`), so that a network learns to do without them.

## Size

The receptive field grows with `depth`, by about a factor of two per level; parameters grow with
the square of `width`:

| `network` | `depth` | parameters at `width` 8 | 12 | 24 | receptive field (m) |
|---|---|---|---|---|---|
"""


def _figures(network: str, width: int = 12, depth: int = 4, **more: Any) -> tuple[int, int]:
    """Parameters and receptive field (10 m pixels)."""
    # Presto takes elevation only together with slope.
    channels = {g: c for g, c in _TYPICAL.items() if network != "presto" or g != "dem_10"}
    net = build(make_spec(network, channels, (_TASK,), width=width, depth=depth, **more))
    return sum(p.numel() for p in net.parameters()), net.receptive_field_px()


def networks_text() -> str:
    """The page, in Markdown."""
    text = _HEAD
    for name in _USES:
        count, reach = _figures(name)
        text += f"| `{name}` | {count:,} | {reach} | {10 * reach} | {_USES[name]} |\n"
    rows = [f"| `{b}` | {d} | {n:,} | {r} |" for (b, d), (n, r) in BACKBONES.items()]
    text += _TAIL.replace("{backbones}", "\n".join(rows))
    for name in ("fusion", "fpn", "context"):
        for depth in (3, 4, 5):
            counts = [_figures(name, width=width, depth=depth)[0] for width in (8, 12, 24)]
            reach = 10 * _figures(name, depth=depth)[1]
            cells = " | ".join(f"{c:,}" for c in counts)
            text += f"| `{name}` | {depth} | {cells} | {reach} |\n"
    return text.rstrip("\n")
