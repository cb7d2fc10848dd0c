"""Networks made ready to predict fast: the same map with fewer and better layers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from terraloom.models.mapnet import MapNet
from terraloom.models.registry import ready

__all__ = ["folded"]


def folded(net: MapNet) -> MapNet:
    """A network in evaluation mode with its batch norms folded into the convolutions before them.

    On processors a convolution and the ReLU after it are one pass over the values besides, and
    1x1 convolutions run in oneDNN, which torch does not use for them with one thread. The same map
    up to rounding (3e-6 of a probability), faster. The network is changed.
    """
    for block in list(net.modules()):
        if not isinstance(block, nn.Sequential):
            continue
        names = list(block._modules)
        for a, b in pairwise(names):
            first, second = block._modules[a], block._modules[b]
            if isinstance(first, (nn.Conv1d, nn.Conv2d)) and isinstance(
                second, (nn.BatchNorm1d, nn.BatchNorm2d)
            ):
                block._modules[a] = fuse_conv_bn_eval(first, second)
                block._modules[b] = nn.Identity()
        _join_relus(block)
    for block in list(net.modules()):
        for name, layer in block._modules.items():
            if type(layer) is nn.Conv2d and _zero_padded(layer):
                block._modules[name] = _Conv(layer, relu=False)
    return ready(net)


def _join_relus(block: nn.Sequential) -> None:
    """Put each ReLU that follows a convolution into it."""
    layers = [(n, m) for n, m in block._modules.items() if not isinstance(m, nn.Identity)]
    for (a, first), (b, second) in pairwise(layers):
        if type(first) is nn.Conv2d and isinstance(second, nn.ReLU) and _zero_padded(first):
            block._modules[a], block._modules[b] = _Conv(first, relu=True), nn.Identity()


def _zero_padded(layer: nn.Conv2d) -> bool:
    """Whether it pads with zeros, by numbers of pixels, which :class:`_Conv` can do."""
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


class _Conv(nn.Conv2d):
    """A convolution and the ReLU after it, for prediction: one pass where that is possible."""

    def __init__(self, layer: nn.Conv2d, *, relu: bool) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(layer.__dict__)
        self._relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`torch.nn.Conv2d`."""
        if _can_join(x):
            joined: Tensor = torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups,
                "relu" if self._relu else "none", [], "",
            )  # fmt: skip
            return joined
        y = F.conv2d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        return F.relu_(y) if self._relu else y


#: What torch's own compiler makes of the two, on processors. Builds without oneDNN lack it.
_HAS_JOINED = hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _can_join(x: Tensor) -> bool:
    """Plain float32 on a processor, not on the way into an exported file."""
    return (
        _HAS_JOINED
        and x.device.type == "cpu"
        and x.dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_grad_enabled()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )
