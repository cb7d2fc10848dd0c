"""Dropout while predicting (Gal and Ghahramani 2016), so that tiles do not matter.

A mask drops whole channels. It is drawn from the seed, the network, the layer and the pass alone:
all windows of a pass see the same network. Nothing else of the network leaves evaluation mode.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from terraloom.errors import ModelError
from terraloom.models.mapnet import MapNet

__all__ = ["drop_channels", "dropout_pass"]

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class _Pass(threading.local):
    """Which pass a thread is in; None: none, nothing is dropped."""

    number: int | None = None


_NOW = _Pass()


class _ChannelMask(nn.Module):
    """Multiplies channels by 0 or 1 / (1 - p); the channels are the second axis."""

    def __init__(self, p: float, seed: tuple[int, ...]) -> None:
        super().__init__()
        self._p, self._seed = p, seed

    def forward(self, x: Tensor) -> Tensor:
        if _NOW.number is None:
            return x
        rng = np.random.default_rng([*self._seed, _NOW.number])
        keep = (rng.random(x.shape[1]) >= self._p) / (1 - self._p)
        mask = torch.from_numpy(keep.astype(np.float32)).to(x.device, x.dtype)
        return x * mask.view(1, -1, *(1,) * (x.ndim - 2))


def drop_channels(net: MapNet, seed: int, member: int) -> MapNet:
    """Put masks in the place of a network's dropout layers; the network is changed.

    Raises:
        ModelError: It has no dropout.
    """
    found = 0
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _DROPOUT) and child.p > 0:
                setattr(module, name, _ChannelMask(child.p, (seed, member, found)).eval())
                found += 1
    if not found:
        raise ModelError(
            "a network without dropout", where=f"predict.dropout_passes, member {member}",
            fix="set predict.dropout_passes to 0: its passes would all be the same",
        )  # fmt: skip
    return net


@contextmanager
def dropout_pass(number: int | None) -> Iterator[None]:
    """What this thread predicts in the context belongs to one pass; None: nothing is dropped."""
    _NOW.number = number
    try:
        yield
    finally:
        _NOW.number = None
