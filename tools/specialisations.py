"""Counts the Triton kernels that a run of tests would compile on a GPU, without one: before minutes
of a lease go into compiling, at half a second and more for each.

    python tools/specialisations.py tests/test_cross_entropy.py -k SELECTION    (pytest's arguments)

The tests run on the CPU's kernels; beside each call the Triton launcher runs with its kernels
recorded instead of launched (tests/triton_support.py).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["FASTOPT_ALWAYS"] = "1"

import pytest

from fastopt import ops
from fastopt.kernels.cross_entropy import launch as kernels
from triton_support import Launch, recorded


def specialisation(launch: Launch) -> tuple[Any, ...]:
    """What Triton's cache would tell apart."""
    source = launch.source()
    return (
        launch.name,
        launch.warps,
        tuple(source.signature.items()),
        tuple(source.constants.items()),
        tuple((at, str(attribute)) for at, attribute in source.attrs.items()),
    )


class Counter:
    """A plugin of pytest."""

    def __init__(self) -> None:
        self.found: set[tuple[Any, ...]] = set()
        self.launches = 0

    def beside(self, name: str) -> Callable[..., Any]:
        launcher, own = ops.flat(name, getattr(kernels, name)), getattr(ops, name)

        def call(*arguments: Any) -> Any:
            with recorded(kernels) as launches:
                launcher(*arguments)
            self.launches += len(launches)
            self.found |= set(map(specialisation, launches))
            return own(*arguments)

        return call

    def pytest_sessionstart(self) -> None:
        for name in ops.SCHEMAS:
            if name == "cross_entropy_scale_":
                continue  # in place: not twice
            setattr(ops, name, self.beside(name))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        count = f"{len(self.found)} distinct specialisations in {self.launches} launches"
        terminalreporter.write_line(count)


if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]], [Counter()]))
