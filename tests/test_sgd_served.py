"""Who computes a step: our kernels whatever they can take, torch's own path exactly the rest.

Without this a test could pass because stock answered. torch's three implementations are replaced
by one that records its parameters, or that must not be called at all.
"""

import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import fastopt
from accuracy import assert_as_accurate
from child import run_python
from sgd_oracle import (
    DAMPED,
    DTYPES,
    FLAGS,
    FULL,
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
    train,
    values,
)

STOCK = sys.modules["torch.optim.sgd"]
IMPLEMENTATIONS = ("_single_tensor_sgd", "_multi_tensor_sgd", "_fused_sgd")


@pytest.fixture
def stock_params(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The parameters that reach torch's update, in order, from here on."""
    seen: list[Tensor] = []
    for name in IMPLEMENTATIONS:
        original = getattr(STOCK, name)

        def record(params: list[Tensor], *args: Any, _original: Any = original, **kw: Any) -> None:
            seen.extend(params)
            _original(params, *args, **kw)

        monkeypatch.setattr(STOCK, name, record)
    yield seen


def assert_moved(before: list[Tensor], params: list[Tensor]) -> None:
    for old, p in zip(before, params, strict=True):
        assert p.numel() == 0 or not torch.equal(bits(old), bits(p)), p.shape


# --- served --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("lr", ["float", "tensor"])
def test_the_kernels_serve_every_option_dtype_and_size(
    option: str, flag: str, lr: str, stock_params: list[Tensor]
) -> None:
    params = [leaf(values(n, dtype, seed=n)) for n in SMALL_SIZES for dtype in DTYPES]
    options = {**OPTIONS[option], **FLAGS[flag]}
    if lr == "tensor":
        options["lr"] = torch.tensor(options["lr"])
    optimizer = fastopt.SGD(params, **options)
    for step in range(3):
        before = [p.detach().clone() for p in params]
        set_grads(params, seed=step)
        optimizer.step()
        assert_moved(before, params)
    assert stock_params == []


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "offset"])
def test_the_kernels_serve_dense_layouts(layout: str, stock_params: list[Tensor]) -> None:
    def laid_out(seed: int) -> Tensor:
        if layout == "channels_last":
            return values((2, 3, 4, 5), seed=seed).to(memory_format=torch.channels_last)
        if layout == "transposed":
            return values((6, 5), seed=seed).t()
        return values(40, seed=seed)[3:]

    param = laid_out(1).requires_grad_()
    before = param.detach().clone()
    optimizer = fastopt.SGD([param], **DAMPED)
    for seed in (2, 3):
        param.grad = laid_out(seed)
        optimizer.step()
    assert_moved([before], [param])
    assert stock_params == []


