"""cross_entropy: reads nothing outside its inputs, writes nothing into them, holds little memory."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator

import pytest
import torch

import fastopt
from accuracy import assert_same_bits
from child import run_python
from cross_entropy_cases import (
    DTYPES,
    EVERYTHING,
    LAYOUTS_ND,
    NAMED_SHAPES,
    OPTIONS,
    REDUCTIONS,
    check_options,
    dtype_name,
    make_logits,
    make_probabilities,
    make_target,
    random_upstream,
)
from peak import PEAK_ENVIRONMENT

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


# -- reads and writes -------------------------------------------------------------------------------

# Inputs lie on read-only pages between pages that may not be touched at all, flush with either end:
# one byte read outside or one byte written anywhere ends the process.
GUARDED = """
import ctypes, mmap, sys
import torch
import cross_entropy_cases as cases

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
page = mmap.PAGESIZE

def guarded(tensor, at_end):
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // page) * page
    base = libc.mmap(None, pages + 2 * page, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert base not in (None, 2**64 - 1)
    assert libc.mprotect(base + page, pages, mmap.PROT_READ | mmap.PROT_WRITE) == 0
    start = base + page + (pages - size if at_end else 0)
    memory = (ctypes.c_char * size).from_address(start)
    copy = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    assert libc.mprotect(base + page, pages, mmap.PROT_READ) == 0
    return copy

for at_end in (True, False):
    for shape in cases.NAMED_SHAPES.values():
        for dtype in cases.DTYPES:
            plain = cases.make_logits(shape, dtype)
            logits = guarded(plain, at_end)
            target, options = cases.EVERYTHING.apply(plain, cases.make_target(plain))
            target = guarded(target, at_end)
            options["weight"] = guarded(options["weight"], at_end)
            probabilities = guarded(cases.make_probabilities(plain), at_end)
            loss_function = cases.fastopt.cross_entropy
            for reduction in ("mean", "none"):
                options["reduction"] = reduction
                loss_function(logits, target, **options)
                cases.differentiate(loss_function, logits, target, **options)
                del options["reduction"]
                cases.differentiate(
                    loss_function, logits, probabilities, reduction=reduction,
                    weight=options["weight"],
                )
            bad = target.clone()
            bad.view(-1)[-1] = 2**40
            bad = guarded(bad, at_end)
            for reduction in ("mean", "none"):
                for wants_gradient in (False, True):
                    try:
                        leaf = logits.detach().requires_grad_(wants_gradient)
                        loss_function(leaf, bad, reduction=reduction)
                    except IndexError:
                        continue
                    raise AssertionError("a label of 2**40 was accepted")
print("done")
"""


@pytest.mark.slow
def test_nothing_outside_the_inputs_is_read_and_nothing_in_them_written() -> None:
    assert run_python(GUARDED).strip() == "done"


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS_ND, ids=lambda layout: layout.__name__)
def test_the_memory_around_a_view_stays_as_it_is(layout, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    for shape in [(5, 21, 9), (2, 5, 7, 11)]:
        logits = layout(make_logits(shape, dtype))
        storage = torch.empty(0, dtype=torch.uint8).set_(logits.untyped_storage())
        before = storage.clone()
        for reduction in REDUCTIONS:
            leaf = logits.detach().requires_grad_()
            fastopt.cross_entropy(leaf, make_target(logits), reduction=reduction).sum().backward()
            probabilities = make_probabilities(logits)
            fastopt.cross_entropy(leaf, probabilities, reduction=reduction).sum().backward()
        assert torch.equal(storage, before)


@pytest.fixture
def _poisoned_allocator() -> Iterator[None]:
    """Fresh tensors hold NaN (integers: the largest value) instead of what happened to lie there."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned_allocator")
@each_dtype
@pytest.mark.parametrize("shape", NAMED_SHAPES.values(), ids=NAMED_SHAPES)
def test_every_element_of_a_result_is_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = make_logits(shape, dtype)
    for options in (EVERYTHING, OPTIONS["all-ignored"]):
        for reduction in ("mean", "none"):
            check_options(logits, options, reduction=reduction, upstream=random_upstream)


def test_results_share_no_memory_with_inputs_or_each_other() -> None:
    logits = make_logits((33, 10)).requires_grad_()
    target = make_target(logits)
    for reduction in REDUCTIONS:
        losses = [fastopt.cross_entropy(logits, target, reduction=reduction) for _ in range(2)]
        grads = [torch.autograd.grad(loss.sum(), logits)[0] for loss in losses]
        pointers = {t.untyped_storage().data_ptr() for t in [logits, target, *losses, *grads]}
        assert len(pointers) == 6
        assert_same_bits(*grads)


