"""Whether an optimizer moves several models in one tensor as it would move each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lossmeta._optimizers import plainest, shadow

# Some optimizers look at the shapes of weights. These are of linear layers, biases and convolutions.
SHAPES = ((6, 4), (5,), (4, 3, 2, 2))
STEPS = 3


def check_separable(optimizer: Optimizer) -> set[str]:
    """Tries the optimizer on toy weights: two children in one tensor must move as each of them alone.

    Returns:
        The names in its state of tensors with one entry for each weight.

    Raises:
        TypeError: where they do not.
    """
    generator = torch.Generator().manual_seed(0)
    per_element: set[str] = set()

    def drawn() -> list[Tensor]:
        return [torch.randn(2, *shape, generator=generator, device="cpu") for shape in SHAPES]

    for group in optimizer.param_groups:
        weights, gradients = drawn(), [drawn() for _ in range(STEPS)]

        def moved(pick: int | slice, group: dict[str, Any] = group) -> list[Tensor]:
            toys = [nn.Parameter(w[pick].clone()) for w in weights]  # noqa: B023
            options = {
                k: v.item() if isinstance(v, Tensor) else v
                for k, v in plainest(group).items()
                if k != "params"
            }
            tried = shadow(optimizer, [{**options, "params": toys}], {})
            for step in gradients:  # noqa: B023
                for toy, g in zip(toys, step, strict=True):
                    toy.grad = g[pick].clone()
                tried.step()
            state = tried.state[toys[0]]
            per_element.update(
                key for key, v in state.items() if isinstance(v, Tensor) and v.shape == toys[0].shape
            )
            return [toy.detach() for toy in toys]

        try:
            with torch.random.fork_rng(devices=[]):
                both = moved(slice(None))
                apart = [moved(0), moved(1)]
            same = all(
                torch.allclose(pair[i], one, rtol=1e-5, atol=1e-7)
                for i, alone in enumerate(apart)
                for pair, one in zip(both, alone, strict=True)
            )
            reason = "" if same else "whose step for a weight depends on other weights, or is random"
        except Exception as error:
            reason = f"which cannot be stepped on its own ({type(error).__name__}: {error})"
        if reason:
            raise TypeError(
                f"Population: optimizer must move every weight by its own gradient, got {type(optimizer).__name__}, "
                f"{reason}; take SGD, Adam, AdamW or another elementwise optimizer"
            )
    return per_element
