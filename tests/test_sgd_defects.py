"""One test for each defect known in torch.optim.SGD that can show on CPU: fastopt.SGD has none.

Each docstring says what stock does (torch 2.13). Two of its known defects are of the GPU kernel
alone: arithmetic in double where single precision is meant, and frozen hyperparameters in a graph. What
stock makes of an overflowing first step, test_sgd_scaler.py tests with all else about GradScaler.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fastopt
from accuracy import assert_as_accurate
from child import run_python
from sgd_oracle import (
    DAMPED,
    EXACT_DTYPES,
    FLAGS,
    FULL,
    HALF_DTYPES,
    OPTIONS,
    SMALL_SIZES,
    all_params,
    assert_same_bits,
    assert_same_history,
    assert_same_state,
    bits,
    for_loop,
    leaf,
    outcome,
    set_grads,
    snapshot,
    train_distributed,
    train_on_some,
    values,
)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_blocks_are_written(dtype: torch.dtype, flag: str) -> None:
    """Stock's fused kernel writes half parameters only in the tail after the last full vector."""
    for size in (1, 15, 16, 17, 31, 32, 33, 64, 128, 1000, 70_000):
        param = leaf(torch.ones(size, dtype=dtype))
        optimizer = fastopt.SGD([param], lr=0.25, momentum=0.5, **FLAGS[flag])
        for expected in (0.75, 0.375, -0.0625):  # every value is exact in both half dtypes
            param.grad = torch.ones(size, dtype=dtype)
            optimizer.step()
            assert (param == expected).all(), f"size {size}: {param.unique()}"


@pytest.mark.usefixtures("filled_empties")
@pytest.mark.parametrize("option", ["damped_decay", "nesterov_decay_max"])
@pytest.mark.parametrize("flag", FLAGS)
def test_late_first_gradients(flag: str, option: str) -> None:
    """Stock's fused path raises when only some parameters of a group have a buffer; other libraries
    take one parameter's first step for everybody's."""
    ours = train_on_some(fastopt.SGD, **OPTIONS[option], **FLAGS[flag])
    assert_same_history(ours, train_on_some(for_loop, **OPTIONS[option]))


@pytest.mark.parametrize("flag", FLAGS)
def test_version_counters_move(flag: str) -> None:
    """Stock's fused path changes parameters behind autograd's back: a backward through a value saved
    before the step then gives a wrong gradient without a word."""
    param = leaf(values(40))
    optimizer = fastopt.SGD([param], lr=0.1, momentum=0.9, **FLAGS[flag])
    for _ in range(2):
        loss = (param * param).sum()
        param.grad = torch.ones(40)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.stock
@pytest.mark.parametrize("flag", FLAGS)
def test_inference_tensors_are_refused_as_by_the_for_loop(flag: str) -> None:
    """Stock's fused path updates inference tensors outside of inference mode."""

    def attempt(make: Any, **flags: Any) -> Any:
        with torch.inference_mode():
            param = torch.ones(20)
        param.grad = torch.ones(20)
        return outcome(make([param], lr=0.1, momentum=0.9, **flags).step)

    theirs = attempt(for_loop)
    assert theirs[0] is RuntimeError
    assert attempt(fastopt.SGD, **FLAGS[flag]) == theirs


@pytest.mark.stock
@pytest.mark.parametrize("flag", FLAGS)
def test_strides_of_parameter_and_gradient_may_differ(flag: str) -> None:
    """Stock's fused kernel walks parameter, gradient and buffer as if all had the same strides."""

    def run(make: Any, **flags: Any) -> Any:
        channels_last = values((2, 3, 4, 5)).to(memory_format=torch.channels_last)
        transposed = values((6, 5)).t()
        sliced = values((6, 10))[:, ::2]
        params = [leaf(channels_last), leaf(values((2, 3, 4, 5))), transposed, sliced, leaf(sliced)]
        for p in params:
            p.requires_grad_()
        optimizer = make(params, **FULL, **flags)
        for step in range(3):
            params[0].grad = values((2, 3, 4, 5), seed=step)
            params[1].grad = values((2, 3, 4, 5), seed=step).to(memory_format=torch.channels_last)
            params[2].grad = values((5, 6), seed=step)
            params[3].grad = values((6, 5), seed=step)
            params[4].grad = values((1, 5), seed=step).expand(6, 5)  # stride 0: one row for all
            optimizer.step()
        return optimizer

    assert_same_state(run(fastopt.SGD, **FLAGS[flag]), run(for_loop))


