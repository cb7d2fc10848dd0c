"""Local files: rules, formats, place, radiometry; what is refused; the road behind the import."""

from __future__ import annotations

import re
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import rasterio
import yaml
from affine import Affine
from odc.geo.geobox import GeoBox
from pystac.validation.local_validator import LocalValidator
from scipy.io import netcdf_file

from terraloom.acquire.assets import read_band
from terraloom.acquire.files import import_files
from terraloom.acquire.filespec import BandSpec, LayerSpec, LocalSource, Rule, read_spec
from terraloom.acquire.lock import lock_items
from terraloom.acquire.netcdf import decode_time, wavelength_um
from terraloom.acquire.planes import planes_of
from terraloom.acquire.sources import Codes, SourceTable, Unit, load_source
from terraloom.aoi import campaign_grid
from terraloom.config.load import parse_campaign
from terraloom.errors import ConfigError, SceneError
from terraloom.io import geobox_of, read_json, sha256, write_json
from terraloom.preprocess.verify import verify_items

PAGE = (Path(__file__).parents[2] / "docs/how-to/local-files.md").read_text(encoding="utf-8")
UTM = "EPSG:32633"
PLACE = Affine(10, 0, 360000, 0, -10, 5820000)
LOCAL_KINDS = get_args(LocalSource.model_fields["kind"].annotation)
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def raster(path: Path, data: np.ndarray, **options: Any) -> Path:
    """A plain file of one or more bands, (H, W) or (B, H, W)."""
    cube = data[None] if data.ndim == 2 else data
    names = options.pop("names", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "GTiff", "crs": UTM, "transform": PLACE, "dtype": cube.dtype,
        "count": len(cube), "height": cube.shape[1], "width": cube.shape[2], **options,
    }  # fmt: skip
    with rasterio.open(path, "w", **{k: v for k, v in profile.items() if v is not None}) as dst:
        dst.write(cube)
        for i, name in enumerate(names or (), 1):
            dst.set_band_description(i, name)
    return path


def numbers(*shape: int, seed: int = 1, dtype: str = "int16") -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 3000, shape).astype(dtype)


def run(folder: Path, spec: dict[str, Any], name: str = "mine") -> Path:
    """Import; gives the folder of the catalogue."""
    base = {"title": "Mine", "kind": "optical", "unit": "reflectance", "nodata": 0}
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump({**base, **spec}, sort_keys=False))
    return import_files(file, folder / "out" / name).parent


def items(out: Path) -> list[str]:
    return sorted(p.parent.name for p in out.glob("*/*/*.json"))


def stored(out: Path, item: str, band: str) -> np.ndarray:
    with rasterio.open(out / out.name / item / f"{band}.tif") as src:
        return src.read(1)


def refused(folder: Path, spec: dict[str, Any], error: type[Exception], text: str) -> str:
    """The import fails with the text, and leaves nothing."""
    with pytest.raises(error, match=text) as caught:
        run(folder, spec)
    assert not list((folder / "out").glob("*")) if (folder / "out").exists() else True
    return str(caught.value)


ONE = {"bands": {"red": {}}, "files": [{"path": "*.tif", "pattern": r"(?P<date>\d{8})"}]}


# --- rules --------------------------------------------------------------------------------------


def test_one_file_per_band_and_date(tmp_path: Path):
    for n, day in enumerate(("2018121", "2018153")):
        for band in ("b3", "b4", "b7"):
            data = numbers(20, 30, seed=ord(band[1]) + n)
            raster(tmp_path / f"in/LC8{day}/LC8034032{day}LGN_{band}.tif", data)
    out = run(tmp_path, {
        "bands": {"nir": {"common_name": "nir08"}, "red": {"common_name": "red"}},
        "files": [{
            "path": "in/*/*.tif", "bands": {"red": "b3", "nir": "b4"},
            "pattern": r"LC8\d{6}(?P<date>\d{7})\w+_(?P<band>b\d)",
        }],
    })  # fmt: skip
    assert items(out) == ["mine_20180501", "mine_20180602"]
    assert np.array_equal(stored(out, "mine_20180602", "nir"), numbers(20, 30, seed=ord("4") + 1))
    path = out / "mine/mine_20180501/red.tif"
    assert geobox_of(path) == GeoBox((20, 30), PLACE, UTM)  # native pixels
    table = load_source(str(out / "source.yaml"))
    assert list(table.bands) == ["nir", "red"]  # as described; b7 is left alone
    assert table.roles().items() >= {"B8A": "nir", "B04": "red"}.items()
    assert table.catalogue == str(out / "catalog.json") and table.bands["red"].group == "mine_10"


