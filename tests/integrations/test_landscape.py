"""Loss surfaces of models of transformers, and of one in DistributedDataParallel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lossmeta.landscape import hessian_eigenvalues, loss_surface, random_directions

TOKENS, CLASSES = 20, 3


def moved(model: nn.Module, directions: list[dict[str, Tensor]], a: float, b: float) -> nn.Module:
    found = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, p in found.named_parameters():
            p += a * directions[0][name] + b * directions[1][name]
    return found


@pytest.fixture
def bert() -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=TOKENS, num_labels=CLASSES, **sizes)
    return transformers.BertForSequenceClassification(config)


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(TOKENS, (n, 6), generator=generator),
            "labels": torch.randint(CLASSES, (n,), generator=generator),
        }
        for n in (4, 2)
    ]


@pytest.mark.parametrize("own", [False, True])
def test_batches_of_transformers(bert: Any, own: bool) -> None:
    bert.train()
    before = {name: t.clone() for name, t in bert.state_dict().items()}
    directions = random_directions(bert)
    loss_fn = (lambda output, batch: F.cross_entropy(output.logits, batch["labels"])) if own else None
    surface = loss_surface(bert, loss_fn, batches(), directions=directions, points=3)
    there = moved(bert, directions, 1, -1)
    with torch.no_grad():
        expected = sum(len(b["labels"]) * float(there(**b).loss) for b in batches()) / 6
    assert float(surface.losses[2, 0]) == pytest.approx(expected, rel=1e-5)
    assert bert.training and all(torch.equal(t, before[name]) for name, t in bert.state_dict().items())


def test_the_spectrum_of_transformers(bert: Any) -> None:
    """Attention has a second derivative here."""
    found = hessian_eigenvalues(bert.double(), None, batches(), count=1, tolerance=1e-4)
    assert bool(found.values.isfinite().all()) and float(found.residuals[0]) < 1e-3 * abs(
        float(found.values[0])
    )


def test_a_model_of_a_process_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, CLASSES))
        samples = torch.randn(8, 4), torch.randint(CLASSES, (8,))
        directions = random_directions(model)
        wrapped = loss_surface(
            DistributedDataParallel(model), F.cross_entropy, samples, directions=directions, points=3
        )
        plain = loss_surface(model, F.cross_entropy, samples, directions=directions, points=3)
        assert torch.equal(wrapped.losses, plain.losses)
    finally:
        torch.distributed.destroy_process_group()
