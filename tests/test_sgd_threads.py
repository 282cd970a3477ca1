"""fastopt.SGD under threads, in forked children, and from run to run: always the same bits. And under
threads and Python that interfere with a step, what torch's step gives: no crash, nothing torn."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from child import HANGS_AFTER_S, run_python
from fastopt.sgd import gather
from sgd_oracle import (
    DAMPED,
    DTYPES,
    FULL,
    OPTIONS,
    SMALL_SIZES,
    Meddling,
    assert_same_history,
    for_loop,
    leaf,
    outcome,
    set_grads,
    train,
    values,
)

SIZES = (*SMALL_SIZES, 150_001)  # the last one is worth several threads


def params_of_all_dtypes() -> list[Tensor]:
    return [leaf(values(n, dtype, seed=n)) for dtype in DTYPES for n in SIZES]


@pytest.mark.parametrize("option", ["plain_decay", "damped_decay", "nesterov_decay_max"])
def test_the_number_of_threads_does_not_show(option: str) -> None:
    histories = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        histories.append(train(fastopt.SGD(params_of_all_dtypes(), **OPTIONS[option]), steps=2))
    for history in histories[1:]:
        assert_same_history(history, histories[0])


def test_the_same_bits_from_run_to_run() -> None:
    first = train(fastopt.SGD(params_of_all_dtypes(), **FULL), steps=2)
    for _ in range(4):
        assert_same_history(train(fastopt.SGD(params_of_all_dtypes(), **FULL), steps=2), first)


def test_four_threads_with_an_optimizer_each() -> None:
    names = ("plain", "damped_decay", "nesterov_decay_max", "momentum_max")

    def run(make: Any, name: str, steps: int) -> Any:
        sizes = (33, 1000, 150_001, 7)
        return train(make([leaf(values(n, seed=n)) for n in sizes], **OPTIONS[name]), steps)

    expected = {name: run(for_loop, name, 8) for name in names}
    found: dict[str, Any] = {}
    start = threading.Barrier(len(names))

    def work(name: str) -> None:
        start.wait()
        try:
            found[name] = run(fastopt.SGD, name, 8)
        except BaseException as error:  # to be shown by the test, not by the thread
            found[name] = error

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        if isinstance(found[name], BaseException):
            raise found[name]
        assert_same_history(found[name], expected[name], name)


def test_an_optimizer_moves_between_threads() -> None:
    ours = fastopt.SGD([leaf(values(n)) for n in SIZES], **DAMPED)
    theirs = for_loop([leaf(values(n)) for n in SIZES], **DAMPED)
    history: list[Any] = []
    for step in range(4):
        thread = threading.Thread(
            target=lambda s=step: history.extend(train(ours, steps=1, first_seed=s + 1))
        )
        thread.start()
        thread.join()
    assert_same_history(history, train(theirs, steps=4))


def test_python_runs_on_while_a_large_step_does() -> None:
    # The kernel lets go of Python's lock: another thread gets its turns during one long call.
    torch.set_num_threads(1)
    param = torch.ones(30_000_000, requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = fastopt.SGD([param], lr=0.1)
    optimizer.step()
    inside, turns, done = threading.Event(), [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            if inside.is_set():
                turns[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    for _ in range(5):
        inside.set()
        optimizer.step()
        inside.clear()
    done.set()
    thread.join()
    # Held, the lock changes hands a few times around the call; free, it turns all the time.
    assert turns[0] > 1000, turns


@pytest.mark.parametrize("threads_in_child", [1, None])
def test_a_forked_child_can_step(threads_in_child: int | None) -> None:
    # After a parent that used the thread pool. Data-loader workers run on one thread, and only
    # there is torch itself sure to survive a large step; a small one survives everywhere.
    run_python(
        f"""
        import os, signal
        import torch
        import fastopt
        from sgd_oracle import DAMPED, assert_same_history, for_loop, leaf, train, values

        def optimizers(sizes):
            return [
                make([leaf(values(n, seed=n)) for n in sizes], **DAMPED)
                for make in (fastopt.SGD, for_loop)
            ]

        threads = {threads_in_child}
        torch.set_num_threads(2)
        big = (150_001, 7, 33)
        ours, theirs = optimizers(big)
        assert_same_history(train(ours), train(theirs), "parent")
        child = os.fork()
        if child == 0:
            signal.alarm({HANGS_AFTER_S})  # a child that hangs has failed
            code = 1
            try:
                if threads:
                    torch.set_num_threads(threads)
                    # The parent's optimizer goes on, and a new one starts.
                    assert_same_history(train(ours), train(theirs), "inherited")
                mine, stock = optimizers(big if threads else (7, 33, 1000))
                assert_same_history(train(mine), train(stock), "new")
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert status == 0, f"the child ended with status {{status}}"
        # The parent is none the worse.
        assert_same_history(train(ours), train(theirs), "parent again")
        """
    )


# --- one optimizer, several threads --------------------------------------------------------------


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads take turns after every few instructions."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def run_threads(*work: Any) -> None:
    """Run each in a thread of its own, all at once. Raises what they raise."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(work))

    def guarded(call: Any) -> None:
        start.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("eager_threads")
