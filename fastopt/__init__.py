"""fastopt: drop-in, faster cross-entropy loss and SGD for PyTorch."""

__version__ = "0.1.0"  # before the imports: backends.py compares it with that of the libraries

from typing import TYPE_CHECKING, Any

from fastopt import backends
from fastopt.backends import MissingKernelsWarning
from fastopt.extras import LossStats
from fastopt.linear_loss import LinearCrossEntropyLoss, linear_cross_entropy
from fastopt.logprobs import LogProbs, entropy_from_logits, linear_logprobs, selective_log_softmax
from fastopt.loss import CrossEntropyLoss, cross_entropy
from fastopt.memory import empty_cache
from fastopt.optim import SGD

if TYPE_CHECKING:
    from fastopt import distributed as distributed
    from fastopt.patching import patch, patched, unpatch
    from fastopt.reports import report, reporting

__all__ = [
    "SGD",
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "LogProbs",
    "LossStats",
    "MissingKernelsWarning",
    "cross_entropy",
    "empty_cache",
    "entropy_from_logits",
    "linear_cross_entropy",
    "linear_logprobs",
    "patch",
    "patched",
    "report",
    "reporting",
    "selective_log_softmax",
    "unpatch",
]

_LAZY = {
    **dict.fromkeys(["patch", "patched", "unpatch"], "fastopt.patching"),
    **dict.fromkeys(["report", "reporting"], "fastopt.reports"),
}


def __getattr__(name: str) -> Any:
    """What few scripts need is imported when it is asked for."""
    import importlib

    if name == "distributed":
        return importlib.import_module("fastopt.distributed")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name]), name)
    return value


backends.warn_of_missing_kernels()

if backends.VERBOSE:
    from fastopt import reports

    reports.speak()
