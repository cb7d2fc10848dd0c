"""Profiles of clusters: what SLURM says is read right, and what it does not have is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from terraloom.config.load import load_site
from terraloom.config.site import RuleSite, Site
from terraloom.errors import ConfigError, StateError
from terraloom.operate import cluster as module
from terraloom.operate.cluster import (
    Cluster,
    Partition,
    check_site,
    profile_of,
    read_cluster,
    status_command,
    write_profile,
)

ROOT = Path(__file__).parents[2]
#: Answers of a cluster with accounting.
SOUND = {
    "sinfo": "echo 'main*|up|1-12:00:00|64000|16|(null)'\n"
    "echo 'gpu|up|30:00|128000+|64+|gpu:a100:4'\n"
    "echo 'main*|up|1-12:00:00|128000|8|(null)'; echo 'old|drain|infinite|1000|1|(null)'",
    "sacct": "exit 0",
    "sacctmgr": "echo forest; echo water",
    "scontrol": "echo 'MinJobAge               = 300 sec'",
}
NO_ACCOUNTING = "echo 'Slurm accounting storage is disabled' >&2; exit 1"


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **answers: str) -> None:
    """SLURM's programs as scripts with fixed answers."""
    folder.mkdir(exist_ok=True)
    for name, text in (SOUND | answers).items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def site(**keys: Any) -> Site:
    return Site.model_validate(keys)


CLUSTER = Cluster(
    {
        "main": Partition("main", True, True, 2160, 128000, 16, gpus=False),
        "gpu": Partition("gpu", False, True, 30, 256000, 64, gpus=True),
    },
    accounting=False, min_job_age_s=300, accounts=None,
)  # fmt: skip


def test_what_the_cluster_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path / "bin", monkeypatch)
    found = read_cluster()
    assert found == Cluster(
        {
            "main": Partition("main", True, True, 36 * 60, 128000, 16, gpus=False),
            "gpu": Partition("gpu", False, True, 30, 128000, 64, gpus=True),
            "old": Partition("old", False, False, None, 1000, 1, gpus=False),
        },
        accounting=True, min_job_age_s=300, accounts=frozenset({"forest", "water"}),
    )  # fmt: skip
    programs(tmp_path / "bin", monkeypatch, sacct=NO_ACCOUNTING)
    found = read_cluster()
    assert not found.accounting and found.accounts is None


@pytest.mark.parametrize(
    ("accounting", "age", "wish", "expected"),
    [
        (True, 300, "auto", ("sacct", 10)),
        (False, 300, "auto", ("squeue", 10)),
        (True, 300, "squeue", ("squeue", 10)),
        (False, 12, "auto", ("squeue", 4)),
        (False, None, "auto", ("squeue", 10)),
    ],
)
def test_the_command_that_answers_is_taken(
    accounting: bool, age: int | None, wish: str, expected: tuple[str, int]
) -> None:
    asked = Cluster(CLUSTER.partitions, accounting, age, None)
    assert status_command(site(status=wish), asked) == expected


def test_a_cluster_that_forgets_at_once_is_refused() -> None:
    with pytest.raises(StateError, match="forgets finished jobs after 2 s"):
        status_command(Site(), Cluster(CLUSTER.partitions, False, 2, None))