@pytest.mark.parametrize("sizes", [(3,) * 50, (200_000, 5)], ids=["small", "large"])
def test_threads_step_one_optimizer(sizes: tuple[int, ...]) -> None:
    # Unsynchronised: updates may be lost, but no interleaving of 8 x 25 steps with a gradient of 1
    # brings a buffer beyond 200 or a parameter below -200 * 200 * lr.
    torch.set_num_threads(2)
    params = [torch.zeros(n, requires_grad=True) for n in sizes]
    optimizer = fastopt.SGD(params, lr=2.0**-10, momentum=1.0)

    def work() -> None:
        for _ in range(25):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()

    run_threads(*[work] * 8)
    for p in params:
        buffer = optimizer.state[p]["momentum_buffer"]
        assert ((buffer >= 1) & (buffer <= 200)).all()
        assert ((p < 0) & (p >= -200 * 200 * 2.0**-10)).all()


@pytest.mark.usefixtures("eager_threads")
def test_ten_thousand_steps_of_eight_threads_beside_others_that_edit() -> None:
    # Under AddressSanitizer (make sanitize) this is what finds memory that is used after its end.
    # Each thread replaces gradients of its own: torch's accessor of gradients is not made for two.
    torch.set_num_threads(2)
    params = [torch.zeros(n, requires_grad=True) for n in (64, 7, 1, 70_000, 65, 0, 3)]
    params.append(torch.zeros(4, 6)[:, ::2].requires_grad_())  # not served
    parts = [params[:5], params[5:]]
    optimizer = fastopt.SGD([{"params": p} for p in parts], lr=2.0**-20, momentum=0.5)
    steps = [0] * len(params)

    def work(own: int) -> None:
        for i in range(1250):
            if i % 4 == 0:
                params[own].grad = torch.ones_like(params[own])
            if i % 50 == 10:
                optimizer.param_groups[own % 2]["lr"] = 2.0**-20 * (1 + own)
            if i % 50 == 20:
                optimizer.state.pop(params[i % 8], None)
            if i % 50 == 30:
                try:
                    optimizer.state_dict()
                except RuntimeError as error:  # torch's own answer to such threads
                    assert "changed size" in str(error) or "mutated" in str(error)
            optimizer.step()
            steps[own] += 1

    run_threads(*(lambda own=own: work(own) for own in range(8)))
    assert steps == [1250] * 8
    for p in params:
        assert p.isfinite().all() and (p.abs() < 1).all()


# --- Python inside a step ------------------------------------------------------------------------


MEDDLING: dict[str, Any] = {
    "memory": lambda o, p: setattr(p, "data", torch.full_like(p, 7.0)),
    "storage": lambda o, p: p.untyped_storage().resize_(0).resize_(p.numel() * 4).fill_(0),
    "shape": lambda o, p: setattr(p, "data", torch.full((3,), 7.0)),
    "dtype": lambda o, p: setattr(p, "data", p.data.double()),
    "gradient": lambda o, p: setattr(p, "grad", torch.full_like(p, 3.0)),
    "gradients_memory": lambda o, p: setattr(p.grad, "data", torch.full_like(p, 3.0)),
    "no_gradient": lambda o, p: setattr(p, "grad", None),
    "buffers_memory": lambda o, p: setattr(
        o.state[p]["momentum_buffer"], "data", torch.full_like(p, 5.0)
    ),
    "buffer": lambda o, p: o.state[p].update(momentum_buffer=torch.full_like(p, 5.0)),
    "state": lambda o, p: o.state.clear(),
    "lr": lambda o, p: [g.update(lr=0.5) for g in o.param_groups],
    "params": lambda o, p: o.param_groups[-1]["params"].pop(),
    "groups": lambda o, p: o.param_groups.append(
        {**o.param_groups[0], "params": [torch.ones(3, requires_grad=True)]}
    ),
    "step": lambda o, p: o.step(),
    "error": lambda o, p: int("x"),
}


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("numel", [5, 200_000], ids=["small", "large"])
@pytest.mark.parametrize("act", MEDDLING)
def test_python_that_runs_inside_a_step(act: str, numel: int, groups: int) -> None:
    """Addresses are read when the last Python before their use has run."""

    def run(make: Any) -> Any:
        params = [values(n, seed=i) for i, n in enumerate((33, 5, numel, 9, numel))]
        params[1] = params[1].as_subclass(Meddling)
        params = [p.requires_grad_() for p in params]
        parts = [params] if groups == 1 else [params[:2], params[2:4], params[4:]]
        optimizer = make([{"params": part} for part in parts], **DAMPED)
        for step in range(3):
            for i, p in enumerate(params):
                grad = values(p.numel(), seed=9 + 7 * step + i)
                p.grad = grad.as_subclass(Meddling) if i == 1 else grad
            if step == 1:
                Meddling.act = lambda: MEDDLING[act](optimizer, params[2])
            error = outcome(optimizer.step)
            if step == 1 and act in ("shape", "dtype"):  # which torch's step may not survive
                break
        Meddling.act = None
        state = [optimizer.state.get(p, {}).get("momentum_buffer") for p in params]
        return error, [t if t is None else t.detach().clone() for t in (*params, *state)]

    (our_error, ours), (their_error, theirs) = run(fastopt.SGD), run(for_loop)
    assert our_error == their_error
    for i, (mine, stock) in enumerate(zip(ours, theirs, strict=True)):
        assert (mine is None) == (stock is None), i
        if stock is not None:
            assert type(mine) is type(stock) and torch.equal(mine, stock), i


