# Helpers of the rules: the validated campaign, its plan, code digests, resources.
import os
from pathlib import Path

from terraloom.errors import TerraloomError
from terraloom.plan import Plan, resolve_campaign
from terraloom.state import code_digest, files_digest

PROJECT = os.path.relpath(Path(workflow.basedir).parent)

try:
    CAMPAIGN, RESOLVED = resolve_campaign(config, project=PROJECT)
    PLAN = Plan.of(CAMPAIGN)
except TerraloomError as problem:
    raise WorkflowError(str(problem))

BATCHES = PLAN.batch_names
PARTS = PLAN.part_names
FOLDS = [str(k) for k in range(CAMPAIGN.folds.count)]
MILESTONES = PLAN.milestones


wildcard_constraints:
    batch=r"b\d+",
    part=r"p\d+",
    fold=r"\d+",


def building(milestone):
    """Whether the rules of a milestone are in the plan; a frozen one is used as it is."""
    return getattr(CAMPAIGN.milestones, milestone) == "build"


def keys(*dotted):
    """Values of campaign keys for the params of a job; edits of other keys rerun nothing."""
    return PLAN.keys(*dotted)


def mem_mb(base):
    """Memory that grows on a retry, in MB."""
    return lambda wildcards, attempt: base * attempt


def minutes(base):
    """Run time that grows on a retry, in minutes."""
    return lambda wildcards, attempt: base * attempt


onstart:
    RESOLVED.write("work/campaign.yaml")
    print(PLAN.summary())


onsuccess:
    print(PLAN.where_to_look())
