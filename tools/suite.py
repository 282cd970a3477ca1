"""Runs the tests in every mode that they have; says at the end what ran, what did not, and why.

    python tools/suite.py           everything that needs no GPU (make test)
    python tools/suite.py values    values alone: for one more compiler or one more torch
    python tools/suite.py check     one fast case of every kind (make check)

Every part runs, whatever became of the one before. The last line counts them all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# pytest's words, and under which of ours they count.
WORDS = {
    "passed": "passed",
    "failed": "failed",
    "error": "failed",
    "errors": "failed",
    "skipped": "skipped",
    "xfailed": "passed",
    "deselected": "deselected",
}


@dataclass(frozen=True)
class Part:
    """One run of pytest."""

    name: str
    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


# They enter every branch of the kernels.
LOSS = ("tests/test_cross_entropy.py", "tests/test_cross_entropy_lse_square.py")
VALUES = (*LOSS, "tests/test_sgd.py")


def levels() -> list[str]:
    """The SIMD levels of this CPU, the best first."""
    ask = "import fastopt.backends; print(fastopt.backends.simd_level())"
    command = [sys.executable, "-c", ask]
    best = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    every = ["avx512", "avx2", "baseline"]
    return every[every.index(best.stdout.strip()) :] if best.stdout.strip() in every else []


def at_level(level: str, tests: Sequence[str] = (*VALUES, "-m", "not slow")) -> Part:
    """Tests at one SIMD level, against a torch that has no more than it has."""
    of_torch = level.replace("baseline", "default")
    return Part(
        f"values at {level}", tests, {"FASTOPT_SIMD": level, "ATEN_CPU_CAPABILITY": of_torch}
    )


# The kernels of GPUs on a CPU.
EMULATED = {"FASTOPT_TEST_KERNELS": "emulated"}
INTERPRETED = {
    "FASTOPT_TEST_KERNELS": "interpreted",
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",  # the interpreter is numpy; tensors here are small
    # numpy warns of every infinity that a hazard's row computes with.
    "PYTHONWARNINGS": "ignore::RuntimeWarning",
}
OF_GPUS = [
    Part("values emulated", LOSS, EMULATED),
    Part("values interpreted", [*LOSS, "tests/test_cross_entropy_triton.py"], INTERPRETED),
]
LEVELS = levels()


OLD_TRITON = ROOT / "build" / f"triton-{os.environ.get('OLD_TRITON', '')}"

TEST = [
    Part("everything", ["-m", "not packaging and not modes"]),
    Part(
        f"compiled by {OLD_TRITON.name}",
        ["tests/test_cross_entropy_triton.py", "tests/test_sgd_triton.py", "-k", "compile"],
        {"PYTHONPATH": str(OLD_TRITON)},
    ),
    *map(at_level, LEVELS[1:]),
    *OF_GPUS,
]

# One of each kind, the fastest that enters most.
QUICK_VALUES = [
    "tests/test_cross_entropy.py::test_named_shapes[several-chunks-and-tail-bfloat16]",
    "tests/test_cross_entropy.py::test_named_shapes[tile-and-tail-float32]",
    "tests/test_cross_entropy.py::test_named_shapes[image-float16]",
    "tests/test_cross_entropy.py::test_options[ignored-smoothing-weight-mean-float32]",
    "tests/test_cross_entropy.py::test_probabilities[float32-float32-mean]",
    "tests/test_cross_entropy.py::test_infinities_and_nan[inf-both-signs-float32]",
    "tests/test_linear_cross_entropy.py::test_values[29x33x1000-mean-float32]",
    "tests/test_logprobs.py::test_a_clipped_policy_loss",
    "tests/test_sgd.py::test_all_sizes_in_one_step_equal_the_for_loop_bitwise",
]
QUICK_OF_GPUS = "tests/test_cross_entropy.py::test_target_and_weight_in_any_layout"
CHECK = [
    Part(
        "one of each kind",
        [
            *QUICK_VALUES,
            "tests/test_cross_entropy_autograd.py::test_several_backwards_of_one_graph",
            "tests/test_cross_entropy_autograd.py::test_compile_aot_eager[mean-float32]",
            "tests/test_cross_entropy_errors.py",
            "tests/test_linear_cross_entropy_errors.py",
            "tests/test_cross_entropy_ops.py::test_kernels_serve",
            "tests/test_cross_entropy_ops.py::test_nonsense_raises",
            "tests/test_cross_entropy_triton_plan.py",
            "tests/test_sgd_cuda.py::test_alignment",
            *(f"tests/test_sgd_{part}.py" for part in ("constructor", "state", "faces")),
            *(f"tests/test_sgd_{part}.py" for part in ("groups", "scaler", "table")),
            "tests/test_sgd_served.py",
            "tests/test_main.py::test_report_names_versions_library_and_kernels",
            "tests/test_patch.py::test_sgd_is_served_bit_by_bit",
            "tests/test_report.py::test_a_report_counts_places_and_answers",
            "tests/test_selfcheck.py::test_bad_kernels_of_the_loss_do_not_serve",
            "tests/test_docs.py::test_every_term_is_a_message_of_the_sources",
            "tests/test_ledger.py",
            "tests/test_workflows.py::test_every_action_is_pinned_by_commit",
        ],
    ),
    *(at_level(level, QUICK_VALUES) for level in LEVELS[1:]),
    Part("emulated", [QUICK_OF_GPUS], EMULATED),
    Part("interpreted", [QUICK_OF_GPUS], INTERPRETED),
]

MODES = {
    "test": TEST,
    "values": [*map(at_level, LEVELS)],
    "check": CHECK,
}
NOT_IN = {
    "test": "wheels and ways of installing (make wheel), sanitizers (make sanitize), all modes of"
    " torch.compile (make modes), GPUs (make gpu)",
    "values": "all but the values of both ops (make test)",
    "check": "all but one case of each kind (make test), and what make test leaves out",
}


def workers() -> list[str]:
    """A process of pytest-xdist for each core; long tests and their threads take more of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Tests that share what takes long to make stay together; all others go where there is room.
    return ["-n", str(min(cores or 1, 8)), "--dist", "loadgroup", "--no-loadscope-reorder"]


