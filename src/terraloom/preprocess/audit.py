"""The quality table: which scenes are used, how clear they are, how far they lay off."""

from __future__ import annotations

import csv
import io
from typing import Any

from terraloom.config.campaign import Campaign
from terraloom.grid import CampaignGrid
from terraloom.io import read_json, write_json, write_text
from terraloom.log import get_logger
from terraloom.preprocess.scenes import ITEMS, QUALITY, SCENES, SHIFTS, VERIFIED, mask_statistics

__all__ = ["COLUMNS", "audit_scenes"]

COLUMNS = (
    "id", "source", "datetime", "decision", "why", "clear_pct", "cloud_pct", "shadow_pct",
    "snow_pct", "nodata_pct", "dy_px", "dx_px", "reliability",
)  # fmt: skip

log = get_logger(__name__)


def audit_scenes(campaign: Campaign, grid: CampaignGrid) -> None:
    """Decide on every locked item and write ``quality.csv`` and ``metrics.json``."""
    verified = read_json(VERIFIED)
    stats = mask_statistics(campaign, grid)
    aligned = read_json(SHIFTS)
    rows = [
        _row(item, verified, stats, aligned, campaign.scenes.min_clear_pct)
        for item in read_json(ITEMS)["items"]
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(QUALITY, text.getvalue())
    used = [r for r in rows if r["decision"] == "use"]
    clear = [float(r["clear_pct"]) for r in used if r["clear_pct"] != ""]
    log.info("%d of %d items are used", len(used), len(rows))
    write_json(
        SCENES / "metrics.json",
        {
            "items": len(rows),
            "items_used": len(used),
            "mean_clear_pct": sum(clear) / len(clear) if clear else None,
        },
    )


def _row(
    item: dict[str, Any],
    verified: dict[str, str],
    stats: dict[str, dict[str, float]],
    aligned: dict[str, Any],
    min_clear_pct: float,
) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {k: item[k] for k in ("id", "source", "datetime", "decision", "why")}
    row |= {k: round(v, 2) for k, v in stats.get(item["id"], {}).items()}
    shift = aligned["shifts"].get(item["id"])
    if shift and shift["dy_px"] is not None:  # a shift that could not be told is null
        row |= {k: round(shift[k], 4) for k in ("dy_px", "dx_px", "reliability")}
    if row["decision"] != "use":
        return row
    verdict = verified.get(item["id"], "not verified")
    if verdict != "ok":
        row |= {"decision": "drop", "why": verdict}
    elif row["clear_pct"] != "" and row["clear_pct"] < min_clear_pct:
        row |= {"decision": "drop", "why": f"clear {row['clear_pct']} % < {min_clear_pct:g} %"}
    elif item["id"] in aligned["refused"]:
        row |= {"decision": "drop", "why": aligned["refused"][item["id"]]}
    return row
