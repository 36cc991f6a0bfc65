"""lossmeta in other libraries. Each module needs its library, and is loaded where it is imported by name.

* ``lossmeta.integrations.lightning``: modules whose training steps are those of a learner.
* ``lossmeta.integrations.transformers``: a Trainer with a learned loss, and losses for the Trainer of transformers.
* ``lossmeta.integrations.accelerate``: a learner of what ``accelerator.prepare`` returned.
* ``lossmeta.integrations.skorch``: a classifier and a regressor for our losses.
* ``lossmeta.integrations.optuna``: TuneLoss as a sampler, so that many machines share one study.
* ``lossmeta.integrations.torchmetrics``: a metric of ours as one of torchmetrics, and the other way round.
* ``lossmeta.integrations.pytorch_metric_learning``: wrappers of pytorch-metric-learning that take our losses.
"""
