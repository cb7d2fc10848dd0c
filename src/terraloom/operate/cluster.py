"""A SLURM cluster: what it offers, whether a site file fits it, and the profile for Snakemake.

Whatever SLURM is asked has a time limit: a controller that is down must not hold anybody.
"""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from terraloom.config.load import load_site
from terraloom.config.site import Site
from terraloom.errors import ConfigError, StateError
from terraloom.io import write_text

__all__ = [
    "ASK_S", "Cluster", "Partition", "ask", "check_site", "profile_of", "read_cluster",
    "write_profile",
]  # fmt: skip

#: How long SLURM may take for one answer, seconds.
ASK_S = 20
#: The executor looks at squeue only where finished jobs stay in it for so many looks.
_LOOKS = 3

_HEADER = """\
# Made from {site} by `terraloom cluster-profile`; edit that file and make this one again.
"""


@dataclass(frozen=True)
class Partition:
    """A partition; of several kinds of nodes the largest.

    Attributes:
        name: Its name.
        default: Whether jobs that name none go there.
        up: Whether it takes jobs.
        minutes: Longest job; None where there is no limit.
        mem_mb: Memory of its largest node, MB.
        cpus: Processors of its largest node (count).
        gpus: Whether a node has GPUs.
    """

    name: str
    default: bool
    up: bool
    minutes: int | None
    mem_mb: int
    cpus: int
    gpus: bool


@dataclass(frozen=True)
class Cluster:
    """What a cluster says about itself.

    Attributes:
        partitions: By name.
        accounting: Whether ``sacct`` answers.
        min_job_age_s: How long finished jobs stay in ``squeue``; None where it is not told.
        accounts: Accounts of the user; None where there is no accounting.
    """

    partitions: dict[str, Partition]
    accounting: bool
    min_job_age_s: int | None
    accounts: frozenset[str] | None

    @property
    def default(self) -> str | None:
        """Partition of jobs that name none."""
        return next((p.name for p in self.partitions.values() if p.default), None)

    def __str__(self) -> str:
        names = ", ".join(self.partitions)
        told = "accounting answers" if self.accounting else "no accounting"
        return f"SLURM answers; partitions {names}; {told}"


def ask(*words: str) -> str:
    """What a command of SLURM prints.

    Raises:
        StateError: It is not there, it failed, or it took longer than :data:`ASK_S`.
    """
    if shutil.which(words[0]) is None:
        raise StateError(
            f"there is no command `{words[0]}` here", where="SLURM",
            fix="run this on a login node of the cluster, with SLURM's programs on the PATH",
        )  # fmt: skip
    fix = f"try `{' '.join(words)}`; if it does not answer, SLURM is down: ask its operators"
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ASK_S, check=False)
    except subprocess.TimeoutExpired as err:
        raise StateError(
            f"`{words[0]}` gave no answer within {ASK_S} s", where="SLURM", fix=fix
        ) from err
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise StateError(f"`{words[0]}` failed: {said}", where="SLURM", fix=fix)
    return done.stdout


def read_cluster() -> Cluster:
    """Ask the cluster for its partitions, limits and accounting.

    Raises:
        StateError: SLURM is not there or does not answer.
    """
    partitions = _partitions(ask("sinfo", "-h", "-o", "%P|%a|%l|%m|%c|%G"))
    if not partitions:
        raise StateError("the cluster has no partition", where="SLURM", fix="ask its operators")
    accounting = _answers("sacct", "-n", "-X")
    accounts = None
    if accounting and _answers("sacctmgr", "--version"):
        told = ask(
            "sacctmgr", "-nP", "show", "associations", f"user={getpass.getuser()}",
            "format=account",
        )  # fmt: skip
        accounts = frozenset(told.split()) or None
    age = re.search(r"(?m)^MinJobAge\s*=\s*(\d+)\s*(h?)", ask("scontrol", "show", "config"))
    seconds = int(age[1]) * (3600 if age[2] else 1) if age else None
    return Cluster(partitions, accounting, seconds, accounts)


def _answers(*words: str) -> bool:
    """Whether a command is there and succeeds.

    sacct is installed on clusters without accounting too; who trusts it there waits for ever.
    """
    try:
        ask(*words)
    except StateError:
        return False
    return True


