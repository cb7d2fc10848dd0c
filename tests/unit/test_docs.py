"""The documentation against the program: generated pages, names, links."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.main import get_command

from terraloom.acquire.sources import sources_text
from terraloom.cli import app
from terraloom.plan import Plan, resolve_campaign
from terraloom.preprocess.reasons import Reason

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
#: Command and one-line description: a table row whose first cell is one code span.
ROW = re.compile(r"(?m)^\| `([a-z -]+)` \| .*? \| (.+) \|$")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """Text without fenced code, where brackets are not links."""
    return re.sub(r"(?ms)^```.*?^```", "", text)


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.+)$", prose(path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w -]", "", t.lower()).strip().replace(" ", "-") for t in titles}


def test_sources_page_is_generated() -> None:
    """Rewrite with: python -c 'from terraloom.acquire.sources import *; print(sources_text())'."""
    assert page("reference/sources.md") == sources_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(path: Path) -> None:
    lost = []
    for target in LINK.findall(prose(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = unquote(target).partition("#")
        there = (path.parent / file).resolve() if file else path
        inside = there.is_relative_to(ROOT) and there.exists()
        if not inside or (anchor and anchor not in anchors(there)):
            lost.append(target)
    assert not lost


def test_index_names_every_page() -> None:
    named = set(LINK.findall(page("README.md")))
    pages = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")} - {"README.md"}
    assert pages <= named


def commands() -> dict[str, str]:
    """Every verb, ``state save`` and the like included, with its one-line help."""
    found: dict[str, str] = {}
    todo = [("", get_command(app))]
    while todo:
        name, command = todo.pop()
        inner = getattr(command, "commands", None)
        if inner is None:
            found[name.strip()] = (command.help or "").strip().splitlines()[0]
        else:
            todo += [(f"{name} {n}", c) for n, c in inner.items()]
    return found


def test_every_command_is_described_in_its_own_words() -> None:
    text = page("reference/commands.md").split("## Snakemake targets")
    assert len(text) == 2
    assert dict(ROW.findall(text[0])) == commands()


def test_snakemake_targets_are_those_of_the_workflow() -> None:
    rules = re.findall(r"(?m)^rule (\w+):", (ROOT / "workflow/Snakefile").read_text())
    targets = page("reference/commands.md").split("## Snakemake targets")[1]
    assert set(re.findall(r"(?m)^\| `(\w+)`", targets)) == set(rules)


def plan(name: str) -> Plan:
    campaign, _ = resolve_campaign({"campaign": str(ROOT / f"config/campaigns/{name}.yaml")})
    return Plan.of(campaign)


def test_products_page_has_every_file_of_the_milestones() -> None:
    text = page("reference/products.md")
    for campaign in ("havel", "rehearsal"):
        for milestone, files in plan(campaign).milestones.items():
            part = text.split(f"## `results/{milestone}/`")[1].split("\n## ")[0]
            missing = [f for f in files if f"`{f.rsplit('/', 1)[1]}`" not in part]
            assert not missing, milestone


def test_products_page_has_the_outputs_of_all_rules() -> None:
    text = page("reference/products.md")
    for path in sorted((ROOT / "workflow/rules").glob("*.smk")):
        for file in re.findall(r'"results/(?:\w+)/([^"]+)"', path.read_text(encoding="utf-8")):
            if "wildcards" in file:  # an input
                continue
            concrete = file.format(
                period="summer", part="p000", fold="0", member="0", batch="b0000"
            )
            assert f"`{concrete}`" in text, file


def test_products_page_has_the_reason_bits() -> None:
    rows = re.findall(r"(?m)^\| (\d) \| (\d+) \| `([A-Z_]+)`", page("reference/products.md"))
    assert [(1 << int(bit), int(v), name) for bit, v, name in rows] == [
        (int(r), int(r), r.name) for r in Reason
    ]


def test_tutorial_shows_the_plan_that_the_demo_prints() -> None:
    assert plan("havel").summary() in page("tutorial/first-map.md")


def test_pages_name_no_machine() -> None:
    for path in PAGES:
        found = re.search(r"(?<![\w.])/(home|work|tmp|root|Users|mnt)/", path.read_text())
        assert not found, f"{path.name}: {found}"
