"""Labels in time: gaps, weights, and changes found between a label and the last image."""

from __future__ import annotations

from datetime import date, timedelta
from types import SimpleNamespace

import geopandas as gpd
import numpy as np
import pytest
import xarray as xr
from shapely.geometry import box

from terraloom.errors import LabelError
from terraloom.labels.change import change_test
from terraloom.labels.time import gap_days, label_series, time_weights, weigh_chips

CLASSES, FEATURES = 5, 6


def period(name: str, start: str, end: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, start=date.fromisoformat(start), end=date.fromisoformat(end))


PERIODS = [
    period("winter", "2021-11-01", "2022-03-15"),
    period("spring", "2022-03-16", "2022-05-31"),
    period("summer", "2022-06-01", "2022-08-15"),
    period("autumn", "2022-09-01", "2022-12-31"),
]


class Region(SimpleNamespace):
    """Labels with their series, and what happened to each of them."""


def region(n: int = 600, seed: int = 3, changed: float = 0.06, wrong: float = 0.12) -> Region:
    """Labels of a year: some older than a change, some of a wrong class, some younger."""
    rng = np.random.default_rng(seed)
    t = len(PERIODS)
    centre = rng.normal(0, 1, (CLASSES, t, FEATURES))
    mix = np.eye(FEATURES) + 0.4 * rng.normal(0, 1, (FEATURES, FEATURES))
    y = rng.integers(0, CLASSES, n)
    kind = rng.choice(
        ["sound", "changed", "earlier", "wrong"],
        n,
        p=[0.98 - changed - wrong, changed, 0.02, wrong],
    )
    other = (y + rng.integers(1, CLASSES, n)) % CLASSES
    at = rng.integers(1, t, n)  # first period after the change
    seen = np.repeat(y[:, None], t, axis=1)
    late = np.arange(t) >= at[:, None]
    turn = ((kind == "changed")[:, None] & late) | ((kind == "earlier")[:, None] & ~late)
    turn |= (kind == "wrong")[:, None]
    seen = np.where(turn, other[:, None], seen)
    x = centre[seen, np.arange(t)] + 0.25 * rng.standard_t(5, (n, t, FEATURES)) @ mix
    # A changed label is older than its change, one of an earlier change is younger.
    low = np.where(kind == "earlier", at, 0)
    high = np.where(kind == "changed", at - 1, t - 1)
    which = np.floor(low + rng.random(n) * (high - low + 1)).astype(int)
    dates = [PERIODS[w].start + timedelta(days=int(rng.integers(0, 60))) for w in which]
    return Region(x=x, y=y, dates=[d.isoformat() for d in dates], kind=kind, at=at)


# --- gap and weight ------------------------------------------------------------------------------


def test_gap_is_zero_inside_and_signed_outside() -> None:
    dates = [
        "2022-01-01",
        "2021-10-22",
        "2023-01-10",
        "2022-08-20",
        "2022-08-31",
        None,
        "2022-09-01",
    ]
    expected = [0, -10, 10, 5, -1, np.nan, 0]
    assert gap_days(dates, PERIODS) == pytest.approx(expected, nan_ok=True)
    assert gap_days(dates, PERIODS[::-1]) == pytest.approx(expected, nan_ok=True)


def test_labels_of_another_decade() -> None:
    """Labels of 1999 on images of 2002 lie years before them."""
    year = [period("dry", "2002-01-01", "2002-04-30")]
    assert gap_days([date(1999, 1, 1)], year)[0] == -1096
    assert time_weights([-1096], [0.0], tau_days=1096)[0] == pytest.approx(np.exp(-1))


def test_bad_dates_periods_and_tau_are_refused() -> None:
    with pytest.raises(LabelError, match="cannot be read"):
        gap_days(["last spring"], PERIODS)
    with pytest.raises(LabelError, match="no period"):
        gap_days(["2022-01-01"], [])
    for tau in (-1.0, float("nan")):
        with pytest.raises(LabelError, match="0 or more"):
            time_weights([0], [0], tau_days=tau)
    with pytest.raises(LabelError, match="0 to 1"):
        time_weights([0], [1.5])


def test_weight_is_one_without_gap_and_change() -> None:
    for tau in (None, 0.0, 1.0, 1e9, np.inf):
        assert time_weights([0.0, np.nan], [0.0, np.nan], tau_days=tau).tolist() == [1, 1]


def test_weight_falls_with_gap_and_change() -> None:
    gap, p = np.linspace(-900, 900, 61), np.linspace(0, 1, 21)
    w = time_weights(*np.meshgrid(gap, p), tau_days=200)
    assert ((w >= 0) & (w <= 1)).all()
    assert (np.diff(w, axis=0) < 0).all(), "more change, less weight"
    assert (np.diff(w[:-1, gap >= 0], axis=1) < 0).all(), "more days, less weight"
    assert w == pytest.approx(w[:, ::-1]), "before and after count alike"
    assert time_weights([200], [0.25], tau_days=200)[0] == pytest.approx(0.75 * np.exp(-1))


