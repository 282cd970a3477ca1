"""tools/lease.py, which spends minutes on a GPU: rehearsed from start to end, without one. Whatever
a part does, the others run and the report says what became of each.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

import lease
import smoke
from lease import Part, Step, Verdict

PYTHON = sys.executable


@pytest.fixture(autouse=True)
def _work_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WORK", tmp_path / "work")


def run_parts(out: Path, *parts: Part, limit: float = 600) -> tuple[Step, dict[str, Verdict]]:
    step = Step("step-0", out, limit, {"commit": "none"})
    step.run([[part] for part in parts])
    return step, {verdict.name: verdict for verdict in step.verdicts}


def reported(out: Path, step: str = "step-0") -> dict[str, dict]:
    return {part["name"]: part for part in json.loads((out / f"{step}.json").read_text())["parts"]}


def logs(out: Path, step: str = "step-0") -> dict[str, str]:
    with tarfile.open(out / f"{step}.tgz") as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        return {Path(m.name).name: archive.extractfile(m).read().decode() for m in files}


def is_gone(pid: int) -> bool:
    """Ended, whether or not anybody has asked for its exit status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# Its child does not die with it, unless the whole group does.
HANG = """
import pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "1000"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("hanging now", flush=True)
time.sleep(1000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_fails_hangs_or_dies_stops_nobody_else(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    complaint = "print('many lines'); print('E   assert 1 == 2'); raise SystemExit(3)"
    step, verdicts = run_parts(
        tmp_path,
        Part("good", [PYTHON, "-c", "print('17 passed in 1 s')"], 60),
        Part("bad", [PYTHON, "-c", complaint], 60),
        # Long enough to start its child. A load that makes it longer leaves no pid, and no child.
        Part("hangs", [PYTHON, "-S", "-c", HANG, str(pid)], 2),
        Part("dies", [PYTHON, "-c", "import os; os.kill(os.getpid(), 11)"], 60),
        Part("lacks a module", [PYTHON, "-c", ""], 60, modules=("no_such_module",)),
        Part("lacks a program", [PYTHON, "-c", ""], 60, programs=("no-such-program",)),
        Part("good again", [PYTHON, "-c", "print('say: all is well')"], 60),
    )
    assert {name: verdict.verdict for name, verdict in verdicts.items()} == {
        "good": lease.PASSED,
        "bad": lease.FAILED,
        "hangs": lease.TIMED_OUT,
        "dies": lease.KILLED,
        "lacks a module": lease.NOT_RUN,
        "lacks a program": lease.NOT_RUN,
        "good again": lease.PASSED,
    }
    assert verdicts["good"].reason == ["17 passed in 1 s"]
    assert verdicts["bad"].reason == ["exit status 3", "E   assert 1 == 2"]
    assert verdicts["dies"].reason[0] == "by signal SIGSEGV"
    assert "no_such_module" in verdicts["lacks a module"].reason[0]
    assert verdicts["good again"].reason == ["all is well"]
    if pid.exists() and (child := pid.read_text()):
        wait_for(lambda: is_gone(int(child)))
    assert step.failed
    assert {name: part["verdict"] for name, part in reported(tmp_path).items()} == {
        name: verdict.verdict for name, verdict in verdicts.items()
    }
    assert "many lines" in logs(tmp_path)["bad.log"]
    screen = step.screen()
    assert "2 passed, 1 FAILED, 1 TIMED OUT, 1 KILLED, 2 not run" in screen
    assert all(name in screen for name in verdicts)


def test_parts_beyond_the_steps_time_do_not_run(tmp_path: Path) -> None:
    _, verdicts = run_parts(tmp_path, Part("late", [PYTHON, "-c", ""], 60), limit=0)
    assert verdicts["late"].verdict == lease.NOT_RUN
    assert "time was used up" in verdicts["late"].reason[0]


ENDED = """
import signal, sys
from pathlib import Path
sys.path.append(sys.argv[1])
import lease
from lease import *
lease.WORK = Path(sys.argv[2]) / "work"
out, pid = Path(sys.argv[2]), sys.argv[3]
step = Step("step-0", out, 600, {})
signal.signal(signal.SIGTERM, step.stop)
step.run([
    [Part("good", [PYTHON, "-c", "print('1 passed')"], 600)],
    [Part("hangs", [PYTHON, "-S", "-c", sys.argv[4], pid], 600)],
    [Part("late", [PYTHON, "-c", ""], 600)],
])
print(step.screen())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_step_that_is_ended_has_said_what_it_knew(tmp_path: Path, ending: int) -> None:
    pid = tmp_path / "pid"
    arguments = [str(ROOT / "tools"), str(tmp_path), str(pid), HANG]
    process = subprocess.Popen(
        [PYTHON, "-c", ENDED, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: pid.exists() and pid.read_text())
    child = int(pid.read_text())
    process.send_signal(ending)
    screen, _ = process.communicate()
    parts = reported(tmp_path)
    assert parts["good"]["verdict"] == lease.PASSED
    assert "1 passed" in logs(tmp_path)["good.log"]
    if ending == signal.SIGKILL:  # nobody is left to end the part; whoever killed the step must
        os.kill(child, signal.SIGKILL)
        return
    assert parts["hangs"]["verdict"] == lease.KILLED
    assert parts["late"]["verdict"] == lease.NOT_RUN
    assert "ended_by: SIGTERM" in screen
    wait_for(lambda: is_gone(child))


# -- the steps --------------------------------------------------------------------------------------

# Runs the command that it is given behind its own options.
STAND_IN = """#!/bin/sh
while [ $# -gt 0 ] && [ "$1" != "{python}" ]; do shift; done
echo "$(basename "$0") looks on"
exec "$@"
"""


@pytest.fixture
def tools_on_path(tmp_path: Path) -> str:
    for name in ("compute-sanitizer", "ncu"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(STAND_IN.format(python=PYTHON))
        tool.chmod(0o755)
    return f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("number", lease.STEP_LIMITS)
def test_every_step_runs_from_start_to_end(number: int, tmp_path: Path, tools_on_path: str) -> None:
    """On the CPU, the first part of each stage, with stand-ins for the profilers."""
    # Inside a worker of pytest-xdist, as it would say, benchmarks are switched off.
    other = ("FASTOPT_", "PYTEST_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(other)}
    result = subprocess.run(
        [PYTHON, "tools/lease.py", str(number), "--rehearse", "--out", str(tmp_path / "out")],
        check=False,
        cwd=ROOT,
        env={**environment, "PATH": tools_on_path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    parts = reported(tmp_path / "out", f"step-{number}")
    expected = [part for stage in lease.steps(number, rehearse=True) for part in stage]
    assert [*parts] == [part.name for part in expected]
    for part in expected:
        verdict, reason = parts[part.name]["verdict"], parts[part.name]["reason"]
        if "tests/test_gpu.py" in part.command and not torch.cuda.is_available():
            assert verdict == lease.NOT_RUN and reason == ["pytest selected no test"]
        else:
            assert verdict == lease.PASSED, reason
        if part.programs:
            log = logs(tmp_path / "out", f"step-{number}")[lease.log_name(part.name)]
            assert f"{part.programs[0]} looks on" in log
    assert f"torch: {torch.__version__}" in result.stdout
    size = (tmp_path / "out" / f"step-{number}.tgz").stat().st_size
    assert size < 1 << 20


@pytest.mark.parametrize("number", lease.STEP_LIMITS)
def test_a_step_names_what_exists(number: int) -> None:
    """Every part of the real step: files, groups, and names that cannot be mistaken in the logs."""
    parts = [part for stage in lease.steps(number, rehearse=False) for part in stage]
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    for part in parts:
        for word in part.command:
            if word.endswith(".py"):
                assert (ROOT / word).exists(), word
        if "tools/smoke.py" in part.command:
            assert part.command[part.command.index("tools/smoke.py") + 1] in smoke.GROUPS
    assert set(lease.SMOKE) == set(smoke.GROUPS)


# -- tools/smoke.py ---------------------------------------------------------------------------------

PLAN = """
#include "cuda/cross_entropy/plan.h"
using namespace fastopt::gpu;
extern "C" int plan(int64_t rows, int64_t classes, int64_t bytes, int64_t contiguous,
                    int64_t reads_twice, int64_t pairs) {
  const DeviceLimits h100{132, 227 << 10, 228 << 10, true};
  const CrossEntropyPlan p =
      plan_cross_entropy({rows, classes, bytes, 0, contiguous != 0, reads_twice != 0, pairs != 0},
                         h100);
  const bool shares_warp = p.kernel == CrossEntropyKernel::rows && p.lanes < 32;
  return static_cast<int>(p.kernel) * 1000 + p.held * 100 + p.cluster + 20 * shares_warp +
         10 * p.adjacent;
}
"""
PACKED, ROWS, STRIDED = 0, 1000, 2000
SHARES_WARP, ONE_ROW, TWO_ROWS = 20, 10, 20  # of a warp; of a thread


def test_the_groups_take_the_kernels_that_they_are_named_after(tmp_path: Path) -> None:
    source, library = tmp_path / "plan.cpp", tmp_path / "plan.so"
    source.write_text(PLAN)
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-I", str(ROOT / "csrc"), str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    ask = ctypes.CDLL(str(library)).plan
    ask.argtypes = [ctypes.c_int64] * 6

    def plans(group: str, reads_twice: bool, width: int = 4) -> set[int]:
        """Of the group's shapes, in a dtype of so many bytes."""
        found = set()
        for rows, classes, *positions in smoke.SHAPES[group]:
            rows *= math.prod(positions)
            even = math.prod(positions) % 2 == 0
            found.add(ask(rows, classes, width, not positions, reads_twice, even))
        return found

    assert plans("packed", True) == {PACKED + 1}
    assert plans("rows", False) <= {ROWS + cluster for cluster in (1, 2, 4, 8)}
    for width in (2, 4):
        assert plans("held", True, width) == {ROWS + 100 + 1, ROWS + 100 + SHARES_WARP + 1}
        assert plans("clusters", True, width) <= {ROWS + 100 + cluster for cluster in (2, 4, 8)}
    assert plans("loop", True) <= {ROWS + cluster for cluster in (1, 2, 4, 8)}  # not held
    assert plans("strided", True) == {STRIDED + ONE_ROW + 1, STRIDED + TWO_ROWS + 1}


def test_smoke_notices_a_wrong_result(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    right = smoke.fastopt.cross_entropy
    monkeypatch.setattr(sys, "argv", ["smoke.py", "labels", "--device", "cpu"])
    assert smoke.main() == 0
    wrong = lambda *args, **keywords: right(*args, **keywords) * 1.01
    monkeypatch.setattr(smoke.fastopt, "cross_entropy", wrong)
    (name, check), *_ = smoke.GROUPS["packed"]("cpu")
    with pytest.raises(AssertionError, match="outside the budget"):
        check()
    assert name and "0 failed" in capsys.readouterr().out


# -- tools/specialisations.py, tests/cuda_errors.py -------------------------------------------------


def test_specialisations_are_counted() -> None:
    pytest.importorskip("triton")
    command = [PYTHON, "tools/specialisations.py", "-q", "tests/test_cross_entropy.py"]
    selection = "test_named_shapes and two-classes and (float32 or bfloat16)"
    result = subprocess.run(
        [*command, "-k", selection], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    count = next(line for line in result.stdout.splitlines() if "distinct specialisations" in line)
    distinct, launches = int(count.split()[0]), int(count.split()[-2])
    # Two dtypes, and at least a kernel each for the weights, the loss, its gradient.
    assert 6 <= distinct <= launches, count


STICKY = """
import torch
from cuda_errors import pytest_runtest_makereport

def illegal(): raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore")
torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = {synchronize}

def pytest_configure(config):
    if {worker}: config.workerinput = {{}}
"""


@pytest.mark.parametrize("worker", [False, True])
@pytest.mark.parametrize("sticky", [False, True])
def test_no_test_runs_after_an_error_that_stays(tmp_path: Path, sticky: bool, worker: bool) -> None:
    conftest = STICKY.format(synchronize="illegal" if sticky else "lambda: None", worker=worker)
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_it.py").write_text("def test_a(): assert False\ndef test_b(): pass\n")
    result = subprocess.run(
        [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(tmp_path)],
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
    )
    told = result.stdout + result.stderr
    assert ("can use the GPU no more" in told) == sticky, told
    if sticky:
        assert "an illegal memory access" in told and "1 passed" not in told
    else:
        assert "1 failed, 1 passed" in told, told
    assert result.returncode == (1 if worker or not sticky else 2), told
