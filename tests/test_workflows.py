"""What runs the tests: every action pinned by commit, a comparison of our own figures alone, and a
last line that counts.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from child import run, run_pytest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.skipif(not WORKFLOWS, reason="a source distribution has no workflows")
def test_every_action_is_pinned_by_commit() -> None:
    """A tag can be moved to other code. The comment says which version the commit is."""
    pinned: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for line in path.read_text().splitlines():
            if found := re.search(r"uses:\s*(.*)", line):
                match = re.fullmatch(r"([\w-]+/[\w-]+)@([0-9a-f]{40}) # v\d+\.\d+\.\d+", found[1])
                assert match, f"{path.name}: {line.strip()}"
                pinned.setdefault(match[1], set()).add(found[1])
    assert pinned
    assert all(len(versions) == 1 for versions in pinned.values()), pinned


def figures(folder: Path, **medians: float) -> Path:
    rows = [
        {
            "group": case.removeprefix("torch_"),
            "stats": {"median": median},
            "extra_info": {
                "op": "sgd",
                "variant": "fused" if case.startswith("torch_") else "fastopt",
            },
        }
        for case, median in medians.items()
    ]
    folder.mkdir(exist_ok=True)
    path = folder / "bench-cuda-sgd.json"
    path.write_text(json.dumps({"benchmarks": rows}))
    return path


@pytest.mark.parametrize(
    ("now", "status"),
    [
        ({"large": 1.1e-3, "torch_large": 9.0}, 0),  # torch's figures fail nothing
        ({"large": 1.2e-3, "torch_large": 1e-3}, 1),
        ({"other": 1.0}, 0),
    ],
)
def test_only_our_own_slower_figures_fail(
    now: dict[str, float], status: int, tmp_path: Path
) -> None:
    baseline = figures(tmp_path / "baseline", large=1e-3, torch_large=1e-3).parent
    done = run(
        sys.executable, ROOT / "tools/regressions.py", baseline, figures(tmp_path / "now", **now)
    )
    assert done.returncode == status, done.stderr
    assert ("SLOWER" in done.stdout) == bool(status)
    assert ("only in the" in done.stdout) == ("other" in now)


def test_a_file_without_a_baseline_fails(tmp_path: Path) -> None:
    done = run(
        sys.executable,
        ROOT / "tools/regressions.py",
        tmp_path,
        figures(tmp_path / "now", large=1e-3),
    )
    assert done.returncode == 1 and "FileNotFoundError" in done.stderr


SUITE = """
import sys
import suite

suite.workers = list
suite.MODES["here"] = [suite.Part(name, [f"{sys.argv[1]}/test_{name}.py"]) for name in sys.argv[2:]]
suite.NOT_IN["here"] = "the rest"
sys.exit(suite.main("here"))
"""
TESTS = {
    "good": "def test_one(): pass\ndef test_two(): pass\n",
    "bad": "def test_one(): assert False\ndef test_two(): pass\n",
    "crashes": "import os\nos._exit(3)\n",
    "skips": "import pytest\ndef test_one(): pytest.skip('no such thing here')\n",
}


@pytest.mark.parametrize(
    ("parts", "last", "status"),
    [
        (["good"], "2 passed, 0 failed, 0 skipped", 0),
        (["bad", "crashes", "skips", "good"], "3 passed, 2 failed, 1 skipped", 1),
        (["skips"], "0 passed, 0 failed, 1 skipped", 1),  # nothing was tested
    ],
    ids=["good", "bad", "nothing"],
)
def test_the_suite_runs_every_part_and_counts(
    parts: list[str], last: str, status: int, tmp_path: Path
) -> None:
    for name, source in TESTS.items():
        (tmp_path / f"test_{name}.py").write_text(source)
    done = run(sys.executable, "-c", SUITE, tmp_path, *parts, PYTHONPATH=str(ROOT / "tools"))
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == last
    assert "not in it: the rest" in done.stdout
    reason = "skipped [1] no such thing here"
    assert (reason in done.stdout) == ("skips" in parts), done.stdout


def test_make_check_names_tests_that_exist() -> None:
    """Not a part of .ci/run: `make test` runs all that it does."""
    program = "import json, suite; print(json.dumps([list(p.arguments) for p in suite.CHECK]))"
    found = run(sys.executable, "-c", program, PYTHONPATH=str(ROOT / "tools"))
    done = run_pytest(
        "--collect-only", *{test for part in json.loads(found.stdout) for test in part}
    )
    assert done.returncode == 0, done.stdout
