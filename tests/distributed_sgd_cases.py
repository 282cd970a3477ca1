"""What holds for fastopt.SGD on every rank of a world of any size; ranks.py runs it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fastopt
import served
from fastopt import reasons
from sgd_oracle import OPTIONS, all_params, assert_same_bits, for_loop, values

# Not a multiple of 2 or 3 rows, and one that leaves ranks without any.
SHAPES = [(7, 6), (1, 4), (12,), (0, 3), (5, 3, 2), ()]


def mesh_of_world() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def same_on_both(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    for p, q in zip(all_params(ours), all_params(theirs), strict=True):
        b, c = (o.state[x].get("momentum_buffer") for o, x in ((ours, p), (theirs, q)))
        assert (b is None) == (c is None)
        for mine, stock in ((p, q), (b, c)):
            if stock is None:
                continue
            assert type(mine) is type(stock)
            assert mine.dtype == stock.dtype and mine.shape == stock.shape
            if isinstance(stock, DTensor):
                assert mine.placements == stock.placements
                assert mine.device_mesh == stock.device_mesh
                mine, stock = mine._local_tensor, stock._local_tensor
                assert type(mine) is type(stock)
                # Where nothing steps, strides say nothing.
                steps_of = zip(mine.shape, mine.stride(), stock.stride(), strict=True)
                assert not mine.numel() or all(size == 1 or a == b for size, a, b in steps_of)
            assert_same_bits(mine, stock)


def sharded(shape: Any, placements: list[Any], seed: int, mesh: Any = None) -> DTensor:
    return distribute_tensor(values(shape, seed=seed), mesh or mesh_of_world(), placements)


def leaves() -> list[Any]:
    """Parameters of every placement, whose gradients go with them; a plain one among them."""
    params: list[Any] = [nn.Parameter(values(9, seed=99))]
    for k, shape in enumerate(SHAPES):
        for placement in (Replicate(), *map(Shard, {0, len(shape) - 1} if shape else ())):
            params.append(nn.Parameter(sharded(shape, [placement], k)))
    return params


def set_gradients(params: list[Any], step: int) -> None:
    for k, p in enumerate(params):
        grad = values(p.shape, seed=100 * step + k)
        if isinstance(p, DTensor):
            grad = distribute_tensor(grad, p.device_mesh, p.placements)
        p.grad = grad


def steps(
    make: Callable[[], list[Any]],
    change: Callable[[list[Any], int], None] = lambda params, step: None,
    by_torch: bool | None = False,
    **options: Any,
) -> None:
    """Some steps of ours and of torch's loop, on the same parameters and gradients."""
    optimizers = []
    for optimizer_class in (fastopt.SGD, for_loop):
        params = make()
        optimizer = optimizer_class(params, **options)
        for step in range(2):
            set_gradients(params, step)
            change(params, step)
            with served.sgd.answered(by_torch if optimizer_class is fastopt.SGD else None):
                versions = [p._version for p in params]
                optimizer.step()
                moved = [p._version - v for p, v in zip(params, versions, strict=True)]
        if by_torch is False:
            assert moved == [int(p.grad is not None) for p in params]
        optimizers.append(optimizer)
    same_on_both(*optimizers)


def check_options() -> None:
    names = ["nesterov_decay_max", "damped", "plain", "momentum_decay"]
    for name in names if dist.get_world_size() == 2 else names[:1]:  # torch's side takes long
        steps(leaves, **OPTIONS[name])
    steps(leaves, lr=torch.tensor(0.1), momentum=0.9)
    for flag in ("foreach", "fused"):
        steps(leaves, lr=0.1, momentum=0.9, **{flag: True})


def check_dtensors_alone() -> None:
    """The way of a whole step, without a plain tensor."""

    def late(params: list[Any], step: int) -> None:
        if step < 1:
            params[3].grad = None

    for change in (lambda params, step: None, late):
        steps(lambda: leaves()[1:], change, lr=0.1, momentum=0.9, weight_decay=0.01)
        steps(lambda: leaves()[1:], change, lr=0.1)


