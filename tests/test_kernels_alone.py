"""The CPU kernels without torch: tests/kernels/main.cpp, linked with what the library is made of.

For the machine of the compiler that CXX names: where that is another one, its emulator runs them
(`make aarch64`).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

_spec = importlib.util.spec_from_file_location("fastopt_setup", ROOT / "setup.py")
assert _spec is not None and _spec.loader is not None
setup = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(setup)

MACHINE = setup.target_machine(setup.find_compiler())
FOREIGN = platform.machine() != MACHINE
LEVELS = setup.X86_LEVELS if MACHINE == "x86_64" else setup.BASELINE


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = setup.build_cpu_library(strict=True).parent
    kernels = [folder / name for _, name, flags in setup.cpu_units(MACHINE) if flags]
    kernels.append(folder / "levels.o")
    target = tmp_path_factory.mktemp("kernels") / MACHINE
    # Sums and products are rounded as they are written: SGD's expected bits are computed by them.
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Icsrc"]
    setup.run(
        [*setup.find_compiler(), *flags, "tests/kernels/main.cpp", *map(str, kernels)], target
    )
    return target


def emulator() -> list[str]:
    if not FOREIGN:
        return []
    command = shutil.which(f"qemu-{MACHINE}")
    if command is None:
        pytest.skip(f"compiled for {MACHINE}, but not run: qemu-{MACHINE} (qemu-user) is not there")
    return [command, "-L", f"/usr/{MACHINE}-linux-gnu"]


@pytest.mark.parametrize("level", LEVELS)
def test_values(program: Path, level: str) -> None:
    result = subprocess.run(
        [*emulator(), program],
        check=False,
        env=os.environ | {"FASTOPT_SIMD": level},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    *_, last = result.stdout.splitlines()
    print(last)
    used, _, counted = last.partition(": ")
    if used != level:
        pytest.skip(f"this CPU has no {level}")
    passed, made = (int(word) for word in counted.split() if word.isdecimal())
    assert passed == made > 100_000
