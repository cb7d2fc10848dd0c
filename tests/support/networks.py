"""Networks that were never trained, for tests of everything but their skill."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from terraloom.config.base import TaskKind
from terraloom.config.campaign import Campaign
from terraloom.grid import CampaignGrid
from terraloom.io import write_json
from terraloom.legend import read_legend
from terraloom.models.fusion import FusionSpec, Normalisation, index_pairs
from terraloom.models.heads import TaskSpec
from terraloom.models.mapnet import FEATURES, MapNet
from terraloom.models.registry import build, load_member, save_member
from terraloom.predict.folding import folded
from terraloom.predict.reader import CubeReader
from terraloom.preprocess.groups import group_factor
from terraloom.uncertainty.applicability import Applicability, cell_means, fit_space
from terraloom.uncertainty.applicability_file import write_applicability


def random_ensemble(
    campaign: Campaign,
    grid: CampaignGrid,
    members: int = 2,
    *,
    width: int = 8,
    dropout: float = 0.3,
) -> None:
    """Save members with random weights that fit the cubes of the run in the working directory."""
    found = CubeReader(Path("work/cube"), grid).channels
    channels = {g: tuple(found[g]) for g in sorted(found)}  # a store keeps no order
    legend = read_legend(str(campaign.land_cover.classes))
    tasks = tuple(
        TaskSpec(
            t.name, t.kind.value, legend.names if t.kind is TaskKind.SEGMENTATION else (), t.unit
        )
        for t in campaign.tasks
    )
    spec = FusionSpec(channels, tasks, width=width, dropout=dropout)
    rng = np.random.default_rng(0)
    normalisation = {
        g: Normalisation(*(tuple(rng.uniform(0.1, 0.3, len(n) + len(index_pairs(g, n))))
                           for _ in range(2)))
        for g, n in channels.items()
    }  # fmt: skip
    for m in range(members):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(m)
            net = build(spec, normalisation)
            with torch.no_grad():
                # Fresh weights hardly look beyond their nearest pixels; these do.
                for weight in net.parameters():
                    if weight.ndim == 4:
                        weight.mul_(2)
        save_member(Path(f"results/model/fold-0/member-{m}.safetensors"), net.state_dict(), spec,
                    normalisation)  # fmt: skip
    calibration = {"method": "temperature", "temperature": 1.3}
    write_json("results/model/calibration.json", {"tasks": {campaign.land_cover.name: calibration}})
    k = len(legend)
    known: dict[str, Any] = {
        t.name: {"kind": "normalised", "factor": 1.9}
        for t in campaign.tasks
        if t.kind is TaskKind.REGRESSION
    }
    known[campaign.land_cover.name] = {
        "kind": "sets", "score": "lac", "thresholds": [0.8 - 0.2 * i / k for i in range(k)],
    }  # fmt: skip
    write_json("results/model/conformal.json", {"coverage": 0.9, "tasks": known})
    _random_reference(Path("results/model"), grid, members)


def _random_reference(folder: Path, grid: CampaignGrid, members: int) -> None:
    """A reference of training that is some pixels of the first corner."""
    corner = CubeReader(Path("work/cube"), grid).window(0, 0, 96, 96)
    inputs = {g: torch.from_numpy(x)[None] for g, x in corner.items()}
    spaces, names = [], [f"fold-0/member-{m}" for m in range(members)]
    for name in names:
        net, _ = load_member(folder / f"{name}.safetensors")
        features = cell_means(net.predict(inputs, describe=True)[FEATURES][0].numpy())
        spaces.append(fit_space(features[::9]))  # 256 points, as training keeps
    write_applicability(folder, Applicability(tuple(spaces), 0.4), names, np.array([0.2, 0.4]))


def check_reach(net: MapNet, scene: Callable[[int, int, int], dict[str, Tensor]]) -> None:
    """The receptive field is the reach of the gradient, and the halo the next whole stride.

    Args:
        net: A network in which no path from input to output cancels.
        scene: Height, width and number of windows to inputs.
    """
    rf, s, halo = net.receptive_field_px(), net.stride_px, net.halo_px()
    # One window per position within a stride; narrow windows suffice, as rows are measured.
    x = {k: v.double().requires_grad_() for k, v in scene(2 * halo + 2 * s, s, s).items()}
    at = halo + torch.arange(s)
    net.double()(x)["cover"][torch.arange(s), 0, at, 0].sum().backward()
    reach = 0
    for name, values in x.items():
        f, grad = group_factor(name), values.grad
        assert grad is not None
        for n, row in enumerate(at.tolist()):
            seen = torch.nonzero(grad[n].abs().sum((0, 2)))[:, 0]
            reach = max(reach, row - int(seen.min()) * f, int(seen.max()) * f + f - 1 - row)
    assert reach == rf
    assert rf <= halo < rf + s


def check_folded(net: MapNet, x: dict[str, Tensor]) -> None:
    """A network made ready to predict gives what it gave before, as logits too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for name, values in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                values.copy_(0.5 + torch.rand(values.shape))
    net.eval()
    plain = net.predict(x, describe=True)
    fast = folded(deepcopy(net))
    found, logits = fast.predict(x, describe=True), fast.predict(x, logits=True)
    assert found.keys() == plain.keys()
    for name, values in plain.items():
        assert torch.allclose(found[name], values, rtol=1e-3, atol=1e-4), name
    for task in net.spec.tasks:
        same = logits[task.name].softmax(1) if task.classed else logits[task.name]
        assert torch.allclose(same, found[task.name], atol=1e-6), task.name
