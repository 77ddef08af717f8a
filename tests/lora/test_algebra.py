"""Products of low rank, compared with dense matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest

from fastinterp.lora.algebra import (
    Blocks,
    balanced,
    concatenated,
    norm_of_product,
    padded,
    randomised_svd,
    rank_for_energy,
    singular,
)

RNG = np.random.Generator(np.random.Philox(0))


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def spectrum(m: int, n: int, values: np.ndarray) -> np.ndarray:
    """A matrix f32[m, n] with these singular values."""
    k = len(values)
    return ((np.linalg.qr(normal(m, k))[0] * values) @ np.linalg.qr(normal(n, k))[0].T).astype(np.float32)


def best_error(matrix: np.ndarray, rank: int) -> float:
    s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return float(np.sqrt(np.sum(s[rank:] ** 2)))


def test_concatenated_is_the_sum_of_the_products():
    products = [(normal(7, r), normal(r, 5), c) for r, c in ((2, 0.7), (3, -0.4), (1, 1.0))]
    b, a = concatenated(products)
    assert b.shape == (7, 6) and a.shape == (6, 5)
    want = sum(c * (bi @ ai) for bi, ai, c in products)
    assert np.abs(b @ a - want).max() <= 1e-14 * np.abs(want).max() * 6


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_concatenated_keeps_bits_of_factors_that_are_not_scaled(sign):
    products = [(normal(4, 2).astype(np.float16), normal(2, 3).astype(np.float16), sign) for _ in range(2)]
    b, a = concatenated(products)
    assert b.dtype == a.dtype == np.float16
    assert b.tobytes() == (sign * np.concatenate([p[0] for p in products], axis=1)).astype(np.float16).tobytes()
    assert a.tobytes() == np.concatenate([p[1] for p in products]).tobytes()


def test_concatenated_scales_in_float64():
    b16 = normal(4, 2).astype(np.float16)
    b, _ = concatenated([(b16, normal(2, 3).astype(np.float16), 0.3)])
    assert b.dtype == np.float64 and b.tobytes() == (b16.astype(np.float64) * 0.3).tobytes()


@pytest.mark.parametrize(("m", "r", "n"), [(30, 6, 20), (4, 9, 20), (20, 9, 4), (5, 5, 5), (3, 1, 8)])
def test_singular_is_the_svd_of_the_dense_product(m, r, n):
    b, a = normal(m, r), normal(r, n)
    u, s, v = singular(b, a)
    k = min(m, r, n)
    assert u.shape == (m, k) and v.shape == (k, n)
    want = np.linalg.svd(b @ a, compute_uv=False)[:k]
    assert np.abs(s - want).max() <= 1e-13 * want[0]
    assert np.abs((u * s) @ v - b @ a).max() <= 1e-13 * want[0]
    assert np.abs(u.T @ u - np.eye(k)).max() < 1e-13 and np.abs(v @ v.T - np.eye(k)).max() < 1e-13


def test_singular_works_on_torch_tensors():
    torch = pytest.importorskip("torch")
    b, a = normal(12, 4), normal(4, 9)
    u, s, v = singular(torch.from_numpy(b), torch.from_numpy(a), torch.linalg)
    assert np.abs(((u * s) @ v).numpy() - b @ a).max() < 1e-12


@pytest.mark.parametrize(("m", "r", "n"), [(30, 6, 20), (4, 9, 20), (20, 9, 4)])
def test_norm_of_product(m, r, n):
    b, a = normal(m, r), normal(r, n)
    assert norm_of_product(b, a) == pytest.approx(np.linalg.norm(b @ a), rel=1e-13)


def test_balanced_factors_have_equal_norms_and_the_best_error():
    matrix = spectrum(40, 25, np.linspace(3, 0.1, 25)).astype(np.float64)
    b, a = balanced(*np.linalg.svd(matrix, full_matrices=False), rank=7)
    assert b.shape == (40, 7) and a.shape == (7, 25)
    assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(a))
    assert np.linalg.norm(matrix - b @ a) == pytest.approx(best_error(matrix, 7))


def test_balanced_has_no_more_than_the_singular_values_there_are():
    b, a = balanced(*np.linalg.svd(normal(3, 5), full_matrices=False), rank=8)
    assert b.shape == (3, 3) and a.shape == (3, 5)


def test_padded_factors_have_the_same_product():
    b, a = normal(4, 2), normal(2, 3)
    wide_b, wide_a = padded(b, a, 5)
    assert wide_b.shape == (4, 5) and wide_a.shape == (5, 3) and np.array_equal(wide_b @ wide_a, b @ a)
    assert padded(b, a, 1)[0].shape == b.shape


@pytest.mark.parametrize(
    ("energy", "most", "rank"), [(0.5, 4, 1), (0.9, 4, 2), (0.97, 4, 3), (1.0, 4, 4), (1.0, 2, 2), (0.9999, 8, 4)]
)
def test_rank_for_energy(energy, most, rank):
    s = np.sqrt([80.0, 15.0, 4.0, 1.0])
    assert rank_for_energy(s, energy, 100.0, most) == rank


def test_rank_for_energy_of_unknown_singular_values_is_all_there_are():
    assert rank_for_energy(np.array([1.0, 1.0]), 0.9, 100.0, 16) == 2


def test_rank_of_zeros_is_one():
    assert rank_for_energy(np.zeros(4), 0.9, 0.0, 4) == 1


@pytest.mark.parametrize(("m", "n"), [(300, 200), (200, 300), (257, 129)])
def test_randomised_svd_of_a_matrix_of_low_rank_is_exact(m, n):
    """But for float32: a relative error of 2^-24 in each of the sums of products, whose errors add up as roots."""
    matrix = (normal(m, 8) @ normal(8, n)).astype(np.float32)
    u, s, v = randomised_svd(Blocks(matrix), 8, 0)
    assert u.shape == (m, 8) and s.shape == (8,) and v.shape == (8, n)
    assert np.linalg.norm(matrix - (u * s) @ v) <= 1e-6 * np.linalg.norm(matrix)
    assert np.abs(s - np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:8]).max() <= 1e-6 * s[0]


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_randomised_svd_is_close_to_the_best_approximation(decay):
    """Singular values i^-decay; 0: all are the same, and no approximation is better than another."""
    values = np.arange(1, 201.0) ** -decay
    matrix = spectrum(260, 200, values)
    u, s, v = randomised_svd(Blocks(matrix), 16, 3)
    error = np.linalg.norm(matrix - (u * s) @ v)
    assert best_error(matrix, 16) * (1 - 1e-6) <= error <= 1.01 * best_error(matrix, 16)


def test_randomised_svd_of_a_narrow_matrix_is_exact():
    matrix = normal(50, 12).astype(np.float32)
    u, s, v = randomised_svd(Blocks(matrix), 8, 0)
    assert np.linalg.norm(matrix - (u * s) @ v) == pytest.approx(best_error(matrix, 8), rel=1e-9)


def test_randomised_svd_of_zeros():
    u, s, v = randomised_svd(Blocks(np.zeros((60, 50), np.float32)), 4, 0)
    assert not s.any() and np.isfinite(u).all() and np.isfinite(v).all()


def test_same_bytes_for_every_number_of_threads_and_seed(monkeypatch):
    monkeypatch.setattr("fastinterp.lora.algebra._ROWS", 1)
    monkeypatch.setattr("fastinterp.lora.algebra._BLOCK", 64 * 90)  # several blocks
    matrix = normal(400, 90).astype(np.float32)
    assert len(list(Blocks(matrix))) == 7
    every = [randomised_svd(Blocks(matrix, threads), 8, 5) for threads in (1, 2, 7)]
    for one in every[1:]:
        assert [x.tobytes() for x in one] == [x.tobytes() for x in every[0]]
    other = randomised_svd(Blocks(matrix), 8, 6)
    assert other[1].tobytes() != every[0][1].tobytes()


def test_norms_in_blocks(monkeypatch):
    monkeypatch.setattr("fastinterp.lora.algebra._ROWS", 1)
    monkeypatch.setattr("fastinterp.lora.algebra._BLOCK", 300)
    matrix, b, a = normal(70, 30).astype(np.float32), normal(70, 3), normal(3, 30)
    blocks = Blocks(matrix, 2)
    wide = matrix.astype(np.float64)
    assert blocks.squares() == pytest.approx(np.sum(wide**2), rel=1e-14)
    assert blocks.residual(b, a) == pytest.approx(np.linalg.norm(wide - b @ a) ** 2, rel=1e-5)
