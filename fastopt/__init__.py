"""fastopt: drop-in, faster cross-entropy loss and SGD for PyTorch."""

__version__ = "0.1.0"  # before the imports: backends.py compares it with that of the libraries

from fastopt import backends
from fastopt.backends import MissingKernelsWarning
from fastopt.linear_loss import LinearCrossEntropyLoss, linear_cross_entropy
from fastopt.loss import CrossEntropyLoss, cross_entropy
from fastopt.memory import empty_cache
from fastopt.optim import SGD

__all__ = [
    "SGD",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "MissingKernelsWarning",
    "cross_entropy",
    "empty_cache",
    "linear_cross_entropy",
]

backends.warn_of_missing_kernels()
