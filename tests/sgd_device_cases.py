"""What a GPU step has to get right: functions of a Device, for every family of kernels. They hold them
against torch's for-loop, bit by bit where the kernels promise it, and against fastopt's CPU kernel in
half precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fastopt
from accuracy import assert_as_accurate
from fastopt.sgd import devices
from fastopt.sgd.table import NAMES
from sgd_device import Device, Subclass
from sgd_oracle import (
    DAMPED,
    DTYPES,
    EXACT_DTYPES,
    FULL,
    OPTIONS,
    Meddling,
    Snapshot,
    all_params,
    assert_same_bits,
    assert_same_history,
    assert_same_state,
    for_loop,
    leaf,
    outcome,
    set_grads,
    snapshot,
    train,
    train_distributed,
    train_on_some,
    values,
)

# Empty, below and around vectors of 2, 4 and 8 elements, several chunks (4096 float32, 8192 half).
SIZES = (0, 1, 3, 7, 8, 9, 17, 33, 1000, 9001)


def check_options(device: Device, dtype: torch.dtype, option: str) -> None:
    def run(make: Any) -> list[Snapshot]:
        return train(make([leaf(values(n, dtype, seed=n)) for n in SIZES], **OPTIONS[option]))

    if dtype in EXACT_DTYPES:
        device.check(run)
        return
    ours = device.history(run)
    if device.rounds_bfloat16:
        assert_same_history(ours, run(fastopt.SGD), "the CPU's kernel")
    # Every step by itself, from the state before it: what an earlier step rounded is not its error.
    for step in range(1, len(ours)):
        for i, size in enumerate(SIZES[1:], start=1):
            before, after = (
                {"param": ours[k].params[i], "momentum_buffer": ours[k].buffers[i]}
                for k in (step - 1, step)
            )
            stock, exact = {}, {}
            for kind, result in ((dtype, stock), (torch.float64, exact)):
                p = leaf(before["param"].to(kind))
                p.grad = values(size, dtype, seed=1000 * (step + 1) + i + 1).to(kind)
                optimizer = for_loop([p], **OPTIONS[option])
                if before["momentum_buffer"] is not None:
                    optimizer.state[p]["momentum_buffer"] = before["momentum_buffer"].to(
                        kind, copy=True
                    )
                optimizer.step()
                result.update(optimizer.state[p], param=p)
            assert {"param", *stock} == {name for name, t in after.items() if t is not None}
            for name, theirs in stock.items():
                if dtype is torch.bfloat16 and not device.rounds_bfloat16:
                    device.assert_same(after[name], exact[name].to(dtype), name)
                else:
                    assert_as_accurate(after[name], theirs, exact[name], name)


def check_alignment(device: Device, dtype: torch.dtype) -> None:
    """Parameter, gradient and buffer at every distance from a 16-byte boundary, the same or not,
    between guards that nobody may touch."""
    cuts = [(p, g, b, n) for p in range(9) for g, b in ((p, p), (p, 0), (0, p)) for n in (5, 41)]
    guard = 7.5

    def place(offset: int, content: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.full((content.numel() + 32,), guard, dtype=dtype)
        assert whole.data_ptr() % 16 == 0
        inside = whole[offset : offset + content.numel()]
        inside.copy_(content)
        return whole, inside

    wholes: list[tuple[Tensor, Tensor]] = []

    def make_all(make: Any) -> Any:
        params, buffers = [], []
        for seed, (p, g, b, n) in enumerate(cuts):
            placed = [place(at, values(n, dtype, seed=seed + k)) for k, at in enumerate((p, g, b))]
            wholes.extend(placed)
            param = placed[0][1].requires_grad_()
            param.grad = placed[1][1]
            params.append(param)
            buffers.append(placed[2][1])
        optimizer = make(params, **DAMPED)
        for param, buffer in zip(params, buffers, strict=True):
            optimizer.state[param]["momentum_buffer"] = buffer
        optimizer.step()
        for param, buffer in zip(params, buffers, strict=True):
            assert optimizer.state[param]["momentum_buffer"] is buffer
        return [snapshot(optimizer)]

    ours = device.history(make_all)
    for whole, inside in wholes:
        outside = torch.ones(len(whole), dtype=torch.bool)
        at = inside.storage_offset()
        outside[at : at + len(inside)] = False
        assert (whole[outside] == guard).all()
    theirs = make_all(fastopt.SGD)
    for mine, stock in zip(
        ours[0].params + ours[0].buffers, theirs[0].params + theirs[0].buffers, strict=True
    ):
        device.assert_same(mine, stock, str(dtype))


def check_many_rows_and_groups(device: Device) -> None:
    """More parameters and more groups than one launch takes, of all dtypes mixed."""

    def run(make: Any) -> list[Snapshot]:
        groups = [
            {
                "params": [
                    leaf(values(i % 6, EXACT_DTYPES[i % 2], seed=i))
                    for i in range(k, device.rows, 70)
                ],
                "lr": 0.01 * (k + 1),
                "momentum": 0.9 * (k % 3 > 0),
                "weight_decay": 0.01 * (k % 2),
                "maximize": k % 5 == 0,
                "nesterov": k % 3 == 1,
            }
            for k in range(70)
        ]
        return train(make(groups, lr=0.1))

    device.check(run)


def check_several_gpus(device: Device) -> None:
    """As many parameters on each, or not; the CPU under two names stands for both."""
    cpu = torch.device("cpu")
    own_step = devices.Devices.step
    for first, second in [([0, 2], [1, 3]), ([1], [0, 2, 3])]:
        of_each: dict[Any, devices.Devices] = {}

        def of_name(
            self: Any, optimizer: Any, name: Any, *others: Any, of_each: Any = of_each
        ) -> Any:
            of_one = of_each.setdefault(name, devices.Devices())
            return own_step(of_one, optimizer, cpu, *others)

        def run(make: Any) -> list[Snapshot]:
            return train(make([leaf(values(9 + n, seed=n)) for n in range(4)], **DAMPED))

        found = {cpu: first, torch.device("cpu", 0): second}
        before = len(device.launched)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(devices.Devices, "step", of_name)
            patch.setattr("fastopt.sgd.step.places", lambda params, found=found: found)
            ours = device.history(run)
        assert len(device.launched) - before == 2 * len(ours), "one for each GPU in every step"
        assert_same_history(ours, run(for_loop))


def check_mixed_dtypes(device: Device) -> None:
    dtypes = [d for d in DTYPES if d is not torch.bfloat16 or device.rounds_bfloat16]

    def run(make: Any) -> list[Snapshot]:
        params = [leaf(values(100 + i, dtypes[i % len(dtypes)], seed=i)) for i in range(16)]
        return train(make(params, **FULL))

    assert_same_history(device.history(run), run(fastopt.SGD))


def check_late_gradients(device: Device) -> None:
    """Parameters whose first gradient comes later than others', and gradients that pause (B3)."""
    device.check(lambda make: train_on_some(make, **DAMPED))


