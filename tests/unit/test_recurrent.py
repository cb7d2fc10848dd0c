"""ConvGRU and ConvLSTM: gates, order of dates, padding and clouds, reach.

What all networks over time share is tested with U-TAE.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from support.networks import check_reach
from terraloom.models.heads import TaskSpec
from terraloom.models.recurrent import CELLS, ConvCell, ConvGRUCell, ConvLSTMCell
from terraloom.models.registry import build, make_spec

NAMES = tuple(CELLS)
STEPS = ("2018-03-05", "2018-05-20", "2018-06-30", "2018-09-14")
TASKS = (TaskSpec("cover", "segmentation", ("a", "b", "c")),)


def make_cell(name: str, c_in: int = 3, c: int = 5, kernel: int = 3) -> ConvCell:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CELLS[name](c_in, c, kernel)


def make_net(name: str, steps: tuple[str, ...] = STEPS, **kw: Any) -> Any:
    channels = {"s2_10": tuple(f"{s}/{b}" for s in steps for b in ("B04", "B08"))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(make_spec(name, channels, TASKS, **{"width": 6, "depth": 3, **kw})).eval()


def series(n: int, dates: int, c: int, size: int = 4) -> Tensor:
    return torch.randn((n, dates, c, size, size), generator=torch.Generator().manual_seed(1))


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def test_gates_of_a_gru_by_hand() -> None:
    cell = ConvGRUCell(1, 1)
    with torch.no_grad():
        cell.inputs.weight[:] = torch.tensor([0.5, -1.0, 2.0]).view(3, 1, 1, 1)
        cell.inputs.bias[:] = torch.tensor([0.1, 0.2, -0.3])  # type: ignore[index]
        cell.states.weight[:] = torch.tensor([1.5, 0.4, -0.7]).view(3, 1, 1, 1)
        cell.states.bias[:] = torch.tensor([-0.2, 0.3, 0.6])  # type: ignore[index]
    h = 0.0
    for x in (0.8, -0.5):
        r = sigmoid(0.5 * x + 0.1 + 1.5 * h - 0.2)
        z = sigmoid(-1.0 * x + 0.2 + 0.4 * h + 0.3)
        n = math.tanh(2.0 * x - 0.3 + r * (-0.7 * h + 0.6))
        h = (1 - z) * n + z * h
    x = torch.tensor([0.8, -0.5]).view(1, 2, 1, 1, 1)
    assert float(cell(x, torch.ones_like(x, dtype=torch.bool)).detach()) == pytest.approx(h)


def test_gates_of_an_lstm_by_hand() -> None:
    cell = ConvLSTMCell(1, 1)
    with torch.no_grad():
        assert cell.inputs.bias is not None and float(cell.inputs.bias[1]) == 1.0
        cell.inputs.weight[:] = torch.tensor([0.5, -1.0, 2.0, 0.3]).view(4, 1, 1, 1)
        cell.inputs.bias[:] = torch.tensor([0.1, 0.2, -0.3, 0.0])
        cell.states.weight[:] = torch.tensor([1.5, 0.4, -0.7, 0.9]).view(4, 1, 1, 1)
        cell.states.bias[:] = 0.0  # type: ignore[index]
    h = c = 0.0
    for x in (0.8, -0.5):
        i, f = sigmoid(0.5 * x + 0.1 + 1.5 * h), sigmoid(-1.0 * x + 0.2 + 0.4 * h)
        g, o = math.tanh(2.0 * x - 0.3 - 0.7 * h), sigmoid(0.3 * x + 0.9 * h)
        c = f * c + i * g
        h = o * math.tanh(c)
    x = torch.tensor([0.8, -0.5]).view(1, 2, 1, 1, 1)
    assert float(cell(x, torch.ones_like(x, dtype=torch.bool)).detach()) == pytest.approx(h)


@pytest.mark.parametrize("name", NAMES)
def test_one_pixel_is_a_cell_of_torch(name: str) -> None:
    cell, x = make_cell(name, kernel=1), series(2, 6, 3)
    kinds: dict[str, Any] = {"convgru": torch.nn.GRUCell, "convlstm": torch.nn.LSTMCell}
    plain = kinds[name](3, 5)
    plain.load_state_dict({
        "weight_ih": cell.inputs.weight[..., 0, 0], "bias_ih": cell.inputs.bias,
        "weight_hh": cell.states.weight[..., 0, 0], "bias_hh": cell.states.bias,
    })  # fmt: skip
    pixels = x.permute(1, 0, 3, 4, 2).flatten(1, 3)
    state: Any = None
    for date in pixels:
        state = plain(date, state)
    want = state if isinstance(state, Tensor) else state[0]
    got = cell(x, torch.ones((2, 6, 1, 4, 4), dtype=torch.bool)).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_series_converges(name: str) -> None:
    cell, x = make_cell(name), 0.3 * series(1, 1, 3)
    outs = []
    for dates in (5, 100, 200, 300):
        seen = torch.ones((1, dates, 1, 4, 4), dtype=torch.bool)
        outs.append(cell(x.expand(-1, dates, -1, -1, -1), seen).detach())
    steps = [float((b - a).abs().max()) for a, b in pairwise(outs)]
    assert steps[0] > 1e-3 > 1e-6 > steps[1] and steps[2] <= steps[1]


@pytest.mark.parametrize("name", NAMES)
def test_dates_that_are_not_seen_leave_the_state_alone(name: str) -> None:
    cell, x = make_cell(name), series(2, 5, 3)
    seen = torch.ones((2, 5, 1, 4, 4), dtype=torch.bool)
    want = cell(x, seen)
    for at in (0, 2, 5):  # padding before, between and after, filled with anything
        padded = torch.cat([x[:, :at], torch.full_like(x[:, :1], 9.0), x[:, at:]], 1)
        on = torch.cat([seen[:, :at], torch.zeros_like(seen[:, :1]), seen[:, at:]], 1)
        assert torch.equal(cell(padded, on), want), at
    cloudy = seen.clone()
    cloudy[:, 3, :, :2] = False
    got = cell(x, cloudy)
    assert torch.equal(got[:, :, 2:], want[:, :, 2:]), "the state does not leave its pixel"
    assert float((got - want)[:, :, :2].detach().abs().min()) > 0
    assert torch.equal(got[:, :, :2], cell(x[:, [0, 1, 2, 4]], seen[:, 1:])[:, :, :2])
    assert not bool(cell(x, torch.zeros_like(seen)).any()), "nothing seen, nothing said"


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_dates_counts(name: str) -> None:
    cell, x = make_cell(name), series(1, 5, 3)
    seen = torch.ones((1, 5, 1, 4, 4), dtype=torch.bool)
    gap = (cell(x, seen) - cell(x.flip(1), seen)).detach().abs()
    assert float(gap.min()) > 1e-4
    net = make_net(name)
    with torch.no_grad():  # also where the days are not told
        for place in net.places:
            place.weight.zero_()
    g = torch.Generator().manual_seed(0)
    values = torch.rand((1, 8, 24, 24), generator=g)
    turned = values.unflatten(1, (4, 2)).flip(1).flatten(1, 2)
    a, b = (net.predict({"s2_10": v})["cover"] for v in (values, turned))
    assert float((a - b).abs().max()) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_cloud_over_a_part_is_a_date_less_there(name: str) -> None:
    net, g = make_net(name), torch.Generator().manual_seed(0)
    x = torch.rand((1, 4, 2, 96, 96), generator=g)
    cloudy = x.clone()
    cloudy[:, 1, :, :48] = math.nan
    got = net.predict({"s2_10": cloudy.flatten(1, 2)})["cover"]
    filled = net.predict({"s2_10": cloudy.nan_to_num(math.inf).flatten(1, 2)})["cover"]
    assert torch.equal(got, filled)
    three = make_net(name, tuple(STEPS[i] for i in (0, 2, 3)))
    three.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("mean_")
                           and not k.startswith("std_")}, strict=False)  # fmt: skip
    less = three.predict({"s2_10": x[:, [0, 2, 3]].flatten(1, 2)})["cover"]
    clear = net.predict({"s2_10": x.flatten(1, 2)})["cover"]
    far = 48 - net.receptive_field_px()
    assert far > 0
    assert float((got - less)[..., :far, :].abs().max()) < 1e-5
    assert torch.allclose(got[..., 96 - far :, :], clear[..., 96 - far :, :], atol=1e-5)
    assert float((got - clear)[..., :far, :].abs().max()) > 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("depth", "dates"), [(2, 2), (3, 2), (3, 6)])
def test_receptive_field_is_the_same_for_any_number_of_dates(
    name: str, depth: int, dates: int
) -> None:
    steps = tuple(f"2018-0{i + 1}" for i in range(dates))
    net = make_net(name, steps, depth=depth, indices=False)
    for key, p in net.named_parameters():
        # Positive and small: no path from input to output cancels, no gate is shut.
        weight = 0.002 if key.startswith("cells") else 0.05
        p.data.fill_(weight if p.ndim > 1 else (1.0 if key.endswith("weight") else 0.1))
    g = torch.Generator().manual_seed(0)

    def scene(h: int, w: int, n: int) -> dict[str, Tensor]:
        return {"s2_10": torch.rand((n, 2 * dates, h, w), generator=g)}

    check_reach(net, scene)
