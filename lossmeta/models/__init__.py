"""The networks of the AdaLFL paper's experiments (§4.2), and a small one for the CPU.

Functions that return a module which maps a batch of inputs to logits ``[N, classes]``. The paper names the
architectures only. Widths, BatchNorm and dropout follow earlier code of the same authors (EvoMAL); so does the
initialisation of the MLP, LeNet-5 and SqueezeNet, which is here that of all: weights of linear layers and convolutions
Xavier-uniform (Glorot & Bengio, 2010), biases zero. Convolutions that BatchNorm follows have no bias.
"""

from lossmeta.models.allcnn import allcnn_c
from lossmeta.models.mlp import logistic, mlp
from lossmeta.models.resnet import resnet18, resnet32
from lossmeta.models.small import lenet5, small_cnn
from lossmeta.models.squeezenet import squeezenet
from lossmeta.models.vgg import vgg16
from lossmeta.models.wide_resnet import wide_resnet

__all__ = [
    "allcnn_c",
    "lenet5",
    "logistic",
    "mlp",
    "resnet18",
    "resnet32",
    "small_cnn",
    "squeezenet",
    "vgg16",
    "wide_resnet",
]
