"""What a map is good for, and what it is not: plain sentences drawn from its own numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from terraloom.config.campaign import Campaign
from terraloom.report import facts, formats

__all__ = ["GOOD", "POOR", "Advice", "advise"]

#: A class serves where at least this share is right and found; below ``POOR`` it does not.
GOOD, POOR = 0.8, 0.6

#: Least share of the region that should have a class, or be like the training data.
_ENOUGH = 0.98

#: Mean gap between confidence and accuracy that can still be believed.
_BELIEVED = 0.05


@dataclass
class Advice:
    """Sentences by how far the map can be trusted with a use.

    Attributes:
        good: Uses that the numbers support.
        care: Uses that need the stated care.
        no: Uses that the numbers do not support.
        basis: Where the shares of right and found pixels come from.
    """

    basis: str
    good: list[str] = field(default_factory=list)
    care: list[str] = field(default_factory=list)
    no: list[str] = field(default_factory=list)


def advise(
    campaign: Campaign, areas: facts.Areas, skill: facts.Skill, record: Mapping[str, Any],
    resolution_m: float,
) -> Advice:  # fmt: skip
    """Sentences for this map.

    The lower end of an interval counts where there is one: what is not shown to be good is not
    called good.

    Args:
        campaign: The campaign.
        areas: Areas and, with a probability sample, the accuracies of the map.
        skill: Skill on held-out blocks, used where there is no sample.
        record: Content of ``map.json``.
        resolution_m: Pixel size, metres.
    """
    sampled = areas.sampled and any(r.users.known for r in areas.rows)
    out = Advice("the probability sample" if sampled else "labels on blocks the model never saw")
    pairs = (
        [(r.name, r.users, r.producers) for r in areas.rows]
        if sampled
        else [(r.name, r.precision, r.recall) for r in skill.rows]
    )
    _classes(out, pairs)
    _areas(out, areas)
    _confidence(out, skill)
    _values(out, campaign, skill)
    _extent(out, campaign, record, resolution_m)
    if campaign.archive.kind == "simulated":
        out.no.insert(0, "Anything on the ground: the region is simulated.")
    return out


def _least(value: formats.Interval) -> float:
    return value.low if value.has_range else value.value


def _classes(out: Advice, pairs: Sequence[tuple[str, formats.Interval, formats.Interval]]) -> None:
    def names(found: Sequence[str]) -> str:
        return ", ".join(found[:-1]) + " and " + found[-1] if len(found) > 1 else found[0]

    worst = {n: min(_least(a), _least(b)) for n, a, b in pairs if a.known and b.known}
    values = {n: min(a.value, b.value) for n, a, b in pairs if a.known and b.known}
    good = [n for n, v in worst.items() if v >= GOOD]
    poor = [n for n, v in values.items() if v < POOR]
    between = [n for n in worst if n not in good and n not in poor]
    untested = [n for n, a, b in pairs if not (a.known and b.known)]
    if good:
        out.good.append(
            f"Where {names(good)} lie{'s' if len(good) == 1 else ''}: at least "
            f"{GOOD:.0%} of such pixels are right, and at least {GOOD:.0%} are found."
        )
    if between:
        out.care.append(
            f"Single places of {names(between)}: look at the image, and use whole patches rather "
            "than pixels."
        )
    if poor:
        out.no.append(
            f"Single places of {names(poor)}: of such pixels fewer than {POOR:.0%} are right, or "
            "fewer are found."
        )
    if untested:
        out.no.append(
            f"{names(untested)} at all: nothing tested {'it' if len(untested) == 1 else 'them'}."
        )


def _areas(out: Advice, areas: facts.Areas) -> None:
    if areas.sampled:
        out.good.append(
            "Areas of the whole region: quote the estimates with their intervals, not the counts "
            "of pixels."
        )
    else:
        out.no.append("Area statistics: without a probability sample the errors are unknown.")


def _confidence(out: Advice, skill: facts.Skill) -> None:
    gap = formats.interval(skill.raw.get("ece_after")).value
    if not math.isfinite(gap):
        return
    text = f"its confidence is off by {formats.percent(gap)} on average"
    if gap <= _BELIEVED:
        out.good.append(f"Leaving out unsure pixels by their probability: {text}.")
    else:
        out.care.append(f"Reading probabilities as chances: {text}.")


def _values(out: Advice, campaign: Campaign, skill: facts.Skill) -> None:
    raw = skill.raw.get("regression")
    for task in campaign.tasks:
        scores = raw.get(task.name) if isinstance(raw, Mapping) else None
        rmse = formats.interval((scores or {}).get("rmse"))
        if rmse.known:
            unit = f" {task.unit}" if task.unit else ""
            out.care.append(
                f"Single values of {facts.label(task.name.replace('-', '_')).lower()}: off by "
                f"{formats.number(rmse.value)}{unit} (root mean square on held-out labels)."
            )


def _extent(
    out: Advice, campaign: Campaign, record: Mapping[str, Any], resolution_m: float
) -> None:
    valid = formats.interval(record.get("valid_pct")).value / 100
    if valid < _ENOUGH:
        out.care.append(f"Complete cover: {formats.percent(1 - valid)} of the region has no class.")
    first = min(p.start for p in campaign.cube.periods)
    last = max(p.end for p in campaign.cube.periods)
    out.no += [
        f"Objects narrower than {2 * resolution_m:g} m or smaller than "
        f"{formats.hectares(9 * resolution_m**2 / 1e4)} ha (nine pixels).",
        f"The state of the land before {formats.day(first)} or after {formats.day(last)}.",
        "Change, by subtracting this map from another: the errors of both add up. Sample the "
        "change itself.",
    ]
