"""What `make wheels` put into dist/: complete, loadable wherever torch's own wheels are, and as the
package index wants it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastopt

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
VERSION = fastopt.__version__
SOURCE = DIST / f"fastopt-{VERSION}.tar.gz"
CPU_WHEELS = [
    DIST / f"fastopt-{VERSION}-py3-none-manylinux_2_28_{machine}.whl"
    for machine in ("x86_64", "aarch64")
]
CUDA_WHEEL = DIST / f"fastopt_cuda13-{VERSION}-py3-none-manylinux_2_28_x86_64.whl"
WHEELS = [*CPU_WHEELS, *([CUDA_WHEEL] if CUDA_WHEEL.exists() else [])]
by_name = pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.name)


def run(*command: str | Path) -> str:
    """The output of a command, which may be one of the tools that are installed beside Python."""
    tools = Path(sys.executable).parent
    result = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_nothing_else_is_published() -> None:
    assert set(DIST.iterdir()) == {SOURCE, *WHEELS}


@by_name
def test_wheel_runs_where_torch_does(wheel: Path, tmp_path: Path) -> None:
    """By auditwheel's word: it names the oldest systems that have all that the wheel asks for. Torch's
    library is that of the user's torch."""
    run("auditwheel", "repair", "--plat", "auto", "--exclude", "libtorch*", "-w", tmp_path, wheel)
    (repaired,) = tmp_path.iterdir()
    oldest = min(int(minor) for minor in re.findall(r"manylinux_2_(\d+)_", repaired.name))
    assert oldest <= 28 and repaired.name.endswith(wheel.stem.rpartition("-")[2] + ".whl")
    with zipfile.ZipFile(repaired) as files:
        assert not [name for name in files.namelist() if ".libs/" in name], "it bundles libraries"


def test_both_machines_have_the_same_package_and_use_the_same_of_torch(tmp_path: Path) -> None:
    contents, used = [], []
    for wheel in CPU_WHEELS:
        with zipfile.ZipFile(wheel) as files:
            contents.append(set(files.namelist()))
            library = files.extract("fastopt/_C.so", tmp_path / wheel.stem)
        symbols = run("nm", "-D", "--undefined-only", "--format=just-symbols", library).split()
        needed = re.findall(r"NEEDED.*\[(libtorch.*|libc10.*)\]", run("readelf", "-d", library))
        used.append({name for name in symbols if "torch" in name} | set(needed))
    assert contents[0] == contents[1] and "fastopt/_C.so" in contents[0]
    assert used[0] == used[1] and used[0]


@by_name
def test_metadata(wheel: Path) -> None:
    run("twine", "check", "--strict", wheel)
    run("check-wheel-contents", wheel)


def test_metadata_of_the_source() -> None:
    run("twine", "check", "--strict", SOURCE)
    # The project has no address to be written to.
    pyroma = ("pyroma", "--min", "10", "--skip-tests", "AuthorEmail", "--directory")
    for project in (ROOT, ROOT / "packaging/cuda13"):
        run(*pyroma, project)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_source_holds_the_project() -> None:
    """All that git has: `make` builds and tests from it as from a checkout."""
    tracked = set(run("git", "ls-files").split())
    with tarfile.open(SOURCE) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    assert not tracked - packed


@pytest.mark.skipif(not CUDA_WHEEL.exists(), reason="no CUDA toolkit: no wheel of the CUDA kernels")
def test_cuda_wheel_holds_the_library_alone() -> None:
    with zipfile.ZipFile(CUDA_WHEEL) as files:
        names = {name for name in files.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in files.namelist() if name.endswith("/METADATA"))
        lines = files.read(metadata).decode().splitlines()
    assert names == {"fastopt_cuda13/__init__.py", "fastopt_cuda13/_CUDA.so"}
    assert f"Requires-Dist: fastopt=={VERSION}" in lines
