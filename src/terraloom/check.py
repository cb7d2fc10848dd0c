"""``terraloom check``: validate a campaign and its inputs and show the plan; nothing is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from terraloom.acquire.sources import load_source
from terraloom.config.campaign import Campaign
from terraloom.errors import AoiError, ConfigError
from terraloom.legend import read_legend
from terraloom.plan import RUN_MADE, Plan, resolve_campaign

__all__ = ["check_campaign"]

#: Measured bytes per 10 m pixel: cube and prediction stores, without compression gains.
_BYTES_PER_VALUE = 2
_PREDICT_BYTES_PX = 16


def check_campaign(path: Path, *, as_json: bool = False) -> str:
    """Text (or JSON) of the plan.

    Raises:
        TerraloomError: The first input that cannot be used, with what to do.
    """
    campaign, _ = resolve_campaign({"campaign": str(path)})
    plan = Plan.of(campaign)
    notes = _check_inputs(campaign, plan)
    facts = _facts(campaign, plan, notes)
    if as_json:
        return json.dumps(facts, indent=1)
    jobs = ", ".join(f"{stage} {n}" for stage, n in facts["jobs"].items())
    lines = [
        plan.summary(),
        f"  jobs: {sum(facts['jobs'].values())} ({jobs})",
        f"  disk: about {facts['disk_mb']:.0f} MB of intermediates and products",
        f"  scenes: {facts['scenes']}",
        *(f"  note: {n}" for n in notes),
        f"Run it: snakemake --config campaign={path}",
    ]
    return "\n".join(lines)


def _check_inputs(campaign: Campaign, plan: Plan) -> list[str]:
    notes = []
    for source in campaign.sources:
        if _made_by_run(source.source):
            notes.append(f"{source.source} will be made by the run (archive.kind)")
        else:
            load_source(source.source).choose(source.bands)
        local = source.catalogue and "://" not in source.catalogue
        if local and not Path(str(source.catalogue)).exists():
            if not str(source.catalogue).startswith(RUN_MADE):
                raise ConfigError(
                    "there is no such catalogue", where=f"sources[].catalogue {source.catalogue}",
                    fix="give a STAC API URL or the path of a catalog.json",
                )  # fmt: skip
            notes.append(f"{source.catalogue} will be made by the run (archive.kind)")
    for task in campaign.tasks:
        if task.classes:
            legend = read_legend(task.classes)
            known = {*legend.names, *legend.broader}
            unknown = sorted(set(task.labels.mapping.values()) - known)
            if unknown:
                raise ConfigError(
                    f"mapping names classes that are not in the legend: {', '.join(unknown)}",
                    where=f"tasks[{task.name}].labels.mapping", allowed=", ".join(legend.names),
                )  # fmt: skip
        if Path(task.labels.file).exists():
            _check_labels(campaign, plan, task.name)
        elif not task.labels.file.startswith(RUN_MADE):
            raise ConfigError(
                "there is no such label file", where=f"tasks[{task.name}].labels.file "
                f"{task.labels.file}", fix="give a path from the project folder",
            )  # fmt: skip
        else:
            notes.append(f"{task.labels.file} will be made by the run (archive.kind)")
    _check_named_files(campaign, plan)
    _check_simulation(campaign, plan)
    return sorted(set(notes))


def _check_named_files(campaign: Campaign, plan: Plan) -> None:
    """Files that the plan of the workflow needs from the start; without one it is no plan."""
    regions = [campaign.regions.file] if campaign.regions else []
    correct = "correct the path (from the project folder)"
    for key, files, fix in (
        ("folds.regions", [campaign.folds.regions] if campaign.folds.regions else [], correct),
        ("model.weights", plan.weight_files, correct),
        ("regions.file", regions, correct),
        ("sample", plan.sample_files, correct),
        ("sample.answers", plan.answer_files,
         "leave `sample.answers` out until the sample is drawn and answered"),
    ):  # fmt: skip
        missing = [f for f in files if not Path(f).exists() and not f.startswith(RUN_MADE)]
        if missing:
            raise ConfigError("there is no such file", where=f"{key} {missing[0]}", fix=fix)


def _made_by_run(path: str) -> bool:
    return path.startswith(RUN_MADE) and not Path(path).exists()


def _check_labels(campaign: Campaign, plan: Plan, name: str) -> None:
    from terraloom.labels.read import read_labels
    from terraloom.labels.sources import BLOCK_M

    task = next(t for t in campaign.tasks if t.name == name)
    legend = read_legend(task.classes) if task.classes else None
    block = campaign.folds.block_m
    read_labels(task, plan.grid, legend, block_m=BLOCK_M if block == "auto" else float(block))


def _check_simulation(campaign: Campaign, plan: Plan) -> None:
    simulation = campaign.archive.simulation
    if simulation is None:
        return
    h, w = plan.grid.geobox.shape
    if (h, w) != (simulation.size_px, simulation.size_px):
        raise AoiError(
            f"the AOI has {w} x {h} px, the simulated region {simulation.size_px} px",
            where="aoi.bbox", fix="make archive.simulation.size_px and aoi.bbox agree",
        )  # fmt: skip


def _model_jobs(campaign: Campaign) -> int:
    folds, model = campaign.folds.count, campaign.model
    search = folds * int(model.search is not None)
    return folds * model.members + search + 1 + int(model.baseline)


def _facts(campaign: Campaign, plan: Plan, notes: list[str]) -> dict[str, Any]:
    batches, parts = len(plan.batch_names), len(plan.part_names)
    building = campaign.milestones
    simulated = campaign.archive.kind == "simulated"
    jobs = {
        "archive": len(campaign.archive.files) or int(campaign.archive.kind != "stac"),
        "scenes": (4 + parts * len(plan.period_names)) if building.scenes == "build" else 0,
        "cube": batches,
        "chips": 2 if building.chips == "build" else 0,
        "model": _model_jobs(campaign) if building.model == "build" else 0,
        "map": batches * (2 if campaign.products.layout == "tiles" else 1) + 2
        + 2 * int(campaign.sample is not None) + int(simulated)
        + int(campaign.products.vector) + int(campaign.regions is not None)
        + int(campaign.predict.runtime != "torch"),
        "report": 2,
    }  # fmt: skip
    h, w = plan.grid.geobox.shape
    values = 0.0
    for source in campaign.sources:
        if _made_by_run(source.source):
            continue
        table = load_source(source.source)
        for key in table.choose(source.bands):
            factor = int(table.bands[key].group.rsplit("_", 1)[1]) / 10
            values += (1 if table.static else len(campaign.cube.periods)) / factor**2
    disk = h * w * (values * _BYTES_PER_VALUE + _PREDICT_BYTES_PX) * 1.5 / 1e6
    lock = Path("results/scenes/items.json")
    scenes = "not searched yet (target `scenes` writes the item lock)"
    if lock.exists():
        items = json.loads(lock.read_text(encoding="utf-8"))
        if items.get("campaign") == campaign.name:
            used = sum(i["decision"] == "use" for i in items["items"])
            scenes = f"{used} of {len(items['items'])} locked items are used"
    return {
        "campaign": campaign.name, "tiles": len(plan.grid.tiles()), "jobs": jobs,
        "disk_mb": round(disk, 1), "scenes": scenes, "notes": notes,
    }  # fmt: skip
