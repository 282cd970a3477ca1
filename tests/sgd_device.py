"""CPU tensors play a GPU's: fastopt.SGD from step() to whatever kernels a Device is given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from fastopt import backends
from fastopt.sgd import devices, launch
from fastopt.sgd.table import Launch
from sgd_oracle import Snapshot, assert_same_bits, assert_same_history, for_loop


@dataclass
class Device:
    """Kernels that update CPU tensors as they would a GPU's."""

    run: Callable[[Launch], None]
    rounds_bfloat16: bool = True  # Triton's interpreter truncates where a GPU rounds
    rows: int = 2000  # what a test of many parameters can afford
    launched: list[Launch] = field(default_factory=list)

    def launch(self, launch: Launch) -> None:
        self.launched.append(launch)
        self.run(launch)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """fastopt.SGD takes the CPU for this device."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "DEVICE_TYPE", "cpu")
            patch.setattr(launch, "family", lambda: "tested")
            patch.setattr(backends, "serves_gpu", lambda index: True)
            patch.setitem(launch.LAUNCHERS, "tested", self.launch)
            yield

    def history(self, run: Callable[..., list[Snapshot]]) -> list[Snapshot]:
        before = len(self.launched)
        with self.in_place():
            history = run(fastopt.SGD)
        assert len(self.launched) > before
        return history

    def check(self, run: Callable[..., list[Snapshot]], what: str = "") -> None:
        """Same states as torch's for-loop has after every step."""
        assert_same_history(self.history(run), run(for_loop), what)

    def assert_same(self, ours: Tensor, theirs: Tensor, what: str = "") -> None:
        """The same bits, or truncated bfloat16 instead of rounded."""
        if ours.dtype is torch.bfloat16 and not self.rounds_bfloat16:
            ulp = theirs.double().abs() * 2**-7
            assert ((ours.double() - theirs.double()).abs() <= ulp + 1e-30).all(), what
        else:
            assert_same_bits(ours, theirs, what)


def amp_step(optimizer: Any, found_inf: float, grad_scale: float | None) -> None:
    optimizer.found_inf = torch.tensor([found_inf])
    optimizer.grad_scale = None if grad_scale is None else torch.tensor([grad_scale])
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale


@contextmanager
def capture(device: Device) -> Iterator[None]:
    """As while a CUDA graph is captured: memory is taken, but nothing that is enqueued runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "capturing", lambda _: True)
        patch.setattr(device, "run", lambda launch: None)
        for name in ("fill_", "copy_", "zero_"):
            patch.setattr(Tensor, name, lambda tensor, *_: tensor)
        yield


class Subclass(Tensor):
    """A tensor that might do anything."""
