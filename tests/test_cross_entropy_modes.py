"""Every mode of use, torch's loss against ours: values, gradients, second derivatives, exceptions, and
who answered. The modes stand in cross_entropy_modes.py; cross_entropy_calls.py has calls of every kind.

A mode runs in the process of its test, with our kernels at every size.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
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
import served
from child import run_python
from cross_entropy_calls import CALLS, CAPTURES, SAMPLE, WAYS, Call, losses_and_gradients
from cross_entropy_cases import DTYPES, dtype_name
from cross_entropy_modes import MODES, NOTES, STOCK
from fastopt.loss import _COMPILES_GRADIENTS

Loss = Callable[..., Tensor]

TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# No answer, but a fault of the mode or of this file.
OWN_FAULTS = (
    "FailOnRecompileLimitHit",
    "InductorError",
    "NameError",
    "TypeError",
    "AttributeError",
)
# What takes many seconds: `make modes` runs those.
LONG = ("inductor", "onnx", "compile eager all", "dynamic all")
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


def cases(table: Iterable[str], long: bool) -> list[str]:
    return [name for name in table if any(word in name for word in LONG) == long]


@pytest.mark.parametrize("name", cases(MODES, long=False))
def test_mode(name: str) -> None:
    compare(name, outcome(MODES[name], STOCK), outcome(MODES[name], fastopt.cross_entropy))


@pytest.mark.modes
@pytest.mark.parametrize("name", cases(MODES, long=True))
def test_long_mode(name: str) -> None:
    with torch._inductor.config.patch(force_disable_caches=True):
        compare(name, outcome(MODES[name], STOCK), outcome(MODES[name], fastopt.cross_entropy))


# What may be added to twice torch's error: second derivatives have several roundings.
ROUNDINGS = 4


def as_accurate(stock: Any, ours: Any, exact: Any, dtype: torch.dtype) -> bool:
    """Whether ours equals stock's, or is as near to what stock makes of float64: of logits in half
    precision, both are rounded on the way."""
    if equal(stock, ours) or not isinstance(stock, Tensor):
        return equal(stock, ours)
    finite = stock.isfinite()
    if (stock.shape, stock.dtype) != (ours.shape, ours.dtype) or not torch.equal(
        stock[~finite].nan_to_num(7.0), ours[~finite].nan_to_num(7.0)
    ):
        return False
    a, b, c = (values.detach()[finite].double() for values in (stock, ours, exact))
    budget = 2 * (a - c).abs().max() + ROUNDINGS * torch.finfo(dtype).eps * c.abs().max()
    return bool((b - c).abs().max() <= budget)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("way", WAYS)
def test_calls_crossed_with_ways(way: str, dtype: torch.dtype) -> None:
    by_torch = way == "functional_gradient" if fastopt.backends.ALWAYS else None

    def run(loss: Loss, call: Call, exact: bool = False) -> list[Any]:
        x, t, kw = call.inputs(exact)
        return list(WAYS[way](functools.partial(loss, target=t, **kw), x))

    for call in CALLS:
        if call.dtype is dtype:
            stock = run(STOCK, call)
            with served.cross_entropy.answered(by_torch):
                ours = run(fastopt.cross_entropy, call)
            if not all(map(equal, stock, ours)):
                exact = run(STOCK, call, exact=True)
                right = [
                    as_accurate(*three, dtype) for three in zip(stock, ours, exact, strict=True)
                ]
                assert all(right), f"{call}: {right}: torch {stock} | ours {ours} | exact {exact}"


def check_capture(name: str, calls: list[Call]) -> None:
    stock, ours = (
        outcome(lambda ce: losses_and_gradients(ce, calls, CAPTURES[name]), loss)
        for loss in (STOCK, fastopt.cross_entropy)
    )
    assert stock.error is None and ours.error is None, f"torch {stock} | ours {ours}"
    exact = leaves(losses_and_gradients(STOCK, calls, exact=True))
    for i, three in enumerate(zip(stock.values, ours.values, exact, strict=True)):
        call = calls[i // 2]
        assert as_accurate(*three, call.dtype), f"{call}: torch, ours, exact: {three}"
    assert ours.ours == (name.startswith("compile") and _COMPILES_GRADIENTS)


@pytest.mark.parametrize("name", cases(CAPTURES, long=False))
def test_calls_crossed_with_captures(name: str) -> None:
    check_capture(name, SAMPLE[::2])


@pytest.mark.modes
@pytest.mark.parametrize("name", cases(CAPTURES, long=True))
def test_calls_crossed_with_long_captures(name: str) -> None:
    with torch._inductor.config.patch(force_disable_caches=True):
        check_capture(name, SAMPLE)


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
