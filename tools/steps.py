"""What a step of SGD over many small tensors costs the host: ours beside torch's three, and beside
those of other checkouts.

    python -m tools.steps [OTHER/CHECKOUT ...] [--only TEXT] [--rounds N]

Each has a process of its own, and they take turns, a few steps at a time. Times are CPU time of one
thread, in microseconds: the tenth percentile of all steps, since neighbours on a busy machine add to
the others, and the median. Behind each is the ratio of the best of torch's three to it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

STEPS = 25  # in one turn
TORCHS = ("for-loop", "foreach", "fused")
Call = Callable[[], object]


def cases() -> Iterator[tuple[str, list[tuple[int, ...]], bool]]:
    """Name, shapes, and whether each step has another learning rate."""
    import bench_sgd

    for name, shapes in {
        "1000 x 64": [(64,)] * 1000,
        "161 x 64": [(64,)] * 161,
        "LeNet's 10": bench_sgd.LENET,
    }.items():
        for scheduled in (False, True):
            yield name + ", new lr" * scheduled, shapes, scheduled


def serve(variant: str) -> None:
    """One side: a case is named on a line, and each line asks for one turn."""
    import torch

    import bench_sgd

    torch.set_num_threads(1)
    for line in sys.stdin:
        if line.strip():
            _, shapes, scheduled = next(case for case in cases() if case[0] == line.strip())
            case = bench_sgd.Case("", shapes)
            tensors = [bench_sgd.make_tensors(case, seed, "cpu") for seed in range(3)]
            training = bench_sgd.Training(variant, tensors[0], tensors[1:])
            (group,) = training.step.__self__.param_groups
        times = []
        for _ in range(STEPS):
            training.bring_gradients()
            if scheduled:
                group["lr"] *= 0.999
            start = time.thread_time()
            stop = time.thread_time()
            training.step()
            times.append(time.thread_time() - 2 * stop + start)
        print(*times, flush=True)


class Side:
    def __init__(self, checkout: str, variant: str) -> None:
        paths = os.pathsep.join(os.path.join(checkout, folder) for folder in ("", "bench"))
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--serve", variant],
            env=os.environ | {"PYTHONPATH": paths, "FASTOPT_ALWAYS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def times(self, case: str = "") -> list[float]:
        assert self.process.stdin and self.process.stdout
        print(case, file=self.process.stdin, flush=True)
        return [1e6 * float(seconds) for seconds in self.process.stdout.readline().split()]


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of a step over many small tensors.")
    parser.add_argument("others", nargs="*", metavar="OTHER/CHECKOUT")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    sys.path.insert(0, "bench")
    sides = {variant: Side(".", variant) for variant in TORCHS}
    sides |= {path: Side(path, "fastopt") for path in (*arguments.others, ".")}
    for name, *_ in cases():
        if arguments.only not in name:
            continue
        for side in sides.values():
            side.times(name)
        times: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(arguments.rounds):
            for side in [*sides][:: -1 if turn % 2 else 1]:
                times[side] += sides[side].times()
        found = {}
        for side, own in times.items():
            tenths = statistics.quantiles(own, n=10)
            found[side] = tenths[0], tenths[4]
        best = [min(found[variant][i] for variant in TORCHS) for i in (0, 1)]
        print(f"{name}: tenth percentile, median")
        for side, own in found.items():
            columns = (f"{time:9.1f} us {b / time:5.2f}" for time, b in zip(own, best, strict=True))
            print(*columns, "", side, flush=True)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1:2] == ["--serve"] else main()
