"""Two builds of the CPU library against each other, on the benchmarks' large cases.

    python -m tools.compare fastopt/_C.so build/clang/fastopt/_C.so [--only TEXT] [--rounds N]

A process can hold one of them only. So each has its own, and the two take turns, call by call.
Times are CPU time of one thread, which busy neighbours disturb less than the clock on the wall.
Printed is the median of each, and the median of the rounds' ratios, second to first.
"""

import argparse
import dataclasses
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

MANY = 1 << 20  # elements: such a case is large
ENOUGH = 1 << 24  # elements: more rows only repeat the same loops

Call = Callable[[], object]


def large_cases() -> Iterator[tuple[str, Callable[[], tuple[Call, Call]]]]:
    """(name, what makes the call to time and the one before it) of each."""
    sys.path.insert(0, "bench")
    import torch

    import bench_cross_entropy
    import bench_sgd

    def loss(case: bench_cross_entropy.Case) -> tuple[Call, Call]:
        row = math.prod(case.shape[1:])
        rows = min(case.shape[0], max(1, ENOUGH // row))
        case = dataclasses.replace(case, shape=(rows, *case.shape[1:]))
        inputs = bench_cross_entropy.make_inputs(case, "cpu")
        call, before = bench_cross_entropy.make_call(case, "fastopt", *inputs)
        return call, before or (lambda: None)

    def step(case: bench_sgd.Case) -> tuple[Call, Call]:
        tensors = [bench_sgd.make_tensors(case, seed, "cpu") for seed in range(3)]
        training = bench_sgd.Training("fastopt", tensors[0], tensors[1:])
        return training.step, training.bring_gradients

    for parameters in bench_cross_entropy.only_on("cpu", bench_cross_entropy.CPU_CASES):
        (case,) = parameters.values
        if math.prod(case.shape) >= MANY:
            yield f"loss {case}", functools.partial(loss, case)
    for dtype in (torch.float32, torch.bfloat16):
        case = bench_sgd.Case(f"{str(dtype).removeprefix('torch.')} 25M", [(25_000_000,)], dtype)
        yield f"SGD {case}", functools.partial(step, case)


def serve() -> None:
    """One library's side: a case is named on a line, then each empty line asks for one call."""
    import torch

    import fastopt.backends

    assert fastopt.backends.CPU_LIBRARY is not None, fastopt.backends.CPU_LIBRARY_ERROR
    torch.set_num_threads(1)
    cases = dict(large_cases())
    for line in sys.stdin:
        if name := line.strip():
            call, before = cases[name]()
            before()
            call()
        before()
        start = time.thread_time()
        call()
        print(time.thread_time() - start, flush=True)


class Side:
    def __init__(self, library: str) -> None:
        environment = {"FASTOPT_LIBRARY": os.path.abspath(library), "FASTOPT_ALWAYS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.compare", "--serve"],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def time(self, case: str = "") -> float:
        assert self.process.stdin and self.process.stdout
        print(case, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two builds of the CPU library.")
    parser.add_argument("libraries", nargs=2)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    sides = [Side(library) for library in arguments.libraries]
    print(f"{'first ms':>9} {'second ms':>9} {'ratio':>6}  case")
    for name, _ in large_cases():
        if arguments.only not in name:
            continue
        for side in sides:
            side.time(name)
        rounds = []
        for turn in range(arguments.rounds):
            order = sides[:: -1 if turn % 2 else 1]  # neither is always the one that comes second
            times = {side: side.time() for side in order}
            rounds.append([times[side] for side in sides])
        first, second = (statistics.median(times) * 1e3 for times in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for a, b in rounds)
        print(f"{first:9.1f} {second:9.1f} {ratio:6.2f}  {name}", flush=True)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
