"""cross_entropy through its face, autograd and the dispatcher down to the Triton kernels, which run
in the interpreter: as on a GPU, but for the device.
"""

from __future__ import annotations

import pytest
import torch

from child import run_python
from fastopt import backends

pytest.importorskip("triton")

# The interpreter is chosen when triton is imported, the C++ kernels when fastopt is: so in a child.
PROGRAM = """
import sys
import torch
import fastopt
from fastopt import ops

for name in ops.SCHEMAS:
    ops.register(name, "CPU", ops.triton_launcher(name))
assert "triton" not in sys.modules, "triton is imported before it is used"

from cross_entropy_cases import *

for shape in [(33, 10), (3, 1025), (2, 21, 5, 7), (13,)]:
    for dtype in (torch.float32, torch.float16):
        logits = make_logits(shape, dtype)
        for reduction in REDUCTIONS:
            check_options(logits, EVERYTHING, reduction=reduction, upstream=random_upstream)
        check_options(logits, OPTIONS["plain"])
        check(logits, make_probabilities(logits), label_smoothing=0.1)

logits = make_logits((33, 10)).requires_grad_()
target = make_target(logits)
loss = fastopt.cross_entropy(logits, target)
assert "_LossBackward" in type(loss.grad_fn).__name__
(first,) = torch.autograd.grad(loss, logits, retain_graph=True)
(second,) = torch.autograd.grad(loss, logits, torch.tensor(0.5))
assert torch.equal(second, first * 0.5)

target[3] = 10
loss = fastopt.cross_entropy(logits, target, reduction="sum")
(gradient,) = torch.autograd.grad(loss, logits)
assert loss.isnan() and gradient.isnan().any(1).tolist() == [row == 3 for row in range(33)]

scaled, labels = torch.ones(500, 10), torch.zeros(500, dtype=torch.int64)
scale = torch.ops.fastopt.cross_entropy_scale_
assert scale(scaled, torch.tensor(0.25), labels, -100, False) is None
assert scaled.eq(0.25).all()
assert "fastopt.kernels.cross_entropy.launch" in sys.modules
print("all checked")
"""


def test_a_library_serves_the_gpus_that_it_has_code_for() -> None:
    archs = [80, 90, 100]
    served = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert all(backends.has_code_for(capability, archs) for capability in served)
    assert not any(backends.has_code_for(capability, archs) for capability in [(7, 0), (7, 5)])
    assert not backends.has_code_for((9, 0), [80, 100]) and not backends.has_code_for((8, 6), [90])


def test_triton_before_3_9_needs_a_c_compiler() -> None:
    assert backends._compiles_launchers("\n__version__ = '3.6.0'\n")
    assert not backends._compiles_launchers("__version__ = '3.9.0'")
    assert not backends._compiles_launchers('__version__ = "4.0.0+rocm"')


def test_whether_a_gpu_is_served_is_a_constant_to_dynamo() -> None:
    def double_if_served(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if backends.serves_gpu(0) else x

    compiled = torch.compile(double_if_served, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), double_if_served(torch.ones(3)))


def test_the_face_reaches_the_triton_kernels() -> None:
    variables = {"TRITON_INTERPRET": "1", "FASTOPT_BACKEND": "reference", "FASTOPT_ALWAYS": "1"}
    assert run_python(PROGRAM, **variables) == "all checked\n"
