"""Products of low rank: concatenation, the best approximation of a sum, and a randomised singular value decomposition.

A *product* is B A, with B: f[m, r] and A: f[r, n]; nothing here knows of modules or files. Functions that take `linalg`
work on numpy arrays and on torch tensors alike, with numpy.linalg or torch.linalg.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

STREAM = 16  # Philox stream of random matrices
OVERSAMPLING = 16  # further columns of the random matrix beyond the rank that is wanted
ITERATIONS = 2  # power iterations: each multiplies by D D^T, so that small singular values fade by s^(2 * ITERATIONS)
_BLOCK = 1 << 20  # elements of a block of rows, which one thread multiplies
_ROWS = 128  # of a block at least, or products of wide matrices get slow


def concatenated(products: Sequence[tuple[Array, Array, float]]) -> tuple[Array, Array]:
    """(B, A) of the sum of c_i B_i A_i, of a rank that is the sum of the ranks.

    products  (B_i, A_i, c_i), of any floating dtypes

    A is [A_1; A_2; ...], with the values that these have. B is [c_1 B_1, c_2 B_2, ...], float64 if a c_i is not 1 or
    -1: a negative c_i negates the product, not both of its factors.
    """
    return np.concatenate([_scaled(b, c) for b, _, c in products], axis=1), np.concatenate([a for _, a, _ in products])


def _scaled(b: Array, c: float) -> Array:
    return b if c == 1.0 else -b if c == -1.0 else b.astype(np.float64) * c


def singular(b: Any, a: Any, linalg: Any = np.linalg) -> tuple[Any, Any, Any]:
    """(u, s, v) of the product b @ a without making it: u: [m, k], s: [k] descending, v: [k, n], k = min(m, r, n).

    From QR decompositions of b and of a^T, and the singular values of the r x r product of their triangles. Give
    float64: the result is as exact as the arguments' dtype.
    """
    (left, left_rest), (right, right_rest) = linalg.qr(b), linalg.qr(a.T)
    u, s, v = linalg.svd(left_rest @ right_rest.T, full_matrices=False)
    return left @ u, s, v @ right.T


def norm_of_product(b: Array, a: Array) -> float:
    """The Frobenius norm of b @ a, in float64, without making it."""
    left, right = (np.linalg.qr(x.astype(np.float64))[1] for x in (b, a.T))
    return float(np.linalg.norm(left @ right.T))


def balanced(u: Array, s: Array, v: Array, rank: int) -> tuple[Array, Array]:
    """(B, A) of the first `rank` singular values: both have their roots, so that neither is much larger than the other.

    Of fewer singular values than `rank`, the factors have only these.
    """
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


def padded(b: Array, a: Array, rank: int) -> tuple[Array, Array]:
    """(B, A) with columns and rows of zeros up to `rank`."""
    more = max(0, rank - a.shape[0])
    return np.pad(b, ((0, 0), (0, more))), np.pad(a, ((0, more), (0, 0)))


def rank_for_energy(s: Array, energy: float, total: float, most: int) -> int:
    """The smallest rank, 1 to `most`, whose squared singular values add up to the fraction `energy` of `total`.

    total  the squared Frobenius norm of the matrix: that of all singular values, of which `s` may be the first ones
    """
    kept = np.cumsum(np.square(s[:most], dtype=np.float64))
    enough = np.flatnonzero(kept >= energy * total)
    return int(enough[0]) + 1 if len(enough) else min(most, len(s))


@dataclass(frozen=True)
class Blocks:
    """A matrix f32[m, n] that is worked on in blocks of rows, by several threads.

    The cuts depend on n alone and the parts of sums are added in their order, so that results are the same for every
    number of threads, as far as a product of one block is: see extract.py.
    """

    matrix: Array
    threads: int = 1

    def __iter__(self) -> Iterator[slice]:
        rows = max(_ROWS, _BLOCK // max(1, self.matrix.shape[1]))
        return (slice(i, i + rows) for i in range(0, self.matrix.shape[0], rows))

    def _each(self, work: Callable[[slice], Any]) -> Iterator[Any]:
        """The results of all blocks, in their order, of which at most some more than `threads` are held."""
        blocks = list(self)
        if self.threads == 1 or len(blocks) == 1:
            yield from map(work, blocks)
            return
        with ThreadPoolExecutor(min(self.threads, len(blocks))) as pool:
            for i in range(0, len(blocks), self.threads):
                yield from pool.map(work, blocks[i : i + self.threads])

    def times(self, x: Array) -> Array:
        """matrix @ x: f32[m, k]"""
        out = np.empty((self.matrix.shape[0], x.shape[1]), np.float32)

        def work(rows: slice) -> None:
            np.matmul(self.matrix[rows], x, out=out[rows])

        for _ in self._each(work):
            pass
        return out

    def transposed_times(self, x: Array) -> Array:
        """matrix^T @ x: f64[n, k]. Products of a block are float32, their sum is float64."""
        out = np.zeros((self.matrix.shape[1], x.shape[1]), np.float64)
        for part in self._each(lambda rows: self.matrix[rows].T @ x[rows]):
            out += part
        return out

    def squares(self) -> float:
        """The squared Frobenius norm, in float64."""
        return math.fsum(self._each(lambda rows: _squares(self.matrix[rows])))

    def residual(self, b: Array, a: Array) -> float:
        """The squared Frobenius norm of matrix - b @ a, in float64, of a float32 product."""
        b, a = b.astype(np.float32), a.astype(np.float32)
        return math.fsum(self._each(lambda rows: _squares(self.matrix[rows] - b[rows] @ a)))


def _squares(x: Array) -> float:
    return float(np.sum(np.square(x, dtype=np.float64)))


def randomised_svd(
    blocks: Blocks, rank: int, seed: int, *, oversampling: int = OVERSAMPLING, iterations: int = ITERATIONS
) -> tuple[Array, Array, Array]:
    """(u, s, v) of the first `rank` singular values of a matrix, float64: u: [m, k], s: [k] descending, v: [k, n].

    seed  of the random matrix, normal f32[n, rank + oversampling]
    k     the smallest of rank, m and n

    Halko, Martinsson, Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1: the range of D is that of D Omega after
    power iterations, orthonormal again after each multiplication; the singular values are those of D in it. It reads
    the matrix 2 + 2 * iterations times, in float32, and makes no other of its size. Of a matrix with no more than
    rank + oversampling rows or columns the decomposition is exact.
    Source of randomness: numpy's Philox, whose stream of a seed is the same everywhere.
    """
    m, n = blocks.matrix.shape
    width = rank + oversampling
    if width >= min(m, n):
        u, s, v = np.linalg.svd(blocks.matrix.astype(np.float64), full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    omega = np.random.Generator(np.random.Philox(seed)).standard_normal((n, width), dtype=np.float32)
    basis = _orthonormal(blocks.times(omega))
    for _ in range(iterations):
        basis = _orthonormal(blocks.times(_orthonormal(blocks.transposed_times(basis))))
    small = blocks.transposed_times(basis)  # (basis^T D)^T: [n, width]
    v, s, u = np.linalg.svd(small, full_matrices=False)
    return basis.astype(np.float64) @ u[:rank].T, s[:rank], v[:, :rank].T


def _orthonormal(x: Array) -> Array:
    """f32 with orthonormal columns that span those of `x`; computed in float64."""
    return np.linalg.qr(x.astype(np.float64))[0].astype(np.float32)
