"""Settings of the whole suite: what it sets by itself, markers, seeds, and who has to answer.

FASTOPT_TEST_DEVICE=cuda makes a GPU torch's default device, so that the tests of values (`make
gpu-test` names them) check the kernels there.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# Read when torch loads its thread pool. Idle threads that spin instead of sleeping make thousands
# of tiny calls several times slower wherever other programs want the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Read when fastopt is imported: most inputs here are too small to be worth our kernels.
# (test_modes.py runs the tests of that crossover without it.)
os.environ.setdefault("FASTOPT_ALWAYS", "1")
# As well: kernels on trial answer themselves, and not torch where they are wrong.
os.environ.setdefault("FASTOPT_CHECK", "0")

import hypothesis
import pytest
import torch

import cross_entropy_kernels
import fastopt.backends
import served
from cuda_errors import pytest_runtest_makereport  # noqa: F401

# Bounded and repeatable: the same examples in every run, and no limit on the time of one, because
# the first call of a kernel may wait for torch's thread pool to start.
hypothesis.settings.register_profile(
    "fastopt",
    deadline=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("fastopt")

DEVICE = os.environ.get("FASTOPT_TEST_DEVICE", "cpu")
OF_KERNELS = (
    *("test_cross_entropy", "test_linear_cross_entropy", "test_logprobs", "test_sgd"),
    "test_crossover",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under FASTOPT_ALWAYS=1 there is no crossover, so its tests belong to the other run; tests of
    a GPU to `make gpu-test`; others to other kernels of cross-entropy. Long tests come first: no
    worker of pytest-xdist is left with one.
    """
    out = [
        item
        for item in items
        if (fastopt.backends.ALWAYS and item.get_closest_marker("crossover"))
        or (item.get_closest_marker("gpu") and not torch.cuda.is_available())
        or any(map(item.get_closest_marker, cross_entropy_kernels.LEFT_OUT))
    ]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What torch and the collected tests hold stays: a collection of garbage looks at what a test
    made, and takes no second."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without kernels torch, or the reference, would be compared with itself."""
    if item.path.name.startswith(OF_KERNELS) and (reason := served.why_not(DEVICE)):
        pytest.fail(reason, pytrace=False)
    if item.path.name.startswith("test_sgd") and fastopt.backends.BACKEND == "reference":
        pytest.skip("FASTOPT_BACKEND=reference has no SGD: torch's own serves")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that uses a face fails if torch alone answered, unless it is marked `stock`."""
    faces = (served.cross_entropy, served.linear_cross_entropy, served.sgd)
    before = [face.counts() for face in faces]
    yield
    if item.get_closest_marker("stock") or not fastopt.backends.ALWAYS:
        return
    for face, (ours, torchs) in zip(faces, before, strict=True):
        if face.torchs > torchs and face.ours == ours:
            pytest.fail(served.why_not(DEVICE) or "torch alone answered", pytrace=False)


@pytest.fixture
def filled_empties() -> Iterator[None]:
    """Make torch fill fresh memory with NaN, so that reading it before writing cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves torch's settings as they were."""
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