def test_numbers_names_and_texts_of_bands(tmp_path: Path):
    data = numbers(3, 8, 8)
    raster(tmp_path / "a_20180501.tif", data, names=["green", "red", "nir"])
    rule = {"path": "*.tif", "pattern": r"(?P<date>\d{8})"}
    for bands in ({"x": 3, "y": 1}, {"x": "nir", "y": "green"}):
        out = run(tmp_path, {"files": [{**rule, "bands": bands}]})
        assert np.array_equal(stored(out, "mine_20180501", "x"), data[2])
        assert np.array_equal(stored(out, "mine_20180501", "y"), data[0])
    out = run(tmp_path, {"bands": {"nir": {}, "red": {}}, "files": [rule]})
    assert np.array_equal(stored(out, "mine_20180501", "red"), data[1])
    refused_again = {"files": [{**rule, "bands": {"x": 4}}]}
    with pytest.raises(SceneError, match=r"band 4 is not there[\s\S]*green, red, nir"):
        run(tmp_path, refused_again)
    with pytest.raises(SceneError, match="which of its 3 bands"):
        run(tmp_path, {"bands": {"blue": {}}, "files": [rule]})


def test_a_stack_of_dates(tmp_path: Path):
    data = numbers(4, 6, 7)
    raster(tmp_path / "ndvi.tif", data)
    days = ["2018-01-01", "2018-01-17", "2018-02-02", "2018-02-18"]
    (tmp_path / "dates.txt").write_text("\n".join(days) + "\n")
    spec = {"kind": "index", "unit": "index", "bands": {"NDVI": {}}, "end": "2018-02-02"}
    for dates in (days, "dates.txt"):
        out = run(tmp_path, {**spec, "files": [{"path": "ndvi.tif", "dates": dates}]})
        assert items(out) == ["mine_20180101", "mine_20180117", "mine_20180202"]
        assert np.array_equal(stored(out, "mine_20180117", "NDVI"), data[1])
    with pytest.raises(SceneError, match="4 bands, 3 dates"):
        run(tmp_path, {**spec, "files": [{"path": "ndvi.tif", "dates": days[:3]}]})


def test_a_table_of_files(tmp_path: Path):
    raster(tmp_path / "photos/first.tif", numbers(3, 5, 5))
    raster(tmp_path / "photos/other.tif", numbers(3, 5, 5, seed=2))
    (tmp_path / "photos/list.csv").write_text(
        "path,date,cloud_pct\nfirst.tif,2019-07-03,12.5\nother.tif,2019-07-04,\n"
    )
    rule = {"table": "photos/list.csv", "bands": {"r": 1}}
    out = run(tmp_path, {"files": [rule]})
    assert items(out) == ["mine_20190703", "mine_20190704"]
    item = read_json(out / "mine/mine_20190703/mine_20190703.json")
    assert item["properties"]["eo:cloud_cover"] == 12.5
    (tmp_path / "photos/list.csv").write_text("file,date\nfirst.tif,2019-07-03\n")
    with pytest.raises(ConfigError, match="columns date, file"):
        run(tmp_path, {"files": [rule]})


def test_time_of_day(tmp_path: Path):
    raster(tmp_path / "20180501.tif", numbers(5, 5))

    def when(extra: dict[str, Any], **more: Any) -> str:
        out = run(tmp_path, {**ONE, **more, "files": [{**ONE["files"][0], **extra}]})
        name = items(out)[0]
        return read_json(out / f"mine/{name}/{name}.json")["properties"]["datetime"]

    # Half past ten of local solar time at 12.9 degrees east is 9:38 UTC.
    assert when({}) == "2018-05-01T09:38:15Z"
    assert when({"time": "17:30"}) == "2018-05-01T17:30:00Z"
    assert when({}, kind="sar") == "2018-05-01T00:00:00Z"


def test_items_of_one_day_are_kept_apart_by_name(tmp_path: Path):
    for tile in ("T33UUU", "T33UVU"):
        raster(tmp_path / f"20180501_{tile}.tif", numbers(5, 5))
    assert "two files for band red of 2018-05-01" in refused(
        tmp_path, ONE, SceneError, r"20180501_T33UUU\.tif and 20180501_T33UVU\.tif"
    )
    rule = {"path": "*.tif", "pattern": r"(?P<date>\d{8})_(?P<item>\w+)\."}
    out = run(tmp_path, {**ONE, "files": [rule]})
    assert items(out) == ["mine_20180501_T33UUU", "mine_20180501_T33UVU"]


def test_bands_of_one_pass_meet_and_frames_of_one_orbit_stay_apart(tmp_path: Path):
    # Two frames of one orbit, 24 s apart; their 20 m bands are stamped a second later.
    stamps = {"red": ("103000", "103024"), "swir": ("103001", "103025")}
    for band, times in stamps.items():
        for n, time in enumerate(times):
            raster(tmp_path / f"20180501T{time}_{band}.tif", numbers(4, 4, seed=n))
    pattern = r"(?P<date>\d{8}T\d{6})_(?P<band>\w+)\."
    out = run(tmp_path, {"files": [{"path": "*.tif", "pattern": pattern}]})
    assert items(out) == ["mine_20180501T103000", "mine_20180501T103024"]
    for n, item in enumerate(items(out)):
        for band in stamps:
            assert np.array_equal(stored(out, item, band), numbers(4, 4, seed=n))


