"""fastopt.SGD where a step is more than arithmetic on plain tensors: modes and tracers of torch, views
that hold the negative, memory that parameters share, odd options, odd states, odd subclasses. The
same cases run through torch.optim.SGD's for-loop: results bit for bit, exceptions by class."""

import gc
import weakref
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from child import run_python
from fastopt.sgd import gather
from sgd_oracle import (
    DAMPED,
    DTYPES,
    FULL,
    all_params,
    assert_same_bits,
    assert_same_history,
    for_loop,
    leaf,
    set_grads,
    train,
    values,
)

pytestmark = pytest.mark.stock


def class_or_value(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error)


def assert_same(run: Callable[[Any], Any], what: str = "") -> Any:
    """`run` of an optimizer's class returns tensors, in lists, or whatever else can be compared."""
    ours, theirs = class_or_value(lambda: run(fastopt.SGD)), class_or_value(lambda: run(for_loop))
    compare(ours, theirs, what)
    return theirs


def compare(ours: Any, theirs: Any, what: str) -> None:
    if isinstance(theirs, (list, tuple)):
        assert type(ours) is type(theirs) and len(ours) == len(theirs), what
        for i, (mine, stock) in enumerate(zip(ours, theirs, strict=True)):
            compare(mine, stock, f"{what} {i}")
    elif isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor), (what, ours)
        assert_same_bits(ours.detach().resolve_neg(), theirs.detach().resolve_neg(), what)
    else:
        assert ours == theirs, what


# --- modes and tracers ---------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("where", ["gradient", "parameter", "buffer"])
def test_forward_mode_tangents(where: str, momentum: float) -> None:
    def run(make: Any) -> Any:
        with fwd.dual_level():
            p, g, b = (values(30, seed=i) for i in range(3))
            if where == "parameter":
                p = fwd.make_dual(p, values(30, seed=3))
            if where == "gradient":
                g = fwd.make_dual(g, values(30, seed=3))
            if where == "buffer":
                b = fwd.make_dual(b, values(30, seed=3))
            optimizer = make([p], lr=0.1, momentum=momentum, weight_decay=0.5)
            p.grad = g
            optimizer.state[p]["momentum_buffer"] = b
            optimizer.step()
            return [fwd.unpack_dual(t).tangent for t in (p, b)], p.clone()

    assert_same(run)


def test_jvp_of_a_function_that_steps() -> None:
    def run(make: Any) -> Any:
        def function(grad: Tensor) -> Tensor:
            p = values(9)
            p.grad = grad
            make([p], lr=0.1).step()
            return p

        return torch.func.jvp(function, (values(9, seed=1),), (values(9, seed=2),))

    assert_same(run)


class Dispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Dispatch, Function])
def test_modes_see_the_update(mode: Any) -> None:
    def run(make: Any) -> Any:
        optimizer = make([leaf(values(9))], **DAMPED)
        set_grads(all_params(optimizer), seed=1)
        with mode() as seen:
            optimizer.step()
        return [name for name in seen.seen if "add" in name], all_params(optimizer)

    assert assert_same(run)[0]


@pytest.mark.parametrize("tracer", ["jit.trace", "make_fx", "make_fx before dispatch"])
def test_tracers_record_the_update_and_no_constant(tracer: str) -> None:
    def run(make: Any) -> Any:
        def function(p: Tensor, grad: Tensor) -> Tensor:
            p = p * 1
            p.retain_grad()
            p.grad = grad
            make([p], lr=0.5, weight_decay=0.1).step()
            return p * 2

        example = leaf(values(9)), values(9, seed=1)
        if tracer == "jit.trace":
            traced = torch.jit.trace(function, example, check_trace=False)
        else:
            traced = make_fx(function, pre_dispatch="before" in tracer)(*example)
        return traced(leaf(values(9, seed=2)), values(9, seed=3)).detach()

    assert isinstance(assert_same(run), Tensor)


def test_a_default_device_is_no_reason_for_torchs_path() -> None:
    from served import sgd

    optimizer = fastopt.SGD([leaf(values(9))], **DAMPED)
    set_grads(all_params(optimizer), seed=1)
    optimizer.step()
    with torch.device("cpu"), sgd.answered(by_torch=False):
        optimizer.step()


