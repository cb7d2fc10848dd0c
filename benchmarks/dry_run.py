"""Time and memory of planning a campaign of about 1,000 tiles: `snakemake -n`, median of three."""

from __future__ import annotations

import resource
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
#: 32 x 32 tiles of 3.84 km.
KEYS = ["aoi={bbox: [300000, 5700000, 422880, 5822880]}", "grid={tile_px: 384, tiles_per_job: 10}"]


def main() -> None:
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "snakemake", "-n", "-q", "rules", "--snakefile", str(PROJECT / "workflow/Snakefile"),
            "--workflow-profile", str(PROJECT / "workflow/profiles/default"), "--directory", folder,
            "--config", "campaign=config/campaigns/havel.yaml", *KEYS,
        ]  # fmt: skip
        for _ in range(3):
            start = time.monotonic()
            subprocess.run(command, check=True, capture_output=True, cwd=PROJECT)
            seconds.append(time.monotonic() - start)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print("tiles  seconds (median of 3)  peak MB")
    print(f"{1024:5}  {statistics.median(seconds):21.2f}  {peak:7.0f}")


if __name__ == "__main__":
    main()
