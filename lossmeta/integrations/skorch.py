"""Nets of skorch with losses of lossmeta as their criterion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from lossmeta._batches import Loss
from lossmeta.adalfl import OnlineLearner
from lossmeta.adalfl.learned_loss import to_learn
from lossmeta.losses import LossNetwork

try:
    import skorch
    from skorch.dataset import unpack_data
    from skorch.utils import to_tensor
except ImportError as error:
    raise ImportError(
        f"lossmeta.integrations.skorch: skorch must be installed, got {str(error)!r}; "
        'pip install "lossmeta[integrations]"'
    ) from error

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": partial(torch.softmax, dim=-1),
    "sigmoid": torch.sigmoid,
}


class _LearnsCriterion(skorch.NeuralNet):  # type: ignore[misc]  # Any where skorch is missing
    """A net whose criterion may be learned while it trains."""

    prefixes_ = [*skorch.NeuralNet.prefixes_, "learner"]  # noqa: RUF012  # skorch adds to a copy

    def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        super().initialize_optimizer(*args, **kwargs)
        self.learner_ = self._made()
        return self

    def set_params(self, **kwargs: Any) -> Any:
        own = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith("learner__")}
        super().set_params(**kwargs)
        self._params_to_validate |= own.keys()
        for key, value in own.items():
            setattr(self, key, value)
        if self.initialized_ and (own or kwargs.keys() & {"meta_lr", "task_loss"}):
            self.learner_ = self._made()
        return self

    def get_all_learnable_params(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the module alone: a loss that is minimised over its own parameters is lost."""
        criterion = set(self.criterion_.parameters())
        return ((name, p) for name, p in super().get_all_learnable_params() if p not in criterion)

    def _made(self) -> OnlineLearner | None:
        phi = to_learn(self.criterion_)
        if not phi:
            return None
        name = type(self).__name__
        for label, callback in self.callbacks_:
            if (
                getattr(type(callback), "on_grad_computed", None)
                is not skorch.callbacks.Callback.on_grad_computed
            ):
                raise ValueError(
                    f"{name}: callbacks must not wait for gradients, which are the learner's, got {label!r}; to clip "
                    "them, pass learner__clip_norm"
                )
        for method in ("train_step_single", "infer", "get_loss", "on_grad_computed"):
            owner = next(kind for kind in type(self).__mro__ if method in vars(kind))
            if not owner.__module__.startswith(("skorch.", "lossmeta.")):
                raise ValueError(
                    f"{name}: a learned criterion's steps do not call {method}, got one of {owner.__name__}; override "
                    "train_step, or freeze the criterion"
                )
        options = self.get_params_for("learner")
        options.setdefault("meta_optimizer", Adam(phi, lr=self.meta_lr))
        if options.get("keep_gradients"):
            raise ValueError(f"{name}: learner__keep_gradients must be False, got True")
        return OnlineLearner(self.module_, self.optimizer_, self.criterion_, self.task_loss, **options)

    def train_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        if self.learner_ is None:
            return super().train_step(batch, **fit_params)  # type: ignore[no-any-return]
        self._set_training(True)
        x, y = unpack_data(batch)
        predictions: list[Tensor] = []

        def keep_first(module: nn.Module, inputs: Any, output: Any) -> None:
            if not predictions:
                predictions.append(output.detach() if isinstance(output, Tensor) else output)

        handle = self.module_.register_forward_hook(keep_first)
        try:
            report = self.learner_.step((self._inputs(x, fit_params), to_tensor(y, device=self.device)))
        finally:
            handle.remove()
        return {"loss": report.loss, "y_pred": predictions[0]}

    def _inputs(self, x: Any, fit_params: dict[str, Any]) -> Any:
        x = to_tensor(x, device=self.device)
        if isinstance(x, Mapping):
            return self._merge_x_and_fit_params(x, fit_params)
        if fit_params:
            raise ValueError(
                f"{type(self).__name__}: X must be a dict where fit has further parameters, got "
                f"{type(x).__name__} and {', '.join(fit_params)}"
            )
        return (x,)  # one input, whatever it is

    def get_loss(self, y_pred: Any, y_true: Any, X: Any = None, training: bool = False) -> Tensor:
        """In evaluation the task loss, where the criterion is learned: what is learned is no measure."""
        if training or self.learner_ is None:
            return super().get_loss(y_pred, y_true, X, training)  # type: ignore[no-any-return]
        return self.task_loss(y_pred, to_tensor(y_true, device=self.device))  # type: ignore[no-any-return]

    def _get_predict_nonlinearity(self) -> Callable[[Tensor], Tensor]:
        self.check_is_fitted()
        if self.predict_nonlinearity == "auto" and self._link in NONLINEARITIES:
            return NONLINEARITIES[self._link]
        return super()._get_predict_nonlinearity()  # type: ignore[no-any-return]

    @property
    def _link(self) -> str:
        return getattr(self.criterion_, "link", "")

    # A learner is made anew from its state: it holds functions, which cannot be pickled.

    def __getstate__(self) -> dict[str, Any]:
        learner = self.__dict__.get("learner_")
        self.__dict__["learner_"] = None
        try:
            state: dict[str, Any] = super().__getstate__()
        finally:
            self.__dict__["learner_"] = learner
        state["learner_state_"] = None if learner is None else learner.state_dict()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("learner_state_", None)
        super().__setstate__(state)
        if saved is not None:
            self.learner_ = self._made()
            assert self.learner_ is not None
            self.learner_.load_state_dict(saved)