@pytest.mark.parametrize("which", ["parameter", "gradient", "buffer"])
def test_tensors_of_inference_mode_in_mid_training(which: str) -> None:
    def run(make: Any) -> Any:
        params = [leaf(values(n, seed=n)) for n in (9, 8, 7)]
        optimizer = make(params, **DAMPED)
        train(optimizer)
        set_grads(params, seed=9)
        with torch.inference_mode():
            tensor = values(8, seed=4).clone()
        if which == "parameter":
            optimizer.param_groups[0]["params"][1] = tensor
            tensor.grad = values(8)
        elif which == "gradient":
            params[1].grad = tensor
        else:
            optimizer.state[params[1]]["momentum_buffer"] = tensor
        result = class_or_value(optimizer.step)
        return result, params, [optimizer.state[p]["momentum_buffer"] for p in params]

    assert (assert_same(run)[0] is None) == (which == "gradient")


# --- views and shared memory ---------------------------------------------------------------------

NEGATIVE: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: torch._neg_view(values((4, 5))),
    "transposed": lambda: torch._neg_view(values((5, 4))).t(),
    "of a complex view": lambda: torch.complex(values((4, 5)), values((4, 5))).conj().imag,
    "packed complex view": lambda: (
        torch.complex(values((4, 5)), values((4, 5))).conj().imag.as_strided((4, 5), (5, 1))
    ),
    "one element": lambda: torch._neg_view(values((1, 1))),
}


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("where", ["parameter", "gradient", "buffer"])
@pytest.mark.parametrize("kind", NEGATIVE)
def test_negative_views(kind: str, where: str, momentum: float) -> None:
    def run(make: Any) -> Any:
        odd = NEGATIVE[kind]()
        tensors = [torch.empty_strided(odd.shape, odd.stride()) for _ in range(3)]
        for i, t in enumerate(tensors):
            t.copy_(values(t.shape, seed=i))
        tensors[["parameter", "gradient", "buffer"].index(where)] = odd
        p, p.grad, b = tensors[0], tensors[1], tensors[2]
        optimizer = make([p], lr=0.5, momentum=momentum, weight_decay=0.1)
        optimizer.state[p]["momentum_buffer"] = b
        optimizer.step()
        return [t.clone() for t in tensors], [t.is_neg() for t in tensors]

    assert_same(run)


def conjugates(make: Any, where: str) -> Any:
    p, g = (torch.complex(values(9, seed=i), values(9, seed=i + 1)) for i in (1, 2))
    p, g = (p.conj(), g) if where == "parameter" else (p, g.conj())
    q = leaf(values(7))
    p.grad, q.grad = g, values(7, seed=5)
    optimizer = make([p, q], lr=0.5, momentum=0.5)
    optimizer.step()
    optimizer.step()
    return torch.view_as_real(p.resolve_conj()), q


@pytest.mark.parametrize("where", ["parameter", "gradient"])
def test_conjugate_views(where: str) -> None:
    assert_same(lambda make: conjugates(make, where))


def sparse_beside(base: Tensor) -> Any:
    index = torch.tensor([[0, 3, 3]])
    return [base, base.detach()], [
        values(base.shape, seed=1),
        torch.sparse_coo_tensor(index, values((3, base.shape[1]), seed=2), base.shape),
    ]


SHARED: dict[str, Callable[[Tensor], Any]] = {
    "dense, sparse": sparse_beside,
    "sparse, dense": lambda base: tuple(t[::-1] for t in sparse_beside(base)),
    "whole, columns": lambda base: (
        [base, base[:, :4]],
        [values(base.shape, seed=1), values((8, 4), seed=2)],
    ),
    "columns, whole": lambda base: (
        [base[:, :4], base],
        [values((8, 4), seed=2), values(base.shape, seed=1)],
    ),
    "a gradient is another's columns": lambda base: (
        [base[:4], values((8, 8), seed=5)[:, ::2][:4]],
        [values((4, 8), seed=1), base[:4, :4]],
    ),
    "of a subclass": lambda base: (
        [base[:4].as_subclass(Odd), base],
        [values((4, 8), seed=1), values((8, 8), seed=2)],
    ),
    "between others": lambda base: (
        [values(9), base, values(9), base[:, 4:], values(9), base, values(9)],
        [values(n, seed=i) for i, n in enumerate((9, (8, 8), 9, (8, 4), 9, (8, 8), 9))],
    ),
}


