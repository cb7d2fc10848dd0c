"""Networks over time for maps: U-TAE, what all such networks share, and their member files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn

from support.networks import check_folded, check_reach
from terraloom.errors import ModelError
from terraloom.models.dated import DatedSpec, step_days
from terraloom.models.fusion import FusionSpec, Normalisation
from terraloom.models.heads import TaskSpec
from terraloom.models.registry import (
    ARCHITECTURES,
    architecture_of,
    build,
    card_path,
    check_contract,
    load_member,
    make_spec,
    save_member,
)
from terraloom.models.utae import UTAE
from terraloom.preprocess.groups import group_factor

STEPS = ("2018-03-05", "2018-05-20", "2018-06-30", "2018-09-14")
COVER = TaskSpec("cover", "segmentation", ("a", "b", "c"))
HEIGHT = TaskSpec("height", "regression", unit="m", mean=8.0, std=4.0)
TASKS = (COVER, HEIGHT)
TIMED = ("utae", "convgru", "convlstm", "ltae", "tempcnn", "gru")
Channels = dict[str, tuple[str, ...]]


def named(steps: tuple[str, ...], *bands: str) -> tuple[str, ...]:
    return tuple(f"{s}/{b}" for s in steps for b in bands)


def mixed(steps: tuple[str, ...] = STEPS) -> Channels:
    """10, 20 and 60 m over time, radar on the first and last step only, and a static group."""
    return {
        "s2_10": named(steps, "B04", "B08"), "s2_20": named(steps, "B8A", "B11"),
        "s2_60": named(steps, "B01"), "s1_10": named((steps[0], steps[-1]), "VV", "VH"),
        "dem_30": ("dem",),
    }  # fmt: skip


def make_net(network: str = "utae", channels: Channels | None = None, **kw: Any) -> Any:
    given: dict[str, Any] = {"width": 6, "depth": 3} | kw
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build(make_spec(network, channels or mixed(), TASKS, **given))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
                assert m.running_mean is not None and m.running_var is not None
                m.running_mean.uniform_(-0.2, 0.2)
                m.running_var.uniform_(0.5, 1.5)
    return net.eval()


def like(net: Any, channels: Channels, **kw: Any) -> Any:
    """A network of other steps with the same weights."""
    other = make_net(net.spec.network, channels, **kw)
    other.load_state_dict(
        {k: v for k, v in net.state_dict().items() if not k.startswith(("mean_", "std_"))},
        strict=False,
    )
    return other


def scene(h: int, w: int, n: int = 1, channels: Channels | None = None) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        name: torch.rand((n, len(c), -(-h // f), -(-w // f)), generator=g)
        for name, c in (channels or mixed()).items() if (f := group_factor(name))
    }  # fmt: skip


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[k] - b[k]).detach().abs().max()) for k in a)


@pytest.mark.parametrize("network", TIMED)
@pytest.mark.parametrize(("h", "w"), [(1, 1), (37, 53), (24, 48)])
def test_any_window_size(network: str, h: int, w: int) -> None:
    out = make_net(network).predict(scene(h, w, n=2))
    assert out["cover"].shape == (2, 3, h, w) and out["height"].shape == (2, 2, h, w)
    assert all(bool(torch.isfinite(v).all()) for v in out.values())
    assert torch.allclose(out["cover"].sum(1), torch.ones(2, h, w), atol=1e-5)


@pytest.mark.parametrize("network", TIMED)
@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_date_without_observation_changes_nothing(network: str, at: int) -> None:
    net, x = make_net(network), scene(24, 24)
    steps = (*STEPS[:at], "2018-07-21", *STEPS[at:])
    channels = mixed(steps) | {"s1_10": mixed()["s1_10"]}
    more = dict(x)
    for g in ("s2_10", "s2_20", "s2_60"):
        bands = len(channels[g]) // len(steps)
        cut = at * bands
        void = torch.full_like(x[g][:, :bands], math.nan)
        more[g] = torch.cat([x[g][:, :cut], void, x[g][:, cut:]], 1)
    assert gap(net.predict(x), like(net, channels).predict(more)) < 1e-5
    # Padding of a batch: a window of another date set beside one that has it.
    assert gap(net(x), like(net, channels)(more)) < 1e-4


@pytest.mark.parametrize("network", TIMED)
def test_order_of_dates_does_not_matter(network: str) -> None:
    net, x = make_net(network), scene(24, 24)
    order = (2, 0, 3, 1)
    steps = tuple(STEPS[i] for i in order)
    channels = mixed(steps) | {"s1_10": mixed()["s1_10"]}
    turned = dict(x)
    for g in ("s2_10", "s2_20", "s2_60"):
        v = x[g].unflatten(1, (len(STEPS), -1))
        turned[g] = v[:, list(order)].flatten(1, 2)
    assert gap(net.predict(x), like(net, channels).predict(turned)) < 1e-5
    assert gap(net.predict(x), net.predict(turned)) > 1e-4, "without their days it matters"


def test_a_cloud_has_influence_on_its_date_only() -> None:
    net, x = make_net(), scene(48, 48)
    clear = net.predict(x)
    lost = {g: v.clone() for g, v in x.items()}
    for g in ("s2_10", "s2_20", "s2_60"):  # one date, the whole window
        v = lost[g].unflatten(1, (len(STEPS), -1))
        v[:, 1] = math.nan
    less = {g: v.clone() for g, v in lost.items()}
    without = tuple(s for i, s in enumerate(STEPS) if i != 1)
    for g in ("s2_10", "s2_20", "s2_60"):
        less[g] = lost[g].unflatten(1, (len(STEPS), -1))[:, [0, 2, 3]].flatten(1, 2)
    channels = mixed(without)
    assert gap(net.predict(lost), like(net, channels).predict(less)) < 1e-5
    assert gap(clear, net.predict(lost)) > 1e-4


@pytest.mark.parametrize("network", TIMED)
def test_missing_sensor_is_the_same_as_invalid_everywhere(network: str) -> None:
    net, x = make_net(network), scene(24, 24)
    for g in x:
        a = net.predict({k: v for k, v in x.items() if k != g})
        b = net.predict({**x, g: torch.full_like(x[g], math.nan)})
        assert gap(a, b) == 0 and gap(a, net.predict(x)) > 1e-6, g
    nothing = net.predict({g: torch.full_like(v, math.nan) for g, v in x.items()})
    assert all(bool(torch.isfinite(v).all()) for v in nothing.values())


@pytest.mark.parametrize(
    ("depth", "channels", "kw"),
    [
        (2, {"s2_10": named(STEPS[:2], "B04")}, {}),
        (3, {"s2_10": named(STEPS[:2], "B04"), "s2_60": named(STEPS[:2], "B01")}, {"convs": 2}),
        (3, {"s2_20": named(STEPS[:2], "B11"), "dem_30": ("dem",)}, {}),
        (3, {"s2_10": named(STEPS[:2], "B04"), "dem_240": ("dem",)}, {"decoder": "fpn"}),
        (3, {"s2_10": named(STEPS[:2], "B04"), "s2_20": ("b",)}, {"decoder": "context"}),
    ],
)
def test_receptive_field_equals_reach_of_gradient(
    depth: int, channels: Channels, kw: dict[str, Any]
) -> None:
    net = make_net("utae", channels, depth=depth, indices=False, **kw)
    g = torch.Generator().manual_seed(0)
    for name, p in net.named_parameters():
        # Positive weights: no path from input to output can cancel or be cut by a ReLU. They
        # differ, or the norm over channels would find nothing.
        p.data.fill_(1.0 if name.endswith("weight") else 0.5)
        if p.ndim > 1:
            p.data.uniform_(0.02, 0.08, generator=g)
    check_reach(net, lambda h, w, n: scene(h, w, n=n, channels=channels))


def test_parts_of_a_window_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for network in ("utae", "ltae"):
        net, x = make_net(network), scene(61, 83)
        x["s2_10"][:, 2:4, 30:50, 40:70] = math.nan
        whole = net.predict(x)
        monkeypatch.setattr("terraloom.models.dated._PART_VALUES", 1)
        assert gap(whole, net.predict(x)) < 1e-5
        monkeypatch.undo()


def test_sizes_and_parameters() -> None:
    """Figures of the docs: a standard width comes near the 1.1 million of the paper."""
    channels = {"s2_10": named(STEPS, *(f"b{i}" for i in range(10)))}

    def count(net: nn.Module) -> int:
        return sum(p.numel() for p in net.parameters())

    ours = make_net("utae", channels, width=12, depth=4)
    standard = make_net("utae", channels, depth=4, widths=(64, 64, 128, 128), convs=2)
    assert count(ours) == 164_893 and (ours.stride_px, ours.receptive_field_px()) == (8, 29)
    assert count(standard) == 1_139_781 and standard.receptive_field_px() == 43
    more = make_net("utae", {"s2_10": named((*STEPS, "2018-10-01"), *(f"b{i}" for i in range(10)))},
                    width=12, depth=4)  # fmt: skip
    assert count(more) == count(ours), "the number of dates costs no parameter"


def test_slices_name_each_modality_and_date() -> None:
    net, x = make_net(), scene(24, 24)
    slices, ready = net.feature_slices(), net.prepare(x)
    assert list(slices)[:5] == [f"s2_10@{s}" for s in STEPS] + [f"s1_10@{STEPS[0]}"]
    assert "dem_30" in slices
    used: dict[int, int] = {}
    for f, at in slices.values():  # without gap, without overlap
        assert at.start == used.get(f, 0)
        used[f] = at.stop
        assert bool((ready[f][:, at.stop - 1, : 24 // f] == 1).all())
    assert used == {f: v.shape[1] for f, v in ready.items()}
    f, at = slices[f"s2_10@{STEPS[1]}"]
    want = torch.cat([x["s2_10"][:, 2:4], ((x["s2_10"][:, 3] - x["s2_10"][:, 2])
                      / (x["s2_10"][:, 3] + x["s2_10"][:, 2]))[:, None]], 1)  # fmt: skip
    assert torch.allclose(ready[f][:, at][:, :-1], want, atol=1e-5)


def test_parts_say_what_they_hold() -> None:
    net = make_net()
    spec, slices = net.part_spec(), net.feature_slices()
    key = f"s2_10@{STEPS[1]}"
    assert spec.channels.keys() == spec.roles.keys() == slices.keys()
    assert spec.channels[key] == (f"{STEPS[1]}/B04", f"{STEPS[1]}/B08")
    assert spec.pairs(key) == [(1, 0)] and spec.roles[key]["B08"] == "B08"
    assert spec.channels["dem_30"] == ("dem",) and spec.pairs("dem_30") == []
    for k, (_, at) in slices.items():
        assert at.stop - at.start == len(spec.channels[k]) + len(spec.pairs(k)) + 1


def test_steps_share_the_statistics_of_a_band() -> None:
    channels = {"s2_10": named(STEPS[:3], "b")}
    norm = {"s2_10": Normalisation((1.0, 3.0, 0.0), (1.0, 1.0, 1.0))}
    net = build(make_spec("utae", channels, TASKS, width=4, depth=2), norm)
    assert net.get_buffer("mean_s2_10").flatten().tolist() == [2.0] * 3, "(0, 1) is no value"
    assert net.get_buffer("std_s2_10").flatten().tolist() == pytest.approx([math.sqrt(2)] * 3)


def test_days_come_from_names_or_are_given() -> None:
    assert step_days(["1970-01-02", "2018-05-20"]) == {"1970-01-02": 1.0, "2018-05-20": 17671.0}
    assert step_days(["spring"], {"spring": 12.5}) == {"spring": 12.5}
    with pytest.raises(ModelError, match="spring"):
        step_days(["spring"])
    with pytest.raises(ModelError, match="no modality over time"):
        make_spec("utae", {"dem_30": ("dem",)}, TASKS)
    with pytest.raises(ModelError, match="different bands"):
        make_spec("utae", {"s2_10": ("2018-05/a", "2018-06/b")}, TASKS)
    spec = make_spec("gru", {"s2_10": ("spring/a",)}, TASKS, days={"spring": 3.0})
    again = DatedSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec and architecture_of(again) == "gru"
    two = make_spec("utae", {"s2_10": named(("2018-05-01", "2019-08-01"), "a")}, TASKS)
    assert isinstance(two, DatedSpec) and two.years == 2


# --- member files --------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [n for n in ARCHITECTURES if n not in ("presto", "backbone")])
def test_member_saved_and_loaded_gives_equal_bytes(network: str, tmp_path: Path) -> None:
    net, path = make_net(network), tmp_path / "m.safetensors"
    normalisation = {g: Normalisation((0.5,) * n, (0.3,) * n)
                     for g in net.spec.channels
                     if (n := len(net.spec.channels[g]) + len(net.spec.pairs(g)))}  # fmt: skip
    first = build(net.spec, normalisation)
    first.load_state_dict({**net.state_dict(), **{
        k: v for k, v in first.state_dict().items() if k.startswith(("mean_", "std_"))
    }})  # fmt: skip
    save_member(path, first.state_dict(), net.spec, normalisation)
    once, card = load_member(path)
    twice, _ = load_member(path)
    assert card["architecture"] == network and card["halo_px"] == net.halo_px()
    x = scene(48, 48)
    a, b = once.predict(x), twice.predict(x)
    assert all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)
    # The layout in memory is another one than at the start: rounding may differ.
    assert gap(a, first.eval().predict(x)) < 1e-5
    save_member(tmp_path / "n.safetensors", once.state_dict(), once.spec, normalisation)
    assert (tmp_path / "n.safetensors").read_bytes() == path.read_bytes()
    assert card_path(tmp_path / "n.safetensors").read_bytes() == card_path(path).read_bytes()


def test_architecture_and_spec_belong_together() -> None:
    with pytest.raises(ModelError, match="bert"):
        make_spec("bert", mixed(), TASKS)
    spec = make_spec("utae", mixed(), TASKS)
    with pytest.raises(ModelError, match="utae"):
        build(spec, architecture="fusion")
    assert isinstance(build(spec), UTAE)
    assert architecture_of(FusionSpec(mixed(), TASKS)) == "fusion"
    assert architecture_of(make_spec("fpn", mixed(), TASKS)) == "fpn"


def test_contract_says_all_that_differs() -> None:
    channels: dict[str, tuple[str, ...]] = {"s2_10": ("B04", "B08"), "dem_30": ("dem",)}
    card = {"spec": FusionSpec(channels, TASKS).to_json(), "units": {"s2_10": "reflectance"}}
    card = json.loads(json.dumps(card))
    units = {"s2_10": "reflectance", "dem_30": "m"}
    check_contract(card, channels, TASKS, units=units)

    def refused(channels: Any, tasks: Any = TASKS, **kw: Any) -> str:
        with pytest.raises(ModelError) as err:
            check_contract(card, channels, tasks, where="member-0", **kw)
        assert err.value.where == "member-0"
        return err.value.found

    assert "channel 0 is B08, was B04" in refused(channels | {"s2_10": ("B08", "B04")})
    text = refused({"s2_10": ("B04", "B11"), "s1_10": ("VV",)})
    for part in ("no modality dem_30", "s1_10 is new", "lacks B08", "has B11, unknown"):
        assert part in text
    assert "s2_10 in power, trained in reflectance" in refused(channels, units={"s2_10": "power"})
    other = (TaskSpec("cover", "segmentation", ("a", "c", "b")), HEIGHT)
    assert "ordered otherwise: a, c, b, was a, b, c" in refused(channels, other)
    more = (TaskSpec("cover", "segmentation", ("a", "b", "d")), TaskSpec("height", "regression"))
    text = refused(channels, more)
    assert "lacks c and has the new d" in text and "unit none, trained as m" in text
    text = refused(channels, (TaskSpec("height", "boundary"),))
    assert "no task cover" in text and "kind boundary, trained as regression" in text


# --- learning ------------------------------------------------------------------------------------


def season(n: int = 2, size: int = 24, seed: int = 0) -> xr.Dataset:
    """Two classes with the same values over the year, in the opposite order; a third of them lost.

    The mean over the dates tells nothing: a network that is blind for time cannot know the class.
    """
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 2, (n, size // 6, size // 6))
    y = np.kron(cells, np.ones((6, 6), int))
    course = np.array([0.2, 0.3, 0.5, 0.6])
    x = np.where(y[:, None] == 0, course[:, None, None], course[::-1, None, None])
    # Which values come is the same for both, so that their spread tells nothing either.
    x = x + rng.normal(0, 0.05, x.shape) + rng.normal(0, 0.2, (n, 1, size, size))
    x[rng.random(x.shape) < 0.2] = np.nan
    return xr.Dataset(
        {
            "x_s2_10": (("n", "channel_s2_10", "y_10", "x_10"), x.astype(np.float32)),
            "y_cover": (("n", "y_10", "x_10"), y.astype(np.uint8)),
        },
        coords={"channel_s2_10": list(named(STEPS, "b"))},
    )


def learnt(net: Any, train: xr.Dataset, test: xr.Dataset, steps: int = 40) -> float:
    """Accuracy on chips that were not trained on."""
    x = {"s2_10": torch.from_numpy(train["x_s2_10"].values)}
    y = torch.from_numpy(train["y_cover"].values).long()
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2)
    net.train()
    ready = net.prepare(x)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net.forward_prepared(ready)["cover"], y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    p = net.eval().predict({"s2_10": torch.from_numpy(test["x_s2_10"].values)})["cover"]
    return float((p.argmax(1).numpy() == test["y_cover"].values).mean())


@pytest.mark.parametrize("network", TIMED)
def test_learns_a_time_course_that_means_cannot_tell(network: str) -> None:
    train, test = season(seed=0), season(seed=1)
    task = (TaskSpec("cover", "segmentation", ("early", "late")),)
    channels = {"s2_10": named(STEPS, "b")}
    norm = {"s2_10": Normalisation((0.4,) * 4, (0.25,) * 4)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = build(make_spec(network, channels, task, width=8, depth=2, dropout=0.0), norm)
        assert learnt(net, train, test) > 0.9
        if network == "utae":  # all dates on one day: the same network is blind for time
            blind = build(make_spec(network, channels, task, width=8, depth=2, dropout=0.0), norm)
            blind.get_buffer("day").fill_(100.0)
            assert learnt(blind, train, test) < 0.75


@pytest.mark.parametrize("network", TIMED)
def test_folding_changes_nothing_but_time(network: str) -> None:
    check_folded(make_net(network), scene(37, 53, n=2))
