"""What interpreters said about the units: reading, checking point by point, one final answer each.

The rule for the final answer of a unit, the first that applies:

1. the row of the interpreter `consensus`, made after looking at it together;
2. all interpreters who answered it agree;
3. three or more answered it and more than half agree;
4. the answer of the primary interpreter (`sample.primary`).

"Cannot tell" is an answer: the unit is left out, a unit of the reserve stands in for it, and the
share is reported; it supposes that such units are like the others of their stratum.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from pyproj import Transformer

from terraloom.assess.design import SampleDesign
from terraloom.assess.kept import listed
from terraloom.assess.measured import VALUE_PREFIX, value_columns, value_faults
from terraloom.assess.samples import SampleKind
from terraloom.config.labels import Task
from terraloom.config.sample import Sample
from terraloom.errors import DesignError
from terraloom.legend import Legend

__all__ = ["CANNOT_TELL", "CONFIDENCE", "CONSENSUS", "Answers", "read_answers", "settle"]

#: Class of an answer that the unit cannot be told.
CANNOT_TELL = "cannot tell"
#: Interpreter whose rows settle disagreements.
CONSENSUS = "consensus"
CONFIDENCE = ("low", "medium", "high")
#: Answers whose place differs by more than this are about another place, pixels.
_MOVED_PX = 0.5
#: Interpreter of files without that column.
_SOMEONE = "interpreter"
_COLUMNS = ("id", "class", "interpreter", "confidence", "date", "comment")

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Answers:
    """The final answers and how they came about.

    Attributes:
        classes: Class name of each unit that has one.
        unclear: Units that cannot be told.
        decided: How each unit was settled: single, agreement, consensus, majority, primary.
        said: Class name by unit, of each interpreter.
        facts: Who answered and how units were settled, JSON-able.
    """

    classes: dict[str, str]
    unclear: tuple[str, ...]
    decided: dict[str, str]
    said: dict[str, dict[str, str]]
    facts: dict[str, Any]


def read_answers(
    files: Sequence[str], design: SampleDesign, points: gpd.GeoDataFrame, legend: Legend,
    tasks: Sequence[Task] = (),
) -> pd.DataFrame:  # fmt: skip
    """Rows of all files, checked; columns id, class, interpreter, confidence, date, comment.

    Further columns hold measured values, see :mod:`terraloom.assess.measured`; a row may have
    values alone, and then its class is empty.

    Raises:
        DesignError: A file cannot be read, is no answer file, belongs to another sample; or rows
            are faulty: each of them is named.
    """
    parts = []
    for file in files:
        table, places = _read(file)
        _require_answer_file(table, file)
        if "class" not in table:
            table["class"] = ""
        _require_this_sample(table, file, design)
        problems = _faults(table, places, points, legend, str(points.crs), design)
        problems += value_faults(table, tasks)
        if problems:
            raise DesignError(
                listed(problems), where=f"sample.answers {file}",
                allowed=f"ids of sample.gpkg, the classes {', '.join(legend.names)} or "
                f"`{CANNOT_TELL}`, one row per unit and interpreter",
                fix="correct these rows on the labelling page (load the file there) or in the file",
            )  # fmt: skip
        parts.append(table.assign(file=file))
    every = pd.concat(parts, ignore_index=True).fillna("")
    columns = ["class", *(c for c in every if c in value_columns(tasks))]
    every = every[(every[columns] != "").any(axis=1)]
    every = every.drop_duplicates(["id", "interpreter", *columns])
    twice = []
    for column in columns:
        given = every[every[column] != ""].drop_duplicates(["id", "interpreter", column])
        twice += [
            f"{i}: {who} says {' and '.join(part[column])} "
            f"({', '.join(sorted(set(part['file'])))})"
            for (i, who), part in given[given.duplicated(["id", "interpreter"], keep=False)]
            .groupby(["id", "interpreter"])
        ]  # fmt: skip
    if twice:
        raise DesignError(
            listed(twice),
            where="sample.answers", allowed="one answer per unit and interpreter",
            fix="keep the right row; give different people different names",
        )  # fmt: skip
    return every.drop(columns="file")


def _read(file: str) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Text columns of a file, and lon/lat of its rows where it has them."""
    path = Path(file)
    places: pd.DataFrame | None
    try:
        if path.suffix.lower() in (".geojson", ".json"):
            table, places = _from_geojson(json.loads(path.read_text(encoding="utf-8-sig")))
        elif path.suffix.lower() in (".gpkg", ".shp"):
            frame = gpd.read_file(path)
            there = frame.to_crs("EPSG:4326").geometry.representative_point()
            table = pd.DataFrame(frame.drop(columns=frame.geometry.name)).astype(object)
            places = pd.DataFrame({"lon": there.x, "lat": there.y})
        else:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
            has = {"lon", "lat"} <= set(table.columns)
            places = None
            if has:
                places = pd.DataFrame(
                    {c: pd.to_numeric(table[c], errors="coerce") for c in ("lon", "lat")}
                )
    except (OSError, ValueError, KeyError, TypeError, pd.errors.ParserError) as err:
        raise DesignError(
            f"the answers cannot be read ({err})", where=f"sample.answers {file}",
            allowed="CSV with the columns id,class, or GeoJSON with these properties",
            fix="save them with the labelling page, results/map/labelling.html",
        ) from err  # fmt: skip
    text = table.where(table.notna(), "").astype(str).apply(lambda c: c.str.strip())
    for name in _COLUMNS[2:]:
        if name not in text:
            text[name] = _SOMEONE if name == "interpreter" else ""
    text["interpreter"] = text["interpreter"].replace("", _SOMEONE)
    return text, places


