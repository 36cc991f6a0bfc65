"""The network that moves loss parameters, and its file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lossmeta._checks import check_at_least_one
from lossmeta._safetensors import read, write

FORMAT = 1  # one more wherever what is there would be read as something else
HEADER = "lossmeta policy"
ACTIONS = 3  # down, stay, up
AT_ONCE = 4096  # entries, whose hidden layers stay in the cache
PARTS = ("history", "change", "values", "progress")


class Policy(nn.Module):
    """Moves each entry of a loss's parameters down, not at all, or up, by what it sees of that entry.

    It sees the validation statistics of the last time steps, their relative change from a moving average, where the
    entry stands between its bounds, and how far the training is. Entries share a network, so that what is learned with
    10 classes serves 1000. It is made on the CPU, in float32.

    Args:
        features: how many statistics an entry has, by the network's name: the parameter's, or what its
            ``Parameter.policy`` says.
        hidden: sizes of the hidden layers, ReLU between them.
        history: time steps that are seen.
        parts: what is seen, any of ``"history"``, ``"change"``, ``"values"`` and ``"progress"``. Without
            ``"history"`` the statistics of the last time step are seen all the same.
        record: how it was learned, which :meth:`save` writes beside the weights; JSON.

    Attributes:
        sees: how many numbers of an entry each network sees.

    Raises:
        ValueError: without a network, for sizes below 1, and for an unknown part.

    Sources:
        Huang et al., "Addressing the Loss-Metric Mismatch with Adaptive Loss Alignment" (2019), sections 3.2 and 5.

    Example:
        >>> policy = lossmeta.ala.Policy({"class pairs": 2})
        >>> policy.sees
        {'class pairs': 24}
        >>> policy.save("policy.safetensors")
        >>> lossmeta.ala.Policy.load("policy.safetensors").hidden
        (32, 32)
    """

    def __init__(
        self,
        features: Mapping[str, int],
        *,
        hidden: Sequence[int] = (32, 32),
        history: int = 10,
        parts: Sequence[str] = PARTS,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not features:
            raise ValueError("Policy: features must name at least one network, got none")
        for name, number in (("history", history), *features.items(), *(("hidden", h) for h in hidden)):
            check_at_least_one("Policy", name, number)
        unknown = [part for part in parts if part not in PARTS]
        if unknown:
            raise ValueError(f"Policy: parts must be among {', '.join(PARTS)}, got {', '.join(unknown)}")
        self.features, self.hidden, self.history = dict(features), tuple(hidden), history
        self.parts = tuple(part for part in PARTS if part in parts)
        self.record: dict[str, Any] = dict(record or {})
        past = history if "history" in self.parts else 1
        more = ("values" in self.parts) + ("progress" in self.parts)
        self.sees = {n: s * (past + ("change" in self.parts)) + more for n, s in self.features.items()}
        self.networks = nn.ModuleList(_network(sees, self.hidden) for sees in self.sees.values())

    def of(self, name: str) -> nn.Module:
        """The network of that name: states ``[E, sees]`` to log-probabilities before normalisation ``[E, 3]``."""
        return self.networks[list(self.features).index(name)]

    @property
    def layout(self) -> dict[str, Any]:
        """What two policies must share to take each other's weights."""
        return {
            "features": self.features,
            "hidden": list(self.hidden),
            "history": self.history,
            "parts": list(self.parts),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes weights, layout and record to a safetensors file. A file that is there is replaced in one step.

        Raises:
            ValueError: for a record that is not JSON.
            OSError: where the file cannot be written.
        """
        try:
            description = json.dumps(
                {"format": FORMAT, "layout": self.layout, "record": self.record}, allow_nan=False
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"Policy.save: record must be JSON, got {error}") from error
        write(path, self.state_dict(), HEADER, description)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """What :meth:`save` wrote, on the CPU. Nothing is unpickled.

        Raises:
            ValueError: for a file of a newer version, one that :meth:`save` did not write, and a damaged one.
            OSError: where there is no such file.
        """
        where = f"Policy.load: {os.fspath(path)}"
        description, tensors = read(where, path, HEADER, FORMAT)
        try:
            with torch.random.fork_rng(devices=[]):
                policy = cls(**description["layout"], record=description["record"])
            policy.load_state_dict(tensors)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{where} must hold a policy whose weights fit its layout, got another ({error}); save it again"
            ) from error
        return policy

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.layout.items())


# Whatever PyTorch's defaults are: what a policy sees is made there.
_PLACE: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


def _network(inputs: int, hidden: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(inputs, size, **_PLACE), nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, ACTIONS, **_PLACE))


@torch.no_grad()
def choose(network: nn.Module, states: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, float]:
    """Actions -1, 0 and 1, ``[E]``, int8, their log-probabilities, and the sum of their distributions' entropies.

    Args:
        network: of a policy.
        states: ``[E, sees]``.
        uniform: numbers that draw the actions, ``[E]``.
    """
    actions, taken, entropy = [], [], 0.0
    for rows, draws in zip(states.split(AT_ONCE), uniform.split(AT_ONCE), strict=True):
        log_p = torch.log_softmax(network(rows), 1)
        p = log_p.exp()
        entropy -= float((p * log_p).sum())
        down, stay = p[:, 0], p[:, 1]
        actions.append((draws > down).to(torch.int8) + (draws > down + stay).to(torch.int8) - 1)
        taken.append(log_p.gather(1, (actions[-1].long() + 1)[:, None])[:, 0])
    return torch.cat(actions), torch.cat(taken), entropy


def log_probability(logits: Tensor, actions: Tensor) -> Tensor:
    """Of actions -1, 0 and 1, ``[E]``."""
    return torch.log_softmax(logits, 1).gather(1, (actions.long() + 1)[:, None])[:, 0]