def test_static_rasters_need_no_date(tmp_path: Path):
    chm = numbers(10, 10, dtype="float32")
    raster(tmp_path / "lidar/chm_360_582.tif", chm, nodata=-9999)
    raster(tmp_path / "lidar/dtm_360_582.tif", chm + 30, nodata=-9999)
    out = run(tmp_path, {
        "kind": "dem", "unit": "m", "static": True, "nodata": -9999,
        "bands": {"chm": {}, "dtm": {}},
        "files": [{"path": "lidar/*", "pattern": r"(?P<band>chm|dtm)_(?P<item>\w+)\."}],
    }, "lidar")  # fmt: skip
    assert items(out) == ["lidar_360_582"]
    assert load_source(str(out / "source.yaml")).static


# --- formats ------------------------------------------------------------------------------------


def netcdf(path: Path, cube: np.ndarray, *, rising: bool, named: bool, step: float = 20) -> None:
    """netCDF 3 with dimensions time, y, x; ``named``: with CF attributes of the coordinates."""
    _, h, w = cube.shape
    with netcdf_file(path, "w") as f:
        for name, size in (("time", len(cube)), ("y", h), ("x", w)):
            f.createDimension(name, size)
        time = f.createVariable("time", "i4", ("time",))
        time[:] = np.arange(len(cube)) * 86400
        time.units = "seconds since 2018-05-01 10:30:00"
        x, y = f.createVariable("x", "f8", ("x",)), f.createVariable("y", "f8", ("y",))
        x[:] = 360000 + step * (np.arange(w) + 0.5)
        y[:] = 5820000 - step * (np.arange(h) + 0.5)
        if rising:
            y[:] = y[::-1].copy()
        if named:
            x.standard_name, y.standard_name = "projection_x_coordinate", "projection_y_coordinate"
            x.units = y.units = "m"
        crs = f.createVariable("spatial_ref", "i4", ())
        crs.crs_wkt = rasterio.crs.CRS.from_user_input(UTM).to_wkt()
        crs.spatial_ref = crs.crs_wkt
        for name, add in (("B04", 0), ("SCL", 1)):
            band = f.createVariable(name, "i2", ("time", "y", "x"))
            band[:] = (cube if not add else cube % 12)[:, ::-1] if rising else (
                cube if not add else cube % 12
            )  # fmt: skip
            band.grid_mapping = "spatial_ref"
            band._FillValue = np.int16(0)
            if not add:
                band.scale_factor = 0.0001


@pytest.mark.parametrize("named", [True, False], ids=["cf", "bare"])
@pytest.mark.parametrize("rising", [True, False], ids=["south-first", "north-first"])
def test_netcdf_is_upright_whatever_its_attributes(tmp_path: Path, rising: bool, named: bool):
    cube = numbers(3, 9, 12)
    netcdf(tmp_path / "s2.nc", cube, rising=rising, named=named)
    spec = {
        "nodata": None, "bands": {"B04": {}}, "layers": {"SCL": {"codes": "scl"}},
        "files": [{"path": "s2.nc"}],
    }  # fmt: skip
    out = run(tmp_path, spec, "s2")
    assert items(out) == [f"s2_2018050{d}T103000" for d in (1, 2, 3)]
    for t, item in enumerate(items(out)):
        assert np.array_equal(stored(out, item, "B04"), cube[t])
        assert np.array_equal(stored(out, item, "SCL"), cube[t] % 12)
    place = Affine(20, 0, 360000, 0, -20, 5820000)
    assert geobox_of(out / f"s2/{items(out)[0]}/B04.tif") == GeoBox((9, 12), place, UTM)
    table = load_source(str(out / "source.yaml"))
    assert table.scale == pytest.approx(1e-4) and table.nodata == 0
    assert table.layers["SCL"].codes == "scl" and table.mask_resolution_m == 20


def test_times_of_netcdf():
    assert decode_time(1.5, "days since 1990-01-01") == datetime.fromisoformat(
        "1990-01-02T12:00:00+00:00"
    )
    assert decode_time(60, "minutes since 2017-08-04 10:53:28").isoformat()[:19] == (
        "2017-08-04T11:53:28"
    )
    late = decode_time(0, "hours since 2000-01-01T02:00:00+02:00", "gregorian")
    assert late == datetime.fromisoformat("2000-01-01T00:00:00+00:00")
    assert late.utcoffset() == timedelta(0)
    for units, calendar in (("months since 2000-01-01", ""), ("days since 2000-01-01", "360_day")):
        with pytest.raises(SceneError, match="time in"):
            decode_time(1, units, calendar)


def test_units_of_wavelengths():
    assert wavelength_um(443, "Nanometers") == pytest.approx(0.443)
    assert wavelength_um(0.443, "um") == wavelength_um(0.443, "") == 0.443
    assert wavelength_um(443, "Unknown") == pytest.approx(0.443)
    assert wavelength_um(22, "GHz") is None


