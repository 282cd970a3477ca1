"""Spend minutes on a GPU well: `make gpu-lease STEP=1..5 OUT=folder`.

A step is a list of parts. Each part is a command in a process group of its own, which is killed
whole at the part's time limit; whatever becomes of one, the next part runs, as an illegal access or
a hang spoils nothing but its own process. After every part the step's report is written anew:
OUT/step-N.json (verdicts, device, versions, source) and OUT/step-N.tgz (the same, and every part's
whole output), so that a step that is killed in the middle has said what it knew.

Needs Python, torch and what a part names; a part whose tools are missing does not run and says so.
`make gpu-carry` beforehand, on the machine with the compilers, builds the library into build/carry;
a step takes it from there if it was built from these sources, and builds it otherwise.

    python tools/lease.py 1 --out build/lease [--rehearse]
    python tools/lease.py carry

--rehearse runs the step on a machine without a GPU, on CPU kernels, a few cases of every part.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CARRY = ROOT / "build/carry"
WORK = ROOT / "build/lease"
ARCH = "90"
# Of a whole step, in seconds; each leaves a call of ten minutes room for its own beginning and end.
STEP_LIMITS = {1: 350, 2: 480, 3: 540, 4: 540, 5: 560}
WORKERS = 12  # of pytest-xdist; each holds half a gigabyte of the GPU
SIDE_BY_SIDE = 4  # parts that compute little, on one GPU

# Not a session of its own where that can be: whoever kills this script's session means the parts too.
GROUP_OF_ITS_OWN: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)

PASSED, FAILED, TIMED_OUT, KILLED, NOT_RUN = "passed", "FAILED", "TIMED OUT", "KILLED", "not run"


@dataclass(frozen=True)
class Part:
    """One command, its time limit in seconds, and what it needs: Python modules and programs."""

    name: str
    command: Sequence[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()

    def missing(self) -> str | None:
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                return f"the Python package {module} is missing"
        for program in self.programs:
            if find_program(program) is None:
                return f"{program} is missing"
        return None


@dataclass
class Verdict:
    name: str
    verdict: str
    seconds: float = 0.0
    reason: list[str] = field(default_factory=list)


def find_program(name: str) -> str | None:
    """On PATH, or where a CUDA toolkit has it."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    folders = [toolkit / "bin", toolkit / "compute-sanitizer"]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


# -- running ----------------------------------------------------------------------------------------


