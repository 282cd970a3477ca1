"""linear_cross_entropy: what it holds beside inputs and results, and where it writes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import fastopt
from accuracy import assert_same_bits
from child import run_python
from cross_entropy_cases import REDUCTIONS
from linear_cross_entropy_cases import (
    SHAPES,
    check,
    leaves_of,
    make_call,
    small_chunks,  # noqa: F401
)
from peak import PEAK_ENVIRONMENT

PEAK = """
import json
import sys
import torch
import fastopt
import fastopt.kernels.linear_cross_entropy as loop
import fastopt.statistics
from peak import peak_beyond_inputs

def logprobs(**call):
    found = fastopt.linear_logprobs(**call, entropy=True, softcap=30.0, temperature=0.5)
    return found.logprobs + found.entropy

def with_stats(**call):
    return fastopt.linear_cross_entropy(**call, return_stats=True)[0]

functions = {"linear_logprobs": logprobs, "return_stats": with_stats}

def measure(shape, dtype="float32", ignored=0.0, frozen=(), factor=1.0, function=None, **options):
    compute = functions.get(function, fastopt.linear_cross_entropy)
    rows, features, classes = shape
    dtype = getattr(torch, dtype)
    call = {
        "input": torch.randn(rows, features).to(dtype),
        "linear_weight": torch.randn(classes, features).to(dtype),
        "linear_bias": torch.randn(classes).to(dtype),
        "target": torch.randint(classes, (rows,)),
    }
    call["target"][: int(ignored * rows)] = -100
    leaves = [call[name].requires_grad_() for name in list(call)[:3] if name not in frozen]

    def train():
        loss = compute(**call, **options)
        loss.backward(torch.full_like(loss, factor))

    def evaluate():
        with torch.no_grad():
            return compute(**call, **options)

    results = sum(leaf.nbytes for leaf in leaves)
    return [peak_beyond_inputs(evaluate), peak_beyond_inputs(train), results]

torch.set_num_threads(2)
loop.ROWS = 128
fastopt.statistics.PIECE = 1 << 16
calls = json.loads(sys.argv[1])
# Threads, autograd, code pages and what BLAS keeps for products of this size come before.
warm = [{}, {"reduction": "none"}, {"dtype": "bfloat16"}, {"ignored": 0.5}]
warm += [{"function": "return_stats", "softcap": 9.0}, {"function": "linear_logprobs"}]
for options in warm:
    measure(calls["mean"]["shape"], **options)
print(json.dumps({name: measure(**call) for name, call in calls.items()}))
"""

ROWS, FEATURES, CLASSES = SHAPE = (
    1024,
    32,
    16384,
)  # logits of 64 MB, of 8 MB in a chunk of 128 rows
CHUNK = 128 * CLASSES * 4
MEGABYTE = 2**20
# name: (the call, what is held beside chunks and results).
PEAK_CALLS: dict[str, tuple[dict[str, object], int]] = {
    "mean": ({}, 0),
    "none": ({"reduction": "none"}, 0),
    "smoothing": ({"label_smoothing": 0.1}, 0),
    "ignored": ({"ignored": 0.75}, 0),
    "frozen": ({"frozen": ["linear_weight", "linear_bias"]}, 0),
    "upstream-3": ({"factor": 3.0}, 0),
    # Buffers of 256 KB.
    "extras": ({"softcap": 30.0, "logit_scale": 2.0, "denominator": 7, "lse_square_scale": 0.1}, 0),
    "extras-none": ({"softcap": 30.0, "reduction": "none"}, 0),
    "return_stats": ({"function": "return_stats"}, 0),
    "linear_logprobs": ({"function": "linear_logprobs"}, 0),
    # The gradients' sums in float32, and a slice of the weight in float32 with its half twin.
    "bfloat16": ({"dtype": "bfloat16"}, (ROWS + CLASSES) * FEATURES * 4 + 4096 * FEATURES * 8),
}


@pytest.fixture(scope="module")
def peaks() -> dict[str, tuple[int, int, int]]:
    """Bytes held beyond the inputs by evaluation and by training; bytes of the gradients."""
    calls = {name: {"shape": SHAPE, **call} for name, (call, _) in PEAK_CALLS.items()}
    return json.loads(run_python(PEAK, json.dumps(calls), FASTOPT_ALWAYS="1", **PEAK_ENVIRONMENT))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark of Linux")
@pytest.mark.parametrize("call", PEAK_CALLS)
@pytest.mark.xdist_group("linear peaks")
def test_peak_memory_is_that_of_a_chunk(call: str, peaks: dict[str, tuple[int, int, int]]) -> None:
    evaluation, training, results = peaks[call]
    beside = PEAK_CALLS[call][1] + 2 * MEGABYTE
    assert evaluation <= CHUNK + beside, f"{evaluation / MEGABYTE:.2f} MB"
    beyond = training - results
    assert beyond <= CHUNK + beside, f"{beyond / MEGABYTE:.2f} MB beyond the gradients"
    assert evaluation > CHUNK / 2 and beyond > CHUNK / 2, "the chunk was not measured"


@pytest.mark.usefixtures("small_chunks", "filled_empties")
def test_every_element_of_a_result_is_written() -> None:
    """Where fresh memory holds NaN."""
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for reduction in ("mean", "none"):
                for ignored in (0.0, 0.3, 2.0):
                    check(make_call(shape, dtype, ignored=ignored, reduction=reduction))


@pytest.mark.usefixtures("small_chunks")
def test_results_share_no_memory_with_inputs_or_each_other() -> None:
    for reduction in REDUCTIONS:
        call, leaves = leaves_of(make_call(SHAPES[4], reduction=reduction))
        losses = [fastopt.linear_cross_entropy(**call) for _ in range(2)]
        grads = [torch.autograd.grad(loss.sum(), leaves) for loss in losses]
        tensors = [*leaves, call["target"], *losses, *grads[0], *grads[1]]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
        for first, second in zip(*grads, strict=True):
            assert_same_bits(first, second)
