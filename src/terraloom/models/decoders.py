"""Decoders of the fusion network: from the levels of its encoder to features at 10 m.

- ``unet``: each level is lifted, added to the next finer one and convolved (Ronneberger et al.
  2015, arXiv 1505.04597, with sums in place of concatenation).
- ``fpn``: a feature pyramid (Lin et al. 2017, arXiv 1612.03144); the outputs of all levels are
  brought to 10 m and summed (Kirillov et al. 2019, arXiv 1901.02446).
- ``context``: parallel dilated convolutions at the deepest level and a light decoder (Chen et al.
  2018, arXiv 1802.02611). Their pooling over the whole image is left out: it would make a pixel
  depend on the window that it happens to be predicted in.

Each decoder says how far it looks (:meth:`Decoder.reach`), so that the receptive field of a network
is known exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DECODERS", "ConvBlock", "Decoder", "Span", "union", "wider"]

#: Dilations of the context branches (pixels of the deepest level): with 4 levels up to 320 m.
DILATIONS = (1, 2, 4)

#: First and last input, in 10 m pixels, behind each pixel of a level: two arrays of one length.
Span = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


class ConvBlock(nn.Sequential):
    """Convolution, batch norm (in evaluation a fixed affine map, so tiles do not matter), ReLU."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, *, stride: int = 1, dilation: int = 1
    ) -> None:
        pad = dilation * (kernel // 2) if stride == 1 else 0
        super().__init__(
            nn.Conv2d(
                c_in, c_out, kernel, stride=stride, padding=pad, dilation=dilation, bias=False
            ),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        )


class Decoder(nn.Module):
    """Turns the levels of an encoder into features at 10 m.

    Args:
        widths: Channels of the levels, finest first; level l has pixels of 10 * 2^l m.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.levels = len(widths)

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        """Features (N, widths[0], h, w) of the levels (N, widths[l], h / 2^l, w / 2^l)."""
        raise NotImplementedError

    def reach(self, spans: Sequence[Span]) -> Span:
        """Inputs behind each output pixel, given those behind each pixel of the levels."""
        raise NotImplementedError


class UnetDecoder(Decoder):
    """Level by level: lift, repeat, add the finer level, convolve."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(widths)
        w, steps = widths, range(len(widths) - 1)
        self.lift = nn.ModuleList(ConvBlock(w[i + 1], w[i], 1) for i in steps)
        self.decode = nn.ModuleList(ConvBlock(w[i], w[i], 3) for i in steps)

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        """See :class:`Decoder`."""
        f = skips[-1]
        for level in reversed(range(self.levels - 1)):
            f = self.decode[level](_repeat(self.lift[level](f)).add_(skips[level]))
        return f

    def reach(self, spans: Sequence[Span]) -> Span:
        """See :class:`Decoder`."""
        span = spans[-1]
        for level in reversed(range(self.levels - 1)):
            span = wider(union([_repeated(span), spans[level]]))
        return span


class PyramidDecoder(Decoder):
    """Lateral 1x1 convolutions, sums from coarse to fine, and an output of every level.

    The outputs are interpolated linearly: repeated pixels of 80 m would show in the map as blocks,
    as no convolution follows the sum.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(widths)
        common = 2 * widths[0]
        self.lateral = nn.ModuleList(nn.Conv2d(w, common, 1) for w in widths)
        self.smooth = nn.ModuleList(ConvBlock(common, widths[0], 3) for _ in widths)

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        """See :class:`Decoder`."""
        f = out = torch.empty(0)
        for level in reversed(range(self.levels)):
            here = self.lateral[level](skips[level])
            f = here if level == self.levels - 1 else _repeat(f).add_(here)
            part = self.smooth[level](f)
            # Doubling what is there already costs less than bringing each level to 10 m by itself.
            out = part if level == self.levels - 1 else _doubled(out).add_(part)
        return out

    def reach(self, spans: Sequence[Span]) -> Span:
        """See :class:`Decoder`."""
        f = spans[-1]
        out = wider(f)
        for level in reversed(range(self.levels - 1)):
            f = union([spans[level], _repeated(f)])
            out = union([wider(f), _interpolated(out)])
        return out


class ContextDecoder(Decoder):
    """Dilated branches at the deepest level, then straight to the two finest levels."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__(widths)
        deep, branch = widths[-1], max(widths[-1] // 2, 1)
        self.near = ConvBlock(deep, branch, 1)
        self.far = nn.ModuleList(ConvBlock(deep, branch, 3, dilation=d) for d in DILATIONS)
        self.join = ConvBlock(branch * (1 + len(DILATIONS)), deep, 1)
        #: Levels that the decoder adds: 20 m where it is not the deepest one, and 10 m.
        self.at = [level for level in (1, 0) if level < self.levels - 1]
        came = [deep, *(widths[level] for level in self.at)]
        self.lift = nn.ModuleList(
            ConvBlock(c, widths[level], 1) for c, level in zip(came, self.at, strict=False)
        )
        self.decode = nn.ModuleList(ConvBlock(widths[n], widths[n], 3) for n in self.at)

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        """See :class:`Decoder`."""
        deep = skips[-1]
        f: Tensor = self.join(torch.cat([self.near(deep), *(b(deep) for b in self.far)], 1))
        level = self.levels - 1
        for lift, decode, to in zip(self.lift, self.decode, self.at, strict=True):
            f = lift(f)
            for _ in range(level - to):
                f = _doubled(f)
            f, level = decode(f.add_(skips[to])), to
        return f

    def reach(self, spans: Sequence[Span]) -> Span:
        """See :class:`Decoder`."""
        span = union([spans[-1], *(wider(spans[-1], dilation=d) for d in DILATIONS)])
        level = self.levels - 1
        for to in self.at:
            for _ in range(level - to):
                span = _interpolated(span)
            span, level = wider(union([span, spans[to]])), to
        return span


#: Decoders by name.
DECODERS: dict[str, type[Decoder]] = {
    "unet": UnetDecoder,
    "fpn": PyramidDecoder,
    "context": ContextDecoder,
}


# --- up by a factor of two -----------------------------------------------------------------------
# What they give is new, so a sum may be written into it: no other tensor of the size is needed.


def _repeat(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest-exact")


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _repeated(span: Span) -> Span:
    return np.repeat(span[0], 2), np.repeat(span[1], 2)


def _interpolated(span: Span) -> Span:
    """Each fine pixel lies between its own coarse pixel and the next one on its side."""
    lo, hi = span
    before, after = np.r_[lo[:1], lo[:-1]], np.r_[hi[1:], hi[-1:]]
    low, high = _repeated((lo, hi))
    low[0::2] = np.minimum(lo, before)
    high[1::2] = np.maximum(hi, after)
    return low, high


# --- inputs behind a pixel -----------------------------------------------------------------------


def wider(span: Span, convs: int = 1, *, dilation: int = 1) -> Span:
    """Inputs after ``convs`` 3x3 convolutions, whose outer pixels are ``dilation`` pixels away."""
    lo, hi = span
    for _ in range(convs):
        first, last = np.repeat(lo[:1], dilation), np.repeat(hi[-1:], dilation)
        lo = np.minimum(lo, np.r_[first, lo[:-dilation]])
        hi = np.maximum(hi, np.r_[hi[dilation:], last])
    return lo, hi


def union(spans: Sequence[Span]) -> Span:
    """Inputs behind a sum or concatenation."""
    return np.minimum.reduce([s[0] for s in spans]), np.maximum.reduce([s[1] for s in spans])
