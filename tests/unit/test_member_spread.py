"""Regional figures: spread between networks, and what intervals hold of a simulated truth."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import shapely
from shapely.geometry import Polygon, box

from terraloom.acquire.simulate.districts import DISTRICTS_PER_SIDE, make_districts
from terraloom.acquire.simulate.landscape import aoi_geobox
from terraloom.assess.member_spread import MemberCells, member_spread
from terraloom.assess.region_file import read_regions
from terraloom.assess.regional_truth import score_regions, true_rows
from terraloom.config.base import TaskKind
from terraloom.config.campaign import Regions
from terraloom.config.labels import Task
from terraloom.config.simulation import Simulation
from terraloom.grid import CampaignGrid
from terraloom.io import read_store
from terraloom.legend import Legend
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


def from_networks() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The same with classes as networks give them."""
    values, reasons = predicted()
    return values | {"cover": np.log(values["cover"])}, reasons


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
    values, reasons = from_networks()
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
            part = {k: v[..., rows, cols] for k, v in from_networks()[0].items()}
            writer.write(window, held, part, reasons[rows, cols])
    store = read_store(tmp_path / f"{tiles[0].name}.zip")  # as the products read it
    assert store["members_cover"].shape == (M, 3, 8, 8)
    assert store["members_height"].shape == (M, 1, 8, 8)
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
    values, reasons = from_networks()
    plain = Layers(TASKS, {"cover": SHARP}).encode(values, reasons == 0)
    full = LAYERS.encode(values, reasons == 0)
    assert set(full) - set(plain) == {"members_cover", "members_height"}
    assert all(np.array_equal(plain[k], full[k]) for k in plain)


def test_districts_cover_the_region_and_truth_is_summed_over_them(tmp_path: Path) -> None:
    sim = Simulation(size_px=384, seed=3)
    geobox = aoi_geobox(sim)
    frame = make_districts(sim, geobox)
    assert len(frame) == DISTRICTS_PER_SIDE**2 and frame.is_valid.all()
    assert shapely.union_all(frame.geometry).equals(geobox.extent.geom)
    assert frame.area.sum() == pytest.approx(geobox.extent.geom.area) and frame.area.min() > 1e5
    assert make_districts(sim, geobox).equals(frame)
    frame.to_file(tmp_path / "r.gpkg")
    settings = Regions(file=str(tmp_path / "r.gpkg"), name_column="name")
    regions = read_regions(settings, str(geobox.crs))
    legend = Legend((1, 4), ("field", "wood"), ("#ffff00", "#00ff00"))
    true = np.where(np.arange(384) < 192, 1, 4)[None].repeat(384, 0).astype(np.uint8)
    mapped = np.ones((384, 384), bool)
    mapped[:40] = False
    truth = true_rows(regions, geobox, legend, true, mapped, np.where(true == 4, 8, 2))
    fields = sum(v for (_, name, _), v in truth.items() if name == "field")
    assert fields == pytest.approx(192 * 344 / 100, rel=1e-3)
    heights = {r: v for (r, _, quantity), v in truth.items() if quantity == "mean"}
    assert heights["district 05"] == pytest.approx(2, abs=1e-6)
    assert heights["district 08"] == pytest.approx(8, abs=1e-6)


def test_shares_of_intervals_that_hold_the_truth() -> None:
    def row(region: str, quantity: str, low: float | None, width: float) -> dict:
        high = None if low is None else low + width
        naive = (None, None) if low is None else (low + 0.4 * width, low + 0.6 * width)
        return {"region": region, "class": "" if quantity != "area" else "wood", "low": low,
                "quantity": quantity, "high": high, "independent_low": naive[0],
                "independent_high": naive[1]}  # fmt: skip

    rows = [row("a", "area", 1, 4), row("b", "area", 1, 4), row("c", "area", 1, 4),
            row("d", "area", None, 0), row("e", "area", 1, 4), row("a", "mean", 7, 2),
            row("a", "total", 0, 0)]  # fmt: skip
    truth = {("a", "wood", "area"): 3.0, ("b", "wood", "area"): 4.9, ("c", "wood", "area"): 9.0,
             ("d", "wood", "area"): 1.0, ("a", "", "mean"): 9.0, ("a", "", "total"): 5}  # fmt: skip
    found = score_regions(rows, truth)
    assert (found.areas, found.areas_naive) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (found.heights, found.heights_naive) == (1, 0)
    assert np.isnan(score_regions([], truth).areas)
