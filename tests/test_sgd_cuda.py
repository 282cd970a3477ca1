"""fastopt.SGD on GPU without one: the whole path, from step() to the CUDA kernel's own source, which
g++ compiles against tests/emulation. CPU tensors play the device's.

The cases are functions of a Device, so that test_sgd_triton.py runs them as well. They hold the
kernels against torch's for-loop, bit by bit where the kernels promise it, and against fastopt's CPU
kernel in half precision.
"""

import copy
import ctypes
import gc
import io
import math
import os
import pickle
import re
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastopt
from accuracy import assert_as_accurate
from child import run_python
from compiling import compiled
from fastopt import backends
from fastopt.sgd import devices, gather, launch
from fastopt.sgd.table import NAMES, Launch, SgdLaunch
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
    values,
)

ROOT = Path(__file__).parents[1]
SANITIZED = os.environ.get("FASTOPT_SANITIZE") == "1"


@dataclass
class Device:
    """Kernels that update CPU tensors as they would a GPU's."""

    run: Callable[[Launch], None]
    rounds_bfloat16: bool = True  # Triton's interpreter truncates where a GPU rounds
    rows: int = 2000  # what a test of many parameters can afford
    launched: list[Launch] = field(default_factory=list)

    def launch(self, launch: Launch) -> None:
        self.launched.append(launch)
        self.run(launch)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """fastopt.SGD takes the CPU for this device."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "DEVICE_TYPE", "cpu")
            patch.setattr(launch, "family", lambda: "tested")
            patch.setattr(backends, "serves_gpu", lambda index: True)
            patch.setitem(launch.LAUNCHERS, "tested", self.launch)
            yield

    def history(self, run: Callable[..., list[Snapshot]]) -> list[Snapshot]:
        before = len(self.launched)
        with self.in_place():
            history = run(fastopt.SGD)
        assert len(self.launched) > before
        return history

    def check(self, run: Callable[..., list[Snapshot]], what: str = "") -> None:
        """Same states as torch's for-loop has after every step."""
        assert_same_history(self.history(run), run(for_loop), what)

    def assert_same(self, ours: Tensor, theirs: Tensor, what: str = "") -> None:
        """The same bits, or truncated bfloat16 instead of rounded."""
        if ours.dtype is torch.bfloat16 and not self.rounds_bfloat16:
            ulp = theirs.double().abs() * 2**-7
            assert ((ours.double() - theirs.double()).abs() <= ulp + 1e-30).all(), what
        else:
            assert_same_bits(ours, theirs, what)


# --- the cases -----------------------------------------------------------------------------------

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


def check_mixed_dtypes(device: Device) -> None:
    dtypes = [d for d in DTYPES if d is not torch.bfloat16 or device.rounds_bfloat16]

    def run(make: Any) -> list[Snapshot]:
        params = [leaf(values(100 + i, dtypes[i % len(dtypes)], seed=i)) for i in range(16)]
        return train(make(params, **FULL))

    assert_same_history(device.history(run), run(fastopt.SGD))


def check_late_gradients(device: Device) -> None:
    """Parameters whose first gradient comes later than others', and gradients that pause (B3)."""
    generator = torch.Generator().manual_seed(1)
    present = torch.rand(8, 12, generator=generator) < 0.4
    present[:5, 11] = present[:5, 0] = False

    def run(make: Any) -> list[Snapshot]:
        optimizer = make([leaf(values(20 + n, seed=n)) for n in range(12)], **DAMPED)

        def mask(step: int) -> None:
            for p, has_grad in zip(all_params(optimizer), present[step], strict=True):
                p.grad = p.grad if has_grad else None

        return train(optimizer, steps=8, before_step=mask)

    device.check(run)


def amp_step(optimizer: Any, found_inf: float, grad_scale: float | None) -> None:
    optimizer.found_inf = torch.tensor([found_inf])
    optimizer.grad_scale = None if grad_scale is None else torch.tensor([grad_scale])
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale


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


