"""fastopt.SGD beside torch's for-loop through random programs: edits of groups, options, parameters,
gradients, state, hooks and modes, and steps between them. After each rule both have to hold the same
bits, and where one raises the other raises the same class of exception.

FASTOPT_MACHINE_S=3600 runs it for an hour, with other programs in every run.
"""

import copy
import os
import pickle
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.autograd.forward_ad as fwd
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
import served
from sgd_oracle import Meddling, assert_same_bits, for_loop, values

pytestmark = [pytest.mark.stock, pytest.mark.filterwarnings("ignore")]

SECONDS = float(os.environ.get("FASTOPT_MACHINE_S", "0"))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def sparse(rows: int, columns: int, seed: int) -> Tensor:
    count = 3 if rows > 0 else 0  # torch would write to rows that are not there
    index = torch.tensor([[0, rows - 1, 0][:count]], dtype=torch.int64)
    return torch.sparse_coo_tensor(index, values((count, columns), seed=seed), (rows, columns))


def inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


# Parameters; `base` is memory that several of them share.
PARAMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "matrix": lambda base, seed: values((6, 4), seed=seed),
    "vector": lambda base, seed: values(33, seed=seed),
    "large": lambda base, seed: values((200, 701), seed=seed),
    "scalar": lambda base, seed: values((), seed=seed),
    "empty": lambda base, seed: values((0, 3), seed=seed),
    "float64": lambda base, seed: values((6, 4), torch.float64, seed),
    "transposed": lambda base, seed: values((4, 6), seed=seed).t(),
    "strided": lambda base, seed: values((6, 8), seed=seed)[:, ::2],
    "complex": lambda base, seed: torch.complex(values(5, seed=seed), values(5, seed=seed + 1)),
    "negative": lambda base, seed: torch._neg_view(values((6, 4), seed=seed)),
    "subclass": lambda base, seed: values((6, 4), seed=seed).as_subclass(Meddling),
    "meta": lambda base, seed: torch.empty(6, 4, device="meta"),
    "integers": lambda base, seed: torch.arange(6),
    "lazy": lambda base, seed: nn.UninitializedParameter(),
    "shared": lambda base, seed: base[:6],
    "shared rows": lambda base, seed: base[3:9],
    "shared columns": lambda base, seed: base[:, 1:3],
    "inference": lambda base, seed: inference(values((6, 4), seed=seed)),
}

# Gradients for a parameter.
GRADS: dict[str, Callable[[Tensor, int], Tensor | None]] = {
    "none": lambda p, seed: None,
    "plain": lambda p, seed: torch.empty_like(p).copy_(values(p.shape, seed=seed)),
    "contiguous": lambda p, seed: values(p.shape, p.dtype, seed=seed),
    "other strides": lambda p, seed: values(p.shape[::-1], p.dtype, seed).permute(
        *range(p.dim())[::-1]
    ),
    "expanded": lambda p, seed: values((), p.dtype, seed).expand(p.shape),
    "sparse": lambda p, seed: sparse(*p.shape, seed),
    "negative": lambda p, seed: torch._neg_view(values(p.shape, p.dtype, seed)),
    "subclass": lambda p, seed: values(p.shape, p.dtype, seed).as_subclass(Meddling),
    "itself": lambda p, seed: p.detach(),
    "inference": lambda p, seed: inference(values(p.shape, p.dtype, seed)),
}

# Other memory for a parameter, whose gradient and buffer stay.
DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": lambda t: t.clone(),
    "other order": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "negative": lambda t: torch._neg_view(t.neg()),
    "float64": lambda t: t.double(),
    "half the rows": lambda t: t[: len(t) // 2],
}

BUFFERS: dict[str, Callable[[Tensor], Any]] = {
    "clone": lambda b: b.clone(),
    "none": lambda b: None,
    "number": lambda b: 1.5,
    "other order": lambda b: b.t().contiguous().t(),
    "strided": lambda b: torch.stack([b, b], -1)[..., 0],
    "negative": lambda b: torch._neg_view(b.clone()),
    "float64": lambda b: b.double(),
    "short": lambda b: b[:1],
    "inference": lambda b: inference(b),
}

