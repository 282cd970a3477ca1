"""Which side serves a call by its size: small ones go to torch, in its own bits.

Runs without FASTOPT_ALWAYS=1: `pytest -m crossover`.
"""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastopt
import fastopt.backends
import fastopt.loss
from accuracy import assert_same_bits
from child import run
from cross_entropy_cases import (
    EVERYTHING,
    REDUCTIONS,
    check,
    check_options,
    differentiate,
    dtype_name,
    make_logits,
    make_probabilities,
    make_target,
    random_upstream,
)
from fastopt import linear_loss
from fastopt.loss import _COMPILES_GRADIENTS
from linear_cross_entropy_cases import PARAMETERS, make_call
from test_cross_entropy_ops import ops_reached

pytestmark = pytest.mark.crossover

SMALL = [(1, 2), (4, 10), (1, 2, 3), (5,)]
LARGE = [(512, 1000), (65536, 10), (8, 128256), (2, 21, 128, 128)]


def test_the_crossover_is_on() -> None:
    assert not fastopt.backends.ALWAYS, "run these without FASTOPT_ALWAYS"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("shape", SMALL, ids=dtype_name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_small_calls_are_served_by_torch(
    reduction: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    logits = make_logits(shape, dtype)
    keywords = {"reduction": reduction, "label_smoothing": 0.1, "upstream": random_upstream}
    for target in (make_target(logits), make_probabilities(logits)):
        ours = differentiate(fastopt.cross_entropy, logits, target, **keywords)
        stock = differentiate(F.cross_entropy, logits, target, **keywords)
        assert_same_bits(ours.loss, stock.loss)
        assert_same_bits(ours.gradients["logits"], stock.gradients["logits"])
        call = functools.partial(differentiate, fastopt.cross_entropy, logits, target, **keywords)
        assert not ops_reached(call)


@pytest.mark.parametrize("shape", LARGE, ids=dtype_name)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_large_calls_are_served_by_us(reduction: str, shape: tuple[int, ...]) -> None:
    logits = make_logits(shape)
    target, keywords = EVERYTHING.apply(logits, make_target(logits))
    probabilities = make_probabilities(logits)
    for wants_gradient in (False, True):
        leaf = logits.detach().requires_grad_(wants_gradient)
        call = functools.partial(fastopt.cross_entropy, leaf, reduction=reduction)
        assert ops_reached(functools.partial(call, target=target, **keywords))
        assert ops_reached(functools.partial(call, target=probabilities))


@pytest.mark.parametrize("classes", [10, 1000])
def test_values_on_both_sides_of_the_crossover(classes: int) -> None:
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        logits = make_logits((rows, classes), seed=rows)
        for reduction in REDUCTIONS:
            check_options(logits, EVERYTHING, reduction=reduction, upstream=random_upstream)
        check(logits, make_probabilities(logits), wanted=("logits", "target"))


def test_small_calls_have_torchs_errors_too() -> None:
    logits = make_logits((4, 10))
    with pytest.raises(IndexError, match="Target 10 is out of bounds"):
        fastopt.cross_entropy(logits, torch.full((4,), 10))
    with pytest.raises(ValueError, match="batch_size"):
        fastopt.cross_entropy(logits, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tiny_calls_skip_torchs_own_python(monkeypatch: pytest.MonkeyPatch, reduction: str) -> None:
    """Its C++ function is called with the same arguments."""
    logits = make_logits((4, 10))
    target, keywords = EVERYTHING.apply(logits, make_target(logits))
    calls = []

    def stock(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        return F.cross_entropy(*arguments)

    monkeypatch.setattr(fastopt.loss, "_stock", stock)
    results = []
    for known in (fastopt.loss._STOCK_IS_KNOWN, False):
        monkeypatch.setattr(fastopt.loss, "_STOCK_IS_KNOWN", known)
        results.append(fastopt.cross_entropy(logits, target, reduction=reduction, **keywords))
        assert len(calls) == (not known)
    assert_same_bits(*results)


def test_a_patch_that_was_there_first_gets_tiny_calls() -> None:
    """Whoever patched torch before fastopt was imported is called as torch would be."""
    script = """
import torch, torch.nn.functional as F
original, calls = F.cross_entropy, []
def patch(*arguments, **keywords):
    calls.append(arguments)
    return original(*arguments, **keywords)
F.cross_entropy = patch
import fastopt
fastopt.CrossEntropyLoss()(torch.randn(4, 10), torch.arange(4))
assert len(calls) == 1, calls
"""
    done = run(sys.executable, "-c", script, FASTOPT_ALWAYS="0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("reduction", ["average", 1, None, ["mean"]], ids=repr)
def test_tiny_calls_refuse_what_torch_refuses(reduction: object) -> None:
    logits = make_logits((4, 10))
    with pytest.raises(Exception) as stock:
        F.cross_entropy(logits, torch.arange(4), reduction=reduction)
    with pytest.raises(stock.type):
        fastopt.cross_entropy(logits, torch.arange(4), reduction=reduction)


# -- linear_cross_entropy ---------------------------------------------------------------------------


def _linear_call(
    rows: int, features: int, classes: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    call = make_call((rows, features, classes), dtype)
    return {name: v.requires_grad_(name in PARAMETERS) for name, v in call.items()}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(4, 8, 10), (1024, 8, 100), (64, 8, 32000)], ids=dtype_name)
def test_small_heads_are_a_linear_layer_and_our_loss(
    shape: tuple[int, int, int], reduction: str
) -> None:
    call = _linear_call(*shape)
    logits = F.linear(call["input"], call["linear_weight"], call["linear_bias"])
    expected = fastopt.cross_entropy(logits, call["target"], reduction=reduction)
    assert_same_bits(fastopt.linear_cross_entropy(**call, reduction=reduction), expected)
    reached = ops_reached(lambda: fastopt.linear_cross_entropy(**call, reduction=reduction))
    assert "linear_cross_entropy" not in reached


def test_large_heads_are_served_in_chunks() -> None:
    call = _linear_call(1024, 8, 8192)
    for reduction, chunks in (("mean", True), ("sum", True), ("none", False)):
        loss_of = functools.partial(fastopt.linear_cross_entropy, **call, reduction=reduction)
        assert ("linear_cross_entropy" in ops_reached(loss_of)) is chunks
        with torch.no_grad():
            assert "linear_cross_entropy" in ops_reached(loss_of)


@pytest.mark.slow
def test_the_same_crossover_in_compiled_graphs() -> None:
    for shape, dtype, chunks in (
        ((1024, 8, 8192), torch.float32, True),
        ((256, 8, 8192), torch.float32, False),
        ((128, 64, 200), torch.bfloat16, not linear_loss.kernel.multiplies(torch.bfloat16)),
    ):
        torch._dynamo.reset()
        call = _linear_call(*shape, dtype)
        compiled = torch.compile(
            lambda call: fastopt.linear_cross_entropy(**call), fullgraph=True, backend="aot_eager"
        )
        reached = ops_reached(lambda call=call, compiled=compiled: compiled(call))
        assert ("linear_cross_entropy" in reached) is (chunks and _COMPILES_GRADIENTS)


def test_rows_are_recomputed_where_memory_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "_MIN_LOGITS_TO_RECOMPUTE", 1 << 23)
    call = _linear_call(1024, 8, 8192)
    loss_of = functools.partial(fastopt.linear_cross_entropy, **call, reduction="none")
    assert "linear_cross_entropy" in ops_reached(loss_of)


@pytest.mark.parametrize("has", [True, False], ids=["instructions", "none"])
def test_half_precision_without_instructions_is_served_early(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_loss.kernel, "multiplies", lambda dtype: has)
    half = _linear_call(128, 64, 200, torch.bfloat16)
    single = _linear_call(128, 64, 200)
    del single["linear_bias"]
    for reduction in REDUCTIONS:
        call = functools.partial(fastopt.linear_cross_entropy, **half, reduction=reduction)
        assert ("linear_cross_entropy" in ops_reached(call)) is not has
        call = functools.partial(fastopt.linear_cross_entropy, **single, reduction=reduction)
        assert "linear_cross_entropy" not in ops_reached(call)
        with torch.autocast("cpu", torch.bfloat16):
            assert ("linear_cross_entropy" in ops_reached(call)) is not has


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="options came with torch 2.13"
)
def test_options_ask_for_chunks_at_any_size() -> None:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    call = functools.partial(
        fastopt.linear_cross_entropy, **_linear_call(4, 8, 10), options=options
    )
    assert "linear_cross_entropy" in ops_reached(call)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch's came with 2.13")
def test_small_heads_have_torchs_errors_too() -> None:
    call = make_call((4, 8, 10))
    for different in (
        {"linear_bias": torch.ones(11)},
        {"target": torch.full((4,), 10)},
        {"target": torch.zeros(3, dtype=torch.int64)},
        {"target": torch.full((4, 10), 0.1), "ignore_index": 1},
        {"input": torch.ones(4, 9)},
        {"reduction": "avg"},
    ):
        with pytest.raises(Exception) as stock:
            F.linear_cross_entropy(**{**call, **different})
        with pytest.raises(stock.type, match=re.escape(str(stock.value).splitlines()[0])):
            fastopt.linear_cross_entropy(**{**call, **different})