@pytest.mark.stock
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expanded_parameters_are_refused(dtype: torch.dtype, flag: str) -> None:
    """Stock's fused kernel writes past the end of an expanded parameter's memory."""

    def attempt(make: Any, **flags: Any) -> Any:
        storage = torch.ones(5, dtype=dtype)
        param = storage.expand(400, 5).requires_grad_()
        param.grad = torch.ones(400, 5, dtype=dtype)
        result = outcome(make([param], lr=0.1, momentum=0.9, **flags).step)
        assert (storage == 1).all()
        return result

    theirs = attempt(for_loop)
    assert theirs[0] is RuntimeError
    assert attempt(fastopt.SGD, **FLAGS[flag]) == theirs


@pytest.mark.stock
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(
    ("loaded_shape", "shape"),
    [((4,), (200_000,)), ((4,), (3,)), ((3,), (4,)), ((1,), (4,)), ((), (4,)), ((2, 2), (4,))]
    + [((4,), (2, 2)), ((3, 2), (2, 3)), ((0,), (4,))],
    ids=str,
)
def test_momentum_of_the_wrong_size_is_refused(
    loaded_shape: tuple[int, ...], shape: tuple[int, ...], flag: str
) -> None:
    """Stock's fused kernel takes a loaded buffer's size on trust and corrupts the heap."""

    def attempt(make: Any, **flags: Any) -> Any:
        params = [leaf(values(30)), leaf(values(shape))]
        optimizer = make(params, **DAMPED, **flags)
        state = optimizer.state_dict()
        state["state"] = {1: {"momentum_buffer": torch.ones(loaded_shape)}}
        optimizer.load_state_dict(state)
        set_grads(params, seed=1)
        result = outcome(optimizer.step)
        assert_same_bits(params[1], values(shape))
        return result

    theirs = attempt(for_loop)
    assert theirs[0] is RuntimeError
    assert attempt(fastopt.SGD, **FLAGS[flag])[0] is RuntimeError


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_are_never_changed(option: str, flag: str) -> None:
    """Stock's foreach path writes the Nesterov gradient into .grad when weight_decay is 0."""
    for dtype in (*EXACT_DTYPES, *HALF_DTYPES):
        params = [leaf(values(n, dtype, seed=n)) for n in SMALL_SIZES]
        optimizer = fastopt.SGD(params, **OPTIONS[option], **FLAGS[flag])
        set_grads(params, seed=1)
        grads = [p.grad for p in params]
        before = [(g.clone(), g._version) for g in grads]
        for _ in range(3):
            optimizer.step()
            for p, grad, (copy, version) in zip(params, grads, before, strict=True):
                assert p.grad is grad
                assert grad._version == version
                assert torch.equal(bits(grad), bits(copy))


@pytest.mark.stock
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_are_not_changed_on_torchs_path_either(option: str, flag: str) -> None:
    """Parameters that the kernels do not take go to torch's for-loop whatever the flags say: its
    foreach changes gradients there too, and its fused kernel ignores strides."""

    def run(make: Any, **flags: Any) -> Any:
        param = values((6, 10))[:, ::2].requires_grad_()
        optimizer = make([param], **OPTIONS[option], **flags)
        grad = values((6, 5), seed=1)
        param.grad = grad
        for _ in range(3):
            optimizer.step()
        assert_same_bits(grad, values((6, 5), seed=1))
        return optimizer

    assert_same_state(run(fastopt.SGD, **FLAGS[flag]), run(for_loop))


