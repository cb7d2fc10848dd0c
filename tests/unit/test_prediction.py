"""Options of prediction: views, dropout, formats; what a kill leaves; the certificate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.networks import random_ensemble
from support.prediction import H, W, cut, large, whole
from terraloom.errors import ConfigError, ModelError
from terraloom.io import read_json, write_text
from terraloom.models.registry import load_member
from terraloom.predict import certify as certificates
from terraloom.predict import tilewriter
from terraloom.predict.calibration import calibrated_parts, most_probable
from terraloom.predict.certify import certify
from terraloom.predict.dropout import _ChannelMask, dropout_pass
from terraloom.predict.engine import predict_batch
from terraloom.predict.ensemble import Ensemble
from terraloom.predict.folding import folded
from terraloom.predict.reader import CubeReader
from terraloom.predict.views import predict_views
from terraloom.train.ensemble import Calibration, calibrated
from terraloom.uncertainty.decompose import decompose_entropy


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scene(folder: Path, **predict: Any) -> tuple[Ensemble, dict[str, np.ndarray]]:
    """An ensemble with settings of prediction, and the inputs of the region."""
    c, grid = cut(folder, 240, **predict)
    random_ensemble(c, grid)
    inputs = CubeReader(Path("work/cube"), grid).window(0, 0, H, W)
    return Ensemble.load(campaign=c), {g: x[None] for g, x in inputs.items()}


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        Calibration(),
        Calibration(scale=(0.4,)),
        Calibration(scale=(60.0,)),  # exp(scale ln p) of the most probable class would underflow
        Calibration("vector", (0.5, 1.5, 2, 0.8, 1), (0.3, -1, 0, 2, 0.1)),
    ],
)
def test_fast_calibration_and_entropy_are_the_exact_ones(how: Calibration) -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet([0.2] * 5, (3, 300, 70)).astype(np.float32).transpose(0, 3, 1, 2)
    p[:, :, 0, 0] = np.eye(5, dtype=np.float32)[0]  # a network that is certain
    p[1, :, 5, 5] = np.nan
    with np.errstate(divide="ignore"):
        logits = np.log(p) + rng.integers(-2, 3, (3, 1, 300, 70)).astype(np.float32)
    fast = calibrated_parts(logits, how)
    exact = decompose_entropy(calibrated(p, how, axis=1))
    for name in ("mean", "total", "aleatoric", "epistemic"):
        got, want = getattr(fast, name), getattr(exact, name)
        assert np.array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=name)
    assert np.all(fast.epistemic[~np.isnan(fast.total)] >= 0)


def test_most_probable_class_is_the_first_of_equal_ones() -> None:
    p = np.random.default_rng(0).integers(0, 4, (6, 20, 30)).astype(np.float32)
    assert np.array_equal(most_probable(p), p.argmax(axis=0))


def test_a_calibration_of_other_classes_is_refused() -> None:
    with pytest.raises(ModelError, match="3 classes"):
        calibrated_parts(np.full((1, 3, 2, 2), 1 / 3, np.float32), Calibration(scale=(1.0, 2.0)))


def test_folded_batch_norms_change_nothing_but_time(here: Path) -> None:
    _, inputs = scene(here)
    file = next(Path("results/model").rglob("member-*.safetensors"))
    plain, fast = load_member(file)[0], folded(load_member(file)[0])
    assert not any(isinstance(m, torch.nn.BatchNorm2d | torch.nn.ReLU) for m in fast.modules())
    tensors = {g: torch.from_numpy(x) for g, x in inputs.items()}
    for name, values in plain.predict(tensors).items():
        assert torch.allclose(fast.predict(tensors)[name], values, rtol=1e-4, atol=2e-5), name


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [4, 8])
def test_views_are_the_mean_of_turned_windows(views: int) -> None:
    x = np.arange(24, dtype=np.float32).reshape(1, 1, 4, 6)
    seen = []

    def predict(inputs: Any, within: Any = None) -> dict[str, np.ndarray]:
        seen.append(inputs["g"].shape)
        weight = np.linspace(0, 1, inputs["g"].size, dtype=np.float32)
        out = inputs["g"] + 0
        return {"lc": (out * weight.reshape(out.shape))[None], ".features": out[None] + 0}

    got = predict_views(predict, {"g": x}, views)
    assert seen.count((1, 1, 4, 6)) == 4 and seen.count((1, 1, 6, 4)) == views - 4
    if views == 8:
        pairs = [(k, f) for k in range(4) for f in (False, True)]
    else:
        pairs = [(0, False), (0, True), (2, False), (2, True)]
    total = np.zeros_like(x)
    for k, f in pairs:
        part = np.rot90(x[..., ::-1] if f else x, k, (-2, -1))
        back = np.rot90(predict({"g": np.ascontiguousarray(part)})["lc"][0], -k, (-2, -1))
        total += back[..., ::-1] if f else back
    np.testing.assert_allclose(got["lc"][0], total / views, rtol=1e-5)
    assert np.array_equal(got[".features"][0], x), "what is no prediction is not averaged"


def test_views_average_probabilities_of_what_is_wanted_of_each_window() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    within = [(slice(1, 4), slice(0, 3)), (slice(3, 6), slice(2, 5))]

    def predict(inputs: Any, within: Any = None) -> dict[str, np.ndarray]:
        out = inputs["g"] * np.linspace(1, 2, 36, dtype=np.float32).reshape(6, 6)
        if within:
            out = np.stack([v[:, r, c] for v, (r, c) in zip(out, within, strict=True)])
        return {"lc": out[None], "height": out[None] + 0}

    got = predict_views(predict, {"g": x}, 4, within, {"lc"})
    p = np.zeros((2, 3, 6, 6))
    value = np.zeros((2, 3, 6, 6))
    for rows in (1, -1):
        for cols in (1, -1):
            part = predict({"g": x[..., ::rows, ::cols]})["height"][0][..., ::rows, ::cols]
            value += part / 4
            p += torch.from_numpy(part.copy()).softmax(1).numpy() / 4
    for n, (r, c) in enumerate(within):
        np.testing.assert_allclose(np.exp(got["lc"][0, n]), p[n, :, r, c], rtol=1e-5)
        np.testing.assert_allclose(got["height"][0, n], value[n, :, r, c], rtol=1e-5, atol=1e-6)


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_passes_differ_and_repeat_and_leave_the_network_alone(here: Path) -> None:
    ensemble, inputs = scene(here, dropout_passes=3)
    before = {k: v.clone() for m in ensemble.members for k, v in m.state_dict().items()}
    first = ensemble.predict(inputs)["lc"]
    assert first.shape[0] == 6
    assert len({first[i].tobytes() for i in range(6)}) > 3, "passes differ"
    assert np.array_equal(first, ensemble.predict(inputs)["lc"]), "and repeat"
    assert not any(m.training for net in ensemble.members for m in net.modules())
    after = {k: v for m in ensemble.members for k, v in m.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_dropout_keeps_the_mean_of_a_channel(here: Path) -> None:
    """Inverted dropout: over many passes the masks average to 1."""
    mask, total = _ChannelMask(0.3, (1, 2, 3)), torch.zeros(1, 16, 1, 1)
    for n in range(400):
        with dropout_pass(n):
            total += mask(torch.ones(1, 16, 1, 1))
    assert float(abs(total / 400 - 1).mean()) < 0.05
    assert torch.equal(mask(torch.ones(2, 16, 4, 4)), torch.ones(2, 16, 4, 4)), "none outside"


@pytest.mark.slow
def test_dropout_and_views_do_not_break_invariance(here: Path) -> None:
    """Masks are those of the pass, flipped windows begin on whole strides."""
    c, grid = cut(here, 96, dropout_passes=2, views=8)
    random_ensemble(c, grid)
    certificate = certify(c, grid, Path("certificate.json"), windows_px=(100,))
    assert certificate.passed, certificate.table()


def test_dropout_of_networks_without_it_is_refused(here: Path) -> None:
    c, grid = cut(here, 240, dropout_passes=2)
    random_ensemble(c, grid, dropout=0.0)
    with pytest.raises(ModelError, match="without dropout"):
        Ensemble.load(campaign=c)


# --- formats and devices --------------------------------------------------------------------------


def test_bf16_says_so_and_stays_close(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    exact, inputs = scene(here)
    fast, _ = scene(here, precision="bf16")
    assert "another class" in caplog.text
    logits = [e.predict(inputs)["lc"] for e in (exact, fast)]
    assert logits[1].dtype == np.float32
    a, b = (torch.from_numpy(x).softmax(2) for x in logits)
    assert 0 < float((a - b).abs().mean()) < 0.02


def test_a_gpu_that_is_not_there_is_named(here: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ModelError, match=r"predict\.device: cuda"):
        scene(here, device="cuda")


def test_other_numbers_of_views_are_refused(here: Path) -> None:
    with pytest.raises(ConfigError, match="views"):
        cut(here, 240, views=3)


# --- what is kept ---------------------------------------------------------------------------------


def files(folder: str = "work/predict") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(Path(folder).glob("*.zip"))}


def test_a_broken_job_goes_on_and_ends_byte_identical(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, grid = cut(here, 96, window_px=192)
    random_ensemble(c, grid)
    predict_batch(c, grid, "b0000")
    expected = files()
    for file in Path("work/predict").iterdir():
        file.unlink()
    real, calls = tilewriter.encoded, 0

    def breaks(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(tilewriter, "encoded", breaks)
    with pytest.raises(KeyboardInterrupt):
        predict_batch(c, grid, "b0000")
    left = {p.name for p in Path("work/predict").iterdir()}
    kept = set(files())
    assert left == kept and 0 < len(kept) < len(expected), "whole tiles and nothing else"
    # A tile of a window of four is lost: its window is predicted again, the others stay.
    lost = sorted(kept)[0]
    Path("work/predict", lost).unlink()
    stamps = {n: Path("work/predict", n).stat().st_mtime_ns for n in kept - {lost}}
    monkeypatch.setattr(tilewriter, "encoded", real)
    predict_batch(c, grid, "b0000")
    assert files() == expected
    assert stamps == {n: Path("work/predict", n).stat().st_mtime_ns for n in stamps}


def test_the_manifest_says_how_fast_and_stays_when_nothing_is_done(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    c, grid = cut(here, 96)
    random_ensemble(c, grid)
    with caplog.at_level("INFO"):
        predict_batch(c, grid, "b0000")
    speed = read_json("work/predict/b0000.json")["speed"]
    assert speed["computed_mpx_per_s"] > speed["mpx_per_s"] > 0
    ratio = speed["ha_per_s"] / (speed["mpx_per_s"] * 1e4)
    assert ratio == pytest.approx(1, abs=0.01), "100 m2 a pixel, and the scale of the projection"
    assert "Mpx/s" in caplog.text and "ha/s" in caplog.text
    before = Path("work/predict/b0000.json").read_bytes()
    predict_batch(c, grid, "b0000")
    assert Path("work/predict/b0000.json").read_bytes() == before


def test_what_changes_the_numbers_predicts_again_and_what_does_not_does_not(here: Path) -> None:
    c, grid = cut(here, 240)
    random_ensemble(c, grid)

    def digest(**predict: Any) -> str:
        c, _ = cut(here, 240, **predict)
        predict_batch(c, grid, "b0000")
        return str(read_json("work/predict/b0000.json")["tiles"]["x000y000"]["digest"])

    plain = digest()
    assert plain == digest(window_px=96, batch=2, threads=2)
    assert len({plain, digest(views=4), digest(dropout_passes=2), digest(precision="bf16")}) == 4


@pytest.mark.slow
def test_a_killed_process_leaves_whole_tiles_and_the_rest_is_done_after(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, grid = cut(here, 96, window_px=96)
    random_ensemble(c, grid)
    code = (
        "from support.prediction import campaign, GEOBOX; from shapely import box;"
        "from terraloom.grid import CampaignGrid; from terraloom.predict.engine import"
        " predict_batch; b = GEOBOX.boundingbox;"
        "predict_batch(campaign(96, window_px=96),"
        " CampaignGrid(GEOBOX, 96, box(b.left, b.bottom, b.right, b.top)), 'b0000')"
    )
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    job = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    while len(files() if Path("work/predict").exists() else {}) < 2:
        assert job.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    done = {n: Path("work/predict", n).stat().st_mtime_ns for n in files()}
    assert 2 <= len(done) < 9 and not Path("work/predict/b0000.json").exists()
    predict_batch(c, grid, "b0000")
    assert done == {n: Path("work/predict", n).stat().st_mtime_ns for n in done}, "not redone"
    left = {p.name for p in Path("work/predict").iterdir()} - set(files())
    assert left == {"b0000.json"}, "nothing of the killed one stays behind"
    killed = files()
    for name in killed:
        Path("work/predict", name).unlink()
    predict_batch(c, grid, "b0000")
    assert killed == files(), "byte by byte what an undisturbed job writes"
    assert whole(grid)["class_index"].shape == (H, W)


# --- certificate ----------------------------------------------------------------------------------


def test_the_certificate_compares_windows_batches_and_workers(here: Path) -> None:
    c, grid = cut(here, 96)
    random_ensemble(c, grid)
    certificate = certify(c, grid, Path("out/certificate.json"), windows_px=(50, 96, 144, 1000))
    assert certificate.passed, certificate.table()
    record = read_json("out/certificate.json")
    assert record["passed"] and record["valid_px"] > 40_000
    kinds = {(s["setting"]["window_px"], s["setting"]["batch"], s["setting"]["workers"])
             for s in record["settings"]}  # fmt: skip
    assert kinds == {
        (50, 1, 1), (96, 1, 1), (144, 1, 1), (50, 8, 1), (50, 1, 2), (96, 8, 2), (240, 1, 2),
    }  # fmt: skip
    assert all(s["classes_changed"] == 0 for s in record["settings"])
    assert "Passed" in certificate.table()
    certificate.require()


def test_a_network_that_looks_too_far_gets_none(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c, grid = cut(here, 240)
    random_ensemble(c, grid)
    monkeypatch.setattr(Ensemble, "halo_px", property(lambda _: 0))
    certificate = certify(c, grid, Path("certificate.json"), windows_px=(96,))
    assert not certificate.passed and not read_json("certificate.json")["passed"]
    worst = max(certificate.comparisons, key=lambda x: x.seam)
    assert worst.seam > 1e-2, "seams, of which the certificate is there to warn"
    with pytest.raises(ModelError, match=r"windows of 96 px, batch 1, 1 workers, cpu: \d+ classes"):
        certificate.require()


def test_equal_probabilities_are_ties_not_changes() -> None:
    a = np.full((2, 8, 8), 0.5, np.float32)
    b = a.copy()
    b[1, 3, 3] += 1e-7
    b[0, 4, 4], b[1, 4, 4] = 0.4, 0.6
    one = certificates._compared(
        certificates.Setting(4), np.ones((8, 8), bool), {"lc": a}, {"lc": b}, ()
    )
    assert (one.classes_changed, one.ties) == (0, 2) and not one.passed
    assert one.seam == pytest.approx(0.1) and np.isnan(one.interior)


@pytest.mark.slow
def test_the_certificate_of_the_usual_sizes(here: Path) -> None:
    """Windows of 256, 512, 1000 px and the whole; batch 1 and 8; one and two workers."""
    c, grid = large(here, 1104)
    random_ensemble(c, grid, members=1, width=4)
    certificate = certify(c, grid, Path("certificate.json"), size_px=1104)
    write_text("table.txt", certificate.table())
    assert certificate.passed, certificate.table()
    assert len(certificate.comparisons) == 7
    assert sum(x.ties for x in certificate.comparisons) <= 3