def check_options_on_the_device(device: Device) -> None:
    """Tensors are read by the kernels, in every dtype, as they are when the kernels run."""
    for dtype in DTYPES:
        tensors = {
            name: torch.tensor(value, dtype=dtype)
            for name, value in {
                "lr": 0.125, "momentum": 0.75, "dampening": 0.25, "weight_decay": 0.0625
            }.items()
        }  # fmt: skip
        params = [leaf(values(n, seed=n)) for n in (5, 70)]
        reference = for_loop(
            [leaf(p) for p in params], **{k: 1.0 * v.item() for k, v in tensors.items()}
        )
        with device.in_place():
            optimizer = fastopt.SGD(params, **tensors)
            for step in range(4):
                for name, tensor in tensors.items():
                    tensor.mul_(0.5 if step else 1.0)
                    reference.param_groups[0][name] = tensor.item()
                set_grads(params, seed=step)
                set_grads(all_params(reference), seed=step)
                optimizer.step()
                reference.step()
                assert_same_state(optimizer, reference, f"{dtype} step {step}")
        assert optimizer.param_groups[0]["lr"] is tensors["lr"]


def check_first_step_beside_a_subclass(device: Device) -> None:
    """A parameter that is torch's does not cost the others their room on the device."""
    frozen = values(5).as_subclass(Subclass).requires_grad_()
    param = leaf(values(40))
    param.grad = values(40, seed=1)
    with device.in_place():
        optimizer = fastopt.SGD([param, frozen], **DAMPED)
        (room,) = optimizer._fastopt_devices.steps.values()
        optimizer.step()
        assert list(optimizer._fastopt_devices.steps.values()) == [room]