def test_hyperspectral_envi_is_named_by_wavelength(tmp_path: Path):
    data = numbers(30, 6, 5)
    raster(tmp_path / "line.img", data, driver="ENVI")
    header = tmp_path / "line.hdr"
    waves = np.linspace(410, 2450, 30)

    def write(values: np.ndarray) -> None:
        kept = re.sub(r"(?s)wavelength.*?}\n", "", header.read_text())
        row = ", ".join(f"{w:.3f}" for w in values)
        header.write_text(f"{kept}wavelength units = Nanometers\nwavelength = {{{row}}}\n")

    write(waves)
    spec = {"files": [{"path": "line.hdr", "date": "2019-07-03", "bands": "wavelengths"}]}
    out = run(tmp_path, spec, "his")
    table = load_source(str(out / "source.yaml"))
    assert len(table.bands) == 30 and list(table.bands)[:2] == ["w0410", "w0480"]
    assert table.bands["w2450"].center_wavelength_um == 2.45
    assert np.array_equal(stored(out, "his_20190703", "w2450"), data[-1])
    write(410 + np.arange(30) * 0.5)
    out = run(tmp_path, spec, "fine")
    assert list(load_source(str(out / "source.yaml")).bands)[:2] == ["w0410_0", "w0410_5"]
    write(waves[:10])
    with pytest.raises(SceneError, match="20 of 30 bands have no wavelength"):
        run(tmp_path, spec)


def polsarpro(
    folder: Path, shape: tuple[int, int], *, config: bool = True
) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    made = {}
    for n, name in enumerate(("C11", "C12_real", "C12_imag", "C22")):
        made[name] = np.random.default_rng(n).normal(size=shape).astype("<f4")
        made[name].tofile(folder / f"{name}.bin")
    if config:
        (folder / "config.txt").write_text(
            f"Nrow\n{shape[0]}\n---------\nNcol\n{shape[1]}\n---------\nPolarCase\nmonostatic\n"
        )
    return made


POLSAR = {
    "kind": "polsar", "unit": "1", "nodata": None,
    "files": [{
        "path": "*/C2", "pattern": r"(?P<date>\d{8})/", "format": "polsarpro", "crs": UTM,
        "transform": list(PLACE)[:6],
    }],
}  # fmt: skip


def test_polsarpro_folder_without_headers(tmp_path: Path):
    made = polsarpro(tmp_path / "20160601/C2", (7, 5))
    out = run(tmp_path, POLSAR, "rs2")
    assert list(load_source(str(out / "source.yaml")).bands) == ["C11", "C12_re", "C12_im", "C22"]
    assert np.array_equal(stored(out, "rs2_20160601", "C12_im"), made["C12_imag"])
    rule = {k: v for k, v in POLSAR["files"][0].items() if k not in ("crs", "transform")}
    with pytest.raises(SceneError, match="no coordinate system"):
        run(tmp_path, {**POLSAR, "files": [rule]})
    file = tmp_path / "20160601/C2/C22.bin"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(SceneError, match=r"136 bytes, 7 x 5 x 4 by config\.txt"):
        run(tmp_path, POLSAR)


def test_south_up_rasters_are_turned_over(tmp_path: Path):
    data = numbers(6, 4)
    up = Affine(10, 0, 360000, 0, 10, 5819940)
    raster(tmp_path / "20180501.tif", data[::-1], transform=up)
    out = run(tmp_path, ONE)
    assert np.array_equal(stored(out, "mine_20180501", "red"), data)
    assert geobox_of(out / "mine/mine_20180501/red.tif") == GeoBox((6, 4), PLACE, UTM)


def test_degrees_get_a_pixel_size_in_metres(tmp_path: Path):
    place = Affine(1e-4, 0, 13, 0, -1e-4, 52)
    raster(tmp_path / "20180501.tif", numbers(40, 30), crs="EPSG:4326", transform=place)
    band = load_source(str(run(tmp_path, ONE) / "source.yaml")).bands["red"]
    # 11.13 m by 6.87 m, of one area with 8.74 m squared
    assert band.resolution_m == pytest.approx(8.74, abs=0.02) and band.group == "mine_10"


@pytest.mark.parametrize(("size", "group"), [(1, 10), (28.5, 30), (231.656, 240), (1000, 480)])
def test_group_is_the_nearest_pixel_size_of_a_cube(tmp_path: Path, size: float, group: int):
    place = Affine(size, 0, 360000, 0, -size, 5820000)
    raster(tmp_path / "20180501.tif", numbers(5, 5), transform=place)
    table = load_source(str(run(tmp_path, ONE) / "source.yaml"))
    assert table.bands["red"].group == f"mine_{group}"
    table = load_source(str(run(tmp_path, {**ONE, "cube_m": 20}, "forced") / "source.yaml"))
    assert table.bands["red"].group == "forced_20"


def test_systems_without_code_keep_their_text(tmp_path: Path):
    sinusoidal = "+proj=sinu +lon_0=0 +R=6371007.181 +units=m +no_defs"
    place = Affine(231.656, 0, -6073587.958, 0, -231.656, -1278725.64)
    raster(tmp_path / "20180501.tif", numbers(5, 5), crs=sinusoidal, transform=place)
    out = run(tmp_path, ONE)
    item = read_json(out / "mine/mine_20180501/mine_20180501.json")
    assert item["assets"]["red"]["proj:code"] is None
    assert "Sinusoidal" in item["assets"]["red"]["proj:wkt2"]
    assert -60 < item["bbox"][0] < -50 and -12 < item["bbox"][1] < -11


