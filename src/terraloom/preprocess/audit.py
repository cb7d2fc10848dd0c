"""The audit before training: are the scenes what their records say, and where they should be?

Everything that a later stage would silently believe is held against something else: records
against files, files against the lattice, scenes against the other scenes of their source, tiles
against what was found for them. The outcome is ``audit.json``, which also stands there when a
failed check stops the run, and the quality table.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from odc.geo.geobox import GeoBox

from terraloom.acquire.sources import load_source
from terraloom.config.campaign import Campaign
from terraloom.errors import SceneError
from terraloom.grid import CampaignGrid
from terraloom.io import read_json, write_json, write_text
from terraloom.log import get_logger, progress
from terraloom.preprocess import checks, coverage
from terraloom.preprocess.compare import compare_rows
from terraloom.preprocess.position import check_shifts
from terraloom.preprocess.scenes import (
    ITEMS,
    QUALITY,
    SCENES,
    SHIFTS,
    VERIFIED,
    gather_scenes,
    mask_manifests,
    mask_statistics,
)
from terraloom.preprocess.stack import Scene
from terraloom.preprocess.views import Header, View, headers, look_at, windows

__all__ = ["AUDIT", "COLUMNS", "MASK_TABLE", "audit_scenes", "run_checks"]

AUDIT = SCENES / "audit.json"
MASK_TABLE = SCENES / "masks.csv"

COLUMNS = (
    "id", "source", "datetime", "decision", "why", "clear_pct", "cloud_pct", "shadow_pct",
    "snow_pct", "nodata_pct", "dy_px", "dx_px", "reliability", "residual_px", "n_windows",
    "before_px", "after_px", "rest_px", "audit",
)  # fmt: skip
_SHIFT_COLUMNS = (
    "dy_px", "dx_px", "reliability", "residual_px", "n_windows", "before_px", "after_px",
)  # fmt: skip
#: Failed checks that the error names; all of them stand in audit.json.
_NAMED = 5
_THREADS = 4

log = get_logger(__name__)

Row = dict[str, Any]


@dataclass
class Audit:
    """Outcome of all checks.

    Attributes:
        records: Lines of audit.json.
        rests: Item id: what its content still lies off the other scenes', 10 m pixels.
    """

    records: list[checks.Record] = field(default_factory=list)
    rests: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> list[checks.Record]:
        """Records of checks that failed."""
        return [r for r in self.records if not r["ok"]]


def audit_scenes(campaign: Campaign, grid: CampaignGrid) -> None:
    """Decide on every locked item, check the scenes, and write the tables of the stage.

    Writes ``audit.json`` first, then ``quality.csv``, ``masks.csv`` and ``metrics.json``.

    Raises:
        SceneError: A check failed and ``scenes.on_audit`` is ``stop``. ``audit.json`` is there
            then; the other files are not, so that nothing is built from the scenes.
    """
    stats = mask_statistics(campaign, grid)
    aligned = read_json(SHIFTS)
    verified = read_json(VERIFIED)
    items = read_json(ITEMS)["items"]
    rows = [_row(i, verified, stats, aligned, campaign.scenes.min_clear_pct) for i in items]
    audit = run_checks(campaign, grid, rows, items)
    write_json(AUDIT, {"checks": audit.records})
    for r in audit.failed:
        log.warning("%s of %s: %s; to do: %s", r["check"], r["item"], r["found"], r["fix"])
    if audit.failed and campaign.scenes.on_audit == "stop":
        for path in (QUALITY, MASK_TABLE, SCENES / "metrics.json"):
            path.unlink(missing_ok=True)
        raise _stopped(audit.failed)
    _write_table(QUALITY, COLUMNS, _with_audit(rows, audit))
    _write_masks(campaign)
    used = [r for r in rows if r["decision"] == "use"]
    clear = [float(r["clear_pct"]) for r in used if r["clear_pct"] != ""]
    log.info("%d of %d items are used", len(used), len(rows))
    write_json(
        SCENES / "metrics.json",
        {
            "items": len(rows),
            "items_used": len(used),
            "mean_clear_pct": sum(clear) / len(clear) if clear else None,
            "checks": len(audit.records),
            "checks_failed": len(audit.failed),
        },
    )


def run_checks(
    campaign: Campaign, grid: CampaignGrid, rows: Sequence[Row], items: Sequence[Mapping[str, Any]]
) -> Audit:
    """All checks of the scenes stage.

    Records and files of every verified item are checked, since a wrong place is also a reason for
    a scene to look cloudy and be dropped; values and positions only of the scenes that are used.

    Args:
        campaign: The campaign.
        grid: Its grid.
        rows: Decisions, as in the quality table.
        items: Items of the lock.
    """
    audit = Audit()
    audit.records += [_verdict(r) for r in rows]
    scenes = gather_scenes(campaign, decided=False, aligned=True)
    places = windows(grid)
    views, heads = _look(scenes, places, audit)
    used = {r["id"] for r in rows if r["decision"] == "use"}
    for source in dict.fromkeys(str(s.item["source"]) for s in scenes):
        mine = [s for s in scenes if s.item["source"] == source and _id(s) in views]
        _check_source(campaign, source, mine, views, heads, used, places, audit, items)
    audit.records += coverage.check_tiles(campaign, grid, [s for s in scenes if _id(s) in used])
    return audit


def _check_source(
    campaign: Campaign,
    source: str,
    scenes: Sequence[Scene],
    views: Mapping[str, View],
    heads: Mapping[str, Sequence[Header]],
    used: set[str],
    places: Sequence[GeoBox],
    audit: Audit,
    items: Sequence[Mapping[str, Any]],
) -> None:
    own = [views[_id(s)] for s in scenes]
    out = audit.records
    out += checks.check_lattice({v.id: heads[v.id] for v in own}, source)
    out += checks.check_duplicates(own, items)
    for view in own:
        out += [
            checks.check_footprint(view.item, heads[view.id]),
            checks.check_empty(view),
            checks.check_constant(view),
        ]
    kept = [v for v in own if v.id in used]
    out += [check(v) for v in kept for check in (checks.check_ranges, coverage.check_valid)]
    out += checks.check_levels(kept)
    suspect = {r["item"] for r in out if not r["ok"]}
    if load_source(source).kind == "optical" and kept:
        out += checks.check_bands(kept, suspect)
        records, rests = check_shifts(
            [s for s in scenes if _id(s) in used], kept, places,
            aligned=campaign.coregister.enabled, suspect=suspect,
        )  # fmt: skip
        out += records
        audit.rests |= rests


def _look(
    scenes: Sequence[Scene], places: Sequence[GeoBox], audit: Audit
) -> tuple[dict[str, View], dict[str, list[Header]]]:
    """Read all scenes; those that cannot be read are records, too."""

    def one(scene: Scene) -> tuple[View, list[Header]] | SceneError:
        try:
            return look_at(scene, places), headers(scene.item)
        except SceneError as err:
            return err

    views, heads = {}, {}
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        looks = progress(pool.map(one, scenes), total=len(scenes), what="scenes looked at")
        for scene, look in zip(scenes, looks, strict=True):
            if isinstance(look, SceneError):
                audit.records.append(
                    checks.record(
                        "readable", _id(scene), ok=False, found=look.found,
                        allowed=look.allowed or "files that can be read",
                        fix=look.fix or "fetch it again",
                    )
                )  # fmt: skip
            else:
                views[_id(scene)], heads[_id(scene)] = look
    return views, heads


def _id(scene: Scene) -> str:
    return str(scene.item["id"])


def _verdict(row: Row) -> checks.Record:
    """Whether an item was decided on at all; what was dropped by a rule is no fault."""
    missing = row["why"] == _NOT_VERIFIED
    found = str(row["decision"]) + (f": {row['why']}" if row["why"] else "")
    return checks.record(
        "decision", str(row["id"]), ok=not missing, found=found,
        allowed="a verdict for every item of the lock", fix="run terraloom verify-items again",
    )  # fmt: skip


def _stopped(failed: Sequence[checks.Record]) -> SceneError:
    first = failed[0]
    named = [f"{r['check']} of {r['item']}: {r['found']}" for r in failed[:_NAMED]]
    more = len(failed) - len(named)
    return SceneError(
        f"{len(failed)} checks of the scenes failed: "
        + "; ".join(named)
        + (f"; and {more} more in {AUDIT.as_posix()}" if more else ""),
        where=f"item {first['item']}",
        allowed=first["allowed"],
        fix=f"{first['fix']}. To go on regardless: scenes.on_audit: report",
    )


# --- tables ------------------------------------------------------------------------------------

_NOT_VERIFIED = "not verified"


def _row(
    item: dict[str, Any],
    verified: dict[str, str],
    stats: dict[str, dict[str, float]],
    aligned: dict[str, Any],
    min_clear_pct: float,
) -> Row:
    row: Row = dict.fromkeys(COLUMNS, "")
    row |= {k: item[k] for k in ("id", "source", "datetime", "decision", "why")}
    row |= {k: round(v, 2) for k, v in stats.get(item["id"], {}).items() if k in COLUMNS}
    # A shift that could not be told is null.
    shift = aligned["shifts"].get(item["id"]) or {}
    row |= {k: round(shift[k], 4) for k in _SHIFT_COLUMNS if shift.get(k) is not None}
    if row["decision"] != "use":
        return row
    verdict = verified.get(item["id"], _NOT_VERIFIED)
    if verdict != "ok":
        row |= {"decision": "drop", "why": verdict}
    elif row["clear_pct"] != "" and row["clear_pct"] < min_clear_pct:
        row |= {"decision": "drop", "why": f"clear {row['clear_pct']} % < {min_clear_pct:g} %"}
    elif item["id"] in aligned["refused"]:
        row |= {"decision": "drop", "why": aligned["refused"][item["id"]]}
    elif item["id"] in aligned.get("unaligned", {}):
        row["why"] = aligned["unaligned"][item["id"]]
    return row


def _with_audit(rows: Sequence[Row], audit: Audit) -> list[Row]:
    failed: dict[str, list[str]] = {}
    for r in audit.failed:
        failed.setdefault(r["item"], []).append(r["check"])
    seen = {r["item"] for r in audit.records}
    out = []
    for row in rows:
        rest = audit.rests.get(row["id"])
        fine = "ok" if row["id"] in seen else ""
        out.append(
            row
            | {
                "rest_px": "" if rest is None else round(rest, 4),
                "audit": "; ".join(failed.get(row["id"], [])) or fine,
            }
        )
    return out


def _write_table(path: Any, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _write_masks(campaign: Campaign) -> None:
    columns = (
        "id", "method", "other", "n_px", "clear_pct", "cloud_pct", "shadow_pct", "snow_pct",
        "agreement_pct", "cloud_f1", "shadow_f1",
    )  # fmt: skip
    _write_table(MASK_TABLE, columns, compare_rows(mask_manifests(campaign)))