class Odd(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:.*(S|s)parse.*")
@pytest.mark.parametrize("groups", ["one", "one each"])
@pytest.mark.parametrize("options", [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}], ids=str)
@pytest.mark.parametrize("case", SHARED)
def test_shared_memory_is_updated_in_torchs_order(case: str, options: Any, groups: str) -> None:
    def run(make: Any) -> Any:
        base = values((8, 8), seed=7).clone()
        params, grads = SHARED[case](base)
        params = [p.detach().requires_grad_() for p in params]
        parts = [{"params": params}] if groups == "one" else [{"params": [p]} for p in params]
        optimizer = make(parts, **options)
        for _ in range(3):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.detach() if grad.is_sparse else grad.detach().clone()
            optimizer.step()
        return base, [p.detach().as_subclass(Tensor) for p in params]

    assert isinstance(assert_same(run, case)[0], Tensor)


# --- options -------------------------------------------------------------------------------------

ODD_NUMBERS: dict[str, Callable[[], Any]] = {
    "true": lambda: True,
    "false": lambda: False,
    "0-d tensor": lambda: torch.tensor(0.25),
    "1-d tensor": lambda: torch.tensor([0.25]),
    "2-d tensor": lambda: torch.tensor([[0.25]]),
    "float64 tensor": lambda: torch.tensor(0.3, dtype=torch.float64),
    "bfloat16 tensor": lambda: torch.tensor(0.3, dtype=torch.bfloat16),
    "integer tensor": lambda: torch.tensor(1),
    "bool tensor": lambda: torch.tensor(True),
    "parameter": lambda: nn.Parameter(torch.tensor(0.25), requires_grad=False),
    "negative view": lambda: torch._neg_view(torch.tensor(-0.25)),
    "fraction": lambda: Fraction(1, 10),
    "decimal": lambda: Decimal("0.1"),
    "complex": lambda: 0.5 + 0.5j,
    "string": lambda: "0.1",
    "none": lambda: None,
    "2**53 + 1": lambda: 2**53 + 1,
    "2**63": lambda: 2**63,
    "2**64": lambda: 2**64,
    "10**400": lambda: 10**400,
    "1e300": lambda: 1e300,
    "inf": lambda: float("inf"),
    "nan": lambda: float("nan"),
    "subnormal": lambda: 1e-310,
    **{
        f"np.{kind}": lambda kind=kind: getattr(np, kind)(0.3)
        for kind in ("float16", "float32", "float64", "longdouble", "bool_")
    },
    **{
        f"np.{kind}": lambda kind=kind: getattr(np, kind)(1)
        for kind in ("int8", "uint8", "int16", "int32", "int64", "uint64")
    },
    "np.array": lambda: np.array(0.5),
    "np.array float32": lambda: np.array(0.5, dtype=np.float32),
    "np.array 1-d": lambda: np.array([0.5]),
}


class Doubled(float):
    """A float with an opinion."""

    def __neg__(self) -> float:
        return -2 * float(self)

    def __rsub__(self, other: Any) -> float:
        return float(other) - 2 * float(self)


ODD_NUMBERS["float subclass"] = lambda: Doubled(0.25)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay"])
@pytest.mark.parametrize("kind", ODD_NUMBERS)
def test_odd_options(kind: str, name: str) -> None:
    for nesterov in (False, True):
        for dtype in (torch.float32, torch.float64):

            def run(make: Any, dtype: torch.dtype = dtype, nesterov: bool = nesterov) -> Any:
                param = leaf(values(7, dtype))
                optimizer = make([param], lr=0.1, momentum=0.9)
                optimizer.param_groups[0].update({name: ODD_NUMBERS[kind](), "nesterov": nesterov})
                for step in range(3):
                    param.grad = values(7, dtype, seed=step)
                    optimizer.step()
                return param

            assert_same(run, f"{dtype} {nesterov}")


@pytest.mark.parametrize("flag", [0, 1, "", "yes", None, np.bool_(True), torch.tensor(True), [0]])
@pytest.mark.parametrize("name", ["nesterov", "maximize"])
def test_odd_flags(name: str, flag: Any) -> None:
    def run(make: Any) -> Any:
        optimizer = make([leaf(values(7))], lr=0.1, momentum=0.9)
        optimizer.param_groups[0][name] = flag
        train(optimizer, by_torch=None)
        return all_params(optimizer)

    assert_same(run)