def check_groups() -> None:
    """Groups with and without momentum, of DTensors and plain tensors."""

    def run(make: Any) -> Any:
        params = leaves()
        half = len(params) // 2
        groups = [{"params": params[:half], "momentum": 0.9}, {"params": params[half:]}]
        optimizer = make(groups, lr=0.1)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        return optimizer

    with served.sgd.answered():
        ours = run(fastopt.SGD)
    same_on_both(ours, run(for_loop))


def check_half() -> None:
    """In float32, rounded once: as the step of plain tensors rounds."""
    mesh = mesh_of_world()
    whole = [nn.Parameter(values(s, torch.bfloat16, seed=k)) for k, s in enumerate(SHAPES)]
    parts = [
        nn.Parameter(
            distribute_tensor(p.detach().clone(), mesh, [Shard(0) if p.dim() else Replicate()])
        )
        for p in whole
    ]
    optimizers = [fastopt.SGD(params, lr=0.1, momentum=0.9) for params in (whole, parts)]
    for step in range(3):
        for k, (p, q) in enumerate(zip(whole, parts, strict=True)):
            p.grad = values(p.shape, torch.bfloat16, seed=10 * step + k)
            q.grad = distribute_tensor(p.grad.clone(), mesh, q.placements)
        with served.sgd.answered():
            for optimizer in optimizers:
                optimizer.step()
    for p, q in zip(whole, parts, strict=True):
        assert_same_bits(p.detach(), q.full_tensor().detach())


def check_torchs_path() -> None:
    """Gradients that are not of the parameter's placements, beside some that are."""
    mesh = mesh_of_world()

    def make() -> list[Any]:
        return [nn.Parameter(sharded((6, 6), [p], k)) for k, p in enumerate((Shard(0), Shard(1)))]

    def other(params: list[Any], step: int) -> None:
        grad = values((6, 6), seed=step + 50)
        params[0].grad = distribute_tensor(grad, mesh, [Shard(1)])

    def partial(params: list[Any], step: int) -> None:
        grad = values((6, 6), seed=step + 50) / dist.get_world_size()
        params[0].grad = DTensor.from_local(grad, mesh, [Partial()])

    for change in (other, partial):
        steps(make, change, by_torch=True, lr=0.1, momentum=0.9)

    def waiting(params: list[Any], step: int) -> None:
        """A shard that has yet to arrive."""
        grad = DTensor.from_local(values((6, 6), seed=step), mesh, [Partial()])
        params[0].grad = grad.redistribute(mesh, [Shard(0)], async_op=True)

    steps(make, waiting, by_torch=None, lr=0.1, momentum=0.9)


def check_reasons() -> None:
    """The words for torch's path are there where torch's path is."""
    options = fastopt.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9).param_groups[0]
    param, other = (nn.Parameter(sharded((6, 6), [Shard(dim)], dim)) for dim in (0, 1))
    fits = param.detach() * 2

    def words(*tensors: Any) -> str:
        return reasons.of_param(options, *tensors) or ""

    assert words(param, fits, None) == words(param, fits, fits) == ""
    assert "not sharded as" in words(param, other.detach(), None)
    assert "momentum buffer is not sharded" in words(param, fits, other.detach())
    partial = DTensor.from_local(values((6, 6)), mesh_of_world(), [Partial()])
    assert "summed up" in words(param, partial, None)
    assert "not sharded as" in words(param, values((6, 6)), None)


def check_memory_that_moves() -> None:
    """The shard's memory may be swapped between steps, and nothing of a step keeps the old one."""
    gone = []

    def swap(params: list[Any], step: int) -> None:
        for p in params:
            gone.append(weakref.ref(p._local_tensor))
            p._local_tensor = p._local_tensor.clone()
        assert all(ref() is None for ref in gone)

    steps(lambda: [nn.Parameter(sharded((6, 6), [Shard(0)], 1))], swap, lr=0.1, momentum=0.9)


def check_scaler() -> None:
    def run(make: Any, **options: Any) -> Any:
        params = leaves()[1:]
        optimizer = make(params, lr=0.1, momentum=0.9, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.ones(()))
        for step in range(3):
            set_gradients(params, step)
            for p in params:
                p.grad._local_tensor.mul_(64.0)
            if step == 1:
                params[0].grad._local_tensor.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update(64.0)
        return optimizer

    same_on_both(run(fastopt.SGD), run(for_loop))
    same_on_both(run(fastopt.SGD, fused=True), run(for_loop))


