from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from terraloom.io import write_json
from terraloom.report import page
from terraloom.report.scenes import NAMED, OPEN_UP_TO, QUESTIONS, scene_section

SCRIPT = "<script>alert(1)</script>"


def _csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _stage(root: Path, count: int, failed: int = 0) -> list[dict[str, Any]]:
    """A scenes stage of two sources; every fourth scene is dropped."""
    items, rows, masks = [], [], []
    for n in range(count):
        source = ("sentinel-2-l2a", "sentinel-1-rtc")[n % 2]
        day = (date(2022, 11, 1) + timedelta(days=n * 300 // count)).isoformat()
        items.append({"id": f"SCENE_{n:03d}", "source": source, "datetime": f"{day}T10:00:00Z",
                      "decision": "use", "why": ""})  # fmt: skip
        row = items[-1] | {"clear_pct": "", "dy_px": "", "dx_px": "", "rest_px": "", "audit": "ok"}
        if n % 2 == 0:
            row |= {"clear_pct": 60.5, "dy_px": 0.3, "dx_px": -0.4, "rest_px": 0.02}
            masks.append({"id": row["id"], "method": "layer", "other": "spectral",
                          "agreement_pct": 91.2, "cloud_f1": 0.87})  # fmt: skip
        if n % 4 == 0:
            row |= {"decision": "drop", "why": SCRIPT}
        rows.append(row)
    checks = [
        {"check": c, "item": i["id"], "ok": not (c == "shift" and n < failed), "found": SCRIPT,
         "allowed": "<0.25 px", "fix": "measure <again>"}
        for n, i in enumerate(items) for c in ("shift", "tile")
    ]  # fmt: skip
    _csv(root / "scenes/quality.csv", rows)
    _csv(root / "scenes/masks.csv", masks)
    write_json(root / "scenes/audit.json", {"checks": checks})
    return items


def _render(root: Path, items: list[dict[str, Any]]) -> str:
    section = scene_section(root, items)
    return page._environment().get_template("scenes.html.j2").render(scene_facts=section)


def test_section_counts_and_compares(tmp_path: Path) -> None:
    items = _stage(tmp_path, 12)
    section = scene_section(tmp_path, items)
    assert [(s.name, s.used, len(s.scenes), s.open) for s in section["sources"]] == [
        ("sentinel-2-l2a", 3, 6, True), ("sentinel-1-rtc", 6, 6, True),
    ]  # fmt: skip
    optical = section["sources"][0]
    assert optical.masked and not section["sources"][1].masked
    assert optical.scenes[0].shift == "0.50 → 0.02"
    assert "agree 91.2%, cloud F1 0.87" in optical.scenes[0].masks
    assert [(c.name, c.passed, c.failed) for c in section["checks"]] == [
        ("shift", 12, 0), ("tile", 12, 0),
    ]  # fmt: skip
    assert section["aligned"] == ("5.0", "0.2") and not section["failed"]


def test_page_is_escaped_and_needs_no_network(tmp_path: Path) -> None:
    html = _render(tmp_path, _stage(tmp_path, 12, failed=2))
    assert SCRIPT not in html and "&lt;script&gt;" in html
    assert "measure &lt;again&gt;" in html and "2 checks of the scenes failed" in html
    assert "http" not in html and "src=" not in html and "url(" not in html


def test_hundreds_of_scenes_are_folded_and_the_list_of_faults_ends(tmp_path: Path) -> None:
    count = 2 * OPEN_UP_TO + 2
    items = _stage(tmp_path, max(count, 200), failed=NAMED + 5)
    section = scene_section(tmp_path, items)
    assert not any(s.open for s in section["sources"])
    assert len(section["failed"]) == NAMED and section["more"] == 5
    html = _render(tmp_path, items)
    assert "5 more stand in" in html and f"{NAMED + 5} checks of the scenes failed" in html
    calendar = section["calendar"]
    assert sum(len(ticks) for _, _, ticks in calendar["rows"]) == len(items)
    xs = [x for _, _, ticks in calendar["rows"] for x, *_ in ticks]
    assert min(xs) >= calendar["left"] and max(xs) <= calendar["width"]
    assert len(calendar["months"]) >= 5 and "2023" in " ".join(t for _, t in calendar["months"])


def test_section_without_audit_masks_or_dates(tmp_path: Path) -> None:
    """Results of before the audit, or of one scene, still have their table."""
    item = {"id": "ONE", "source": "sentinel-2-l1c", "datetime": "2017-02-16T10:21:01Z",
            "decision": "use", "why": ""}  # fmt: skip
    section = scene_section(tmp_path, [item])
    assert not section["audited"] and section["calendar"] is None and section["aligned"] is None
    html = _render(tmp_path, [item])
    assert "ONE" in html and "16 Feb 2017" in html and "Checks before" not in html


def test_every_check_of_the_audit_has_its_question() -> None:
    """A check that the page does not know would stand there without a word."""
    source = Path(page.__file__).parents[1] / "preprocess"
    text = "".join(
        (source / f"{m}.py").read_text() for m in ("checks", "coverage", "position", "audit")
    )
    import re

    named = set(re.findall(r"record\(\s*\"([a-z ]+)\"", text))
    assert named and named <= set(QUESTIONS), named - set(QUESTIONS)