OPTIONS: dict[str, list[Any]] = {
    "lr": [0.1, 0.5, 0, 1, torch.tensor(0.25), torch.tensor([0.25]), Fraction(1, 4), None, 2**64],
    "momentum": [0, 0.5, 0.9, 1, True, torch.tensor(0.5), "0.5"],
    "dampening": [0, 0.25, 1, torch.tensor(0.25), 2**60],
    "weight_decay": [0, 0.1, True, torch.tensor(0.1), torch.tensor([0.1]), 1e300],
    "nesterov": [False, True, None, 1],
    "maximize": [False, True, 0],
}


class Side:
    """One of the two optimizers, its parameters and what else a program has made for it."""

    def __init__(self, make: Any) -> None:
        self.make = make
        self.base = values((9, 4), seed=5)
        self.params: list[Tensor] = []
        self.optimizer: Any = None

    def param(self, kind: str, seed: int) -> Tensor:
        p = PARAMS[kind](self.base, seed)
        if not isinstance(p, nn.UninitializedParameter):
            p = p.detach() if not p.is_inference() else p
            if (p.is_floating_point() or p.is_complex()) and not p.is_inference():
                p.requires_grad_()
        self.params.append(p)
        return p

    def group(self, index: int) -> dict[str, Any]:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups[index % len(groups)]

    def pick(self, index: int) -> Tensor:
        return self.params[index % len(self.params)]


def same(ours: Any, theirs: Any, what: str) -> None:
    if not isinstance(theirs, Tensor) or isinstance(theirs, nn.UninitializedParameter):
        assert type(ours) is type(theirs), (what, ours, theirs)
        return
    assert isinstance(ours, Tensor), (what, ours)
    for question in ("shape", "dtype", "layout", "device"):
        assert getattr(ours, question) == getattr(theirs, question), (what, question)
    if theirs.device.type == "meta":
        return
    if theirs.is_sparse:
        ours, theirs = ours.detach().to_dense(), theirs.detach().to_dense()
    with torch.inference_mode():  # where tensors of any origin may be read
        ours, theirs = (t.detach().as_subclass(Tensor).clone() for t in (ours, theirs))
        assert_same_bits(*(t.resolve_neg().resolve_conj() for t in (ours, theirs)), what)


indices = st.integers(0, 7)
seeds = st.integers(0, 50)
kinds = st.sampled_from(sorted(PARAMS))
plain_kinds = st.sampled_from(["matrix", "vector", "float64", "transposed"])
some_kinds = st.lists(plain_kinds | kinds, min_size=1, max_size=4)


