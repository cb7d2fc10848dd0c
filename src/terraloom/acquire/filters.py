"""Conditions on items in CQL2 JSON, for catalogues that cannot filter themselves.

Understood here: ``and or not``, ``= <> < <= > >=``, ``between``, ``in``, ``like`` and ``isNull`` on
properties of an item. A property that an item lacks makes a comparison unknown, as in CQL2 (OGC
21-065r2), and only items whose condition is true are kept.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from pystac.utils import str_to_datetime

from terraloom.errors import ConfigError

__all__ = ["check_filter", "matches_filter"]

_COMPARISONS = ("=", "<>", "<", "<=", ">", ">=")
_OPERATORS = (*_COMPARISONS, "and", "or", "not", "between", "in", "like", "isNull")
_WHERE = "sources[].filter"
_EXAMPLE = '{"op": "<=", "args": [{"property": "eo:cloud_cover"}, 20]}'
_TOP = ("id", "collection", "geometry", "bbox")


def check_filter(condition: Any) -> None:
    """Refuse a condition that :func:`matches_filter` cannot judge.

    Raises:
        ConfigError: Not CQL2 JSON, or an operator or operand that is not understood here.
    """
    op, args = _parts(condition)
    if op in ("and", "or", "not"):
        if not args or (op == "not" and len(args) != 1):
            raise _refused(f"operator {op!r} with {len(args)} conditions")
        for part in args:
            check_filter(part)
        return
    if op == "isNull":
        count = 1
    elif op == "between":
        args, count = _between(args), 3
    else:
        count = 2
    if len(args) != count:
        raise _refused(f"operator {op!r} with {len(args)} operands")
    if op == "in":
        if not isinstance(args[1], list):
            raise _refused("operator 'in' without a list of values")
        args = [args[0], *args[1]]
    for operand in args:
        _check_operand(operand)


def matches_filter(item: dict[str, Any], condition: dict[str, Any]) -> bool:
    """Whether a STAC item fulfils a condition that :func:`check_filter` has passed.

    Args:
        item: STAC item.
        condition: CQL2 JSON. Properties are named as in the item (``eo:cloud_cover``), also with
            ``properties.`` before; ``id`` and ``collection`` are the item's own.
    """
    return _judge(item, condition) is True


def _judge(item: dict[str, Any], condition: Any) -> bool | None:
    """True, false, or None where a property is missing."""
    op, args = _parts(condition)
    if op == "not":
        inner = _judge(item, args[0])
        return None if inner is None else not inner
    if op in ("and", "or"):
        found = [_judge(item, a) for a in args]
        decided = op == "or"  # one such part decides the whole
        return decided if decided in found else (None if None in found else not decided)
    if op == "isNull":
        return _value(item, args[0]) is None
    if op == "between":
        value, low, high = (_value(item, a) for a in _between(args))
        above, below = _compare(">=", value, low), _compare("<=", value, high)
        if above is False or below is False:
            return False
        return None if above is None or below is None else True
    if op == "in":
        value = _value(item, args[0])
        found = [_compare("=", value, _value(item, a)) for a in args[1]]
        return True if True in found else (None if None in found else False)
    return _compare(op, _value(item, args[0]), _value(item, args[1]))


def _compare(op: str, a: Any, b: Any) -> bool | None:
    if a is None or b is None:
        return None
    if isinstance(a, datetime) or isinstance(b, datetime):
        a, b = _time(a), _time(b)
        if a is None or b is None:
            return None
    if op == "like":
        if not (isinstance(a, str) and isinstance(b, str)):
            return None
        pattern = re.escape(b).replace("%", ".*").replace("_", ".")
        return re.fullmatch(pattern, a, re.DOTALL) is not None
    if op in ("=", "<>"):
        return bool((a == b) == (op == "="))
    try:
        return bool({"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[op])
    except TypeError:  # text against a number
        return None


def _value(item: dict[str, Any], operand: Any) -> Any:
    if not isinstance(operand, dict):
        return operand
    if "property" not in operand:
        return _time(operand.get("timestamp", operand.get("date")))
    name = str(operand["property"])
    if name in _TOP:
        return item.get(name)
    value = item.get("properties", {}).get(name.removeprefix("properties."))
    return None if isinstance(value, (dict, list)) else value


def _time(value: Any) -> datetime | None:
    if isinstance(value, datetime):
        return value
    try:
        time = str_to_datetime(str(value))
    except (ValueError, OverflowError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _parts(condition: Any) -> tuple[str, list[Any]]:
    if not isinstance(condition, dict) or not isinstance(condition.get("args"), list):
        raise _refused(f"{condition!r} is not a condition in CQL2 JSON")
    op = str(condition.get("op"))
    op = {"eq": "=", "!=": "<>", "neq": "<>"}.get(op, op)
    if op not in _OPERATORS:
        raise _refused(f"operator {op!r}")
    return op, condition["args"]


def _between(args: list[Any]) -> list[Any]:
    """Operands of ``between``: some write the two bounds as one list."""
    if len(args) == 2 and isinstance(args[1], list):
        return [args[0], *args[1]]
    return args


def _check_operand(operand: Any) -> None:
    if isinstance(operand, dict):
        known = len(operand) == 1 and next(iter(operand)) in ("property", "timestamp", "date")
        if known and ("property" in operand or _value({}, operand) is not None):
            return
    elif isinstance(operand, (str, int, float, bool)):
        return
    raise _refused(f"operand {operand!r}")


def _refused(found: str) -> ConfigError:
    return ConfigError(
        f"{found} cannot be applied to items of this catalogue, which does not filter by itself",
        where=_WHERE,
        allowed=", ".join(_OPERATORS) + f" on properties, as {_EXAMPLE}",
        fix="simplify the filter, or use a catalogue that filters (conformance class cql2-json)",
    )