def test_limits_of_tau() -> None:
    gap, p = np.array([0.0, 1.0, -4000.0]), np.array([0.2, 0.2, 0.2])
    assert time_weights(gap, p, tau_days=0).tolist() == [0.8, 0, 0]
    assert time_weights(gap, p, tau_days=1e-6).tolist() == [0.8, 0, 0]
    for tau in (None, np.inf, 1e12):
        assert time_weights(gap, p, tau_days=tau) == pytest.approx([0.8] * 3)
    by_tau = [time_weights([90.0], [0.0], tau_days=t)[0] for t in (1, 30, 365, 3650)]
    assert by_tau == sorted(by_tau)


# --- change test ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_injected_changes_are_found(seed: int) -> None:
    r = region(seed=seed)
    found = change_test(r.x, r.y, r.dates, PERIODS).p_change >= 0.5
    known = r.kind == "changed"
    assert known.sum() > 20
    assert found[known].mean() >= 0.8 and known[found].mean() >= 0.7


def test_a_wrong_class_and_an_earlier_change_are_told_apart() -> None:
    r = region(n=1500)
    test = change_test(r.x, r.y, r.dates, PERIODS)
    assert (test.p_wrong[r.kind == "wrong"] > 0.5).mean() > 0.9
    assert (test.p_earlier[r.kind == "earlier"] > 0.5).mean() > 0.8
    assert (test.p_change[r.kind == "earlier"] > 0.5).mean() < 0.1
    sound = r.kind == "sound"
    for p in (test.p_change, test.p_earlier, test.p_wrong):
        assert (p[sound] > 0.5).mean() < 0.01
    total = test.p_change + test.p_earlier + test.p_wrong
    assert ((total >= 0) & (total <= 1 + 1e-9)).all() and test.tested.all()


def test_a_label_made_after_the_change_is_not_outdated() -> None:
    """The date decides: what departed before the label was made did not change after it."""
    r = region()
    i = int(np.flatnonzero((r.kind == "changed") & (r.at == 3))[0])
    last = [d if k != i else "2022-12-31" for k, d in enumerate(r.dates)]
    assert change_test(r.x, r.y, r.dates, PERIODS).p_change[i] > 0.9
    assert change_test(r.x, r.y, last, PERIODS).p_change[i] < 0.1


def test_without_dates_changes_are_found_all_the_same() -> None:
    r = region()
    p = change_test(r.x, r.y, [None] * len(r.y), PERIODS).p_change
    assert (p[r.kind == "changed"] > 0.5).mean() >= 0.8


def test_a_departure_of_labels_outside_the_images_is_change() -> None:
    """One image, labels of years before: another class in it can only count as a change."""
    r = region()
    old = change_test(r.x[:, 2:3], r.y, ["2019-07-01"] * len(r.y), PERIODS[2:3])
    moved = (r.kind == "wrong") | ((r.kind == "changed") & (r.at <= 2))
    assert (old.p_change[moved] > 0.5).mean() > 0.8 and not old.p_wrong.any()
    assert (old.p_change[r.kind == "sound"] > 0.5).mean() < 0.02
    same_day = change_test(r.x[:, 2:3], r.y, ["2022-07-01"] * len(r.y), PERIODS[2:3])
    assert not same_day.p_change.any() and (same_day.p_wrong[moved] > 0.5).mean() > 0.8


def test_missing_values_change_nothing_but_what_they_hide() -> None:
    r = region()
    rng = np.random.default_rng(0)
    holes = r.x.copy()
    holes[rng.random(holes.shape[:2]) < 0.15] = np.nan  # a period under cloud
    holes[rng.random(len(holes)) < 0.2, :, 4:] = np.nan  # a sensor that is not there
    holes[0] = np.nan
    test = change_test(holes, r.y, r.dates, PERIODS)
    assert not test.tested[0] and test.p_change[0] == 0
    assert np.isfinite(test.p_change).all()
    found, known = test.p_change >= 0.5, r.kind == "changed"
    assert found[known].mean() >= 0.7 and known[found].mean() >= 0.7


def test_a_period_without_a_sensor_or_without_any_image() -> None:
    r = region()
    x = r.x.copy()
    x[:, 1, :2] = np.nan
    x[:, 3] = np.nan
    p = change_test(x, r.y, r.dates, PERIODS).p_change
    early = (r.kind == "changed") & (r.at <= 2)  # the others show in the empty period only
    assert (p[early] >= 0.5).mean() >= 0.8
    assert (r.kind == "changed")[p >= 0.5].mean() >= 0.7