def test_the_kernels_serve_ordinary_trainings(stock_params: list[Tensor]) -> None:
    # Autograd's own gradients, groups, a scheduler, late gradients, a grad scaler, a loaded state.
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3),
        torch.nn.BatchNorm2d(3),
        torch.nn.Flatten(),
        torch.nn.Linear(108, 4),
    ).to(memory_format=torch.channels_last)
    for fused in (None, True):
        optimizer = fastopt.SGD(
            [
                {"params": net[0].parameters()},
                {"params": net[1:].parameters(), "weight_decay": 0.1},
            ],
            lr=0.01,
            momentum=0.9,
            fused=fused,
        )
        scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        net[3].requires_grad_(False)
        for step in range(6):
            if step == 2:
                net[3].requires_grad_(True)
            if step == 4:
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            scaler.scale(net(values((2, 1, 8, 8), seed=step)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
    assert stock_params == []


# --- not served ----------------------------------------------------------------------------------


class Tagged(torch.nn.Parameter):
    """A Parameter that is not exactly one."""


class Logged(Tensor):
    """A tensor that wants to see what is done to it."""

    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


def sparse_grad(seed: int) -> Tensor:
    index = torch.tensor([[0, 3, 3]])
    return torch.sparse_coo_tensor(index, values((3, 4), seed=seed), (6, 4))


def with_grads(param: Tensor, *grads: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return param.requires_grad_(), grads


UNSERVED: dict[str, Any] = {
    "sparse": lambda: with_grads(values((6, 4)), sparse_grad(1), sparse_grad(2)),
    "complex64": lambda: with_grads(
        *(torch.complex(values(9, seed=i), values(9, seed=i + 1)) for i in range(3))
    ),
    "complex128": lambda: with_grads(
        *(
            torch.complex(values(9, torch.float64, i), values(9, torch.float64, i + 1))
            for i in (1, 2, 3)
        )
    ),
    "parameter_subclass": lambda: (Tagged(values(20)), (values(20, seed=1), values(20, seed=2))),
    "tensor_subclass": lambda: with_grads(
        values(20).as_subclass(Logged), values(20, seed=1), values(20, seed=2)
    ),
    "grad_subclass": lambda: with_grads(
        values(20), values(20, seed=1).as_subclass(Logged), values(20, seed=2).as_subclass(Logged)
    ),
    "grad_of_other_strides": lambda: with_grads(
        values((6, 5)), values((5, 6), seed=1).t(), values((5, 6), seed=2).t()
    ),
    "not_dense": lambda: with_grads(
        values((6, 10))[:, ::2], values((6, 5), seed=1), values((6, 5), seed=2)
    ),
    "grad_expanded": lambda: with_grads(
        values((6, 5)), values((1, 5), seed=1).expand(6, 5), values((6, 1), seed=2).expand(6, 5)
    ),
    "conjugate_view": lambda: with_grads(
        torch.complex(values(9), values(9)).conj(),
        torch.complex(values(9, seed=1), values(9, seed=2)),
    ),
    "negative_view": lambda: with_grads(
        torch.complex(values(9), values(9)).conj().imag, values(9, seed=1), values(9, seed=2)
    ),
    "negative_grad": lambda: with_grads(
        values(1), torch.complex(values(1), values(1, seed=5)).conj().imag
    ),
    "zero_tensor_grad": lambda: with_grads(values(9), torch._efficientzerotensor(9)),
    "meta": lambda: with_grads(
        torch.empty(9, device="meta"), torch.empty(9, device="meta"), torch.empty(9, device="meta")
    ),
    "int64": lambda: (torch.arange(9), (torch.arange(9), torch.arange(9))),
    "int64_grad_none": lambda: (torch.arange(9), (None,)),
    "bool": lambda: (torch.ones(9, dtype=torch.bool), (torch.ones(9, dtype=torch.bool),)),
    "float8": lambda: (
        values(9).to(torch.float8_e4m3fn),
        (values(9).to(torch.float8_e4m3fn), values(9).to(torch.float8_e4m3fn)),
    ),
    "expanded": lambda: (values(5).expand(4, 5), (values((4, 5)),)),
    "mkldnn": lambda: (values((4, 5)).to_mkldnn(), (values((4, 5)).to_mkldnn(),)),
}
UNSERVED_OPTIONS = {
    name: OPTIONS[name] for name in ("plain", "momentum", "damped_decay", "nesterov_max")
}


@pytest.mark.stock
@pytest.mark.filterwarnings("ignore:.*(Sparse|sparse|complex).*")
@pytest.mark.parametrize("option", UNSERVED_OPTIONS)
@pytest.mark.parametrize("kind", UNSERVED)
def test_what_the_kernels_do_not_serve_takes_torchs_path(
    kind: str, option: str, stock_params: list[Tensor]
) -> None:
    def run(make: Any) -> Any:
        stock_params.clear()
        odd, grads = UNSERVED[kind]()
        before, after = leaf(values(33, seed=3)), leaf(values(35, torch.float64, seed=4))
        optimizer = make([before, odd, after], **UNSERVED_OPTIONS[option])
        for step, grad in enumerate(grads):
            set_grads([before, after], seed=step)
            odd.grad = grad
            optimizer.step()
        reached = sum(p is odd for p in stock_params)
        return optimizer, before, odd, after, reached, len(grads)

    ours, theirs = outcome(lambda: run(fastopt.SGD)), outcome(lambda: run(for_loop))
    if not isinstance(theirs[0], torch.optim.SGD):
        assert ours == theirs
        return
    optimizer, before, odd, after, reached, steps = ours
    stock_optimizer, stock_before, stock_odd, stock_after, *_ = theirs
    assert reached == (0 if kind == "int64_grad_none" else steps)
    for mine, stock in ((before, stock_before), (after, stock_after)):
        assert_same_bits(mine, stock)
        if stock in stock_optimizer.state:
            assert_same_bits(
                optimizer.state[mine]["momentum_buffer"],
                stock_optimizer.state[stock]["momentum_buffer"],
            )
    state, stock_state = optimizer.state.get(odd, {}), stock_optimizer.state.get(stock_odd, {})
    assert list(state) == list(stock_state)
    pairs = [(odd, stock_odd), *zip(state.values(), stock_state.values(), strict=True)]
    for mine, stock in pairs:
        assert (type(mine), mine.layout, mine.device) == (type(stock), stock.layout, stock.device)
        if stock.device.type == "cpu":
            assert torch.equal(plain(mine), plain(stock)), kind


def plain(tensor: Tensor) -> Tensor:
    """Values to compare: dense, resolved, of a type that torch.equal knows."""
    tensor = tensor.detach()
    if tensor.is_mkldnn or tensor.layout is torch.sparse_coo:
        tensor = tensor.to_dense()
    tensor = tensor.as_subclass(Tensor)
    if tensor.dtype is torch.float8_e4m3fn:
        tensor = tensor.float()
    return tensor.resolve_conj().resolve_neg()


@pytest.mark.stock
def test_a_tensor_subclass_sees_the_update(stock_params: list[Tensor]) -> None:
    param = values(20).as_subclass(Logged).requires_grad_()
    param.grad = values(20)
    optimizer = fastopt.SGD([param], **DAMPED)
    Logged.calls.clear()
    optimizer.step()
    assert "add_" in Logged.calls
    assert stock_params[0] is param


@pytest.mark.parametrize("flag", FLAGS)
def test_served_parameters_beside_unserved_ones_are_served(
    flag: str, stock_params: list[Tensor]
) -> None:
    odd = values((6, 10))[:, ::2].requires_grad_()
    params = [leaf(values(40)), odd, leaf(values(50))]
    optimizer = fastopt.SGD(params, **FULL, **FLAGS[flag])
    for step in range(2):
        set_grads(params, seed=step)
        params[1].grad = values((6, 5), seed=step)
        optimizer.step()
    assert len(stock_params) == 2 and all(p is odd for p in stock_params)


@pytest.mark.stock
@pytest.mark.parametrize("option", ["plain", "damped_decay", "nesterov_decay_max"])
def test_unserved_options_take_torchs_path(option: str, stock_params: list[Tensor]) -> None:
    for odd in (
        {"lr": torch.tensor(0.1, requires_grad=True)},
        {"weight_decay": torch.tensor(0.1, requires_grad=True)},
        {"momentum": torch.tensor(0.9)} if option != "plain" else {"momentum": torch.tensor(0.0)},
    ):
        stock_params.clear()
        ours, theirs = (
            make([leaf(values(40))], **{**OPTIONS[option], **odd})
            for make in (fastopt.SGD, for_loop)
        )
        assert_same_history(train(ours, by_torch=True), train(theirs), f"{odd}")
        assert sum(p is all_params(ours)[0] for p in stock_params) == 3


@pytest.mark.stock
@pytest.mark.parametrize("option", ["plain_decay", "damped_decay", "nesterov_decay_max"])
@pytest.mark.parametrize("learned", ["nothing", "lr", "weight_decay"])
def test_differentiable_steps_carry_gradients(
    learned: str, option: str, stock_params: list[Tensor]
) -> None:
    def run(make: Any) -> Any:
        stock_params.clear()
        param, *grads = (values(5, torch.float64, i).requires_grad_() for i in range(3))
        options = dict(OPTIONS[option])
        leaves = [param, *grads]
        if learned != "nothing":
            options[learned] = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
            leaves.append(options[learned])
        moving = param.clone()
        optimizer = make([moving], differentiable=True, foreach=False, **options)
        for grad in grads:
            moving.grad = grad.clone()
            optimizer.step()
        moving.sum().backward()
        return [moving.detach(), *(t.grad for t in leaves)], len(stock_params)

    ours, theirs = outcome(lambda: run(fastopt.SGD)), outcome(lambda: run(torch.optim.SGD))
    if isinstance(theirs[0], type):  # stock cannot learn this option over two steps with momentum
        assert ours == theirs
        return
    assert ours[1] == theirs[1] == 2
    for mine, stock in zip(ours[0], theirs[0], strict=True):
        assert (mine is None) == (stock is None)
        if stock is not None:
            assert_same_bits(mine, stock)


@pytest.mark.stock
def test_differentiable_refuses_leaves_like_stock() -> None:
    def attempt(make: Any) -> Any:
        param = leaf(values(5))
        param.grad = values(5)
        return outcome(make([param], differentiable=True, lr=0.1).step)

    theirs = attempt(torch.optim.SGD)
    assert theirs[0] is RuntimeError
    assert attempt(fastopt.SGD) == theirs


@pytest.mark.stock
def test_inference_mode() -> None:
    def run(make: Any) -> Any:
        with torch.inference_mode():
            param = values(40)
            optimizer = make([param], **DAMPED)
            for seed in (1, 2):
                param.grad = values(40, seed=seed)
                optimizer.step()
        return optimizer

    assert_same_state(run(fastopt.SGD), run(for_loop))


@pytest.mark.stock
def test_inference_gradients_and_buffers() -> None:
    def run(make: Any) -> Any:
        param = leaf(values(40))
        optimizer = make([param], **DAMPED)
        with torch.inference_mode():
            grad, buffer = values(40, seed=1), values(40, seed=2)
        param.grad = grad
        first = outcome(optimizer.step)
        optimizer.state[param]["momentum_buffer"] = buffer
        return first, outcome(optimizer.step), optimizer

    ours, theirs = run(fastopt.SGD), run(for_loop)
    assert ours[:2] == theirs[:2]


@pytest.mark.stock
def test_fake_tensors_are_not_computed() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        param = torch.empty(40, requires_grad=True)
        optimizer = fastopt.SGD([param], **DAMPED)
        for _ in range(2):
            param.grad = torch.empty(40)
            optimizer.step()
        assert optimizer.state[param]["momentum_buffer"].shape == (40,)


# --- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("option", ["plain_decay", "damped_decay", "nesterov_decay_max"])
def test_a_compiled_step_gives_the_same_training(option: str, tensor_lr: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(make: Any, compiled: bool) -> Any:
        options = {**OPTIONS[option]}
        if tensor_lr:
            options["lr"] = torch.tensor(options["lr"])
        optimizer = make([leaf(values(n, seed=n)) for n in (5, 40, 67)], **options)
        scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        history = []
        for i in range(8):
            set_grads(all_params(optimizer), seed=i)
            step()
            scheduler.step()
            history.append([p.detach().clone() for p in all_params(optimizer)])
        return history

    ours = run(fastopt.SGD, compiled=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 2, f"{graphs} graphs in 8 scheduled steps"
    # Compiled as well: older torch takes scaled additions apart when it traces them.
    torch._dynamo.reset()
    theirs = run(for_loop, compiled=True)
    exact = run(
        lambda params, **o: for_loop([leaf(p.double()) for p in params], **o), compiled=False
    )
    for step, (mine, stock, goal) in enumerate(zip(ours, theirs, exact, strict=True)):
        for p, q, r in zip(mine, stock, goal, strict=True):
            if tensor_lr:
                assert_as_accurate(p, q, r, f"step {step}")
            else:
                assert_same_bits(p, q, f"step {step}")


def test_a_compiled_training_loop_with_an_eager_step_inside_and_outside() -> None:
    torch._dynamo.reset()

    def run(make: Any, compiled: bool) -> Any:
        torch.manual_seed(0)
        net = torch.nn.Linear(7, 3)
        optimizer = make(net.parameters(), lr=0.1, momentum=0.9)

        def iteration(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = net(x).square().sum()
            loss.backward()
            optimizer.step()
            return loss.detach()

        call = torch.compile(iteration, backend="eager") if compiled else iteration
        return [call(values((4, 7), seed=i)) for i in range(4)] + [iteration(values((4, 7)))]

    ours = run(fastopt.SGD, True)
    torch._dynamo.reset()
    for mine, stock in zip(ours, run(for_loop, True), strict=True):
        assert_same_bits(mine, stock)


@pytest.mark.parametrize("first", ["import torch", "import fastopt"])
def test_a_process_that_has_compiled_something_steps_as_before(first: str) -> None:
    """Dynamo wraps torch.optim.SGD._init_group; a subclass's own is still heard."""
    run_python(f"""
        {first}
        import torch
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
        assert hasattr(torch.optim.SGD._init_group, "_torchdynamo_orig_callable")
        import fastopt
        from fastopt.sgd import step

        class Own(fastopt.SGD):
            def _init_group(self, *arguments):
                heard.append(self)
                return super()._init_group(*arguments)

        heard, by_group, own_step = [], [], step.by_group
        step.by_group = lambda *call, **more: (by_group.append(call), own_step(*call, **more))
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        for make in (fastopt.SGD, Own):
            optimizer = make([{{"params": [p]}} for p in params], lr=0.25)
            for p in params:
                p.grad = torch.ones(3)
            optimizer.step()
            assert bool(by_group) == bool(heard) == (make is Own)
        assert torch.equal(params[0], torch.full((3,), 0.5))
    """)
