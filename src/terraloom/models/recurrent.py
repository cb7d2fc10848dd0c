"""Convolutional recurrent networks for maps: ConvGRU and ConvLSTM over the dates of a window.

A cell at each level of one U-Net goes through the dates in order of time and hands its last state
to the decoder (a U-Net with recurrent units, as Rustowicz et al. 2019, CVPR workshops, for crop
types; the cells of Ballas et al. 2016, arXiv 1511.06432, and Shi et al. 2015, arXiv 1506.04214,
without peepholes). The gates are those of ``torch.nn.GRUCell`` and ``LSTMCell``.

A state is carried over a date unchanged at each pixel where the date is invalid: padding and clouds
have no influence, whatever fills them.

At the deepest level the input of a cell is convolved with 3x3 pixels, at the finer ones, where the
encoder's own 3x3 convolution comes just before, with 1x1. A state is convolved with 1x1 pixels:
land does not move, and a wider kernel would let the receptive field, and with it the margin that
tiles need, grow by a pixel of the level with every date.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from terraloom.models.dated import DatedSpec
from terraloom.models.dateunet import DateUnet, day_rates
from terraloom.models.decoders import wider
from terraloom.models.fusion import Normalisation

__all__ = ["CELLS", "ConvCell", "ConvGRUCell", "ConvLSTMCell", "RecurrentUnet"]


class ConvCell(nn.Module):
    """A recurrent cell whose inputs are convolved.

    Args:
        c_in: Channels of the input (count).
        c: Channels of the state (count).
        kernel: Pixels of the kernel over the input, odd; over the state it is 1.

    Attributes:
        gates: Gates, each with ``c`` channels (count).
        parts: Planes of the state, each with ``c`` channels; the first is the output (count).
    """

    gates = 0
    parts = 1

    def __init__(self, c_in: int, c: int, kernel: int = 1) -> None:
        super().__init__()
        self.inputs = nn.Conv2d(c_in, self.gates * c, kernel, padding=kernel // 2)
        self.states = nn.Conv2d(c, self.gates * c, 1)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The next state.

        Args:
            x: (N, gates c, h, w) convolved input.
            state: ``parts`` of (N, c, h, w).
        """
        raise NotImplementedError

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Last output (N, c, h, w) of dates in order of time; 0 where none is seen.

        Args:
            x: (N, T, c_in, h, w).
            seen: (N, T, 1, h, w) of bool; elsewhere the state stays as it is.
        """
        n, dates, _, h, w = x.shape
        convolved: Tensor = self.inputs(x.flatten(0, 1)).view(n, dates, -1, h, w)
        c = convolved.shape[2] // self.gates
        state = tuple(convolved.new_zeros((n, c, h, w)) for _ in range(self.parts))
        for t in range(dates):
            on = seen[:, t]
            after = self.step(convolved[:, t], state)
            state = tuple(torch.where(on, a, b) for a, b in zip(after, state, strict=True))
        return state[0]


class ConvGRUCell(ConvCell):
    """Gated recurrent unit: reset r, update z, candidate n; h' = (1 - z) n + z h."""

    gates = 3

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See :meth:`ConvCell.step`."""
        (h,) = state
        xr, xz, xn = x.chunk(3, 1)
        hr, hz, hn = self.states(h).chunk(3, 1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        n = torch.tanh(xn + r * hn)
        return (torch.lerp(n, h, z),)


class ConvLSTMCell(ConvCell):
    """Long short-term memory: gates i, f, g, o; c' = f c + i g, h' = o tanh(c').

    The forget gate starts open (bias 1; Jozefowicz et al. 2015): what the first dates say is not
    lost before training has begun.
    """

    gates = 4
    parts = 2

    def __init__(self, c_in: int, c: int, kernel: int = 1) -> None:
        super().__init__(c_in, c, kernel)
        bias = self.inputs.bias
        if bias is not None:
            with torch.no_grad():
                bias[c : 2 * c] = 1.0

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See :meth:`ConvCell.step`."""
        h, memory = state
        i, f, g, o = (x + self.states(h)).chunk(4, 1)
        memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(memory), memory


#: Cells by the name of their network.
CELLS: dict[str, type[ConvCell]] = {"convgru": ConvGRUCell, "convlstm": ConvLSTMCell}


class RecurrentUnet(DateUnet):
    """Encoder of each date, a recurrent cell per level, decoder, one head per task.

    Args:
        spec: Modalities, steps, tasks and size; its network is one of :data:`CELLS`.
        normalisation: Per modality; without it features pass as they are (mean 0, sd 1).

    Raises:
        ModelError: No modality has a time.
    """

    rate: Tensor

    def __init__(
        self, spec: DatedSpec, normalisation: Mapping[str, Normalisation] | None = None
    ) -> None:
        super().__init__(spec, normalisation)
        rate = day_rates(spec)
        self.register_buffer("rate", rate, persistent=False)
        cell, deepest = CELLS[spec.network], spec.depth - 1
        self.places = nn.ModuleList(nn.Linear(2 * len(rate), w, bias=False) for w in spec.widths)
        self.cells = nn.ModuleList(
            cell(w, w, 3 if level == deepest else 1) for level, w in enumerate(spec.widths)
        )

    def receptive_field_px(self) -> int:
        """Largest distance, in 10 m pixels, between an output pixel and an input that it sees.

        That of the fusion network of one date with another 3x3 convolution at the deepest level;
        the number of dates does not matter.
        """
        return self._geometry().reach_px(lambda spans: [*spans[:-1], wider(spans[-1])])

    def _values_per_px(self) -> int:
        most = max(w / 4.0**level for level, w in enumerate(self.spec.widths))
        gates: int = CELLS[self.spec.network].gates
        return len(self.spec.steps) * max(round(most) * gates, 16)

    def over_time(self, levels: Sequence[Tensor], seen: Sequence[Tensor]) -> list[Tensor]:
        """See :meth:`DateUnet.over_time`."""
        order = torch.argsort(self.day, stable=True)
        angle = self.day[order, None] * self.rate
        code = torch.cat([angle.sin(), angle.cos()], -1)
        out = []
        for x, on, place, cell in zip(levels, seen, self.places, self.cells, strict=True):
            out.append(cell(x[:, order] + place(code)[..., None, None], on[:, order]))
        return out
