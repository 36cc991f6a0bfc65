"""All-CNN-C."""

from __future__ import annotations

from torch import nn

from lossmeta.models._layers import conv, conv_norm_relu, global_average, initialized


def allcnn_c(classes: int = 10) -> nn.Module:
    """All-CNN-C (Springenberg et al., 2014): nine convolutions, two of which have stride 2 in the place of pooling.

    As in earlier code of AdaLFL's authors there is BatchNorm, and dropout of 0.5 after each strided convolution,
    none on the input. Takes ``[N, 3, 32, 32]``; 1,370,986 parameters for 10 classes.

    Example:
        >>> allcnn_c(10)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return initialized(
        nn.Sequential(
            *(
                conv_norm_relu(3, 96),
                conv_norm_relu(96, 96),
                conv_norm_relu(96, 96, stride=2),
                nn.Dropout(0.5),
            ),
            *(
                conv_norm_relu(96, 192),
                conv_norm_relu(192, 192),
                conv_norm_relu(192, 192, stride=2),
                nn.Dropout(0.5),
            ),
            *(conv_norm_relu(192, 192), conv_norm_relu(192, 192, kernel=1)),
            *(conv(192, classes, kernel=1, bias=True), global_average()),
        )
    )