def test_slurm_that_is_not_there_or_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = "slurm_load_partitions: Unable to contact slurm controller (connect failure)"
    programs(tmp_path / "bin", monkeypatch, sinfo=f"echo '{refused}' >&2; exit 1")
    with pytest.raises(StateError, match=r"`sinfo` failed.*Unable to contact") as err:
        read_cluster()
    assert "SLURM is down" in err.value.fix
    monkeypatch.setattr(module, "ASK_S", 0.2)
    programs(tmp_path / "bin", monkeypatch, sinfo="exec sleep 60")
    with pytest.raises(StateError, match="no answer within"):
        read_cluster()
    programs(tmp_path / "bin", monkeypatch, sacct="exec sleep 60")
    assert not read_cluster().accounting
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StateError, match="no command `sinfo`"):
        read_cluster()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"partition": "big"}, "key `partition`: there is no partition big"),
        ({"gpu": {"partition": "a100"}}, "key `gpu.partition`: there is no partition a100"),
        ({"rules": {"train_member": {"partition": "x"}}}, "`rules.train_member.partition`"),
        ({"gpu": {}}, "no node of partition main has a GPU"),
        ({"status": "sacct"}, "would wait for ever"),
    ],
)
def test_a_site_that_asks_for_what_is_not_there(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as err:
        check_site(site(**keys), CLUSTER, where="site.yaml")
    assert said in err.value.found and err.value.where == "site.yaml"
    assert "main (2160 min, 128000 MB, 16 processors); gpu (30 min, 256" in err.value.allowed


def test_an_account_of_others() -> None:
    known = Cluster(CLUSTER.partitions, True, 300, frozenset({"forest"}))
    check_site(site(account="forest"), known)
    with pytest.raises(ConfigError, match="you have no account water") as err:
        check_site(site(account="water"), known)
    assert "accounts forest" in err.value.allowed
    check_site(site(account="water"), CLUSTER)  # nobody can tell


def test_no_attempt_asks_for_more_than_there_is() -> None:
    rules = {"train_member": RuleSite(mem_mb=60000, runtime=20), "simulate": RuleSite()}
    made = profile_of(site(gpu={"partition": "gpu"}, rules=rules, max_mem_mb=100000), CLUSTER)
    assert made["default-resources"]["max_runtime"] == 30  # of the partition with GPUs
    assert made["default-resources"]["max_mem_mb"] == 100000
    assert made["max-threads"] == 16  # of the partition without
    asked = made["set-resources"]["train_member"]
    assert [eval(asked["mem_mb"], {"attempt": n}) for n in (1, 2)] == [60000, 100000]
    assert [eval(asked["runtime"], {"attempt": n}) for n in (1, 2)] == [20, 30]
    assert asked["slurm_partition"] == "'gpu'" and asked["gres"] == "'gpu:1'"
    assert set(made["set-resources"]) == {"train_member", "predict_tiles"}


def test_the_profile_of_the_repository_is_that_of_an_empty_site() -> None:
    file = ROOT / "workflow/profiles/slurm/config.yaml"
    assert yaml.safe_load(file.read_text()) == profile_of(Site(), Cluster({}, False, 300, None))


def test_a_profile_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path / "bin", monkeypatch)
    file = tmp_path / "site.yaml"
    file.write_text("partition: main\naccount: forest\nscratch: /scratch/$SLURM_JOB_ID\n")
    said = write_profile(file, tmp_path / "profile")
    made = yaml.safe_load((tmp_path / "profile/config.yaml").read_text())
    assert made["slurm-status-command"] == "sacct" and "slurm-no-account" not in made
    assert made["default-resources"] == {
        "mem_mb": 2000, "runtime": 60, "slurm_partition": "'main'", "slurm_account": "'forest'",
        "tmpdir": "'/scratch/$SLURM_JOB_ID'", "max_mem_mb": 128000, "max_runtime": 2160,
    }  # fmt: skip
    assert "128000 MB or 2160 minutes or 16 processors" in said and "watched with sacct" in said


def test_a_site_file_with_a_typing_error(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("partitions: main\nscratch: $(rm x)\nrules: {train_member: {runtime: 0}}\n")
    with pytest.raises(ConfigError) as err:
        load_site(file)
    assert "key `partitions`: unknown; did you mean `partition`?" in err.value.found
    assert (
        "key `scratch`" in err.value.found and "key `rules.train_member.runtime`" in err.value.found
    )


def test_the_documentation_lists_every_key() -> None:
    text = (ROOT / "docs/how-to/run-on-slurm.md").read_text(encoding="utf-8")
    assert [k for k in Site.model_fields if f"`{k}`" not in text] == []
