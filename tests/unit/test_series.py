"""Training on pixel series: learns what is there, sees no held-out fold, gives equal bytes."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from support.parquet import read_parquet
from terraloom.errors import FoldError, LabelError, ModelError
from terraloom.train.fit import HeldOut
from terraloom.train.score_series import forest_series, score_series, scores_of
from terraloom.train.series import (
    SeriesAugmentation,
    SeriesSettings,
    _augment,
    _rate,
    cross_validate,
    fit_series,
)
from terraloom.train.series_table import SeriesTable, read_series, season_of

DATA = Path(os.environ.get("TERRALOOM_TEST_DATA", Path(__file__).parents[3] / "shared/data"))
SMALL = {"width": 16, "heads": 4, "layers": 1, "harmonics": 3}
QUICK = SeriesSettings("ltae", SMALL, epochs=12, batch=32, learning_rate=1e-2)


def crops(n: int = 240, *, folds: int = 4, seed: int = 0) -> SeriesTable:
    """Classes that differ in the day of their peak only: no single date tells them apart."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    days = np.sort(rng.uniform(1, 365, (n, 16)), axis=1).astype(np.float32)
    peak = np.array([90.0, 180.0, 270.0])[y] + rng.normal(0, 12, n)
    green = np.exp(-0.5 * ((days - peak[:, None]) / 35) ** 2)
    x = np.stack([0.2 + 0.6 * green, 0.3 - 0.2 * green], -1)
    x = (x + rng.normal(0, 0.05, x.shape)).astype(np.float32)
    x[rng.random(days.shape) < 0.2] = np.nan
    days[:, 14:], x[:, 14:] = np.nan, np.nan
    return SeriesTable(x, days, y, rng.integers(0, folds, n), ("ndvi", "red"), ("a", "b", "c"))


@pytest.mark.parametrize("encoder", ["ltae", "tempcnn", "gru"])
def test_it_learns_the_season(encoder: str) -> None:
    table = crops(folds=2)
    held = cross_validate(table, replace(QUICK, encoder=encoder), seeds=[0])
    scores = scores_of(held)
    assert held.p.shape == (1, 240, 3) and np.allclose(held.p.sum(-1), 1, atol=1e-5)
    assert (held.index == np.arange(240)).all() and (held.y == table.y).all()
    assert scores.joint_accuracy > 0.9 and scores.joint_f1 > 0.9


def test_values_without_their_days_do_not_do() -> None:
    table = crops(folds=2)
    days = table.days.copy()
    np.random.default_rng(1).shuffle(days[:, :14].T)
    lost = cross_validate(replace(table, days=days), QUICK, seeds=[0])
    assert scores_of(lost).joint_accuracy < 0.75


