"""Wide residual networks."""

from __future__ import annotations

from torch import Tensor, nn

from lossmeta.models._layers import conv, global_average, initialized


class Block(nn.Module):
    """BatchNorm, ReLU and convolution, twice; a shortcut that changes the size takes the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.residual = nn.Sequential(
            *(conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Dropout(dropout), conv(outputs, outputs)),
        )
        self.shortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activate(x)
        return self.residual(activated) + (x if self.shortcut is None else self.shortcut(activated))


def wide_resnet(depth: int, widen: int, classes: int, dropout: float = 0.0) -> nn.Module:
    """WRN-``depth``-``widen`` (Zagoruyko & Komodakis, 2016): pre-activated blocks of two convolutions.

    Takes ``[N, 3, 32, 32]``. AdaLFL uses WRN-28-10 for CIFAR-100 (36,536,884 parameters; 36,479,194 for 10 classes) and
    WRN-16-8 for SVHN (10,961,370).

    Args:
        depth: number of layers, 6n + 4 with n >= 1.
        widen: factor of the widths 16, 32 and 64.
        classes: number of classes.
        dropout: probability between the two convolutions of a block.

    Raises:
        ValueError: for another depth, and for ``widen`` below 1.

    Example:
        >>> wide_resnet(16, 8, 10)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"wide_resnet: depth must be 6n + 4 with n >= 1, got {depth}")
    if widen < 1:
        raise ValueError(f"wide_resnet: widen must be at least 1, got {widen}")
    blocks: list[nn.Module] = []
    channels = 16
    for width, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
        for i in range((depth - 4) // 6):
            blocks.append(Block(channels, width, stride if i == 0 else 1, dropout))
            channels = width
    head = nn.BatchNorm2d(channels), nn.ReLU(), global_average(), nn.Linear(channels, classes)
    return initialized(nn.Sequential(conv(3, 16), *blocks, *head))
