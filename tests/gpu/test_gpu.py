"""Training and prediction on a GPU, beside the same on the processor.

These tests run where torch finds a CUDA device: ``make test-gpu``. They import only what training
itself needs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import xarray as xr

from terraloom.models.balance import BALANCES
from terraloom.models.devices import be_exact, choose_device, number_of
from terraloom.models.heads import LOSSES, TaskSpec
from terraloom.models.mapnet import MapNet
from terraloom.models.registry import build, make_spec, ready
from terraloom.train.checkpoint import Checkpoint, Progress
from terraloom.train.distributed import _Gather, _Sum, join_world, leave_world
from terraloom.train.fit import FitResult, FitSettings, fit_member, predict_held_out
from terraloom.train.sampler import Batch, Prefetch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GPU = torch.device("cuda")
COVER = TaskSpec("cover", "segmentation", ("water", "crop", "forest"))
HEIGHT = TaskSpec("height", "regression", unit="m")
TASKS = (COVER, HEIGHT)
FAST = FitSettings(width=6, depth=3, epochs=2, batch=4, crop_px=48, device="cuda", dropout=0.1)
MONTHS = ("2018-05", "2018-07", "2018-08")
BANDS = {"s2_10": ("B02", "B03", "B04", "B08"), "s2_20": ("B05", "B11")}
NETWORKS = ("fusion", "fpn", "context", "utae", "ltae", "tempcnn", "gru")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    be_exact(GPU)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def channels() -> dict[str, tuple[str, ...]]:
    return {g: tuple(f"{m}/{b}" for m in MONTHS for b in names) for g, names in BANDS.items()}


def make_chips(n: int = 4, size: int = 96) -> xr.Dataset:
    """Blocks of three classes with spectra of their own; heights follow the classes."""
    rng = np.random.default_rng(0)
    cover = np.kron(rng.integers(0, 3, (n, size // 12, size // 12)), np.ones((12, 12), int))
    variables, coords = {}, {}
    for group, names in channels().items():
        f = int(group.split("_")[1]) // 10
        spectra = rng.uniform(0.05, 0.4, (3, len(names))).astype(np.float32)
        x = spectra[cover[:, ::f, ::f]].transpose(0, 3, 1, 2)
        x = (x + rng.normal(0, 0.05, x.shape)).astype(np.float32)
        x[0, :, :10, :10] = np.nan
        variables[f"x_{group}"] = (("n", f"channel_{group}", f"y_{group}", f"x_{group}"), x)
        coords[f"channel_{group}"] = list(names)
    y = cover.astype(np.uint8)
    y[rng.random(y.shape) < 0.4] = 255
    height = (cover * 10 + rng.normal(0, 1, cover.shape)).astype(np.float32)
    height[rng.random(y.shape) < 0.8] = np.nan
    fold = np.kron(rng.permuted(np.arange(n * 16) % 4).reshape(n, 4, 4),
                   np.ones((size // 4, size // 4))).astype(np.uint8)  # fmt: skip
    for name, v in (("y_cover", y), ("y_height", height), ("fold", fold)):
        variables[name] = (("n", "y_10", "x_10"), v)
    return xr.Dataset(variables, coords=coords)


CHIPS = make_chips()


def fit(s: FitSettings = FAST, tasks: tuple[TaskSpec, ...] = TASKS, **more: object) -> FitResult:
    return fit_member(CHIPS, tasks, s, held_out_fold=0, member=0, seed=7, **more)  # type: ignore[arg-type]


def same(a: FitResult, b: FitResult) -> bool:
    return all(torch.equal(v, b.state_dict[k]) for k, v in a.state_dict.items())


def network(name: str) -> MapNet:
    """Fresh weights hardly look beyond their nearest pixels; these do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = build(make_spec(name, channels(), TASKS, width=8))
        with torch.no_grad():
            for weight in net.parameters():
                if weight.ndim == 4:
                    weight.mul_(1.5)
    return ready(net)


def inputs(size: int = 96) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    out = {}
    for group, names in channels().items():
        px = size * 10 // int(group.split("_")[1])
        x = torch.rand((1, len(names), px, px), generator=g)
        out[group] = x.masked_fill(torch.rand(x.shape, generator=g) < 0.02, float("nan"))
    return out


def test_the_device_and_its_numbers_are_chosen() -> None:
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    assert choose_device("cpu").type == "cpu"
    assert number_of("fp16", GPU) is torch.float16 and number_of("fp32", GPU) is None
    assert number_of("auto", GPU) in (torch.bfloat16, None)


@pytest.mark.parametrize(
    ("precision", "first", "shift"),
    [("fp32", 1e-3, 0.03), ("bf16", 0.05, 0.05), ("fp16", 0.02, 0.05)],
)
def test_training_learns_as_on_the_processor(precision: str, first: float, shift: float) -> None:
    """The first loss within ``first`` (ratio), the held-out accuracy at last within ``shift``."""
    s = replace(FAST, epochs=12, learning_rate=1e-2, dropout=0.0)
    here = fit(replace(s, device="cpu", precision="fp32"))
    there = fit(replace(s, precision=precision))
    for task in TASKS:
        a, b = here.history[task.name], there.history[task.name]
        assert b[0] == pytest.approx(a[0], rel=first)
        assert np.nanmean(b[-5:]) < 0.7 * np.nanmean(b[:3])
    right = []
    for result in (here, there):
        held = predict_held_out(CHIPS, [result.network()], 0)["cover"]
        right.append(float((held.p[0].argmax(1) == held.y).mean()))
    assert right[0] > 0.85 and abs(right[1] - right[0]) < shift