@pytest.mark.parametrize("where", ["closure", "pre hook", "post hook"])
def test_python_around_a_step_may_free_everything(where: str) -> None:
    def run(make: Any) -> Any:
        params = [leaf(values(n, seed=n)) for n in (40, 200_000)]
        optimizer = make(params, **FULL)

        def meddle(*_: Any) -> None:
            for p in params:
                p.data = values(p.shape, seed=5)
            optimizer.state.clear()
            set_grads(params, seed=3)

        for step in range(3):
            set_grads(params, seed=step)
            if where == "closure":
                optimizer.step(meddle)
                continue
            kind = where.split()[0]
            handle = getattr(optimizer, f"register_step_{kind}_hook")(meddle)
            optimizer.step()
            handle.remove()
        return train(optimizer, steps=1)

    assert_same_history(run(fastopt.SGD), run(for_loop))


class _Cuts(dict[str, Any]):
    """A group, reading whose lr does to the optimizer what another thread might do at that moment."""

    cut: Callable[[], object] | None = None

    def __getitem__(self, key: str) -> Any:
        if key == "lr" and self.cut is not None:
            self.cut()
        return super().__getitem__(key)


@pytest.mark.parametrize("what", ["groups", "params"])
def test_what_is_edited_between_two_reads_is_read_once(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel looks for the options, or the tensors, of more parameters than it was given."""
    params = [torch.ones(4) for _ in range(7)]
    optimizer = fastopt.SGD([{"params": [param]} for param in params], lr=0.1)
    group = _Cuts(optimizer.param_groups[0])
    optimizer.param_groups[0] = group
    optimizer.step()
    for param in params:
        param.grad = torch.ones(4)
    if what == "groups":
        group.cut = lambda: optimizer.param_groups.__delitem__(slice(1, None))
    else:
        group.cut = lambda: optimizer.param_groups[3]["params"].clear()
    counts: list[tuple[int, ...]] = []
    step = gather.Gather.step

    def counted(self: gather.Gather, groups: Any, own: Any, grads: Any, *others: Any) -> int:
        counts.append((self.table.count, len(own), len(grads), groups.count))
        return step(self, groups, own, grads, *others)

    monkeypatch.setattr(gather.Gather, "step", counted)
    optimizer.step()
    assert counts == [(7, 7, 7, 7)]
    assert all(torch.equal(param, torch.full((4,), 0.9)) for param in params)


def test_a_table_takes_no_other_number_of_tensors() -> None:
    """_init_group is anybody's, and may let go of parameters in the middle of a step."""

    class Keeps(fastopt.SGD):
        def _init_group(self, group: Any, params: Any, grads: Any, buffers: Any) -> Any:
            self.seen = params
            return super()._init_group(group, params, grads, buffers)

    class Drops(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore
            if "add_" in str(function) and len(optimizer.seen) == 3:
                optimizer.seen.pop()
            return super().__torch_function__(function, types, args, kwargs or {})

    params = [torch.ones(3).as_subclass(Drops), torch.ones(3), torch.ones(3)]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = Keeps(params, lr=0.1, foreach=False)
    optimizer.step()
    assert [round(param[0].item(), 6) for param in params] == [0.9, 0.9, 1.0]
