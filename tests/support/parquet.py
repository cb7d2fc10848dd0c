"""Just enough of Parquet to read the small test tables where no reader of Parquet is installed.

Flat columns without nested or missing values: plain and dictionary encoding, pages of version 1,
no compression or Snappy. The format: https://parquet.apache.org/docs/file-format/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["read_parquet"]

_PLAIN = {1: "<i4", 2: "<i8", 4: "<f4", 5: "<f8"}
_BYTE_ARRAY, _DICTIONARY_PAGE, _DATA_PAGE, _ENCODING_PLAIN = 6, 2, 0, 0


def read_parquet(path: Path | str) -> pd.DataFrame:
    """All columns of a flat table; timestamps are recognised by the column's annotation."""
    data = Path(path).read_bytes()
    if data[:4] != b"PAR1" or data[-4:] != b"PAR1":
        raise ValueError(f"{path}: no Parquet file")
    size = int.from_bytes(data[-8:-4], "little")
    meta = _Thrift(data[-8 - size : -8]).struct()
    schema = {e[4].decode(): e for e in meta[2][1:]}
    parts: dict[str, list[Any]] = {name: [] for name in schema}
    for group in meta[4]:
        for chunk in group[1]:
            name = b".".join(chunk[3][3]).decode()
            parts[name].append(_column(data, chunk[3], optional=schema[name].get(3) == 1))
    frame = pd.DataFrame({n: np.concatenate(p) for n, p in parts.items()})
    for name, element in schema.items():
        unit = element.get(10, {}).get(8, {}).get(2)
        if unit is not None:
            frame[name] = frame[name].astype(f"datetime64[{('ms', 'us', 'ns')[min(unit) - 1]}]")
    return frame


class _Thrift:
    """Reader of Thrift's compact protocol: structs are dicts by field number."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def varint(self) -> int:
        out = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            out |= (byte & 127) << shift
            if byte < 128:
                return out
            shift += 7

    def integer(self) -> int:
        n = self.varint()
        return (n >> 1) ^ -(n & 1)

    def value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self.integer()
        if kind == 12:
            return self.struct()
        if kind in (9, 10):
            head = self.data[self.at]
            self.at += 1
            count = self.varint() if head >> 4 == 15 else head >> 4
            return [self.item(head & 15) for _ in range(count)]
        size = {3: 1, 7: 8}.get(kind) or self.varint()
        self.at += size
        return self.data[self.at - size : self.at]

    def item(self, kind: int) -> Any:
        if kind in (1, 2):  # booleans of a list take a byte each
            self.at += 1
            return self.data[self.at - 1] == 1
        return self.value(kind)

    def struct(self) -> dict[int, Any]:
        out: dict[int, Any] = {}
        number = 0
        while (head := self.data[self.at]) != 0:
            self.at += 1
            number = number + (head >> 4) if head >> 4 else self.integer()
            out[number] = self.value(head & 15)
        self.at += 1
        return out


def _column(data: bytes, column: dict[int, Any], *, optional: bool) -> np.ndarray[Any, Any]:
    """Values of one column chunk."""
    at = min(column[9], column.get(11) or column[9])
    kind, words, parts, left = column[1], None, [], column[5]
    while left > 0:
        reader = _Thrift(data, at)
        head = reader.struct()
        at = reader.at + head[3]
        body = data[reader.at : at]
        if column[4] not in (0, 1) or head[1] not in (_DATA_PAGE, _DICTIONARY_PAGE):
            raise ValueError("this compression or kind of page is not supported")
        page = _unsnap(body) if column[4] == 1 else body
        if head[1] == _DICTIONARY_PAGE:
            words = _plain(page, kind, head[7][1])
            continue
        count = head[5][1]
        left -= count
        if optional:  # definition levels: all 1 where nothing is missing
            size = int.from_bytes(page[:4], "little")
            if not _runs(page[4 : 4 + size], 1, count).all():
                raise ValueError("missing values are not supported")
            page = page[4 + size :]
        if head[5][2] == _ENCODING_PLAIN:
            parts.append(_plain(page, kind, count))
        elif words is None:
            raise ValueError("a page refers to a dictionary that is not there")
        else:
            parts.append(words[_runs(page[1:], page[0], count)])
    return np.concatenate(parts)


def _plain(page: bytes, kind: int, count: int) -> np.ndarray[Any, Any]:
    if kind in _PLAIN:
        return np.frombuffer(page, _PLAIN[kind], count)
    if kind != _BYTE_ARRAY:
        raise ValueError(f"values of type {kind} are not supported")
    out, at = [], 0
    for _ in range(count):
        size = int.from_bytes(page[at : at + 4], "little")
        out.append(page[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return np.array(out, dtype=object)


def _runs(data: bytes, width: int, count: int) -> np.ndarray[Any, Any]:
    """Integers of the hybrid of run lengths and bit packing."""
    reader, parts, have = _Thrift(data), [], 0
    while have < count:
        head = reader.varint()
        size = (head >> 1) * width if head & 1 else (width + 7) // 8
        raw = data[reader.at : reader.at + size]
        reader.at += size
        if head & 1:
            bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
            parts.append(bits.reshape(-1, width) @ (1 << np.arange(width)))
        else:
            parts.append(np.full(head >> 1, int.from_bytes(raw, "little")))
        have += len(parts[-1])
    return np.concatenate(parts)[:count].astype(np.int64)


def _unsnap(data: bytes) -> bytes:
    """Decompress a raw Snappy block."""
    reader = _Thrift(data)
    size = reader.varint()
    out, at = bytearray(), reader.at
    while at < len(data):
        tag = data[at]
        at += 1
        if tag & 3 == 0:
            length, more = (tag >> 2) + 1, max(0, (tag >> 2) - 59)
            if more:
                length = int.from_bytes(data[at : at + more], "little") + 1
                at += more
            out += data[at : at + length]
            at += length
            continue
        if tag & 3 == 1:
            length, back = ((tag >> 2) & 7) + 4, ((tag >> 5) << 8) | data[at]
            at += 1
        else:
            width = 2 if tag & 3 == 2 else 4
            length, back = (tag >> 2) + 1, int.from_bytes(data[at : at + width], "little")
            at += width
        start = len(out) - back
        if back >= length:
            out += out[start : start + length]
        else:  # the copy overlaps what it writes
            for i in range(length):
                out.append(out[start + i])
    if len(out) != size:
        raise ValueError("broken Snappy block")
    return bytes(out)