@pytest.mark.parametrize("key", ["lr", "momentum", "foreach", "fused", "nesterov", "params"])
def test_groups_without_a_key(key: str) -> None:
    def run(make: Any) -> Any:
        params = [leaf(values(7)), leaf(values(9))]
        optimizer = make([{"params": [p]} for p in params], **DAMPED)
        set_grads(params, seed=1)
        del optimizer.param_groups[1][key]
        return class_or_value(optimizer.step), params

    assert assert_same(run)[0] is KeyError


def as_generator(group: Any) -> None:
    params = group["params"]
    group["params"] = (p for p in params)


CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "generator": as_generator,
    "tuple": lambda group: group.update(params=tuple(group["params"])),
    "dict": lambda group: group.update(params=dict.fromkeys(group["params"])),
    "tensor": lambda group: group.update(params=leaf(values((3, 4)))),
    "number": lambda group: group.update(params=3),
    "numbers": lambda group: group.update(params=[3]),
    "none inside": lambda group: group["params"].insert(1, None),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("container", CONTAINERS)
def test_params_in_any_container(container: str) -> None:
    def run(make: Any) -> Any:
        params = [leaf(values(n)) for n in (5, 6, 7)]
        optimizer = make(params, **DAMPED)
        set_grads(params, seed=1)
        CONTAINERS[container](optimizer.param_groups[0])
        results = [class_or_value(optimizer.step) for _ in range(2)]
        return results, params, len(optimizer.state)

    assert_same(run)


# --- the scale of a GradScaler -------------------------------------------------------------------


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


# --- parameters, states, subclasses --------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("used", [True, False])
def test_lazy_modules_that_have_not_run(used: bool, momentum: float) -> None:
    def run(make: Any) -> Any:
        torch.manual_seed(0)
        net = nn.ModuleDict({"later": nn.LazyLinear(3), "used": nn.Linear(4, 3)})
        optimizer = make(net.parameters(), lr=0.1, momentum=momentum)
        history = []
        for step in range(4):
            optimizer.zero_grad()
            if used:
                net["used"](values((2, 4), seed=step)).sum().backward()
            if step >= 2:
                torch.manual_seed(1)
                net["later"](values((2, 4), seed=step)).sum().backward()
            optimizer.step()
            history.append([p.detach().clone() for p in net["used"].parameters()])
        return history, list(net["later"].parameters())

    assert isinstance(assert_same(run)[0][0][0], Tensor)


class Forgetful(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        return None


STATES: dict[str, Callable[[Any], Any]] = {
    "list": lambda o: o.state.update({all_params(o)[1]: [1, 2]}),
    "none": lambda o: o.state.update({all_params(o)[1]: None}),
    "user dict": lambda o: o.state.update({all_params(o)[1]: UserDict()}),
    "ordered": lambda o: o.state.update({all_params(o)[1]: OrderedDict(o.state[all_params(o)[1]])}),
    "with missing": lambda o: o.state.update({all_params(o)[1]: Forgetful()}),
    "plain dict": lambda o: setattr(o, "state", dict(o.state)),
    "empty plain dict": lambda o: setattr(o, "state", {}),
    "other factory": lambda o: setattr(
        o, "state", defaultdict(lambda: {"momentum_buffer": torch.ones(6)})
    ),
    "no factory": lambda o: setattr(o, "state", defaultdict(None)),
    "strange keys": lambda o: o.state.update({"mine": {"x": 1}, 3: 4}),
    "another's": lambda o: o.state.update({leaf(values(3)): {"momentum_buffer": values(3)}}),
    "moved to the end": lambda o: o.state.update({(p := all_params(o)[0]): o.state.pop(p)}),
    "popped": lambda o: o.state.pop(all_params(o)[0]),
}


@pytest.mark.parametrize("momentum", [0.5, 0])
@pytest.mark.parametrize("kind", STATES)
def test_states_that_torch_did_not_make(kind: str, momentum: float) -> None:
    def run(make: Any) -> Any:
        params = [leaf(values(6, seed=i)) for i in range(3)]
        optimizer = make(params, lr=0.1, momentum=0.9)
        train(optimizer)
        STATES[kind](optimizer)
        optimizer.param_groups[0]["momentum"] = momentum
        results = []
        for step in range(3):
            set_grads(params, seed=step)
            results.append(class_or_value(optimizer.step))
        entries = [optimizer.state.get(p) for p in params]
        buffers = [e.get("momentum_buffer") if isinstance(e, dict) else None for e in entries]
        return results, params, buffers, [len(optimizer.state), type(optimizer.state)]

    assert_same(run)


def halved(base: Any) -> Any:
    class Halved(base):
        def _init_group(self, group: Any, params: Any, grads: Any, buffers: Any) -> Any:
            sparse = super()._init_group(group, params, grads, buffers)
            grads[:] = [g / 2 for g in grads]
            return sparse

    return Halved


def only_first(base: Any) -> Any:
    class OnlyFirst(base):
        def _init_group(self, group: Any, params: Any, grads: Any, buffers: Any) -> Any:
            sparse = super()._init_group(group, params, grads, buffers)
            del params[1:], grads[1:], buffers[1:]
            return sparse

    return OnlyFirst


def named(base: Any) -> Any:
    class Named(base):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)
            for name in ("_plan", "_devices", "_prepare", "_scale", "_kernel_step", "_torch_step"):
                setattr(self, name, "mine")

    return Named


