"""Campaign files: strict, helpful, documented, in step with the generated reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from terraloom.config.campaign import Campaign
from terraloom.config.load import load_campaign, parse_campaign, read_yaml
from terraloom.config.products import Products
from terraloom.config.reference import schema_text, tables_text
from terraloom.errors import ConfigError

ROOT = Path(__file__).parents[2]
CAMPAIGNS = sorted((ROOT / "config/campaigns").glob("*.yaml"))


def havel() -> dict:
    return yaml.safe_load((ROOT / "config/campaigns/havel.yaml").read_text())


@pytest.mark.parametrize("path", CAMPAIGNS, ids=lambda p: p.stem)
def test_all_campaigns_are_valid(path: Path) -> None:
    assert isinstance(load_campaign(path), Campaign)


def test_generated_files_are_in_step() -> None:
    assert (ROOT / "config/schema.json").read_text() == schema_text(), "run `make schema`"
    assert (ROOT / "config/README.md").read_text() == tables_text(), "run `make schema`"


def test_every_key_is_described_with_its_unit() -> None:
    def fields(model: type, seen: set) -> None:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            if name.endswith("_m"):
                assert "metres" in field.description, name
            if name.endswith("_pct"):
                assert "percent" in field.description, name
            for sub in getattr(field.annotation, "__args__", [field.annotation]):
                if hasattr(sub, "model_fields") and sub not in seen:
                    fields(sub, seen | {sub})

    fields(Campaign, set())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {"tile_pxs": 384}}, r"grid\.tile_pxs`: unknown; did you mean `tile_px`"),
        ({"aoi": {"bbox": [1, 2, 0, 3]}}, "west < east"),
        ({"aoi": {}}, "either bbox or file"),
        ({"aoi": {"bbox": [330000, 0, 330001, 1]}}, "degrees"),
        ({"cube": {"periods": [{"name": "a", "start": "2017-03-01", "end": "2017-02-01"}]}},
         r"ends \(2017-02-01\) before it starts"),
        ({"title": None}, "title"),
        ({"sample": {"answers": "truth"}}, "only a simulated region"),
        ({"grid": {"tile_px": 100}}, "multiple of 48"),
        ({"archive": {"kind": "simulated"}}, "belongs to kind"),
    ],
)  # fmt: skip
def test_errors_name_key_and_fix(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as err:
        parse_campaign(havel() | change, where="havel.yaml")
    text = str(err.value)
    assert "havel.yaml" in text and "allowed" in text and "to do" in text


@pytest.mark.parametrize("address", [
    "https://me:pa55word@stac.example.org/v1",
    "https://stac.example.org/v1?lang=en&api_key=pa55word",
    "https://store.example.org/labels.gpkg?sv=1&SIG=pa55word",
    "https://b.s3.example.org/x.tif?X-Amz-Credential=pa55word",
])  # fmt: skip
def test_a_file_with_a_secret_is_refused_without_saying_it(address: str) -> None:
    """The file is copied into results, provenance and their history."""
    source = {"source": "sentinel-2-l2a", "catalogue": address, "collection": "s2"}
    with pytest.raises(ConfigError, match=r"key `sources\.0\.catalogue`") as err:
        parse_campaign(havel() | {"sources": [source]})
    assert "pa55word" not in str(err.value) and ".netrc" in str(err.value)
    open_address = "https://me@stac.example.org/v1?collection_key=1&tokens=2&monkey=3"
    parse_campaign(havel() | {"sources": [source | {"catalogue": open_address}]})


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as err:
        parse_campaign(havel() | {"seeed": 1, "titel": "x"})
    assert "seeed" in str(err.value) and "titel" in str(err.value)


def test_yaml_traps(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(ConfigError, match="twice"):
        read_yaml(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="no keys"):
        read_yaml(path)
    path.write_text("a: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")


def test_a_choice_of_numbers_may_come_as_text() -> None:
    """Snakemake gives the values of `--config 'products={probability_bits: 16}'` as text."""
    assert Products.model_validate({"probability_bits": "16"}).probability_bits == 16
    with pytest.raises(ValidationError, match="8 or 16"):
        Products.model_validate({"probability_bits": "12"})