def _partitions(text: str) -> dict[str, Partition]:
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        name, state, limit, memory, cpus, gres = line.strip().split("|")
        star, name = name.endswith("*"), name.rstrip("*")
        before = found.get(name)
        found[name] = Partition(
            name, star, state == "up", _minutes(limit),
            max(int(memory.rstrip("+")), before.mem_mb if before else 0),
            max(int(cpus.rstrip("+")), before.cpus if before else 0),
            "gpu" in gres or bool(before and before.gpus),
        )  # fmt: skip
    return found


def _minutes(limit: str) -> int | None:
    """Minutes of a time limit such as ``1-12:00:00``, ``2:00:00`` or ``30:00``."""
    told = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if told is None:
        return None  # infinite, n/a
    days, hours, minutes, _ = (int(part or 0) for part in told.groups())
    return (days * 24 + hours) * 60 + minutes


def check_site(site: Site, cluster: Cluster, *, where: str = "site") -> None:
    """Refuse a site file that asks for what the cluster does not have.

    Raises:
        ConfigError: All problems, with the partitions and accounts there are.
    """
    problems = []
    asked = {
        "partition": site.partition,
        "gpu.partition": site.gpu.partition if site.gpu else None,
    } | {f"rules.{name}.partition": rule.partition for name, rule in site.rules.items()}
    for key, name in asked.items():
        if name is None:
            continue
        if name not in cluster.partitions:
            problems.append(f"key `{key}`: there is no partition {name}")
        elif not cluster.partitions[name].up:
            problems.append(f"key `{key}`: partition {name} takes no jobs now")
    if site.partition is None and cluster.default is None:
        problems.append("key `partition`: missing, and the cluster has no default partition")
    if site.account and cluster.accounts is not None and site.account not in cluster.accounts:
        problems.append(f"key `account`: you have no account {site.account}")
    if site.gpu and not problems:
        name = site.gpu.partition or site.partition or str(cluster.default)
        if not cluster.partitions[name].gpus:
            problems.append(f"key `gpu`: no node of partition {name} has a GPU")
    if site.status == "sacct" and not cluster.accounting:
        problems.append("key `status`: sacct does not answer, a run would wait for ever")
    if problems:
        found = problems[0] if len(problems) == 1 else "\n  ".join(["several problems", *problems])
        there = "; ".join(_shown(p) for p in cluster.partitions.values())
        accounts = f"; accounts {', '.join(sorted(cluster.accounts))}" if cluster.accounts else ""
        raise ConfigError(
            found, where=where, allowed=f"partitions {there}{accounts}",
            fix="correct the site file; see `sinfo` and `sacctmgr show associations`",
        )  # fmt: skip


def _shown(partition: Partition) -> str:
    limit = "no limit" if partition.minutes is None else f"{partition.minutes} min"
    gpus = ", GPUs" if partition.gpus else ""
    size = f"{partition.mem_mb} MB, {partition.cpus} processors"
    return f"{partition.name} ({limit}, {size}{gpus})"


