"""Both faces on a GPU: what only hardware can show. `make gpu-test` runs this file and, on the GPU
as default device, the tests of cross_entropy's values; once for each family of kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastopt
import fastopt.backends
from accuracy import assert_as_accurate, assert_same_bits
from child import run_python
from cross_entropy_cases import (
    DTYPES,
    EVERYTHING,
    NAMED_SHAPES,
    check,
    check_options,
    differentiate,
    dtype_name,
    exact,
    make_logits,
    make_probabilities,
    make_target,
    random_upstream,
)
from fastopt import selfcheck

pytestmark = pytest.mark.gpu
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
MB = 2**20


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(before)


@pytest.fixture
def no_host_sync() -> Iterator[None]:
    """Waiting for the GPU raises; warm up first, as a first call may compile or load kernels."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(mode)


def loss_and_gradient(logits: Tensor, target: Tensor, **keywords: object) -> tuple[Tensor, Tensor]:
    result = differentiate(fastopt.cross_entropy, logits, target, **keywords)
    return result.loss, result.gradients["logits"]


# -- cross_entropy ----------------------------------------------------------------------------------


def test_our_kernels_serve() -> None:
    family = fastopt.backends.GPU_FAMILY
    assert family == (fastopt.backends.BACKEND or family) and family in ("cuda", "triton")
    logits = make_logits((256, 32000), torch.bfloat16).requires_grad_()
    loss = fastopt.cross_entropy(logits, make_target(logits))
    assert "_LossBackward" in type(loss.grad_fn).__name__