def check_parameters_that_move(device: Device) -> None:
    """The kernels get no address of another device."""
    param = leaf(values(40))
    param.grad = values(40, seed=1)
    with device.in_place():
        optimizer = fastopt.SGD([param], **DAMPED)
        optimizer.step()
        elsewhere = devices.DeviceStep(torch.device("meta"), (0,))
        options = tuple(optimizer.param_groups[0][name] for name in NAMES)
        found = elsewhere.gather(options, ((param,), (param.grad,), (None,)), None, None)
        assert found.left == [0]


def check_empty_parameters(device: Device) -> None:
    """As uneven shards leave them: their buffers are in checkpoints from the first step on."""

    def run(make: Any) -> list[Snapshot]:
        lr = torch.tensor(0.1) if make is fastopt.SGD else torch.tensor(0.1).item()
        optimizer = make([leaf(values(0)), leaf(values(3))], lr=lr, momentum=0.9)
        history = train(optimizer, steps=2)
        assert list(optimizer.state_dict()["state"]) == [0, 1]
        return history

    device.check(run)


def check_unusual_options(device: Device) -> None:
    def run(make: Any) -> list[Snapshot]:
        history = []
        for flags in ({"maximize": None}, {"nesterov": None}, {"maximize": 1}):
            history += train(make([leaf(values(9))], lr=0.1, momentum=0.9, **flags))
        param = leaf(values(9))
        with torch.inference_mode():  # which no step is in
            optimizer = make([param], **DAMPED)
        history += train(optimizer, steps=1)
        optimizer.state[all_params(optimizer)[0]]["momentum_buffer"] = values(9, seed=5)
        return history + train(optimizer, steps=2)

    device.check(run)


def check_edits(device: Device) -> None:
    """Options, state and memory that change between steps: nothing stale is used."""

    def run(make: Any) -> list[Snapshot]:
        params = [leaf(values(n, seed=n)) for n in (4, 50, 7)]
        optimizer = make(params, lr=0.1, dampening=0.5)

        def edit(step: int) -> None:
            group = optimizer.param_groups[0]
            if step == 1:
                group["momentum"] = 0.9
            if step == 3:
                del optimizer.state[params[0]]["momentum_buffer"]
                params[1].data = params[1].data.clone()
            if step == 4:
                optimizer.state[params[2]]["momentum_buffer"] = values(7, seed=70)
            if step == 5:
                group["momentum"], group["lr"] = 0.0, torch.tensor(0.25)
            if step == 6:
                group.update(momentum=0.5, dampening=0, nesterov=True, maximize=True)
                optimizer.state.pop(params[1])

        return train(optimizer, steps=8, before_step=edit)

    device.check(run)


def check_versions(device: Device) -> None:
    param = leaf(values(40))
    with device.in_place():
        optimizer = fastopt.SGD([param], lr=0.1, momentum=0.9)
        for step in range(2):
            loss = (param * param).sum()
            param.grad = torch.ones(40)
            if step:
                version = optimizer.state[param]["momentum_buffer"]._version
            optimizer.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        assert optimizer.state[param]["momentum_buffer"]._version == version + 1
        assert param.grad._version == 0


def check_torchs_path(device: Device) -> None:
    """What the kernels do not serve is updated by torch, beside the others: other memory orders,
    gaps, sparse and complex tensors, shared memory. Gradients stay as they are (B7)."""

    def run(make: Any) -> list[Snapshot]:
        storage = values(60, seed=3)
        params = [
            leaf(values((2, 3, 4, 5)).to(memory_format=torch.channels_last)),
            values((6, 10))[:, ::2].requires_grad_(),
            leaf(values(12)),
            leaf(torch.complex(values(4), values(4, seed=1))),
            leaf(values((6, 5))),
            leaf(values((4, 4)).t()),
            leaf(values(5).as_subclass(Subclass)),
        ]
        optimizer = make(params, lr=0.1, momentum=0.9, nesterov=True)
        history = []
        for step in range(3):
            params[0].grad = values((2, 3, 4, 5), seed=step)
            params[1].grad = values((6, 5), seed=step)
            params[2].grad = values(12, seed=step).to_sparse()
            params[3].grad = torch.complex(values(4, seed=step), values(4, seed=step + 1))
            params[4].grad = values((1, 5), seed=step).expand(6, 5)
            params[5].grad = values((4, 4), seed=step).t()
            params[6].grad = values(5, seed=step).as_subclass(Subclass)
            kept = [p.grad.clone() for p in params]
            optimizer.step()
            for p, grad in zip(params, kept, strict=True):
                assert torch.equal(p.grad.to_dense(), grad.to_dense())
            state = snapshot(optimizer)
            state.buffers[2] = state.buffers[2].to_dense()
            history.append(state)
        shared = [storage[:40].requires_grad_(), storage[20:].requires_grad_(), leaf(values(8))]
        return history + train(make(shared, **DAMPED), by_torch=None)

    device.check(run)


