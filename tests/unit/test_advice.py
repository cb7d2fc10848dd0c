from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.fake_results import fake_campaign
from terraloom.report import facts
from terraloom.report.advice import GOOD, POOR, Advice, advise

LEGEND = [
    {"code": n + 1, "name": name, "color": "#112233", "map_area_ha": 10.0, "share_pct": 25.0}
    for n, name in enumerate(("Forest", "Water", "Crops", "Bare"))
]


def _skill(scores: dict[str, tuple[float | None, float | None]], ece: float = 0.02) -> facts.Skill:
    rows: list[dict[str, Any]] = [
        {"name": n, "precision": p, "recall": r, "f1": p, "pixels": 9}
        for n, (p, r) in scores.items()
    ]
    return facts.skill({"overall": {"oa": 0.8}, "per_class": rows, "ece_after": ece})


def _advice(skill: facts.Skill, accuracy: Any = None, *, valid: float = 100.0) -> Advice:
    areas = facts.areas(LEGEND, accuracy, None)
    return advise(fake_campaign(), areas, skill, {"valid_pct": valid}, 10.0)


SCORES: dict[str, tuple[float | None, float | None]] = {
    "Forest": (GOOD, 0.95), "Water": (0.9, 0.7), "Crops": (0.9, POOR - 0.01), "Bare": (None, 0.5),
}  # fmt: skip


def test_classes_are_sorted_by_what_was_shown_of_them() -> None:
    found = _advice(_skill(SCORES))
    assert any("Forest lies" in s for s in found.good)
    assert any("Water" in s for s in found.care)
    assert any("places of Crops" in s for s in found.no)
    assert any(s.startswith("Bare at all") for s in found.no)
    assert not any("Forest" in s for s in found.care + found.no)


def test_the_lower_end_of_an_interval_counts() -> None:
    wide = {"value": 0.85, "low": GOOD - 0.01, "high": 0.95}
    skill = facts.skill({"per_class": [{"name": "Forest", "precision": wide, "recall": 0.9}]})
    assert not any("Forest" in s for s in _advice(skill).good)


def test_areas_need_a_probability_sample() -> None:
    assert any("Area statistics" in s for s in _advice(_skill(SCORES)).no)
    accuracy = {
        "classes": [{"code": 1, "name": "Forest", "area_ha": 9.0, "low_ha": 8.0, "high_ha": 10.0,
                     "ua": 0.9, "pa": 0.9}],
    }  # fmt: skip
    found = _advice(_skill(SCORES), accuracy)
    assert found.basis == "the probability sample"
    assert any("Areas of the whole region" in s for s in found.good)
    assert not any("Area statistics" in s for s in found.no)


def test_confidence_and_cover() -> None:
    assert any("confidence" in s for s in _advice(_skill(SCORES, 0.02)).good)
    assert any("confidence" in s for s in _advice(_skill(SCORES, 0.2)).care)
    assert any("10.0% of the region" in s for s in _advice(_skill(SCORES), valid=90.0).care)
