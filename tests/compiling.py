"""What tests compile: once, whichever worker of pytest-xdist comes first."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def compiled(target: Path, sources: Iterable[Path], command: Iterable[str | Path]) -> Path:
    """`target`, made anew by the command if one of the sources is younger; others wait. What the
    compiler said lies beside it, in a .report."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in sources)
        if not target.exists() or target.stat().st_mtime < newest:
            unfinished = target.with_suffix(".tmp")
            done = subprocess.run(
                [*command, "-o", unfinished],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            target.with_suffix(".report").write_text(done.stderr)
            os.replace(unfinished, target)
    return target