# --- models --------------------------------------------------------------------------------------


class Net(nn.Module):
    """Sizes that ranks do not share evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(7, 12), nn.Linear(12, 5)
        self.norm = nn.LayerNorm(5)
        self.double()  # ranks add up in another order

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(self.up(x).relu()))


def fsdp(model: nn.Module) -> None:
    fully_shard(model.up, mesh=mesh_of_world())
    fully_shard(model, mesh=mesh_of_world())


TENSOR_PARALLEL = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def tensor_parallel(model: nn.Module) -> None:
    parallelize_module(model, mesh_of_world(), TENSOR_PARALLEL)


def two_dimensional(model: nn.Module) -> None:
    world_size = dist.get_world_size()
    data = 2 if world_size % 2 == 0 else 1
    mesh = init_device_mesh("cpu", (data, world_size // data), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], TENSOR_PARALLEL)
    fully_shard(model, mesh=mesh["dp"])


WAYS = (fsdp, tensor_parallel, two_dimensional)


def train(
    optimizer_class: Any,
    way: Any,
    count: int = 10,
    first: int = 0,
    optimizer: Any = None,
    **options: Any,
) -> tuple[nn.Module, Any]:
    model = Net()
    if way is not None:
        way(model)
    optimizer = optimizer_class(model.parameters(), **options)
    run(model, optimizer, range(first, first + count))
    return model, optimizer


def run(model: nn.Module, optimizer: Any, which: Any) -> None:
    for step in which:
        optimizer.zero_grad()
        model(values((6, 7), torch.float64, seed=step)).square().sum().backward()
        optimizer.step()


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def check_models() -> None:
    """Ten steps of FSDP2, TP and both: torch's bits on the same shards; one process's numbers."""
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    alone, _ = train(fastopt.SGD, None, **options)
    for way in WAYS:
        with served.sgd.answered():
            ours = train(fastopt.SGD, way, **options)
        theirs = train(for_loop, way, **options)
        same_on_both(ours[1], theirs[1])
        for mine, single in zip(whole(ours[0]), alone.parameters(), strict=True):
            torch.testing.assert_close(mine, single)


def check_checkpoints() -> None:
    """Distributed checkpoints go from ours to torch's and back, and between any numbers of ranks: a
    whole one is that of one process."""
    options = {"lr": 0.05, "momentum": 0.9}
    full = StateDictOptions(full_state_dict=True)
    alone, of_alone = train(torch.optim.SGD, None, count=3, **options)
    of_one = copy.deepcopy(get_optimizer_state_dict(alone, of_alone))
    run(alone, of_alone, range(3, 5))
    for way in (fsdp, two_dimensional):
        model, optimizer = train(fastopt.SGD, way, count=3, **options)
        of_ranks = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
        gathered = get_optimizer_state_dict(model, optimizer, options=full)["state"]
        if gathered:  # on rank 0 alone
            assert gathered.keys() == of_one["state"].keys()
        for name, entry in gathered.items():
            theirs = of_one["state"][name]["momentum_buffer"]
            torch.testing.assert_close(entry["momentum_buffer"], theirs)
        run(model, optimizer, range(3, 5))
        for optimizer_class in (fastopt.SGD, for_loop):
            again, of_again = train(optimizer_class, way, count=3, **options)
            for entry in of_again.state.values():
                entry["momentum_buffer"].zero_()
            set_optimizer_state_dict(again, of_again, copy.deepcopy(of_ranks))
            run(again, of_again, range(3, 5))
            same_on_both(optimizer, of_again)
        again, of_again = train(fastopt.SGD, way, count=3, **options)
        set_optimizer_state_dict(again, of_again, copy.deepcopy(of_one), options=full)
        with served.sgd.answered():
            run(again, of_again, range(3, 5))
        for mine, single in zip(whole(again), alone.parameters(), strict=True):
            torch.testing.assert_close(mine, single)