def test_beyond_the_edge_of_the_projection_is_refused(tmp_path: Path):
    geostationary = "+proj=geos +h=35785831 +lon_0=0 +sweep=y +ellps=WGS84 +units=m +no_defs"
    place = Affine(3000, 0, -5.5e6, 0, -3000, 5.5e6)  # the corner of the full disc shows space
    raster(tmp_path / "20180501.tif", numbers(5, 5), crs=geostationary, transform=place)
    refused(tmp_path, ONE, SceneError, "beyond the Earth's edge")


# --- radiometry and layers ----------------------------------------------------------------------


def test_scale_and_nodata_of_the_spec_go_before_those_of_the_file(tmp_path: Path):
    data = numbers(5, 5)
    raster(tmp_path / "20180501.tif", data, nodata=-1)
    own = load_source(str(run(tmp_path, {**ONE, "nodata": None}, "own") / "source.yaml"))
    assert own.nodata == -1 and own.scale == 1
    spec = {**ONE, "scale": 0.1, "bands": {"red": {"scale": 0.5, "offset": 2}}}
    out = run(tmp_path, spec)
    asset = read_json(out / "mine/mine_20180501/mine_20180501.json")["assets"]["red"]
    assert asset["raster:bands"][0] | {"unit": ""} == {
        "data_type": "int16", "nodata": 0, "scale": 0.5, "offset": 2, "spatial_resolution": 10,
        "unit": "",
    }  # fmt: skip
    raster(tmp_path / "20180501.tif", data)
    assert "nodata" in refused_in(tmp_path, {**ONE, "nodata": None}, "says which value")
    assert "-32768 to 32767" in refused_in(tmp_path, {**ONE, "nodata": 65535}, "nodata 65535")


def test_another_nodata_than_the_files_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for day in ("20180501", "20180601"):
        raster(tmp_path / f"{day}.tif", numbers(5, 5), nodata=-1)
    with caplog.at_level("WARNING", "terraloom"):
        run(tmp_path, ONE)
    told = [r.getMessage() for r in caplog.records if "means missing" in r.getMessage()]
    assert told == [
        "20180501.tif: 0 means missing in band red as the spec says, although the file says -1"
    ]


def refused_in(folder: Path, spec: dict[str, Any], text: str) -> str:
    with pytest.raises(SceneError, match=text) as caught:
        run(folder, spec, "refused")
    assert not (folder / "out" / "refused").exists()
    return str(caught.value)


def test_layers_are_recoded_and_unknown_numbers_are_no_data(tmp_path: Path):
    raster(tmp_path / "20180501_red.tif", numbers(2, 4))
    raster(tmp_path / "20180501_qa.tif", np.array([[322, 352, 7, 0], [322] * 4], dtype="uint16"))
    out = run(tmp_path, {
        "bands": {"red": {}},
        "layers": {"qa": {"codes": "fmask", "nodata": 255, "recode": {322: 0, 352: 4}}},
        "files": [{"path": "*.tif", "pattern": r"(?P<date>\d{8})_(?P<band>\w+)"}],
    })  # fmt: skip
    assert stored(out, "mine_20180501", "qa").tolist() == [[0, 4, 255, 255], [0] * 4]


# --- what is refused ----------------------------------------------------------------------------


def test_damaged_files_leave_nothing(tmp_path: Path):
    file = raster(tmp_path / "20180501.tif", numbers(600, 600), tiled=True)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, ONE, SceneError, r"20180501\.tif: the file cannot be read to the end")
    file.write_bytes(b"")
    refused(tmp_path, ONE, SceneError, r"the file is empty \(0 bytes\)")
    file.write_bytes(b"<html>not found</html>")
    refused(tmp_path, ONE, SceneError, r"not a readable raster[\s\S]*GTiff, JP2OpenJPEG")
    assert list(tmp_path.glob("out/.tmp*")) == []


def test_a_failed_import_leaves_the_older_catalogue(tmp_path: Path):
    file = raster(tmp_path / "20180501.tif", numbers(5, 5))
    out = run(tmp_path, ONE)
    before = {p: sha256(p) for p in out.rglob("*") if p.is_file()}
    raster(tmp_path / "20180601.tif", numbers(5, 5))
    file.write_bytes(b"")
    with pytest.raises(SceneError):
        run(tmp_path, ONE)
    assert {p: sha256(p) for p in out.rglob("*") if p.is_file()} == before


def test_truncated_envi_is_not_read_as_zeros(tmp_path: Path):
    file = raster(tmp_path / "20180501.img", numbers(50, 50), driver="ENVI")
    file.write_bytes(file.read_bytes()[:3000])
    spec = {**ONE, "files": [{"path": "*.img", "pattern": r"(?P<date>\d{8})"}]}
    refused(tmp_path, spec, SceneError, "truncated: 3000 bytes, 5000 by its header")


