"""cross_entropy from several threads, after fork, and from run to run."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch
from torch import Tensor

import fastopt
from accuracy import assert_same_bits
from child import HANGS_AFTER_S
from cross_entropy_cases import (
    EVERYTHING,
    NAMED_SHAPES,
    REDUCTIONS,
    dtype_name,
    make_logits,
    make_target,
)

SHAPES = [(1003, 10), (64, 1000), (4, 65539), (2, 21, 33, 65), (2, 150, 700)]


def loss_and_gradient(
    logits: Tensor, reduction: str = "mean", seed: int = 1
) -> tuple[Tensor, Tensor]:
    target, keywords = EVERYTHING.apply(logits, make_target(logits, seed))
    leaf = logits.detach().requires_grad_()
    loss = fastopt.cross_entropy(leaf, target, reduction=reduction, **keywords)
    return loss.detach(), torch.autograd.grad(loss.sum() * 2, leaf)[0]


def test_four_threads_do_not_disturb_each_other() -> None:
    work = [make_logits(shape, seed=index) for index, shape in enumerate(SHAPES[:4])]
    expected = [
        [loss_and_gradient(logits, reduction) for reduction in REDUCTIONS] for logits in work
    ]
    failures: list[BaseException] = []
    start = threading.Barrier(len(work))
    # Threads of Python start with torch's default number of threads, not with their parent's.
    threads = torch.get_num_threads()

    def repeat(index: int) -> None:
        try:
            torch.set_num_threads(threads)
            start.wait()
            for _ in range(15):
                for reduction, results in zip(REDUCTIONS, expected[index], strict=True):
                    ours = loss_and_gradient(work[index], reduction)
                    for tensor, same in zip(ours, results, strict=True):
                        assert_same_bits(tensor, same)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=repeat, args=(index,)) for index in range(len(work))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures[0]


def test_threads_may_share_the_logits() -> None:
    logits = make_logits((64, 1000))
    expected = [loss_and_gradient(logits, seed=seed) for seed in range(4)]
    results: dict[int, tuple[Tensor, Tensor]] = {}

    def once(seed: int) -> None:
        torch.set_num_threads(threads)
        for _ in range(20):
            results[seed] = loss_and_gradient(logits, seed=seed)

    threads = torch.get_num_threads()
    workers = [threading.Thread(target=once, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed in range(4):
        for tensor, same in zip(results[seed], expected[seed], strict=True):
            assert_same_bits(tensor, same)


def test_an_error_in_one_thread_stays_there() -> None:
    logits = make_logits((4096, 10))
    bad = torch.full((4096,), 10)
    expected = loss_and_gradient(logits)
    errors = []

    def fail() -> None:
        for _ in range(20):
            try:
                fastopt.cross_entropy(logits, bad)
            except IndexError as error:
                errors.append(error)

    worker = threading.Thread(target=fail)
    worker.start()
    for _ in range(20):
        for tensor, same in zip(loss_and_gradient(logits), expected, strict=True):
            assert_same_bits(tensor, same)
    worker.join()
    assert len(errors) == 20


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_the_same_bits_from_run_to_run(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    for shape in [*SHAPES, *NAMED_SHAPES.values()]:
        logits = make_logits(shape, dtype)
        for reduction in ("mean", "none"):
            first = loss_and_gradient(logits, reduction)
            for _ in range(3):
                again = loss_and_gradient(logits.clone(), reduction)
                for tensor, same in zip(again, first, strict=True):
                    assert_same_bits(tensor, same)


def test_the_number_of_threads_hardly_matters() -> None:
    for shape in SHAPES:
        logits = make_logits(shape)
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(loss_and_gradient(logits))
        for ours in results[1:]:
            for tensor, alone in zip(ours, results[0], strict=True):
                torch.testing.assert_close(tensor, alone, rtol=1e-5, atol=1e-7)


def _in_child(connection: multiprocessing.connection.Connection) -> None:
    # As DataLoader workers do: the pool's threads did not come along through fork.
    torch.set_num_threads(1)
    connection.send([tuple(t.numpy() for t in loss_and_gradient(make_logits(s))) for s in SHAPES])


def test_fork_after_the_thread_pool_has_started() -> None:
    for shape in SHAPES:
        loss_and_gradient(make_logits(shape))
    torch.set_num_threads(1)
    expected = [loss_and_gradient(make_logits(shape)) for shape in SHAPES]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(sender,))
    child.start()
    sender.close()
    try:
        assert receiver.poll(HANGS_AFTER_S), "the forked process hangs"
        results = receiver.recv()
    finally:
        child.kill()
        child.join()
    for ours, here in zip(results, expected, strict=True):
        for array, tensor in zip(ours, here, strict=True):
            assert_same_bits(torch.from_numpy(array).view(tensor.shape), tensor)
