"""Releases where something is odd: tiled maps, odd names, hooks that refuse, lost objects."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from support.states import GRID, make_project, make_results, run
from terraloom.errors import StateError
from terraloom.io import write_raster, write_text
from terraloom.operate.compare import compare_states
from terraloom.operate.doctor import examine
from terraloom.operate.provenance import restore_state
from terraloom.operate.release import release
from terraloom.operate.stored import md5_of, object_path, open_state


@pytest.fixture
def project(committer: None, tmp_path: Path) -> Path:
    """Project with results that are in no state yet."""
    folder = make_project(tmp_path / "project")
    make_results(folder, seed=1)
    return folder


def tile_the_map(folder: Path, code: int) -> None:
    """Instead of one raster, a tile and an index that names it by its relative path."""
    (folder / "results/map/class_map.tif").unlink(missing_ok=True)
    write_raster(
        folder / "results/map/tiles/a.tif", np.full(GRID.shape, code, np.uint8), GRID, nodata=0
    )
    size = f'xSize="{GRID.shape.x}" ySize="{GRID.shape.y}"'
    place = ", ".join(map(str, GRID.transform.to_gdal()))
    write_text(
        folder / "results/map/class_map.vrt",
        f'<VRTDataset rasterXSize="{GRID.shape.x}" rasterYSize="{GRID.shape.y}">'
        f"<SRS>EPSG:32633</SRS><GeoTransform>{place}</GeoTransform>"
        '<VRTRasterBand dataType="Byte" band="1"><NoDataValue>0</NoDataValue><SimpleSource>'
        '<SourceFilename relativeToVRT="1">tiles/a.tif</SourceFilename><SourceBand>1</SourceBand>'
        f'<SrcRect xOff="0" yOff="0" {size}/><DstRect xOff="0" yOff="0" {size}/>'
        "</SimpleSource></VRTRasterBand></VRTDataset>",
    )


def test_maps_of_tiles_are_compared_from_the_cache(project: Path, tmp_path: Path) -> None:
    tile_the_map(project, 1)
    release("v1", project)
    tile_the_map(project, 3)
    found = compare_states("v1", "WORK", project).difference
    assert found is not None
    assert list(found.pairs_ha) == [("water", "farm")]
    assert found.unknown_ha == 0
    # An index is a copy: a program that writes into it must not reach the cache.
    state = open_state(project, "v1", tmp_path / "links")
    assert not (state.folder / "results/map/class_map.vrt").is_symlink()


@pytest.mark.parametrize("name", ["build", "frozen", "WORK", "HEAD", "a+b", "a/b", "-x", "a..b"])
def test_a_release_has_a_name_that_a_campaign_can_pin(tmp_path: Path, name: str) -> None:
    run(tmp_path, "git", "init", "-q")
    with pytest.raises(StateError, match="cannot be the name"):
        release(name, tmp_path)


@pytest.mark.slow
def test_a_hook_that_refuses_and_lost_objects(project: Path) -> None:
    hook = project / ".git/hooks/pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho no >&2\nexit 1\n")
    hook.chmod(0o755)
    with pytest.raises(StateError, match="nothing is tagged") as err:
        release("v1", project)
    assert "done: dvc commit" in str(err.value)
    assert "the same command again" in str(err.value)
    assert run(project, "git", "tag") == ""
    hook.unlink()
    release("v1", project)
    assert run(project, "git", "tag").split() == ["v1"]
    assert run(project, "git", "status", "--porcelain") == ""

    run(project, "dvc", "remote", "add", "-q", "-d", "store", str(project.parent / "store"))
    digest = md5_of(project / "results/model/net.txt")
    object_path(project / ".dvc/cache/files/md5", digest).unlink()
    restore_state(project)  # what lies here is as recorded
    shutil.rmtree(project / "results/model")
    with pytest.raises(StateError, match=r"cache lacks results/model/net\.txt") as err:
        restore_state(project)
    assert "store (" in str(err.value)
    assert not (project / "results/model").exists()


@pytest.mark.slow
def test_a_key_in_local_settings_is_not_an_address(project: Path) -> None:
    def late() -> bool:
        return any(f.what == "remotes" and f.how == "wrong" for f in examine(project))

    release("v1", project)
    run(project, "dvc", "remote", "add", "-q", "-d", "store", str(project.parent / "store"))
    run(project, "dvc", "remote", "modify", "--local", "-q", "store", "jobs", "2")
    assert late()
    run(project, "dvc", "remote", "add", "-q", "--local", "--force", "store", "/elsewhere")
    assert not late()