def test_order_and_units_do_not_matter() -> None:
    r = region()
    p = change_test(r.x, r.y, r.dates, PERIODS).p_change
    rng = np.random.default_rng(1)
    rows, steps, bands = rng.permutation(len(p)), [2, 0, 3, 1], [5, 0, 3, 1, 4, 2]
    mixed = r.x[rows][:, steps][:, :, bands] * 100 + 7
    q = change_test(mixed, r.y[rows], [r.dates[i] for i in rows], [PERIODS[s] for s in steps])
    assert q.p_change == pytest.approx(p[rows], abs=1e-4)
    again = change_test(r.x, r.y, r.dates, PERIODS).p_change
    assert again.tobytes() == p.tobytes()


def test_held_out_labels_do_not_shape_the_classes() -> None:
    r = region()
    fit = np.arange(len(r.y)) % 4 != 0
    p = change_test(r.x, r.y, r.dates, PERIODS, fit=fit).p_change
    moved = r.x.copy()
    moved[~fit] += 50
    q = change_test(moved, r.y, r.dates, PERIODS, fit=fit).p_change
    assert q[fit] == pytest.approx(p[fit], abs=1e-9)
    assert (p[r.kind == "changed"] > 0.5).mean() >= 0.8


def test_few_labels_are_not_judged() -> None:
    r = region(n=2)
    test = change_test(r.x, [0, 1], r.dates[:2], PERIODS)
    assert not test.tested.any() and not test.p_change.any()
    with pytest.raises(LabelError, match="series"):
        change_test(r.x[:, :2], r.y, r.dates, PERIODS)


# --- chips ---------------------------------------------------------------------------------------

SIZE, CELL = 96, 8