def test_vrt_is_refused_under_any_name(tmp_path: Path):
    inner = raster(tmp_path / "inner.tiff", numbers(5, 5))
    (tmp_path / "20180501.tif").write_text(
        f'<VRTDataset rasterXSize="5" rasterYSize="5"><VRTRasterBand dataType="Int16" band="1">'
        f"<SimpleSource><SourceFilename>{inner}</SourceFilename></SimpleSource></VRTRasterBand>"
        "</VRTDataset>"
    )
    refused(tmp_path, ONE, SceneError, "format VRT")


def test_place_is_asked_for_and_not_contradicted(tmp_path: Path):
    raster(tmp_path / "20180501.tif", numbers(5, 5), crs=None, transform=None)
    refused(tmp_path, ONE, SceneError, r"no coordinate system[\s\S]*crs \(like EPSG")
    placed = {**ONE["files"][0], "crs": UTM, "transform": list(PLACE)[:6]}
    out = run(tmp_path, {**ONE, "files": [placed]})
    assert geobox_of(out / "mine/mine_20180501/red.tif") == GeoBox((5, 5), PLACE, UTM)
    shutil.rmtree(out)
    refused(tmp_path, {**ONE, "files": [{**placed, "crs": "EPSG:99"}]}, SceneError, "unknown coord")
    raster(tmp_path / "20180501.tif", numbers(5, 5), crs="EPSG:32632")
    refused(tmp_path, {**ONE, "files": [placed]}, SceneError, "the file has EPSG:32632")
    raster(tmp_path / "20180501.tif", numbers(5, 5), transform=PLACE @ Affine.rotation(5))
    refused(tmp_path, ONE, SceneError, "rotated")


def test_bands_of_an_item_must_fit(tmp_path: Path):
    spec = {
        "bands": {"red": {}, "nir": {}},
        "files": [{"path": "*.tif", "pattern": r"(?P<date>\d{8})_(?P<band>\w+)\."}],
    }
    raster(tmp_path / "20180501_red.tif", numbers(6, 6))
    raster(tmp_path / "20180501_nir.tif", numbers(6, 6), crs="EPSG:32632")
    refused(tmp_path, spec, SceneError, "band red is in EPSG:32633, band nir in EPSG:32632")
    raster(tmp_path / "20180501_nir.tif", numbers(6, 7))
    refused(tmp_path, spec, SceneError, "one grid for the bands of one pixel size")
    moved = PLACE @ Affine.translation(0.5, 0)
    raster(tmp_path / "20180501_nir.tif", numbers(6, 6), transform=moved)
    refused(tmp_path, spec, SceneError, "one grid for the bands of one pixel size")
    raster(tmp_path / "20180501_nir.tif", numbers(3, 3), transform=PLACE @ Affine.scale(2))
    table = load_source(str(run(tmp_path, spec) / "source.yaml"))  # pixel sizes may differ
    assert {b.group for b in table.bands.values()} == {"mine_10", "mine_20"}
    raster(tmp_path / "20180601_red.tif", numbers(3, 3), transform=PLACE @ Affine.scale(2))
    assert "make them two sources" in refused_in(tmp_path, spec, "band red has pixels of 10 m and")


def test_dates_are_asked_for(tmp_path: Path):
    raster(tmp_path / "20181301.tif", numbers(5, 5))
    refused(tmp_path, ONE, SceneError, "the date '20181301' cannot be read")
    nameless = {**ONE, "files": [{"path": "*.tif"}]}
    refused(tmp_path, nameless, SceneError, r"the file has no date[\s\S]*\(\?P<date>")
    wrong = {**ONE, "files": [{"path": "*.tif", "pattern": r"x(?P<date>\d{8})"}]}
    refused(tmp_path, wrong, ConfigError, "does not match the pattern")


def test_bands_without_a_valid_pixel(tmp_path: Path):
    raster(tmp_path / "20180501.tif", np.zeros((5, 5), dtype="int16"))
    refused(tmp_path, ONE, SceneError, "every pixel of band red is missing")
    refused(tmp_path, {**ONE, "empty": "skip"}, SceneError, "none of 1 items")
    raster(tmp_path / "20180601.tif", numbers(5, 5))
    out = run(tmp_path, {**ONE, "empty": "skip"})
    assert items(out) == ["mine_20180601"]
    assert not list(out.glob("mine/mine_20180501"))


def test_complex_numbers_are_refused(tmp_path: Path):
    raster(tmp_path / "20180501.tif", numbers(5, 5).astype("complex64"))
    refused(tmp_path, ONE, SceneError, r"complex numbers[\s\S]*polsarpro")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"files": [{"path": "*.tif", "pattern": r"\d{8}"}]}, "needs named groups"),
        ({"files": [{"path": "*.tif", "pattern": "("}]}, "not a regular expression"),
        ({"files": [{"path": "*.tif", "table": "x.csv"}]}, "either path or table"),
        ({"files": [{"path": "none*.tif", "date": "2018-05-01"}]}, "no file matches"),
        ({"files": [{"path": "*.tif", "bands": {"nir": 1}}]}, "nir is neither under bands"),
        ({"layers": {"red": {"codes": "scl"}}}, "stands under bands and under layers"),
        ({"colour": "red"}, "key `colour`"),
        ({"kind": "video"}, "key `kind`"),
        ({"bands": {"../x": {}}}, r"bands\.\.\./x"),
    ],
)
def test_wrong_descriptions_name_the_key(tmp_path: Path, change: dict[str, Any], text: str):
    raster(tmp_path / "20180501.tif", numbers(5, 5))
    refused(tmp_path, {**ONE, **change}, ConfigError, text)


