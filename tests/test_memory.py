"""Memory that large gradients on CPU leave for the next: lent to one tensor at a time, whatever is
done with that, and given back.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastopt
from accuracy import assert_same_bits
from child import run, run_python
from cross_entropy_cases import LAYOUTS_2D, LAYOUTS_ND, make_logits, make_target
from fastopt import layouts, memory

pytestmark = pytest.mark.skipif(not memory.AVAILABLE, reason="this system has no MADV_FREE")

MEGABYTE = 2**20


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "POOL", memory._Pool())


def lend(megabytes: float = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    count = int(megabytes * MEGABYTE) // dtype.itemsize
    tensor = memory.empty((count // 64, 64), (64, 1), dtype)
    assert tensor is not None
    return tensor


def kept() -> list[int]:
    """Bytes lent of every block."""
    return [block.lent for block in memory.POOL.blocks]


def test_a_tensor_finds_the_memory_that_another_left() -> None:
    first = lend().fill_(3)
    address = first.data_ptr()
    del first
    second = lend()
    assert second.data_ptr() == address
    assert kept() == [second.nbytes]
    assert second.fill_(5).eq(5).all()


def test_what_lives_at_once_shares_nothing() -> None:
    tensors = [lend().fill_(i) for i in range(4)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 4
    for i, tensor in enumerate(tensors):
        assert tensor.eq(i).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shapes_strides_and_dtypes(dtype: torch.dtype) -> None:
    tensor = memory.empty((3, 7, 5), (35, 1, 7), dtype)
    assert tensor is not None
    assert (tensor.shape, tensor.stride(), tensor.dtype) == ((3, 7, 5), (35, 1, 7), dtype)
    assert tensor.untyped_storage().nbytes() == 105 * dtype.itemsize
    assert not tensor._is_view() and tensor.is_leaf and tensor.storage_offset() == 0


KEEPERS = {
    "view": lambda tensor: tensor.view(-1)[5:],
    "detached": torch.Tensor.detach,
    "storage": torch.Tensor.untyped_storage,
    "numpy": lambda tensor: tensor.numpy(),
    "dlpack": torch.utils.dlpack.to_dlpack,
    "dlpack tensor": lambda tensor: torch.from_dlpack(tensor),
    "set_": lambda tensor: torch.empty(0).set_(tensor),
    "data": lambda tensor: torch.nn.Parameter(tensor),
    "saved": lambda tensor: (torch.ones_like(tensor, requires_grad=True) * tensor).grad_fn,
}


@pytest.mark.parametrize("keeper", KEEPERS)
def test_who_holds_the_memory_keeps_it(keeper: str) -> None:
    tensor = lend()
    size = tensor.nbytes
    held = KEEPERS[keeper](tensor)
    del tensor
    gc.collect()
    assert kept() == [size]
    del held
    gc.collect()
    assert kept() == [0]


COPIES = {
    "clone": torch.clone,
    "pickle": lambda tensor: pickle.loads(pickle.dumps(tensor)),
    "double": torch.Tensor.double,
    "numpy": lambda tensor: torch.tensor(tensor.numpy()),
}


@pytest.mark.parametrize("copy", COPIES)
def test_copies_are_torchs_own(copy: str) -> None:
    tensor = lend().normal_()
    values = tensor.numpy().copy()
    other = COPIES[copy](tensor)
    del tensor
    assert kept() == [0]
    assert (other.numpy() == values).all()


def test_shared_memory_takes_the_place_of_ours() -> None:
    tensor = lend().fill_(7)
    tensor.share_memory_()
    assert tensor.is_shared() and tensor.eq(7).all()
    assert kept() == [0]


def test_a_smaller_shape_fits_and_a_larger_one_is_refused() -> None:
    tensor = lend()
    tensor.resize_(3, 5)
    assert tensor.shape == (3, 5)
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.resize_(10 * MEGABYTE)


def test_a_block_serves_what_fits_into_it_and_a_larger_one_takes_its_place() -> None:
    del_me = lend(8)
    address = del_me.data_ptr()
    del del_me
    small = lend(2)
    assert small.data_ptr() == address
    del small
    large = lend(16)
    assert [block.size for block in memory.POOL.blocks] == [large.nbytes]


def test_nothing_is_kept_that_the_last_calls_did_not_use() -> None:
    both = [lend(), lend()]
    del both
    assert len(memory.POOL.blocks) == 2
    for _ in range(2 * memory.WINDOW):
        lend()  # one at a time
    assert len(memory.POOL.blocks) == 1
    for _ in range(2 * memory.WINDOW):
        memory.POOL.age()
    assert memory.POOL.blocks == []


def test_the_cache_can_be_emptied() -> None:
    held, left = lend().fill_(1), lend()
    del left
    fastopt.empty_cache()
    assert kept() == [held.nbytes] and held.eq(1).all()
    del held
    fastopt.empty_cache()
    assert memory.POOL.blocks == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of a process")
def test_the_system_may_take_what_is_kept() -> None:
    """All pages of a free block are marked as not needed; those of a block in use are not."""

    def lazily_free() -> int:
        with open("/proc/self/smaps_rollup") as lines:
            return next(
                int(line.split()[1]) * 1024 for line in lines if line.startswith("LazyFree")
            )

    before = lazily_free()
    tensor = lend(64).fill_(1)
    assert lazily_free() - before < MEGABYTE
    size = tensor.nbytes
    del tensor
    assert lazily_free() - before > 0.9 * size
    again = lend(64).fill_(2)
    assert lazily_free() - before < MEGABYTE
    assert again.eq(2).all()


def test_threads() -> None:
    """Nobody ever meets another's values, whoever frees what and when."""
    wrong = []

    def work(seed: int) -> None:
        held: list[tuple[int, Tensor]] = []
        for i in range(60):
            value = seed * 1000 + i
            count = 1024 * (1 + i % 3)
            tensor = memory.empty((count, 64), (64, 1), torch.float32)
            if tensor is not None:  # another thread was in the middle of it
                held.append((value, tensor.fill_(value)))
            if i % 7 == seed % 7:
                fastopt.empty_cache()
            while len(held) > i % 4:
                value, first = held.pop(0)
                if not first.eq(value).all():
                    wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert not wrong
    assert not any(kept())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_has_memory_of_its_own() -> None:
    script = """
import os, torch
from fastopt import memory
def lend():
    return memory.empty((1 << 20,), (1,), torch.float32)
held, left = lend().fill_(1), lend().fill_(2)
del left
with memory.POOL._lock:  # as another thread of the parent may
    child = os.fork()
    if child == 0:
        assert held.eq(1).all()
        held.fill_(3)
        lend().fill_(4)
        assert held.eq(3).all()
        del held
        lend().fill_(5)
        os._exit(0)
status = os.waitpid(child, 0)[1]
assert held.eq(1).all()
print("status", status)
"""
    assert run_python(script, OMP_NUM_THREADS="1").strip() == "status 0"