class Programs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.sides = [Side(fastopt.SGD), Side(for_loop)]

    def both(self, act: Callable[[Side], Any]) -> Any:
        """The same on both sides. Returns the class of what they raised, if they did."""
        results = []
        for side in self.sides:
            try:
                act(side)
                results.append(None)
            except Exception as error:
                results.append(type(error))
        assert results[0] is results[1], results
        return results[1]

    # --- parameters and groups

    @initialize(kinds=some_kinds, momentum=st.sampled_from([0, 0.9]), seed=seeds)
    def construct(self, kinds: list[str], momentum: float, seed: int) -> None:
        for side in self.sides:
            params = [side.param(kind, seed + i) for i, kind in enumerate(kinds)]
            side.optimizer = side.make(params, lr=0.1, momentum=momentum)

    @precondition(lambda self: len(self.sides[0].params) < 12)
    @rule(kinds=some_kinds, seed=seeds)
    def add_group(self, kinds: list[str], seed: int) -> None:
        self.both(
            lambda side: side.optimizer.add_param_group(
                {"params": [side.param(kind, seed + i) for i, kind in enumerate(kinds)]}
            )
        )

    @rule(
        group=indices,
        edit=st.sampled_from(["reverse", "pop", "again", "tuple", "generator", "drop", "foreign"]),
    )
    def edit_params(self, group: int, edit: str) -> None:
        def act(side: Side) -> None:
            owner = side.group(group)
            params = list(owner["params"])
            if edit == "drop":
                side.optimizer.param_groups[:] = side.optimizer.param_groups[:-1] or [owner]
                return
            if edit == "reverse":
                params.reverse()
            elif edit == "pop":
                params = params[1:]
            elif edit in ("again", "foreign"):
                params.append(side.pick(group))
            owner["params"] = {"tuple": tuple(params), "generator": iter(params)}.get(edit, params)

        self.both(act)

    @rule(index=indices, kind=st.sampled_from(sorted(DATA)))
    def swap_data(self, index: int, kind: str) -> None:
        def act(side: Side) -> None:
            p = side.pick(index)
            if p.is_complex() or p.is_inference() or p.device.type == "meta" or type(p) is Meddling:
                return
            p.data = DATA[kind](p.data)

        self.both(act)

    # --- options

    @rule(group=indices, name=st.sampled_from(sorted(OPTIONS)), value=indices, data=st.booleans())
    def set_option(self, group: int, name: str, value: int, data: bool) -> None:
        option = OPTIONS[name][value % (3 if data else len(OPTIONS[name]))]
        for side in self.sides:
            side.group(group)[name] = copy.deepcopy(option)

    @rule(group=indices, name=st.sampled_from([*sorted(OPTIONS), "foreach", "fused"]))
    def without_option(self, group: int, name: str) -> None:
        """For one step."""
        kept = [side.group(group).pop(name, None) for side in self.sides]
        self.both(lambda side: side.optimizer.step())
        for side, option in zip(self.sides, kept, strict=True):
            side.group(group)[name] = option

    # --- gradients and state

    @rule(kind=st.sampled_from(["plain", "plain", "none", "contiguous"]), seed=seeds)
    def set_grads(self, kind: str, seed: int) -> None:
        for index in range(len(self.sides[0].params)):
            self.set_grad(index=index, kind=kind, seed=seed + index)

    @rule(index=indices, kind=st.sampled_from(sorted(GRADS)), seed=seeds)
    def set_grad(self, index: int, kind: str, seed: int) -> None:
        def act(side: Side) -> None:
            p = side.pick(index)
            if not isinstance(p, nn.UninitializedParameter):
                p.grad = GRADS[kind](p, seed)

        self.both(act)

    @rule(index=indices, kind=st.sampled_from(sorted(BUFFERS)))
    def replace_buffer(self, index: int, kind: str) -> None:
        def act(side: Side) -> None:
            p = side.pick(index)
            buffer = side.optimizer.state[p].get("momentum_buffer")
            if isinstance(buffer, Tensor) and not buffer.is_sparse and not buffer.is_complex():
                side.optimizer.state[p]["momentum_buffer"] = BUFFERS[kind](buffer)

        self.both(act)

    @rule(
        index=indices,
        edit=st.sampled_from(["pop", "clear", "empty", "none", "last", "new", "dict", "foreign"]),
    )
    def edit_state(self, index: int, edit: str) -> None:
        def act(side: Side) -> None:
            state, p = side.optimizer.state, side.pick(index)
            if edit == "pop":
                state.pop(p, None)
            elif edit == "clear":
                state.clear()
            elif edit == "empty":
                state[p] = {}
            elif edit == "none":
                state[p] = None
            elif edit == "last" and p in state:
                state[p] = state.pop(p)
            elif edit == "new":
                side.optimizer.state = defaultdict(dict, state)
            elif edit == "dict":
                side.optimizer.state = dict(state)
            elif edit == "foreign":
                state["mine"] = {"x": 1}

        self.both(act)

    @rule(how=st.sampled_from(["load", "copy", "pickle"]))
    def carry_over(self, how: str) -> None:
        def act(side: Side) -> None:
            if how == "load":
                side.optimizer.load_state_dict(side.optimizer.state_dict())
                return
            together = side.params, side.base, side.optimizer
            if how == "copy":
                side.params, side.base, side.optimizer = copy.deepcopy(together)
            else:
                side.params, side.base, side.optimizer = pickle.loads(pickle.dumps(together))

        before = [(side.params, side.base, side.optimizer) for side in self.sides]
        if self.both(act) is not None:
            for side, kept in zip(self.sides, before, strict=True):
                side.params, side.base, side.optimizer = kept

    # --- steps

    @rule(count=st.integers(1, 3), seed=seeds, fresh=st.booleans())
    def step(self, count: int, seed: int, fresh: bool) -> None:
        for i in range(count):
            if fresh:
                self.set_grads(kind="plain", seed=seed + i)
            self.both(lambda side: side.optimizer.step())

    @rule(seed=seeds)
    def step_in_a_closure(self, seed: int) -> None:
        def act(side: Side) -> None:
            def closure() -> float:
                for i, p in enumerate(side.params):
                    if not isinstance(p, nn.UninitializedParameter) and p.is_floating_point():
                        p.grad = GRADS["plain"](p, seed + i)
                return 1.0

            assert side.optimizer.step(closure) == 1.0

        self.both(act)

    @rule()
    def step_in_a_thread(self) -> None:
        def act(side: Side) -> None:
            errors: list[Exception] = []

            def run() -> None:
                try:
                    with torch.no_grad():
                        side.optimizer.step()
                except Exception as error:
                    errors.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            if errors:
                raise errors[0]

        self.both(act)

    @rule(mode=st.sampled_from(["inference", "dispatch", "dual", "device", "autocast"]))
    def step_in_a_mode(self, mode: str) -> None:
        def act(side: Side) -> None:
            context = {
                "inference": torch.inference_mode,
                "dispatch": Watching,
                "dual": fwd.dual_level,
                "device": lambda: torch.device("cpu"),
                "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
            }[mode]()
            with context:
                side.optimizer.step()

        self.both(act)

    @rule(name=st.sampled_from(["grad_scale", "found_inf"]))
    def step_with_a_scale(self, name: str) -> None:
        def act(side: Side) -> None:
            setattr(side.optimizer, name, torch.tensor(1.0))
            try:
                side.optimizer.step()
            finally:
                delattr(side.optimizer, name)

        self.both(act)

    @rule(
        index=indices,
        what=st.sampled_from(["data", "grad", "state", "lr", "error"]),
        where=st.sampled_from(["inside", "pre", "post"]),
    )
    def step_with_python_inside(self, index: int, what: str, where: str) -> None:
        def act(side: Side) -> None:
            p = side.pick(index)

            def meddle(*_: Any) -> None:
                if what == "data" and type(p) is Tensor and not p.is_inference():
                    p.data = p.data.clone()
                elif what == "grad":
                    p.grad = None
                elif what == "state":
                    side.optimizer.state.clear()
                elif what == "lr":
                    side.group(index)["lr"] = 0.25
                elif what == "error":
                    raise ZeroDivisionError

            handle = None
            if where == "inside":
                Meddling.act = meddle
            else:
                handle = getattr(side.optimizer, f"register_step_{where}_hook")(meddle)
            try:
                side.optimizer.step()
            finally:
                Meddling.act = None
                if handle is not None:
                    handle.remove()

        self.both(act)

    # --- what has to be the same

    @invariant()
    def they_agree(self) -> None:
        ours, theirs = self.sides
        if ours.optimizer is None:
            return
        same(ours.base, theirs.base, "shared memory")
        for i, (p, q) in enumerate(zip(ours.params, theirs.params, strict=True)):
            same(p, q, f"parameter {i}")
            same(p.grad, q.grad, f"gradient {i}")
            mine, stock = (s.optimizer.state.get(t) for s, t in ((ours, p), (theirs, q)))
            assert type(mine) is type(stock), f"state {i}"
            if isinstance(stock, dict):
                assert list(mine) == list(stock), f"state {i}"
                for key in stock:
                    same(mine[key], stock[key], f"{key} {i}")
        assert len(ours.optimizer.state) == len(theirs.optimizer.state)
        assert type(ours.optimizer.state) is type(theirs.optimizer.state)
        for mine, stock in zip(
            ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True
        ):
            assert list(mine) == list(stock)


@pytest.fixture(autouse=True)
def _kernels_have_answered() -> Iterator[None]:
    before = served.sgd.ours
    yield
    assert served.sgd.ours > before


def test_random_programs() -> None:
    size = {"stateful_step_count": 30, "deadline": None, "database": None}
    if not SECONDS:
        run_machine(Programs, settings=settings(max_examples=100, derandomize=True, **size))
        return
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        run_machine(Programs, settings=settings(max_examples=500, derandomize=False, **size))
