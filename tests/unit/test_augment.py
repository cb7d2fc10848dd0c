"""Random changes of windows: each does what it says, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from terraloom.models.fusion import FusionNet, FusionSpec
from terraloom.models.heads import TaskSpec
from terraloom.models.registry import build, make_spec
from terraloom.preprocess.groups import group_factor
from terraloom.train.augment import Augmentation, Augmenter, haze_strength

OFF = Augmentation(0, 0, 0, 0, flips=False)
BANDS = {"s2_10": ("B02", "B03", "B04", "B08"), "s2_20": ("B05", "B8A", "B11"),
         "s1_10": ("VV", "VH")}  # fmt: skip
DATES = ("spring", "summer", "autumn")
N, SIZE = 6, 48


def net_of(dates: tuple[str, ...] = DATES) -> FusionNet:
    channels = {g: tuple(f"{d}/{b}" for d in dates for b in v) for g, v in BANDS.items()}
    channels["dem_10"] = ("elevation",)
    return FusionNet(FusionSpec(channels, (TaskSpec("c", "segmentation", ("a", "b")),), width=4,
                                depth=2))  # fmt: skip


NET = net_of()


def windows(net: FusionNet = NET, seed: int = 0, holes: bool = True) -> dict[int, Tensor]:
    """Prepared windows; in the first 8 rows nothing is valid, in 8 columns one spring band."""
    g = torch.Generator().manual_seed(seed)
    inputs = {}
    for group, names in net.spec.channels.items():
        f = 2 if group.endswith("20") else 1
        x = torch.rand((N, len(names), SIZE // f, SIZE // f), generator=g) + 0.1
        if holes:
            x[:, :, : 8 // f] = math.nan
            x[:, 0, :, : 8 // f] = math.nan
        inputs[group] = x
    return {f: v.clone().contiguous() for f, v in net.prepare(inputs).items()}


def changed(settings: Augmentation, seed: int = 1, net: FusionNet = NET,
            holes: bool = True) -> tuple[dict[str, tuple[Tensor, Tensor]], ...]:  # fmt: skip
    """Values and mask per group, before and after."""
    x = windows(net, holes=holes)
    before = split(net, {f: v.clone() for f, v in x.items()})
    Augmenter(net, settings)(x, torch.Generator().manual_seed(seed))
    return before, split(net, x)


def split(net: FusionNet, x: dict[int, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {g: (x[f][:, at][:, :-1], x[f][:, at][:, -1:])
            for g, (f, at) in net.feature_slices().items()}  # fmt: skip


ALL = {
    "gain": replace(OFF, gain=0.3),
    "bias": replace(OFF, bias=0.3),
    "drop_band": replace(OFF, drop_band=0.4),
    "drop_sensor": replace(OFF, drop_sensor=0.5),
    "drop_date": replace(OFF, drop_date=0.4),
    "noise": replace(OFF, noise=0.3),
    "haze": replace(OFF, haze=1),
    "cloud": replace(OFF, cloud=1),
    "shift_px": replace(OFF, shift_px=2),
}


def jitter_of_before(net: FusionNet, a: Augmentation, x: dict[int, Tensor],
                     g: torch.Generator) -> None:  # fmt: skip
    """Gain, bias and dropout as networks before this module were trained with."""
    slices = net.feature_slices()
    n = next(iter(x.values())).shape[0]
    lost = torch.rand((n, len(slices)), generator=g) < a.drop_sensor
    lost[lost.all(1)] = False
    for i, (f, at) in enumerate(slices.values()):
        values, mask = x[f][:, at.start : at.stop - 1], x[f][:, at.stop - 1 : at.stop]
        c = values.shape[1]
        gain = 1 + a.gain * (2 * torch.rand((n, 1, 1, 1), generator=g) - 1)
        bias = a.bias * torch.randn((n, c, 1, 1), generator=g)
        kept = (torch.rand((n, c, 1, 1), generator=g) >= a.drop_band).to(values.dtype)
        here = (~lost[:, i]).to(values.dtype)[:, None, None, None]
        values.mul_(gain).add_(bias * (mask > 0)).mul_(kept * here)
        mask.mul_(here)


@pytest.mark.parametrize("settings", [Augmentation(), Augmentation(0.2, 0.3, 0.3, 0.4)])
def test_the_default_draws_and_does_what_it_always_did(settings: Augmentation) -> None:
    ours, theirs = windows(), windows()
    g, h = (torch.Generator().manual_seed(3) for _ in range(2))
    for _ in range(3):
        Augmenter(NET, settings)(ours, g)
        jitter_of_before(NET, settings, theirs, h)
    assert all(torch.equal(v, theirs[f]) for f, v in ours.items())
    assert torch.equal(g.get_state(), h.get_state())


def test_zero_is_the_identity() -> None:
    before, after = changed(OFF)
    assert all(torch.equal(a, b) for g in before for a, b in zip(before[g], after[g], strict=True))


@pytest.mark.parametrize("name", ALL)
def test_changes_are_made_by_the_given_stream_only(name: str) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    (_, a), (_, b), (_, c) = (changed(ALL[name], seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[g][0], b[g][0]) and torch.equal(a[g][1], b[g][1]) for g in a)
    assert any(not torch.equal(a[g][0], c[g][0]) for g in a)


@pytest.mark.parametrize("name", ALL)
def test_what_is_missing_stays_missing(name: str) -> None:
    before, after = changed(ALL[name])
    for g in before:
        (_, mask), (values, new) = before[g], after[g]
        assert torch.isfinite(values).all() and ((new >= 0) & (new <= 1 + 1e-6)).all()
        assert (values.masked_select((new == 0).expand_as(values)) == 0).all(), g
        if name != "shift_px":
            assert (new <= mask).all() and (new[mask == 0] == 0).all()
    # Untouched: what lies in a group that the change does not concern.
    if name in ("haze", "cloud"):
        for g in ("s1_10", "dem_10"):
            assert all(torch.equal(a, b) for a, b in zip(before[g], after[g], strict=True))


def test_noise_has_its_size_and_spares_missing_values() -> None:
    before, after = changed(ALL["noise"])
    for g in before:
        added = after[g][0] - before[g][0]
        assert (added[before[g][0] == 0] == 0).all()
        assert float(added[before[g][0] != 0].std()) == pytest.approx(0.3, rel=0.05)


def test_a_date_goes_from_all_sensors() -> None:
    before, after = changed(ALL["drop_date"], holes=False)
    gone = {}
    for g in BANDS:
        names = NET.spec.channels[g]
        lost = (after[g][0] == 0).all((2, 3))
        by_date = {d: torch.stack([lost[:, k] for k, n in enumerate(names) if n.startswith(d)], 1)
                   for d in DATES}  # fmt: skip
        assert all(bool((v.all(1) == v.any(1)).all()) for v in by_date.values())
        gone[g] = torch.stack([v.all(1) for v in by_date.values()], 1)
        share = 1 - gone[g].float().mean(1)
        assert torch.allclose(after[g][1].amax((1, 2, 3)), share)
    assert torch.equal(gone["s2_10"], gone["s2_20"]) and torch.equal(gone["s2_10"], gone["s1_10"])
    assert gone["s2_10"].any() and not gone["s2_10"].all(1).any(), "one date stays"
    assert torch.equal(after["dem_10"][0], before["dem_10"][0]), "relief has no date"
    every = changed(replace(OFF, drop_date=0.9999))[1]
    assert (every["s2_10"][1] > 0).any((1, 2, 3)).all()


def test_haze_is_a_smooth_veil_strongest_in_blue() -> None:
    assert haze_strength("B01") == 1 > haze_strength("B02") > haze_strength("B04")
    assert haze_strength("B04") > haze_strength("B08") > haze_strength("B11") > 0
    assert haze_strength("VV") == 0
    before, after = changed(ALL["haze"], holes=False)
    (old, mask), (new, again) = before["s2_10"], after["s2_10"]
    assert torch.equal(mask, again)
    names, c = NET.spec.channels["s2_10"], len(NET.spec.channels["s2_10"])
    t = (new - old) / torch.where(torch.arange(new.shape[1])[:, None, None] < c, 3 - old, -old)
    for i in range(N):
        hit = {names[k].split("/")[0] for k in range(c) if not torch.equal(new[i, k], old[i, k])}
        assert len(hit) == 1, "one period"
        at = {n.split("/")[1]: t[i, k] for k, n in enumerate(names) if n.split("/")[0] in hit}
        blue, nir = at["B02"], at["B08"]
        assert torch.allclose(nir, blue * haze_strength("B08") / haze_strength("B02"), atol=1e-4)
        assert 0.1 < float(blue.max()) <= 0.8 and float(blue.min()) > -1e-4
        steps = torch.diff(blue, dim=0).abs().max(), torch.diff(blue, dim=1).abs().max()
        assert max(float(s) for s in steps) < 0.2 * float(blue.max())
    # The veil is one: 20 m pixels have the mean of the 10 m pixels beneath them.
    k = [n.split("/")[1] for n in NET.spec.channels["s2_20"]].index("B8A")
    old20, new20 = before["s2_20"][0], after["s2_20"][0]
    t20 = ((new20 - old20) / (3 - old20))[:, k :: len(BANDS["s2_20"])][:, :3].sum(1)
    t10 = torch.nn.functional.avg_pool2d(t[:, 3:c:4].sum(1, keepdim=True), 2)[:, 0]
    assert torch.allclose(t20 / haze_strength("B8A"), t10 / haze_strength("B08"), atol=1e-4)


def test_clouds_hide_a_period_and_their_shadows_darken_it() -> None:
    net = net_of(("only",))
    before, after = changed(ALL["cloud"], net=net, holes=False)
    (old, _), (new, mask) = before["s2_10"], after["s2_10"]
    cloud = mask[:, 0] == 0
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    share = cloud.float().mean((1, 2))
    assert ((share >= 0.04) & (share <= 0.41)).all()
    assert (new.movedim(1, -1)[cloud] == 0).all()
    dark = ((new[:, 0] != old[:, 0]) & ~cloud).float().mean((1, 2))
    assert (dark > 0).all() and (dark <= share + 1e-6).all()
    shaded = (new[:, 0] != old[:, 0]) & ~cloud
    t = ((new - old) / (-2 - old))[:, :4].movedim(1, -1)[shaded]
    assert ((t > 0.39) & (t < 0.81)).all()
    assert torch.equal(new[:, 4:].movedim(1, -1)[~cloud], old[:, 4:].movedim(1, -1)[~cloud])
    # A coarse pixel that a cloud touches is hidden; clouds are patches, no salt and pepper.
    coarse = torch.nn.functional.max_pool2d(cloud[:, None].float(), 2) > 0
    assert torch.equal(coarse, after["s2_20"][1] == 0)
    edge = (cloud[:, 1:] != cloud[:, :-1]).float().mean() / cloud.float().mean()
    assert float(edge) < 0.35
    half = (changed(replace(OFF, cloud=0.5), net=net)[1]["s2_10"][1][:, :, 10:, 10:] == 0).any(
        (1, 2, 3)
    )
    assert half.any() and not half.all()


def test_clouds_of_one_of_several_periods_leave_their_share() -> None:
    _, after = changed(ALL["cloud"], holes=False)
    values, mask = after["s2_10"]
    hit = mask[:, 0] < 1
    assert mask[:, 0][hit].tolist() == pytest.approx([2 / 3] * int(hit.sum()), abs=1e-6)
    assert ((values == 0).sum(1)[hit] >= 4).all()


def test_a_shift_moves_one_sensor_by_the_same_ground_distance() -> None:
    x = windows(holes=False)
    ramp = torch.arange(SIZE, dtype=torch.float32)
    for g, (f, at) in NET.feature_slices().items():
        line = ramp if f == 1 else ramp.view(-1, 2).mean(1)
        x[f][:, at.start] = 1 + line[:, None]
        x[f][:, at.start + (1 if g != "dem_10" else 0)] = 1 + line[None, :]
        x[f][:, at.stop - 1] = 1.0
    old = split(NET, {f: v.clone() for f, v in x.items()})
    Augmenter(NET, replace(OFF, shift_px=2))(x, torch.Generator().manual_seed(0))
    new = split(NET, x)
    inner = (slice(None), slice(6, -6), slice(6, -6))
    inner20 = (slice(None), slice(3, -3), slice(3, -3))
    down10 = (old["s2_10"][0][:, 0] - new["s2_10"][0][:, 0])[inner]
    down20 = (old["s2_20"][0][:, 0] - new["s2_20"][0][:, 0])[inner20]
    moved = {g: [not torch.equal(old[g][0][i], new[g][0][i]) for i in range(N)] for g in old}
    assert moved["s2_10"] == moved["s2_20"] and any(moved["s2_10"])
    assert [sum(moved[g][i] for g in ("s2_10", "s1_10", "dem_10")) for i in range(N)] == [1] * N
    step = down10.flatten(1).mean(1)
    assert torch.allclose(down10, step[:, None, None].expand_as(down10), atol=1e-4)
    assert torch.allclose(down20, step[:, None, None].expand_as(down20), atol=1e-4)
    assert float(step.abs().max()) <= 2 and (step != 0).tolist() == moved["s2_10"]
    across = (old["s2_10"][0][:, 1] - new["s2_10"][0][:, 1])[inner].flatten(1).mean(1)
    assert not torch.allclose(across, step)
    assert torch.allclose(new["s2_10"][1], torch.ones(()))


def test_a_shift_does_not_mix_in_missing_pixels() -> None:
    x = windows(holes=False)
    for f, v in x.items():
        v[:] = 5.0
        for _, (factor, at) in NET.feature_slices().items():
            if factor == f:
                v[:, at.stop - 1] = 1.0
        v[:, :, 10:20, 10:20] = 0.0
    Augmenter(NET, replace(OFF, shift_px=1.5))(x, torch.Generator().manual_seed(4))
    for values, mask in split(NET, x).values():
        ok = (mask > 0).expand_as(values)
        assert torch.allclose(values[ok], torch.tensor(5.0)) and (values[~ok] == 0).all()
        assert torch.allclose(mask[mask > 0], torch.ones(()))
        assert 60 <= int((mask[0] == 0).sum()) <= 140


def test_all_together_on_a_single_date_without_roles() -> None:
    spec = FusionSpec({"x_10": ("a", "b"), "y_30": ("c",)},
                      (TaskSpec("c", "segmentation", ("a", "b")),), width=4, depth=2)  # fmt: skip
    net = FusionNet(spec)
    x = net.prepare({"x_10": torch.rand((2, 2, 48, 48)), "y_30": torch.rand((2, 1, 16, 16))})
    every = Augmentation(0.1, 0.1, 0.1, 0.1, 0.5, 0.1, 1, 1, 1)
    Augmenter(net, every)(x, torch.Generator().manual_seed(0))
    assert all(torch.isfinite(v).all() for v in x.values())


def test_networks_over_time_lose_the_same_dates_and_bands() -> None:
    """Their features stand date by date, each with its own mask."""
    channels = {g: tuple(f"{d}/{b}" for d in ("2020-05-01", "2020-07-01") for b in v)
                for g, v in BANDS.items()}  # fmt: skip
    channels["dem_10"] = ("elevation",)
    tasks = (TaskSpec("c", "segmentation", ("a", "b")),)
    net = build(make_spec("utae", channels, tasks, width=4, depth=2))
    x = {g: torch.rand((N, len(c), *([48 // group_factor(g)] * 2))) for g, c in channels.items()}
    dated = {f: v.clone() for f, v in net.prepare(x).items()}
    Augmenter(net, replace(OFF, drop_date=0.5))(dated, torch.Generator().manual_seed(0))
    there = {p: dated[f][:, at][:, -1].amax((1, 2)) > 0
             for p, (f, at) in net.feature_slices().items()}  # fmt: skip
    days = ("2020-05-01", "2020-07-01")
    for d in days:
        assert torch.equal(there[f"s2_10@{d}"], there[f"s1_10@{d}"])
    assert not torch.stack([there[f"s2_10@{d}"] for d in days]).all()
    assert torch.stack([there[f"s2_10@{d}"] for d in days]).any(0).all()
    assert there["dem_10"].all()
    dated = {f: v.clone() for f, v in net.prepare(x).items()}
    Augmenter(net, replace(OFF, cloud=1))(dated, torch.Generator().manual_seed(0))
    hidden = [(dated[f][:, at][:, -1] == 0).flatten(1).any(1)
              for p, (f, at) in net.feature_slices().items() if p.startswith("s2_10")]  # fmt: skip
    assert torch.equal(hidden[0], ~hidden[1]), "one date of each window"
