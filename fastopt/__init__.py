"""fastopt: drop-in, faster cross-entropy loss and SGD for PyTorch."""

from fastopt.loss import CrossEntropyLoss, cross_entropy
from fastopt.optim import SGD

__version__ = "0.1.0"
__all__ = ["SGD", "CrossEntropyLoss", "cross_entropy"]
