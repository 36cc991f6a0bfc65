"""VGG-16."""

from __future__ import annotations

from torch import nn

from lossmeta.models._layers import conv_norm_relu, initialized


def vgg16(classes: int = 10) -> nn.Module:
    """VGG-16 (Simonyan & Zisserman, 2015) for small images.

    BatchNorm follows each convolution, and one linear layer the last. Takes
    ``[N, 3, 32, 32]``; 14,724,042 parameters for 10 classes.

    Example:
        >>> vgg16(10)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers.append(conv_norm_relu(channels, width))
            channels = width
        layers.append(nn.MaxPool2d(2))
    return initialized(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, classes)))