@pytest.mark.parametrize("layout", LAYOUTS_ND, ids=lambda layout: layout.__name__)
def test_gradients_have_the_strides_that_the_ops_give_them(
    layout: Callable[[Tensor], Tensor],
) -> None:
    for shape in [(5, 21, 9), (2, 5, 7, 11), (1, 3, 1, 2), (4, 6)]:
        if len(shape) == 4 or layout in LAYOUTS_2D:
            logits = layout(make_logits(shape))
            assert layouts.gradient_strides(logits) == layouts.empty_gradient(logits).stride()
            target = make_target(logits)
            _, grad, _ = torch.ops.fastopt.cross_entropy_forward_backward(
                logits, target, None, -100, 0.0, 1, logits.dtype, 0.0
            )
            assert layouts.gradient_strides(logits) == grad.stride()


# -- gradients of the loss --------------------------------------------------------------------------

ROWS, CLASSES = 272, 32000  # 33 MB of float32


def train(
    dtype: torch.dtype = torch.float32, rows: int = ROWS, **options: object
) -> tuple[Tensor, Tensor]:
    """Logits that some layer made, as in training, and the gradient that it gets of them."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, CLASSES, dtype=dtype).requires_grad_()
    target = torch.randint(CLASSES, (rows,))
    logits = hidden.view_as(hidden)
    loss = fastopt.cross_entropy(logits, target, **options)  # type: ignore[arg-type]
    loss.sum().backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_are_the_same_in_kept_memory(
    monkeypatch: pytest.MonkeyPatch, reduction: str, dtype: torch.dtype
) -> None:
    rows = ROWS * 4 // dtype.itemsize
    kept_loss, kept_grad = train(dtype, rows, reduction=reduction)
    assert kept() == [kept_grad.nbytes]
    del kept_grad
    assert kept() == [0]
    kept_loss, kept_grad = train(dtype, rows, reduction=reduction)  # in memory that is not 0
    monkeypatch.setattr(memory, "AVAILABLE", False)
    loss, grad = train(dtype, rows, reduction=reduction)
    assert_same_bits(kept_loss, loss)
    assert_same_bits(kept_grad, grad)
    assert kept_grad.stride() == grad.stride()


def test_whose_gradients_are_in_torchs_memory() -> None:
    """Those that their owner may want to enlarge, and small ones."""
    target = torch.randint(CLASSES, (ROWS,))
    leaf = torch.randn(ROWS, CLASSES).requires_grad_()
    fastopt.cross_entropy(leaf, target).backward()
    assert leaf.grad is not None
    leaf.grad.resize_(ROWS + 1, CLASSES)
    leaf.grad = None
    logits = leaf * 1
    logits.retain_grad()
    fastopt.cross_entropy(logits, target).backward()
    assert logits.grad is not None
    logits.grad.resize_(ROWS + 1, CLASSES)
    leaf.grad = None
    logits, seen = leaf * 1, []
    logits.register_hook(seen.append)
    fastopt.cross_entropy(logits, target).backward()
    seen[0].resize_(ROWS + 1, CLASSES)
    leaf.grad = None
    fastopt.cross_entropy(leaf[:100] * 1, target[:100]).backward()
    assert kept() == []


def test_second_derivatives_and_kept_graphs() -> None:
    leaf = torch.randn(ROWS, CLASSES).requires_grad_()
    logits = leaf * 1
    target = torch.randint(CLASSES, (ROWS,))
    loss = fastopt.cross_entropy(logits, target)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    second = torch.autograd.grad(loss * 2, leaf, retain_graph=True)[0]
    assert_same_bits(2 * first, second)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    (ours,) = torch.autograd.grad(grad.square().sum(), leaf)
    logits = leaf * 1
    stock_loss = torch.nn.functional.cross_entropy(logits, target)
    (grad,) = torch.autograd.grad(stock_loss, logits, create_graph=True)
    (stock,) = torch.autograd.grad(grad.square().sum(), leaf)
    torch.testing.assert_close(ours, stock)
    del first, second, grad, loss
    gc.collect()
    assert not any(kept())


def test_calls_that_want_none_of_it_give_it_back() -> None:
    train()
    assert len(kept()) == 1
    logits, target = torch.randn(512, 1000), torch.randint(1000, (512,))
    for _ in range(2 * memory.WINDOW):
        fastopt.cross_entropy(logits, target)
    assert kept() == []


PEAK = """
import sys, torch, torch.nn.functional as F, fastopt
from peak import status
loss_function = {"ours": fastopt.cross_entropy, "stock": F.cross_entropy}[sys.argv[1]]
torch.manual_seed(0)
rows, classes = 600, 32000
hidden = torch.randn(rows, 64)
head = torch.nn.Linear(64, classes)
target = torch.randint(classes, (rows,))
for step in range(4):
    loss_function(head(hidden), target).backward()
    head.zero_grad()