def test_item_names_cannot_leave_the_folder(tmp_path: Path):
    raster(tmp_path / "20180501.tif", numbers(5, 5))
    (tmp_path / "list.csv").write_text("path,date,item\n20180501.tif,2018-05-01,../../x\n")
    refused(tmp_path, {**ONE, "files": [{"table": "list.csv"}]}, SceneError, "not allowed")


# --- the road behind it -------------------------------------------------------------------------


def test_same_files_same_bytes(tmp_path: Path):
    raster(tmp_path / "20180501.tif", numbers(50, 50))
    first = {p.name: sha256(p) for p in run(tmp_path, ONE).rglob("*") if p.is_file()}
    assert {p.name: sha256(p) for p in run(tmp_path, ONE).rglob("*") if p.is_file()} == first


def test_the_catalogue_follows_the_stac_core_schemas(tmp_path: Path):
    raster(tmp_path / "20180501.tif", numbers(5, 5))
    out = run(tmp_path, {**ONE, "bands": {"red": {"common_name": "red"}}, "licence": "CC0-1.0"})
    validator = LocalValidator()
    checks = {
        "Feature": validator.item_validator(), "Collection": validator.collection_validator(),
        "Catalog": validator.catalog_validator(),
    }  # fmt: skip
    found = []
    for file in out.rglob("*.json"):
        record = read_json(file)
        found.append(record["type"])
        assert [e.message for e in checks[record["type"]].iter_errors(record)] == []
        assert tmp_path.as_posix() not in file.read_text()
    assert sorted(found) == ["Catalog", "Collection", "Feature"]


def test_lock_verify_and_read_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    data = numbers(2, 120, 120)
    data[:, :10] = 0
    for day, shift in (("20180501", 0), ("20180601", 5)):
        raster(tmp_path / f"in/{day}.tif", data + shift * (data > 0))
    raster(
        tmp_path / "in/dem.tif", numbers(60, 60, dtype="float32"), transform=PLACE @ Affine.scale(2)
    )
    rule = {"path": "in/2018*.tif", "pattern": r"(?P<date>\d{8})", "bands": {"red": 1, "nir": 2}}
    colours = {"red": {"common_name": "red"}, "nir": {"common_name": "nir"}}
    optical = {"bands": colours, "scale": 1e-4, "offset": 0.01, "files": [rule]}
    dem = {"kind": "dem", "unit": "m", "static": True, "bands": {"z": {}},
           "nodata": -9999, "files": [{"path": "in/dem.tif"}]}  # fmt: skip
    out = [run(tmp_path, spec, name) for name, spec in (("cam", optical), ("dem", dem))]
    sources = [{"source": f"{o.relative_to(tmp_path)}/source.yaml"} for o in out]
    campaign = parse_campaign({
        "name": "test", "title": "Test", "grid": {"crs": UTM}, "sources": sources,
        "aoi": {"bbox": [360060, 5818860, 361140, 5819940], "crs": UTM},
        "cube": {"periods": [{"name": "a", "start": "2018-05-01", "end": "2018-05-31"}]},
        "tasks": [{"name": "lc", "kind": "segmentation", "classes": "c.csv",
                   "labels": {"file": "l.gpkg", "column": "c"}}],
    })  # fmt: skip
    lock = lock_items(campaign, campaign_grid(campaign))
    used = {i["id"]: i for i in lock["items"] if i["decision"] == "use"}
    assert set(used) == {"cam_20180501", "dem"}
    assert "outside every period" in next(
        i["why"] for i in lock["items"] if i["id"] == "cam_20180601"
    )
    write_json("results/scenes/items.json", lock)
    verify_items(campaign, campaign_grid(campaign))
    assert read_json("results/scenes/verified.json") == {"cam_20180501": "ok", "dem": "ok"}
    item = used["cam_20180501"]
    assert 40 < item["sun_elevation_deg"] < 60
    got = read_band(item, "nir", GeoBox((120, 120), PLACE, UTM))
    assert np.isnan(got[:10]).all()
    assert np.allclose(got[10:], data[1, 10:] * 1e-4 + 0.01, atol=1e-6)
    dem_band = read_band(used["dem"], "z", GeoBox((60, 60), PLACE @ Affine.scale(2), UTM))
    assert np.array_equal(dem_band, numbers(60, 60, dtype="float32"))


# --- documentation ------------------------------------------------------------------------------