@contextmanager
def capture(device: Device) -> Iterator[None]:
    """As while a CUDA graph is captured: memory is taken, but nothing that is enqueued runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "capturing", lambda _: True)
        patch.setattr(device, "run", lambda launch: None)
        for name in ("fill_", "copy_", "zero_"):
            patch.setattr(Tensor, name, lambda tensor, *_: tensor)
        yield


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


class Subclass(Tensor):
    """A tensor that might do anything."""


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
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))

    def run(make: Any) -> list[Tensor]:
        params = [leaf(values(21))] + [
            torch.nn.Parameter(distribute_tensor(values((4, 6), seed=k), mesh, [placement]))
            for k, placement in enumerate((Shard(0), Shard(1), Replicate()))
        ]
        optimizer = make(params, **DAMPED)
        for step in range(3):
            for p in params:
                grad = values(p.shape, seed=step)
                p.grad = grad if p is params[0] else distribute_tensor(grad, mesh, p.placements)
            versions = [p._version for p in params]
            optimizer.step()
            assert [p._version for p in params] == [v + 1 for v in versions]
        buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
        for param, buffer in zip(params[1:], buffers[1:], strict=True):
            assert type(buffer) is DTensor and buffer.placements == param.placements
        return [t.full_tensor() if isinstance(t, DTensor) else t for t in params + buffers]

    before = len(device.launched)
    try:
        with device.in_place():
            ours = run(fastopt.SGD)
        theirs = run(for_loop)
    finally:
        dist.destroy_process_group()
    sizes = [[row.numel for row in launch.rows] for launch in device.launched[before:]]
    assert sizes == [[21, 24, 24, 24]] * 3, "the kernels took all"
    for mine, stock in zip(ours, theirs, strict=True):
        assert_same_bits(mine.detach(), stock.detach())


CASES: list[Callable[[Device], None]] = [
    check_many_rows_and_groups,
    check_mixed_dtypes,
    check_late_gradients,
    check_overflow,
    check_grad_scaler,
    check_options_on_the_device,
    check_zero_on_the_device,
    check_replays,
    check_captures_after_a_change,
    check_first_step_beside_a_subclass,
    check_parameters_that_move,
    check_captured_memory,
    check_buffers_that_others_made,
    check_empty_parameters,
    check_unusual_options,
    check_scaler_without_gradients,
    check_checkpoints,
    check_edits,
    check_versions,
    check_torchs_path,
    check_shared_memory_in_torchs_order,
    check_python_inside_a_step,
    check_nothing_is_kept_alive,
    check_last_step_skipped,
    check_gradient_is_its_parameter,
    check_refusals,
    check_distributed_tensors,
]


# --- the CUDA kernel, emulated -------------------------------------------------------------------


@pytest.fixture(scope="session")
def emulation() -> ctypes.CDLL:
    """tests/emulation/sgd.cpp, built once per version of what it includes."""
    source = ROOT / "tests/emulation/sgd.cpp"
    sanitized = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    library = compiled(
        ROOT / "build/emulation" / ("libsgd_sanitized.so" if SANITIZED else "libsgd.so"),
        [source, *(ROOT / "csrc").rglob("*.h"), ROOT / "tests/emulation/emulation.h"],
        [
            *(
                "g++",
                "-std=c++17",
                *(sanitized if SANITIZED else ["-O2"]),
                "-g1",
                "-fPIC",
                "-shared",
            ),
            *("-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
            *("-Icsrc", "-Itests/emulation", source),
        ],
    )
    loaded = ctypes.CDLL(str(library))
    run = loaded.fastopt_sgd_run_emulated
    run.argtypes = [
        ctypes.POINTER(SgdLaunch), ctypes.c_bool, ctypes.POINTER(ctypes.c_int64)
    ]  # fmt: skip
    run.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(params=["ascending", "descending", "without_compiled_gather"])
def device(request: Any, emulation: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Device:
    if request.param == "without_compiled_gather":
        monkeypatch.setattr(devices, "READER", gather.PythonGather)
    return emulated(emulation, descending=request.param == "descending")


def emulated(
    emulation: ctypes.CDLL, descending: bool = False, launches: Any = None, processors: int = 1
) -> Device:
    launches = ctypes.c_int64() if launches is None else launches

    def run(launch: Launch) -> None:
        step = launch.as_struct(processors)
        error = emulation.fastopt_sgd_run_emulated(step, descending, launches)
        assert error is None, error.decode()
        assert launch.started[-1] == 0, "the count of blocks is left at 0"

    return Device(run)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(emulation: ctypes.CDLL, dtype: torch.dtype, option: str) -> None:
    check_options(emulated(emulation), dtype, option)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment(device: Device, dtype: torch.dtype) -> None:
    check_alignment(device, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.removeprefix("check_"))
def test_case(
    device: Device, case: Callable[[Device], None], request: pytest.FixtureRequest
) -> None:
    if case is check_refusals:
        request.applymarker(pytest.mark.stock)
    case(device)


def test_launches(emulation: ctypes.CDLL) -> None:
    """870 parameters and 32 groups share a launch; launches follow one another beyond."""

    def launches(group_sizes: list[int]) -> int:
        count = ctypes.c_int64()
        params = [[leaf(values(2, seed=i)) for i in range(size)] for size in group_sizes]
        with emulated(emulation, launches=count).in_place():
            optimizer = fastopt.SGD([{"params": p} for p in params], **DAMPED)
            set_grads(all_params(optimizer), seed=0)
            optimizer.step()
        return count.value

    assert launches([161]) == launches([870]) == launches([27] * 32) == 1
    assert launches([871]) == launches([1] * 33) == launches([27] * 33) == 2
    assert launches([1741]) == 3


def test_blocks_share_the_work(emulation: ctypes.CDLL) -> None:
    """The grid follows the number of processors; results do not."""

    def run(make: Any) -> list[Snapshot]:
        return train(make([leaf(values(n, seed=n)) for n in (70_000, 3, 4096, 4097)], **DAMPED))

    histories = [emulated(emulation, processors=n).history(run) for n in (1, 3, 100)]
    for history in histories:
        assert_same_history(history, run(for_loop))


# --- compiled for GPUs ---------------------------------------------------------------------------

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.slow  # nvcc does not run under the sanitizers' preloaded libraries
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_it_compiles_without_spills_and_with_wide_accesses(tmp_path: Path) -> None:
    library = tmp_path / "sgd.so"
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90, 100)]
    done = subprocess.run(
        [NVCC, "-std=c++17", "-O3", "-Icsrc", "-Xcompiler", "-fPIC,-Wall,-Wextra"]
        + ["-Werror", "all-warnings", "-Xptxas", "-v", *targets]
        + ["-shared", "csrc/cuda/sgd.cu", "-o", str(library)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (
        re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", done.stderr) == [("0", "0")] * 6
    )  # for few parameters and for many
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 6 and max(registers) <= 64, "four blocks of 256 threads"

    triton = pytest.importorskip("triton", reason="its wheel carries cuobjdump")
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    for sm in (80, 90, 100):
        sass = subprocess.run(
            [str(tools / "cuobjdump"), "--dump-sass", "-arch", f"sm_{sm}", str(library)],
            env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        # Each of 4 dtypes reads 2, 2 and 3 arrays and writes 1, 2 and 2.
        loads, stores = (len(re.findall(rf"{op}\.E\S*\.128", sass)) for op in ("LDG", "STG"))
        assert loads >= 2 * 28 and stores >= 2 * 20, (sm, loads, stores)


@pytest.mark.stock
def test_parameters_without_memory(device: Device) -> None:
    """Fake ones, as tools that trace a training make them: nothing is taken from a device."""
    with device.in_place():
        mode = FakeTensorMode()
        with mode:
            param = torch.nn.Parameter(torch.empty(3))
            fastopt.SGD([param], lr=0.1, momentum=0.9)
        optimizer = fastopt.SGD([param], lr=0.1, momentum=0.9)
        with mode:
            param.grad = torch.empty(3)
            optimizer.step()
    assert not device.launched


def test_importing_fastopt_touches_neither_triton_nor_cuda() -> None:
    run_python(
        """
        import sys, torch
        before = set(sys.modules)
        import fastopt
        assert not [m for m in set(sys.modules) - before if m.split(".")[0] == "triton"]
        assert not torch.cuda.is_initialized()
        """
    )
