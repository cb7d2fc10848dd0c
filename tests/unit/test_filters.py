"""CQL2 JSON applied to items here: comparisons, missing properties, what is refused."""

from __future__ import annotations

import pytest

from terraloom.acquire.filters import check_filter, matches_filter
from terraloom.errors import ConfigError

ITEM = {
    "id": "S2A_x",
    "collection": "c",
    "properties": {
        "datetime": "2023-06-01T10:00:00Z", "eo:cloud_cover": 12.5, "sat:orbit_state": "descending",
        "sat:relative_orbit": 65, "platform": "sentinel-2a", "instruments": ["msi"], "flag": True,
    },
}  # fmt: skip
CLOUD, ORBIT, NONE = ({"property": n} for n in ("eo:cloud_cover", "sat:orbit_state", "not:there"))


def _op(op: str, *args):
    return {"op": op, "args": list(args)}


CASES = [
    (_op("<", CLOUD, 20), True),
    (_op("<", CLOUD, 12.5), False),
    (_op("<=", CLOUD, 12.5), True),
    (_op(">", CLOUD, 12), True),
    (_op(">=", CLOUD, 13), False),
    (_op("=", ORBIT, "descending"), True),
    (_op("<>", ORBIT, "descending"), False),
    (_op("=", {"property": "properties.sat:orbit_state"}, "descending"), True),
    (_op("=", {"property": "id"}, "S2A_x"), True),
    (_op("between", CLOUD, 10, 20), True),
    (_op("between", CLOUD, [13, 20]), False),
    (_op("in", {"property": "sat:relative_orbit"}, [22, 65]), True),
    (_op("in", ORBIT, ["ascending"]), False),
    (_op("like", {"property": "platform"}, "sentinel-2%"), True),
    (_op("like", {"property": "platform"}, "sentinel-1%"), False),
    (_op("isNull", NONE), True),
    (_op("isNull", CLOUD), False),
    (_op(">=", {"property": "datetime"}, {"timestamp": "2023-06-01T00:00:00Z"}), True),
    (_op("<", {"property": "datetime"}, {"timestamp": "2023-06-01T05:00:00-05:00"}), False),
    (_op("<", {"property": "datetime"}, {"date": "2023-06-02"}), True),
    (_op("=", {"property": "flag"}, True), True),
    (_op("and", _op("<", CLOUD, 20), _op("=", ORBIT, "descending")), True),
    (_op("and", _op("<", CLOUD, 20), _op("=", ORBIT, "ascending")), False),
    (_op("or", _op("<", CLOUD, 2), _op("=", ORBIT, "descending")), True),
    (_op("not", _op("<", CLOUD, 2)), True),
    # A missing property is unknown, and unknown is not true, nor is its negation.
    (_op("<", NONE, 20), False),
    (_op("not", _op("<", NONE, 20)), False),
    (_op("<>", NONE, "x"), False),
    (_op("or", _op("<", NONE, 20), _op("<", CLOUD, 20)), True),
    (_op("and", _op("<", NONE, 20), _op("<", CLOUD, 20)), False),
    (_op("not", _op("and", _op("<", NONE, 20), _op("<", CLOUD, 2))), True),
    (_op("between", NONE, 1, 2), False),
    (_op("in", NONE, [1]), False),
    (_op("<", ORBIT, 5), False),  # text against a number
    (_op("=", {"property": "instruments"}, "msi"), False),  # lists are not compared
]


@pytest.mark.parametrize(("condition", "kept"), CASES)
def test_conditions(condition, kept):
    check_filter(condition)
    assert matches_filter(ITEM, condition) is kept


@pytest.mark.parametrize(
    ("condition", "named"),
    [
        (_op("s_intersects", {"property": "geometry"}, {"type": "Point"}), "s_intersects"),
        (_op("+", CLOUD, 1), r"operator '\+'"),
        (_op("<", CLOUD), "1 operands"),
        (_op("<", CLOUD, {"op": "*", "args": [2, 3]}), "operand"),
        (_op("<", CLOUD, None), "operand None"),
        (_op("in", CLOUD, 5), "without a list"),
        (_op("between", CLOUD, 5), "2 operands"),
        (_op("not", _op("<", CLOUD, 1), _op("<", CLOUD, 1)), "2 conditions"),
        (_op("and"), "0 conditions"),
        (_op("<", {"timestamp": "soon"}, CLOUD), "operand"),
        ({"op": "<"}, "not a condition"),
        ({"eo:cloud_cover": {"lt": 20}}, "not a condition"),
        ("eo:cloud_cover < 20", "not a condition"),
    ],
)
def test_what_is_not_understood_is_refused_with_an_example(condition, named):
    with pytest.raises(ConfigError, match=named) as err:
        check_filter(condition)
    assert "sources[].filter" in str(err.value)
    assert "eo:cloud_cover" in str(err.value)