def status_command(site: Site, cluster: Cluster) -> tuple[Literal["squeue", "sacct"], int]:
    """Command that tells how jobs stand, and seconds between two looks.

    Accounting knows finished jobs for long, squeue for ``MinJobAge``. Where that is short the
    looks come more often, so that no job can come and go unseen.

    Raises:
        StateError: Neither can tell.
    """
    if site.status == "sacct" or (site.status == "auto" and cluster.accounting):
        return "sacct", site.poll_s
    age = cluster.min_job_age_s
    if age is None:
        return "squeue", site.poll_s
    if age < _LOOKS:
        raise StateError(
            f"squeue forgets finished jobs after {age} s (MinJobAge)", where="SLURM",
            allowed=f"{_LOOKS} s or more, or accounting that answers `sacct -n`",
            fix="ask the operators for either; or run inside one large job with --cores",
        )  # fmt: skip
    return "squeue", min(site.poll_s, age // _LOOKS)


def profile_of(site: Site, cluster: Cluster) -> dict[str, Any]:
    """The settings of Snakemake for a cluster.

    Strings of resources are evaluated as Python by Snakemake, in each job; names stand in quotes
    so that a partition called ``max`` stays a name.
    """
    status, poll_s = status_command(site, cluster)
    minutes, mem_mb, cpus = _ceilings(site, cluster)
    common: dict[str, Any] = {"mem_mb": 2000, "runtime": 60}
    named = {"slurm_partition": site.partition, "slurm_account": site.account,
             "tmpdir": site.scratch}  # fmt: skip
    common |= {key: f"'{value}'" for key, value in named.items() if value}
    limits = {"max_mem_mb": mem_mb, "max_runtime": minutes}
    common |= {key: value for key, value in limits.items() if value}
    rules = _rules(site, minutes, mem_mb)
    return {
        "executor": "slurm",
        "jobs": site.jobs,
        "latency-wait": site.latency_s,
        "max-checksum-file-size": "2GB",
        "rerun-incomplete": True,
        "show-failed-logs": True,
        "persistence-backend": "file",
        "retries": site.retries,
        "slurm-status-command": status,
        "slurm-init-seconds-before-status-checks": poll_s,
        "seconds-between-status-checks": poll_s,
        **({"max-threads": cpus} if cpus else {}),
        **({} if site.account else {"slurm-no-account": True}),
        **({"slurm-qos": site.qos} if site.qos else {}),
        "default-resources": common,
        **({"set-resources": rules} if rules else {}),
    }


def _ceilings(site: Site, cluster: Cluster) -> tuple[int | None, int | None, int | None]:
    """Minutes, MB, processors that no job may ask for more than: with more it waits for ever."""
    names = {site.partition or cluster.default, *(r.partition for r in site.rules.values())}
    names |= {site.gpu.partition} if site.gpu else set()
    used = [p for name, p in cluster.partitions.items() if name in names]
    minutes = [m for m in (site.max_runtime, *(p.minutes for p in used)) if m]
    mem_mb = [m for m in (site.max_mem_mb, *(p.mem_mb for p in used)) if m and m > 1]
    cpus = min((p.cpus for p in used), default=None)
    return min(minutes, default=None), min(mem_mb, default=None), cpus


def _rules(site: Site, minutes: int | None, mem_mb: int | None) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    if gpu := site.gpu:
        keys = {"gres": gpu.gres, "slurm_partition": gpu.partition}
        out = {rule: {k: f"'{v}'" for k, v in keys.items() if v} for rule in gpu.rules}
    for name, rule in site.rules.items():
        keys = out.setdefault(name, {})
        if rule.mem_mb:
            keys["mem_mb"] = _growing(rule.mem_mb, mem_mb)
        if rule.runtime:
            keys["runtime"] = _growing(rule.runtime, minutes)
        if rule.partition:
            keys["slurm_partition"] = f"'{rule.partition}'"
        if rule.gres:
            keys["gres"] = f"'{rule.gres}'"
    return {name: keys for name, keys in sorted(out.items()) if keys}


def _growing(base: int, ceiling: int | None) -> str:
    return f"{base} * attempt" if ceiling is None else f"min({base} * attempt, {ceiling})"


def write_profile(site_file: Path, out: Path) -> str:
    """Write a profile for the cluster that this machine belongs to.

    Args:
        site_file: Site file.
        out: Folder of the profile; its ``config.yaml`` is replaced.

    Returns:
        What was found and how to use the profile.

    Raises:
        ConfigError: The site file cannot be read, or asks for what the cluster does not have.
        StateError: SLURM does not answer.
    """
    site = load_site(site_file)
    cluster = read_cluster()
    check_site(site, cluster, where=str(site_file))
    profile = profile_of(site, cluster)
    text = yaml.safe_dump(profile, sort_keys=False)
    write_text(out / "config.yaml", _HEADER.format(site=site_file) + text)
    status, limits = profile["slurm-status-command"], profile | profile["default-resources"]
    units = {"max_mem_mb": "MB", "max_runtime": "minutes", "max-threads": "processors"}
    most = [f"{limits[k]} {unit}" for k, unit in units.items() if k in limits]
    return (
        f"{cluster}\n"
        f"Jobs are watched with {status}, every {profile['seconds-between-status-checks']} s; "
        f"none asks for more than {' or '.join(most) or 'the partition has'}\n"
        f"Wrote {out}/config.yaml. Next: snakemake -n --workflow-profile {out} "
        "--config campaign=FILE"
    )
