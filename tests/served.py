"""Who answered: our kernels or torch. A test of values that torch alone can pass tests nothing.

Importing this counts the calls of both faces from then on. conftest.py fails every test in which
torch alone answered, unless it is marked `stock`; the shared checks of each op ask for every call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import fastopt
from fastopt import backends, linear_loss, loss
from fastopt.sgd import step


class Face:
    """Calls of one of ours (of SGD: parameters with a gradient), by who answered them."""

    def __init__(self) -> None:
        self.ours = self.torchs = 0

    def counts(self) -> tuple[int, int]:
        return self.ours, self.torchs

    @contextmanager
    def answered(self, by_torch: bool | None = False) -> Iterator[None]:
        """Inside, our kernels have to answer every call; or torch some, where it is meant to; or
        either (None).
        """
        before = self.torchs
        try:
            yield
        finally:  # torch may be meant to raise
            answered_by_torch = self.torchs > before
            if by_torch:
                self.torchs = before
        if by_torch is not None:
            who = "torch answered a call that is ours" if answered_by_torch else "ours answered"
            assert answered_by_torch == by_torch, why_not() or who


cross_entropy = Face()
linear_cross_entropy = Face()
sgd = Face()


def why_not(device: str = "cpu") -> str | None:
    """Why no kernel of ours can answer on this device, and what to do; None where one can."""
    if backends.BACKEND == "reference" or (
        backends.CPU_LIBRARY if device == "cpu" else backends.GPU_FAMILY
    ):
        return None
    reason = backends.CPU_LIBRARY_ERROR if device == "cpu" else backends.CUDA_LIBRARY_ERROR
    return (
        f"fastopt has no kernels for {device} here ({reason}): torch would be compared with itself. "
        "`make build` builds them; FASTOPT_BACKEND=reference tests plain torch's instead."
    )


_serves_linear = linear_loss._serves
_serves, _kernel_step, _torch_update = loss._serves, step.kernel_step, step.torch_update


@functools.wraps(_serves)
def _counting_serves(*call: Any) -> bool:
    served = _serves(*call)
    if not torch.compiler.is_compiling():  # a count would be a guard
        cross_entropy.ours += served
        cross_entropy.torchs += not served
    return served


@functools.wraps(_serves_linear)
def _counting_serves_linear(*call: Any) -> bool:
    served = _serves_linear(*call)
    if not torch.compiler.is_compiling():
        linear_cross_entropy.ours += served
        linear_cross_entropy.torchs += not served
    return served


def _with_gradient(params: Any) -> int:
    return sum(param.grad is not None for param in params)


@functools.wraps(_kernel_step)
def _counting_kernel_step(optimizer: fastopt.SGD, *arguments: Any) -> None:
    before = sgd.torchs
    _kernel_step(optimizer, *arguments)
    all_params = (param for group in optimizer.param_groups for param in group["params"])
    sgd.ours += _with_gradient(all_params) - (sgd.torchs - before)


@functools.wraps(_torch_update)
def _counting_torch_update(options: Any, params: Any, *arguments: Any) -> None:
    if not torch.compiler.is_compiling():
        sgd.torchs += len(params)
    _torch_update(options, params, *arguments)


loss._serves = _counting_serves
linear_loss._serves = _counting_serves_linear
if backends.ALWAYS:  # torch's C++ function answers empty calls unasked, and nobody would count them
    loss._STOCK_IS_KNOWN = False
step.kernel_step = _counting_kernel_step
step.torch_update = _counting_torch_update
