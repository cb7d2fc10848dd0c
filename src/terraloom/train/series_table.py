"""Labelled pixel series: what networks of series are trained on, and reading them from a CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from terraloom.errors import LabelError, ModelError
from terraloom.labels.knndm import group_folds
from terraloom.labels.leakage import degree_blocks

__all__ = ["SeriesTable", "read_series", "season_of"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
YEAR_DAYS = 365.25


@dataclass(frozen=True)
class SeriesTable:
    """Labelled pixel series.

    Attributes:
        x: (N, T, B) float32 values, NaN = missing.
        days: (N, T) float32 day of year, NaN = padding.
        y: (N,) class 0 .. K-1.
        fold: (N,) fold, 0 to 254.
        bands: Names of the B bands.
        classes: Names of the K classes.
    """

    x: Floats
    days: Floats
    y: Ints
    fold: Ints
    bands: tuple[str, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        def refuse(found: str, allowed: str, fix: str = "") -> None:
            raise ModelError(found, where="SeriesTable", allowed=allowed, fix=fix)

        n, k = len(self.x), len(self.classes)
        if self.x.ndim != 3 or self.x.shape[2] != len(self.bands) or n == 0:
            refuse(f"values of shape {self.x.shape}", f"(N, T, {len(self.bands)}), N above 0")
        for name, want in (("days", self.x.shape[:2]), ("y", (n,)), ("fold", (n,))):
            if getattr(self, name).shape != want:
                refuse(f"{name} of shape {getattr(self, name).shape}", str(want))
        if not np.issubdtype(self.y.dtype, np.integer) or self.y.min() < 0 or self.y.max() >= k:
            refuse(f"classes {self.y.min()} to {self.y.max()}", f"integers 0 to {k - 1}",
                   "leave out series without a class")  # fmt: skip
        if self.fold.min() < 0 or self.fold.max() > 254:
            refuse(f"folds {self.fold.min()} to {self.fold.max()}", "0 to 254")
        infinite = np.isinf(self.x).any((1, 2))
        if infinite.any():
            refuse(f"infinite values in {int(infinite.sum())} series, the first is row "
                   f"{int(infinite.argmax())}", "numbers, or NaN where missing",
                   "write NaN, or look where these values come from")  # fmt: skip
        nowhere = (np.isfinite(self.x).any(-1) & ~np.isfinite(self.days)).any(1)
        if nowhere.any():
            refuse(f"values without a day in {int(nowhere.sum())} series, the first is row "
                   f"{int(nowhere.argmax())}", "a day for each date with values")  # fmt: skip

    def rows(self, keep: npt.ArrayLike) -> SeriesTable:
        """Some of the rows, by index or mask."""
        at = np.asarray(keep)
        return replace(self, x=self.x[at], days=self.days[at], y=self.y[at], fold=self.fold[at])


def read_series(
    path: Path | str,
    *,
    bands: Sequence[str] = (),
    group: str = "",
    block_deg: float = 1.0,
    folds: int = 10,
    seed: int = 0,
) -> SeriesTable:
    """Series of a CSV file with one row per sample and date.

    Args:
        path: Columns ``sample`` (id), ``date`` (ISO 8601), ``class``, one column per band (empty
            or NaN = missing), and either ``x`` and ``y`` (longitude and latitude, degrees) or the
            column named by ``group``. Rows in any order.
        bands: Columns to read; none = all numeric columns that have no other meaning.
        group: Column of groups that stay whole (parcel, region, year); empty = blocks of degrees.
        block_deg: Width of a block (degrees).
        folds: Folds that the blocks or groups are dealt to (count).
        seed: Of that deal.

    Returns:
        The table. Days count on from 1 January of the year in which a series begins, from 1.

    Raises:
        LabelError: Columns that are missing, dates that cannot be read, a class or place that
            changes within a sample, a date given twice, or no series at all.
        FoldError: Fewer blocks or groups than folds.
    """
    where = Path(path).name
    fixed = ["sample", "date", "class", *([group] if group else ["x", "y"])]
    rows = _read_csv(path, fixed, where)
    rows = rows.sort_values(["sample", "date"], kind="stable").reset_index(drop=True)
    names = list(bands) or [
        c for c in rows.columns
        if c not in {*fixed, "x", "y"} and pd.api.types.is_numeric_dtype(rows[c])
    ]  # fmt: skip
    absent = [b for b in names if b not in rows or not pd.api.types.is_numeric_dtype(rows[b])]
    if absent or not names:
        raise LabelError(
            f"no column of numbers named {', '.join(absent)}" if absent else "no band",
            where=where, allowed="one column of numbers per band",
        )  # fmt: skip
    _check_samples(rows, ["class", *fixed[3:]], where)
    first = rows.groupby("sample", sort=True).first()
    x, days = _arrays(rows, names, len(first))
    classes, y = np.unique(first["class"].astype(str), return_inverse=True)
    ids = first[group] if group else degree_blocks(first["x"], first["y"], block_deg)
    fold = group_folds(ids, count=folds, rng=np.random.default_rng(seed))
    return SeriesTable(x, days, y.astype(np.int64), fold, tuple(names), tuple(map(str, classes)))


def season_of(table: SeriesTable) -> dict[str, float]:
    """Start of the season and its length, from the dates of the series.

    Returns:
        ``start_day``: the earliest first date of a series, on the circle of the year (day of year);
        ``period_days``: whole years that hold the longest series (days).
    """
    seen = np.isfinite(table.days)
    first = np.where(seen, table.days, np.inf).min(1)
    last = np.where(seen, table.days, -np.inf).max(1)
    some = seen.any(1)
    if not some.any():
        return {"start_day": 1.0, "period_days": YEAR_DAYS}
    angle = 2 * np.pi * first[some] / YEAR_DAYS
    middle = np.arctan2(np.sin(angle).mean(), np.cos(angle).mean()) * YEAR_DAYS / (2 * np.pi)
    off = (first[some] - middle + YEAR_DAYS / 2) % YEAR_DAYS - YEAR_DAYS / 2
    start = float(np.round((middle + off.min()) % YEAR_DAYS, 2))
    # A series that begins later in the season than others ends later too.
    span = float((last[some] - first[some] + off - off.min()).max())
    return {"start_day": start, "period_days": YEAR_DAYS * max(1.0, np.ceil(span / 366.0))}


def _read_csv(path: Path | str, fixed: Sequence[str], where: str) -> pd.DataFrame:
    try:
        rows = pd.read_csv(path)
    except FileNotFoundError as err:
        raise LabelError("no such file", where=where) from err
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as err:
        raise LabelError(f"no table that can be read ({err})", where=where,
                         allowed="CSV with a header, UTF-8") from err  # fmt: skip
    missing = [c for c in fixed if c not in rows]
    if missing:
        raise LabelError(f"no column {', '.join(missing)}", where=where,
                         allowed=f"columns {', '.join(fixed)} and the bands",
                         fix=f"it has {', '.join(map(str, rows.columns))}")  # fmt: skip
    gaps = rows[list(fixed)].isna().any(axis=1)
    if gaps.any() or rows.empty:
        raise LabelError(f"{int(gaps.sum())} rows of {len(rows)} without all of {', '.join(fixed)}",
                         where=where, allowed="a table with all of them in every row",
                         fix="fill them, or leave these rows out")  # fmt: skip
    try:
        dates = pd.to_datetime(rows["date"].astype(str), format="ISO8601")
    except ValueError as err:
        raise LabelError(f"dates that cannot be read ({err})", where=where,
                         allowed="ISO 8601, such as 2024-03-31") from err  # fmt: skip
    return rows.assign(date=dates)


def _check_samples(rows: pd.DataFrame, once: Sequence[str], where: str) -> None:
    """Each sample has one class and place, and each of its dates once."""
    for column in once:
        changing = rows.groupby("sample")[column].nunique().gt(1)
        if changing.any():
            raise LabelError(
                f"{column} changes within {int(changing.sum())} samples, the first is "
                f"{changing.idxmax()}", where=where, allowed="one per sample",
                fix="give each series an id of its own",
            )  # fmt: skip
    twice = rows.duplicated(["sample", "date"])
    if twice.any():
        row = rows[twice].iloc[0]
        raise LabelError(
            f"{int(twice.sum())} dates twice, the first is {row['date']:%Y-%m-%d} of sample "
            f"{row['sample']}", where=where, allowed="one row per sample and date",
            fix="keep one of them, or their mean",
        )  # fmt: skip


def _arrays(rows: pd.DataFrame, bands: Sequence[str], n: int) -> tuple[Floats, Floats]:
    """Values (N, T, B) and days (N, T) of rows in order of sample and date."""
    sample = rows.groupby("sample", sort=True).ngroup().to_numpy()
    position = rows.groupby("sample").cumcount().to_numpy()
    year = rows.groupby("sample")["date"].transform("min").dt.year
    origin = pd.to_datetime(year.astype(str) + "-01-01")
    day = (rows["date"] - origin).dt.total_seconds().to_numpy() // 86400 + 1
    shape = (n, int(position.max()) + 1)
    x = np.full((*shape, len(bands)), np.nan, np.float32)
    days = np.full(shape, np.nan, np.float32)
    x[sample, position] = rows[list(bands)].to_numpy(np.float32)
    days[sample, position] = day
    return x, days
