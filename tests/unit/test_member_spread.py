"""Spread of regional figures between the networks, from what prediction keeps of each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from shapely.geometry import Polygon, box

from terraloom.assess.member_spread import MemberCells, member_spread
from terraloom.config.base import TaskKind
from terraloom.config.labels import Task
from terraloom.grid import CampaignGrid
from terraloom.predict.layers import Layers
from terraloom.predict.members import decode_members, encode_members
from terraloom.predict.tilewriter import TileWriter, encoded
from terraloom.predict.windows import Window, cut
from terraloom.preprocess.reasons import Reason
from terraloom.train.ensemble import Calibration

TASKS = [
    Task.model_validate({"name": "cover", "kind": "segmentation", "classes": "c.csv",
                         "labels": {"file": "l.gpkg", "column": "c"}}),
    Task.model_validate({"name": "height", "kind": "regression",
                         "labels": {"file": "l.gpkg", "column": "h"}}),
]  # fmt: skip
SHARP = Calibration("vector", (1.3, 1.3, 1.3), (0.0, 0.2, -0.1))
LAYERS = Layers(TASKS, {"cover": SHARP}, spread=True)
M, H, W = 4, 138, 186


def predicted() -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(5)
    p = rng.dirichlet([1.0, 2.0, 3.0], (M, H, W)).transpose(0, 3, 1, 2).astype(np.float32)
    height = np.stack([rng.normal(9, 3, (M, H, W)), rng.random((M, H, W))], axis=1)
    reasons = np.where(rng.random((H, W)) < 0.2, int(Reason.NODATA), 0).astype(np.uint8)
    reasons[:12, :12] = int(Reason.NODATA)
    p[:, :, :12, :12] = np.nan
    return {"cover": p, "height": height.astype(np.float32)}, reasons


def calibrated(p: np.ndarray) -> np.ndarray:
    z = np.log(p) * 1.3 + np.array([0.0, 0.2, -0.1])[:, None, None]
    e = np.exp(z)
    return e / e.sum(axis=1, keepdims=True)


def test_cells_hold_the_mean_of_their_valid_pixels() -> None:
    values, reasons = predicted()
    valid, p = reasons == 0, values["cover"]
    found = decode_members(encode_members(p, valid, TaskKind.SEGMENTATION))
    assert found.shape == (M, 3, H // 6, W // 6)
    here = valid[30:36, 60:66]
    assert found[2, 1, 5, 10] == pytest.approx(p[2, 1, 30:36, 60:66][here].mean(), abs=6e-5)
    assert (found[:, :, :2, :2] == 0).all()
    height = encode_members(values["height"][:, :1], valid, TaskKind.REGRESSION)
    assert np.isnan(height[:, :, :2, :2]).all() and np.isfinite(height[:, :, 2:]).all()


def test_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, reasons = predicted()
    with ThreadPoolExecutor(2) as pool:
        whole = encoded(LAYERS, values, reasons, pool)
        monkeypatch.setattr("terraloom.predict.tilewriter._STRIP_VALUES", 12 * W * M * 3)
        strips = encoded(LAYERS, values, reasons, pool)
    assert {"members_cover", "members_height"} < set(whole)
    assert all(np.array_equal(v, strips[k], equal_nan=v.dtype.kind == "f")
               for k, v in whole.items())  # fmt: skip


def test_spread_is_that_of_the_pixels(tmp_path: Path) -> None:
    """Regions that end on cells: exactly; an oblique one: nearly. Tiles written by windows."""
    area = box(420000, 5812320, 420000 + W * 10, 5812320 + H * 10)
    grid = CampaignGrid.from_aoi(area, "EPSG:32633", tile_px=48)
    tiles = grid.tiles()
    values, reasons = predicted()
    windows = cut(tiles, 48, 96)
    with TileWriter(tmp_path, "b0", LAYERS, grid, {t.name: "d" for t in tiles}, windows) as writer:
        for window, held in windows:
            rows, cols = window.within(Window(0, 0, H, W))
            part = {k: v[..., rows, cols] for k, v in values.items()}
            writer.write(window, held, part, reasons[rows, cols])
    x0, y1 = 420000, 5812320 + H * 10
    shapes = [box(x0 + 60, y1 - 900, x0 + 960, y1 - 300), box(x0, y1 - 1380, x0 + 1860, y1),
              Polygon([(x0 + 100, y1 - 133), (x0 + 1777, y1 - 401), (x0 + 903, y1 - 1391)]),
              box(x0 - 900, y1, x0 - 300, y1 + 400)]  # fmt: skip
    valid = reasons == 0
    for task, truth in (
        ("cover", calibrated(values["cover"])),
        ("height", values["height"][:, :1]),
    ):
        cells = MemberCells(f"members_{task}", grid.geobox, tiles, tmp_path)
        assert not cells.missing and cells.members == M
        sd = member_spread(cells, shapes)
        for n, at in enumerate(((slice(30, 90), slice(6, 96)), (slice(0, H), slice(0, W)))):
            ok = valid[at]
            means = truth[:, :, *at][:, :, ok].mean(axis=2)
            tolerance = 0.02 if task == "cover" else 0.002  # stored in steps of 1e-4
            assert sd[n] == pytest.approx(means.std(axis=0, ddof=1), rel=tolerance)
        assert np.isfinite(sd[2]).all() and np.isnan(sd[3]).all()
    (tmp_path / f"{tiles[0].name}.zip").unlink()
    assert MemberCells("members_cover", grid.geobox, tiles, tmp_path).missing == [tiles[0].name]


def test_without_regions_nothing_is_kept() -> None:
    values, reasons = predicted()
    plain = Layers(TASKS, {"cover": SHARP}).encode(values, reasons == 0)
    full = LAYERS.encode(values, reasons == 0)
    assert set(full) - set(plain) == {"members_cover", "members_height"}
    assert all(np.array_equal(plain[k], full[k]) for k in plain)
