"""The loss whose parameters are tuned: the task's, and features with coefficients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lossmeta._batches import Loss, Output, call_model, prediction_of, samples
from lossmeta.tuneloss._box import Values
from lossmeta.tuneloss.features import Feature, PredictionFeature
from lossmeta.tuneloss.mixture import TransformedLoss


class TunedLoss(nn.Module):
    r"""The loss :math:`\ell(\theta) = task(\theta) + \sum_j \lambda_j \phi_j(\theta)`.

    It holds its parameters :math:`\lambda`. :meth:`set` replaces them, and ``state_dict`` has them.

    Args:
        task_loss: ``task_loss(prediction, target)``, a mean over samples.
        features: by the names of their parameters: callables ``feature(model, batch)``, with
            ``batch = (inputs, target)``, that give a number, or [size] where the parameter is a vector. Features of the
            data are means over samples.
        values: of the parameters by name, a number or a vector [size] each; see :meth:`set`.
        output: what of the model's output is the prediction, see :func:`lossmeta.adalfl.meta_gradient`.

    Attributes:
        values: that are set, by name; ``None`` before.

    Raises:
        TypeError: for a task loss or features that cannot be called.
        ValueError: for no feature, and values as :meth:`set` refuses them.

    Sources:
        Streeter, "Learning Effective Loss Functions Efficiently" (2019), section 4.2.

    Example:
        >>> from lossmeta.tuneloss import SquaredL2, TunedLoss, UniformLabelLoss
        >>> features = {"l2": SquaredL2(scale=1 / 500), "uniform": UniformLabelLoss()}
        >>> loss = TunedLoss(torch.nn.functional.cross_entropy, features)
        >>> loss.set({"l2": 0.3, "uniform": 0.02})
        >>> model = torch.nn.Linear(4, 3)
        >>> loss(model, torch.randn(8, 4), torch.randint(3, (8,))).backward()
    """

    def __init__(
        self,
        task_loss: Loss,
        features: Mapping[str, Feature],
        values: Mapping[str, Any] | None = None,
        *,
        output: Output = None,
    ) -> None:
        super().__init__()
        if not callable(task_loss):
            raise TypeError(f"TunedLoss: task_loss must be callable, got {type(task_loss).__name__}")
        if not isinstance(features, Mapping):
            raise TypeError(f"TunedLoss: features must map names to callables, got {type(features).__name__}")
        if not features:
            raise ValueError("TunedLoss: features must have at least one, got none")
        for name, feature in features.items():
            if not isinstance(name, str):
                raise TypeError(f"TunedLoss: names of features must be strings, got {name!r}")
            if not callable(feature):
                raise TypeError(f"TunedLoss: feature {name!r} must be callable, got {type(feature).__name__}")
        self.task_loss, self.features, self.output = task_loss, dict(features), output
        # So that .to() reaches features with tensors of their own.
        self.feature_modules = nn.ModuleList(f for f in features.values() if isinstance(f, nn.Module))
        self._values: Values | None = None
        self._tensors: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        if values is not None:
            self.set(values)

    # ---- Parameters.

    @property
    def values(self) -> Values | None:
        return None if self._values is None else dict(self._values)

    def set(self, values: Mapping[str, Any]) -> None:
        """Replaces the parameters.

        Args:
            values: of all features by name, in any order: a number, or a vector [size].

        Raises:
            TypeError: for values that are no mapping.
            ValueError: for other names than the features', and values that are not finite. Nothing is replaced then.
        """
        self._values, self._tensors = self.checked(values), {}

    def checked(self, values: Mapping[str, Any]) -> Values:
        """Values as :meth:`set` takes them, in the given order: floats, and float64 arrays."""
        if not isinstance(values, Mapping):
            raise TypeError(
                f"TunedLoss: values must map names to numbers or vectors, got {type(values).__name__}"
            )
        if set(values) != set(self.features):
            wanted, given = ", ".join(self.features), ", ".join(map(str, values)) or "none"
            raise ValueError(f"TunedLoss: values must be of {wanted}, got {given}")
        found: Values = {}
        for name, value in values.items():
            value = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            array = np.array(value, dtype=np.float64)
            if array.ndim > 1 or not array.size or not np.isfinite(array).all():
                raise ValueError(
                    f"TunedLoss: value of {name!r} must be a finite number or vector, got {value!r}"
                )
            found[name] = array if array.ndim else float(array)
        return found

    def get_extra_state(self) -> dict[str, Any] | None:
        """Values for ``state_dict``."""
        if self._values is None:
            return None
        return {n: v if isinstance(v, float) else v.tolist() for n, v in self._values.items()}

    def set_extra_state(self, state: dict[str, Any] | None) -> None:
        """Values from ``load_state_dict``."""
        if state is None:
            self._values, self._tensors = None, {}
        else:
            self.set(state)

    # ---- The loss.

    def forward(self, model: nn.Module, inputs: Any, target: Tensor) -> Tensor:
        """The loss on a batch.

        Args:
            model: called as ``model(inputs)``; several inputs are a sequence or a mapping.
            inputs: of the batch.
            target: as the task's loss takes it.

        A feature whose parameter is zero is not computed.

        Returns:
            A number.

        Raises:
            ValueError: before values are set, and for features of another shape than their values.
        """
        values = self._set_values()
        task, found = self.terms(model, inputs, target, [n for n, v in values.items() if np.any(v)])
        return self.total(task, found, values)

    def _set_values(self) -> Values:
        if self._values is None:
            raise ValueError(
                "TunedLoss: values must be set before the loss is computed, got none; call set(values)"
            )
        return self._values

    def terms(
        self, model: nn.Module, inputs: Any, target: Tensor, names: Iterable[str] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The task's loss, and the named features (all of them by default), without their coefficients."""
        names = list(self.features if names is None else names)
        outputs, places = self.predictions(model, inputs, names)
        task, found = self.of_predictions(outputs, places, target)
        for name in names:
            if name not in found:
                found[name] = self.features[name](model, (inputs, target))
        return task, found

    def predictions(
        self, model: nn.Module, inputs: Any, names: Iterable[str]
    ) -> tuple[list[Tensor], dict[str, list[int]]]:
        """The predictions for the task, which come first, and for those features that are of predictions.

        Returns:
            The predictions, and for each of these features which ones it takes.
        """

        def predict(x: Any) -> Tensor:
            return prediction_of("TunedLoss", call_model(model, x), self.output)

        outputs = [predict(inputs)]
        places: dict[str, list[int]] = {}
        for name in names:
            feature = self.features[name]
            if isinstance(feature, PredictionFeature):
                places[name] = []
                for variant in feature.variants(inputs):
                    if variant is inputs:
                        places[name].append(0)
                    else:
                        places[name].append(len(outputs))
                        outputs.append(predict(variant))
        return outputs, places

    def of_predictions(
        self, outputs: list[Tensor], places: Mapping[str, list[int]], target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The task's loss and the features that are of predictions."""
        found = {}
        for name, at in places.items():
            feature = self.features[name]
            assert isinstance(feature, PredictionFeature)
            found[name] = feature.of_predictions([outputs[i] for i in at], target)
        return self.task_loss(outputs[0], target), found

    def total(self, task: Tensor, found: Mapping[str, Tensor], values: Values) -> Tensor:
        """The task's loss and the features times their values."""
        for name, feature in found.items():
            self._check(name, feature, values[name])
            value = values[name]
            task = task + (
                value * feature if isinstance(value, float) else self._vector(name, value, feature) @ feature
            )
        return task

    def _check(self, name: str, feature: Any, value: Any) -> None:
        if not isinstance(feature, Tensor):
            raise TypeError(f"TunedLoss: feature {name!r} must give a tensor, got {type(feature).__name__}")
        if feature.shape != np.shape(value):
            raise ValueError(
                f"TunedLoss: feature {name!r} must have the shape of its value, {list(np.shape(value))}, got "
                f"{list(feature.shape)}"
            )

    def _vector(self, name: str, value: Any, like: Tensor) -> Tensor:
        if self._values is None or value is not self._values[name]:
            return torch.tensor(value, device=like.device, dtype=like.dtype)
        key = name, like.device, like.dtype
        if key not in self._tensors:
            self._tensors[key] = torch.tensor(value, device=like.device, dtype=like.dtype)
        return self._tensors[key]

    def sampled(
        self, model: nn.Module, inputs: Tensor, target: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""The loss in one pass over the batch, for training: an unbiased sample of :meth:`forward`.

        With :math:`\Lambda` the sum of the parameters of :class:`DropoutLoss` and :class:`AugmentationMixture`, each
        sample stays as it is with probability :math:`1 / (1 + \Lambda)`. Else it is dropped out or transformed, with
        probability :math:`\lambda_j / (1 + \Lambda)`. The task's loss is then scaled by :math:`1 + \Lambda`. So
        dropout has the probability :math:`\lambda_4 / (1 + \lambda_4)` of section 4.2. Features of the plain
        predictions come from the samples that stay. The others are computed as in :meth:`forward`.

        Args:
            model: see :meth:`forward`.
            inputs: [N, ...].
            target: [N, ...].
            generator: of the draws, on the CPU. ``None`` takes torch's own random numbers.

        Raises:
            TypeError: for inputs that are no tensor.
            ValueError: for negative parameters of these features, features whose task loss is another one, and as
                :meth:`forward` does.
        """
        values = self._set_values()
        if not isinstance(inputs, Tensor):
            raise TypeError(f"TunedLoss: inputs must be one tensor, got {type(inputs).__name__}")
        drawn, weights = self._to_draw(values)
        scale, count = 1 + sum(weights), samples(target)
        which = torch.multinomial(
            torch.tensor([1.0, *weights], dtype=torch.float64, device="cpu"),
            count,
            replacement=True,
            generator=generator,
        ).to(inputs.device)
        mixed = inputs.clone()
        for i, (name, entry) in enumerate(drawn, 1):
            chosen = which == i
            if bool(chosen.any()):
                feature = self.features[name]
                assert isinstance(feature, TransformedLoss)
                mixed[chosen] = feature.draw(inputs[chosen], entry, generator).to(mixed.dtype)
        prediction = prediction_of("TunedLoss", call_model(model, mixed), self.output)
        total = scale * self.task_loss(prediction, target)
        stays = which == 0
        found: dict[str, Tensor] = {}
        for name, value in values.items():
            feature = self.features[name]
            if isinstance(feature, TransformedLoss) or not np.any(value):
                continue
            if isinstance(feature, PredictionFeature) and all(v is inputs for v in feature.variants(inputs)):
                staying = int(stays.sum())
                if staying:  # the mean over those that stay, times their share over its expectation
                    plain = feature.of_predictions([prediction[stays]], target[stays])
                    found[name] = scale * staying / count * plain
            else:
                found[name] = feature(model, (inputs, target))
        return self.total(total, found, values)

    def _to_draw(self, values: Values) -> tuple[list[tuple[str, int]], list[float]]:
        """The ways to change a sample that have a weight, and their weights."""
        drawn, weights = [], []
        for name, value in values.items():
            feature = self.features[name]
            if not isinstance(feature, TransformedLoss):
                continue
            if feature.task_loss is not self.task_loss:
                raise ValueError(
                    f"TunedLoss: feature {name!r} must have the task loss of this one to be sampled, got another"
                )
            for entry, weight in enumerate(np.atleast_1d(value).tolist()):
                if weight < 0:
                    raise ValueError(
                        f"TunedLoss: value of {name!r} must be at least 0 to be sampled, got {weight:g}"
                    )
                if weight:
                    drawn.append((name, entry))
                    weights.append(weight)
        return drawn, weights
