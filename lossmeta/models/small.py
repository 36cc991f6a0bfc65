"""Small convolutional networks."""

from __future__ import annotations

from torch import nn

from lossmeta.models._layers import conv, initialized


def lenet5(classes: int = 10, channels: int = 1) -> nn.Module:
    """LeNet-5 (LeCun et al., 1998) with tanh and average pooling; the first convolution pads 28×28 to 32×32.

    Takes ``[N, channels, 28, 28]``; 61,706 parameters by default.

    Example:
        >>> lenet5()(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    return initialized(
        nn.Sequential(
            *(nn.Conv2d(channels, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
            *(nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, classes)),
        )
    )


def small_cnn(classes: int = 10, channels: int = 3) -> nn.Module:
    """Three convolutions of 16, 32 and 64 channels, each with ReLU and max-pooling.

    Not from a paper: for experiments on a CPU. Takes ``[N, channels, 32, 32]``; 33,834 parameters by default.

    Example:
        >>> small_cnn()(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return initialized(
        nn.Sequential(
            *(conv(channels, 16, bias=True), nn.ReLU(), nn.MaxPool2d(2)),
            *(conv(16, 32, bias=True), nn.ReLU(), nn.MaxPool2d(2)),
            *(conv(32, 64, bias=True), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, classes)),
        )
    )
