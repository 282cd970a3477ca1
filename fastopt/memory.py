"""Memory for large gradients on CPU that an earlier gradient has left.

glibc gives a large tensor's memory back to the system when the tensor dies, and the next one's pages
are made and zeroed anew: that takes longer than the arithmetic. These blocks are kept instead, and
offered to the system (MADV_FREE): it takes their pages where memory is short, without asking, and
until then the next gradient finds them as they were left. They are lent out as the storage of a
tensor, and come back when that dies, wherever that is.

Kept is at most what the last calls had in use at once, and nothing after WINDOW calls that wanted none
of it. Such a storage cannot grow (Tensor.resize_ to more elements raises); everything else is as with
torch's own memory.
"""

import mmap
import os
import threading
import weakref

import torch
from torch import Tensor

WINDOW = 8  # calls
# Below, glibc keeps freed memory itself (its largest threshold for mmap).
MIN_BYTES = 32 << 20
AVAILABLE = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")  # Linux


class _Block:
    """Pages of our own, lent to one tensor at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lent = 0  # bytes
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._lease: weakref.ref[memoryview] | None = None

    def lend(self, size: int) -> torch.UntypedStorage:
        # The storage keeps the view alive, and nothing else does.
        view = memoryview(self._memory)[:size]
        self._lease = weakref.ref(view, self._take_back)
        self.lent = size
        return torch.frombuffer(view, dtype=torch.uint8).untyped_storage()

    def _take_back(self, _: object) -> None:
        self._lease = None  # which holds this method, and so the block
        self._memory.madvise(mmap.MADV_FREE)
        self.lent = 0  # last: from here on another thread may lend it


class _Pool:
    def __init__(self) -> None:
        self.blocks: list[_Block] = []
        self._lock = threading.Lock()
        self._calls = 0
        self._most = 0  # bytes that were in use at once, of the last calls

    def storage(self, size: int) -> torch.UntypedStorage:
        self.age()
        with self._lock:
            free = sorted((b for b in self.blocks if not b.lent), key=lambda block: block.size)
            block = next((block for block in free if block.size >= size), None)
            if block is None:
                if free:  # too small: a larger one takes its place
                    self.blocks.remove(free[-1])
                block = _Block(size)
                self.blocks.append(block)
            storage = block.lend(size)
            self._most = max(self._most, sum(block.lent for block in self.blocks))
            return storage

    def age(self) -> None:
        """Counts a call; after WINDOW of them, nothing is kept that they did not have in use."""
        with self._lock:
            self._calls += 1
            if self._calls < WINDOW:
                return
            self._keep(self._most)
            self._calls, self._most = 0, sum(block.lent for block in self.blocks)

    def _keep(self, size: int) -> None:
        kept = sum(block.size for block in self.blocks)
        for block in sorted(self.blocks, key=lambda block: block.size, reverse=True):
            if kept > size and not block.lent:
                self.blocks.remove(block)
                kept -= block.size

    def empty(self) -> None:
        with self._lock:
            self._keep(0)

    def forget_lock(self) -> None:
        self._lock = threading.Lock()


POOL = _Pool()
if AVAILABLE:  # another thread may have held the lock while this one forked
    os.register_at_fork(after_in_child=POOL.forget_lock)


def empty_like(x: Tensor) -> Tensor | None:
    """Uninitialised, with the shape, strides and dtype of x, in memory that was in use before. None
    where the system refuses: torch, which asks for less at once, may fare better."""
    try:
        storage = POOL.storage(x.numel() * x.element_size())
    except OSError:
        POOL.empty()
        return None
    return torch.empty(0, dtype=x.dtype, device="cpu").set_(storage, 0, x.shape, x.stride())


def empty_cache() -> None:
    """Gives back to the system what fastopt keeps of the memory of gradients on CPU."""
    POOL.empty()
