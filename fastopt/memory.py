"""Memory for large gradients on CPU that an earlier gradient has left.

glibc gives a large tensor's memory back to the system when the tensor dies, and the next one's pages
are made and zeroed anew: that takes longer than the arithmetic. These blocks are kept instead, and
offered to the system (MADV_FREE): it takes their pages where memory is short, without asking, and
until then the next gradient finds them as they were left (and a process is said to hold them). They
are lent out as the storage of a tensor, and come back when that dies, wherever that is.

Kept is at most what the last calls that our kernels served had in use at once, and nothing after WINDOW
of them that wanted none of it. Such a storage cannot be resized; everything else is as with torch's own
memory.
"""

import math
import mmap
import os
import threading
import weakref

import torch

WINDOW = 8  # calls
# Below, glibc keeps freed memory itself (its largest threshold for mmap).
MIN_BYTES = 32 << 20
AVAILABLE = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")  # Linux


class _Block:
    """Pages of our own, lent to one tensor at a time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lent = 0  # bytes
        self.kept = True  # once it comes back
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            self._memory.madvise(mmap.MADV_HUGEPAGE)
            self._memory.madvise(mmap.MADV_FREE)
        except OSError:  # an old kernel, or locked memory: nothing could be offered to the system
            self.kept = False
        self._lease: weakref.ref[memoryview] | None = None

    def lend(self, size: int) -> torch.UntypedStorage:
        # The storage keeps the view alive, and nothing else does.
        view = memoryview(self._memory)[:size]
        self._lease = weakref.ref(view, self._take_back)
        self.lent = size
        return torch.frombuffer(view, dtype=torch.uint8).untyped_storage()

    def _take_back(self, _: object) -> None:
        self._lease = None  # which holds this method, and so the block
        try:
            self._memory.madvise(mmap.MADV_FREE)
        except OSError:  # locked since
            self.kept = False
        self.lent = 0  # last: from here on another thread may lend it


class _Pool:
    def __init__(self) -> None:
        self.blocks: list[_Block] = []
        # Never waited for: a signal's handler may call the loss in the middle of this.
        self._lock = threading.Lock()
        self._calls = 0
        self._most = 0  # bytes that were in use at once, of the last calls

    def storage(self, size: int) -> torch.UntypedStorage | None:
        """None where the memory is better torch's own."""
        self.age()
        if not self._lock.acquire(blocking=False):
            return None
        try:
            free = sorted((b for b in self.blocks if not b.lent), key=lambda block: block.size)
            block = next((block for block in free if block.size >= size), None)
            if block is None:
                if free:  # too small: a larger one takes its place
                    self.blocks.remove(free[-1])
                block = _Block(size)
                if not block.kept:
                    return None
                self.blocks.append(block)
            storage = block.lend(size)
            self._most = max(self._most, sum(block.lent for block in self.blocks))
            return storage
        except OSError:  # no room: torch, which asks for less at once, may fare better
            self._keep(0)
            return None
        finally:
            self._lock.release()

    def age(self) -> None:
        """Counts a call; after WINDOW of them, nothing is kept that they did not have in use."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._calls += 1
            if self._calls >= WINDOW:
                self._keep(self._most)
                self._calls, self._most = 0, sum(block.lent for block in self.blocks)
        finally:
            self._lock.release()

    def _keep(self, size: int) -> None:
        kept = sum(block.size for block in self.blocks)
        for block in sorted(self.blocks, key=lambda block: block.size, reverse=True):
            if not block.lent and (kept > size or not block.kept):
                self.blocks.remove(block)
                kept -= block.size

    def empty(self) -> None:
        if self._lock.acquire(timeout=1):
            try:
                self._keep(0)
            finally:
                self._lock.release()

    def forget_lock(self) -> None:
        self._lock = threading.Lock()


POOL = _Pool()
if hasattr(os, "register_at_fork"):
    # A child would keep what its parent has to copy. And another thread may hold the lock.
    os.register_at_fork(before=POOL.empty, after_in_child=POOL.forget_lock)


def empty(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor | None:
    """Uninitialised, one element after the other in the order of the strides, in memory that was in use
    before; None where torch's own is better."""
    storage = POOL.storage(math.prod(shape, start=dtype.itemsize))
    if storage is None:
        return None
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, strides)


def empty_cache() -> None:
    """Gives back to the system what fastopt keeps of the memory of gradients on CPU."""
    POOL.empty()