@pytest.mark.parametrize("op, dtype", selfcheck.EVERY, ids=str)
def test_kernels_pass_their_own_check(
    op: str, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert selfcheck.examine(op, dtype, torch.cuda.current_device()) == ""
    assert selfcheck.known(op, dtype, torch.cuda.current_device()) == ""


@each_dtype
@pytest.mark.parametrize("classes", [1, 2, 3, 31, 32, 33, 1000, 4096, 50257, 128256, 151936])
def test_classes(classes: int, dtype: torch.dtype) -> None:
    logits = make_logits((9, classes), dtype)
    check_options(logits, EVERYTHING)
    check(logits, make_target(logits), reduction="none", upstream=random_upstream)


@each_dtype
def test_the_most_classes(dtype: torch.dtype) -> None:
    logits = make_logits((3, 2**20), dtype)
    check(logits, make_target(logits))
    check(logits, make_target(logits), reduction="none", upstream=random_upstream)


# Without a batch torch answers on GPUs.
WITH_BATCH = {name: shape for name, shape in NAMED_SHAPES.items() if len(shape) > 1}


@pytest.mark.parametrize("shape", WITH_BATCH.values(), ids=WITH_BATCH)
def test_every_run_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    logits = make_logits(shape, torch.bfloat16)
    target, keywords = EVERYTHING.apply(logits, make_target(logits))
    first = loss_and_gradient(logits, target, **keywords)
    for _ in range(5):
        for again, before in zip(loss_and_gradient(logits, target, **keywords), first, strict=True):
            assert_same_bits(again, before)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_host_never_waits(reduction: str, request: pytest.FixtureRequest) -> None:
    logits = make_logits((64, 5000), torch.bfloat16)
    target = make_target(logits)
    weight = torch.rand(5000, dtype=torch.bfloat16)

    def step() -> None:
        for upstream in (torch.ones_like, lambda loss: torch.full_like(loss, 0.5)):
            keywords = {"weight": weight, "ignore_index": 3, "label_smoothing": 0.1}
            differentiate(
                fastopt.cross_entropy,
                logits,
                target,
                upstream,
                reduction=reduction,
                **keywords,
            )

    step()
    request.getfixturevalue("no_host_sync")
    step()


@pytest.mark.parametrize("shape", [(128, 10), (33, 50257), (4, 131072), (2, 21, 31, 33)])
def test_a_cuda_graph_replays_forward_and_backward(shape: tuple[int, ...]) -> None:
    logits = make_logits(shape, torch.bfloat16).requires_grad_()
    target = make_target(logits)
    scale = torch.tensor(1.0)

    def step() -> Tensor:
        logits.grad = None
        loss = fastopt.cross_entropy(logits, target, ignore_index=2)
        (loss * scale).backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    gradient = logits.grad
    for seed in (5, 6):
        with torch.no_grad():
            logits.copy_(make_logits(shape, torch.bfloat16, seed=seed))
        target.copy_(make_target(logits, seed=seed))
        scale.fill_(seed / 4)
        graph.replay()
        replayed = loss.clone(), gradient.clone()
        logits.grad = None
        eager = fastopt.cross_entropy(logits, target, ignore_index=2)
        (eager * scale).backward()
        assert_same_bits(replayed[0], eager.detach())
        assert_same_bits(replayed[1], logits.grad)


@pytest.mark.parametrize("label", [-1, 7, 2**40, -(2**62)])
@pytest.mark.parametrize("shape", [(40, 7), (5, 70000), (2, 7, 11, 3)])
def test_labels_out_of_range_give_nan(shape: tuple[int, ...], label: int) -> None:
    logits = make_logits(shape)
    target = make_target(logits)
    if label == 7 and shape[1] != 7:
        label = shape[1]
    target[0] = label
    for reduction in ("mean", "sum", "none"):
        loss, gradient = loss_and_gradient(logits, target, reduction=reduction)
        wrong = (target == label) if reduction == "none" else torch.ones_like(loss, dtype=bool)
        assert torch.equal(loss.isnan(), wrong)
        if reduction != "mean":
            rows = (target == label).unsqueeze(1).expand(logits.shape)
            assert torch.equal(gradient.isnan(), rows)
    torch.cuda.synchronize()  # no assertion of the device, no illegal access


def test_debug_mode_raises_index_error() -> None:
    program = """
import torch, fastopt
logits = torch.randn(300, 7, device="cuda")
target = torch.randint(7, (300,), device="cuda")
fastopt.cross_entropy(logits, target)
target[5] = 7
try:
    fastopt.cross_entropy(logits, target)
except IndexError as error:
    print(error)
"""
    output = run_python(program, FASTOPT_DEBUG="1", FASTOPT_ALWAYS="1")
    assert output.strip() == "Target 7 is out of bounds."


@pytest.mark.parametrize("elements", [2**31, 2**32], ids=["2^31", "2^32"])
@pytest.mark.parametrize("classes", [10, 50257])
def test_more_elements_than_32_bits_count(elements: int, classes: int) -> None:
    rows = elements // classes + 2
    logits = torch.empty(rows, classes, dtype=torch.bfloat16)
    logits.normal_()
    target = torch.randint(classes, (rows,))
    leaf = logits.requires_grad_()
    loss = fastopt.cross_entropy(leaf, target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    wrap = 2**31 // classes
    for part in (slice(0, 4), slice(wrap - 2, wrap + 3), slice(rows - 4, rows)):
        some = logits.detach()[part]
        stock = differentiate(F.cross_entropy, some, target[part], reduction="sum")
        oracle = exact(differentiate, some, target[part], reduction="sum")
        assert_as_accurate(
            gradient[part],
            stock.gradients["logits"],
            oracle.gradients["logits"],
            f"gradient of rows {part}",
        )
    at_a_time = 2**27 // classes
    parts = zip(logits.detach().split(at_a_time), target.split(at_a_time), strict=True)
    total = sum(F.cross_entropy(x.double(), y, reduction="sum") for x, y in parts)
    assert math.isclose(loss.double().item(), total.item(), rel_tol=2**-8)


def test_positions_past_32_bits() -> None:
    logits = torch.empty(1, 5, 2**29 + 8, dtype=torch.bfloat16).normal_()
    target = torch.randint(5, (1, 2**29 + 8))
    leaf = logits.requires_grad_()
    loss = fastopt.cross_entropy(leaf, target, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    some, labels = logits.detach()[..., -9:].contiguous(), target[..., -9:].contiguous()
    stock = differentiate(F.cross_entropy, some, labels, reduction="sum")
    oracle = exact(differentiate, some, labels, reduction="sum")
    expected = stock.gradients["logits"], oracle.gradients["logits"]
    assert_as_accurate(gradient[..., -9:].contiguous(), *expected, "gradient")


@pytest.mark.parametrize("shape", [(4096, 32000), (512, 128256), (8, 21, 256, 256)])
def test_peak_memory_is_one_gradient(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    fastopt.cross_entropy(logits, target).backward()
    logits.grad = None
    # What was asked for: the allocator hands out whole blocks, up to 1 MB larger.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    fastopt.cross_entropy(logits, target).backward()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    beyond = peak - before - logits.nbytes
    assert beyond <= MB, f"{beyond / MB:.2f} MB beyond the gradient"


def test_a_side_stream_is_respected() -> None:
    logits = make_logits((64, 50257), torch.bfloat16)
    target = make_target(logits)
    expected = loss_and_gradient(logits, target)
    stream = torch.cuda.Stream()
    blank = torch.zeros_like(logits)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # the logits come late, and only on this stream
        late = blank.copy_(logits)
        results = loss_and_gradient(late, target)
    stream.synchronize()
    for ours, right in zip(results, expected, strict=True):
        assert_same_bits(ours, right)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one() -> None:
    logits = make_logits((64, 1000)).to("cuda:1")
    target = make_target(logits)
    check(logits, target)
    assert torch.cuda.current_device() == 0


def test_compiled_without_graph_breaks() -> None:
    logits = make_logits((256, 5000), torch.bfloat16)
    target = make_target(logits)
    compiled = torch.compile(fastopt.cross_entropy, fullgraph=True)
    ours = differentiate(compiled, logits, target)
    eager = differentiate(fastopt.cross_entropy, logits, target)
    assert_same_bits(ours.loss, eager.loss)
    assert_same_bits(ours.gradients["logits"], eager.gradients["logits"])


@pytest.mark.parametrize("target_kind", ["labels", "probabilities"])
def test_autocast_gives_the_dtypes_of_stock(target_kind: str) -> None:
    logits = make_logits((64, 1000), torch.bfloat16)
    target = make_target(logits) if target_kind == "labels" else make_probabilities(logits)
    weight = torch.rand(1000)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for reduction in ("mean", "sum", "none"):
            keywords = {"weight": weight, "reduction": reduction}
            ours = differentiate(fastopt.cross_entropy, logits, target, **keywords)
            stock = differentiate(F.cross_entropy, logits, target, **keywords)
            assert ours.loss.dtype == stock.loss.dtype
            assert ours.gradients["logits"].dtype == stock.gradients["logits"].dtype


# -- SGD --------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampened": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
}
SIZES = [(1,), (7,), (64, 3, 3, 3), (1000,), (1023, 513), (2**22 + 3,)]


def make_params(dtype: torch.dtype, sizes: list[tuple[int, ...]] = SIZES) -> list[Tensor]:
    return [torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def bring_gradients(groups: list[list[Tensor]], seed: int) -> None:
    """The same gradients for the parameters of every optimizer, each in its dtype."""
    torch.manual_seed(seed)
    for params in zip(*groups, strict=True):
        gradient = torch.randn(params[0].shape, dtype=torch.float64).to(params[0].dtype)
        for param in params:
            param.grad = gradient.to(param.dtype)


@each_dtype
@pytest.mark.parametrize("option", OPTIONS)
def test_sgd_trains_as_torch(option: str, dtype: torch.dtype) -> None:
    ours = make_params(dtype)
    stock = [param.detach().clone().requires_grad_() for param in ours]
    goal = [param.detach().to(torch.float64, copy=True).requires_grad_() for param in ours]
    options = {"lr": 0.05, **OPTIONS[option]}
    optimizers = [
        fastopt.SGD(ours, **options),
        torch.optim.SGD(stock, **options, foreach=False),
        torch.optim.SGD(goal, **options, foreach=False),
    ]
    for step in range(4):
        bring_gradients([ours, stock, goal], step)
        gradients = [param.grad.clone() for param in ours]
        for optimizer in optimizers:
            optimizer.step()
        for param, before in zip(ours, gradients, strict=True):
            assert_same_bits(param.grad, before, "a gradient after the step")
    for mine, theirs, right in zip(ours, stock, goal, strict=True):
        assert_as_accurate(mine, theirs, right, f"parameter {tuple(mine.shape)}")


def test_sgd_float32_has_the_bits_of_the_cpu() -> None:
    on_gpu = make_params(torch.float32)
    on_cpu = [param.detach().cpu().requires_grad_() for param in on_gpu]
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    optimizers = [fastopt.SGD(on_gpu, **options), fastopt.SGD(on_cpu, **options)]
    for step in range(3):
        bring_gradients([on_gpu], step)
        for param, twin in zip(on_gpu, on_cpu, strict=True):
            twin.grad = param.grad.cpu()
        for optimizer in optimizers:
            optimizer.step()
    for param, twin in zip(on_gpu, on_cpu, strict=True):
        assert_same_bits(param.detach().cpu(), twin.detach())


def launches(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profile.events())


def test_sgd_updates_161_tensors_in_one_launch() -> None:
    params = make_params(torch.float32, [(64, 7)] * 161)
    optimizer = fastopt.SGD(params, lr=0.1, momentum=0.9)
    for step in range(3):
        bring_gradients([params], step)
        optimizer.step()
    # Triton's table travels as a copy.
    assert launches(optimizer.step) == (1 if fastopt.backends.GPU_FAMILY == "cuda" else 2)


def test_sgd_never_waits(request: pytest.FixtureRequest) -> None:
    params = make_params(torch.bfloat16)
    optimizer = fastopt.SGD(params, lr=torch.tensor(0.1), momentum=0.9, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    for step in range(2):
        bring_gradients([params], step)
        optimizer.step()
    request.getfixturevalue("no_host_sync")
    optimizer.step()


def test_sgd_in_a_cuda_graph_follows_a_scheduled_lr() -> None:
    ours = make_params(torch.float32)
    stock = [param.detach().clone().requires_grad_() for param in ours]
    lr = torch.tensor(0.1)
    optimizer = fastopt.SGD(ours, lr=lr, momentum=0.9, weight_decay=0.01)
    reference = torch.optim.SGD(stock, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False)
    bring_gradients([ours, stock], 0)
    optimizer.step()
    reference.step()
    graph = torch.cuda.CUDAGraph()
    static = [param.grad for param in ours]
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in (1, 2, 3):
        bring_gradients([stock], step)
        for buffer, param in zip(static, stock, strict=True):
            buffer.copy_(param.grad)
        lr.fill_(0.1 / step)
        reference.param_groups[0]["lr"] = 0.1 / step
        graph.replay()
        reference.step()
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def replay(graph: torch.cuda.CUDAGraph, mine: list[Tensor], twin: torch.optim.SGD) -> None:
    """Three steps of a captured optimizer and of its twin on the same gradients."""
    theirs = twin.param_groups[0]["params"]
    for step in range(3):
        bring_gradients([theirs], 10 + step)
        for param, other in zip(mine, theirs, strict=True):
            param.grad.copy_(other.grad)
        graph.replay()
        twin.step()
    for param, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_sgd_captured_without_a_step_before(loaded: bool, deterministic: bool) -> None:
    """The captured step is a parameter's first once, or goes on from the momentum loaded before."""
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    warm = make_params(torch.float32)  # compiles Triton's kernels
    bring_gradients([warm], 0)
    fastopt.SGD(warm, **options).step()
    ours = make_params(torch.float32)
    stock = [param.detach().clone().requires_grad_() for param in ours]
    optimizer, twin = fastopt.SGD(ours, **options), torch.optim.SGD(stock, **options)
    bring_gradients([ours, stock], 0)
    if loaded:
        twin.step()
        with torch.no_grad():
            for param, other in zip(ours, stock, strict=True):
                param.copy_(other)
        state = {i: {"momentum_buffer": twin.state[p]["momentum_buffer"].clone()}
                 for i, p in enumerate(stock)}  # fmt: skip
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    graph = torch.cuda.CUDAGraph()
    torch.use_deterministic_algorithms(deterministic)
    try:
        with torch.cuda.graph(graph):
            optimizer.step()
    finally:
        torch.use_deterministic_algorithms(False)
    replay(graph, ours, twin)


def test_sgd_graphs_outlive_their_optimizer() -> None:
    ours = make_params(torch.float32)
    stock = [param.detach().clone().requires_grad_() for param in ours]
    options = {"lr": 0.1, "momentum": 0.9}
    optimizer, twin = fastopt.SGD(ours, **options), torch.optim.SGD(stock, **options)
    bring_gradients([ours, stock], 0)
    optimizer.step()
    twin.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    buffers = [
        optimizer.state[param]["momentum_buffer"] for param in ours
    ]  # as torch's graphs need
    more = make_params(torch.float32, [(5,)])
    optimizer.add_param_group({"params": more})
    del optimizer
    torch.cuda.synchronize()
    noise = [torch.full((size,), 7) for size in (1, 2, 64, 512)]  # where freed memory was
    replay(graph, ours, twin)
    assert all(bool((values == 7).all()) for values in noise) and len(buffers) == len(ours)


@pytest.mark.parametrize("found_inf", [1.0, 2.0, 0.5])
def test_sgd_skips_a_step_that_overflowed(found_inf: float) -> None:
    for first in (True, False):
        params = make_params(torch.float16, [(1000,), (7,)])
        twin = [param.detach().clone().requires_grad_() for param in params]
        options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
        optimizer = fastopt.SGD(params, **options, fused=True)
        plain = fastopt.SGD(twin, **options)
        if not first:
            bring_gradients([params, twin], 0)
            optimizer.step()
            plain.step()
        for param in params:
            param.grad = torch.full_like(param, math.inf)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        optimizer.found_inf = torch.tensor(0.0)
        bring_gradients([params, twin], 1)
        optimizer.step()
        plain.step()
        for mine, theirs in zip(params, twin, strict=True):
            assert_same_bits(mine.detach(), theirs.detach(), f"first step skipped: {first}")


def test_sgd_of_more_elements_than_32_bits_count() -> None:
    param = torch.zeros(2**32 + 8, dtype=torch.bfloat16).requires_grad_()
    param.grad = torch.ones_like(param)
    fastopt.SGD([param], lr=0.5).step()
    assert param.detach().eq(-0.5).all()


def test_grad_scaler_trains_as_with_torch() -> None:
    results = []
    for make in (fastopt.SGD, torch.optim.SGD):
        torch.manual_seed(0)
        net = torch.nn.Linear(64, 10)
        optimizer = make(net.parameters(), lr=0.1, momentum=0.9, fused=True)
        scaler = torch.amp.GradScaler("cuda")
        for seed in range(5):
            torch.manual_seed(seed)
            data = torch.randn(32, 64)
            with torch.autocast("cuda", dtype=torch.float16):
                loss = F.cross_entropy(net(data), torch.randint(10, (32,)))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([param.detach() for param in net.parameters()])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
