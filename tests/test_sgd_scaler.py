"""fastopt.SGD under a GradScaler, side by side with the installed torch.optim.SGD."""

import math
from typing import Any

import pytest
import torch

import fastopt
from accuracy import assert_as_accurate
from sgd_oracle import (
    DAMPED,
    FLAGS,
    FULL,
    OPTIONS,
    all_params,
    assert_same,
    assert_same_bits,
    assert_same_history,
    assert_same_state,
    class_or_value,
    for_loop,
    leaf,
    outcome,
    set_grads,
    snapshot,
    some_params,
    values,
)

OVERFLOWS = {
    "never": (),
    "first": (0,),
    "later": (2,),
    "after_growth": (3,),
    "first_two": (0, 1),
    "first_and_later": (0, 2, 3),
    "twice": (2, 3),
}


@pytest.mark.usefixtures("filled_empties")
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("option", ["plain", "damped_decay", "nesterov_decay_max"])
def test_grad_scaler_steps_skips_and_unscales(
    option: str, flag: str, overflow: str, clip: bool
) -> None:
    """Stock's fused path stores an empty buffer, skips the overflowing first step, then reads it."""

    def run(make: Any, **flags: Any) -> Any:
        params = some_params()
        optimizer = make(params, **{**OPTIONS[option], **flags})
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        history, seen = [], []
        for step in range(6):
            optimizer.zero_grad()
            loss = sum((p * values(p.shape, seed=9 * step + i)).sum() for i, p in enumerate(params))
            if step in OVERFLOWS[overflow]:
                loss = loss + params[1].sum() * math.inf
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                seen.append(torch.nn.utils.clip_grad_norm_(params, 0.5))
            before = snapshot(optimizer)
            assert scaler.step(optimizer) is None
            if step in OVERFLOWS[overflow]:
                assert_same_state(optimizer, before, f"skipped step {step}")
            else:
                seen += [p.grad.clone() for p in params]  # unscaled, for whoever logs them
            scaler.update()
            seen.append(torch.tensor(scaler.get_scale()))
            history.append(snapshot(optimizer))
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
        return history, seen

    ours, theirs = run(fastopt.SGD, **FLAGS[flag]), run(torch.optim.SGD, **FLAGS["for_loop"])
    assert_same_history(ours[0], theirs[0])
    assert all(p.isfinite().all() for p in ours[0][-1].params)
    for mine, stock in zip(ours[1], theirs[1], strict=True):
        assert_same_bits(mine, stock)


@pytest.mark.parametrize("flag", FLAGS)
def test_grad_scaler_with_float16_gradients(flag: str) -> None:
    # Only fused=True may see float16 gradients; the others are refused by the scaler.
    def run(make: Any, dtype: torch.dtype, **flags: Any) -> Any:
        param = leaf(values(70, torch.float16).to(dtype))
        optimizer = make([param], **DAMPED, **flags)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale((param * values(70, torch.float16, seed=step).to(dtype)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return snapshot(optimizer)

    ours = outcome(lambda: run(fastopt.SGD, torch.float16, **FLAGS[flag]))
    if flag != "fused":
        assert ours == outcome(lambda: run(torch.optim.SGD, torch.float16, **FLAGS[flag]))
        assert ours[0] is ValueError
        return
    exact = run(torch.optim.SGD, torch.float64, **FLAGS["for_loop"])
    stock = for_loop([leaf(values(70, torch.float16))], **DAMPED)
    for step in range(3):
        all_params(stock)[0].grad = values(70, torch.float16, seed=step)
        stock.step()
    theirs = snapshot(stock)
    assert_as_accurate(ours.params[0], theirs.params[0], exact.params[0], "param")
    assert_as_accurate(ours.buffers[0], theirs.buffers[0], exact.buffers[0], "buffer")


def test_disabled_grad_scaler() -> None:
    def run(make: Any) -> Any:
        optimizer = make(some_params(), **FULL)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        set_grads(all_params(optimizer), seed=1)
        scaler.step(optimizer)
        scaler.update()
        return optimizer

    assert_same_state(run(fastopt.SGD), run(for_loop))


def test_two_optimizers_under_one_grad_scaler() -> None:
    def run(make: Any, **flags: Any) -> Any:
        params = some_params()
        optimizers = [make(params[:2], **DAMPED, **flags), make(params[2:], **DAMPED, **flags)]
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = sum((p * values(p.shape, seed=step)).sum() for p in params)
            if step == 1:  # the first optimizer's gradients overflow, the second's do not
                loss = loss + params[0].sum() * math.inf
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        return optimizers

    for flag in FLAGS.values():
        for mine, stock in zip(
            run(fastopt.SGD, **flag), run(torch.optim.SGD, **FLAGS["for_loop"]), strict=True
        ):
            assert_same_state(mine, stock)


@pytest.mark.stock
@pytest.mark.parametrize("given", [{"found_inf": 0.0}, {"grad_scale": 2.0}, {"found_inf": 1.0}])
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": False}], ids=str)
def test_a_scale_is_for_fused_steps_only(flags: Any, given: Any) -> None:
    def run(make: Any) -> Any:
        optimizer = make([leaf(values(7))], lr=0.1, **flags)
        set_grads(all_params(optimizer), seed=1)
        for name, value in given.items():
            setattr(optimizer, name, torch.tensor(value))
        return class_or_value(optimizer.step), all_params(optimizer)

    assert assert_same(run)[0] is AssertionError


@pytest.mark.stock
def test_a_wrapper_sets_and_deletes_the_flag() -> None:
    def flags(make: Any) -> Any:
        fused, plain = (make([leaf(values(3))], lr=0.1, fused=f) for f in (True, None))
        seen = [getattr(o, "_step_supports_amp_scaling", "none") for o in (fused, plain)]
        for flag in (False, True, None, "mine"):
            for o in (fused, plain):
                o._step_supports_amp_scaling = flag
                seen.append(o._step_supports_amp_scaling)
        for o in (fused, plain):
            del o._step_supports_amp_scaling
            seen.append(hasattr(o, "_step_supports_amp_scaling"))
            seen.append(class_or_value(lambda o=o: delattr(o, "_step_supports_amp_scaling")))
        return seen

    assert flags(fastopt.SGD) == flags(torch.optim.SGD)


@pytest.mark.parametrize("fused", [None, True])
def test_last_step_skipped(fused: bool | None) -> None:
    param = leaf(values(5))
    optimizer = fastopt.SGD([param], lr=0.1, fused=fused)
    assert optimizer.last_step_skipped is False
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (False, True, True, False):
        param.grad = None
        scaler.scale(param.sum() * (torch.inf if overflow else 1.0)).backward()
        before = param.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        skipped = torch.equal(before, param)
        assert skipped == overflow
        # Without `fused` GradScaler does not even call step().
        assert optimizer.last_step_skipped is (overflow and fused is True)
    optimizer.step()
    assert optimizer.last_step_skipped is False
