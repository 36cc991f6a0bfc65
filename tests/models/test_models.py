"""Sizes, shapes and gradients of the networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lossmeta import models
from lossmeta.models import _layers
from lossmeta.models.resnet import Block as ResidualBlock
from lossmeta.models.squeezenet import Fire
from lossmeta.models.wide_resnet import Block as WideBlock

Case = tuple[
    Callable[[], nn.Module], tuple[int, ...], int, int
]  # model, shape of a sample, outputs, parameters
IMAGE = (3, 32, 32)

# Published, or counted from the layers: weights and biases, two numbers per channel of a BatchNorm.
VGG = 9 * (3 * 64 + 64**2 + 64 * 128 + 128**2 + 128 * 256 + 2 * 256**2 + 256 * 512 + 5 * 512**2) + 2 * (
    2 * 64 + 2 * 128 + 3 * 256 + 6 * 512
)
ALLCNN = (
    1_369_738 + 96 * 3 + 192 * 5
)  # without BatchNorm; a BatchNorm has one number per channel more than a bias


def fire(inputs: int, squeezed: int, outputs: int) -> int:
    return inputs * squeezed + 2 * squeezed + squeezed * outputs // 2 * (1 + 9) + 2 * outputs


FIRES = [(96, 16, 128), (128, 16, 128), (128, 32, 256), (256, 32, 256)]
FIRES += [(256, 48, 384), (384, 48, 384), (384, 64, 512), (512, 64, 512)]

CASES: dict[str, Case] = {
    "logistic": (lambda: models.logistic(784, 10), (1, 28, 28), 10, 7_850),
    "mlp": (lambda: models.mlp(784, 10), (1, 28, 28), 10, 1_796_010),
    "mlp for regression": (lambda: models.mlp(8, 1), (8,), 1, 1_011_001),
    "mlp of three layers": (lambda: models.mlp(5, 2, width=7, layers=3), (5,), 2, 42 + 56 + 56 + 16),
    "lenet5": (models.lenet5, (1, 28, 28), 10, 61_706),
    "lenet5 in colour": (lambda: models.lenet5(7, 3), (3, 28, 28), 7, 61_706 + 300 - 3 * 85),
    "small_cnn": (models.small_cnn, IMAGE, 10, 448 + 4_640 + 18_496 + 10_250),
    "small_cnn in grey": (lambda: models.small_cnn(4, 1), (1, 32, 32), 4, 160 + 4_640 + 18_496 + 4_100),
    "vgg16": (lambda: models.vgg16(10), IMAGE, 10, VGG + 5_130),
    "allcnn_c": (lambda: models.allcnn_c(10), IMAGE, 10, ALLCNN),
    "resnet18": (lambda: models.resnet18(10), IMAGE, 10, 11_173_962),
    "resnet32": (lambda: models.resnet32(10), IMAGE, 10, 464_154 + 512 + 64 + 2_048 + 128),
    "squeezenet": (
        lambda: models.squeezenet(10),
        IMAGE,
        10,
        27 * 96 + 192 + sum(fire(*sizes) for sizes in FIRES) + 5_130,
    ),
    "WRN-10-2": (lambda: models.wide_resnet(10, 2, 100, dropout=0.3), IMAGE, 100, 315_316),
    "WRN-16-8": (lambda: models.wide_resnet(16, 8, 10), IMAGE, 10, 10_961_370),
}
SMALL_BATCH = 2
each = pytest.mark.parametrize(("make", "shape", "outputs", "size"), CASES.values(), ids=CASES)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@each
def test_number_of_parameters(
    make: Callable[[], nn.Module], shape: tuple[int, ...], outputs: int, size: int
) -> None:
    assert count(make()) == size


@pytest.mark.parametrize(("classes", "size"), [(10, 36_479_194), (100, 36_536_884)])
def test_number_of_parameters_of_wrn_28_10(classes: int, size: int) -> None:
    with torch.device("meta"):
        assert count(models.wide_resnet(28, 10, classes)) == size


@pytest.mark.parametrize("name", ["vgg16", "allcnn_c", "resnet18", "squeezenet"])
def test_other_numbers_of_classes(name: str) -> None:
    model = getattr(models, name)(7).eval()
    assert model(torch.randn(1, *IMAGE)).shape == (1, 7)


@each
def test_gradients_reach_every_parameter(
    make: Callable[[], nn.Module], shape: tuple[int, ...], outputs: int, size: int
) -> None:
    model = make()
    logits = model(torch.randn(SMALL_BATCH, *shape))
    assert logits.shape == (SMALL_BATCH, outputs)
    assert logits.isfinite().all()
    (logits * torch.randn_like(logits)).sum().backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


@each
def test_functional_call_uses_the_parameters_given(
    make: Callable[[], nn.Module], shape: tuple[int, ...], outputs: int, size: int
) -> None:
    model, other = make().eval(), make().eval()
    x = torch.randn(SMALL_BATCH, *shape)
    before = [p.clone() for p in model.parameters()]
    result = functional_call(model, dict(other.named_parameters()), (x,))
    assert torch.equal(result, other(x))
    assert not torch.equal(result, model(x))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@each
def test_initialisation(
    make: Callable[[], nn.Module], shape: tuple[int, ...], outputs: int, size: int
) -> None:
    for module in make().modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            weight = module.weight
            field = weight[0, 0].numel()
            bound = (6 / (field * (weight.shape[0] + weight.shape[1]))) ** 0.5
            assert weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=5 / weight.numel() ** 0.5)
            assert module.bias is None or not module.bias.any()


def test_convolution_is_followed_by_norm_and_relu() -> None:
    layer, x = _layers.conv_norm_relu(3, 4), torch.randn(8, *IMAGE)
    convolved = layer[0](x)
    variance, mean = torch.var_mean(convolved, (0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(layer(x), ((convolved - mean) / (variance + 1e-5).sqrt()).relu())


def test_blocks_add_their_input() -> None:
    """With the last weights of the residual at zero, only the shortcut is left."""
    x = torch.randn(2, 8, 4, 4)
    block = ResidualBlock(8, 8, 1)
    nn.init.zeros_(block.residual[-1].weight)
    assert torch.equal(block(x), x.relu())
    wide = WideBlock(8, 8, 1, 0.0)
    nn.init.zeros_(wide.residual[-1].weight)
    assert torch.equal(wide(x), x)
    fire_with_bypass = Fire(8, 2, 8)
    for expand in (fire_with_bypass.expand1, fire_with_bypass.expand3):
        nn.init.zeros_(expand[1].weight)
    assert torch.equal(fire_with_bypass(x), x)


def test_dropout_of_wide_resnet() -> None:
    x = torch.randn(2, *IMAGE)
    for dropout in (0.0, 0.5):
        model = models.wide_resnet(10, 1, 10, dropout)
        assert torch.equal(model(x), model(x)) == (dropout == 0)
        model.eval()
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("depth", [4, 12, 18, -2])
def test_depth_that_wide_resnet_cannot_have(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"wide_resnet: depth must be 6n \+ 4 with n >= 1, got {depth}"):
        models.wide_resnet(depth, 1, 10)


def test_width_that_wide_resnet_cannot_have() -> None:
    with pytest.raises(ValueError, match="wide_resnet: widen must be at least 1, got 0"):
        models.wide_resnet(16, 0, 10)
