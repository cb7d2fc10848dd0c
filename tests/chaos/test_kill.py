"""A run that is killed at any moment, and started again, ends as if nothing had happened.

Between kill and start the time zone changes, and now and then the clock jumps back by a day.

``make test-chaos`` runs the long one. ``TERRALOOM_CHAOS_KILLS`` sets the least number of kills,
``TERRALOOM_CHAOS_SEED`` repeats their moments as far as a machine repeats its speed.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.chaos import (
    SMALL,
    finished_jobs,
    finished_tiles,
    kill_tree,
    leftovers,
    outputs_together,
    products,
    said,
    set_clock_back,
    start,
)  # fmt: skip
from support.road import REHEARSAL, command, jobs, snakemake

KILLS = int(os.environ.get("TERRALOOM_CHAOS_KILLS", "30"))
SEED = int(os.environ.get("TERRALOOM_CHAOS_SEED", "0")) or random.SystemRandom().randrange(10**6)
#: Longest undisturbed stretch of a run that is killed again and again, seconds, at first.
LONGEST_S = float(os.environ.get("TERRALOOM_CHAOS_STRETCH_S", "45"))

#: Time zones of the runs after a kill.
ZONES = ("UTC", "Pacific/Auckland", "America/St_Johns", "Asia/Kathmandu")


def stage(folder: Path) -> str:
    """What the last run was about to do."""
    lines = [x for x in said(folder).splitlines() if x.startswith("Job ")]
    begun = said(folder).rfind("Building DAG of jobs")
    return lines[-1].split(": ", 1)[1] if lines and said(folder).rfind("Job ") > begun else "plan"


@dataclass
class Kill:
    """What was finished when a run was killed, and what it was about to do."""

    doing: str
    jobs: dict[str, float]
    tiles: dict[str, int]


def run_killed(folder: Path, dice: random.Random) -> list[Kill]:
    """Run a campaign to its end, killed at random moments.

    Who finishes nothing between two kills is given more time.
    """
    kills: list[Kill] = []
    stretch, before = LONGEST_S, len(finished_jobs(folder))
    while True:
        process = start(folder, "--cores", "2", zone=dice.choice(ZONES))
        try:
            code = process.wait(dice.uniform(0.5, stretch))
        except subprocess.TimeoutExpired:
            code = None
        if code is not None:
            assert code == 0, said(folder)[-4000:]
            return kills
        kill_tree(process)
        kills.append(Kill(stage(folder), finished_jobs(folder), finished_tiles(folder)))
        print(f"kill {len(kills)}: {kills[-1].doing}", flush=True)
        now = len(kills[-1].jobs)
        stretch, before = (LONGEST_S if now > before else 1.5 * stretch), now
        if len(kills) % 7 == 3:
            set_clock_back(folder)
        if len(kills) % 5 == 1:
            snakemake(folder, "--unlock", campaign=REHEARSAL, keys=SMALL)
        else:  # the same at once: Snakemake draws its plan first
            shutil.rmtree(folder / ".snakemake/locks", ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody kills."""
    kept = os.environ.get("TERRALOOM_CHAOS_REFERENCE")
    if kept:
        return Path(kept)
    folder = tmp_path_factory.mktemp("chaos") / "undisturbed"
    begun = time.monotonic()
    process = start(folder, "--cores", "2")
    assert process.wait() == 0, said(folder)[-4000:]
    print(f"undisturbed: {time.monotonic() - begun:.0f} s")
    return folder


@pytest.mark.chaos
def test_a_run_killed_at_random_moments_ends_like_an_undisturbed_one(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\nseed {SEED}, at least {KILLS} kills")
        dice = random.Random(SEED)
        wanted, moments, runs = products(undisturbed), Counter[str](), 0
        while moments.total() < KILLS:
            folder = tmp_path / f"run-{runs}"
            begun = time.monotonic()
            kills = run_killed(folder, dice)
            runs += 1
            moments.update(kill.doing for kill in kills)
            check(folder, wanted, kills)
            print(f"run {runs}: {len(kills)} kills, {time.monotonic() - begun:.0f} s", flush=True)
            shutil.rmtree(folder)
        print(f"{moments.total()} kills in {runs} runs; what they interrupted:")
        for what, count in moments.most_common():
            print(f"  {count:3d} {what}")


def check(folder: Path, wanted: dict[str, str], kills: list[Kill]) -> None:
    """A run that was killed is as one that was not."""
    now = products(folder)
    differ = sorted(n for n in wanted.keys() | now.keys() if wanted.get(n) != now.get(n))
    assert not differ, f"{differ} differ from the undisturbed run"
    assert leftovers(folder) == []
    ended, tiles, together = finished_jobs(folder), finished_tiles(folder), outputs_together(folder)
    for kill in kills:
        again = [
            output for output, when in kill.jobs.items()
            if ended.get(output) != when and together[output] <= kill.jobs.keys()
        ]  # fmt: skip
        assert not again, f"finished jobs were done again: {again}"
        again = [o for o, what in kill.tiles.items() if tiles.get(o) != what]
        assert not again, f"finished tiles were made again: {again}"
    plan = snakemake(folder, "-n", campaign=REHEARSAL, keys=SMALL)
    assert "Nothing to be done" in plan and jobs(plan) == {}
    saved = command("terraloom", "state", "save", cwd=folder).stdout
    assert all(
        f"results/{m}/provenance.jsonl" in saved for m in ("scenes", "chips", "model", "map")
    )
    assert "done after" in command("terraloom", "status", cwd=folder).stdout