class OnlineClassifier(_LearnsCriterion, skorch.NeuralNetClassifier):  # type: ignore[misc]
    """``skorch.NeuralNetClassifier`` for losses of lossmeta, which take logits.

    ``predict_proba`` gives the probabilities that the criterion's link means: softmax, or with ``link="sigmoid"`` one
    for each label, of which ``predict`` takes those above one half. A criterion with parameters to learn is learned by
    an :class:`~lossmeta.adalfl.OnlineLearner` in the training steps, and ``valid_loss`` is the task loss. One without
    is minimised as any other. The parameters of a criterion are never given to the optimizer.

    Args:
        args, kwargs: those of ``skorch.NeuralNetClassifier``; the module gives logits.
        criterion: a class or an instance; its options are ``criterion__...``.
        task_loss: what is really to be lowered.
        meta_lr: learning rate of Adam, which moves the criterion.
        learner__...: options of :class:`~lossmeta.adalfl.OnlineLearner`.

    Raises:
        ValueError: when it is initialised, for a callback that waits for gradients, for an override that a step of the
            learner would pass by, and what :class:`~lossmeta.adalfl.OnlineLearner` refuses.

    Example:
        >>> net = OnlineClassifier(
        ...     torch.nn.Linear(64, 10), criterion__residual="cross_entropy", meta_lr=1e-3, learner__log_slope=True
        ... )
    """

    def __init__(
        self,
        module: Any,
        *args: Any,
        criterion: Any = LossNetwork,
        task_loss: Loss = F.cross_entropy,
        meta_lr: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, *args, criterion=criterion, **kwargs)
        self.task_loss, self.meta_lr = task_loss, meta_lr

    def predict(self, X: Any) -> Any:
        if self._link == "sigmoid":
            return (self.predict_proba(X) > 0.5).astype(int)
        return super().predict(X)


class OnlineRegressor(_LearnsCriterion, skorch.NeuralNetRegressor):  # type: ignore[misc]
    """``skorch.NeuralNetRegressor`` for losses of lossmeta with ``link="identity"``.

    A criterion with parameters to learn is learned as by :class:`OnlineClassifier`.

    Args:
        args, kwargs: those of ``skorch.NeuralNetRegressor``.
        criterion: a class or an instance; its options are ``criterion__...``.
        task_loss: what is really to be lowered.
        meta_lr: learning rate of Adam, which moves the criterion.
        learner__...: options of :class:`~lossmeta.adalfl.OnlineLearner`.

    Raises:
        ValueError: as :class:`OnlineClassifier`.

    Example:
        >>> net = OnlineRegressor(
        ...     torch.nn.Linear(8, 1), criterion__link="identity", criterion__residual="squared_error", meta_lr=1e-3
        ... )
    """

    def __init__(
        self,
        module: Any,
        *args: Any,
        criterion: Any = LossNetwork,
        task_loss: Loss = F.mse_loss,
        meta_lr: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        super().__init__(module, *args, criterion=criterion, **kwargs)
        self.task_loss, self.meta_lr = task_loss, meta_lr
