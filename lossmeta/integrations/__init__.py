"""lossmeta in other libraries. Each module needs its library, and is loaded where it is imported by name.

* ``lossmeta.integrations.torchmetrics``: a metric of ours as one of torchmetrics, and the other way round.
* ``lossmeta.integrations.pytorch_metric_learning``: wrappers of pytorch-metric-learning that take our losses.
"""