def chips_of(r: Region) -> tuple[xr.Dataset, gpd.GeoDataFrame]:
    """Two chips of square labels whose pixels scatter around the labels' series."""
    side = SIZE // CELL
    count = 2 * side * side
    rng = np.random.default_rng(9)
    i = np.arange(count).reshape(2, side, side).repeat(CELL, 1).repeat(CELL, 2)
    x = np.moveaxis(r.x[i].astype(np.float32), (3, 4), (1, 2))  # (n, T, F, H, W)
    x = x + rng.normal(0, 0.3, x.shape).astype(np.float32)
    ten = x[:, :, :4].reshape(2, -1, SIZE, SIZE)
    twenty = x[:, :, 4:, ::2, ::2].reshape(2, -1, SIZE // 2, SIZE // 2)
    ten[:, :, 0, 0] = np.nan
    names = [p.name for p in PERIODS]
    coords = {
        "row": ("n", [0, 0]), "col": ("n", [0, SIZE]),
        "channel_s2_10": [f"{n}/B0{b}" for n in names for b in range(4)],
        "channel_s2_20": [f"{n}/B1{b}" for n in names for b in range(2)],
        "channel_dem_10": ["elevation"],
    }  # fmt: skip
    value = r.y[i].astype(np.uint8)
    value[:, :3] = 255  # a cloud took these away
    data = {
        "x_s2_10": (("n", "channel_s2_10", "y_10", "x_10"), ten),
        "x_s2_20": (("n", "channel_s2_20", "y_20", "x_20"), twenty),
        "x_dem_10": (("n", "channel_dem_10", "y_10", "x_10"), np.zeros((2, 1, SIZE, SIZE))),
        "y_cover": (("n", "y_10", "x_10"), value),
        "y_height": (("n", "y_10", "x_10"), r.y[i].astype(np.float32)),
    }
    attrs = {
        "crs": "EPSG:32633", "transform": [10, 0, 400_000, 0, -10, 5_800_000], "size_px": SIZE,
        "tasks": [{"name": "cover", "kind": "segmentation"},
                  {"name": "height", "kind": "regression"}],
    }  # fmt: skip
    step = 10 * CELL
    at = np.arange(count)
    chip, row, col = at // side**2, at // side % side, at % side
    left, top = 400_000 + chip * SIZE * 10 + col * step, 5_800_000 - row * step
    frame = gpd.GeoDataFrame(
        {"label_id": at, "value": r.y[:count].astype(float), "date": r.dates[:count],
         "fold": at % 4},
        geometry=[box(x0, y1 - step, x0 + step, y1) for x0, y1 in zip(left, top, strict=True)],
        crs="EPSG:32633",
    )  # fmt: skip
    both = [frame.assign(task="cover"), frame.assign(task="height")]
    return xr.Dataset(data, coords, attrs), gpd.GeoDataFrame(
        np.concatenate([b.to_numpy() for b in both]), columns=both[0].columns
    ).set_geometry("geometry", crs="EPSG:32633").astype({"value": float, "fold": int})


@pytest.fixture(scope="module")
def made() -> tuple[Region, xr.Dataset, gpd.GeoDataFrame]:
    r = region(n=2 * (SIZE // CELL) ** 2)
    return r, *chips_of(r)


def test_series_are_the_medians_of_the_labels(
    made: tuple[Region, xr.Dataset, gpd.GeoDataFrame],
) -> None:
    r, chips, _ = made
    side = SIZE // CELL
    label = np.arange(len(r.y), dtype=np.int32).reshape(2, side, side)
    label = label.repeat(CELL, 1).repeat(CELL, 2)
    x = label_series(chips, label, len(r.y) + 1, PERIODS)
    assert x.shape == (len(r.y) + 1, 4, 6) and np.isnan(x[-1]).all()
    cell = chips["x_s2_10"].values[1, 6, CELL : 2 * CELL, :CELL]
    assert x[side * side + side, 1, 2] == pytest.approx(np.median(cell))
    first = chips["x_s2_10"].values[0, 0, :CELL, :CELL]
    assert x[0, 0, 0] == pytest.approx(np.nanmedian(first))
    with pytest.raises(LabelError, match="no channel"):
        label_series(chips, label, len(r.y), [period("wet", "2022-01-01", "2022-12-31")])


def test_dates_of_a_period_are_averaged() -> None:
    days = [f"{d}/VV" for d in ("2022-01-03", "2022-01-15", "2022-07-01", "2023-07-01")]
    x = np.array([1.0, 3.0, 5.0, 9.0], dtype=np.float32)[None, :, None, None]
    series = xr.Dataset(
        {"x_s1_10": (("n", "channel_s1_10", "y_10", "x_10"), np.tile(x, (1, 1, 4, 4)))},
        {"channel_s1_10": days},
    )
    found = label_series(series, np.zeros((1, 4, 4), dtype=np.int32), 1, PERIODS)
    assert found[0, :, 0] == pytest.approx([2, np.nan, 5, np.nan], nan_ok=True)


def test_chips_get_a_weight_layer(made: tuple[Region, xr.Dataset, gpd.GeoDataFrame]) -> None:
    r, chips, labels = made
    out, report = weigh_chips(
        chips, labels, "cover", periods=PERIODS, tau_days=365, drop_changed=0.8
    )
    w, y, before = out["w_cover"], out["y_cover"].values, chips["y_cover"].values
    assert w.dims == ("n", "y_10", "x_10") and w.dtype == np.float32
    assert (w.values[before == 255] == 0).all() and ((w >= 0) & (w <= 1)).all()
    gone = (y == 255) & (before != 255)
    assert (w.values[gone] == 0).all() and gone.sum() == report["dropped_px"]
    assert (y[~gone] == before[~gone]).all() and y.dtype == np.uint8
    p = np.array(report["per_label"]["p_change"])
    found, known = p >= 0.8, r.kind == "changed"
    assert found.sum() == report["dropped"] > 0
    assert found[known].mean() >= 0.8 and known[found].mean() >= 0.7
    again, _ = weigh_chips(chips, labels, "cover", periods=PERIODS, tau_days=365, drop_changed=0.8)
    assert again.identical(out)
    kept, _ = weigh_chips(chips, labels, "cover", periods=PERIODS)
    assert (kept["y_cover"].values == before).all()


def test_other_tasks_are_weighed_by_their_gap(
    made: tuple[Region, xr.Dataset, gpd.GeoDataFrame],
) -> None:
    _, chips, labels = made
    late = labels.assign(date="2023-01-30")
    out, report = weigh_chips(chips, late, "height", periods=PERIODS, tau_days=30)
    assert out["w_height"].values == pytest.approx(np.exp(-1)) and report["changed"] == 0
    assert report["largest_gap_days"] == 30 and report["outside_periods"] == len(labels) // 2
    with pytest.raises(LabelError, match=r"without weight"):
        weigh_chips(chips, late, "height", periods=PERIODS, tau_days=0)
    with pytest.raises(LabelError, match="no task"):
        weigh_chips(chips, labels, "depth", periods=PERIODS)


def test_labels_that_do_not_belong_to_the_chips_are_refused(
    made: tuple[Region, xr.Dataset, gpd.GeoDataFrame],
) -> None:
    _, chips, labels = made
    with pytest.raises(LabelError, match="belong to no label"):
        weigh_chips(chips, labels[labels["label_id"] > 3], "cover", periods=PERIODS)
    with pytest.raises(LabelError, match="no label of this task"):
        weigh_chips(chips, labels[labels["task"] == "height"], "cover", periods=PERIODS)
