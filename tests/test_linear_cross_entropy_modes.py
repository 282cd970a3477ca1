"""linear_cross_entropy in the modes of cross_entropy_modes.py, torch's against ours.

A mode takes a loss of logits. Here the loss has a head of its own in front: what the mode calls
logits is the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from cross_entropy_modes import MODES, C
from fastopt.linear_loss import _stock
from fastopt.loss import _COMPILES_GRADIENTS
from linear_cross_entropy_cases import small_chunks  # noqa: F401
from test_cross_entropy_modes import LONG, _quiet, compare, outcome  # noqa: F401

pytestmark = [pytest.mark.stock, pytest.mark.usefixtures("small_chunks")]

HEAD = torch.linspace(-1, 1, C * C).sin().reshape(C, C) + torch.eye(C)
# About cross_entropy's own modules and names, and shapes that a head does not take. And save_on_cpu,
# which keeps no copy of what is on the CPU, and changes behind autograd's back: a gradient that is
# computed in backward sees what became of the input.
NOT_OURS = ("module", "patched", "script", "sizes that change", "unbacked classes", "sharded")
NOT_OURS += ("a_mode_that_counts", "a_function_mode", "symbolic_trace", "tensorboard")
NOT_OURS += ("vmap(grad)", "autocast", "negated_and_zero", "onnx", "inference_", "compilations")
NOT_OURS += ("export_of_loss_and_gradients",)  # its graph takes the head as one argument more
NOT_OURS += ("save_on_cpu", "saved tensors on CPU", "after forward .data", "after forward numpy")
# One of every kind; `make modes` runs all others.
KINDS = (
    *(f"eager {dtype} {reduction}" for dtype in ("float32", "bfloat16") for reduction in ("mean", "none")),
    *("penalty_eager", "probabilities_with_gradient", "hooks_and_retain_grad", "retain_graph_twice"),
    *("backward_a_second_time_raises", "is_grads_batched", "functional_hessian", "dual_numbers"),
    *("hooks_that_deduplicate", "hooks_that_keep", "hooks_disabled", "anomaly_mode"),
    *("checkpoint reentrant", "checkpoint not reentrant", "checkpoint_create_graph"),
    *("user_writes_into_grad", "target_changed_in_place_raises", "in place after forward mul_ none"),
    *("inside_inference_mode", "deterministic", "multiprocessing_threads", "meta_tensors"),
    *("func grad eager", "func jvp eager", "func vmap eager", "func hessian eager", "functionalize"),
    *("compile eager: penalty around mean", "compile aot_eager: unbacked batch (mask)"),
    *("compile aot_eager: no_grad, then with", "compile aot_eager: checkpoint inside"),
    *("compile aot_eager: labels out of range", "compile aot_eager: wrong shapes raise"),
    *("fake_tensor_mode", "make_fx symbolic", "jit_trace", "flop_counter", "selective_checkpoint"),
    *("export strict=False static mean", "export strict=False Dim none", "linearize"),
)  # fmt: skip
OURS = (
    *(f"eager {dtype} {reduction}" for dtype in ("float32", "bfloat16") for reduction in ("mean", "none")),
    *("penalty_eager", "retain_graph_twice", "is_grads_batched", "functional_hessian"),
    *(("compile aot_eager: unbacked batch (mask)", "compile eager: penalty around mean") if _COMPILES_GRADIENTS else ()),
)  # fmt: skip


def with_a_head(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """Whose weight wants a gradient, too; but no graph can hold a constant that does."""
    captured = any(word in name for word in ("export", "trace", "make_fx", "fake", "ahead_of_time"))
    head = HEAD.clone().requires_grad_(not captured)

    def loss(x: Any, t: Any, weight: Any = None, **keywords: Any) -> Tensor:
        w = head if x.dtype == torch.float32 else head.to(x.dtype)
        return function(x, w.to(x.device), t, weight=weight, **keywords)

    return loss


def check(name: str) -> None:
    stock, ours = (with_a_head(f, name) for f in (_stock, fastopt.linear_cross_entropy))
    compare(name, outcome(MODES[name], stock), outcome(MODES[name], ours))


@pytest.mark.parametrize("name", KINDS)
def test_mode(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", OURS)
def test_ours_answer(name: str) -> None:
    assert outcome(MODES[name], with_a_head(fastopt.linear_cross_entropy, name)).ours


OTHERS = [
    name
    for name in MODES
    if name not in KINDS and not any(word in name for word in (*NOT_OURS, *LONG))
]


@pytest.mark.modes
@pytest.mark.parametrize("name", OTHERS)
def test_other_mode(name: str) -> None:
    check(name)
