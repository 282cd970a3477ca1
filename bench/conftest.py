"""Fixtures of the benchmarks: interleaved timing, copy bandwidth, peak memory.

pytest-benchmark times one variant after the other. On a shared machine the second variant then
meets other weather than the first, and the ratio of the two is part noise. So here all variants
of a case are timed first, in one process, round by round, in a new random order each round; each
variant then enters its durations into pytest-benchmark through a clock that is moved on by hand
(`record`). Its statistics, tables, JSON and comparisons work as always.
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("FASTOPT_CHECK", "0")  # before fastopt is imported: ours are what is timed

import pytest
import torch

import fastopt
import fastopt.backends
from timing import Call, Stopwatch, host_microseconds, make_stopwatch, measure_copy

SECONDS_PER_CASE = {"cpu": 6.0, "cuda": 1.5}
SECONDS_PER_CASE_QUICK = {"cpu": 1.5, "cuda": 0.5}
SHORTEST_TURN = 2e-3  # seconds: calls are repeated until one turn of the fastest takes this long
FEWEST_ROUNDS, FEWEST_ROUNDS_QUICK, MOST_ROUNDS = 21, 7, 300


class Clock:
    """Stands still until it is told how much time has passed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a few cases, a short time for each")
    parser.addoption("--eager", action="store_true", help="without torch.compile, the slow part")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: a case that --quick keeps")
    config.addinivalue_line("markers", "on(device): a case of this device; of both without it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = []
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        elsewhere = any(
            mark.args[0] != config.getoption("--device") for mark in item.iter_markers("on")
        )
        not_quick = config.getoption("--quick") and not item.get_closest_marker("quick")
        compiles = config.getoption("--eager") and item.callspec.params["variant"] == "compile"
        if elsewhere or not_quick or compiles:
            dropped.append(item)
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What a reader of the results needs; neither the host's name nor a path of it."""
    cpu = machine_info["cpu"]
    command = ["python -m pytest", *(os.path.relpath(arg, config.rootpath) for arg in config.args)]
    command += [flag for flag in ("--quick", "--eager") if config.getoption(flag)]
    gpu = {}
    if config.getoption("--device") == "cuda":
        command.append("--device=cuda")
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gb": round(properties.total_memory / 2**30),
            "cuda": torch.version.cuda,
            "triton": importlib.metadata.version("triton"),
            "kernels": fastopt.backends.GPU_FAMILY,
        }
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", platform.machine()),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        system=f"{platform.system()} {platform.machine()}",
        torch_simd=torch.backends.cpu.get_cpu_capability(),
        python=platform.python_version(),
        torch=torch.__version__,
        fastopt=fastopt.__version__,
        command=" ".join(command),
        **gpu,
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def left_out(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The variants that this run does without."""
    return ("compile",) if request.config.getoption("--eager") else ()


@pytest.fixture(scope="session")
def stopwatch(device: str) -> Stopwatch:
    return make_stopwatch(device)


@pytest.fixture(scope="session")
def copy_bandwidth(device: str, stopwatch: Stopwatch) -> float:
    return measure_copy(device, stopwatch)


@pytest.fixture(scope="session")
def interleave(
    request: pytest.FixtureRequest, device: str, stopwatch: Stopwatch
) -> Callable[..., dict[str, list[float]]]:
    """interleave(calls, before) -> seconds per call of each variant, one number per round.

    `before[variant]`, where given, runs before every call, outside the timing.
    """
    quick = request.config.getoption("--quick")
    budget = (SECONDS_PER_CASE_QUICK if quick else SECONDS_PER_CASE)[device]
    fewest_rounds = FEWEST_ROUNDS_QUICK if quick else FEWEST_ROUNDS

    def run(
        calls: dict[str, Call],
        before: dict[str, Call] | None = None,
        fewest: int = fewest_rounds,
    ) -> dict:
        before = before or {}

        def turn(variant: str, repeats: int) -> float:
            call, prepare = calls[variant], before.get(variant)
            seconds = 0.0
            for _ in range(repeats):
                if prepare:
                    prepare()
                seconds += stopwatch(call)
            return seconds / repeats

        for variant in calls:
            turn(variant, 2)  # compilation, first touch of the buffers, caches of the allocator
        guess = [min(turn(variant, 1) for _ in range(2)) for variant in calls]
        repeats = math.ceil(SHORTEST_TURN / min(guess))

        order, dice = list(calls), random.Random(0)
        durations: dict[str, list[float]] = {variant: [] for variant in calls}
        end = time.perf_counter() + budget
        with _no_garbage_collection():
            for done in range(MOST_ROUNDS):
                if done >= fewest and time.perf_counter() > end:
                    break
                dice.shuffle(order)
                for variant in order:
                    durations[variant].append(turn(variant, repeats))
        return durations

    return run


@pytest.fixture(scope="session")
def peak_memory(device: str) -> Callable[[Call], float | None]:
    """peak_memory(call) -> MB by which the call raises the process above what it held before.

    On a GPU as torch's allocator counts. On a CPU read from the kernel's high-water mark of
    resident memory (Linux; None elsewhere), so that it counts every buffer, whoever allocated it,
    and only the pages that were touched.
    """

    def run_on_gpu(call: Call) -> float:
        # What was asked for: the allocator hands out whole blocks, up to 1 MB larger.
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        call()
        return (torch.cuda.memory_stats()["requested_bytes.all.peak"] - before) / 2**20

    if device == "cuda":
        return run_on_gpu

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))

    def run(call: Call) -> float | None:
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # free blocks kept by malloc would hide new ones
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        except (AttributeError, OSError):
            return None
        before = resident("VmRSS")
        call()
        return (resident("VmHWM") - before) / 1024

    return run


@pytest.fixture(scope="session")
def launches(device: str) -> Callable[[Call], dict[str, int]]:
    """launches(call) -> how many kernels (copies and fills included) the call starts on a GPU."""

    def run(call: Call) -> dict[str, int]:
        if device == "cpu":
            return {}
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        return {"launches": sum(event.device_type == on_gpu for event in profile.events())}

    return run


@pytest.fixture(scope="session")
def host_time(device: str) -> Callable[..., dict[str, float]]:
    """host_time(call, prepare) -> microseconds until a call returns while a GPU may still work;
    median of many."""

    def run(call: Call, prepare: Call | None = None) -> dict[str, float]:
        return {} if device == "cpu" else {"host_us": host_microseconds(call, prepare)}

    return run


@pytest.fixture
def record(benchmark, copy_bandwidth: float) -> Callable[..., None]:
    """record(group, durations, bytes_moved, ...) enters one variant into pytest-benchmark.

    bytes_moved, where memory is the limit, is what the task must read and write at least, the same
    for every variant: GB/s and the share of the copy bandwidth then say how far a variant is from it.
    """

    def run(
        group: str, durations: list[float], bytes_moved: int | None = None, **extra: object
    ) -> None:
        benchmark.group = group
        benchmark.extra_info.update(copy_gb_per_s=copy_bandwidth / 1e9, **extra)
        if bytes_moved is not None:
            bandwidth = bytes_moved / statistics.median(durations)
            benchmark.extra_info.update(
                bytes_moved=bytes_moved,
                gb_per_s=bandwidth / 1e9,
                share_of_copy=bandwidth / copy_bandwidth,
            )
        remaining = iter(durations)
        benchmark.pedantic(
            CLOCK.advance, setup=lambda: ((next(remaining),), {}), rounds=len(durations)
        )

    return run


@contextlib.contextmanager
def _no_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
