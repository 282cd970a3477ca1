"""After an illegal access every later call of a process to CUDA fails: whoever it was that did it,
all tests after it would be blamed. conftest.py takes the hook from here."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

import pytest
import torch


def sticky_error() -> str | None:
    """What CUDA answers to everything from now on, if it does."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and (error := sticky_error()):
        word = f"this process can use the GPU no more, after {item.nodeid}: {error}"
        if hasattr(item.config, "workerinput"):  # pytest-xdist puts another worker in its place
            print(f"\n{word}", file=sys.__stderr__, flush=True)
            os._exit(1)
        item.session.shouldstop = word
    return report