@pytest.mark.parametrize("name", NETWORKS)
def test_prediction_is_that_of_the_processor(name: str) -> None:
    net, x = network(name), inputs()
    here = net.predict(x)
    there = net.to(GPU).predict(x)
    assert there["cover"].device.type == GPU.type
    assert float(here["cover"].amax(1).mean()) < 0.999, "not all sure"
    assert float((here["cover"] - there["cover"].cpu()).abs().max()) < 1e-4
    assert torch.allclose(here["height"], there["height"].cpu(), rtol=1e-3, atol=1e-4)


def test_held_out_pixels_are_predicted_on_the_gpu() -> None:
    net = network("fusion")
    here = predict_held_out(CHIPS, [net], 0)["cover"]
    there = predict_held_out(CHIPS, [net.to(GPU)], 0)["cover"]
    assert np.array_equal(here.index, there.index)
    assert np.abs(here.p - there.p).max() < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_two_trainings_give_the_same_bytes(name: str) -> None:
    """Nothing that a network does has only forms that change from run to run."""
    s = replace(FAST, network=name, epochs=1, crop_px=24 if name in NETWORKS[4:] else 48)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*determinis.*")
        a = fit(s)
    torch.rand(3, device=GPU)
    assert same(a, fit(s))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_killed_training_ends_in_the_same_bytes(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = replace(FAST, precision=precision, epochs=3, patience=3)
    whole, file = fit(s), tmp_path / "state.safetensors"
    keep = Checkpoint.keep

    def dying(self: Checkpoint, now: Progress) -> None:
        keep(self, now)
        if now.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Checkpoint, "keep", dying)
        fit(s, checkpoint=Checkpoint(file, "a", every_s=0))
    torch.rand(5, device=GPU)
    again = fit(s, checkpoint=Checkpoint(file, "a", every_s=1e9))
    assert len(whole.history["cover"]) > 6 and len(whole.scores) > 1
    assert same(whole, again) and again.scores == whole.scores
    assert repr(again.history) == repr(whole.history)


def test_the_callers_random_stream_is_untouched() -> None:
    before = torch.cuda.get_rng_state()
    fit(replace(FAST, epochs=0.5))
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("balance", sorted(BALANCES))
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_balance_trains(balance: str, precision: str) -> None:
    done = fit(replace(FAST, balance=balance, precision=precision, epochs=3, learning_rate=1e-2))
    for values in done.history.values():
        assert np.isfinite(values).all() and np.mean(values[-3:]) < np.mean(values[:3])


@pytest.mark.parametrize("loss", LOSSES["segmentation"])
def test_every_class_loss_has_a_repeatable_form(loss: str) -> None:
    noise = np.full((3, 3), 0.1) + 0.7 * np.eye(3)
    task = replace(COVER, loss=loss, dice=0.5, smoothing=0.05, forget=0.2)
    given = {"cover": noise} if loss == "forward" else None
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*determinis.*")
        done = fit(replace(FAST, epochs=1), (task,), transitions=given)
    assert np.isfinite(done.history["cover"]).all()


@pytest.mark.parametrize("loss", LOSSES["regression"])
def test_every_loss_of_values_has_a_repeatable_form(loss: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*determinis.*")
        done = fit(replace(FAST, epochs=1), (replace(HEIGHT, loss=loss),))
    assert np.isfinite(done.history["height"]).all()


def test_channels_last_says_the_same_as_channels_first() -> None:
    net, x = network("fusion").to(GPU), inputs()
    weight = next(p for p in net.parameters() if p.ndim == 4 and p.shape[1] > 1 < p.shape[2])
    assert weight.is_contiguous(memory_format=torch.channels_last)
    last = net.predict(x)["cover"]
    first = net.to(memory_format=torch.contiguous_format).predict(x)["cover"]  # type: ignore[call-overload]
    assert float((last - first).abs().max()) < 1e-5


class _Source:
    """A sampler of known batches."""

    def __init__(self) -> None:
        self.generator = torch.Generator()

    def batch(self, size: int) -> Batch:
        x = torch.rand((size, 3, 4, 4), generator=self.generator)
        x = x.contiguous(memory_format=torch.channels_last)
        return Batch({1: x}, {"cover": torch.zeros((size, 4, 4), dtype=torch.uint8)}, {}, {}, [])


def test_batches_for_a_gpu_lie_in_pinned_memory() -> None:
    with Prefetch(_Source(), 2) as plain, Prefetch(_Source(), 2, pin=True) as pinned:  # type: ignore[arg-type]
        a, b = plain.take(), pinned.take()
    assert b.x[1].is_pinned() and b.y["cover"].is_pinned() and not a.x[1].is_pinned()
    assert torch.equal(a.x[1], b.x[1]) and a.x[1].stride() == b.x[1].stride()
    assert torch.equal(b.to(GPU).x[1].cpu(), a.x[1])


def test_a_group_of_one_process_starts_and_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "29517"}  # fmt: skip
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    world = join_world(GPU)
    try:
        assert (world.rank, world.size, dist.get_backend()) == (0, 1, "nccl")
        x = torch.arange(6.0, device=GPU).view(2, 3).requires_grad_()
        out = _Gather.apply(x) * 2 + _Sum.apply(x)
        out.sum().backward()
        assert torch.equal(out.detach(), 3 * x.detach())
        assert torch.equal(x.grad, torch.full_like(x, 3.0))
        assert same(fit(world=world), fit())
    finally:
        leave_world()
    assert not dist.is_initialized() and "CUBLAS_WORKSPACE_CONFIG" in os.environ
