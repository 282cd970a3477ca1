"""The options of a cross-entropy call. Both ops that compute a loss take them in this order behind
their tensors. One more is a field and a word of the schema here, a field and a type in
csrc/host/cross_entropy.h, and what it means: in csrc/rules, in reference.py, in Triton's kernel.
"""

from typing import NamedTuple

import torch

NONE, MEAN, SUM = 0, 1, 2
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}

# SymInt: torch.compile would compile anew for every other int.
OPTIONS_SCHEMA = (
    "SymInt ignore_index, float label_smoothing, int reduction, ScalarType loss_dtype,"
    " float lse_square_scale"
)


class Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    reduction: int
    loss_dtype: torch.dtype
    lse_square_scale: float = 0.0

    @property
    def smoothing(self) -> float:
        return self.label_smoothing if self.label_smoothing > 0 else 0.0  # as torch: NaN is off

    @property
    def smoothed(self) -> bool:
        """Whether a label's row has mass in every class."""
        return self.label_smoothing > 0

    def of_kernel(self, classes: int) -> dict[str, float]:
        """What Triton's forward kernel is told of them, by the names of its arguments."""
        return {
            "ignore_index": self.ignore_index,
            "keep": 1.0 - self.smoothing,
            "uniform": self.smoothing / max(classes, 1),
            "lse_square_scale": self.lse_square_scale,
        }
