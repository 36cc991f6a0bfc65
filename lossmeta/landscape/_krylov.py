"""Orthonormal bases of Krylov spaces, and a symmetric operator projected on them: block Lanczos."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COLUMNS = 1 << 20  # of the basis at a time, where it is rotated in place
ROUNDING = 4  # machine epsilons by which a product may be off, relative to the largest magnitude


class Krylov:
    r"""An orthonormal basis Q, row by row, with :math:`T = Q H Q^\top` for a symmetric H.

    A step appends a block B of rows and gives the next one, which holds what H B has outside of the basis:
    :math:`H Q^\top = Q^\top T + N^\top R`, where N is the next block and R, its coupling, meets the last block alone.
    Every block is made orthogonal to the whole basis, twice. T is float64 on the CPU.

    The next block has fewer rows where H B lies in the basis but for rounding, and none where the space is invariant.
    The space of a block with b random rows then has min(b, m) eigenvectors of every eigenvalue with multiplicity m.

    Args:
        product: of H with each of the rows [b, P].
        capacity: rows of the basis.
        block: the first block [b, P], of any rows that are linearly independent.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], capacity: int, block: Tensor) -> None:
        self.product = product
        self.rows = block.new_empty(capacity, block.shape[1])
        self.matrix = torch.zeros(capacity, capacity, dtype=torch.float64, device="cpu")
        self.size = 0
        self.next = self._orthonormal(block, 0.0)[0]
        self.coupling = torch.zeros(0, 0, dtype=torch.float64, device="cpu")

    @property
    def basis(self) -> Tensor:
        """``[size, P]``."""
        return self.rows[: self.size]

    def step(self) -> None:
        """Appends the next block and finds the one after it."""
        block = self.next
        before, self.size = self.size, self.size + len(block)
        self.rows[before : self.size] = block
        moved = self.product(block)
        within = self._leave(moved)
        within += self._leave(moved)
        self.matrix[before : self.size, : self.size] = within
        square = within[:, before:]
        self.matrix[before : self.size, before : self.size] = (square + square.mT) / 2
        self.matrix[:before, before : self.size] = within[:, :before].mT
        rounding = ROUNDING * torch.finfo(block.dtype).eps * float(self.ritz()[0].abs().max())
        self.next, self.coupling = self._orthonormal(moved, rounding)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of T, ascending, and its eigenvectors as columns."""
        found = torch.linalg.eigh(self.matrix[: self.size, : self.size])
        return found.eigenvalues, found.eigenvectors

    def residuals(self, vectors: Tensor) -> Tensor:
        r"""Lengths of :math:`H y - \lambda y` for the Ritz vectors y of eigenvectors of T, but for rounding."""
        return (self.coupling @ vectors[self.size - self.coupling.shape[1] : self.size]).norm(dim=0)

    def rotated(self, vectors: Tensor) -> Tensor:
        """The Ritz vectors ``[k, P]`` of k eigenvectors of T."""
        return vectors.mT.to(self.rows.device, self.rows.dtype) @ self.basis

    def restart(self, values: Tensor, vectors: Tensor) -> None:
        """Keeps Ritz pairs alone, in place; the next block stays."""
        kept = len(values)
        turn = vectors.mT.to(self.rows.device, self.rows.dtype)
        for part in self.rows.split(COLUMNS, dim=1):
            part[:kept] = turn @ part[: self.size]
        self.size = kept
        self.matrix.zero_()
        self.matrix.diagonal()[:kept] = values

    def _leave(self, rows: Tensor) -> Tensor:
        """Takes from rows what they have in the basis, in place, and gives the coefficients ``[b, size]``."""
        within = rows @ self.basis.mT
        rows.addmm_(within, self.basis, alpha=-1)
        return within.to("cpu", torch.float64)

    def _orthonormal(self, rows: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
        """An orthonormal block outside of the basis, and the rows in terms of it; what is at most ``rounding`` goes."""
        directions, upper = torch.linalg.qr(rows.mT)
        u, lengths, v = torch.linalg.svd(upper.to("cpu", torch.float64))
        count = min(int((lengths > rounding).sum()), rows.shape[1] - self.size)
        block = (directions @ u[:, :count].to(rows)).mT.contiguous()
        coupling = lengths[:count, None] * v[:count]
        # What is short has kept little of its right angle to the basis.
        self._leave(block)
        directions, upper = torch.linalg.qr(block.mT)
        return directions.mT.contiguous(), upper.to("cpu", torch.float64) @ coupling
