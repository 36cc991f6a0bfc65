"""The Hessian of a mean loss, by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta._batches import Output
from lossmeta._model_state import RandomState, Watch
from lossmeta.landscape._objective import Objective, Weights


class Hessian:
    """Of the mean loss at a model's weights, on vectors of all trainable parameters one after another."""

    def __init__(
        self, where: str, model: nn.Module, loss_fn: Callable[..., Tensor] | None, data: Any, output: Output
    ) -> None:
        self.objective = Objective(where, model, loss_fn, data, output=output)
        self.where, self.device = where, self.objective.device
        self.parameters = self.objective.parameters
        self.sizes = [p.numel() for p in self.parameters.values()]
        self.size = sum(self.sizes)
        double = any(p.dtype == torch.float64 for p in self.parameters.values())
        self.dtype = torch.float64 if double else torch.float32
        self.used = 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Products can be had; afterwards model and random numbers are as before."""
        model, device = self.objective.model, self.device
        with (
            torch.inference_mode(False),
            self.objective.quiet(),
            torch.autocast(device.type, enabled=False),
        ):
            # Of a model that draws random numbers all products are to see the same ones.
            self.start = RandomState(device, Watch(model, device), everything=True)
            self._check_loss()
            yield

    def _check_loss(self) -> None:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch, share in self.objective:
            with torch.enable_grad():
                loss = self.objective.loss(batch)
            if not loss.requires_grad:
                raise ValueError(
                    f"{self.where}: loss_fn must be differentiable in the model's weights, got no gradient"
                )
            total += share * loss.detach().double()
        if not bool(total.isfinite()):
            raise ValueError(f"{self.where}: loss is not finite at the model's weights, got {float(total)}")

    def products(self, rows: Tensor) -> Tensor:
        """``[r, P]``, the Hessian times each row."""
        self.start.bring_back()
        found = self.objective.hessian_products([self.parts(row) for row in rows])
        self.used += len(rows)
        moved = torch.stack(
            [torch.cat([part.flatten().to(rows) for part in vector.values()]) for vector in found]
        )
        if not bool(moved.isfinite().all()):
            raise ValueError(
                f"{self.where}: the Hessian must be finite at the model's weights, got a product with NaN or infinity"
            )
        return moved

    def parts(self, row: Tensor) -> Weights:
        pieces = zip(self.parameters.items(), row.split(self.sizes), strict=True)
        return {name: piece.view_as(p).to(p) for (name, p), piece in pieces}

    def normal(self, count: int, seed: int) -> Tensor:
        """``[count, P]``, of the normal distribution."""
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(count, self.size, generator=generator, dtype=self.dtype, device="cpu")
        return drawn.to(self.device)

    def signs(self, count: int, generator: torch.Generator) -> Tensor:
        """``[count, P]``, of 1 and -1; the same ones for any division into counts."""
        drawn = torch.randint(0, 2, (count, self.size), generator=generator, dtype=torch.int8, device="cpu")
        return (2 * drawn - 1).to(self.device, self.dtype)