def _from_geojson(data: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    rows, lon, lat = [], [], []
    for feature in data["features"]:
        rows.append({"sample": data.get("sample", ""), **feature["properties"]})
        xy = (feature.get("geometry") or {}).get("coordinates") or [np.nan, np.nan]
        lon.append(float(xy[0]))
        lat.append(float(xy[1]))
    return pd.DataFrame(rows), pd.DataFrame({"lon": lon, "lat": lat})


def _require_answer_file(table: pd.DataFrame, file: str) -> None:
    valued = any(c.startswith(VALUE_PREFIX) for c in table.columns)
    if "id" in table.columns and ("class" in table.columns or valued):
        return
    raise DesignError(
        f"columns {', '.join(table.columns)}: labels without the ids of a drawn sample are a "
        f"{SampleKind.CONVENIENCE} sample",
        where=f"sample.answers {file}",
        allowed="id, class: answers to the units of sample.gpkg",
        fix="interpret the drawn units; points of your own with known chances go to "
        "`sample.drawn`, with the column inclusion_prob",
    )


def _require_this_sample(table: pd.DataFrame, file: str, design: SampleDesign) -> None:
    named = sorted(set(table.get("sample", pd.Series(dtype=str))) - {""})
    if named in ([], [design.digest]):
        return
    raise DesignError(
        f"answers to the sample {', '.join(n for n in named if n != design.digest)}; the sample "
        f"that is drawn now is {design.digest}",
        where=f"sample.answers {file}",
        allowed="answers to the present sample",
        fix="if the map was made anew: put the sample.gpkg and design.json that were interpreted "
        "into a folder of their own and name it in `sample.drawn`; the answers then serve the new "
        "map too. Bring these files back from git, DVC or the labelling page's folder",
    )


def _faults(
    table: pd.DataFrame, places: pd.DataFrame | None, points: gpd.GeoDataFrame, legend: Legend,
    crs: str, design: SampleDesign,
) -> list[str]:  # fmt: skip
    """Everything wrong with the rows of a file, one line each."""
    found = []
    by_id = points.set_index(points["id"].astype(str))
    allowed = {*legend.names, CANNOT_TELL, ""}
    at = table.columns.get_loc("class")
    count = Counter(zip(table["id"], table["interpreter"], strict=True))
    for (i, who), n in count.items():
        if n > 1:
            found.append(f"{i}: {n} rows of {who}")
    for row in table.itertuples(index=False):
        i, said = str(row.id), str(row[at])
        if i not in by_id.index:
            found.append(f"{i or '(no id)'}: no unit of this sample")
            continue
        if said not in allowed:
            found.append(f"{i}: {said!r} is not in the legend")
        if row.confidence not in (*CONFIDENCE, ""):
            found.append(f"{i}: confidence {row.confidence!r}; low, medium, high or nothing")
        if "stratum" in table and str(row.stratum) not in ("", str(by_id.at[i, "stratum"])):
            found.append(
                f"{i}: stratum {row.stratum}, drawn in stratum {by_id.at[i, 'stratum']}; the "
                "stratum of a unit never changes, whatever it is found to be"
            )
    if places is not None:
        found += _moved(table, places, by_id, crs, abs(design.transform[0]))
    return found


def _moved(
    table: pd.DataFrame, places: pd.DataFrame, by_id: gpd.GeoDataFrame, crs: str, pixel: float
) -> list[str]:
    known = table["id"].isin(by_id.index).to_numpy() & places.notna().all(axis=1).to_numpy()
    if not known.any():
        return []
    there = by_id.loc[table["id"][known]].geometry
    to_map = Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    x, y = to_map.transform(places["lon"][known].to_numpy(), places["lat"][known].to_numpy())
    off = np.hypot(np.asarray(x) - there.x.to_numpy(), np.asarray(y) - there.y.to_numpy()) / pixel
    return [
        f"{i}: answered {d:.1f} pixels away from the drawn unit"
        for i, d in zip(table["id"][known], off, strict=True)
        if not d <= _MOVED_PX
    ]


def settle(table: pd.DataFrame, points: gpd.GeoDataFrame, sample: Sample) -> Answers:
    """One final answer per unit, by the rule of this module.

    Units of the reserve count only as far as they are needed, in the order they were drawn.

    Raises:
        DesignError: Units without an answer, or on which interpreters differ and no rule decides;
            too many that cannot be told.
    """
    table = table[table["class"] != ""].drop_duplicates(["id", "interpreter"])
    by_unit = {str(i): part for i, part in table.groupby("id")}
    final: dict[str, str] = {}
    decided: dict[str, str] = {}
    open_: list[str] = []
    for i, part in by_unit.items():
        said = dict(zip(part["interpreter"], part["class"], strict=True))
        found = _final(said, sample.primary)
        if found is None:
            open_.append(f"{i}: " + ", ".join(f"{who} says {what}" for who, what in said.items()))
        else:
            final[i], decided[i] = found
    asked = _asked(points, final)
    missing = [f"{i}: no answer" for i in asked if i not in by_unit]
    problems = missing + [p for p in open_ if p.split(":", 1)[0] in set(asked)]
    if problems:
        raise DesignError(
            listed(problems), where="sample.answers",
            allowed="one final answer for every drawn unit",
            fix="answer the missing ones (the labelling page can show only these, with key u); "
            "where interpreters differ, add rows of the interpreter `consensus` or set "
            "`sample.primary`",
        )  # fmt: skip
    unclear = tuple(i for i in asked if final[i] == CANNOT_TELL)
    first = int((points["reserve"] == 0).sum())
    if len(unclear) > sample.max_unclear_pct / 100 * first:
        raise DesignError(
            f"{len(unclear)} of {first} units cannot be told", where="sample.answers",
            allowed=f"at most {sample.max_unclear_pct:g}% (sample.max_unclear_pct)",
            fix="use finer images or a visit; a sample with many holes tells little about the rest",
        )  # fmt: skip
    classes = {i: final[i] for i in asked if final[i] != CANNOT_TELL}
    decided = {i: decided[i] for i in asked}
    said = _people(table)
    return Answers(classes, unclear, decided, said, _facts(table, said, decided))


def _final(said: Mapping[str, str], primary: str | None) -> tuple[str, str] | None:
    if CONSENSUS in said:
        return said[CONSENSUS], "consensus"
    counts = Counter(said.values()).most_common()
    if len(counts) == 1:
        return counts[0][0], "single" if len(said) == 1 else "agreement"
    if len(said) > 2 and counts[0][1] > len(said) / 2:
        return counts[0][0], "majority"
    if primary in said:
        return said[str(primary)], "primary"
    return None


def _asked(points: gpd.GeoDataFrame, final: Mapping[str, str]) -> list[str]:
    """Units whose answers count: the drawn ones, and a reserve unit for each that is unclear."""
    ids = points["id"].astype(str)
    asked = list(ids[points["reserve"] == 0])
    stratum = dict(zip(ids, points["stratum"], strict=True))
    reserve: dict[int, list[str]] = {}
    for i in ids[points["reserve"] == 1]:
        reserve.setdefault(stratum[i], []).append(i)
    for i in asked:  # grows while it is read: an unclear reserve unit calls for the next one
        if final.get(i) == CANNOT_TELL and reserve.get(stratum[i]):
            asked.append(reserve[stratum[i]].pop(0))
    return asked


def _people(table: pd.DataFrame) -> dict[str, dict[str, str]]:
    """What each interpreter said, by unit; without the consensus."""
    every = table[table["interpreter"] != CONSENSUS].groupby("interpreter")
    return {str(w): dict(zip(p["id"], p["class"], strict=True)) for w, p in every}


def _facts(
    table: pd.DataFrame, said: Mapping[str, Mapping[str, str]], decided: Mapping[str, str]
) -> dict[str, Any]:
    """Who answered how many units, how sure they were, and how units were settled."""
    confidence = Counter(c for c in table["confidence"] if c)
    return {
        "interpreters": {who: len(units) for who, units in said.items()},
        "decided_by": dict(sorted(Counter(decided.values()).items())),
        "confidence": {c: confidence[c] for c in CONFIDENCE if c in confidence},
    }