def test_equal_seeds_give_equal_bytes_and_the_stream_is_left_alone() -> None:
    table = crops(80)
    settings = replace(QUICK, epochs=2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one = fit_series(table, settings, held_out_fold=0, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    two = fit_series(table, settings, held_out_fold=0, seed=1)
    assert all(torch.equal(v, two.state_dict[k]) for k, v in one.state_dict.items())
    assert one.history == two.history and one.epoch == 2
    other = fit_series(table, settings, held_out_fold=0, seed=2)
    assert any(not torch.equal(v, other.state_dict[k]) for k, v in one.state_dict.items())
    card = json.loads(json.dumps(one.card()))
    assert card["spec"]["encoder"] == "ltae" and card["settings"]["epochs"] == 2


def test_the_held_out_fold_has_no_influence() -> None:
    table = crops(80)
    settings = replace(QUICK, epochs=2, patience=5)
    one = fit_series(table, settings, held_out_fold=1, seed=1, stop_fold=2)
    x, y = table.x.copy(), table.y.copy()
    x[table.fold == 1], y[table.fold == 1] = 7.0, 0
    x[table.fold == 1] = np.where(np.isnan(table.x[table.fold == 1]), np.nan, 7.0)
    two = fit_series(replace(table, x=x, y=y), settings, held_out_fold=1, seed=1, stop_fold=2)
    assert all(torch.equal(v, two.state_dict[k]) for k, v in one.state_dict.items())
    assert one.history == two.history and one.normalisation == two.normalisation


def test_normalisation_is_that_of_valid_training_values() -> None:
    table = crops(80)
    fit = fit_series(table, replace(QUICK, epochs=1), held_out_fold=3, seed=0)
    flat = table.x[table.fold != 3].reshape(-1, 2)
    assert fit.normalisation.mean == pytest.approx(np.nanmean(flat, axis=0), rel=1e-5)
    assert fit.normalisation.std == pytest.approx(np.nanstd(flat, axis=0), rel=1e-5)


def test_early_stopping_keeps_the_best_epoch_of_its_own_fold() -> None:
    table = crops(160)
    # Labels of chance: the loss on other series soon rises.
    table = replace(table, y=np.random.default_rng(3).integers(0, 3, 160))
    settings = replace(QUICK, epochs=60, patience=4, augmentation=SeriesAugmentation(0, 0, 0, 0, 0))
    fit = fit_series(table, settings, held_out_fold=0, seed=0, stop_fold=1)
    losses = fit.history["stop_loss"]
    assert len(losses) < 60 and fit.epoch == int(np.argmin(losses)) + 1
    assert len(losses) == fit.epoch + 4 and fit.stop_fold == 1
    own = table.rows(table.fold == 1)
    p = fit.network().predict(torch.from_numpy(own.x), torch.from_numpy(own.days))["class"].numpy()
    true = p[np.arange(len(own.y)), own.y]
    counts = np.bincount(table.y[table.fold > 1], minlength=3)
    w = (counts**-0.5)[own.y]
    assert -(w * np.log(true)).sum() / w.sum() == pytest.approx(min(losses), rel=1e-4)


def test_every_seed_stops_on_another_fold() -> None:
    table = crops(120, folds=4)
    settings = replace(QUICK, epochs=1, patience=1)
    held = cross_validate(table, settings, seeds=[0, 1])
    for m, stop in ((0, 1), (1, 2)):
        fit = fit_series(table, settings, held_out_fold=0, seed=m, stop_fold=stop)
        own = table.rows(table.fold == 0)
        p = fit.network().predict(torch.from_numpy(own.x), torch.from_numpy(own.days))["class"]
        assert np.allclose(p.numpy(), held.p[m][table.fold == 0], atol=1e-6)


def test_augmentation() -> None:
    table = crops(60)
    x, days = torch.from_numpy(table.x), torch.from_numpy(table.days)
    g = torch.Generator().manual_seed(0)
    std = torch.tensor([0.2, 0.1])
    none = SeriesAugmentation(0, 0, 0, 0, 0)
    bx, bt = _augment(x, days, std, none, g)
    assert torch.equal(bx.nan_to_num(-1), x.nan_to_num(-1))
    assert torch.equal(bt.nan_to_num(-1), days.nan_to_num(-1))
    hard = SeriesAugmentation(0.99, 0.9, 8.0, 0, 0)
    lone = x.clone()
    lone[:, 1:] = math.nan  # one date only: it must survive
    lone[:, 0] = torch.tensor([0.5, math.nan])  # and its only band
    for values in (x, lone):
        before = torch.isfinite(values)
        for _ in range(20):
            bx, bt = _augment(values, days, std, hard, g)
            after = torch.isfinite(bx)
            seen = before.flatten(1).any(1)
            assert (after.flatten(1).any(1) == seen).all() and not (after & ~before).any()
            shift = (bt - days)[:, :14]
            assert (shift - shift[:, :1]).abs().max() < 1e-3 and shift.abs().max() <= 8.001
    bx, _ = _augment(x, days, std, SeriesAugmentation(0, 0, 0, 0.5, 0), g)
    spread = (bx - x)[torch.isfinite(x).all(-1)].std(0)
    assert torch.allclose(spread, 0.5 * std, rtol=0.15)
    bx, _ = _augment(x, days, std, SeriesAugmentation(0.5, 0, 0, 0, 0), g)
    share = 1 - float(torch.isfinite(bx).sum() / torch.isfinite(x).sum())
    assert 0.18 < share < 0.32  # half of .5 on average


def test_schedule() -> None:
    at = [_rate(s, 0.1) for s in np.linspace(0, 1, 101)]
    assert at[10] == pytest.approx(1) and at[100] == pytest.approx(0, abs=1e-9)
    assert at[55] == pytest.approx(0.5) and at[5] == pytest.approx(0.5) and at[0] > 0
    assert at[10:] == sorted(at[10:], reverse=True)


def test_scores() -> None:
    """By hand: class c is in one fold only, so no fit can know it there."""
    y = np.array([0, 0, 1, 1, 2])
    fold = np.array([0, 1, 0, 1, 1], dtype=np.uint8)
    one = np.eye(3)[[0, 0, 1, 1, 0]]
    two = np.eye(3)[[0, 0, 1, 0, 0]] * 0.6 + 0.4 / 3
    scores = scores_of(HeldOut(np.arange(5), fold, y, np.stack([one, two]).astype(np.float32)))
    assert scores.accuracy == (0.8, 0.6) and scores.reachable == 0.8
    assert scores.f1[0] == pytest.approx((0.8 + 1 + 0) / 3)
    assert scores.joint_accuracy == 0.8 and scores.samples == 5
    assert "reachable OA 0.800" in scores.line() and scores.record()["samples"] == 5
    with pytest.raises(FoldError, match="no held-out"):
        scores_of(HeldOut(np.arange(0), fold[:0], y[:0], np.zeros((1, 0, 3), np.float32)))


def test_tables_that_cannot_be_trained_on() -> None:
    table = crops(40)
    bad = table.x.copy()
    bad[7, 3, 0] = np.inf
    with pytest.raises(ModelError, match="row 7"):
        replace(table, x=bad)
    days = table.days.copy()
    days[9, :2] = np.nan
    with pytest.raises(ModelError, match="without a day"):
        replace(table, days=days)
    with pytest.raises(ModelError, match="0 to 2"):
        replace(table, y=table.y + 1)
    with pytest.raises(ModelError, match="0 to 254"):
        replace(table, fold=table.fold - 1)
    with pytest.raises(ModelError, match="fold of shape"):
        replace(table, fold=table.fold[:5])
    with pytest.raises(ModelError, match=r"\(N, T, 3\)"):
        replace(table, bands=("a", "b", "c"))
    with pytest.raises(ModelError, match="patience"):
        SeriesSettings(patience=-1)
    with pytest.raises(ModelError, match="dropout"):
        SeriesSettings(augmentation=SeriesAugmentation(date_dropout=1.0))


def test_folds_that_cannot_be_held_out() -> None:
    table = crops(40)
    with pytest.raises(FoldError, match="two classes or more"):
        fit_series(replace(table, y=np.zeros(40, int)), QUICK, held_out_fold=0, seed=0)
    with pytest.raises(FoldError, match=r"0 series of 0 class \(none\)"):
        fit_series(replace(table, fold=np.zeros(40, int)), QUICK, held_out_fold=0, seed=0)
    stop = replace(QUICK, patience=2)
    for fold in (None, 0, 99):
        with pytest.raises(FoldError, match="early stopping"):
            fit_series(table, stop, held_out_fold=0, seed=0, stop_fold=fold)
    with pytest.raises(FoldError, match="3 folds or more"):
        cross_validate(replace(table, fold=np.arange(40) % 2), stop, seeds=[0])
    with pytest.raises(FoldError, match="one seed or more"):
        cross_validate(table, QUICK, seeds=[])


def test_a_diverging_fit_stops() -> None:
    table = crops(40)
    big = np.where(np.isnan(table.x), np.nan, table.x * 1e30).astype(np.float32)
    settings = replace(QUICK, learning_rate=1e30, epochs=5)
    with pytest.raises(ModelError, match="diverged in epoch"):
        fit_series(replace(table, x=big), settings, held_out_fold=0, seed=0)


def written(path: Path, table: SeriesTable, **columns: object) -> pd.DataFrame:
    """A table as a CSV of which the rows have been shuffled; fold f becomes longitude f."""
    rows = []
    for i in range(len(table.y)):
        for t in np.flatnonzero(np.isfinite(table.days[i])):
            day = pd.Timestamp("2021-01-01") + pd.Timedelta(days=int(table.days[i, t]) - 1)
            rows.append({
                "sample": f"s{i:03}", "x": table.fold[i] + 0.5, "y": 50.5, "date": str(day.date()),
                "class": table.classes[table.y[i]],
                **dict(zip(table.bands, table.x[i, t].tolist(), strict=True)), **columns,
            })  # fmt: skip
    frame = pd.DataFrame(rows).drop_duplicates(["sample", "date"])
    frame.sample(frac=1, random_state=0).to_csv(path, index=False)
    return frame


def test_a_table_is_read_back_whole(tmp_path: Path) -> None:
    table = crops(30, folds=3)
    table = replace(table, days=np.floor(table.days), x=np.round(table.x, 4))
    path = tmp_path / "series.csv"
    frame = written(path, table, note="text")
    found = read_series(path, folds=3)
    assert found.bands == ("ndvi", "red") and found.classes == ("a", "b", "c")
    assert (found.y == table.y).all()
    # Folds are dealt anew; what shared a block shares a fold.
    assert len({(a, b) for a, b in zip(found.fold, table.fold, strict=True)}) == 3
    for i, (_, rows) in enumerate(frame.groupby("sample")):
        rows = rows.sort_values("date")
        n = len(rows)
        assert found.x[i, :n] == pytest.approx(rows[["ndvi", "red"]].to_numpy(), nan_ok=True)
        assert found.days[i, :n].tolist() == pd.to_datetime(rows["date"]).dt.day_of_year.tolist()
        assert np.isnan(found.days[i, n:]).all() and np.isnan(found.x[i, n:]).all()
    assert read_series(path, folds=3, bands=["red"]).bands == ("red",)
    frame.assign(parcel=frame["sample"].str[-1], x=np.nan).to_csv(path, index=False)
    grouped = read_series(path, group="parcel", folds=5)
    for digit in range(10):
        assert len(set(grouped.fold[digit::10].tolist())) == 1


def test_the_season_is_read_off_the_dates() -> None:
    table = crops(3)
    for first, span, start, years in ((257, 350, 257, 1), (10, 340, 10, 1), (257, 700, 257, 2)):
        days = np.linspace(first, first + span, 16, dtype=np.float32)
        found = season_of(replace(table, days=np.stack([days, days + 5, days + 2])))
        assert found["start_day"] == pytest.approx(start, abs=0.1)
        assert found["period_days"] == 365.25 * years
    # First dates on both sides of the New Year.
    days = np.stack([np.linspace(d, d + 300, 16, dtype=np.float32) for d in (360, 2, 8)])
    assert season_of(replace(table, days=days))["start_day"] == pytest.approx(360, abs=0.3)


def test_score_series(tmp_path: Path) -> None:
    path, out = tmp_path / "series.csv", tmp_path / "scores.json"
    written(path, crops(150, folds=3))
    record = score_series(path, out, folds=3, seeds=(0, 1), epochs=25)
    assert json.loads(out.read_text()) == json.loads(json.dumps(record))
    assert set(record["scores"]) == {"network", "forest", "forest_on_random_folds"}
    assert len(record["lines"]) == 3 and record["scores"]["network"]["samples"] == 150
    assert record["scores"]["network"]["joint_accuracy"] > 0.8
    assert record["scores"]["forest"]["joint_accuracy"] > 0.85
    assert sum(record["table"]["classes"].values()) == 150
    assert str(tmp_path) not in out.read_text()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: f.drop(columns="date"), "no column date"),
        (lambda f: f.assign(date="soon"), "ISO 8601"),
        (lambda f: pd.concat([f, f[:1]]), "dates twice"),
        (lambda f: f.assign(x=np.arange(len(f))), "x changes within"),
        (lambda f: f[["sample", "date", "class", "x", "y"]], "no band"),
        (lambda f: f.assign(**{"class": np.where(f.index < 3, None, "a")}), "3 rows of"),
        (lambda f: f[:0], "0 rows of 0"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, change: object, text: str) -> None:
    path = tmp_path / "series.csv"
    change(written(path, crops(9, folds=3))).to_csv(path, index=False)  # type: ignore[operator]
    with pytest.raises(LabelError, match=text):
        read_series(path, folds=2)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="no such file"):
        read_series(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(LabelError, match="no table"):
        read_series(tmp_path / "empty.csv")
    written(tmp_path / "t.csv", crops(9, folds=3))
    with pytest.raises(LabelError, match="named green"):
        read_series(tmp_path / "t.csv", bands=["green"])


def test_the_forest_gets_interpolated_series() -> None:
    """Irregular dates: the forest learns the season although no two series share a date."""
    table = crops(folds=2)
    held = forest_series(table, seeds=[0])
    assert scores_of(held).joint_accuracy > 0.85
    assert np.allclose(held.p.sum(-1), 1, atol=1e-5)


@pytest.mark.slow
def test_real_series_in_blocks_of_a_degree() -> None:
    """MODIS series of three classes that every fold can know; all Forest lies in one block."""
    from terraloom.labels.knndm import group_folds
    from terraloom.labels.leakage import degree_blocks

    path = DATA / "sits/data/samples_modis_4bands.parquet"
    if not path.is_file():
        pytest.skip("needs the data folder (TERRALOOM_TEST_DATA)")
    rows = read_parquet(path).sort_values(["sample", "date"], kind="stable")
    forest = rows[rows["label"] == "Forest"].groupby("sample").first()
    assert len(set(degree_blocks(forest["longitude"], forest["latitude"]).tolist())) == 1
    rows = rows[rows["label"] != "Forest"]
    first = rows.groupby("sample").first()
    bands = ("NDVI", "EVI", "NIR", "MIR")
    x = rows[list(bands)].to_numpy(np.float32).reshape(len(first), 23, 4)
    days = rows["date"].dt.day_of_year.to_numpy(np.float32).reshape(len(first), 23)
    names, y = np.unique(first["label"].astype(str), return_inverse=True)
    block = degree_blocks(first["longitude"], first["latitude"])
    fold = group_folds(block, count=3, rng=np.random.default_rng(0))
    table = SeriesTable(x, days, y, fold, bands, tuple(names))
    settings = SeriesSettings("ltae", {"start_day": 257.0, "width": 32}, epochs=12)
    assert scores_of(cross_validate(table, settings, seeds=[0])).joint_accuracy > 0.95
