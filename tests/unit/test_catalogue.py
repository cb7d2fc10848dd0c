from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pystac
import pytest
from pystac.validation.local_validator import LocalValidator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.fake_results import LEGEND, SCENES, SHAPE, fake_campaign, fake_results
from terraloom.errors import ConfigError, StateError
from terraloom.io import read_json, sha256, write_json
from terraloom.report.catalogue import catalogue_products


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def item(made: Path) -> pystac.Item:
    catalogue_products(made, fake_campaign())
    catalog = pystac.Catalog.from_file(str(made / "map" / "stac" / "catalog.json"))
    items = list(catalog.get_items(recursive=True))
    assert len(items) == 1
    return items[0]


def test_catalogue_and_item_follow_the_stac_core_schemas(made: Path, item: pystac.Item):
    validator = LocalValidator()
    checks = {"Feature": validator.item_validator(), "Catalog": validator.catalog_validator()}
    kinds = []
    for file in (made / "map" / "stac").rglob("*.json"):
        record = read_json(file)
        kinds.append(record["type"])
        assert [e.message for e in checks[record["type"]].iter_errors(record)] == []
    assert sorted(kinds) == ["Catalog", "Feature"]
    assert list(checks["Feature"].iter_errors(record | {"type": "Feature", "bbox": "no"}))


def test_all_links_are_relative_and_lead_somewhere(made: Path, item: pystac.Item):
    folder = Path(item.get_self_href()).parent
    for file in (made / "map" / "stac").rglob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert made.as_posix() not in text
        for link in json.loads(text)["links"]:
            assert (file.parent / link["href"]).is_file()
    later = {"report", "areas", "accuracy", "sample"}
    hrefs = {k: a["href"] for k, a in read_json(Path(item.get_self_href()))["assets"].items()}
    assert later <= set(hrefs)
    for key, href in hrefs.items():
        assert not re.match(r"/|[a-z]+:", href)
        if key not in later:
            assert (folder / href).resolve().is_file(), key


def test_catalogue_survives_moving_the_results(made: Path, item: pystac.Item, tmp_path: Path):
    moved = Path(shutil.copytree(made, tmp_path / "elsewhere"))
    catalog = pystac.Catalog.from_file(str(moved / "map" / "stac" / "catalog.json"))
    asset = next(catalog.get_items()).assets["class_map"]
    assert Path(asset.get_absolute_href()).resolve() == (moved / "map" / "class_map.tif").resolve()


def test_the_licence_of_the_campaign_is_that_of_the_item(made: Path, item: pystac.Item, tmp_path):
    assert item.properties["license"] == "other"
    named = fake_campaign(license="CC-BY-4.0")
    catalog = catalogue_products(made, named, out=tmp_path / "stac")
    again = next(pystac.Catalog.from_file(str(catalog)).get_items())
    assert again.properties["license"] == "CC-BY-4.0"
    with pytest.raises(ConfigError, match="license"):
        fake_campaign(license="CC BY/4.0")


def test_every_product_is_described(made: Path, item: pystac.Item):
    record = read_json(made / "map" / "map.json")
    for key, product in record["products"].items():
        asset = item.assets[key]
        assert asset.media_type == pystac.MediaType.COG
        assert asset.roles and asset.title
        path = made / "map" / product["file"]
        assert asset.extra_fields["file:checksum"] == "1220" + sha256(path)
        assert asset.extra_fields["file:size"] == path.stat().st_size
        assert asset.extra_fields["bands"]


def test_bands_agree_with_the_rasters(made: Path, item: pystac.Item):
    import rasterio

    for asset in item.assets.values():
        if asset.media_type != pystac.MediaType.COG:
            continue
        with rasterio.open(asset.get_absolute_href()) as src:
            bands = asset.extra_fields["bands"]
            assert len(bands) == src.count
            assert {b["data_type"] for b in bands} == set(src.dtypes)
            assert bands[0].get("nodata") == src.nodata


def test_the_picture_says_what_its_colours_show(made: Path, tmp_path: Path):
    root = Path(shutil.copytree(made, tmp_path / "results"))
    record = read_json(root / "map" / "map.json")
    record["image"] = {"kind": "false-colour", "group": "s1_10", "bands": ["VV", "VH", "VV - VH"]}
    write_json(root / "map" / "map.json", record)
    catalog = pystac.Catalog.from_file(str(catalogue_products(root, fake_campaign())))
    image = next(catalog.get_items()).assets["image"]
    assert image.title == "False-colour image of the last period"
    bands = image.extra_fields["bands"]
    assert [b["name"] for b in bands] == ["red", "green", "blue"]
    assert [b["description"] for b in bands] == ["s1_10 VV", "s1_10 VH", "s1_10 VV - VH"]


