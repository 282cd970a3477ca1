"""fastopt.SGD under threads, in forked children, and from run to run: always the same bits."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from child import HANGS_AFTER_S, run_python
from sgd_oracle import (
    DAMPED,
    DTYPES,
    FULL,
    OPTIONS,
    SMALL_SIZES,
    assert_same_history,
    for_loop,
    leaf,
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
