"""What tests compile: once, whichever worker of pytest-xdist comes first."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def compiled(target: Path, sources: Iterable[Path], command: Iterable[str | Path]) -> Path:
    """`target`, made anew by the command if one of the sources is younger. Others wait."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in sources)
        if not target.exists() or target.stat().st_mtime < newest:
            unfinished = target.with_suffix(".tmp")
            subprocess.run([*command, "-o", unfinished], cwd=ROOT, check=True)
            os.replace(unfinished, target)
    return target
