"""SqueezeNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lossmeta.models._layers import conv, conv_norm_relu, global_average, initialized


class Fire(nn.Module):
    """Squeezes to few channels, expands by 1×1 and 3×3 convolutions side by side; bypassed where the sizes allow."""

    def __init__(self, inputs: int, squeezed: int, outputs: int) -> None:
        super().__init__()
        self.bypass = inputs == outputs
        self.squeeze = conv_norm_relu(inputs, squeezed, kernel=1)
        self.expand1 = conv_norm_relu(squeezed, outputs // 2, kernel=1)
        self.expand3 = conv_norm_relu(squeezed, outputs // 2)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = self.squeeze(x)
        expanded = torch.cat([self.expand1(squeezed), self.expand3(squeezed)], 1)
        return x + expanded if self.bypass else expanded


def squeezenet(classes: int = 10) -> nn.Module:
    """SqueezeNet 1.0 with simple bypass (Iandola et al., 2016) for small images.

    As in earlier code of AdaLFL's authors the first convolution is 3×3 with stride 1, pooling is 2×2 and there is
    BatchNorm but no dropout. Takes ``[N, 3, 32, 32]``; 732,010 parameters for 10 classes.

    Example:
        >>> squeezenet(10)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return initialized(
        nn.Sequential(
            *(conv_norm_relu(3, 96), nn.MaxPool2d(2)),
            *(Fire(96, 16, 128), Fire(128, 16, 128), Fire(128, 32, 256), nn.MaxPool2d(2)),
            *(
                Fire(256, 32, 256),
                Fire(256, 48, 384),
                Fire(384, 48, 384),
                Fire(384, 64, 512),
                nn.MaxPool2d(2),
            ),
            *(Fire(512, 64, 512), conv(512, classes, kernel=1, bias=True), global_average()),
        )
    )