def slotted(base: Any) -> Any:
    class Slotted(base):
        __slots__ = ("extra",)

        def __init__(self, params: Any, **options: Any) -> None:
            self.extra = 1
            super().__init__(params, **options)

    return Slotted


def mixed(base: Any) -> Any:
    class Mixin:
        def step(self, closure: Any = None) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return super().step(closure)

    return type("Mixed", (Mixin, base), {})


def wrapped(base: Any) -> Any:
    """As Horovod's DistributedOptimizer: a class over the optimizer's, with another's __dict__."""

    class _Wrapper(torch.optim.Optimizer):
        def __init__(self, params: Any, **options: Any) -> None:
            super(self.__class__, self).__init__(params, **options)

        def step(self, closure: Any = None) -> Any:
            return super(self.__class__, self).step(closure)

    return type(base.__name__, (base,), dict(_Wrapper.__dict__))


def without_init(base: Any) -> Any:
    """As wrappers that take over an optimizer's attributes."""

    class Taking(base):
        def __init__(self, params: Any, **options: Any) -> None:
            self.__dict__ = base(params, **options).__dict__

    return Taking


SUBCLASSES = [halved, only_first, named, slotted, mixed, wrapped, without_init]


@pytest.mark.parametrize("subclass", SUBCLASSES)
def test_subclasses(subclass: Any) -> None:
    histories = []
    for base in (fastopt.SGD, torch.optim.SGD):
        optimizer = subclass(base)([leaf(values(n, seed=n)) for n in (5, 6, 7)], **FULL)
        history = train(optimizer, by_torch=None)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.add_param_group({"params": [leaf(values(8))]})
        histories.append(history + train(optimizer, by_torch=None))
    assert_same_history(*histories)


def test_an_init_group_of_the_instance() -> None:
    def run(make: Any) -> Any:
        optimizer = make([leaf(values(5))], lr=0.1)
        train(optimizer)
        calls = []
        original = optimizer._init_group
        optimizer._init_group = lambda *a: (calls.append(1), original(*a))[1]
        set_grads(all_params(optimizer), seed=7)
        optimizer.step()
        return len(calls), all_params(optimizer)

    assert assert_same(run)[0] == 1


# --- what is kept alive --------------------------------------------------------------------------


