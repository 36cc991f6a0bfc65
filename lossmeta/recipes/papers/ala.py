"""What the ALA paper reports on CIFAR-10, mean and, where it has one, standard deviation of 10 runs, in percent."""

from __future__ import annotations

# Tables 1 and S3, ResNet-32.
ERROR = {
    "cross-entropy": "7.51",
    "self-paced": "7.47",
    "L-Softmax": "7.01",
    "L2T": "7.10",
    "L2T-DLF": "6.95",
    "random matrix": "8.23 ± 0.41",
    "confusion matrix": "7.42 ± 0.04",
    "single-network": "6.85 ± 0.09",
    "multi-network": "6.79 ± 0.07",
    "contextual bandit": "7.34",
    "PBT": "7.29",
}
# Table 2, the model of Eban et al. (2017).
AUCPR = {
    "cross-entropy": "84.6",
    "pairwise AUCROC": "94.2",
    "AUCPR": "94.2",
    "ALA": "94.9 ± 0.14",
}
# Table 5 as it stands; Table S4 as what it adds to the default's error of 6.79. ResNet-32, multi-network.
ABLATIONS = {
    "cross-entropy": "7.51",
    "default": "6.79 ± 0.07",
    "1 layer": "+0.06",
    "3 layers": "-0.03",
    "without history": "+0.11",
    "without change": "+0.04",
    "without values": "+0.05",
    "without progress": "+0.02",
    "second run": "6.72 ± 0.04",
    "second run, finetuned": "6.72 ± 0.02",
}
