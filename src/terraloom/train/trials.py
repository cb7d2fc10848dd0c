"""Trials of settings until a budget is used up, whatever it is that they score.

The search is Optuna's Gaussian process, which suits budgets of tens of trials. Trials stand in a
journal file: a search that was killed goes on, and jobs on several machines that share a disk work
on one search. A trial that is worse than the median after its first fold ends there.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from terraloom.errors import ModelError
from terraloom.log import get_logger

if TYPE_CHECKING:
    import optuna

__all__ = ["Choice", "Range", "Space", "Trial", "Value", "optimise"]

#: Trials at random points before the Gaussian process proposes any (count).
_RANDOM_TRIALS = 8
#: Trials whose median decides whether another one goes on (count).
_MEDIAN_OF = 4
#: Seconds between two looks at the trials of other jobs, and time after which one is given up.
_WAIT_S = 2.0
_GIVEN_UP_S = 3600.0

Value = int | float | str

log = get_logger(__name__)


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def suggest(self, trial: optuna.Trial, name: str) -> Value:
        """The trial's value."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Value, ...]

    def suggest(self, trial: optuna.Trial, name: str) -> Value:
        """The trial's value."""
        return cast("Value", trial.suggest_categorical(name, self.values))


Space = Mapping[str, Range | Choice]


@dataclass(frozen=True)
class Trial:
    """A setting that was tried.

    Attributes:
        number: Number in the search.
        values: What was set.
        score: Mean over the folds that were trained; higher is better.
        folds: Folds that were trained (count).
        ended: It was worse than the median and ended before its last fold.
        seconds: Computing time (seconds).
    """

    number: int
    values: dict[str, Value]
    score: float
    folds: int
    ended: bool
    seconds: float


def optimise(
    score: Callable[[dict[str, Value], int], float],
    space: Space,
    *,
    steps: int = 1,
    trials: int,
    minutes: float,
    seed: int,
    start: Mapping[str, Value] | None = None,
    journal: Path | None = None,
    name: str = "search",
) -> list[Trial]:
    """Try settings until the budget is used up.

    Args:
        score: Score of a setting in a step; their mean over the steps counts, higher is better. It
            is not asked for more once the setting is known to be worse than the median.
        space: What may be set.
        steps: Scores of a setting (count).
        trials: Settings that are tried (count), by all jobs together.
        minutes: Computing time, all jobs together, after which no trial is started (minutes).
        seed: Seed.
        start: Setting that is tried first.
        journal: File of the trials; with it a killed search goes on, and jobs share one.
        name: Name of the search in the journal.

    Returns:
        The finished trials by number, at least one.

    Raises:
        ModelError: Optuna is not installed.
    """
    study = _study(journal, name)
    _bury(study, own=True)
    while True:
        _bury(study)
        done, running = _finished(study), _running(study)
        late = bool(done) and sum(t.seconds for t in done) >= 60 * minutes
        if late or len(done) + len(running) >= trials:
            if not running:
                return done
            time.sleep(_WAIT_S)  # the last trials run in other jobs
            continue
        if start is not None and not done and not running:
            study.enqueue_trial(dict(start), skip_if_exists=False)
        _try(study, score, steps, space, seed)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as err:
        raise ModelError(
            "Optuna is not installed", where="model.search",
            fix="pip install 'terraloom[search]', or leave model.search out",
        ) from err  # fmt: skip
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(journal: Path | None, name: str) -> optuna.Study:
    lib, storage = _optuna(), None
    if journal is not None:
        journal.parent.mkdir(parents=True, exist_ok=True)
        backend = lib.storages.journal.JournalFileBackend(str(journal))
        storage = lib.storages.JournalStorage(backend)
    study = lib.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True,
        pruner=lib.pruners.MedianPruner(_MEDIAN_OF),
    )  # fmt: skip
    return cast("optuna.Study", study)


def _stream(seed: int, done: int, running: int) -> int:
    """Seed of a trial: a search that goes on draws what it would have drawn without a break."""
    return int(np.random.SeedSequence([seed, done, running]).generate_state(1)[0] >> 1)


