"""The file that describes a cluster: what `terraloom cluster-profile` makes a profile from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from terraloom.config.base import Section

__all__ = ["GpuSite", "RuleSite", "Site"]

#: Names that SLURM knows; they become words of its commands.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@+-]*$")]
Rule = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Gres = Annotated[str, Field(pattern=r"^gpu(:[A-Za-z0-9_.]+)?(:\d+)?$")]
Megabytes = Annotated[int, Field(ge=300, le=100_000_000)]
Minutes = Annotated[int, Field(ge=1, le=525_600)]


class RuleSite(Section):
    """What one rule asks for on this cluster."""

    mem_mb: Megabytes | None = Field(None, description="Memory of the first attempt, MB.")
    runtime: Minutes | None = Field(None, description="Time of the first attempt, minutes.")
    partition: Word | None = Field(None, description="Partition of this rule.")
    gres: Gres | None = Field(None, description="GPUs of a job, such as `gpu:1`.")


class GpuSite(Section):
    """GPUs, and the rules that get them."""

    partition: Word | None = Field(None, description="Partition with GPUs; default: `partition`.")
    gres: Gres = Field("gpu:1", description="GPUs of a job, such as `gpu:1` or `gpu:a100:1`.")
    rules: list[Rule] = Field(
        ["train_member", "predict_tiles"], description="Rules whose jobs get GPUs."
    )


class Site(Section):
    """A SLURM cluster and what a campaign may use of it."""

    partition: Word | None = Field(None, description="Partition; default: that of the cluster.")
    account: Word | None = Field(None, description="Account that pays; default: none is named.")
    qos: Word | None = Field(None, description="Quality of service; default: none is named.")
    gpu: GpuSite | None = Field(None, description="GPUs; without this no job asks for one.")
    scratch: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_./${}-]+$",
        description="Folder on a disk of the node, such as `$TMPDIR` or `/scratch/$SLURM_JOB_ID`.",
    )  # fmt: skip
    jobs: int = Field(100, ge=1, le=10_000, description="Jobs in the queue at once.")
    retries: int = Field(2, ge=0, le=10, description="Further attempts of a job that failed.")
    max_mem_mb: Megabytes | None = Field(
        None, description="No attempt asks for more, MB; default: the largest node."
    )
    max_runtime: Minutes | None = Field(
        None, description="No attempt asks for more, minutes; default: the partition's limit."
    )
    status: Literal["auto", "squeue", "sacct"] = Field(
        "auto", description="Command that tells how jobs stand; `auto` asks the cluster."
    )
    poll_s: int = Field(10, ge=1, le=600, description="Seconds between two looks at the jobs.")
    latency_s: int = Field(
        30, ge=1, le=600, description="How long files may take to be seen by other nodes, seconds."
    )
    rules: dict[Rule, RuleSite] = Field(
        default_factory=dict, description="Memory, time, partition or GPUs of single rules."
    )