# -- memory held ------------------------------------------------------------------------------------

PEAK = """
import json
import sys
import torch
import fastopt
import cross_entropy_cases as cases
from peak import peak_beyond_inputs

def measure(shape, dtype="float32", reduction="mean", factor=1.0, smoothing=0.0, weight=False,
            probabilities=False, layout="contiguous"):
    dtype = getattr(torch, dtype)
    logits = torch.empty(shape, dtype=dtype).normal_()
    logits = getattr(cases, layout)(logits).requires_grad_()
    if probabilities:
        target = torch.full(shape, 1 / shape[1], dtype=dtype)
    else:
        target = torch.randint(shape[1], (shape[0], *shape[2:]))
    options = {"reduction": reduction, "label_smoothing": smoothing}
    if weight:
        options["weight"] = torch.rand(shape[1], dtype=dtype)

    def train():
        loss = fastopt.cross_entropy(logits, target, **options)
        loss.backward(torch.full_like(loss, factor))

    def evaluate():
        with torch.no_grad():
            return fastopt.cross_entropy(logits, target, **options)

    gradient = logits.numel() * logits.element_size()
    rows = target.numel() // (shape[1] if probabilities else 1)
    return [peak_beyond_inputs(evaluate), peak_beyond_inputs(train), gradient, rows]

torch.set_num_threads(2)
for layout in ("contiguous", "transposed"):  # threads, autograd and code pages come before
    for options in ({}, {"probabilities": True}, {"reduction": "none"}):
        measure((64, 4096), layout=layout, **options)
        measure((2, 21, 64, 64), "bfloat16", layout=layout, **options)
print(json.dumps({name: measure(**call) for name, call in json.loads(sys.argv[1]).items()}))
"""

# Logits of 64 MB each. Few rows where something per row is kept: it counts as memory beyond.
PEAK_CALLS: dict[str, dict[str, object]] = {
    "float32": {"shape": (1024, 16384)},
    "bfloat16": {"shape": (2048, 16384), "dtype": "bfloat16"},
    "float16": {"shape": (2048, 16384), "dtype": "float16"},
    "float64": {"shape": (512, 16384), "dtype": "float64"},
    "sum": {"shape": (1024, 16384), "reduction": "sum"},
    "none": {"shape": (1024, 16384), "reduction": "none"},
    "upstream-3": {"shape": (1024, 16384), "factor": 3.0},
    "smoothing-weight": {"shape": (1024, 16384), "smoothing": 0.1, "weight": True},
    "probabilities": {"shape": (1024, 16384), "probabilities": True},
    "few-rows": {"shape": (128, 128256)},
    "few-classes": {"shape": (1677721, 10)},
    "image": {"shape": (8, 21, 320, 320)},
    "image-bfloat16": {"shape": (8, 21, 448, 448), "dtype": "bfloat16"},
    "image-many-classes": {"shape": (2, 150, 256, 224)},
    "channels-last": {"shape": (8, 21, 320, 320), "layout": "classes_last"},
    "transposed": {"shape": (1024, 16384), "layout": "transposed"},
    "row-strided": {"shape": (1024, 16384), "layout": "row_strided"},
}


@pytest.fixture(scope="module")
def peaks() -> dict[str, tuple[int, int, int, int]]:
    """Bytes held beyond the inputs by evaluation and by training; bytes of a gradient; rows."""
    return json.loads(run_python(PEAK, json.dumps(PEAK_CALLS), **PEAK_ENVIRONMENT))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark of Linux")
@pytest.mark.parametrize("call", PEAK_CALLS)
@pytest.mark.xdist_group("peaks")
def test_peak_memory_is_one_gradient(
    call: str, peaks: dict[str, tuple[int, int, int, int]]
) -> None:
    """Evaluation: no gradient, but the maximum and the sum of every row, and its loss."""
    evaluation, training, gradient, rows = peaks[call]
    megabyte = 2**20
    per_row = 3 * 8 if call == "float64" else 3 * 4
    assert evaluation <= megabyte + per_row * rows, f"{evaluation / megabyte:.2f} MB"
    beyond = training - gradient
    assert beyond <= megabyte, f"{beyond / megabyte:.2f} MB beyond one gradient"
    assert not math.isclose(training, 0, abs_tol=gradient / 2), "the gradient was not measured"
