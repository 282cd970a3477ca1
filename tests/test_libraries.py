"""The built libraries themselves: what they ask of the system, what they show, where they are found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastopt.backends

PACKAGE = Path(fastopt.backends.__file__).parent
# The newest versions of system libraries that torch's own wheels (manylinux_2_28) ask for.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}

CUDA_LIBRARY = fastopt.backends._cuda_library_path()


def symbols(library: Path) -> list[tuple[str, str]]:
    """(kind, name with version) of every dynamic symbol."""
    command = ["nm", "--dynamic", "--with-symbol-versions", str(library)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return re.findall(r"^[0-9a-f ]{16} (\w) (\S+)$", output, re.MULTILINE)


@pytest.fixture(params=["_C.so", "_CUDA.so"])
def library(request: pytest.FixtureRequest) -> Path:
    path = CUDA_LIBRARY if request.param == "_CUDA.so" else PACKAGE / "_C.so"
    if not path.exists():
        pytest.skip(f"{path} was not built")
    return path


def test_asks_for_no_newer_system_than_torch_does(library: Path) -> None:
    asked = re.findall(
        r"@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", " ".join(s for _, s in symbols(library))
    )
    assert asked
    too_new = {
        f"{name}_{version}"
        for name, version in asked
        if tuple(map(int, version.split("."))) > NEWEST[name]
    }
    assert not too_new


def test_shows_its_own_functions_alone(library: Path) -> None:
    """And takes what is not torch's from the library it was linked to, by version: a name of the C++
    library without one would be bound to whichever library shows it first."""
    local = "tdbr"
    unversioned = [(kind, name) for kind, name in symbols(library) if "@" not in name]
    undefined = {name for kind, name in unversioned if kind in "Uwv"}
    shown = {name for kind, name in unversioned if kind not in local} - undefined
    assert shown and all(name.startswith("fastopt_") for name in shown)
    hooks = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    assert not {name for name in undefined - hooks if not re.match("aoti_torch_|torch_", name)}


def test_cuda_library_of_the_package_fastopt_cuda13_is_found(tmp_path: Path) -> None:
    """Without an import of that package; and on a torch that is not for CUDA it is left alone."""
    other = tmp_path / "fastopt_cuda13"
    other.mkdir()
    (other / "__init__.py").write_text("raise ImportError('nobody has to import this')")
    (other / "_CUDA.so").touch()
    ask = (
        "from fastopt import backends as b; own = b.Path(b.__file__).with_name('_CUDA.so');"
        "print(b._cuda_library_path(), own, b.torch.version.cuda, b.CUDA_LIBRARY_ERROR)"
    )
    path = os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])
    found, own, cuda, reason = subprocess.run(
        [sys.executable, "-c", ask],
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.split(maxsplit=3)
    assert found == own if Path(own).exists() else Path(found) == other / "_CUDA.so"
    if cuda == "None":
        assert reason.strip().endswith("is not one for CUDA")
