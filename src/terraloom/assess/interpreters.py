"""How much the answer depends on who looked: agreement of interpreters, and what it does to areas.

Answers are taken for truth by every estimator; that two trained people differ on a unit is the
cheapest sign of how far that is off. No kappa: the agreement rate and the table of who said what
are plain, and the spread of the areas is in hectares (Pontius & Millones 2011).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from terraloom.assess.estimators import estimate_accuracy
from terraloom.assess.intervals import critical_value, mean_estimates
from terraloom.assess.samples import ReferenceSample, Strata
from terraloom.assess.survey import Survey
from terraloom.errors import DesignError

__all__ = ["NOT_ANSWERED", "compare_interpreters"]

I64 = NDArray[np.int64]

#: Code of a unit that an interpreter did not answer.
NOT_ANSWERED = -1


def compare_interpreters(
    answers: Mapping[str, I64],
    sample: ReferenceSample,
    strata: Strata,
    *,
    classes: Sequence[int],
    post_strata: Strata | None = None,
    level: float = 0.95,
) -> dict[str, Any]:
    """Agreement of each pair of interpreters, and the areas by each of them.

    Args:
        answers: (N,) class codes by interpreter, `NOT_ANSWERED` where there is none.
        sample: The units with the settled answers.
        strata: Known stratum sizes.
        classes: Legend codes.
        post_strata: As in `estimate_accuracy`.
        level: Confidence level, 0-1 exclusive.

    Returns:
        ``pairs``: interpreters, units both answered, how many agree, and where all units were
        answered by both the share of the domain on which they agree, with interval, and the
        (K, K) table of area shares (rows the first, columns the second); else the counts.
        ``areas``: per interpreter who answered all units, hectares by class with standard error,
        and overall accuracy; under ``settled`` the same with the final answers.
        ``spread_ha``: largest less smallest area by class over those interpreters.

    Raises:
        DesignError: If the lengths differ, or units of one design do not fit it.
    """
    n = sample.stratum.size
    for name, codes in answers.items():
        if codes.shape != (n,):
            raise DesignError(f"{codes.size} answers for {n} units", where=f"interpreter {name}")
    full = {name: codes for name, codes in answers.items() if (codes != NOT_ANSWERED).all()}
    survey = Survey.of(sample, strata, post_strata=post_strata)
    z = critical_value(level, survey)
    pairs = [
        _pair(a, b, answers, survey if a in full and b in full else None, classes, z)
        for a, b in combinations(answers, 2)
    ]
    areas: dict[str, Any] = {}
    for name, codes in {**full, "settled": sample.reference_class}.items():
        said = ReferenceSample(
            sample.stratum, sample.map_class, codes, sample.kind, sample.unit_area_m2,
            sample.cluster, sample.inclusion_prob,
        )  # fmt: skip
        report = estimate_accuracy(
            said, strata, classes=classes, post_strata=post_strata, level=level
        )
        areas[name] = {
            "area_ha": {str(c): e.value for c, e in report.area_ha.items()},
            "se_ha": {str(c): e.se for c, e in report.area_ha.items()},
            "oa": report.overall.value,
        }
    spread = {}
    if len(full) > 1:
        for code in map(str, classes):
            values = [areas[name]["area_ha"][code] for name in full]
            spread[code] = max(values) - min(values)
    return {"pairs": pairs, "areas": areas, "spread_ha": spread}


def _pair(
    a: str, b: str, answers: Mapping[str, I64], survey: Survey | None, classes: Sequence[int],
    z: float,
) -> dict[str, Any]:  # fmt: skip
    first, second = answers[a], answers[b]
    both = (first != NOT_ANSWERED) & (second != NOT_ANSWERED)
    same = (first == second)[both]
    row: dict[str, Any] = {"first": a, "second": b, "units": int(both.sum()),
                           "agree": int(same.sum())}  # fmt: skip
    legend = np.asarray(classes)
    table = (first[:, None] == legend).astype(np.float64), second[:, None] == legend
    if survey is None:
        row["counts"] = np.rint(table[0][both].T @ table[1][both]).astype(int).tolist()
        return row
    found = survey.summarise(same.astype(np.float64)[:, None])
    agreement = mean_estimates(survey, found, z)[0]
    row["agreement"] = agreement.to_dict()
    row["table"] = ((table[0] * survey.weight[:, None]).T @ table[1]).tolist()
    return row
