"""The values of fastopt.SGD: float32 and float64 bit for bit as torch's for-loop on CPU, half dtypes
at least as accurate as that loop against float64, over every option, size and alignment."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastopt
from accuracy import assert_as_accurate
from sgd_oracle import (
    DAMPED,
    DTYPES,
    EXACT_DTYPES,
    FLAGS,
    FULL,
    HALF_DTYPES,
    LARGE_SIZES,
    OPTIONS,
    SMALL_SIZES,
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


def params_of(sizes: Sequence[int | Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    return [leaf(values(size, dtype, seed=i)) for i, size in enumerate(sizes)]


def same_training(params: Any, steps: int = 3, **options: Any) -> None:
    """Train copies of the same parameters with fastopt and with the for-loop; compare every step."""
    ours = fastopt.SGD([leaf(p) for p in params], **options)
    theirs = for_loop([leaf(p) for p in params], **options)
    assert_same_history(train(ours, steps), train(theirs, steps), f"{options}")


# --- float32 and float64: the for-loop's bits ----------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_all_sizes_in_one_step_equal_the_for_loop_bitwise(dtype: torch.dtype, option: str) -> None:
    same_training(params_of(SMALL_SIZES, dtype), **OPTIONS[option])


@pytest.mark.parametrize("option", ["plain_decay", "damped_decay", "nesterov_decay_max"])
@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_sizes_around_a_threads_share_equal_the_for_loop_bitwise(
    dtype: torch.dtype, option: str
) -> None:
    same_training(params_of((17, *LARGE_SIZES), dtype), steps=2, **OPTIONS[option])


@pytest.mark.parametrize("option", OPTIONS)
def test_a_tensor_learning_rate_equals_the_for_loop_bitwise(option: str) -> None:
    for dtype in EXACT_DTYPES:
        for lr in (torch.tensor(0.1), torch.tensor([[0.1]], dtype=torch.float64)):
            same_training(params_of(SMALL_SIZES, dtype), **{**OPTIONS[option], "lr": lr})


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("option", OPTIONS)
def test_implementation_flags_do_not_change_the_bits(option: str, flag: str) -> None:
    for dtype in EXACT_DTYPES:
        same_training(params_of(SMALL_SIZES, dtype), **OPTIONS[option], **FLAGS[flag])


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_every_size_alone_equals_the_for_loop_bitwise(dtype: torch.dtype) -> None:
    for size in range(131):
        same_training(params_of([size], dtype), steps=2, **FULL)


@pytest.mark.parametrize("size", [300_001, 1_000_003])
@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_one_large_tensor_equals_the_for_loop_bitwise(dtype: torch.dtype, size: int) -> None:
    # Cut into pieces for the threads: the cuts lie inside the tensor and must not show.
    same_training(params_of([size], dtype), steps=2, **FULL)


def test_many_tensors_of_mixed_sizes_equal_the_for_loop_bitwise() -> None:
    sizes = random.Random(0).choices(SMALL_SIZES, k=1500) + [70_001]
    same_training(params_of(sizes, torch.float32), steps=2, **FULL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scalar_and_empty_parameters(dtype: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (1,), (1, 1, 1)]
    ours, theirs = (make(params_of(shapes, dtype), **FULL) for make in (fastopt.SGD, for_loop))
    assert_same_history(train(ours, 1), train(theirs, 1)) if dtype in EXACT_DTYPES else train(ours)
    assert [p.shape for p in all_params(ours)] == [torch.Size(s) for s in shapes]


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_misaligned_operands_equal_the_for_loop_bitwise(dtype: torch.dtype) -> None:
    # Parameter, gradient and buffer each start at their own offset from a vector boundary.
    size = 67
    for offset in range(17):
        optimizers = []
        for make in (fastopt.SGD, for_loop):
            p, g, b = (
                values(size + 32, dtype, seed)[start : start + size]
                for seed, start in ((1, offset), (2, (offset * 5) % 17), (3, (offset * 3 + 1) % 17))
            )
            p.requires_grad_()
            optimizer = make([p], **DAMPED)
            p.grad = g
            optimizer.state[p]["momentum_buffer"] = b
            optimizer.step()
            optimizers.append(optimizer)
        assert_same_state(*optimizers, f"offset {offset}")


SPECIAL_VALUES = (
    0.0,
    -0.0,
    1.0,
    -1.5,
    math.inf,
    -math.inf,
    math.nan,
    1e-45,  # the smallest float32
    -1e-40,
    1e-38,
    3e38,
    -3e38,
    5e-324,  # the smallest float64; 0 in float32
    1e308,
)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_special_values_equal_the_for_loop_bitwise(dtype: torch.dtype, option: str) -> None:
    special = torch.tensor(SPECIAL_VALUES, dtype=torch.float64).to(dtype)
    p, g, b = (t.reshape(-1) for t in torch.meshgrid(special, special, special, indexing="ij"))
    optimizers = []
    for make in (fastopt.SGD, for_loop):
        param = leaf(p)
        optimizer = make([param], **OPTIONS[option])
        optimizer.state[param]["momentum_buffer"] = b.clone()
        for _ in range(2):
            param.grad = g.clone()
            optimizer.step()
        optimizers.append(optimizer)
    assert_same_state(*optimizers, option)


# Values that a float32 kernel rounds, overflows or compares differently if it is careless: torch
# rounds every hyperparameter to the parameter's dtype and refuses what does not fit.
ODD_HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "lr_zero": {"lr": 0.0},
    "lr_int": {"lr": 1},
    "lr_bool": {"lr": True},
    "lr_nan": {"lr": math.nan},
    "lr_inf": {"lr": math.inf},
    "lr_denormal": {"lr": 1e-42},
    "lr_below_float32": {"lr": 1e-60},
    "lr_above_float32": {"lr": 1e60},
    "lr_third": {"lr": 1 / 3},
    "lr_int_tensor": {"lr": torch.tensor(2)},
    "lr_half_tensor": {"lr": torch.tensor(0.1, dtype=torch.float16)},
    "lr_one_element": {"lr": torch.tensor([0.1])},
    "momentum_above_one": {"momentum": 1.5},
    "momentum_nan": {"momentum": math.nan},
    "momentum_inf": {"momentum": math.inf},
    "momentum_int": {"momentum": 1},
    "momentum_tiny": {"momentum": 1e-46},
    "momentum_above_float32": {"momentum": 1e60},
    "momentum_tensor": {"momentum": torch.tensor(0.9)},
    "momentum_tensor_nesterov": {"momentum": torch.tensor(0.9), "nesterov": True},
    "dampening_two": {"momentum": 0.9, "dampening": 2},
    "dampening_negative": {"momentum": 0.9, "dampening": -3},
    "dampening_one": {"momentum": 0.9, "dampening": 1},
    "dampening_tiny": {"momentum": 0.9, "dampening": 1e-10},
    "dampening_nan": {"momentum": 0.9, "dampening": math.nan},
    "dampening_above_float32": {"momentum": 0.9, "dampening": 1e60},
    "dampening_without_momentum": {"dampening": 0.5},
    "weight_decay_nan": {"weight_decay": math.nan},
    "weight_decay_inf": {"weight_decay": math.inf},
    "weight_decay_tiny": {"weight_decay": 1e-46},
    "weight_decay_above_float32": {"weight_decay": 1e60},
    "weight_decay_tensor": {"weight_decay": torch.tensor(0.1)},
    "weight_decay_tensor_momentum": {"weight_decay": torch.tensor(0.1), "momentum": 0.9},
    "lr_needs_grad": {"lr": torch.tensor(0.1, requires_grad=True), "momentum": 0.9},
    "weight_decay_needs_grad": {"weight_decay": torch.tensor(0.1, requires_grad=True)},
}


@pytest.mark.parametrize("odd", ODD_HYPERPARAMETERS)
@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_odd_hyperparameters_do_what_the_for_loop_does(dtype: torch.dtype, odd: str) -> None:
    def attempt(make: Any) -> Any:
        optimizer = make(params_of(SMALL_SIZES, dtype), **{"lr": 0.1, **ODD_HYPERPARAMETERS[odd]})
        return outcome(lambda: train(optimizer, by_torch=by_torch))

    # A tensor that is not a plain number to the kernels, or a number that is none in float32.
    by_torch = odd.startswith("momentum_tensor") or odd.endswith(
        ("_bool", "_int_tensor", "_needs_grad")
    )
    by_torch = by_torch or (odd.endswith("_above_float32") and dtype is torch.float32)
    ours, theirs = attempt(fastopt.SGD), attempt(for_loop)
    if isinstance(theirs, list) and isinstance(ours, list):
        assert_same_history(ours, theirs, odd)
    else:
        assert ours == theirs


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=12),
    dtypes=st.lists(st.sampled_from(EXACT_DTYPES), min_size=12, max_size=12),
    lr=st.floats(0, 10),
    momentum=st.one_of(st.just(0.0), st.floats(0, 2)),
    dampening=st.floats(-2, 2),
    weight_decay=st.one_of(st.just(0.0), st.floats(0, 2)),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    flag=st.sampled_from(sorted(FLAGS)),
    steps=st.integers(1, 4),
)
def test_any_options_and_sizes_equal_the_for_loop_bitwise(
    sizes: list[int],
    dtypes: list[torch.dtype],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    flag: str,
    steps: int,
) -> None:
    nesterov = nesterov and momentum > 0
    params = [
        leaf(values(size, dtype, seed))
        for seed, (size, dtype) in enumerate(zip(sizes, dtypes, strict=False))
    ]
    same_training(
        params,
        steps,
        lr=lr,
        momentum=momentum,
        dampening=0 if nesterov else dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
        **FLAGS[flag],
    )


# --- half dtypes: one rounding per stored value --------------------------------------------------


def as_float64(params: Sequence[Tensor]) -> list[Tensor]:
    return [leaf(p.detach().double()) for p in params]


def half_and_exact(
    dtype: torch.dtype, sizes: Sequence[int], steps: int, **options: Any
) -> tuple[Any, Any, Any]:
    """fastopt and the for-loop in `dtype`, and the for-loop in float64 on the same values.

    Each trains on the same gradients, the values of `dtype`; the two half runs accumulate their own
    rounding errors from step to step, the float64 run has none worth counting.
    """
    params = params_of(sizes, dtype)
    ours = fastopt.SGD([leaf(p) for p in params], **options)
    theirs = for_loop([leaf(p) for p in params], **options)
    exact = for_loop(as_float64(params), **options)
    for step in range(steps):
        for optimizer in (ours, theirs):
            set_grads(all_params(optimizer), seed=step + 1)
        for p, q in zip(all_params(exact), all_params(ours), strict=True):
            p.grad = q.grad.double()
        for optimizer in (ours, theirs, exact):
            optimizer.step()
    return snapshot(ours), snapshot(theirs), snapshot(exact)


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_dtypes_are_as_accurate_as_the_for_loop(
    dtype: torch.dtype, option: str, steps: int
) -> None:
    ours, theirs, exact = half_and_exact(dtype, SMALL_SIZES, steps, **OPTIONS[option])
    for i, size in enumerate(SMALL_SIZES):
        what = f"{option} size {size}"
        assert_as_accurate(ours.params[i], theirs.params[i], exact.params[i], f"param {what}")
        if exact.buffers[i] is not None:
            assert_as_accurate(
                ours.buffers[i], theirs.buffers[i], exact.buffers[i], f"buffer {what}"
            )


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_dtypes_round_each_stored_value_once(dtype: torch.dtype, option: str) -> None:
    # Against the update in float64 from the same half operands: no error beyond the nearest half
    # value's own, but for float32 noise. Steps 1 and 2 are the two branches of the buffer.
    options = OPTIONS[option]
    param = leaf(values(30_001, dtype))
    ours = fastopt.SGD([param], **options)
    for step in (1, 2):
        set_grads([param], seed=step)
        exact_param = leaf(param.detach().double())
        exact_param.grad = param.grad.double()
        exact = for_loop([exact_param], **options)
        if "momentum_buffer" in ours.state[param]:
            buffer = ours.state[param]["momentum_buffer"]
            exact.state[exact_param]["momentum_buffer"] = buffer.double()
        exact.step()
        ours.step()
        after, exact_after = snapshot(ours), snapshot(exact)
        pairs = [("param", after.params[0], exact_after.params[0])]
        if after.buffers[0] is not None:
            pairs.append(("buffer", after.buffers[0], exact_after.buffers[0]))
        for what, value, goal in pairs:
            # Every term of the update is below 16 in magnitude: normal values, factors below 2.
            noise = 16 * 4 * torch.finfo(torch.float32).eps
            nearest = (goal.to(dtype).double() - goal).abs()
            error = (value.double() - goal).abs()
            worst = (error - nearest).max().item()
            assert worst <= noise, f"{what} of step {step}: {worst} beyond the nearest {dtype}"


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_dtypes_have_less_error_than_the_for_loop(dtype: torch.dtype) -> None:
    ours, theirs, exact = half_and_exact(dtype, [30_000], 10, **DAMPED)
    for a, b, goal in (
        (ours.params[0], theirs.params[0], exact.params[0]),
        (ours.buffers[0], theirs.buffers[0], exact.buffers[0]),
    ):
        assert (a.double() - goal).abs().mean() < (b.double() - goal).abs().mean()


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_results_do_not_depend_on_flags_position_or_company(
    dtype: torch.dtype, flag: str
) -> None:
    # One long tensor, the same values cut into many short ones, and a tail of each length: an
    # element's result is its own, whether a vector, a tail or another thread computed it.
    size = 5_000
    whole = leaf(values(size, dtype))
    lengths = [*range(1, 70), 1000, 1001]
    offsets = [sum(lengths[:i]) for i in range(len(lengths))]
    pieces = [leaf(whole[o : o + n]) for o, n in zip(offsets, lengths, strict=True)]
    one = fastopt.SGD([whole], **FULL)
    many = fastopt.SGD(pieces, **FULL, **FLAGS[flag])
    for step in (1, 2):
        grad = values(size, dtype, seed=50 + step)
        whole.grad = grad
        for piece, o, n in zip(pieces, offsets, lengths, strict=True):
            piece.grad = grad[o : o + n].clone()
        one.step()
        many.step()
    for piece, o, n in zip(pieces, offsets, lengths, strict=True):
        assert_same_bits(piece, whole[o : o + n])
        assert_same_bits(
            many.state[piece]["momentum_buffer"],
            one.state[whole]["momentum_buffer"][o : o + n],
        )


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_every_half_value_takes_a_step(dtype: torch.dtype) -> None:
    # All 65,536 bit patterns as parameter: conversions of subnormal, infinite and NaN values, and
    # the rounding back (lr 1 and a gradient of a quarter: ties, carries, overflow to infinity).
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for lr, factor in ((0.0, 1.0), (1.0, 0.25), (1.0, -1.0)):
        param, stock = leaf(patterns), leaf(patterns)
        exact = leaf(patterns.double())
        grad = patterns * factor
        for p, make in ((param, fastopt.SGD), (stock, for_loop), (exact, for_loop)):
            p.grad = grad.to(p.dtype)
            make([p], lr=lr).step()
        # One product and one sum of half values are exact in float64: the for-loop, which also
        # computes this step in float32 and rounds once, and float64 have to agree with ours.
        assert_same_bits(param, stock, f"lr {lr} factor {factor}")
        assert_same_bits(param, exact.detach().to(dtype), f"lr {lr} factor {factor}, float64")


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    dtype=st.sampled_from(HALF_DTYPES),
    sizes=st.lists(st.integers(0, 100), min_size=1, max_size=6),
    lr=st.floats(0, 1),
    momentum=st.one_of(st.just(0.0), st.floats(0, 1)),
    dampening=st.floats(0, 1),
    weight_decay=st.one_of(st.just(0.0), st.floats(0, 1)),
    maximize=st.booleans(),
    steps=st.integers(1, 4),
)
def test_half_dtypes_with_any_options_are_as_accurate(
    dtype: torch.dtype,
    sizes: list[int],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    maximize: bool,
    steps: int,
) -> None:
    ours, theirs, exact = half_and_exact(
        dtype,
        sizes,
        steps,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        maximize=maximize,
    )
    for i in range(len(sizes)):
        assert_as_accurate(ours.params[i], theirs.params[i], exact.params[i], f"param {i}")
        if exact.buffers[i] is not None:
            assert_as_accurate(ours.buffers[i], theirs.buffers[i], exact.buffers[i], f"buffer {i}")


# --- several dtypes, several groups --------------------------------------------------------------


def test_all_dtypes_in_one_optimizer() -> None:
    dtypes = [DTYPES[i % 4] for i in range(24)]
    params = [leaf(values(50 + i, dtype, seed=i)) for i, dtype in enumerate(dtypes)]
    together = fastopt.SGD([leaf(p) for p in params], **FULL)
    history = train(together)
    for i, p in enumerate(params):
        # A parameter's step does not depend on its company.
        alone = fastopt.SGD([leaf(p)], **FULL)
        for step in range(3):
            q = all_params(alone)[0]
            q.grad = values(q.shape, q.dtype, seed=1000 * (step + 1) + i + 1)
            alone.step()
            assert_same_bits(q, history[step].params[i])
    exact = [i for i, dtype in enumerate(dtypes) if dtype in EXACT_DTYPES]
    theirs = train(for_loop([leaf(p) for p in params], **FULL))
    for mine, stock in zip(history, theirs, strict=True):
        for i in exact:
            assert_same_bits(mine.params[i], stock.params[i])
            assert_same_bits(mine.buffers[i], stock.buffers[i])


def test_every_option_in_its_own_group() -> None:
    def groups() -> list[dict[str, Any]]:
        return [
            {"params": [leaf(values(n, dtype, seed=n)) for n in SMALL_SIZES], **options}
            for dtype in EXACT_DTYPES
            for options in OPTIONS.values()
        ]

    assert_same_history(train(fastopt.SGD(groups(), lr=1.0)), train(for_loop(groups(), lr=1.0)))


def test_one_group_per_parameter() -> None:
    def groups() -> list[dict[str, Any]]:
        return [
            {"params": [leaf(values(37, seed=i))], "lr": 0.01 * i, "weight_decay": 0.001 * i}
            for i in range(200)
        ]

    assert_same_history(
        train(fastopt.SGD(groups(), momentum=0.9)), train(for_loop(groups(), momentum=0.9))
    )


@pytest.mark.stock
@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="torch has no grad_dtype yet")
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_another_dtype_does_what_the_for_loop_does(
    dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    if dtype == grad_dtype:
        return

    def attempt(make: Any) -> Any:
        p = leaf(values(70, dtype))
        p.grad_dtype = grad_dtype
        optimizer = make([p], **DAMPED)
        for step in (1, 2):
            p.grad = values(70, grad_dtype, seed=step)
            optimizer.step()
        return optimizer

    ours, theirs = outcome(lambda: attempt(fastopt.SGD)), outcome(lambda: attempt(for_loop))
    if isinstance(theirs, torch.optim.SGD):
        assert_same_state(ours, theirs)
    else:
        assert ours == theirs


# --- whole trainings -----------------------------------------------------------------------------


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 33), torch.nn.BatchNorm1d(33), torch.nn.ReLU(), torch.nn.Linear(33, 10)
    )


def losses_of(make: Any, steps: int, dtype: torch.dtype, **options: Any) -> list[float]:
    net = network().to(dtype)
    optimizer = make(net.parameters(), **options)
    losses = []
    for step in range(steps):
        x, y = values((32, 64), dtype, seed=step % 4), torch.arange(32) % 10
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("option", OPTIONS)
def test_a_training_in_float32_has_the_for_loops_losses_exactly(option: str) -> None:
    options = {**OPTIONS[option], "lr": 0.01}
    ours = losses_of(fastopt.SGD, 8, torch.float32, **options)
    theirs = losses_of(for_loop, 8, torch.float32, **options)
    assert ours == theirs
    # Step 4 sees the batch of step 0 again.
    assert (ours[4] < ours[0]) != options["maximize"]


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_a_training_in_half_precision_learns(dtype: torch.dtype) -> None:
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": True}
    ours = losses_of(fastopt.SGD, 25, dtype, **options)
    exact = losses_of(for_loop, 25, torch.float64, **options)
    assert ours[-1] < 0.5 * ours[0] and exact[-1] < 0.5 * exact[0]
