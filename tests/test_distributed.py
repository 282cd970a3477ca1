"""Sharded classes and sharded parameters on several ranks, over gloo: ranks.py starts them, the cases
are those of distributed_*_cases.py.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch.distributed as dist

import ranks
from child import run, run_python

if not dist.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

WORLD_SIZES = (1, 2, 3)
MODULES = "distributed_sgd_cases,distributed_loss_cases"
CASES = [name for _, name in ranks.cases(MODULES)]
pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: Any) -> Any:
    """What the ranks of a world found. Each world runs once."""
    known: dict[int, list[dict[str, str]]] = {}

    def of(world_size: int) -> list[dict[str, str]]:
        if world_size not in known:
            folder = tmp_path_factory.mktemp("ranks")
            known[world_size] = ranks.run(MODULES, world_size, folder)
        return known[world_size]

    return of


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_on_every_rank(found: Any, world_size: int, case: str) -> None:
    for rank, of_rank in enumerate(found(world_size)):
        words = of_rank.get(case, of_rank.get("", "not run, as one before it failed"))
        assert not words, f"rank {rank} of {world_size}: {words}"


def test_the_example_learns_alike_on_one_process_and_on_two() -> None:
    example = str(ranks.TESTS.parent / "examples" / "train_sharded.py")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    losses = []
    for start in ((), torchrun):
        done = run(sys.executable, *start, example, "--steps", "40", **ranks.ENVIRONMENT)
        assert done.returncode == 0, done.stdout + done.stderr
        losses.append([float(x) for x in re.findall(r"loss (\S+)", done.stdout)])
    assert len(losses[0]) == 2 and losses[0][1] < losses[0][0] < 5.5  # log 256
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_import_leaves_torch_distributed_alone() -> None:
    """What torch itself imports of it, fastopt does not add to."""
    run_python(
        """
        import sys
        import torch

        before = {name for name in sys.modules if name.startswith("torch.distributed")}
        import fastopt

        after = {name for name in sys.modules if name.startswith("torch.distributed")}
        assert after == before, after - before
        """
    )
