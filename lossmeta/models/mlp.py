"""Logistic regression and the multi-layer perceptron."""

from __future__ import annotations

import itertools

from torch import nn

from lossmeta.models._layers import initialized


def logistic(features: int, classes: int) -> nn.Module:
    """Multinomial logistic regression (McCullagh et al., 1989).

    Takes ``[N, ...]`` with ``features`` numbers a sample; ``(features + 1) * classes`` parameters (7,850 for MNIST).

    Example:
        >>> logistic(784, 10)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    return mlp(features, classes, layers=0)


def mlp(features: int, outputs: int, width: int = 1000, layers: int = 2) -> nn.Module:
    """Fully connected network with ``layers`` hidden layers of ``width`` ReLU units.

    Takes ``[N, ...]`` with ``features`` numbers a sample. The default is the network of Baydin et al. (2018), which
    AdaLFL uses for MNIST (1,796,010 parameters) and, with one output, for regression.

    Example:
        >>> mlp(8, 1)(torch.randn(2, 8)).shape
        torch.Size([2, 1])
    """
    sizes = [features, *[width] * layers, outputs]
    stack = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return initialized(nn.Sequential(nn.Flatten(), *stack[:-1]))
