"""Coverage of conformal sets and intervals on held-out blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from terraloom.assess.coverage import Held, judge_intervals, judge_sets
from terraloom.config.campaign import Uncertainty
from terraloom.train.held_out import HeldOut

NAMES = ("crop", "forest", "water")


def _labels(n_labels: int, rng: np.random.Generator) -> tuple[Any, Any, Held]:
    """Labels of 1 to 30 pixels in 24 blocks and 4 folds; water is rare and hard to tell."""
    size = rng.integers(1, 31, n_labels)
    unit = np.repeat(np.arange(n_labels), size)
    block = (np.arange(n_labels) % 24)[unit]
    y = rng.choice(3, n_labels, p=(0.6, 0.3, 0.1))[unit]
    z = rng.normal(0, 0.5, (len(unit), 3)) + rng.normal(0, 1, (n_labels, 3))[unit]
    z[np.arange(len(y)), y] += np.array([3.0, 2.5, 0.5])[y]
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return p, y, Held(unit, block, block % 4)


def test_coverage_of_sets_on_other_folds() -> None:
    rng = np.random.default_rng(1)
    p, y, held = _labels(1500, rng)
    record, shown = judge_sets(p, y, held, NAMES, Uncertainty(coverage=0.9), rng)
    found = {m: shown["methods"][m] for m in ("split", "class", "block")}
    for method, f in found.items():
        c = f["coverage"]
        assert c["low"] < c["value"] < c["high"] and c["high"] - c["low"] < 0.06, method
        assert f["units"] == 1500 and len(f["per_block"]) == 24
        assert f["worst_block"] == min(b["coverage"] for b in f["per_block"])
    assert found["split"]["coverage"]["value"] == pytest.approx(0.9, abs=0.02)
    each = {m: [c["coverage"]["value"] for c in f["per_class"]] for m, f in found.items()}
    assert each["split"][2] < 0.8, "one threshold leaves out the rare class"
    assert min(each["class"]) > 0.85
    assert found["block"]["worst_block"] > found["split"]["worst_block"]
    assert found["block"]["mean_size"] > found["split"]["mean_size"] >= 1
    assert shown["always_in_the_set"] == [] and shown["method"] == "split"
    assert len(set(record["thresholds"])) == 1


def test_rare_class_is_said_to_be_in_every_set() -> None:
    rng = np.random.default_rng(2)
    p, y, held = _labels(300, rng)
    rare = (y != 2) | (held.unit < 40)
    assert 0 < len(np.unique(held.unit[rare & (y == 2)])) < 9
    some = Held(held.unit[rare], held.block[rare], held.fold[rare])
    record, shown = judge_sets(p[rare], y[rare], some, NAMES, Uncertainty(method="class"), rng)
    assert shown["always_in_the_set"] == ["water"] and record["thresholds"][2] is None
    assert shown["methods"]["class"]["single_pct"] < 50
    gone = judge_sets(p[y != 2], y[y != 2], Held(*(v[y != 2] for v in
                      (held.unit, held.block, held.fold))), NAMES, Uncertainty(), rng)  # fmt: skip
    assert gone[1]["methods"]["class"]["per_class"][2] == {
        "name": "water", "coverage": None, "labels": 0,
    }  # fmt: skip


@pytest.mark.parametrize("channels", [2, 4])
def test_coverage_of_intervals(channels: int, campaign_with_height: Any) -> None:
    rng = np.random.default_rng(3)
    n, members = 4000, 3
    block = rng.integers(0, 60, n)
    y = rng.gamma(2, 6, n)
    p = np.empty((members, n, channels))
    mean = y + rng.normal(0, 3, n) + rng.normal(0, 1, 60)[block]
    p[..., 0] = mean + rng.normal(0, 0.5, (members, n))
    p[..., 1] = 1.5**2  # too sure
    if channels == 4:
        p[..., 2], p[..., 3] = p[..., 0] - 2.5, p[..., 0] + 2.5
    held = {"height": HeldOut(np.arange(n), (block % 4).astype(np.uint8), y, p)}
    records, shown = judge_intervals(campaign_with_height, held, block, rng)
    found = shown["height"]["methods"]
    assert records["height"]["kind"] == ("normalised" if channels == 2 else "quantile")
    assert records["height"]["factor"] > 1.5
    assert found["split"]["coverage"]["value"] == pytest.approx(0.915, abs=0.015)
    assert found["block"]["coverage"]["value"] > found["split"]["coverage"]["value"]
    assert found["block"]["mean_width"] > found["split"]["mean_width"] > 5
    assert shown["height"]["blocks"] == 60


@pytest.fixture
def campaign_with_height() -> Any:
    from types import SimpleNamespace

    from terraloom.config.base import TaskKind

    task = SimpleNamespace(name="height", kind=TaskKind.REGRESSION, range=(0.0, 60.0), unit="m")
    return SimpleNamespace(tasks=[task], uncertainty=Uncertainty())