def run(part: Part) -> tuple[Counter[str], list[str]]:
    """The counts of a part, and its reasons for leaving tests out. Shows pytest's words as they
    come."""
    print(f"\n== {part.name}", flush=True)
    child = subprocess.Popen(
        [sys.executable, "-m", "pytest", "--quiet", "-ra", *workers(), *part.arguments],
        cwd=ROOT,
        env=os.environ | part.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    status = child.wait()
    counts: Counter[str] = Counter()
    if lines and re.search(r" in \d", lines[-1]):
        for number, word in re.findall(r"(\d+) (\w+)", lines[-1].split(" in ")[0]):
            counts[WORDS.get(word, "")] += int(number)
    if status != 0 and not counts["failed"]:  # it crashed, or collected nothing
        counts["failed"] += 1
        lines.append(f"pytest ended with status {status}")
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    return counts, [re.sub(r"^SKIPPED (\[\d+\]) \S+ ", r"skipped \1 ", line) for line in skipped]


def main(mode: str) -> int:
    total: Counter[str] = Counter()
    report = []
    for part in MODES[mode]:
        counts, reasons = run(part)
        total += counts
        report += [f"{part.name}: {words(counts)}", *(f"  {reason}" for reason in reasons)]
    print("\n== what ran", *report, f"not in it: {NOT_IN[mode]}", words(total), sep="\n")
    return 1 if total["failed"] or not total["passed"] else 0


def words(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[word]} {word}" for word in ("passed", "failed", "skipped"))


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["test"])))
