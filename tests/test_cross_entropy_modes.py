"""Every mode of use, torch's loss against ours: values, gradients, second derivatives, exceptions, and
who answered. The modes stand in cross_entropy_modes.py.

A mode runs in the process of its test, with our kernels at every size. With Inductor each takes many
seconds: `make modes` runs those.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastopt
from child import run_python
from cross_entropy_modes import MODES, NOTES, STOCK
from fastopt.loss import _COMPILES_GRADIENTS

Loss = Callable[..., Tensor]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# No answer, but a fault of the mode or of this file.
OWN_FAULTS = ("FailOnRecompileLimitHit", "NameError", "TypeError", "AttributeError")
# Where torch raises and ours need not: our logits are not kept, so what happens to them is no error.
MAY_WORK = ("in place outside", "in place after forward")

pytestmark = [pytest.mark.stock]  # many modes are torch's to answer


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    F.cross_entropy = STOCK
    torch._dynamo.reset()


@dataclass
class Outcome:
    values: list[Any]
    error: Exception | None
    notes: list[str]
    ours: bool  # whether one of our ops ran

    def __str__(self) -> str:
        if self.error is not None:
            return f"{type(self.error).__name__}: {' '.join(str(self.error).split())[:200]}"
        shown = [v.double().norm().item() if isinstance(v, Tensor) else v for v in self.values]
        return f"{shown} {self.notes}"


def leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in leaves(part)]
    return [] if value is None else [value]


def outcome(mode: Callable[[Loss], Any], loss: Loss) -> Outcome:
    torch._dynamo.reset()
    NOTES.clear()
    values, error = [], None
    with profile(activities=[ProfilerActivity.CPU]) as events:
        try:
            values = [v.detach() if isinstance(v, Tensor) else v for v in leaves(mode(loss))]
        except Exception as raised:
            error = raised
    F.cross_entropy = STOCK
    ours = any(event.key.startswith("fastopt::") for event in events.key_averages())
    return Outcome(values, error, [note for note in NOTES if note], ours)


def equal(stock: Any, ours: Any) -> bool:
    if not isinstance(stock, Tensor):
        return bool(stock == ours)
    if (stock.shape, stock.dtype) != (ours.shape, ours.dtype):
        return False
    a, b = stock.double(), ours.double()
    scale = max(a.nan_to_num(0, 0, 0).abs().max().item(), 1e-30) if a.numel() else 1.0
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE[stock.dtype] * scale, equal_nan=True)


def compare(name: str, stock: Outcome, ours: Outcome) -> None:
    both = f"{name}: torch {stock} | ours {ours}"
    assert type(stock.error).__name__ not in OWN_FAULTS, both
    if stock.error is not None:
        if ours.error is None:
            assert any(words in name for words in MAY_WORK), both
        elif isinstance(ours.error, IndexError):  # eager torch's, for a label out of range
            assert "labels out of range" in name or isinstance(stock.error, IndexError), both
        else:
            assert type(ours.error) is type(stock.error), both
        return
    assert ours.error is None, both
    assert len(stock.values) == len(ours.values), both
    assert all(map(equal, stock.values, ours.values)), both
    if "compilations" in name:
        assert int(ours.notes[0]) <= int(stock.notes[0]), both


def cases(inductor: bool) -> list[str]:
    return [name for name in MODES if ("inductor" in name) == inductor]


@pytest.mark.parametrize("name", cases(inductor=False))
def test_mode(name: str) -> None:
    compare(name, outcome(MODES[name], STOCK), outcome(MODES[name], fastopt.cross_entropy))


@pytest.mark.modes
@pytest.mark.parametrize("name", cases(inductor=True))
def test_mode_of_inductor(name: str) -> None:
    with torch._inductor.config.patch(force_disable_caches=True):
        compare(name, outcome(MODES[name], STOCK), outcome(MODES[name], fastopt.cross_entropy))


# In these our kernels have to answer, or the comparison is torch's with itself.
OURS = (
    *(f"eager {dtype} {reduction}" for dtype in ("float32", "float64", "bfloat16", "float16")
      for reduction in ("mean", "sum", "none")),
    *("penalty_eager", "hooks_and_retain_grad", "retain_graph_twice", "is_grads_batched"),
    *("functional_hessian", "save_on_cpu", "hooks_that_keep", "checkpoint not reentrant"),
    *(("compile aot_eager: fullgraph static", "compile aot_eager: fullgraph dynamic=True",
       "compile aot_eager: unbacked batch (mask)", "compile eager: penalty around mean")
      if _COMPILES_GRADIENTS else ("compile aot_eager: no_grad, then with",)),
)  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_ours_answer(name: str) -> None:
    assert outcome(MODES[name], fastopt.cross_entropy).ours


@pytest.mark.slow
@pytest.mark.parametrize("caches", ["0", "1"])
def test_a_kept_graph_of_inductor_gives_its_gradient_twice(caches: str, tmp_path: Path) -> None:
    """torch's compiled backward may take a saved buffer of ours for its own and multiply in place: a
    graph cached for a backward that frees its buffers served one that keeps them, with torch's caches
    on (2.13)."""
    run_python(
        """
        import torch, fastopt
        x = torch.randn(64, 100).requires_grad_()
        t = torch.randint(100, (64,))
        def once(reduction):
            loss = torch.compile(lambda x, t: fastopt.cross_entropy(x, t, reduction=reduction))
            return torch.autograd.grad(loss(x, t).sum(), x)[0]
        for reduction in ("mean", "sum", "none"):
            right = once(reduction)
            torch._dynamo.reset()
            loss = torch.compile(lambda x: fastopt.cross_entropy(x, t, reduction=reduction))(x).sum()
            (3 * loss).backward(retain_graph=True)
            first, x.grad = x.grad, None
            loss.backward(retain_graph=True)
            second, x.grad = x.grad, None
            torch.testing.assert_close(first, 3 * right)
            torch.testing.assert_close(second, right)
            torch._dynamo.reset()
        """,
        FASTOPT_ALWAYS="1",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
        TORCHINDUCTOR_FORCE_DISABLE_CACHES="0" if caches == "1" else "1",
    )
