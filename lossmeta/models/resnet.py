"""ResNet-18 and ResNet-32."""

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


def resnet32(classes: int = 10) -> nn.Module:
    """ResNet-32 (He et al., 2016) for small images: three stages of five blocks, 16, 32 and 64 channels wide.

    Where the width changes the shortcut is a 1×1 convolution, while He et al. pad it with zeros on these images. Takes
    ``[N, 3, 32, 32]``; 466,906 parameters for 10 classes.

    Example:
        >>> resnet32(10)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    blocks = []
    channels = 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        blocks += [Block(channels, width, stride), *(Block(width, width, 1) for _ in range(4))]
        channels = width
    return initialized(
        nn.Sequential(conv_norm_relu(3, 16), *blocks, *global_average(), nn.Linear(64, classes))
    )
