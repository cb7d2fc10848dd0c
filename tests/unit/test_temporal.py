"""Networks of pixel series: what is not observed has no influence, and the rest does."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from terraloom.errors import ModelError
from terraloom.models.fusion import Normalisation
from terraloom.models.heads import TaskSpec
from terraloom.models.interpolation import interpolate
from terraloom.models.temporal import ENCODERS, SeriesNet, SeriesSpec

BANDS = ("nir", "nir08", "ndvi")
TASKS = (TaskSpec("crop", "segmentation", ("a", "b", "c", "d")),
         TaskSpec("yield", "regression", unit="t/ha", mean=5.0, std=2.0))  # fmt: skip
NORM = Normalisation((0.1, 0.3, 0.2), (0.05, 0.1, 0.1))


def network(encoder: str, **settings: object) -> SeriesNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        spec = SeriesSpec(BANDS, TASKS, encoder=encoder, width=32, **settings)
        return SeriesNet(spec, NORM).eval()


def series(n: int = 6, length: int = 11, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Irregular dates in order, some bands missing on some dates."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 0.5, (n, length, 3)).astype(np.float32)
    x[rng.random(x.shape) < 0.15] = np.nan
    days = np.stack([np.sort(rng.choice(np.arange(1, 365), length, False)) for _ in range(n)])
    return torch.from_numpy(x), torch.from_numpy(days.astype(np.float32))


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def alone(net: SeriesNet, *inputs: Tensor | None) -> dict[str, Tensor]:
    with torch.no_grad():
        return net(*inputs)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_padding_does_not_change_the_output(encoder: str) -> None:
    net = network(encoder)
    x, days = series()
    expected = alone(net, x, days)
    n = len(x)
    for pad_value in (math.nan, 0.0, 9e9):
        more = torch.full((n, 4, 3), pad_value)
        padded = torch.cat([more[:, :2], x, more[:, 2:]], 1)
        at = torch.full((n, 4), 100.0)
        at = torch.cat([at[:, :2], days, at[:, 2:]], 1)
        valid = torch.ones_like(at, dtype=torch.bool)
        valid[:, :2] = valid[:, -2:] = False
        assert apart(alone(net, padded, at, valid), expected) < 1e-6
        at[~valid] = math.nan
        assert apart(alone(net, padded, at), expected) < 1e-6


@pytest.mark.parametrize("encoder", ENCODERS)
def test_cloudy_dates_do_not_change_the_output(encoder: str) -> None:
    """A date of NaN, or one masked, is as if it had never been taken, wherever it stands."""
    net = network(encoder)
    x, days = series()
    for at in (0, 5, 10):
        rest = [i for i in range(11) if i != at]
        expected = alone(net, x[:, rest], days[:, rest])
        cloudy = x.clone()
        cloudy[:, at] = math.nan
        assert apart(alone(net, cloudy, days), expected) < 1e-6
        valid = torch.ones(days.shape, dtype=torch.bool)
        valid[:, at] = False
        bright = x.clone()
        bright[:, at] = 0.9
        assert apart(alone(net, bright, days, valid), expected) < 1e-6
        assert apart(alone(net, bright, days), expected) > 1e-3, "a clear date must count"


@pytest.mark.parametrize("encoder", ENCODERS)
def test_padding_and_clouds_do_not_change_training(encoder: str) -> None:
    """Gradients and running statistics too, dropout aside."""
    x, days = series()
    grads = []
    for extra in (0, 5):
        net = network(encoder, dropout=0.0).train()
        more = torch.full((len(x), extra, 3), math.nan)
        at = torch.full((len(x), extra), 200.0)
        out = net(torch.cat([x, more], 1), torch.cat([days, at], 1))
        sum(v.square().sum() for v in out.values()).backward()
        found = [p.grad for p in net.parameters() if p.grad is not None]
        unused = 15 if encoder == "presto" else 0  # weights of bands and codes it is not given
        assert len(found) == sum(p.requires_grad for p in net.parameters()) - unused
        buffers = [b for b in net.buffers() if b.is_floating_point()]
        grads.append(torch.cat([g.flatten() for g in [*found, *buffers]]))
    assert torch.isfinite(grads[0]).all()
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_order_of_rows_does_not_matter_but_days_do(encoder: str) -> None:
    net = network(encoder)
    x, days = series()
    expected = alone(net, x, days)
    p = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    assert apart(alone(net, x[:, p], days[:, p]), expected) < 1e-6
    assert apart(alone(net, x[:, p], days), expected) > 1e-3


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_series_does_not_depend_on_its_batch(encoder: str) -> None:
    net = network(encoder)
    x, days = series()
    lengths = (11, 4, 1, 7, 2, 9)
    padded = torch.arange(11) >= torch.tensor(lengths)[:, None]
    both = alone(
        net, x.masked_fill(padded[..., None], math.nan), days.masked_fill(padded, math.nan)
    )
    for i, k in enumerate(lengths):
        one = alone(net, x[i : i + 1, :k], days[i : i + 1, :k])
        assert apart(one, {t: v[i : i + 1] for t, v in both.items()}) < 1e-6


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_missing_band_is_not_a_guessed_value(encoder: str) -> None:
    net = network(encoder)
    x, days = series()
    x = torch.nan_to_num(x, nan=0.2)
    missing = x.clone()
    missing[:, :, 1] = math.nan
    expected = alone(net, missing, days)
    for guess in (0.0, NORM.mean[1]):  # neither zero nor the mean stands for it
        filled = x.clone()
        filled[:, :, 1] = guess
        assert apart(alone(net, filled, days), expected) > 1e-3
    # Infinite values are no observations either.
    missing[:, :, 1] = math.inf
    assert apart(alone(net, missing, days), expected) == 0


@pytest.mark.parametrize("encoder", ENCODERS)
def test_nothing_seen_is_said_so(encoder: str) -> None:
    net = network(encoder)
    x, days = series(3)
    x[1] = math.nan
    out = net.predict(x, days)
    assert set(out) == {"crop", "yield"} and out["crop"].shape == (3, 4)
    for p in out.values():
        assert p[1].isnan().all() and torch.isfinite(p[[0, 2]]).all()
    assert torch.allclose(out["crop"][[0, 2]].sum(1), torch.ones(2), atol=1e-6)
    assert (out["yield"][[0, 2], 1] > 0).all()
    empty = net.predict(x[:, :0], days[:, :0])
    assert empty["crop"].shape == (3, 4) and empty["crop"].isnan().all()
    assert torch.isfinite(alone(net, x, days)["crop"]).all()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_calendar_repeats(encoder: str) -> None:
    """15 January is day 15, and day 380.25 of a season that began last autumn."""
    net = network(encoder, start_day=250.0)
    x, days = series()
    late = torch.where(days < 250, days + 365.25, days)
    assert apart(alone(net, x, late), alone(net, x, days)) < 1e-5


def test_interpolation_is_linear_between_own_observations() -> None:
    net = network("tempcnn", start_day=0.0, period_days=100.0, steps=10)
    x, days = torch.full((1, 4, 3), math.nan), torch.tensor([[10.0, 30.0, 50.0, 70.0]])
    x[0, :, 0] = torch.tensor([1.0, math.nan, 5.0, math.nan])  # gap at 30, none at 70
    x[0, 1, 1] = 2.0
    prepared = net.prepare(x * torch.tensor(NORM.std) + torch.tensor(NORM.mean), days)
    value, near = interpolate(prepared, torch.arange(5.0, 100.0, 10.0), 10.0)
    grid = np.arange(5.0, 100.0, 10.0)
    assert np.allclose(value[0, :, 0], np.interp(grid, [10, 50], [1, 5]), atol=1e-5)
    assert np.allclose(value[0, :, 1], 2.0, atol=1e-5)
    assert (value[0, :, 2] == 0).all() and (near[0, :, 2] == 0).all()
    distance = np.minimum(abs(grid - 10), abs(grid - 50))
    assert np.allclose(near[0, :, 0], np.exp(-distance / 10), atol=1e-6)
    # On the day of an observation it is that observation.
    exact, _ = interpolate(prepared, torch.tensor([10.0, 50.0]), 10.0)
    assert exact[0, :, 0].tolist() == pytest.approx([1.0, 5.0], abs=1e-5)


def test_attention_weighs_the_valid_dates_only() -> None:
    net = network("ltae")
    x, days = series()
    x[:, 3] = math.nan
    s = net.prepare(x, days)
    w = net.encoder.weights(torch.randn(6, 11, 32), s.date)
    assert torch.allclose(w.sum(1), torch.ones(6, 8), atol=1e-6)
    assert (w[:, 3] == 0).all() and (w[:, 0] > 0).all()


def test_gradients_stay_finite_with_gaps() -> None:
    for encoder in ENCODERS:
        net = network(encoder).train()
        x, days = series(4)
        x[0], x[1, :, 2], days[2, 5:] = math.nan, math.nan, math.nan
        x[3, :5], days[3, 5] = math.nan, days[3, 6]  # and two dates on one day
        sum(v.square().sum() for v in net(x, days).values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_parameters_and_spec() -> None:
    """ltae: embedding, day code, keys and queries, output; each counted by hand for 3 bands."""
    w, b = 32, 3
    head = (w * 4 + 4) + (w * 2 + 2)
    embed = 2 * b * w + w + w * w + w + 2 * w
    ltae = embed + 16 * w + (w * 64 + 64) + 64 + (w * w + w + 2 * w)
    block = 5 * w * w + 2 * w
    cnn = 5 * 2 * b * w + 2 * w + 2 * block + (24 * w * w + w + 2 * w)
    first = 2 * 3 * (16 * w + 16 * 16 + 32)
    gru = (2 * b + 16 + 1) * w + w + 3 * first + (2 * w * w + w + 2 * w)
    # Presto: band groups, classes, place, channels; two blocks; norm; then the projection.
    d = 128
    codes = (17 + 9) * d + 10 * d + 4 * d + 10 * 32
    each = 2 * 2 * d + (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)
    presto = codes + 2 * each + 2 * d + (d * w + w + 2 * w)
    for encoder, count in zip(ENCODERS, (ltae, cnn, gru, presto), strict=True):
        net = network(encoder)
        assert net.parameter_counts() == {"encoder": count, "heads": head, "total": count + head}
        card = json.loads(json.dumps(net.spec.to_json()))
        assert SeriesSpec.from_json(card) == net.spec
        again = SeriesNet(SeriesSpec.from_json(card))
        again.load_state_dict(net.state_dict())  # normalisation is part of the weights
        x, days = series()
        assert apart(alone(again.eval(), x, days), alone(net, x, days)) == 0
    with pytest.raises(ModelError, match="unknown settings colour"):
        SeriesSpec.from_json({**card, "colour": 1})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"encoder": "lstm"}, "ltae, tempcnn, gru, presto"),
        ({"adapt": "all"}, "fine-tune, frozen, lora"),
        ({"lat_lon": (91.0, 0.0)}, "latitude"),
        ({"heads": 5}, "a divisor of the width"),
        ({"encoder": "gru", "width": 33}, "even"),
        ({"kernel": 4}, "odd"),
        ({"steps": 0}, "1 or more"),
        ({"dropout": 1.0}, "0 to below 1"),
        ({"period_days": 0.0}, "above 0"),
        ({"bands": ("a", "a")}, "each once"),
        ({"bands": ()}, "one or more"),
        ({"tasks": ()}, "one or more"),
    ],
)
def test_specs_that_make_no_network(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        SeriesSpec(**{"bands": BANDS, "tasks": TASKS, **settings})


def test_inputs_that_do_not_fit() -> None:
    net = network("ltae")
    x, days = series()
    with pytest.raises(ModelError, match=r"\(N, T, 3\)"):
        net(x[..., :2], days)
    with pytest.raises(ModelError, match="days"):
        net(x, days[:, 1:])
    with pytest.raises(ModelError, match="of bool"):
        net(x, days, torch.ones_like(days))
    with pytest.raises(ModelError, match="training mode"):
        net.train().predict(x, days)
    with pytest.raises(ModelError, match="sd above 0"):
        SeriesNet(net.spec, Normalisation((0.0,) * 3, (1.0, 0.0, 1.0)))