print(status("VmHWM:"))
if sys.argv[1] == "ours":
    assert len(fastopt.memory.POOL.blocks) == 1
    kept = loss_function(head(hidden), target).grad_fn  # alive when the interpreter ends
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of a process")
def test_a_training_step_holds_less_than_torchs() -> None:
    """Whatever is kept between the steps, and nothing is said when a process ends with it."""
    peaks = {}
    for who in ("ours", "stock"):
        done = run(sys.executable, "-c", PEAK, who, FASTOPT_ALWAYS="0", OMP_NUM_THREADS="1")
        assert (done.returncode, done.stderr) == (0, "")
        peaks[who] = int(done.stdout)
    assert peaks["ours"] < peaks["stock"]


@pytest.mark.parametrize("refused", ["at once", "later"])
def test_what_cannot_be_offered_to_the_system_is_not_kept(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked memory, or a kernel that does not know how."""
    if refused == "at once":
        monkeypatch.setattr(memory.mmap, "MADV_FREE", 12345)
        assert memory.empty((1024,), (1,), torch.float32) is None
        assert memory.POOL.blocks == []
    else:
        tensor = lend()
        monkeypatch.setattr(memory.mmap, "MADV_FREE", 12345)
        del tensor
        assert kept() == [0]
        fastopt.empty_cache()
        assert memory.POOL.blocks == []


def test_nobody_waits_for_the_lock() -> None:
    """A signal's handler may run in the middle of a call."""
    with memory.POOL._lock:
        assert memory.empty((1024,), (1,), torch.float32) is None
        memory.POOL.age()
        fastopt.empty_cache()


def test_without_room_for_a_block_torch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory, "_Block", refuse)
    loss, grad = train()
    assert kept() == []
    assert loss.isfinite() and grad.isfinite().all()
