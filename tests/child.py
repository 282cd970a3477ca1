"""Programs in a process of their own: for what may crash, what needs a clean process, and what is
read once at import."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import fastopt

# Nothing but a hang lasts this long, however busy the machine: the one time limit of the suite.
HANGS_AFTER_S = 3600
HERE = Path(__file__).parent


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command, whatever its exit status. Python finds there what it finds here: the fastopt
    under test, and these files."""
    paths = [Path(fastopt.__file__).parents[1], HERE]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), *map(str, paths)]))
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
        check=False,
    )


def run_python(code: str, *args: str, **environment: str) -> str:
    """What a program prints. Fails the test if the program fails."""
    done = run(sys.executable, "-c", textwrap.dedent(code), *args, **environment)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_pytest(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run tests as another mode of the suite needs them."""
    return run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *args,
        **environment,
    )
