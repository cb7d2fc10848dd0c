"""Low-rank adaptation (LoRA; Hu et al. 2021, arXiv 2106.09685) of linear layers.

``y = W x + b + alpha / rank * B A x``: the pre-trained W and b stay, the small A and B are trained.
B starts at 0, so that the adapted network starts as the pre-trained one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from terraloom.errors import ModelError

__all__ = ["LoraLinear", "add_lora"]


class LoraLinear(nn.Linear):
    """A linear layer with frozen weights and a trained low-rank addition.

    Args:
        base: Layer whose weights are taken over (not copied).
        rank: Rank of the addition (count).
        alpha: Its weight is ``alpha / rank``.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        for p in (self.weight, self.bias):
            if p is not None:
                p.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(self.weight.new_empty((rank, base.in_features)))
        self.lora_b = nn.Parameter(self.weight.new_zeros((base.out_features, rank)))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        low = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + self.scale * low


def add_lora(net: nn.Module, names: Sequence[str], *, rank: int, alpha: float) -> int:
    """Freeze a network and adapt its linear layers of these names.

    Args:
        net: Changed in place: all its parameters are frozen, only the additions are trained.
        names: Last part of the layers' names, e.g. ``qkv``.
        rank: Rank of the additions, 1 up to the layers' smaller side (count).
        alpha: Weight of the additions times the rank, above 0.

    Returns:
        Number of layers adapted.

    Raises:
        ModelError: No layer of these names, or a rank or weight out of range.
    """
    found = [
        (parent, key, child)
        for parent in net.modules()
        for key, child in parent.named_children()
        if key in names and isinstance(child, nn.Linear)
    ]
    if not found:
        raise ModelError(f"no linear layer named {', '.join(names)}", where="LoRA")
    most = min(min(c.in_features, c.out_features) for _, _, c in found)
    if not 1 <= rank <= most or not 0 < alpha < math.inf:
        raise ModelError(f"rank {rank}, alpha {alpha}", where="LoRA",
                         allowed=f"rank 1 to {most}, alpha above 0")  # fmt: skip
    for p in net.parameters():
        p.requires_grad_(False)
    for parent, key, child in found:
        setattr(parent, key, LoraLinear(child, rank, alpha))
    return len(found)
