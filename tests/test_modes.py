"""The suite's other modes, each in a process of its own; and that its tests of values fail where
our kernels do not answer, whatever torch would say.
"""

from __future__ import annotations

import re
import sys

from child import HERE, run, run_pytest
from fastopt.loss import _COMPILES_GRADIENTS

# Values of every kind: of rows and images, gradients, transforms of torch, SGD, its GPU step.
VALUES = [
    "test_cross_entropy.py::test_named_shapes[three-classes-float32]",
    "test_cross_entropy.py::test_one_hot_probabilities_are_class_indices",
    "test_cross_entropy_autograd.py::test_several_backwards_of_one_graph[mean-float32]",
    *["test_cross_entropy_autograd.py::test_compile_aot_eager[mean-float32]"] * _COMPILES_GRADIENTS,
    "test_linear_cross_entropy.py::test_values[29x8x7-mean-float32]",
    "test_linear_cross_entropy.py::test_values[29x33x1000-none-bfloat16]",
    "test_cross_entropy_autograd.py::test_a_second_backward_without_retain_graph_raises[mean]",
    "test_cross_entropy_threads.py::test_threads_may_share_the_logits",
    "test_sgd.py::test_all_sizes_in_one_step_equal_the_for_loop_bitwise[torch.float32-plain]",
    "test_sgd.py::test_misaligned_operands_equal_the_for_loop_bitwise[torch.float32]",
    "test_sgd_state.py::test_state_dict_has_stocks_format[default]",
    "test_sgd_threads.py::test_the_same_bits_from_run_to_run",
]
# Runs the tests that it is given with kernels that never serve.
UNSERVED = """
import sys
import pytest

class Plugin:
    def pytest_configure(self):
        import served
        from fastopt.sgd import step
        served._serves = served._serves_linear = lambda *call: False
        step.is_plain_call = lambda: False

sys.exit(pytest.main(sys.argv[1:], plugins=[Plugin()]))
"""


def counts(output: str) -> dict[str, int]:
    """The numbers in pytest's last line."""
    last = output.strip().splitlines()[-1]
    return {what: int(number) for number, what in re.findall(r"(\d+) (\w+)", last)}


def test_the_crossover() -> None:
    """The tests of what goes to torch because it is small; in every other run nothing does."""
    done = run_pytest(HERE / "test_crossover.py", FASTOPT_ALWAYS="0")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert counts(done.stdout)["passed"] >= 20 and "skipped" not in counts(done.stdout)


def test_the_matrix_as_users_run_it() -> None:
    """Calls of every kind, most of them large enough for our kernels and some not."""
    done = run_pytest(
        HERE / "test_cross_entropy_modes.py", "-k", "crossed_with_ways", FASTOPT_ALWAYS="0"
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert counts(done.stdout)["passed"] >= 40 and "skipped" not in counts(done.stdout)


def test_the_values_pass_with_the_reference() -> None:
    done = run_pytest(*(HERE / test for test in VALUES), FASTOPT_BACKEND="reference")
    of_sgd = sum(test.startswith("test_sgd") for test in VALUES)
    found = counts(done.stdout)
    assert (found["passed"], found["skipped"]) == (len(VALUES) - of_sgd, of_sgd), done.stdout


def test_no_values_pass_without_the_library() -> None:
    done = run_pytest(*(HERE / test for test in VALUES), FASTOPT_LIBRARY="/missing/_C.so")
    assert counts(done.stdout)["errors"] == len(VALUES), done.stdout[-8000:]
    assert "passed" not in counts(done.stdout)
    assert "FASTOPT_LIBRARY=/missing/_C.so does not exist" in done.stdout
    assert "`make build` builds them" in done.stdout


def test_no_values_pass_when_torch_answers() -> None:
    tests = [str(HERE / test) for test in VALUES]
    done = run(sys.executable, "-c", UNSERVED, "-q", "-p", "no:cacheprovider", *tests)
    assert counts(done.stdout)["failed"] == len(VALUES), done.stdout[-8000:]
    assert "passed" not in counts(done.stdout)
