"""ResNet-18."""

from __future__ import annotations

from torch import Tensor, nn

from lossmeta.models._layers import conv, conv_norm_relu, global_average, initialized


class Block(nn.Module):
    """Two convolutions beside a shortcut, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            conv_norm_relu(inputs, outputs, stride=stride), conv(outputs, outputs), nn.BatchNorm2d(outputs)
        )
        self.shortcut = (
            nn.Identity()
            if inputs == outputs
            else nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.residual(x) + self.shortcut(x)).relu()


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 (He et al., 2016) for small images: a 3×3 convolution without max-pooling comes first.

    Takes ``[N, 3, 32, 32]``; 11,173,962 parameters for 10 classes.

    Example:
        >>> resnet18(10)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    blocks = []
    channels = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Block(channels, width, stride), Block(width, width, 1)]
        channels = width
    head = global_average(), nn.Linear(512, classes)
    return initialized(nn.Sequential(conv_norm_relu(3, 64), *blocks, *head))
