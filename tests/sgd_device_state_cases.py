"""What a GPU step has to get right where only the device knows whether a momentum buffer holds a value
yet: overflows, CUDA graphs, checkpoints between them. Functions of a Device, for every family of
kernels, against torch's for-loop."""

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

import fastopt
from fastopt.sgd import devices
from sgd_device import Device, amp_step, capture
from sgd_oracle import (
    DAMPED,
    Snapshot,
    all_params,
    assert_same_bits,
    assert_same_state,
    for_loop,
    leaf,
    set_grads,
    snapshot,
    train,
    values,
)


def check_overflow(device: Device) -> None:
    """Any found_inf but zero leaves parameters and state alone, in the first step too (B2, B9);
    gradients are unscaled on the way, never in memory."""
    for grad_scale in (None, 1024.0):
        for skipped in ([1.0, 0, 0], [2.0, 0.5, 0, math.nan, 0], [0, math.inf, 0]):
            params = [leaf(values(n, seed=n)) for n in (1, 16, 35)]
            reference = for_loop([leaf(p) for p in params], **DAMPED)
            with device.in_place():
                optimizer = fastopt.SGD(params, **DAMPED, fused=True)
                for step, found_inf in enumerate(skipped):
                    set_grads(params, seed=step + 1)
                    for p, q in zip(params, all_params(reference), strict=True):
                        q.grad = p.grad.clone()
                        p.grad.mul_(grad_scale or 1.0)
                    grads = [(p.grad, p.grad.clone(), p.grad._version) for p in params]
                    before = snapshot(optimizer)
                    amp_step(optimizer, found_inf, grad_scale)
                    for grad, copied, version in grads:
                        assert_same_bits(grad, copied)
                        assert grad._version == version
                    if found_inf == 0:
                        reference.step()
                        assert_same_state(optimizer, reference)
                    else:
                        for p, q in zip(params, before.params, strict=True):
                            assert_same_bits(p, leaf(q))
                    # What a checkpoint holds is what torch would hold.
                    ours, theirs = optimizer.state_dict(), reference.state_dict()
                    assert ours["state"].keys() == theirs["state"].keys()
                    for i, state in theirs["state"].items():
                        assert_same_bits(
                            ours["state"][i]["momentum_buffer"], state["momentum_buffer"]
                        )
                    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
                        kept = [b is not None and bool(b.any()) for b in snapshot(other).buffers]
                        assert kept == [b is not None for b in snapshot(reference).buffers]


