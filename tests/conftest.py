"""Settings of the whole suite: markers, seeds, and which tests run in which mode.

FASTOPT_TEST_DEVICE=cuda makes a GPU torch's default device, so that the tests of values (`make
gpu-test` names them) check the kernels there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read when torch loads its thread pool. Idle threads that spin instead of sleeping make thousands
# of tiny calls several times slower wherever other programs want the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

import fastopt.ops

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under FASTOPT_ALWAYS=1 there is no crossover, so its tests belong to the other run; tests of
    a GPU to `make gpu-test`.
    """
    out = [
        item
        for item in items
        if (fastopt.ops.ALWAYS and item.get_closest_marker("crossover"))
        or (item.get_closest_marker("gpu") and not torch.cuda.is_available())
    ]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves torch's settings as they were."""
    if "FASTOPT_TEST_DEVICE" in os.environ:
        torch.set_default_device(os.environ["FASTOPT_TEST_DEVICE"])
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
