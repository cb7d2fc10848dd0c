"""From rules to items: which band of which file is which band of which date."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from terraloom.acquire.filespec import LocalSource, Rule
from terraloom.acquire.planes import Plane, planes_of, polsar_planes
from terraloom.acquire.static import lonlat_box
from terraloom.errors import ConfigError, SceneError

__all__ = ["LocalItem", "local_items"]

#: Bands whose times differ by less are one acquisition.
_SAME_PASS = timedelta(minutes=10)
#: Time of day where only the date is known, hours of mean solar time: satellites of land optics
#: cross at about half past ten.
_SOLAR_HOUR = 10.5
#: Date of static sources that give none.
_STATIC = datetime(2000, 1, 1, tzinfo=UTC)
_WILD = re.compile(r"[*?\[]")
_FORMATS = {10: "%Y-%m-%d", 8: "%Y%m%d", 7: "%Y%j", 15: "%Y%m%dT%H%M%S", 19: "%Y-%m-%dT%H:%M:%S"}


@dataclass
class LocalItem:
    """One acquisition: its time, whether the time of day is known, its bands and their times."""

    when: datetime
    name: str
    planes: dict[str, Plane] = field(default_factory=dict)
    times: dict[str, datetime] = field(default_factory=dict)
    cloud_pct: float | None = None
    timed: bool = False


@dataclass(frozen=True)
class _Entry:
    band: str
    plane: Plane
    when: datetime
    name: str
    cloud_pct: float | None


def local_items(source: LocalSource, spec: Path) -> list[LocalItem]:
    """Items of a source, sorted by time.

    Args:
        source: The source.
        spec: File that describes it; paths start from its folder.

    Raises:
        ConfigError: A rule that finds no file, or a table without the columns needed.
        SceneError: A file without date or band, two files for one band of one date, damaged files.
    """
    entries: list[_Entry] = []
    folder = spec.parent
    for n, rule in enumerate(source.files):
        where = f"{spec.as_posix()}, files.{n}"
        found = [e for e in _entries(source, rule, folder, where) if _wanted(source, e)]
        if not found:
            raise ConfigError(
                "no band of any date in these files",
                where=where,
                allowed="files whose bands and dates are named by the rule, from start to end",
                fix="correct path, pattern and bands of the rule, or start and end of the source",
            )
        entries += found
    items: list[LocalItem] = []
    by_name: dict[str, list[LocalItem]] = {}
    for e in sorted(entries, key=lambda e: e.when):
        mine = by_name.setdefault(e.name, [])
        item = _item_of(e, mine, spec.as_posix())
        if item is None:
            item = LocalItem(e.when, e.name)
            mine.append(item)
            items.append(item)
        item.planes[e.band], item.times[e.band] = e.plane, e.when
        if e.cloud_pct is not None:
            item.cloud_pct = e.cloud_pct
    for item in items:
        _set_time(item, source)
    return sorted(items, key=lambda i: (i.when, i.name))


def _wanted(source: LocalSource, e: _Entry) -> bool:
    if source.static:
        return True
    day = e.when.date()
    early = source.start is not None and day < source.start.date()
    return not early and (source.end is None or day <= source.end.date())


def _item_of(e: _Entry, items: list[LocalItem], where: str) -> LocalItem | None:
    """Item that a band belongs to; None where it begins a new one.

    Bands of one pass may differ by seconds, and two frames of one orbit too: a band goes to the
    nearest item in time that is still without it.
    """
    near = [i for i in items if e.when - i.when <= _SAME_PASS]
    for item in near:
        if item.times.get(e.band) == e.when:
            raise SceneError(
                f"two files for band {e.band} of {e.when:%Y-%m-%d %H:%M}: "
                f"{item.planes[e.band].file.name} and {e.plane.file.name}",
                where=where,
                allowed="one file per band and date",
                fix="name what differs by the group (?P<item>..), or narrow the path",
            )
    free = [i for i in near if e.band not in i.planes]
    return max(free, key=lambda i: i.when, default=None)


def _set_time(item: LocalItem, source: LocalSource) -> None:
    item.timed = (item.when.hour, item.when.minute, item.when.second) != (0, 0, 0)
    if source.kind == "optical" and not item.timed:
        place = lonlat_box(next(iter(item.planes.values())).geobox).centroid
        item.when += timedelta(hours=(_SOLAR_HOUR - place.x / 15) % 24)
        item.when = item.when.replace(microsecond=0)


def _entries(source: LocalSource, rule: Rule, folder: Path, where: str) -> Iterator[_Entry]:
    dates = _dates(rule, folder, where)
    for file, below, row in _files(rule, folder, where):
        groups = {**_groups(rule, below, where), **row}
        planes = polsar_planes(file) if rule.format == "polsarpro" else planes_of(file)
        cloud = groups.get("cloud_pct")
        for band, plane in _bands(source, rule, planes, groups, dates, where):
            placed = plane.placed(rule.crs, rule.transform)
            when = _when(source, rule, placed, groups, dates)
            yield _Entry(
                band, placed, when, groups.get("item") or rule.item or "",
                float(cloud) if cloud else None,
            )  # fmt: skip


# --- files --------------------------------------------------------------------------------------


def _files(rule: Rule, folder: Path, where: str) -> Iterator[tuple[Path, str, dict[str, str]]]:
    """Files (or folders) of a rule, the part of their path that patterns see, their table row."""
    if rule.table is not None:
        yield from _table(folder / rule.table, where)
        return
    parts = Path(str(rule.path)).parts
    fixed = next((n for n, p in enumerate(parts) if _WILD.search(p)), len(parts) - 1)
    base = folder.joinpath(*parts[:fixed])
    wanted_dir = rule.format == "polsarpro"
    found = sorted(
        p
        for p in base.glob("/".join(parts[fixed:]))
        if p.is_dir() == wanted_dir and not p.name.endswith(".aux.xml")
    )
    if not found:
        raise ConfigError(
            f"no {'folder' if wanted_dir else 'file'} matches {rule.path!r}",
            where=f"{where}.path",
            allowed=f"a path from {folder.as_posix()}",
            fix="correct the path; wildcards are * ? [] and **",
        )
    for p in found:
        yield p, p.relative_to(base).as_posix(), {}


def _table(path: Path, where: str) -> Iterator[tuple[Path, str, dict[str, str]]]:
    known = {"path", "date", "band", "item", "cloud_pct"}
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            rows = list(csv.DictReader(f))
    except (OSError, UnicodeDecodeError, csv.Error) as err:
        raise ConfigError(f"the table cannot be read ({err})", where=f"{where}.table") from err
    columns = set(rows[0]) if rows else set()
    if "path" not in columns or columns - known:
        raise ConfigError(
            f"columns {', '.join(sorted(map(str, columns))) or '(none)'}",
            where=path.as_posix(), allowed="path, and date, band, item, cloud_pct",
            fix="rename the columns; the first line names them",
        )  # fmt: skip
    for row in rows:
        text = {k: v.strip() for k, v in row.items() if v and v.strip()}
        if "path" not in text:
            raise ConfigError("a line without path", where=path.as_posix())
        name = text.pop("path")
        yield path.parent / name, name, text


def _groups(rule: Rule, below: str, where: str) -> dict[str, str]:
    if rule.pattern is None:
        return {}
    match = re.search(rule.pattern, below)
    if match is None:
        raise ConfigError(
            f"{below} does not match the pattern {rule.pattern!r}",
            where=where,
            fix="correct the pattern, or narrow the path to the files it is meant for",
        )
    return {k: v for k, v in match.groupdict().items() if v is not None}


# --- dates --------------------------------------------------------------------------------------


def _dates(rule: Rule, folder: Path, where: str) -> list[datetime] | None:
    if not isinstance(rule.dates, str):
        return rule.dates
    try:
        lines = (folder / rule.dates).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"the dates cannot be read ({err})", where=f"{where}.dates") from err
    return [_parse(line, rule, f"{where}.dates {rule.dates}") for line in lines]


def _parse(text: str, rule: Rule, where: str) -> datetime:
    try:
        return datetime.strptime(text, rule.date_format or _FORMATS.get(len(text), "%Y-%m-%d"))
    except ValueError as err:
        raise SceneError(
            f"the date {text!r} cannot be read",
            where=where,
            allowed=rule.date_format or "2018-05-01, 20180501, 2018121, 20180501T103021",
            fix="correct the pattern, or give date_format",
        ) from err


def _when(
    source: LocalSource,
    rule: Rule,
    plane: Plane,
    groups: Mapping[str, str],
    dates: list[datetime] | None,
) -> datetime:
    where = plane.file.as_posix()
    if plane.when is not None:
        return plane.when
    when = rule.date
    if dates is not None:
        when = dates[plane.index - 1]
    elif "date" in groups:
        when = _parse(groups["date"], rule, where)
    if when is None and source.static:
        return _STATIC
    if when is None:
        raise SceneError(
            "the file has no date",
            where=where,
            allowed="a time axis (netCDF), the group (?P<date>..) of the pattern, a column date, "
            "`date` or `dates`",
            fix="give one of them in the spec, or `static: true`",
        )
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    if rule.time is not None and (when.hour, when.minute) == (0, 0):
        when = when.replace(hour=int(rule.time[:2]), minute=int(rule.time[3:]))
    return when


# --- bands --------------------------------------------------------------------------------------


def _bands(
    source: LocalSource,
    rule: Rule,
    planes: list[Plane],
    groups: Mapping[str, str],
    dates: list[datetime] | None,
    where: str,
) -> list[tuple[str, Plane]]:
    """Band key of each plane that is used."""
    file = planes[0].file.as_posix() if planes else where
    declared = [*source.bands, *source.layers]
    named = rule.bands if isinstance(rule.bands, dict) else {}
    if rule.bands == "wavelengths":
        return _by_wavelength(planes, file)
    if dates is not None and len(dates) != len(planes):
        raise SceneError(
            f"{len(planes)} bands, {len(dates)} dates", where=file,
            allowed="one date per band", fix="correct `dates` of the rule",
        )  # fmt: skip
    if "band" in groups:
        band = _by_text(groups["band"], named, declared)
        if band is None:
            return []
        return [(band, p) for p in _single(planes, dates, file)]
    if dates is not None:
        only = list(named) or declared
        if len(only) != 1:
            raise ConfigError(
                f"the bands of {file} are dates, and {len(only)} band names", where=where,
                allowed="one name under `bands` of the rule, or the group (?P<band>..)",
            )  # fmt: skip
        return [(only[0], p) for p in planes]
    if named:
        return [(k, p) for k, at in named.items() for p in _located(planes, at, file)]
    if rule.format == "polsarpro":
        return [(p.name, p) for p in planes]
    mine = [(p.name, p) for p in planes if p.name in declared]
    if not mine and len(declared) == 1 and len(planes) == 1:
        mine = [(declared[0], planes[0])]
    if not mine:
        raise SceneError(
            f"which of its {len(planes)} bands are meant is not said",
            where=file,
            allowed=f"numbers 1 to {len(planes)}, or names: {_names(planes)}",
            fix="give `bands` in the rule, like {red: 3, nir: 4}",
        )
    return mine


def _names(planes: list[Plane]) -> str:
    names = list(dict.fromkeys(p.name for p in planes if p.name))
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "(none)"


def _by_text(text: str, named: Mapping[str, int | str], declared: list[str]) -> str | None:
    """Band key of a text found in a file name; None for bands that are not wanted."""
    if named:
        return next((k for k, v in named.items() if str(v) == text), None)
    return text if not declared or text in declared else None


def _single(planes: list[Plane], dates: list[datetime] | None, file: str) -> list[Plane]:
    timed = all(p.when is not None for p in planes) and len({p.name for p in planes}) == 1
    if len(planes) > 1 and dates is None and not timed:
        raise SceneError(
            f"{len(planes)} bands in a file whose name tells the band", where=file,
            allowed="one band, or `dates`", fix="leave the group band out and give `bands`",
        )  # fmt: skip
    return planes


def _located(planes: list[Plane], at: int | str, file: str) -> list[Plane]:
    if isinstance(at, int):
        found = [p for p in planes if p.index == at]
    else:
        found = [p for p in planes if p.name == at]
    variables = {p.name for p in found}
    if not found or (isinstance(at, int) and len(found) > 1):
        raise SceneError(
            f"band {at!r} is not there"
            if not found
            else f"band {at} of {len(variables)} variables",
            where=file,
            allowed=f"numbers 1 to {max(p.index for p in planes)}, or names: {_names(planes)}",
            fix="correct `bands` of the rule",
        )
    if len(found) > 1 and any(p.when is None for p in found):
        raise SceneError(
            f"{at!r} names {len(found)} bands without time axis", where=file,
            allowed="names of single bands", fix="use numbers, or `dates`, or `wavelengths`",
        )  # fmt: skip
    return found


def _by_wavelength(planes: list[Plane], file: str) -> list[tuple[str, Plane]]:
    """Bands named ``w`` and nanometres, with a tenth where whole numbers collide."""
    waves = [p.wavelength_um for p in planes]
    if any(w is None for w in waves):
        raise SceneError(
            f"{sum(w is None for w in waves)} of {len(planes)} bands have no wavelength",
            where=file, allowed="ENVI `wavelength` in the header, or a netCDF axis in nm or um",
            fix="number the bands instead (`bands`)",
        )  # fmt: skip
    nm = [1000 * w for w in waves if w is not None]
    whole = [f"w{v:04.0f}" for v in nm]
    times = len({p.when for p in planes})
    fine = len(set(whole)) * times < len(planes)
    names = [f"w{v:06.1f}".replace(".", "_") for v in nm] if fine else whole
    if len(set(names)) * times < len(planes):
        raise SceneError("several bands of one wavelength", where=file, fix="number the bands")
    return list(zip(names, planes, strict=True))
