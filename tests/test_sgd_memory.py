"""Where fastopt.SGD reads and writes: every layout of parameter, gradient and buffer, nothing outside
of them, nothing beside them, nothing remembered that has changed since the last step."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastopt
from accuracy import assert_as_accurate
from child import run_python
from sgd_oracle import (
    DAMPED,
    DTYPES,
    EXACT_DTYPES,
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
    snapshot,
    train,
    values,
)

# --- strides and guard bytes ---------------------------------------------------------------------

GUARD = 64  # elements in front of and behind each tensor
PATTERN = 0x5A


def row_major(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Dense strides with the dimensions nested in the given order, the last one innermost."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


SHAPE = (2, 3, 4, 5)
C_ORDER = row_major(SHAPE, (0, 1, 2, 3))
# name -> (strides, offset in elements)
LAYOUTS: dict[str, tuple[tuple[int, ...], int]] = {
    "contiguous": (C_ORDER, 0),
    "misaligned": (C_ORDER, 3),
    "channels_last": (row_major(SHAPE, (0, 2, 3, 1)), 0),
    "transposed": (row_major(SHAPE, (3, 2, 1, 0)), 1),
    "every_other": (tuple(2 * s for s in C_ORDER), 0),
    "padded_rows": ((60 + 7, 20, 5, 1), 0),
}
GRAD_LAYOUTS = {**LAYOUTS, "stride_0": ((0, 0, 5, 1), 0)}


class Guarded:
    """A tensor in a given layout, in the middle of memory whose other bytes have a known pattern."""

    def __init__(self, value: Tensor, strides: tuple[int, ...], offset: int) -> None:
        extent = 1 + sum((n - 1) * s for n, s in zip(value.shape, strides, strict=True))
        room = torch.empty(2 * GUARD + offset + extent, dtype=value.dtype)
        self.bytes = room.view(torch.uint8)
        self.bytes.fill_(PATTERN)
        self.tensor = room.as_strided(value.shape, strides, GUARD + offset)
        inside = torch.zeros(room.shape, dtype=torch.bool)
        inside.as_strided(value.shape, strides, GUARD + offset).fill_(True)
        self.outside = ~inside.repeat_interleave(value.element_size())
        # Into a stride of 0 only one row fits.
        target = self.tensor[tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)]
        target.copy_(value[tuple(slice(0, n) for n in target.shape)])
        self.before = self.bytes.clone()

    def guard_is_intact(self) -> bool:
        return bool((self.bytes[self.outside] == PATTERN).all())

    def is_unchanged(self) -> bool:
        return torch.equal(self.bytes, self.before)


@pytest.mark.stock
@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layouts_give_the_for_loops_result_and_touch_nothing_else(
    dtype: torch.dtype, grad_layout: str
) -> None:
    for p_layout, b_layout in itertools.product(LAYOUTS, LAYOUTS):
        what = f"param {p_layout}, grad {grad_layout}, buffer {b_layout}"
        results = []
        for make in (fastopt.SGD, for_loop):
            p = Guarded(values(SHAPE, dtype, 1), *LAYOUTS[p_layout])
            g = Guarded(values(SHAPE, dtype, 2), *GRAD_LAYOUTS[grad_layout])
            b = Guarded(values(SHAPE, dtype, 3), *LAYOUTS[b_layout])
            param = p.tensor.requires_grad_()
            param.grad = g.tensor
            optimizer = make([param], **DAMPED)
            optimizer.state[param]["momentum_buffer"] = b.tensor
            optimizer.step()
            optimizer.step()
            assert p.guard_is_intact() and b.guard_is_intact() and g.is_unchanged(), what
            assert param.stride() == LAYOUTS[p_layout][0]
            results.append(optimizer)
        ours, theirs = results
        if dtype in EXACT_DTYPES:
            assert_same_state(ours, theirs, what)
            continue
        exact_param = leaf(values(SHAPE, dtype, 1).double())
        exact_param.grad = all_params(ours)[0].grad.double()
        exact = for_loop([exact_param], **DAMPED)
        exact.state[exact_param]["momentum_buffer"] = values(SHAPE, dtype, 3).double()
        exact.step()
        exact.step()
        mine, stock, goal = snapshot(ours), snapshot(theirs), snapshot(exact)
        assert_as_accurate(mine.params[0], stock.params[0], goal.params[0], what)
        assert_as_accurate(mine.buffers[0], stock.buffers[0], goal.buffers[0], what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_that_agree_are_served_with_the_bits_of_contiguous_ones(dtype: torch.dtype) -> None:
    for name, (strides, offset) in LAYOUTS.items():
        if name in ("every_other", "padded_rows"):
            continue  # not dense: torch's path, which rounds half dtypes more often
        results = []
        for layout in ((strides, offset), (C_ORDER, 0)):
            p, g, b = (Guarded(values(SHAPE, dtype, seed), *layout) for seed in (1, 2, 3))
            param = p.tensor.requires_grad_()
            param.grad = g.tensor
            optimizer = fastopt.SGD([param], **DAMPED)
            optimizer.state[param]["momentum_buffer"] = b.tensor
            optimizer.step()
            results.append(optimizer)
        assert_same_state(*results, name)


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
def test_dimensions_of_size_one_may_have_any_stride(dtype: torch.dtype) -> None:
    shape = (1, 6, 1, 5)
    strides = [(30, 5, 5, 1), (1, 5, 77, 1), (0, 5, 0, 1), (999, 5, 1, 1)]
    for p_strides, g_strides, b_strides in itertools.product(strides, repeat=3):
        results = []
        for make in (fastopt.SGD, for_loop):
            p, g, b = (
                Guarded(values(shape, dtype, seed), layout, 0)
                for seed, layout in ((1, p_strides), (2, g_strides), (3, b_strides))
            )
            param = p.tensor.requires_grad_()
            param.grad = g.tensor
            optimizer = make([param], **FULL)
            optimizer.state[param]["momentum_buffer"] = b.tensor
            optimizer.step()
            assert p.guard_is_intact() and b.guard_is_intact() and g.is_unchanged()
            results.append(optimizer)
        assert_same_state(*results, f"{p_strides} {g_strides} {b_strides}")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    data=st.data(),
    dtype=st.sampled_from(EXACT_DTYPES),
)
def test_any_strides_give_the_for_loops_result(
    shape: tuple[int, ...], data: st.DataObject, dtype: torch.dtype
) -> None:
    layouts = []
    for _ in range(3):
        order = tuple(data.draw(st.permutations(range(len(shape)))))
        step, offset = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 9))
        layouts.append((tuple(step * s for s in row_major(shape, order)), offset))
    results = []
    for make in (fastopt.SGD, for_loop):
        p, g, b = (Guarded(values(shape, dtype, i), *layouts[i]) for i in range(3))
        param = p.tensor.requires_grad_()
        param.grad = g.tensor
        optimizer = make([param], **DAMPED)
        optimizer.state[param]["momentum_buffer"] = b.tensor
        optimizer.step()
        assert p.guard_is_intact() and b.guard_is_intact() and g.is_unchanged()
        results.append(optimizer)
    assert_same_state(*results, f"{shape} {layouts}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guard_bytes_of_flat_tensors_stay(dtype: torch.dtype) -> None:
    for options in (OPTIONS["plain"], DAMPED, FULL):
        guarded = [
            [Guarded(values(n, dtype, 3 * n + i), (1,), n % 5) for i in range(3)]
            for n in SMALL_SIZES
            if n
        ]
        params = [p.tensor.requires_grad_() for p, _, _ in guarded]
        optimizer = fastopt.SGD(params, **options)
        for param, (_, g, b) in zip(params, guarded, strict=True):
            param.grad = g.tensor
            optimizer.state[param]["momentum_buffer"] = b.tensor
        optimizer.step()
        for p, g, b in guarded:
            assert p.guard_is_intact() and b.guard_is_intact() and g.is_unchanged()
            assert not p.is_unchanged()


def test_nothing_is_read_or_written_across_a_protected_page() -> None:
    # Each tensor ends, or begins, at a page that may not be touched: reading one element too many
    # is a crash of the child process.
    run_python(
        """
        import ctypes, mmap
        import torch
        import fastopt
        from sgd_oracle import DAMPED, DTYPES, FULL, OPTIONS, assert_same_state, leaf, values

        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        page = mmap.PAGESIZE

        def room():
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            start = libc.mmap(None, 3 * page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
            for guard in (start, start + 2 * page):
                assert libc.mprotect(guard, page, 0) == 0
            return start + page

        rooms = [room() for _ in range(3)]

        def place(value, where, at_end):
            size = value.numel() * value.element_size()
            address = where + page - size if at_end else where
            memory = (ctypes.c_char * size).from_address(address)
            return torch.frombuffer(memory, dtype=value.dtype).copy_(value)

        for dtype in DTYPES:
            for size in [*range(1, 70), 100, 255, 256]:
                for at_end in (True, False):
                    for options in (OPTIONS["plain_decay"], DAMPED, FULL):
                        p, g, b = (
                            place(values(size, dtype, i), rooms[i], at_end) for i in range(3)
                        )
                        p.requires_grad_()
                        p.grad = g
                        optimizer = fastopt.SGD([p], **options)
                        optimizer.state[p]["momentum_buffer"] = b
                        optimizer.step()
                        q = leaf(values(size, dtype, 0))
                        q.grad = values(size, dtype, 1)
                        reference = fastopt.SGD([q], **options)
                        reference.state[q]["momentum_buffer"] = values(size, dtype, 2)
                        reference.step()
                        assert_same_state(optimizer, reference, f"{dtype} {size} {at_end}")
        """
    )


# --- overlapping memory --------------------------------------------------------------------------


def fresh(base: Tensor, count: int, rows: int) -> list[Tensor]:
    return [values((rows, base.shape[1]), seed=70 + i) for i in range(count)]


# Parameters, gradients and perhaps buffers, as rows of a `base` of 400 rows and of each other.
OVERLAPS: dict[str, Callable[[Tensor], Any]] = {
    "disjoint_neighbours": lambda base: (
        [base[:100], base[100:200], base[200:300]],
        fresh(base, 3, 100),
    ),
    "params_overlap": lambda base: ([base[:200], base[100:300]], fresh(base, 2, 200)),
    "params_overlap_by_one": lambda base: ([base[:200], base[199:399]], fresh(base, 2, 200)),
    "param_inside_another": lambda base: (
        [base, base[150:250]],
        fresh(base, 1, 400) + fresh(base, 1, 100),
    ),
    "params_of_the_same_memory": lambda base: ([base[:100], base[:100]], fresh(base, 2, 100)),
    "params_in_falling_order": lambda base: (
        [base[300:], base[200:300], base[250:350]],
        fresh(base, 3, 100),
    ),
    "params_interleaved": lambda base: ([base[::2], base[1::2]], fresh(base, 2, 200)),
    "param_overlaps_itself": lambda base: (
        [base.as_strided((30, 10), (5, 1))],
        [values((30, 10))],
    ),
    "grad_is_the_param": lambda base: ([base[:100]], [base[:100]]),
    "grad_before_the_param": lambda base: ([base[50:150]], [base[:100]]),
    "grad_behind_the_param": lambda base: ([base[:100]], [base[50:150]]),
    "grad_is_the_next_param": lambda base: (
        [base[:100], base[100:200]],
        [base[100:200], fresh(base, 1, 100)[0]],
    ),
    "grad_is_the_previous_param": lambda base: (
        [base[:100], base[100:200]],
        [fresh(base, 1, 100)[0], base[:100]],
    ),
    "grads_are_each_others_params": lambda base: (
        [base[:100], base[100:200]],
        [base[100:200], base[:100]],
    ),
    "grads_are_one_tensor": lambda base: (
        [base[:100], base[100:200]],
        fresh(base, 1, 100) * 2,
    ),
    "buffer_is_the_param": lambda base: ([base[:100]], fresh(base, 1, 100), [base[:100]]),
    "buffer_is_the_grad": lambda base: ([base[:100]], [base[100:200]], [base[100:200]]),
    "buffer_before_the_grad": lambda base: ([base[:100]], [base[200:300]], [base[150:250]]),
    "buffer_behind_the_grad": lambda base: ([base[:100]], [base[150:250]], [base[200:300]]),
    "buffers_are_one_tensor": lambda base: (
        [base[:100], base[100:200]],
        fresh(base, 2, 100),
        [base[200:300]] * 2,
    ),
    "buffers_overlap": lambda base: (
        [base[:100], base[100:200]],
        fresh(base, 2, 100),
        [base[200:300], base[250:350]],
    ),
    "buffer_overlaps_itself": lambda base: (
        [base.as_strided((10, 10), (10, 1))],
        [values((10, 10))],
        [base.as_strided((10, 10), (0, 1), 100)],
    ),
    "buffer_is_another_param": lambda base: (
        [base[:100], base[100:200]],
        fresh(base, 2, 100),
        [base[100:200], base[200:300]],
    ),
    "buffer_is_another_grad": lambda base: (
        [base[:100], base[100:200]],
        [base[300:], *fresh(base, 1, 100)],
        [base[200:300], base[300:]],
    ),
}


@pytest.mark.stock
@pytest.mark.parametrize("columns", [1, 701])  # 701: worth several threads
@pytest.mark.parametrize("case", OVERLAPS)
def test_shared_memory_does_what_the_for_loop_does(case: str, columns: int) -> None:
    def run(make: Any) -> Tensor:
        base = values((400, columns))
        params, grads, *buffers = OVERLAPS[case](base)
        params = [p.requires_grad_() for p in params]
        optimizer = make(params, **DAMPED)
        for p, buffer in zip(params, *buffers, strict=True) if buffers else ():
            optimizer.state[p]["momentum_buffer"] = buffer.detach()
        for _ in range(2):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.detach()
            optimizer.step()
        return base

    ours, theirs = outcome(lambda: run(fastopt.SGD)), outcome(lambda: run(for_loop))
    if isinstance(theirs, Tensor):
        assert_same_bits(ours, theirs, case)
    else:
        assert ours == theirs


@pytest.mark.parametrize("columns", [1, 701])
@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("shared", ["params", "grad_before_the_param"])
def test_memory_that_comes_to_be_shared_between_steps(
    shared: str, momentum: float, columns: int
) -> None:
    def run(make: Any) -> list[Any]:
        params = [leaf(values((100, columns), seed=i)) for i in range(2)]
        optimizer = make(params, lr=0.1, momentum=momentum)
        history = train(optimizer, steps=2)
        base = values((400, columns), seed=9)
        if shared == "params":
            params[0].data, params[1].data = base[:100], base[50:150]
            return history + train(optimizer, steps=2, by_torch=None)
        params[0].data = base[50:150]

        def share(step: int) -> None:
            params[0].grad = base[:100]

        return history + train(optimizer, steps=2, before_step=share, by_torch=None)

    ours, theirs = outcome(lambda: run(fastopt.SGD)), outcome(lambda: run(for_loop))
    if isinstance(theirs, list):
        assert_same_history(ours, theirs)
    else:  # without momentum torch refuses to add overlapping memory
        assert ours == theirs


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("option", OPTIONS)
def test_duplicate_parameters_step_twice(option: str) -> None:
    def run(make: Any) -> Any:
        p, q = leaf(values(70)), leaf(values(70, seed=1))
        return train(make([p, q, p], **OPTIONS[option]), by_torch=True)

    assert_same_history(run(fastopt.SGD), run(for_loop))


# --- versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_versions_count_what_was_written(option: str) -> None:
    params = [leaf(values(n, dtype)) for n in (1, 40) for dtype in DTYPES]
    optimizer = fastopt.SGD(params, **OPTIONS[option])
    for step in range(3):
        set_grads(params[:-1], seed=step)  # the last one stays without
        buffers = [optimizer.state.get(p, {}).get("momentum_buffer") for p in params]
        tensors = params + [b for b in buffers if b is not None]
        before = [t._version for t in tensors]
        grads_before = [p.grad._version for p in params[:-1]]
        optimizer.step()
        moved = [t._version - v for t, v in zip(tensors, before, strict=True)]
        assert moved[: len(params)] == [1] * (len(params) - 1) + [0]
        assert all(m >= 1 for m in moved[len(params) :])
        assert [p.grad._version for p in params[:-1]] == grads_before


def test_a_skipped_step_moves_no_version() -> None:
    param = leaf(values(40))
    optimizer = fastopt.SGD([param], **DAMPED, fused=True)
    train(optimizer)
    tensors = [param, param.grad, optimizer.state[param]["momentum_buffer"]]
    before = [t._version for t in tensors]
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert [t._version for t in tensors] == before


# --- no memory beside the momentum ---------------------------------------------------------------


@pytest.mark.slow  # a sanitizer's own memory would be counted
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_steps_take_no_memory_but_the_momentum() -> None:
    # A child of its own: its peak is its parameters and gradients until the first step.
    output = run_python(
        """
        import resource
        import torch
        import fastopt
        from sgd_oracle import DAMPED, FULL, OPTIONS

        def peak():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        # The first step of all starts the threads and fills what Python and torch keep.
        warm = torch.ones(100_000, requires_grad=True)
        warm.grad = torch.ones(100_000)
        for options in (OPTIONS["plain_decay"], DAMPED, FULL):
            optimizer = fastopt.SGD([warm], **options)
            for _ in range(3):
                optimizer.step()

        shapes = [(2_000_000,), (1000, 1000), (999_999,), *[(64,)] * 200]
        params = [torch.ones(s, requires_grad=True) for s in shapes]
        for p in params:
            p.grad = torch.ones_like(p)
        size = sum(p.numel() * 4 for p in params) // 1024
        for name, options in {
            "plain": OPTIONS["plain_decay_max"], "damped": DAMPED, "nesterov": FULL
        }.items():
            optimizer = fastopt.SGD(params, **options)
            start = peak()
            optimizer.step()
            first = peak() - start
            before = faults()
            for _ in range(10):
                optimizer.step()
            # Kept alive, so that the next optimizer cannot find free room for a temporary.
            globals()[name] = optimizer
            print(name, size, first, peak() - start - first, faults() - before)
        """
    )
    for line in output.splitlines():
        name, *figures = line.split()
        size, first, later, faults = map(int, figures)  # KiB, pages
        allowed = 0 if name == "plain" else size
        assert first <= allowed + 1024, f"first step: {line}"
        assert later <= 256, f"later steps: {line}"
        # A temporary of one parameter is hundreds of pages per step, or a huge page or two.
        assert faults < 40, f"page faults: {line}"


# --- nothing stale -------------------------------------------------------------------------------


def swap_data(make_data: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """Give the second parameter other memory; its gradient and buffer are left behind."""

    def edit(optimizer: Any) -> None:
        p = all_params(optimizer)[1]
        p.grad = None
        p.data = make_data(p.data)

    return edit


def edit_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], None]:
    return lambda optimizer: change(optimizer.state[all_params(optimizer)[1]])


def resize_storage(optimizer: Any) -> None:
    # As sharded training frees and refills parameters: the same tensor, other addresses.
    p = all_params(optimizer)[1]
    content = p.detach().clone()
    p.untyped_storage().resize_(0)
    blocker = torch.empty(content.numel())
    p.untyped_storage().resize_(content.numel() * content.element_size())
    p.data.copy_(content)
    del blocker


def freed_and_taken_again(optimizer: Any) -> None:
    # Likely the same address under another tensor object.
    p = all_params(optimizer)[1]
    shape = p.shape
    p.grad = None
    p.grad = values(shape, seed=77)


def to_double(optimizer: Any) -> None:
    for p in all_params(optimizer):
        p.grad = None
        p.data = p.data.double()


def swap_tensors(optimizer: Any) -> None:
    p = all_params(optimizer)[1]
    p.grad = None
    optimizer.state.pop(p, None)
    torch.utils.swap_tensors(p, leaf(values(p.shape, seed=50)))


def grow_buffer(state: dict[str, Any]) -> None:
    state["momentum_buffer"].resize_(500).fill_(0.5)


def share_buffer(optimizer: Any) -> None:
    first, second = all_params(optimizer)[1:3]
    optimizer.state[second]["momentum_buffer"] = optimizer.state[first]["momentum_buffer"]


def set_data_of_buffer(state: dict[str, Any]) -> None:
    state["momentum_buffer"].data = values((8, 8), seed=21)


def set_data_of_buffer_short(state: dict[str, Any]) -> None:
    state["momentum_buffer"].data = values((2, 8), seed=21)


def truncate_storage_of_grad(optimizer: Any) -> None:
    all_params(optimizer)[1].grad.data = values((8, 8), seed=3).t()


STALE: dict[str, Callable[[Any], Any]] = {
    "data_cloned": swap_data(lambda t: t.clone()),
    "data_other_values": swap_data(lambda t: values(t.shape, seed=31)),
    "data_transposed_in_place": swap_data(lambda t: t.t()),
    "data_shortened_in_place": swap_data(lambda t: t[:5]),
    "data_shortened_to_nothing": swap_data(lambda t: t[:0]),
    "data_flattened": swap_data(lambda t: t.view(-1)),
    "data_longer": swap_data(lambda t: values((80, 80), seed=9)),
    "data_strided": swap_data(lambda t: torch.stack([t, t], -1)[..., 0]),
    "data_expanded": swap_data(lambda t: t[:1].expand(8, 8)),
    "data_double": swap_data(lambda t: t.double()),
    "data_offset": swap_data(lambda t: torch.cat([t.view(-1), t.view(-1)])[3:67].view(8, 8)),
    "model_double": to_double,
    "storage_resized": resize_storage,
    "grad_freed_and_taken_again": freed_and_taken_again,
    "grad_data_transposed": truncate_storage_of_grad,
    "swap_tensors": swap_tensors,
    "state_deleted": lambda o: o.state.pop(all_params(o)[1]),
    "state_cleared": lambda o: o.state.clear(),
    "state_replaced": lambda o: setattr(o, "state", type(o.state)(dict)),
    "entry_replaced": lambda o: o.state.update({all_params(o)[1]: {}}),
    "entry_cleared": edit_state(lambda s: s.clear()),
    "buffer_deleted": edit_state(lambda s: s.pop("momentum_buffer")),
    "buffer_none": edit_state(lambda s: s.update(momentum_buffer=None)),
    "buffer_replaced": edit_state(lambda s: s.update(momentum_buffer=values((8, 8), seed=12))),
    "buffer_transposed": edit_state(
        lambda s: s.update(momentum_buffer=s["momentum_buffer"].t().clone().t())
    ),
    "buffer_double": edit_state(lambda s: s.update(momentum_buffer=s["momentum_buffer"].double())),
    "buffer_short": edit_state(lambda s: s.update(momentum_buffer=s["momentum_buffer"][:3])),
    "buffer_grown": edit_state(grow_buffer),
    "buffer_data_replaced": edit_state(set_data_of_buffer),
    "buffer_data_short": edit_state(set_data_of_buffer_short),
    "buffer_shared": share_buffer,
    "buffer_changed_in_place": edit_state(lambda s: s["momentum_buffer"].mul_(2)),
    "requires_grad_off": lambda o: all_params(o)[1].requires_grad_(False),
    "state_reloaded": lambda o: o.load_state_dict(o.state_dict()),
    "grads_to_none": lambda o: o.zero_grad(),
}


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("edit", STALE)
def test_nothing_is_remembered_that_has_changed(edit: str, momentum: float) -> None:
    if momentum == 0 and ("buffer" in edit or "entry" in edit or "state" in edit):
        momentum = 0.5  # these edits need a buffer: another factor instead of none

    def run(make: Any) -> Any:
        params = [leaf(values(shape, seed=i)) for i, shape in enumerate([(30,), (8, 8), (8, 8)])]
        optimizer = make(params, lr=0.1, momentum=momentum, dampening=0.25, weight_decay=0.01)
        history = train(optimizer, steps=3)

        def change(step: int) -> None:
            # After the gradients were set: parameters that lost theirs get one that fits.
            if step == 0:
                STALE[edit](optimizer)
                for p in params:
                    if p.grad is None:
                        p.grad = values(p.shape, p.dtype, seed=60)

        history += train(optimizer, 1, change, first_seed=10, by_torch=None)
        return history + train(optimizer, steps=2, first_seed=20, by_torch=None)

    ours, theirs = outcome(lambda: run(fastopt.SGD)), outcome(lambda: run(for_loop))
    if isinstance(theirs, list):
        assert_same_history(ours, theirs, edit)
    else:
        assert ours == theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_data_of_another_dtype_steps_as_if_it_had_always_been_there(dtype: torch.dtype) -> None:
    param = leaf(values(70))
    optimizer = fastopt.SGD([param], lr=0.1, weight_decay=0.01)
    train(optimizer)
    param.grad = None
    param.data = param.data.to(dtype)
    reference = fastopt.SGD([leaf(param)], lr=0.1, weight_decay=0.01)
    assert_same_history(train(optimizer), train(reference))


def test_a_dropped_optimizer_frees_its_parameters() -> None:
    import gc
    import weakref

    param = leaf(values(100))
    optimizer = fastopt.SGD([param], **FULL)
    train(optimizer)
    buffer = weakref.ref(optimizer.state[param]["momentum_buffer"])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
    gc.collect()
    assert buffer() is None  # nobody keeps the replaced momentum alive
    alive = weakref.ref(param)
    del param, optimizer
    gc.collect()
    assert alive() is None


def test_bits_compare_what_they_should() -> None:
    # The comparison itself: signed zeros differ, NaN equals NaN whatever its payload.
    assert not torch.equal(bits(torch.tensor(0.0)), bits(torch.tensor(-0.0)))
    assert_same_bits(torch.tensor([float("nan")]), -torch.tensor([float("nan")]))
    with pytest.raises(AssertionError):
        assert_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
