"""Sums of squares: triangular factors of them, which keep the digits that squaring loses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lossmeta.tuneloss._box import Array

# An inverse with larger entries, of a factor with columns of length 1, has too few digits left.
LARGEST_INVERSE = 1e9
# Of a Gram matrix with a diagonal of ones: what float32 rounding may leave of a semi-definite one.
INDEFINITE = 1e-5
GRAM_NOISE = 1e-13  # what float64 rounding may


@dataclass(frozen=True, eq=False)
class Root:
    """R, upper triangular with R'R = F'F + δ² I, and Q of the factorisation QR.

    Attributes:
        upper: R, [n, n].
        inverse: of R. Products with it lose digits that :meth:`solve` keeps.
        offset: Q' d, [n].
        damping: δ.
    """

    upper: Array
    inverse: Array
    offset: Array
    damping: float

    def minimiser(self, y: Array) -> Array:
        """Of |F x + d|² + δ² |x - y|² over x, [n]."""
        pull = self.damping**2 * self.solve(y, transposed=True)
        return self.solve(pull - self.offset)

    def solve(self, right: Array, *, transposed: bool = False) -> Array:
        """R^-1 right, or R'^-1 right; [n]."""
        from scipy.linalg.lapack import dtrtrs

        found: Array = dtrtrs(self.upper, right, trans=int(transposed))[0]
        return found


@dataclass(frozen=True, eq=False)
class SumOfSquares:
    """|F y + d|² of n unknowns.

    Attributes:
        factor: F, [rows, n].
        offset: d, [rows].
    """

    factor: Array
    offset: Array

    def __call__(self, y: Array) -> float:
        residual = self.factor @ y + self.offset
        return float(residual @ residual)

    def slope(self, y: Array) -> Array:
        """The gradient, [n]."""
        return 2 * self.factor.T @ (self.factor @ y + self.offset)

    def root(self, damping: float) -> Root | None:
        """``None`` where its inverse has too few digits."""
        from scipy.linalg.lapack import dtrtri

        n = self.factor.shape[1]
        stacked = np.column_stack([self.factor, self.offset])
        if damping:
            stacked = np.vstack([stacked, damping * np.eye(n, n + 1)])
        if len(stacked) < n or n == 0:
            return None
        triangular = upper_triangle(stacked)
        upper = triangular[:n, :n]
        inverse, singular = dtrtri(upper)
        if singular or not np.abs(inverse).max(initial=0) < LARGEST_INVERSE:
            return None
        return Root(upper, np.triu(inverse), triangular[:n, n], damping)

    @cached_property
    def exact_root(self) -> Root | None:
        """Without damping."""
        return self.root(0.0)

    @cached_property
    def rank(self) -> int:
        if self.exact_root is not None:
            return self.factor.shape[1]
        return int(np.linalg.matrix_rank(self.factor)) if self.factor.size else 0


def triangle(blocks: Iterable[Array]) -> Array:
    """R [at most n, n] of the QR factorisation of blocks [rows, n] on top of each other."""
    done: Array | None = None
    for block in blocks:
        done = block if done is None else np.vstack([done, block])
        if len(done) > done.shape[1]:
            done = upper_triangle(done)
    assert done is not None
    return done


def upper_triangle(matrix: Array) -> Array:
    """R of the matrix [rows, n], [least of both, n]."""
    found: Any = np.linalg.qr(matrix, mode="r")
    return np.asarray(found)


def factor_of_gram(gram: Array) -> Array | None:
    """U [rank, n] with U'U = gram [n, n]; ``None`` where the matrix is not positive semi-definite."""
    from scipy.linalg.lapack import dpstrf

    n = len(gram)
    diagonal = gram.diagonal()
    if (diagonal < 0).any():
        return None
    length = np.sqrt(diagonal)
    scale = np.where(length > 0, length, 1.0)
    unit = gram / np.outer(scale, scale)
    upper, order, rank, _ = dpstrf(unit, tol=GRAM_NOISE)
    found = np.zeros((rank, n))
    found[:, order - 1] = np.triu(upper)[:rank]
    if np.abs(found.T @ found - unit).max(initial=0) > INDEFINITE:
        return None
    return found * scale