@pytest.mark.parametrize("loaded_flag", FLAGS)
@pytest.mark.parametrize("flag", FLAGS)
def test_loaded_flags_work_with_a_grad_scaler(flag: str, loaded_flag: str) -> None:
    """Stock's SGD(fused=True) with a state dict of a plain SGD cannot step under a GradScaler."""

    def run(make: Any, flags: dict[str, Any], loaded_flags: dict[str, Any]) -> Any:
        source = torch.optim.SGD([leaf(values(20))], **DAMPED, **loaded_flags)
        param = leaf(values(20))
        optimizer = make([param], **DAMPED, **flags)
        optimizer.load_state_dict(source.state_dict())
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale((param * values(20, seed=step)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return optimizer

    ours = run(fastopt.SGD, FLAGS[flag], FLAGS[loaded_flag])
    assert_same_state(ours, run(torch.optim.SGD, FLAGS["for_loop"], FLAGS["for_loop"]))


@pytest.mark.usefixtures("filled_empties")
@pytest.mark.parametrize("grad_scale", [None, 8.0])
@pytest.mark.parametrize("found_inf", [0.0, 0.5, 1.0, 2.0])
def test_any_found_inf_but_zero_skips_the_step(found_inf: float, grad_scale: float | None) -> None:
    """Stock compares found_inf with 1: when two devices overflow the sum is 2 and the step is taken."""
    params = [leaf(values(n, seed=n)) for n in (1, 16, 35)]
    optimizer = fastopt.SGD(params, **DAMPED, fused=True)
    reference = for_loop([leaf(p) for p in params], **DAMPED)
    for step in range(3):
        set_grads(params, seed=step + 1)
        for p, q in zip(params, all_params(reference), strict=True):
            q.grad = p.grad.clone()
            p.grad.mul_(grad_scale or 1.0)
        before = snapshot(optimizer)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.grad_scale = None if grad_scale is None else torch.tensor(grad_scale)
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
        if found_inf:
            assert_same_state(optimizer, before)
        else:
            reference.step()
            assert_same_state(optimizer, reference)


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Any]:
    if not dist.is_available():
        pytest.skip("torch was built without distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("flag", FLAGS)
def test_distributed_tensors_are_served(one_rank: Any, flag: str) -> None:
    """Stock's fused path has no rule for DTensor, hence no FSDP2."""
    ours = train_distributed(fastopt.SGD, one_rank, **DAMPED, **FLAGS[flag])
    for mine, stock in zip(ours, train_distributed(for_loop, one_rank, **DAMPED), strict=True):
        assert_same_bits(mine, stock)


def test_small_tensors_open_no_region_each() -> None:
    """Stock's fused path opens a parallel region per tensor: 161 small tensors are 1.5 times slower
    on two threads than on one. Ours opens none for them, so torch's threads are never started; a
    step over large tensors starts them."""
    run_python(
        """
        import os
        import torch
        import fastopt

        def threads_after_a_step(size):
            params = [torch.nn.Parameter(torch.ones(size)) for _ in range(161)]
            for p in params:
                p.grad = torch.ones(size)
            fastopt.SGD(params, lr=0.1, momentum=0.9).step()
            return len(os.listdir("/proc/self/task"))

        torch.set_num_threads(2)
        at_first = len(os.listdir("/proc/self/task"))
        assert threads_after_a_step(64) == at_first
        assert threads_after_a_step(16384) > at_first
        """
    )


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_momentum_is_not_rounded_to_the_half_dtype(dtype: torch.dtype, flag: str) -> None:
    """Stock's foreach path multiplies by momentum rounded to the parameter's dtype: 0.9 becomes
    0.8984 in bfloat16. Buffers of 1 to 2 times 2**k tell the two factors apart."""
    buffer = torch.arange(128, 256).to(dtype)
    param = leaf(torch.zeros(128, dtype=dtype))
    param.grad = torch.zeros(128, dtype=dtype)
    optimizer = fastopt.SGD([param], lr=0.0, momentum=0.9, **FLAGS[flag])
    optimizer.state[param]["momentum_buffer"] = buffer.clone()
    optimizer.step()
    exact = buffer.double() * 0.9
    result = optimizer.state[param]["momentum_buffer"]
    assert_same_bits(result, exact.to(dtype))
    assert_as_accurate(result, buffer * 0.9, exact)
    assert not torch.equal(result, buffer * torch.tensor(0.9, dtype=dtype))
