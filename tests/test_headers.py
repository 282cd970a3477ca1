"""tools/headers.py finds what a torch's headers lack."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = Path(torch.__file__).parent


def headers_without(macro: str, folder: Path) -> Path:
    """The installed torch's headers, without one definition of torch/headeronly."""
    include = folder / "torch/include/torch"
    include.mkdir(parents=True)
    (include / "csrc").symlink_to(INSTALLED / "include/torch/csrc")
    for source in (INSTALLED / "include/torch/headeronly").rglob("*.h"):
        target = include / source.relative_to(INSTALLED / "include/torch")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text().replace(f"#define {macro}(", "#define REMOVED("))
    return folder


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    """One unit, the quickest of those that include torch's headers."""
    command = [sys.executable, "-m", "tools.headers", "--only=cpu/sgd.o", str(folder)]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


def test_complete_headers_pass(tmp_path: Path) -> None:
    result = run(headers_without("NO_SUCH_MACRO", tmp_path))
    assert "headers: 1 units, 0 fail" in result.stdout
    assert result.returncode == 0


def test_a_missing_macro_is_told_in_the_compilers_words(tmp_path: Path) -> None:
    result = run(headers_without("TORCH_ERROR_CODE_CHECK", tmp_path))
    assert re.search(r"error: .*TORCH_ERROR_CODE_CHECK", result.stdout)
    assert "headers: 1 units, 1 fail" in result.stdout
    assert result.returncode == 1