class Step:
    """Runs the parts of a step, stage after stage, and keeps its report up to date."""

    def __init__(self, name: str, out: Path, limit: float, facts: dict[str, str]) -> None:
        self.name, self.out, self.facts = name, out, facts
        self.begin = time.monotonic()
        self.end = self.begin + limit
        WORK.mkdir(parents=True, exist_ok=True)
        self.logs = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=WORK))
        self.verdicts: list[Verdict] = []
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.lock = threading.RLock()
        self.stopped = False
        out.mkdir(parents=True, exist_ok=True)

    def run(self, stages: Sequence[Sequence[Part]]) -> None:
        """The parts of a stage run side by side, the stages one after the other."""
        for stage in stages:
            with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
                for _ in pool.map(self._run_part, stage):
                    pass  # an error of this script itself surfaces here

    def _run_part(self, part: Part) -> None:
        verdict = self._verdict(part)
        with self.lock:
            self.verdicts.append(verdict)
            if part.name == VERSIONS.name and verdict.verdict == PASSED:
                self.facts |= dict(text.split(": ", 1) for text in verdict.reason)
                verdict.reason = []
            print(line(verdict), flush=True)
            self.write()

    def _verdict(self, part: Part) -> Verdict:
        missing = part.missing()
        begin = time.monotonic()
        limit = min(part.limit, self.end - begin)
        if self.stopped:
            missing = "the step was ended"
        elif limit <= 0:
            missing = "the step's time was used up"
        if missing is not None:
            return Verdict(part.name, NOT_RUN, 0, [missing])
        log = self.logs / log_name(part.name)
        with log.open("wb") as output:
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **part.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **GROUP_OF_ITS_OWN,
            )
            with self.lock:
                self.running[part.name] = process
            try:
                status = process.wait(None if limit == math.inf else limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end_group(process)  # and what a part has left behind
                with self.lock:
                    del self.running[part.name]
        text = log.read_text(errors="replace")
        seconds = time.monotonic() - begin
        if status == 0:
            return Verdict(part.name, PASSED, seconds, summary(text))
        if status is None:
            reason = [f"after {limit:.0f} s; the last of its output:", *last_lines(text, 2)]
            return Verdict(part.name, TIMED_OUT, seconds, reason)
        if status < 0:
            reason = [f"by signal {signal.Signals(-status).name}", *first_complaints(text)]
            return Verdict(part.name, KILLED, seconds, reason)
        if status == 5 and "pytest" in part.command:
            return Verdict(part.name, NOT_RUN, seconds, ["pytest selected no test"])
        return Verdict(
            part.name, FAILED, seconds, [f"exit status {status}", *first_complaints(text)]
        )

    def write(self) -> None:
        """The report, whole in every moment."""
        report = {
            "step": self.name,
            "seconds": round(time.monotonic() - self.begin, 1),
            "unfinished": sorted(self.running),
            **self.facts,
            "parts": [asdict(verdict) for verdict in self.verdicts],
        }
        text = json.dumps(report, indent=1) + "\n"
        (self.logs / "report.json").write_text(text)
        for name, content in ((f"{self.name}.json", text.encode()), (f"{self.name}.tgz", None)):
            unfinished = self.out / f".{name}.tmp"
            if content is not None:
                unfinished.write_bytes(content)
            else:
                with tarfile.open(unfinished, "w:gz") as archive:
                    archive.add(self.logs, self.name)
            os.replace(unfinished, self.out / name)

    def stop(self, signum: int, frame: object) -> None:
        """Told to end: so do all parts, and the report says which."""
        if self.stopped:  # told twice, perhaps in the middle of this
            return
        self.stopped = True
        with self.lock:
            for process in self.running.values():
                end_group(process)
            self.facts["ended_by"] = signal.Signals(signum).name
            self.write()

    def screen(self) -> str:
        """What fits on a last screen."""
        counts = {
            word: sum(v.verdict == word for v in self.verdicts)
            for word in (PASSED, FAILED, TIMED_OUT, KILLED, NOT_RUN)
        }
        lines = [f"== {self.name}: {', '.join(f'{n} {word}' for word, n in counts.items() if n)}"]
        lines += [f"{name}: {value}" for name, value in self.facts.items()]
        for word in (PASSED, NOT_RUN, KILLED, TIMED_OUT, FAILED):
            for verdict in self.verdicts:
                if verdict.verdict == word:
                    lines.append(line(verdict))
                    lines += [f"    {text[:200]}" for text in verdict.reason]
        return "\n".join([*lines, f"all of it: {self.out / self.name}.tgz"])

    @property
    def failed(self) -> bool:
        return any(v.verdict not in (PASSED, NOT_RUN) for v in self.verdicts)


def line(verdict: Verdict) -> str:
    return f"{verdict.verdict:9} {verdict.name} ({verdict.seconds:.0f} s)"


def log_name(part: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", part.lower()) + ".log"


def end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(text: str, count: int) -> list[str]:
    return [line for line in text.splitlines() if line.strip()][-count:]


_SUMMARY = re.compile(r"^(=+ )?\d+ (passed|cases)\b|^say: ")
_COMPLAINT = re.compile(r"^(E  |FAIL|ERROR|=+ (Invalid|Error)|.*\bError: |.*CUDA error)")


def summary(text: str) -> list[str]:
    """The counts of a part that passed, and what it says to the last screen."""
    return [found.removeprefix("say: ") for found in text.splitlines() if _SUMMARY.match(found)]


def first_complaints(text: str) -> list[str]:
    found = [line.strip() for line in text.splitlines() if _COMPLAINT.match(line)]
    return found[:3] or last_lines(text, 3)


# -- what the report says of the source -------------------------------------------------------------


def source_hash(*patterns: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def library_source() -> str:
    """Of all that the libraries are compiled from."""
    return source_hash(
        "csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "setup.py", "fastopt/__init__.py"
    )


def commit() -> str:
    command = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    return result.stdout.strip() or "not known: a checkout without .git"


def say_versions() -> None:
    """Every version that a verdict may depend on, one a line."""

    def output(*command: str) -> str:
        program = find_program(command[0])
        if program is None:
            return "missing"
        result = subprocess.run(
            [program, *command[1:]], check=False, capture_output=True, text=True, timeout=20
        )
        return " / ".join(last_lines(result.stdout or result.stderr, 2))

    print(f"say: python: {sys.version.split()[0]}, {os.cpu_count()} cores")
    for name in (
        *("torch", "triton", "numpy", "setuptools", "pytest", "pytest-xdist", "pytest-benchmark"),
        *("hypothesis", "expecttest", "matplotlib"),
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            print(f"say: {name}: {importlib.metadata.version(name)}")
    for tool in ("nvcc", "ncu", "compute-sanitizer"):
        print(f"say: {tool}: {output(tool, '--version')}")
    names = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu"
    print(
        f"say: nvidia-smi: {output('nvidia-smi', f'--query-gpu={names}', '--format=csv,noheader')}"
    )
    import torch

    print(f"say: torch's CUDA: {torch.version.cuda}")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        print(
            f"say: cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} processors"
        )


# -- the library ------------------------------------------------------------------------------------


def carry() -> None:
    """Build both libraries for the lease's GPU into build/carry, and note of which sources."""
    build(["--build-lib", str(CARRY)])
    (CARRY / "source").write_text(library_source())
    for library in sorted(CARRY.glob("fastopt/*.so")):
        print(f"{library.relative_to(ROOT)}: {library.stat().st_size >> 10} KB")


def build(arguments: list[str]) -> None:
    # One architecture is one compiler call of a minute or two: the threads are for its insides.
    environment = {
        "FASTOPT_BUILD": "cuda",
        "FASTOPT_CUDA_ARCHS": ARCH,
        "NVCC_APPEND_FLAGS": "--threads 0 --split-compile 0",
    }
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=True,
    )


def place_library() -> None:
    """Into the package: what was carried along if it is of these sources, else a build of them."""
    note = CARRY / "source"
    if note.exists() and note.read_text() == library_source():
        for carried in CARRY.glob("fastopt/*.so"):
            shutil.copyfile(carried, ROOT / "fastopt" / carried.name)
        print("say: carried along")
        return
    carried = "build/carry is of other sources" if note.exists() else "nothing was carried along"
    build(["--inplace"])
    print(f"say: built here: {carried}")


# -- the steps --------------------------------------------------------------------------------------

PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "--quiet", "-p", "no:cacheprovider"]
TESTS = ("pytest", "hypothesis")
# The groups of tools/smoke.py: each is a process of its own.
SMOKE = ("packed", "rows", "held", "clusters", "loop", "strided", "scale", "labels")
SMOKE += ("sgd", "sgd-unaligned", "sgd-tensors", "sgd-skipped")
IS_SGD = "sgd or grad_scaler"
LARGE = "32_bits or peak_memory or most_classes"  # of the GPU's memory
# A file's tests in processes of their own, by `-k`.
GPU_TESTS = {
    "cross_entropy": f"not ({IS_SGD}) and not ({LARGE})",
    "sgd": f"({IS_SGD}) and not ({LARGE})",
    "large": LARGE,
}
# What is run again where a compute-sanitizer looks on, which takes ten times as long and more.
SANITIZED = ("same_bits", "out_of_range_give_nan", "sgd_trains")
# Of Triton's kernels, each of which is compiled for half a second and more: every branch of every
# kernel in two dtypes, layouts and options in one. Together 1,400 of them, of 5,957 in the whole
# file; counted by
# `python tools/specialisations.py tests/test_cross_entropy.py -m "not slow" -k SELECTION`.
TRITON_VALUES = {
    "rows": "(named_shapes or few_rows_of_many_classes) and (float32 or bfloat16)",
    "layouts": "(layouts_of_rows or layouts_of_images) and bfloat16",
    "options": "(test_options or test_probabilities) and bfloat16",
}
# By `-k`, so that a figure is there before the time is up; compiling torch's own side takes most.
BENCHMARKS = {
    "cross_entropy": (
        "bfloat16 and 128256 and 4185",
        "bfloat16 and 32000 and 16777",
        "bfloat16 and 262144 and not forward and not backward and not scaled",
        "bfloat16 and 1000",
        "float32 and 21 and 512",
    ),
    "sgd": ("bfloat16 and 100M", "ResNet-50", "161 and not ResNet"),
}
REHEARSED_BENCHMARKS = {"sgd": ("161 and not ResNet",)}  # of which nothing is compiled
REHEARSED_VALUES = "no_classes or weights_that_sum_to_zero"


def environment_of(family: str, **more: str) -> dict[str, str]:
    return {"FASTOPT_ALWAYS": "1", "FASTOPT_BACKEND": family, **more}


def sanitized(tool: str, command: list[str]) -> list[str]:
    """Under a compute-sanitizer, which looks at our own kernels only."""
    program = find_program("compute-sanitizer") or "compute-sanitizer"
    options = ["--tool", tool, "--kernel-name", "kns=fastopt", "--error-exitcode", "9"]
    return [program, *options, *command]


# Every allocation by itself, so that a step out of bounds leaves it.
BY_ITSELF = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
VERSIONS = Part("versions", [PYTHON, __file__, "versions"], 60)
LIBRARY = Part("library", [PYTHON, __file__, "library"], 200)


def steps(number: int, rehearse: bool) -> list[list[Part]]:
    """The parts of a step, by stages. A rehearsal runs the first part of every stage, and takes the
    library as it is."""
    of_step = {1: first, 2: second, 3: third, 4: fourth, 5: fifth}[number](rehearse)
    if rehearse:  # at leisure: no time limit that a busy machine could exceed
        return [
            [replace(part, limit=math.inf) for part in stage[:1]]
            for stage in [[VERSIONS], *of_step]
        ]
    return [[VERSIONS], [LIBRARY], *of_step]


def smoke(group: str, rehearse: bool) -> list[str]:
    return [PYTHON, "tools/smoke.py", group, "--device", "cpu" if rehearse else "cuda"]


def gpu_tests(family: str, limit: float) -> list[Part]:
    return [
        Part(
            f"test_gpu.py, {family}: {name}",
            [*PYTEST, "tests/test_gpu.py", "-k", selection],
            limit,
            environment_of(family),
            TESTS,
        )
        for name, selection in GPU_TESTS.items()
    ]


def value_tests(family: str, selections: dict[str, str], rehearse: bool) -> list[Part]:
    workers = WORKERS // len(selections)  # the selections run side by side
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") and not rehearse else []
    return [
        Part(
            f"values, {family}: {name}",
            [*PYTEST, *parallel, "tests/test_cross_entropy.py", "-m", "not slow"]
            + ["-k", REHEARSED_VALUES if rehearse else selection],
            250,
            environment_of(family, FASTOPT_TEST_DEVICE="cpu" if rehearse else "cuda"),
            TESTS if family == "cuda" else (*TESTS, "triton"),
        )
        for name, selection in selections.items()
    ]


def sanitizer(tool: str, name: str, command: list[str], limit: float) -> Part:
    return Part(
        f"{tool}: {name}",
        sanitized(tool, command),
        limit,
        environment_of("cuda", **BY_ITSELF),
        TESTS if "pytest" in command else (),
        ("compute-sanitizer",),
    )


def first(rehearse: bool) -> list[list[Part]]:
    """Is it right at all? Every CUDA kernel against float64 from the CPU."""
    cuda = environment_of("cuda")
    return [
        [Part("python -m fastopt", [PYTHON, "-m", "fastopt"], 60, cuda)],
        [Part("python -m fastopt check", [PYTHON, "-m", "fastopt", "check"], 90, cuda)],
        [Part(f"smoke: {group}", smoke(group, rehearse), 60, cuda) for group in SMOKE],
        gpu_tests("cuda", 120)[:2],
        [sanitizer("memcheck", f"smoke {group}", smoke(group, rehearse), 90) for group in SMOKE],
    ]


def second(rehearse: bool) -> list[list[Part]]:
    """How fast is it? And the values over every shape, layout and option."""
    cuda = environment_of("cuda")
    bench = [PYTHON, "tools/minibench.py", *(["--device", "cpu"] if rehearse else [])]
    ncu = [find_program("ncu") or "ncu", "--clock-control", "none", "--profile-from-start", "off"]
    for section in ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy"):
        ncu += ["--section", section]
    ncu += ["--section", "WarpStateStats", "--kernel-name"]
    ncu += ["regex:cross_entropy_(packed|rows|strided)|sgd_kernel"]
    return [
        # Alone on the GPU: these are timings.
        *(
            [Part(f"mini-benchmark: {what}", [*bench, what], 100, cuda, ("pytest",))]
            for what in ("cross_entropy", "sgd", "host")
        ),
        value_tests("cuda", {"all": "test"}, rehearse),
        [Part("ncu", [*ncu, *bench, "profile"], 120, cuda, ("pytest",), ("ncu",))],
    ]


def third(rehearse: bool) -> list[list[Part]]:
    """The Triton family."""
    tests = gpu_tests("triton", 200)
    return [value_tests("triton", TRITON_VALUES, rehearse), tests[:2], tests[2:]]


def fourth(rehearse: bool) -> list[list[Part]]:
    """What the sanitizers find, and what takes all of the memory."""
    tests = {name: [*PYTEST, "tests/test_gpu.py", "-k", name] for name in SANITIZED}
    return [
        [sanitizer("racecheck", f"smoke {group}", smoke(group, rehearse), 120) for group in SMOKE],
        *(
            [sanitizer(tool, name, command, 240) for name, command in tests.items()]
            for tool in ("racecheck", "memcheck")
        ),
        gpu_tests("cuda", 120)[2:],
    ]


def fifth(rehearse: bool) -> list[list[Part]]:
    """The benchmarks that will be published: a process for each selection, because a benchmark
    writes at its end only; then the report of those that have. Nothing runs beside them."""
    run = f"bench-{os.getpid()}"
    modules = ("pytest", "pytest_benchmark", "matplotlib")
    device = ["--device=cpu", "--quick"] if rehearse else ["--device=cuda"]
    stages = []
    for op, selections in (REHEARSED_BENCHMARKS if rehearse else BENCHMARKS).items():
        for i, selection in enumerate(selections):
            command = [*PYTEST, f"bench/bench_{op}.py", *device, "-k", selection]
            command.append(f"--benchmark-json={WORK / f'{run}-{op}-{i}.json'}")
            environment = {"FASTOPT_BACKEND": "cuda"}
            stages.append([Part(f"{op}: {selection}", command, 150, environment, modules)])
    report = [PYTHON, __file__, "benchmark-report", run]
    return [*stages, [Part("report", report, 60, {}, modules)]]


def benchmark_report(run: str) -> None:
    """The figures travel in this part's output."""
    found = sorted(path for path in WORK.glob(f"{run}-*.json") if path.stat().st_size)
    if not found:
        sys.exit("ERROR no benchmark has written its figures")
    results = WORK / run
    command = [PYTHON, "bench/report.py", *map(str, found), "--results", str(results)]
    subprocess.run(command, cwd=ROOT, check=True)
    for path in (*results.rglob("report.md"), *results.rglob("results.json")):
        print(path.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    choices = [*map(str, STEP_LIMITS), "carry", "library", "versions", "benchmark-report"]
    parser.add_argument("what", choices=choices)
    parser.add_argument("run", nargs="?", help="of benchmark-report")
    parser.add_argument("--out", type=Path, default=ROOT / "build/lease", help="where to report")
    parser.add_argument("--rehearse", action="store_true", help="a few cases on the CPU")
    options = parser.parse_args()
    if not options.what.isdecimal():
        {
            "carry": carry,
            "library": place_library,
            "versions": say_versions,
            "benchmark-report": lambda: benchmark_report(options.run),
        }[options.what]()
        return 0
    number = int(options.what)
    facts = {"commit": commit(), "sources": library_source()}
    if options.rehearse:
        facts["device"] = "cpu: a rehearsal"
    limit = math.inf if options.rehearse else STEP_LIMITS[number]
    step = Step(f"step-{number}", options.out.resolve(), limit, facts)
    signal.signal(signal.SIGTERM, step.stop)
    signal.signal(signal.SIGINT, step.stop)
    step.run(steps(number, options.rehearse))
    print(f"\n{step.screen()}", flush=True)
    return int(step.failed or step.stopped)


if __name__ == "__main__":
    sys.exit(main())
