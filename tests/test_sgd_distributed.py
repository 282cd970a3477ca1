"""fastopt.SGD in torch.distributed's registry of optimizers."""

from typing import Any

import pytest

from child import run_python

pytestmark = pytest.mark.stock


@pytest.mark.parametrize("first", ["fastopt", "torch.distributed.optim"])
def test_it_has_a_functional_twin(first: str) -> None:
    second = {"fastopt": "torch.distributed.optim"}.get(first, "fastopt")
    run_python(
        f"""
        import sys
        import torch
        import {first}
        if {first!r} == "fastopt":
            assert not [name for name in sys.modules if name.startswith("torch.distributed.optim")]
        import {second}
        import fastopt
        from torch.distributed.optim import utils

        results = []
        for make in (fastopt.SGD, torch.optim.SGD):
            param = torch.ones(5)
            optimizer = utils.as_functional_optim(make, lr=0.5, momentum=0.5)
            for _ in range(3):
                optimizer.step_param(param, torch.full((5,), 2.0))
            results.append(param.tolist())
        assert results[0] == results[1] != [1.0] * 5, results
        assert utils.functional_optim_map[fastopt.SGD] is utils.functional_optim_map[torch.optim.SGD]
        """
    )


def test_zero_redundancy_optimizer_overlaps(tmp_path: Any) -> None:
    run_python(
        """
        import sys
        import torch
        import torch.distributed as dist
        from torch.distributed.optim import ZeroRedundancyOptimizer
        import fastopt

        dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
        net = torch.nn.Linear(4, 3)
        optimizer = ZeroRedundancyOptimizer(
            net.parameters(), fastopt.SGD, overlap_with_ddp=True, lr=0.1
        )
        assert optimizer._overlap_with_ddp
        dist.destroy_process_group()
        """,
        str(tmp_path / "rendezvous"),
    )
