"""Scores on real data, beside a random forest on the same labels and pixels.

Every figure is a mean over seeds with its spread; folds are spatial and settings are ones that a
campaign could hold. Needs the data folder (TERRALOOM_TEST_DATA or ../shared/data).

Usage: python benchmarks/real.py polygons|points|worldcereal|havel|chiapas [--seeds 3]
       [--work FOLDER] [--chips FILE] [--epochs N]

`worldcereal` prepares its scenes once, in the folder --work. `havel` and `chiapas` take the chips
of a finished run: results/chips/chips.zip after `snakemake chips`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

CASES = ("polygons", "points", "worldcereal", "havel", "chiapas")


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("case", choices=CASES)
    options.add_argument("--seeds", type=int, default=3, help="number of seeds, 3 or more")
    options.add_argument("--first", type=int, default=0, help="first seed")
    options.add_argument("--work", type=Path, help="folder that keeps prepared scenes")
    options.add_argument("--chips", type=Path, help="chips.zip of a finished run")
    options.add_argument(
        "--epochs", type=float, default=12, help="passes: polygons, havel, chiapas"
    )
    args = options.parse_args()
    torch.set_num_threads(1)
    seeds = range(args.first, args.first + args.seeds)
    if args.case == "polygons":
        import real_nc

        real_nc.report_polygons(seeds, epochs=args.epochs or 3)
    elif args.case == "points":
        import real_nc

        real_nc.report_points(seeds)
    elif args.case == "worldcereal":
        import real_worldcereal

        with tempfile.TemporaryDirectory() as scratch:
            real_worldcereal.report(args.work or Path(scratch), seeds)
    else:
        import real_chips

        if args.chips is None:
            options.error("--chips FILE is needed: results/chips/chips.zip of a run")
        real_chips.report(args.chips, seeds, epochs=args.epochs or 12)


if __name__ == "__main__":
    main()