def check_grad_scaler(device: Device) -> None:
    """torch's own GradScaler over overflows, the first step's included."""

    def run(make: Any) -> list[Snapshot]:
        flags = {"fused": True} if make is fastopt.SGD else {}
        params = [leaf(values(n, seed=n)) for n in (1, 16, 35)]
        optimizer = make(params, **{**DAMPED, **flags})
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        history = []
        for step in range(6):
            optimizer.zero_grad()
            loss = sum((p * values(p.shape, seed=99 + step)).sum() for p in params)
            scaler.scale(loss * (math.inf if step in (0, 1, 4) else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            if step > 1:
                history.append(snapshot(optimizer))
        return history

    device.check(run)


def check_zero_on_the_device(device: Device) -> None:
    """Momentum and weight decay may be zero for a while: no buffer is touched meanwhile."""
    momentum, decay = torch.tensor(0.0), torch.tensor(0.0)
    param = leaf(values(70))
    reference = for_loop([leaf(param)], **DAMPED)
    with device.in_place():
        optimizer = fastopt.SGD([param], **{**DAMPED, "momentum": momentum, "weight_decay": decay})
        for step, (m, w) in enumerate([(0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5), (0.0, 0.0)]):
            momentum.fill_(m)
            decay.fill_(w)
            reference.param_groups[0].update(momentum=m, weight_decay=w)
            set_grads([param], seed=step)
            set_grads(all_params(reference), seed=step)
            optimizer.step()
            reference.step()
            assert_same_bits(param, all_params(reference)[0])
            assert optimizer.state_dict()["state"].keys() == reference.state_dict()["state"].keys()


def check_replays(device: Device) -> None:
    """A CUDA graph launches the same table again: a captured first step is the first step once, and
    a scheduler's lr and a skipped step reach the replays."""
    lr, found_inf = torch.tensor(0.1), torch.tensor([1.0])
    params = [leaf(values(n, seed=n)) for n in (3, 40, 5000)]
    reference = for_loop([leaf(p) for p in params], **DAMPED)
    set_grads(params, seed=0)
    with device.in_place():
        optimizer = fastopt.SGD(params, **{**DAMPED, "lr": lr}, fused=True)
        optimizer.found_inf, optimizer.grad_scale = found_inf, None
        before = len(device.launched)
        optimizer.step()  # overflows
        del optimizer.found_inf, optimizer.grad_scale
        (graph,) = device.launched[before:]
        for step in range(5):
            found_inf.fill_(step == 3)
            lr.mul_(0.5)
            for p, q in zip(params, all_params(reference), strict=True):
                p.grad.copy_(values(p.shape, seed=77 * step + len(p)))
                q.grad = p.grad.clone()
            device.run(graph)
            reference.param_groups[0]["lr"] = lr.item()
            if step != 3:
                reference.step()
            assert_same_state(optimizer, reference, f"replay {step}")


def check_captures_after_a_change(device: Device) -> None:
    """What a capture only records has not happened: loaded buffers and added groups are known
    before, so that the step after a capture that nobody replays is right."""

    def run(make: Any) -> list[Snapshot]:
        history = []
        for change in ("load", "add", "assign"):
            loaded = {0: {"momentum_buffer": values(40, seed=5)}}
            optimizer = make([leaf(values(40))], **DAMPED)
            if change == "load":
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": loaded, "param_groups": groups})
            elif change == "add":
                train(optimizer, steps=1)
                optimizer.add_param_group({"params": [leaf(values(9))]})
            else:
                optimizer.state[all_params(optimizer)[0]].update(loaded[0])
            if make is fastopt.SGD:
                set_grads(all_params(optimizer)[:1], seed=3)
                with capture(device):
                    optimizer.step()
            history += train(optimizer, steps=2)
        return history

    device.check(run)


def check_captured_memory(device: Device) -> None:
    """What a graph addresses outlives the optimizer and its changes; a captured first step leaves
    its buffer as it finds it."""
    params = [leaf(values(40)), leaf(values(9))]
    set_grads(params, seed=1)
    filled = torch.are_deterministic_algorithms_enabled()
    with device.in_place():
        optimizer = fastopt.SGD(params[:1], lr=torch.tensor(0.1), momentum=0.9)
        torch.use_deterministic_algorithms(True)
        try:
            with capture(device):
                optimizer.step()
        finally:
            torch.use_deterministic_algorithms(filled)
        assert not optimizer.state[params[0]]["momentum_buffer"].isnan().all()
        started = weakref.ref(device.launched[-1].started)
        optimizer.add_param_group({"params": params[1:]})
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        del optimizer
        device.launched.clear()
        gc.collect()
        assert started() is not None
    devices.captured.clear()


def check_buffers_that_others_made(device: Device) -> None:
    """After a first step that overflowed, a buffer from torch's path or from the user is no longer
    one that waits for its first value."""
    for origin in ("torch", "user"):
        param = leaf(values((4, 4)))
        reference = for_loop([leaf(param)], **DAMPED)
        with device.in_place():
            optimizer = fastopt.SGD([param], **DAMPED, fused=True)
            set_grads([param], seed=1)
            amp_step(optimizer, 1.0, None)
            if origin == "user":
                for each in (optimizer, reference):
                    of_param = each.state[all_params(each)[0]]
                    of_param["momentum_buffer"] = values((4, 4), seed=8)
                assert len(optimizer.state_dict()["state"]) == 1
            for step in range(4):
                grad = values((4, 4), seed=step)
                for p in (param, *all_params(reference)):
                    # In torch's path, which other strides lead to, and back.
                    p.grad = grad.t() if origin == "torch" and step < 3 else grad.t().contiguous()
                optimizer.step()
                reference.step()
                assert_same_state(optimizer, reference, f"{origin} step {step}")
                assert len(optimizer.state_dict()["state"]) == 1


def check_scaler_without_gradients(device: Device) -> None:
    """GradScaler then says 0, not a tensor."""
    for place in (device.in_place(), nullcontext()):  # there, and with the CPU's kernels
        param = leaf(values(9))
        with place:
            optimizer = fastopt.SGD([param], **DAMPED, fused=True)
            scaler = torch.amp.GradScaler("cpu")
            scaler.scale(torch.ones(1))
            scaler.step(optimizer)
        assert_same_bits(param, leaf(values(9)))


def check_checkpoints(device: Device) -> None:
    """States go from torch to fastopt and back in mid-training, as do copies; groups are added."""

    def run(make: Any) -> list[Snapshot]:
        params = [leaf(values(n, seed=n)) for n in (4, 50)]
        optimizer = torch.optim.SGD(params, **DAMPED, foreach=False)
        history = train(optimizer, steps=2)
        for k in range(4):
            state = optimizer.state_dict()
            if k == 2:
                buffer = io.BytesIO()
                torch.save(state, buffer)
                buffer.seek(0)
                state = torch.load(buffer)
            optimizer = (make if k % 2 == 0 else for_loop)(params, lr=1.0)
            optimizer.load_state_dict(state)
            if k == 2:
                more = [leaf(values(9, seed=9))]
                history += train(optimizer, steps=1)
                optimizer.add_param_group({"params": more, "lr": 0.5, "momentum": 0.25})
                params = all_params(optimizer)
                history += train(optimizer, steps=2)
                optimizer = copy.deepcopy(optimizer)
                history += train(optimizer, steps=2)
                break
            history += train(optimizer, steps=2)
        return history

    device.check(run)


def check_last_step_skipped(device: Device) -> None:
    """What the device knows is a tensor there, which nobody has waited for."""
    param = leaf(values(9))
    with device.in_place():
        optimizer = fastopt.SGD([param], **DAMPED, fused=True)
        for found_inf in (0.0, 1.0, 2.0, 0.0):
            set_grads([param], seed=1)
            before = param.detach().clone()
            amp_step(optimizer, found_inf, None)
            assert optimizer.last_step_skipped == (found_inf != 0)
            assert torch.equal(before, param.detach()) == (found_inf != 0)


def check_nothing_is_kept_alive(device: Device) -> None:
    """After a step, an overflowed first one included."""
    for found_inf in (0.0, 1.0):
        params = [leaf(values(40)), leaf(values(9))]
        with device.in_place():
            optimizer = fastopt.SGD(params, **DAMPED, fused=True)
            for _ in range(2):
                set_grads(params, seed=1)
                amp_step(optimizer, found_inf, None)
            kept = [params[0], params[0].grad, optimizer.state[params[0]]["momentum_buffer"]]
            alive = [weakref.ref(tensor) for tensor in kept]
            device.launched.clear()
            del kept, params
            optimizer.state.clear()
            optimizer.param_groups[0]["params"].pop(0)
            gc.collect()
            assert [reference() for reference in alive] == [None] * 3


CASES: list[Callable[[Device], None]] = [
    check_overflow,
    check_grad_scaler,
    check_zero_on_the_device,
    check_replays,
    check_captures_after_a_change,
    check_captured_memory,
    check_buffers_that_others_made,
    check_scaler_without_gradients,
    check_checkpoints,
    check_last_step_skipped,
    check_nothing_is_kept_alive,
]
