"""How a job is cut into windows, and the order in which they are worked on."""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from shapely import Polygon, box

from terraloom.grid import CampaignGrid
from terraloom.predict.overlap import overlapped, side_by_side
from terraloom.predict.windows import Window, cut, in_batches


def grid(h: int, w: int, tile_px: int, aoi: object = None) -> CampaignGrid:
    geobox = GeoBox((h, w), Affine(10, 0, 0, 0, -10, 0), "EPSG:32633")
    b = geobox.boundingbox
    return CampaignGrid(geobox, tile_px, aoi or box(b.left, b.bottom, b.right, b.top))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(2, 12), st.integers(96, 1200),
    st.sampled_from([1, 8, 24, 48]), st.integers(1, 9),
)  # fmt: skip
def test_windows_cover_each_pixel_of_a_job_once(
    h: int, w: int, tiles: int, window_px: int, stride: int, per_job: int
) -> None:
    g = grid(h * 24, w * 24, tiles * 48)
    for job in g.batches(per_job).values():
        seen = np.zeros(g.geobox.shape, int)
        mine = np.zeros(g.geobox.shape, bool)
        for tile in job:
            at = Window.of(tile, g.tile_px)
            mine[at.within(Window(0, 0, *g.geobox.shape))] = True
        for window, held in cut(job, g.tile_px, window_px, stride):
            assert max(window.height, window.width) <= max(window_px, 48)
            seen[window.within(Window(0, 0, *g.geobox.shape))] += 1
            parts = [window.common(Window.of(t, g.tile_px)) for t in held]
            assert sum(p.height * p.width for p in parts) == window.height * window.width
            if len(held) > 1:
                assert parts == [Window.of(t, g.tile_px) for t in held], "whole tiles"
        assert np.array_equal(seen, mine.astype(int))


def test_tiles_of_an_odd_area_are_joined_where_they_make_a_rectangle() -> None:
    g = grid(480, 480, 96, Polygon([(0, 0), (4800, 0), (4800, -900), (900, -4800), (0, -4800)]))
    cuts = cut(g.tiles(), 96, 240)
    assert Counter(t.name for _, held in cuts for t in held) == Counter(t.name for t in g.tiles())
    assert max(len(held) for _, held in cuts) == 4
    assert len(cuts) < len(g.tiles())


def test_the_cut_does_not_depend_on_what_is_finished() -> None:
    g = grid(960, 960, 96)
    assert cut(g.tiles(), 96, 480) == cut(list(g.tiles()), 96, 480)


@given(st.integers(-50, 50), st.integers(1, 99), st.integers(0, 70), st.sampled_from([1, 8, 24]))
def test_a_padded_window_has_the_halo_and_whole_strides(
    row: int, height: int, reach: int, stride: int
) -> None:
    around = Window(row, row, height, height).padded(reach, stride)
    assert around.row % stride == 0 and around.height % stride == 0
    assert around.row <= row - reach < around.row + stride
    end = around.row + around.height
    assert end - stride < row + height + reach <= end
    rows, _ = Window(row, row, height, height).within(around)
    assert rows.start == row - around.row and rows.stop - rows.start == height


def test_batches_hold_windows_of_one_shape_in_order() -> None:
    shapes = [(96, 96)] * 5 + [(96, 48)] + [(96, 96)] * 2
    items = [(Window(0, i, *s), ()) for i, s in enumerate(shapes)]
    found = list(in_batches(items, 2))
    assert [len(b) for b in found] == [2, 2, 1, 1, 2]
    assert [w.col for b in found for w, _ in b] == list(range(8))


# --- overlap --------------------------------------------------------------------------------------


def test_steps_overlap_in_order_and_little_waits() -> None:
    live, most, out, lock = 0, 0, [], threading.Lock()

    def load(i: int) -> int:
        nonlocal live, most
        with lock:
            live += 1
            most = max(most, live)
        return i

    def store(i: int, r: int) -> None:
        nonlocal live
        time.sleep(0.002)
        with lock:
            live -= 1
        out.append((i, r))

    names = set()

    def compute(i: int) -> int:
        names.add(threading.current_thread().name)
        return i * i

    overlapped(range(40), load, compute, store)
    assert out == [(i, i * i) for i in range(40)]
    assert most <= 5, "one read, one waits, one is computed, two are written or wait for it"
    assert names == {threading.current_thread().name}


@pytest.mark.parametrize("where", ["load", "compute", "store"])
def test_an_error_of_any_step_ends_the_work(where: str) -> None:
    seen: list[int] = []

    def fail(step: str, i: int) -> int:
        if step == where and i == 3:
            raise OSError(step)
        return i

    def store(i: int, _: int) -> None:
        fail("store", i)
        seen.append(i)

    with pytest.raises(OSError, match=where):
        overlapped(range(100), lambda i: fail("load", i), lambda i: fail("compute", i), store)
    assert len(seen) < 8


def test_nothing_to_do_is_no_error() -> None:
    overlapped([], lambda i: i, lambda i: i, lambda i, r: None)
    side_by_side([], lambda i: None, 3)


def test_each_worker_does_all_of_an_item() -> None:
    live, most, done, lock = 0, 0, [], threading.Lock()
    begun: set[str] = set()

    def work(i: int) -> None:
        nonlocal live, most
        with lock:
            live += 1
            most = max(most, live)
        time.sleep(0.002)
        assert threading.current_thread().name in begun
        with lock:
            live -= 1
            done.append(i)

    side_by_side(range(30), work, 3, lambda: begun.add(threading.current_thread().name))
    assert sorted(done) == list(range(30)) and most == 3 == len(begun)


def test_the_error_of_a_worker_ends_the_work() -> None:
    seen = []

    def work(i: int) -> None:
        if i == 3:
            raise OSError("third")
        time.sleep(0.001)
        seen.append(i)

    with pytest.raises(OSError, match="third"):
        side_by_side(range(1000), work, 2)
    assert len(seen) < 100