def _bury(study: optuna.Study, *, own: bool = False) -> None:
    """Count trials as failed whose process is no more.

    On other machines nobody can see that: there a trial that has run for an hour, and five times
    as long as any finished one, is given up.
    """
    longest = max((t.seconds for t in _finished(study)), default=0.0)
    for t in _running(study):
        host, pid = t.user_attrs.get("job", ("", 0))  # none: it was asked for just now
        if host == socket.gethostname():
            dead = own if pid == os.getpid() else not _alive(pid)
        else:
            dead = time.time() - t.datetime_start.timestamp() > max(_GIVEN_UP_S, 5 * longest)
        if dead:
            study.tell(t.number, state=_optuna().trial.TrialState.FAIL)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def _running(study: optuna.Study) -> list[Any]:
    return study.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.RUNNING,))


def _asked(study: optuna.Study, seed: int, space: Space) -> tuple[Any, dict[str, Value]]:
    """A trial and its values, which no other job has or tries.

    Its number is taken first, and the stream counts the trials before it that still run: jobs that
    ask at the same time would otherwise draw the same. At a corner of the space they still may;
    then the values are drawn at random.
    """
    samplers = _optuna().samplers
    trial = _mine(study)
    before = sum(t.number < trial.number for t in _running(study))
    stream = _stream(seed, len(_finished(study)), before)
    # A fresh sampler per trial has no state that would be lost with the process.
    study.sampler = samplers.GPSampler(
        seed=stream, n_startup_trials=_RANDOM_TRIALS, warn_independent_sampling=False
    )
    values = {name: d.suggest(trial, name) for name, d in space.items()}
    if any(t.params == trial.params and t.number != trial.number for t in _tried(study)):
        study.tell(trial, state=_optuna().trial.TrialState.FAIL)
        study.sampler = samplers.RandomSampler(seed=stream)
        trial = _mine(study)
        values = {name: d.suggest(trial, name) for name, d in space.items()}
    return trial, values


def _mine(study: optuna.Study) -> Any:
    """A new trial that says whose it is, so that it can be given up when its job is no more."""
    trial = study.ask()
    trial.set_user_attr("job", [socket.gethostname(), os.getpid()])
    return trial


def _tried(study: optuna.Study) -> list[Any]:
    """Trials that are finished, or that run in some job."""
    states = _optuna().trial.TrialState
    return study.get_trials(deepcopy=False, states=(states.RUNNING, states.COMPLETE, states.PRUNED))


def _try(
    study: optuna.Study,
    score: Callable[[dict[str, Value], int], float],
    steps: int,
    space: Space,
    seed: int,
) -> None:
    trial, values = _asked(study, seed, space)
    start, got, ended = time.perf_counter(), [], False
    for step in range(steps):
        got.append(float(score(values, step)))
        if not math.isfinite(got[-1]):
            study.tell(trial, state=_optuna().trial.TrialState.FAIL)
            raise ModelError(f"score {got[-1]} of {values}", where="model.search",
                             allowed="finite numbers", fix="use more labels")  # fmt: skip
        trial.report(float(np.mean(got)), step)
        if ended := step + 1 < steps and trial.should_prune():
            break
    trial.set_user_attr("scores", got)
    trial.set_user_attr("ended", ended)
    trial.set_user_attr("seconds", time.perf_counter() - start)
    study.tell(trial, _expected(study, got) if ended else float(np.mean(got)))
    log.info("trial %d: %.4f%s", trial.number, np.mean(got), " (ended early)" if ended else "")


def _expected(study: optuna.Study, got: Sequence[float]) -> float:
    """Final score of a trial that ended early, if it went on as the others did on average."""
    others = [t.user_attrs["scores"] for t in _complete(study) if not t.user_attrs["ended"]]
    change = [np.mean(s) - np.mean(s[: len(got)]) for s in others]
    return float(np.mean(got) + (np.mean(change) if change else 0.0))


def _complete(study: optuna.Study) -> list[Any]:
    return study.get_trials(deepcopy=False, states=(_optuna().trial.TrialState.COMPLETE,))


def _finished(study: optuna.Study) -> list[Trial]:
    return [
        Trial(t.number, dict(t.params), float(np.mean(t.user_attrs["scores"])),
              len(t.user_attrs["scores"]), bool(t.user_attrs["ended"]),
              float(t.user_attrs["seconds"]))
        for t in sorted(_complete(study), key=lambda t: t.number)
    ]  # fmt: skip