def replace_parameter(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"][0] = leaf(values(30, seed=8))
    optimizer.state.clear()


RELEASES: dict[str, Callable[[Any], Any]] = {
    "state.clear": lambda o: o.state.clear(),
    "state replaced": lambda o: setattr(o, "state", defaultdict(dict)),
    "state popped": lambda o: o.state.pop(all_params(o)[0]),
    "entry replaced": lambda o: o.state.update({all_params(o)[0]: {}}),
    "buffer moved": lambda o: o.state[all_params(o)[0]].update(
        momentum_buffer=o.state[all_params(o)[0]]["momentum_buffer"].clone()
    ),
    "state loaded": lambda o: o.load_state_dict({**o.state_dict(), "state": {}}),
    "zero_grad": lambda o: o.zero_grad(),
    "gradient replaced": lambda o: setattr(all_params(o)[0], "grad", values(30)),
    "group added": lambda o: o.add_param_group({"params": [leaf(values(3))]}),
    "parameter replaced": replace_parameter,
    "parameter removed": lambda o: (o.state.clear(), o.param_groups[0]["params"].pop(0)),
    "groups removed": lambda o: (o.state.clear(), o.param_groups.clear()),
}


@pytest.mark.parametrize("odd", [False, True], ids=["served", "beside torch's path"])
@pytest.mark.parametrize("release", RELEASES)
def test_memory_falls_at_once(release: str, odd: bool) -> None:
    def run(make: Any) -> Any:
        params = [leaf(values(30)), leaf(values(40))]
        if odd:
            params.append(values((4, 6))[:, ::2].requires_grad_())
        optimizer = make(params, **DAMPED)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = values(p.shape, seed=step + i)
            optimizer.step()
        kept = [
            params[0],
            params[0].grad,
            optimizer.state[params[0]]["momentum_buffer"],
        ]
        alive = [weakref.ref(tensor) for tensor in kept]
        del kept, params, p
        gc.collect()
        gc.disable()
        RELEASES[release](optimizer)
        gc.enable()
        return [reference() is None for reference in alive]

    freed = assert_same(run)
    assert any(freed) or release == "group added"


def test_state_follows_its_parameters_by_loading_it_into_itself() -> None:
    net = nn.Linear(4, 3)
    optimizer = fastopt.SGD(net.parameters(), **DAMPED)
    train(optimizer)
    net.double()
    optimizer.load_state_dict(optimizer.state_dict())
    for p in net.parameters():
        assert optimizer.state[p]["momentum_buffer"].dtype is torch.float64
    net.zero_grad()
    train(optimizer)


# --- layouts of objects --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tuples", "types", "tensors", "keys", "none"])
def test_an_unknown_layout_is_left_to_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gather.find_layout() == gather.LAYOUT is not None
    some = torch.empty(1)

    def word(address: int) -> int | None:
        value = gather._read_word(address)
        # As if words of that kind lay elsewhere.
        if kind == "tensors" and value == some._cdata:
            return 0
        if kind == "types" and value == id(nn.Parameter):
            return id(Tensor)
        if kind == "none" and value == id(type(None)):
            return 0
        if kind == "tuples" and value == id(None):
            return 0
        if kind == "keys" and value == gather.dispatch_keys(torch._neg_view(some)):
            return gather.dispatch_keys(some)
        return value

    monkeypatch.setattr(torch, "empty", lambda *a, _empty=torch.empty, **k: (
        some if a == (1,) and not k else _empty(*a, **k)
    ))  # fmt: skip
    assert gather.find_layout(word) is None


def test_python_without_a_lock_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather.sysconfig, "get_config_var", lambda name: int("GIL" in name))
    assert gather.find_layout() is None


def test_steps_under_an_unknown_layout() -> None:
    run_python(
        """
        import sys, types
        import torch
        real = torch._C._dispatch_keys
        torch._C._dispatch_keys = lambda tensor: types.SimpleNamespace(raw_repr=lambda: 12345)
        import fastopt
        from fastopt import __main__ as report
        from fastopt.sgd import gather
        torch._C._dispatch_keys = real
        assert gather.LAYOUT is None
        assert "layout is unknown" in report.sgd_kernel("cpu")
        from sgd_oracle import DAMPED, assert_same_history, for_loop, leaf, train, values
        ours, theirs = (
            train(make([leaf(values(n)) for n in (5, 40)], **DAMPED), by_torch=None)
            for make in (fastopt.SGD, for_loop)
        )
        assert_same_history(ours, theirs)
        """
    )


# --- torch.distributed ---------------------------------------------------------------------------


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


def test_every_dtype_is_among_the_layouts_cases() -> None:
    # Whatever its dtype, a plain tensor has the keys that gather asks for.
    keys = {gather.dispatch_keys(torch.empty(2, dtype=dtype)) for dtype in DTYPES}
    assert keys == {gather._plain_keys(torch.device("cpu"))}