def test_class_map_carries_the_legend(item: pystac.Item):
    classes = item.assets["class_map"].extra_fields["classification:classes"]
    assert [c["value"] for c in classes] == [0, *LEGEND.codes]
    assert classes[0]["nodata"] is True
    assert [c["title"] for c in classes[1:]] == list(LEGEND.names)
    assert ["#" + c["color_hint"].lower() for c in classes[1:]] == list(LEGEND.colors)
    assert all(re.fullmatch(r"[0-9A-Za-z_-]+", c["name"]) for c in classes)


def test_reasons_are_bit_fields(item: pystac.Item):
    fields = item.assets["reasons"].extra_fields["classification:bitfields"]
    assert [(f["name"], f["offset"]) for f in fields][:4] == [
        ("nodata", 0), ("cloud", 1), ("cloud_edge", 2), ("shadow", 3),
    ]  # fmt: skip


def test_place_and_time_come_from_grid_and_campaign(item: pystac.Item):
    p = item.properties
    assert p["proj:code"] == "EPSG:32632"
    assert p["proj:shape"] == list(SHAPE)
    assert p["proj:transform"] == [10, 0, 684000, 0, -10, 5334000]
    assert p["datetime"] is None
    assert p["start_datetime"] == "2023-04-01T00:00:00Z"
    assert p["end_datetime"] == "2023-09-30T23:59:59Z"
    west, south, east, north = item.bbox
    assert 11.47 < west < 11.48 and 11.52 < east < 11.53 and 48.11 < south < north < 48.14


def test_provenance(made: Path, item: pystac.Item):
    from terraloom import __version__

    p = item.properties
    assert p["terraloom:scenes"] == SCENES
    assert p["terraloom:version"] == __version__
    name = "fold-1/member-0.safetensors"
    assert p["terraloom:weights"][name] == sha256(made / "model" / name)
    assert len(p["terraloom:weights"]) == 4
    assert re.fullmatch(r"[0-9a-f]{16}", p["terraloom:config_digest"])
    for key in ("config", "code"):
        assert re.fullmatch(r"[0-9a-f]{16}", p[f"terraloom:map_{key}"])
    assert p["terraloom:estimator"]["kind"] == "stratified_random"
    assert p["processing:software"] == {"terraloom": __version__}


def test_digest_follows_the_settings(made: Path, item: pystac.Item, tmp_path: Path):
    changed = catalogue_products(made, fake_campaign(seed=1), out=tmp_path / "stac")
    other = next(pystac.Catalog.from_file(str(changed)).get_items())
    key = "terraloom:config_digest"
    assert other.properties[key] != item.properties[key]


def test_same_results_give_the_same_bytes(made: Path, item: pystac.Item, tmp_path: Path):
    folder = made / "map" / "stac"
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.json")}
    catalogue_products(made, fake_campaign())
    assert before == {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.json")}


def test_without_a_sample_no_sample_is_promised(made: Path, tmp_path: Path):
    path = catalogue_products(made, fake_campaign(sample=False), out=tmp_path / "stac")
    assert "sample" not in next(pystac.Catalog.from_file(str(path)).get_items()).assets


def test_crs_without_a_code_carries_its_definition(made: Path, tmp_path: Path):
    from shapely.geometry import box

    from terraloom.grid import pick_crs

    root = Path(shutil.copytree(made, tmp_path / "results"))
    record = read_json(root / "map" / "map.json")
    record["geobox"] |= {"crs": pick_crs(box(0, 40, 20, 50)), "transform": [10, 0, 0, 0, -10, 0]}
    write_json(root / "map" / "map.json", record)
    path = catalogue_products(root, fake_campaign())
    item = next(pystac.Catalog.from_file(str(path)).get_items())
    assert item.properties["proj:code"] is None
    assert item.properties["proj:projjson"]["type"] == "ProjectedCRS"


@pytest.mark.parametrize("name", ["map/map.json", "scenes/items.json", "map/uncertainty.tif"])
def test_missing_file_is_named(made: Path, tmp_path: Path, name: str):
    root = Path(shutil.copytree(made, tmp_path / "results"))
    shutil.rmtree(root / "map" / "stac", ignore_errors=True)
    (root / name).unlink()
    with pytest.raises(StateError, match=Path(name).name):
        catalogue_products(root, fake_campaign())
    assert not (root / "map" / "stac").exists()