EXAMPLES = [
    yaml.safe_load(block)
    for block in re.findall(r"(?ms)^```yaml\n(.*?)^```", PAGE)
    if not block.startswith("archive:")
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e["title"])
def test_examples_of_the_page_are_valid(tmp_path: Path, example: dict[str, Any]):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(example))
    assert isinstance(read_spec(tmp_path / "spec.yaml"), LocalSource)


def test_the_page_shows_every_kind_of_rule_and_the_campaign():
    assert len(EXAMPLES) >= 9
    text = re.search(r"(?ms)^```yaml\n(archive:.*?)^```", PAGE)
    assert text is not None
    shown = yaml.safe_load(text[1])
    campaign = parse_campaign({
        "name": "test", "title": "Test", **shown, "aoi": {"bbox": [12, 52, 13, 53]},
        "cube": {"periods": [{"name": "a", "start": "2018-05-01", "end": "2018-05-31"}]},
        "tasks": [{"name": "lc", "kind": "segmentation", "classes": "c.csv",
                   "labels": {"file": "l.gpkg", "column": "c"}}],
    })  # fmt: skip
    assert set(campaign.archive.files) == {"landsat", "lidar"}


def test_the_page_names_every_key():
    for model in (LocalSource, Rule, BandSpec, LayerSpec):
        missing = [k for k in model.model_fields if f"`{k}`" not in PAGE]
        assert not missing, model.__name__
    for value in (*get_args(Codes), *get_args(Unit), *LOCAL_KINDS):
        assert f"`{value}`" in PAGE or f'`"{value}"`' in PAGE, value


def prepare(folder: Path, title: str) -> None:
    """Files as the examples of the page expect them."""
    cube = numbers(8, 12, 10)
    if title.startswith("Landsat 5 and 7"):
        for band in ("b3", "b4", "b5", "fmask", "b7"):
            raster(folder / f"landsat/a/LT5035032200823800PAC01_{band}.tif", cube[0])
    elif title.startswith("Landsat 7"):
        raster(folder / "stacks/LE70220491999322EDC01.tif", cube)
    elif title.startswith("MODIS"):
        raster(folder / "modis/ndvi.tif", cube)
        raster(folder / "modis/evi.tif", cube)
        days = [f"2018-0{m}-{d}" for m in (1, 2, 3, 4) for d in ("01", "17")]
        (folder / "modis/dates.txt").write_text("\n".join(days))
    elif title.startswith("Aerial"):
        raster(folder / "a.tif", cube[:3])
        (folder / "flights.csv").write_text("path,date\na.tif,2018-05-01\n")
    elif title.startswith("Sentinel-2"):
        (folder / "sites").mkdir()
        netcdf(folder / "sites/S2_10m_a.nc", cube[:2], rising=False, named=True, step=10)
        # The example's other bands lie in files of their own; one pixel size is enough here.
        netcdf(folder / "sites/S2_20m_a.nc", cube[:2], rising=False, named=True)
    elif title.startswith("Airborne"):
        raster(folder / "flightline.img", cube, driver="ENVI")
        with (folder / "flightline.hdr").open("a") as f:
            f.write("wavelength units = Micrometers\nwavelength = {")
            f.write(", ".join(f"{0.4 + 0.1 * i:.1f}" for i in range(8)) + "}\n")
    elif title.startswith("RADARSAT"):
        made = folder / "radarsat/20160601/T3"
        made.mkdir(parents=True)
        for e in (
            "11",
            "12_real",
            "12_imag",
            "13_real",
            "13_imag",
            "22",
            "23_real",
            "23_imag",
            "33",
        ):
            cube[0].astype("<f4").tofile(made / f"T{e}.bin")
        (made / "config.txt").write_text("Nrow\n12\nNcol\n10\n")
    elif title.startswith("Canopy"):
        raster(folder / "lidar/chm_1_2.tif", cube[0].astype("float32"))
        raster(folder / "lidar/dtm_1_2.tif", cube[1].astype("float32"))
    else:
        raster(folder / "drone/20180501_red.tif", cube[0])
        raster(folder / "drone/20180501_clouds.tif", (cube[1] % 3).astype("uint8"))


@pytest.mark.parametrize(
    "example",
    [e for e in EXAMPLES if not e["title"].startswith("Sentinel-2")],
    ids=lambda e: e["title"],
)
def test_examples_of_the_page_run(tmp_path: Path, example: dict[str, Any]):
    prepare(tmp_path, example["title"])
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(example, sort_keys=False))
    out = import_files(tmp_path / "spec.yaml", tmp_path / "out" / "demo").parent
    table = load_source(str(out / "source.yaml"))
    assert isinstance(table, SourceTable) and items(out)
    assert set(example.get("layers", {})) == set(table.layers)
    assert set(example.get("bands", {})) <= set(table.bands)


def test_names_of_planes(tmp_path: Path):
    file = raster(tmp_path / "a.tif", numbers(2, 3, 3), names=["red", "nir"], nodata=7)
    planes = planes_of(file)
    assert [(p.name, p.index, p.nodata, p.when) for p in planes] == [
        ("red", 1, 7, None), ("nir", 2, 7, None),
    ]  # fmt: skip
    assert planes[0].geobox == GeoBox((3, 3), PLACE, UTM)
