"""What the benchmarks and tools/minibench.py time with."""

import statistics
import time
from collections.abc import Callable

import torch

# Eight times a CPU's last-level cache of 32 MB, or a GPU's of 128 MB: the copy is from memory.
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
COLD_BYTES = 256 << 20  # written between two calls on a GPU, so that none finds its data in L2
BUSY_CYCLES = 2_000_000  # of a GPU's clock, some 2 GHz

Call = Callable[[], object]
Stopwatch = Callable[[Call], float]


def make_stopwatch(device: str) -> Stopwatch:
    """stopwatch(call) -> seconds. On a GPU between two events on its stream, from a cold L2 on. The
    GPU is kept busy for a millisecond before, as a model's own kernels do in training: the host
    runs ahead, and only what it needs beyond that is waited for. How long the host needs by itself
    is `host_microseconds`."""
    if device == "cpu":
        return _time
    cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(call: Call) -> float:
        torch.cuda._sleep(BUSY_CYCLES)
        cold.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return run


def measure_copy(device: str, stopwatch: Stopwatch, rounds: int = 31) -> float:
    """Bytes per second of torch's own copy between two warm buffers, read and write counted.

    The best of many, because it serves as the roof.
    """
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    destination = source.clone()
    seconds = min(stopwatch(lambda: destination.copy_(source)) for _ in range(rounds))
    return 2 * source.nbytes / seconds


def host_microseconds(call: Call, prepare: Call | None = None, rounds: int = 21) -> float:
    """Until a call returns, while a GPU may still work; median of many."""
    seconds = []
    for _ in range(rounds):
        if prepare:
            prepare()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append(_time(call))
    return 1e6 * statistics.median(seconds)


def _time(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
