"""Polarimetric matrices: bands and back, change of basis, invariants, PolSARpro folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import rasterio

from terraloom.acquire.polsar import MATRIX_BANDS, folder_size, matrix_files, matrix_kind
from terraloom.errors import SceneError
from terraloom.preprocess.polsar import (
    coherency_of,
    complex_matrix,
    covariance_of,
    entropy_anisotropy_alpha,
    hermitian_error,
    matrix_bands,
    multilook,
    span,
    upper_triangle,
)

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TERRALOOM_TEST_DATA", ROOT.parent / "shared" / "data"))
SAMPLES = DATA / "polsar" / "tests" / "sample_data"
real = pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs the PolSARpro samples of shared/data")


def wishart(looks: int, shape: tuple[int, int], order: int = 3, seed: int = 5) -> np.ndarray:
    """Sample covariance matrices of complex Gaussian noise, (M, M, H, W)."""
    rng = np.random.default_rng(seed)
    size = (order, looks, *shape)
    k = (rng.normal(size=size) + 1j * rng.normal(size=size)) / np.sqrt(2)
    return np.einsum("ilhw,jlhw->ijhw", k, k.conj()) / looks


def of(vector: list[complex]) -> np.ndarray:
    """Coherency of one pure scatterer, (3, 3, 1, 1), from its Pauli vector."""
    k = np.array(vector, dtype=complex)
    return np.outer(k, k.conj())[:, :, None, None]


def test_names_of_bands():
    assert MATRIX_BANDS["C2"] == ("C11", "C12_re", "C12_im", "C22")
    assert len(MATRIX_BANDS["T3"]) == 9 and len(MATRIX_BANDS["C4"]) == 16
    assert matrix_kind(set(MATRIX_BANDS["T3"])) == "T3"
    assert matrix_kind({"C11", "C22"}) is None


@pytest.mark.parametrize(("letter", "order"), [("C", 2), ("T", 3), ("C", 4)])
def test_bands_and_back_is_exact(letter: str, order: int):
    matrix = wishart(4, (7, 5), order).astype(np.complex64)
    values, names = matrix_bands(matrix, letter)
    assert values.dtype == np.float32 and len(names) == order**2
    back = complex_matrix(values[::-1], names[::-1])  # order of bands does not matter
    assert back.dtype == np.complex64
    upper = np.triu_indices(order)
    off = np.where(np.eye(order, dtype=bool)[upper], matrix[upper].T.real, matrix[upper].T).T
    assert np.array_equal(back[upper], off)
    assert hermitian_error(back).max() == 0


def test_other_bands_are_refused():
    with pytest.raises(SceneError, match="not one matrix"):
        complex_matrix(np.zeros((3, 2, 2)), ["C11", "C12_re", "C22"])


def test_a_missing_band_makes_the_pixel_missing():
    values, names = matrix_bands(wishart(4, (3, 3)), "T")
    values[names.index("T23_im"), 1, 2] = np.nan
    matrix = complex_matrix(values, names)
    assert np.isnan(matrix[:, :, 1, 2]).all() and np.isnan(matrix).sum() == 9
    assert np.isnan(span(matrix)[1, 2]) and np.isfinite(span(matrix)[0, 0])


def test_hermitian_error_is_the_share_of_the_span():
    matrix = np.zeros((2, 2, 1, 2), dtype=complex)
    matrix[0, 0] = matrix[1, 1] = 2
    matrix[0, 1, 0, 1] = 1j
    assert hermitian_error(matrix).tolist() == [[0.0, 0.25]]


def test_change_of_basis_keeps_trace_eigenvalues_and_comes_back():
    covariance = wishart(6, (8, 9))
    coherency = coherency_of(covariance)
    assert np.allclose(span(coherency), span(covariance), rtol=1e-6)
    assert hermitian_error(coherency).max() < 1e-6

    def eigenvalues(m: np.ndarray) -> np.ndarray:
        return np.linalg.eigvalsh(np.moveaxis(m.astype(complex), (0, 1), (-2, -1)))

    assert np.allclose(eigenvalues(coherency), eigenvalues(covariance), atol=1e-6)
    assert np.allclose(covariance_of(coherency), covariance, atol=1e-6)
    with pytest.raises(SceneError, match="2 x 2"):
        coherency_of(covariance[:2, :2])


def test_canonical_scatterers_in_both_bases():
    # Lexicographic vectors (HH, sqrt 2 HV, VV): sphere, dihedral, dihedral turned by 45 degrees.
    for lexicographic, pauli in (
        ([1, 0, 1], [np.sqrt(2), 0, 0]),
        ([1, 0, -1], [0, np.sqrt(2), 0]),
        ([0, np.sqrt(2), 0], [0, 0, np.sqrt(2)]),
    ):
        assert np.allclose(coherency_of(of(lexicographic)), of(pauli), atol=1e-6)


def test_entropy_anisotropy_alpha_of_textbook_targets():
    # Cloude and Pottier 1997: surface alpha 0, dipole 45, dihedral 90; pure targets have entropy 0.
    for pauli, degrees in (([1, 0, 0], 0), ([1, 1, 0], 45), ([0, 1, 0], 90), ([0, 1j, 0], 90)):
        h, _, alpha = entropy_anisotropy_alpha(of(pauli))
        assert h.item() == pytest.approx(0, abs=1e-4)
        assert alpha.item() == pytest.approx(degrees, abs=1e-3)
    noise = np.eye(3)[:, :, None, None].astype(complex)
    h, a, alpha = entropy_anisotropy_alpha(noise)
    assert h.item() == pytest.approx(1) and a.item() == pytest.approx(0)
    assert alpha.item() == pytest.approx(60)  # (0 + 90 + 90) / 3
    # Dipoles of random orientation: T = diag(2, 1, 1) / 4, entropy 1.5 ln 2 / ln 3 = .9464.
    cloud = np.diag([0.5, 0.25, 0.25])[:, :, None, None].astype(complex)
    h, _, alpha = entropy_anisotropy_alpha(cloud)
    assert h.item() == pytest.approx(1.5 * np.log(2) / np.log(3)) and alpha.item() == 45
    two = np.diag([0.6, 0.3, 0.1])[:, :, None, None].astype(complex)
    assert entropy_anisotropy_alpha(two)[1].item() == pytest.approx(0.5)


def test_entropy_is_the_same_after_turning_about_the_line_of_sight():
    coherency = wishart(4, (6, 6))
    angle = 0.4
    turn = np.array([[1, 0, 0],
                     [0, np.cos(2 * angle), np.sin(2 * angle)],
                     [0, -np.sin(2 * angle), np.cos(2 * angle)]])  # fmt: skip
    turned = np.einsum("ij,jkhw,lk->ilhw", turn, coherency, turn)
    for one, other in zip(
        entropy_anisotropy_alpha(coherency), entropy_anisotropy_alpha(turned), strict=True
    ):
        assert np.allclose(one, other, atol=1e-4)


def test_missing_and_empty_pixels_have_no_entropy():
    coherency = wishart(4, (2, 2))
    coherency[:, :, 0, 0] = np.nan
    coherency[:, :, 0, 1] = 0
    for values in entropy_anisotropy_alpha(coherency):
        assert np.isnan(values[0]).all() and np.isfinite(values[1]).all()


def test_multilook_is_linear_and_skips_missing_pixels():
    matrix = wishart(1, (6, 10))
    looks = multilook(matrix, 2, 3)
    assert looks.shape == (3, 3, 3, 3)  # the tenth column is dropped
    assert np.allclose(looks[:, :, 1, 2], matrix[:, :, 2:4, 6:9].mean(axis=(2, 3)), atol=1e-6)
    assert np.allclose(
        coherency_of(multilook(matrix, 2, 2)), multilook(coherency_of(matrix), 2, 2), atol=1e-6
    )
    matrix[:, :, :2, :3] = np.nan
    matrix[:, :, 2, 0] = np.nan
    looks = multilook(matrix, 2, 3)
    assert np.isnan(looks[:, :, 0, 0]).all() and np.isfinite(looks[:, :, 1:]).all()
    with pytest.raises(SceneError, match="blocks of 7 x 1"):
        multilook(matrix, 7, 1)


def test_more_looks_raise_the_entropy_towards_one():
    single = entropy_anisotropy_alpha(wishart(1, (20, 20)))[0]
    many = entropy_anisotropy_alpha(wishart(64, (20, 20)))[0]
    assert single.max() < 1e-3 and many.min() > 0.9


def test_upper_triangle_has_six_complex_channels():
    matrix = wishart(4, (3, 4))
    channels = upper_triangle(matrix)
    assert channels.shape == (6, 3, 4) and channels.dtype == np.complex64
    assert np.allclose(channels[1], matrix[0, 1]) and np.allclose(channels[5], matrix[2, 2])


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_without_matrix_or_with_an_element_missing(tmp_path: Path):
    with pytest.raises(SceneError, match="no covariance or coherency matrix"):
        matrix_files(tmp_path)
    for name in ("C11", "C12_real", "C12_imag", "C22"):
        (tmp_path / f"{name}.bin").touch()
    (tmp_path / "CpRVI.bin").touch()
    assert list(matrix_files(tmp_path)) == ["C11", "C12_re", "C12_im", "C22"]
    (tmp_path / "C33.bin").touch()  # a part of C3 is no C2
    with pytest.raises(SceneError, match=r"C3 is without C13_real\.bin, C13_imag\.bin, C23"):
        matrix_files(tmp_path)


def test_size_from_config_txt(tmp_path: Path):
    with pytest.raises(SceneError, match=r"config\.txt"):
        folder_size(tmp_path)
    (tmp_path / "config.txt").write_text("Nrow\n201\n---------\nNcol\n101\n---------\n")
    assert folder_size(tmp_path) == (201, 101)


def load(folder: Path) -> np.ndarray:
    files = matrix_files(folder)
    planes = []
    for file in files.values():
        with rasterio.open(file) as src:
            planes.append(src.read(1))
    return complex_matrix(np.stack(planes), list(files))


@real
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_real_t3_and_c3_of_one_area_agree():
    coherency, covariance = load(SAMPLES / "full_pol/T3"), load(SAMPLES / "full_pol/C3")
    assert coherency.shape == (3, 3, 201, 101)
    worst = np.abs(coherency_of(covariance) - coherency).max(axis=(0, 1)) / span(coherency)
    assert worst.max() < 1e-6  # two exports of one product, through our change of basis
    pixels = np.moveaxis(coherency, (0, 1), (-2, -1))
    assert (np.linalg.eigvalsh(pixels)[..., 0] / span(coherency)).min() > 0  # no negative power
    h, a, alpha = entropy_anisotropy_alpha(coherency)
    assert h.min() > 0 and h.max() < 1 and a.min() > 0 and a.max() < 1
    assert alpha.min() > 0 and alpha.max() < 90
    # Averaging adds mechanisms: entropy rises.
    assert np.median(entropy_anisotropy_alpha(multilook(coherency, 5, 5))[0]) > np.median(h)


@real
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("name", ["dual_pol/C2_VVVH", "compact_pol/C2_RHV"])
def test_real_dual_polarisation(name: str):
    matrix = load(SAMPLES / name)
    assert matrix.shape == (2, 2, 201, 101)
    power = matrix[0, 0].real * matrix[1, 1].real
    assert (power - np.abs(matrix[0, 1]) ** 2 > 0).all()  # coherence below one
