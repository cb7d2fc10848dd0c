"""Names and attributes of groups: pixel size, order, roles."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from terraloom.errors import ConfigError
from terraloom.io import read_store, write_store
from terraloom.preprocess.groups import FACTORS, group_factor, group_facts, group_order


def test_the_pixel_size_stands_at_the_end_of_the_name() -> None:
    names = {"s2_10": 1, "l8_30": 3, "hls_30": 3, "modis_240": 24, "my_lidar-2_480": 48}
    assert {n: group_factor(n) for n in names} == names
    assert all(48 % f == 0 for f in FACTORS)


@pytest.mark.parametrize(
    "name", ["s2", "s2_", "_10", "s2_15", "modis_250", "x_0", "1_10", "a.b_10"]
)
def test_other_names_are_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(ConfigError, match="240, 480 metres"):
        group_factor(name)


def test_order_does_not_depend_on_the_order_of_a_store() -> None:
    want = ["s2_10", "s1_10", "dem_10", "a_10", "s2_20", "hls_30", "l8_30", "s2_60", "modis_240"]
    for some in itertools.islice(itertools.permutations(want), 0, 100_000, 999):
        assert group_order(some) == want


def test_facts_come_from_attributes_as_mapping_or_text(tmp_path: Path) -> None:
    roles = {"SR_B4": "B04", "SR_B5": "B8A"}
    for given in (roles, json.dumps(roles)):
        attrs = {"kind": "optical", "unit": "reflectance", "roles": given}
        data = xr.Dataset({"l8_30": (("y", "x"), np.zeros((2, 2)), attrs)})
        write_store(tmp_path / "a.zip", data)
        facts = group_facts("l8_30", read_store(tmp_path / "a.zip")["l8_30"].attrs)
        assert (facts.kind, facts.unit, facts.roles) == ("optical", "reflectance", roles)
        assert facts.band("B04") == "SR_B4" and facts.band("B02") is None


def test_without_attributes_only_sentinel_2_has_roles() -> None:
    assert group_facts("s2_20", {}).roles["B8A"] == "B8A"
    assert group_facts("s2_20", {"roles": {}}).roles == {}
    assert group_facts("l8_30", {}).roles == {}
