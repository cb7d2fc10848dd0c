"""The model card says what the records say."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.fake_results import fake_campaign, fake_results
from terraloom.assess.model_card import CARD, write_model_card
from terraloom.io import read_json, write_json


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    fake_results(tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    campaign = fake_campaign()
    labels = read_json("results/chips/labels.json")
    labels["folds"]["block_m"] = 1280.0
    read = labels["tasks"]["land_cover"]
    labels["tasks"] = {t.name: {"file": "labels.gpkg", **read} for t in campaign.tasks}
    write_json(Path("results/chips/labels.json"), labels)
    write_json(Path("results/chips/metrics.json"), {
        "chips": 7, "classes_in_one_fold": ["Wetland"],
        "tasks": {t.name: {"kept_px": 1234, "lost_invalid_pct": 3.21} for t in campaign.tasks},
    })  # fmt: skip
    held = read_json("results/model/held_out.json")
    held |= {"label_noise_pct": 12.5}
    held["per_class"][1]["f1"]["value"] = 0.31
    held["boundary"] = {k: v | {"cut": 0.35} for k, v in held["boundary"].items()}
    write_json(Path("results/model/held_out.json"), held)
    write_json(Path("results/model/fold-0/member-0.json"), {
        "architecture": "fusion", "parameters": 161153, "receptive_field_px": 32,
        "spec": {"channels": {"s2_10": ["summer/B02", "summer/B03"]}},
    })  # fmt: skip
    write_model_card(campaign)
    return CARD.read_text(encoding="utf-8")


def test_it_says_what_the_model_is_and_knows(card: str) -> None:
    assert card.startswith("# Model card")
    assert "`fusion` with 161,153 weights" in card and "32 pixels (320 m)" in card
    assert "| s2_10 | 2 | summer/B02, summer/B03 |" in card
    assert "| 1,234 | 3.2 % |" in card and "Training windows: 7" in card


def test_it_says_how_good_it_is_and_where_not(card: str) -> None:
    held = read_json("results/model/held_out.json")
    oa = held["overall"]["oa"]
    assert f"{oa['value']:.3f} ({oa['low']:.3f} to {oa['high']:.3f})" in card
    assert "undefined" in card, "a measure without a value is no zero"
    name = held["per_class"][1]["name"]
    assert f"not to be relied on: {name}." in card
    assert "random forest" in card and "0.851" in card
    assert "12.5 % of the labels" in card and "Seen in one fold only: Wetland" in card
    assert "not the accuracy of the map" in card
