"""Search for settings: known minimum, same seed, killed and resumed, no look at held-out labels."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from terraloom.errors import FoldError, ModelError
from terraloom.models.heads import TaskSpec
from terraloom.train.fit import FitSettings
from terraloom.train.search import search, space_of
from terraloom.train.trials import Choice, Range, optimise

pytest.importorskip("optuna", reason="the extra `search` is not installed")

COVER = TaskSpec("cover", "segmentation", ("water", "crop", "forest"))
TASKS = (COVER,)
FAST = FitSettings(width=4, depth=2, epochs=1, batch=4, crop_px=24, device="cpu")
PLANE = {"x": Range(-5, 10), "y": Range(0, 15)}


pytestmark = pytest.mark.usefixtures("one_thread")


def branin(values: dict[str, float], step: int = 0) -> float:
    """Branin and Hoo 1972: three minima of 0.397887; with the sign of a score."""
    x, y = values["x"], values["y"]
    first = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return -(first**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10)


def make_chips(n: int = 6, size: int = 24, seed: int = 0) -> xr.Dataset:
    """Two halves of a class each per chip, four folds in quarters."""
    rng = np.random.default_rng(seed)
    cover = np.kron(rng.integers(0, 3, (n, 2, 2)), np.ones((size // 2, size // 2), int))
    x = rng.uniform(0.05, 0.4, (3, 4))[cover].transpose(0, 3, 1, 2)
    x = (x + rng.normal(0, 0.05, x.shape)).astype(np.float32)
    folds = rng.permuted(np.arange(n * 4) % 4).reshape(n, 2, 2)
    dims = ("n", "y_10", "x_10")
    return xr.Dataset(
        {
            "x_s2_10": (("n", "channel_s2_10", "y_10", "x_10"), x),
            "y_cover": (dims, cover.astype(np.uint8)),
            "w_cover": (dims, np.ones(cover.shape, np.float32)),
            "fold": (dims, np.kron(folds, np.ones((size // 2, size // 2))).astype(np.uint8)),
        },
        coords={"channel_s2_10": [f"p1/{b}" for b in ("B02", "B03", "B04", "B08")]},
    )


@pytest.mark.parametrize("seed", range(3))
def test_finds_the_minimum_of_branin(seed: int) -> None:
    trials = optimise(branin, PLANE, trials=40, minutes=9, seed=seed)
    assert len(trials) == 40
    assert -max(t.score for t in trials) == pytest.approx(0.397887, abs=0.01)


def test_same_seed_same_trials_and_another_seed_others() -> None:
    runs = [optimise(branin, PLANE, trials=11, minutes=9, seed=s) for s in (1, 1, 2)]
    values = [[t.values for t in r] for r in runs]
    assert values[0] == values[1] != values[2]


class Killed(BaseException):
    """Like the end of a process: nothing may catch it."""


def test_killed_search_goes_on_to_the_same_trials(tmp_path: Path) -> None:
    calls = []

    def dies(values: dict[str, float], step: int) -> float:
        calls.append(values)
        if len(calls) in (1, 4, 10):
            raise Killed
        return branin(values, step)

    start = {"x": 1.0, "y": 2.0}
    want = optimise(branin, PLANE, trials=12, minutes=9, seed=3, start=start)
    for _ in range(3):
        with pytest.raises(Killed):
            optimise(dies, PLANE, trials=12, minutes=9, seed=3, start=start,
                     journal=tmp_path / "j" / "journal.log")  # fmt: skip
    journal = tmp_path / "j" / "journal.log"
    got = optimise(dies, PLANE, trials=12, minutes=9, seed=3, start=start, journal=journal)
    assert [t.values for t in got] == [t.values for t in want] and want[0].values == start
    n = len(calls)
    again = optimise(dies, PLANE, trials=12, minutes=9, seed=3, start=start, journal=journal)
    assert again == got and len(calls) == n, "a finished search is read, not run"
    other = optimise(branin, PLANE, trials=2, minutes=9, seed=3, journal=journal, name="other")
    assert len(other) == 2, "a search from something else starts anew"


def _job(journal: str, seed: int) -> None:
    optimise(branin, PLANE, trials=14, minutes=9, seed=seed, journal=Path(journal))


@pytest.mark.skipif(sys.platform == "win32", reason="jobs are forked")
@pytest.mark.slow
def test_two_jobs_share_one_search(tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=_job, args=(str(journal), 0)) for _ in range(2)]
    for j in jobs:
        j.start()
    for j in jobs:
        j.join(120)
        assert j.exitcode == 0
    trials = optimise(branin, PLANE, trials=14, minutes=9, seed=0, journal=journal)
    assert 14 <= len(trials) <= 15
    assert len({tuple(t.values.values()) for t in trials}) == len(trials), "none was done twice"


def test_budget_of_minutes_ends_the_search() -> None:
    assert len(optimise(branin, PLANE, trials=50, minutes=1e-9, seed=0)) == 1


def test_bad_settings_end_after_their_first_fold_and_keep_their_place() -> None:
    steps: list[tuple[float, int]] = []

    def score(values: dict[str, float], step: int) -> float:
        steps.append((values["x"], step))
        return values["x"] + 10 * step  # the second fold is easier

    trials = optimise(score, {"x": Range(0, 1)}, steps=2, trials=20, minutes=9, seed=0)
    ended = [t for t in trials if t.ended]
    assert ended and all(t.folds == 1 for t in ended)
    assert sum(s for _, s in steps) == 20 - len(ended), "the second fold was not trained"
    best = max((t for t in trials if not t.ended), key=lambda t: t.score)
    assert best.folds == 2 and best.values["x"] == max(t.values["x"] for t in trials)
    assert best.values["x"] > 0.98


def test_a_score_that_is_no_number_stops() -> None:
    with pytest.raises(ModelError, match="nan"):
        optimise(lambda v, s: math.nan, PLANE, trials=3, minutes=9, seed=0)


def test_search_of_a_network_is_never_worse_than_what_was_given(tmp_path: Path) -> None:
    kw = {"held_out_fold": 1, "trials": 4, "minutes": 9, "seed": 5, "folder": tmp_path}
    found = search(make_chips(), TASKS, FAST, origin="abc", **kw)  # type: ignore[arg-type]
    assert found.validation_folds == (2,) and len(found.trials) == 4
    assert found.first.values["width"] == 4 and found.best.score >= found.first.score
    assert found.settings == replace(FAST, **found.best.values)  # type: ignore[arg-type]
    card = json.loads((tmp_path / "best.json").read_text())
    assert card["chosen"] == found.best.values and len(card["trials"]) == 4
    assert (tmp_path / "journal.log").is_file()


def test_the_held_out_fold_has_no_influence() -> None:
    chips = make_chips()
    held = chips["fold"].values == 1
    changed = chips.copy(deep=True)
    changed["y_cover"].values[held] = 0
    changed["w_cover"].values[held] = 7.0
    changed["x_s2_10"].values[np.broadcast_to(held[:, None], changed["x_s2_10"].shape)] *= 1.0
    kw = {"held_out_fold": 1, "trials": 3, "minutes": 9, "seed": 5, "folds": 2}

    def values(data: xr.Dataset, fold: int = 1) -> list[tuple[object, float]]:
        trials = search(data, TASKS, FAST, **{**kw, "held_out_fold": fold}).trials  # type: ignore[arg-type]
        return [(t.values, t.score) for t in trials]

    assert values(changed) == values(chips)
    assert values(changed, 0) != values(chips, 0), "for another fold these labels count"


def test_space_holds_what_was_given_and_what_fits() -> None:
    chips, two = make_chips(), (COVER, TaskSpec("edge", "boundary"))
    for base in (FitSettings(), FAST, FitSettings(width=40, epochs=0.7, learning_rate=0.9)):
        for name, d in space_of(base, two, chips).items():
            value = getattr(base, name)
            inside = value in d.values if isinstance(d, Choice) else d.low <= value <= d.high
            assert inside, (name, value, d)
    assert space_of(FitSettings(depth=3), TASKS, chips)["depth"] == Choice((2, 3, 4))
    chips60 = chips.rename(x_s2_10="x_s2_60", channel_s2_10="channel_s2_60")
    assert "depth" in space_of(FitSettings(depth=3), TASKS, chips60)
    assert not {"width", "depth"} & set(space_of(FitSettings(widths=(4, 8, 8, 8)), TASKS, chips))


def test_too_few_folds_are_refused() -> None:
    chips = make_chips()
    chips["fold"].values[:] %= 2
    with pytest.raises(FoldError, match="folds with labels"):
        search(chips, TASKS, FAST, held_out_fold=0, trials=2, minutes=1, seed=0)


def test_without_optuna_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModelError, match=r"terraloom\[search\]"):
        optimise(branin, PLANE, trials=1, minutes=1, seed=0)