def check_shared_memory_in_torchs_order(device: Device) -> None:
    """Parameters that share memory, one of them the kernels', others torch's, in any order."""

    def run(make: Any) -> list[Snapshot]:
        history = []
        for order in ((0, 1, 2, 3), (1, 0, 3, 2), (3, 2, 1, 0)):
            base = values((8, 8), seed=7)
            parts = [base[:4], base[:, ::2], leaf(values(9)), base[2:6, 1:5]]
            params = [parts[i].detach().requires_grad_() for i in order]
            optimizer = make(params, **DAMPED)
            for step in range(3):
                for i, p in zip(order, params, strict=True):
                    p.grad = values(p.shape, seed=10 * step + i)
                optimizer.step()
                history.append(snapshot(optimizer))
        return history

    device.check(run)


def check_python_inside_a_step(device: Device) -> None:
    """Addresses are read when torch's path, which may run anything, is over."""

    def run(make: Any) -> list[Snapshot]:
        params = [
            leaf(values(9)),
            values(5).as_subclass(Meddling).requires_grad_(),
            leaf(values(40)),
        ]
        optimizer = make(params, **DAMPED)
        history = []
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = values(p.shape, seed=10 * step + i)
            Meddling.act = lambda: setattr(params[2], "data", torch.full_like(params[2], 7.0))
            optimizer.step()
            assert Meddling.act is None, "it ran"
            history.append(snapshot(optimizer))
        return history

    device.check(run)


def check_gradient_is_its_parameter(device: Device) -> None:
    def run(make: Any) -> list[Snapshot]:
        param = leaf(values(5000))
        optimizer = make([param], **FULL)
        history = []
        for _ in range(2):
            param.grad = param.data
            optimizer.step()
            history.append(snapshot(optimizer))
        return history

    assert_same_history(device.history(run), run(fastopt.SGD))


def check_refusals(device: Device) -> None:
    """torch's errors are torch's, and nothing is updated before them."""

    def attempt(make: Any, change: Callable[[Any], None]) -> Any:
        params = [leaf(values(30)), leaf(values(4))]
        optimizer = make(params, **DAMPED)
        set_grads(params, seed=1)
        change(optimizer)
        result = outcome(optimizer.step)
        assert_same_bits(params[1], leaf(values(4)))
        return result

    def wrong_momentum(optimizer: Any) -> None:
        param = all_params(optimizer)[1]
        optimizer.state[param]["momentum_buffer"] = torch.ones(3)

    def huge_lr(optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = 1e39

    def no_lr(optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = "0.1"

    for change in (wrong_momentum, huge_lr, no_lr):
        theirs = attempt(for_loop, change)
        with device.in_place():
            ours = attempt(fastopt.SGD, change)
        assert isinstance(theirs, tuple) and ours == theirs, change.__name__


def check_distributed_tensors(device: Device) -> None:
    """DTensors are updated shard by shard, beside plain tensors; buffers are DTensors (B10)."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    before = len(device.launched)
    try:
        with device.in_place():
            ours = train_distributed(fastopt.SGD, mesh, **DAMPED)
        theirs = train_distributed(for_loop, mesh, **DAMPED)
    finally:
        dist.destroy_process_group()
    sizes = [[row.numel for row in launch.rows] for launch in device.launched[before:]]
    assert sizes == [[21, 24, 24, 24]] * 3, "the kernels took all"
    for mine, stock in zip(ours, theirs, strict=True):
        assert_same_bits(mine, stock)


CASES: list[Callable[[Device], None]] = [
    check_many_rows_and_groups,
    check_several_gpus,
    check_mixed_dtypes,
    check_late_gradients,
    check_options_on_the_device,
    check_first_step_beside_a_subclass,
    check_parameters_that_move,
    check_empty_parameters,
    check_unusual_options,
    check_edits,
    check_versions,
    check_torchs_path,
    check_shared_memory_in_torchs_order,
    check_python_inside_a_step,
    check_gradient_is_its_parameter,
    check_refusals,
    check_distributed_tensors,
]
