"""Which side serves a call by its size: small ones go to torch, in its own bits.

Runs without FASTOPT_ALWAYS=1: `pytest -m crossover`.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import fastopt
import fastopt.backends
from accuracy import assert_same_bits
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
