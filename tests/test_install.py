"""Installing from source, as users do it: pip, uv and build; torch there before, after or not at
all; isolated or not; with a compiler or without. Each row really builds and installs, in a fresh
environment, and has kernels in the end, or fails and says what mends it: nobody is left without
kernels who did not ask for that.
"""

from __future__ import annotations

import ensurepip
import json
import os
import shutil
import stat
import sys
import sysconfig
import venv
from pathlib import Path
from typing import NamedTuple

import pytest

from installing import copy_sources, link_all_but_build_tools, link_setuptools, repack, run

pytestmark = pytest.mark.packaging

UV = Path(sysconfig.get_path("scripts"), "uv")

# g++ for those who compile the same again and again and never run it for long.
COMPILER = """#!{python}
import fcntl, hashlib, os, shutil, subprocess, sys
arguments, output = sys.argv[1:-1], sys.argv[-1]
what = [word for word in arguments if word[0] != "/"]  # torch's headers are the same everywhere
kept = {folder!r} + "/" + hashlib.sha256(repr(what).encode()).hexdigest()
if "-c" not in arguments:
    os.execv({compiler!r}, [{compiler!r}, *sys.argv[1:]])
with open(kept + ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not os.path.exists(kept):
        status = subprocess.call([{compiler!r}, *arguments, kept + ".tmp", "-O0"])
        if status:
            sys.exit(status)
        os.rename(kept + ".tmp", kept)
shutil.copyfile(kept, output)
"""

# Run in a new environment: what is there, and whether the import says that something is missing.
LOOK = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastopt
print(json.dumps({
    "package": fastopt.__file__,
    "library": fastopt.backends.CPU_LIBRARY is not None,
    "reason": fastopt.backends.CPU_LIBRARY_ERROR,
    "warnings": [str(w.message) for w in caught if w.category is fastopt.MissingKernelsWarning],
}))
"""

INSTALL_TORCH = (
    '`pip install "torch>=2.10" "setuptools>=77,<82"`, then `pip install --no-build-isolation .`'
    " (with uv: `uv pip install` for both)"
)
DO_WITHOUT = "`FASTOPT_BUILD=none pip install .` installs fastopt for torch's own kernels only"
# Outcomes: what is there in the end, or what the last paragraph says.
KERNELS, NONE = ["kernels"], ["none"]
NO_TORCH = ["no torch >= 2.10 was found by", INSTALL_TORCH, DO_WITHOUT]
OLD_TORCH = ["holds torch 2.9.1, and 2.10 is the oldest", INSTALL_TORCH, DO_WITHOUT]
NO_COMPILER = ["no C++ compiler was found", "`apt install g++`", DO_WITHOUT]


class Row(NamedTuple):
    tool: str
    what: str
    torch: str
    isolated: bool
    outcome: list[str]
    compiler: bool = True
    build: str | None = None

    def __str__(self) -> str:
        words = [self.tool, self.what, f"torch {self.torch}"]
        words += [] if self.isolated else ["not isolated"]
        words += [] if self.compiler else ["no compiler"]
        return ", ".join([*words, f"FASTOPT_BUILD={self.build}"] if self.build else words)


TABLE = [
    Row("pip", "folder", "before", True, KERNELS),
    Row("pip", "folder", "before", False, KERNELS),
    Row("pip", "folder", "absent", True, NO_TORCH),
    Row("pip", "folder", "absent", False, NO_TORCH),
    Row("pip", "folder", "old", True, OLD_TORCH),
    Row("pip", "folder", "before", True, NO_COMPILER, compiler=False),
    Row("pip", "folder", "before", False, NONE, compiler=False, build="none"),
    Row("pip", "folder", "after", True, NONE, build="none"),
    Row("pip", "editable", "before", True, KERNELS),
    Row("pip", "editable", "before", False, KERNELS),
    Row("pip", "editable", "absent", True, NO_TORCH),
    Row("pip", "editable", "before", True, NONE, build="none"),
    Row("pip", "sdist", "before", True, KERNELS),
    Row("pip", "sdist", "absent", True, NO_TORCH),
    Row("pip", "wheel", "before", True, KERNELS),
    Row("pip", "wheel", "after", True, KERNELS),
    # uv's isolated builds run another interpreter than the environment's, which sees no torch.
    Row("uv", "folder", "before", True, NO_TORCH),
    Row("uv", "folder", "before", True, NONE, build="none"),
    Row("uv", "folder", "before", False, KERNELS),
    Row("uv", "folder", "absent", False, NO_TORCH),
    Row("uv", "folder", "old", False, OLD_TORCH),
    Row("uv", "folder", "before", False, NO_COMPILER, compiler=False),
    Row("uv", "editable", "before", True, NO_TORCH),
    Row("uv", "editable", "before", False, KERNELS),
    Row("uv", "sdist", "before", False, KERNELS),
    Row("uv", "sdist", "absent", True, NO_TORCH),
    Row("uv", "wheel", "after", True, KERNELS),
]


class Shop(NamedTuple):
    """What all rows share. Objects once compiled stay in the sources' build folder."""

    sources: Path
    torch: Path  # a folder with torch and what it needs, and nothing that builds
    old_torch: Path
    offline: dict[str, str]  # variables for pip and uv
    compiler: str  # the PATH with one
    no_compiler: str


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    def folder(name: str) -> Path:
        return tmp_path_factory.mktemp(name)

    wheels, torch, old_torch, bin = map(folder, ("wheels", "torch", "old_torch", "bin"))
    repack("setuptools", wheels)
    link_all_but_build_tools(torch)
    (old_torch / "torch").mkdir()
    (old_torch / "torch/__init__.py").touch()
    (old_torch / "torch/version.py").write_text("__version__ = '2.9.1'\ncuda = None\n")
    compiler = bin / "g++"
    objects = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # for all processes of pytest-xdist
        objects = objects.parent
    objects /= "objects"
    objects.mkdir(exist_ok=True)
    compiler.write_text(
        COMPILER.format(python=sys.executable, folder=str(objects), compiler=shutil.which("g++"))
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IEXEC)
    offline = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "UV_NO_CONFIG": "1",
        "UV_NO_INDEX": "1",
        "UV_FIND_LINKS": str(wheels),
        "UV_LINK_MODE": "copy",
        # As on a machine without a toolkit: not about CUDA.
        "CUDA_HOME": "/missing",
    }
    return Shop(
        copy_sources(folder("sources")),
        torch,
        old_torch,
        offline,
        f"{bin}{os.pathsep}{os.environ['PATH']}",
        str(folder("empty")),
    )


class Environment(NamedTuple):
    python: Path
    site_packages: Path

    def see(self, folder: Path) -> None:
        (self.site_packages / "borrowed.pth").write_text(f"{folder}\n")


def create_environment(folder: Path) -> Environment:
    venv.create(folder, symlinks=True)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    return Environment(folder / "bin/python", site_packages)


@pytest.fixture
def fresh(tmp_path: Path) -> Environment:
    return create_environment(tmp_path / "environment")


@pytest.fixture(scope="module")
def built(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is installed, by name. The sdist is built where there is no torch, by `build`."""
    out = shop.sources / "dist"
    run(
        *(sys.executable, "-m", "build", "--sdist", "--outdir", out, "."),
        cwd=shop.sources,
        **shop.offline,
    )
    environment = create_environment(tmp_path_factory.mktemp("built"))
    environment.see(shop.torch)
    pip = (sys.executable, "-m", "pip", "--python", environment.python)
    run(
        *(*pip, "wheel", "--no-deps", "-w", out, "."),
        cwd=shop.sources,
        PATH=shop.compiler,
        **shop.offline,
    )
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return {"folder": shop.sources, "editable": shop.sources, "sdist": sdist, "wheel": wheel}


def command(tool: str, python: Path, isolated: bool = True) -> list[str | Path]:
    words: list[str | Path] = [sys.executable, "-m", "pip", "--python", python, "install"]
    if tool == "uv":
        # uv would install what it has built from the same sdist before.
        words = [UV, "pip", "install", "--cache-dir", python.parent / "cache", "--python", python]
    return [*words, "--no-deps", *([] if isolated else ["--no-build-isolation"])]


def paragraph(output: str) -> str:
    """What setup.py said last, in one line: uv breaks it where a terminal would end."""
    assert "Traceback" not in output, output
    return " ".join(output[output.rindex("fastopt: _") :].split())


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_row(
    row: Row, shop: Shop, built: dict[str, Path], fresh: Environment, tmp_path: Path
) -> None:
    if row.torch in ("before", "old"):
        fresh.see(shop.torch if row.torch == "before" else shop.old_torch)
    if not row.isolated:
        link_setuptools(fresh.site_packages)
    fails = row.outcome not in (KERNELS, NONE)
    variables = {"PATH": shop.compiler if row.compiler else shop.no_compiler}
    output = run(
        *command(row.tool, fresh.python, row.isolated),
        *(["-e"] if row.what == "editable" else []),
        built[row.what],
        cwd=tmp_path,
        expect=int(fails),
        **({"FASTOPT_BUILD": row.build} if row.build else {}),
        **variables,
        **shop.offline,
    )
    if fails:
        said = paragraph(output)
        for words in row.outcome:
            assert words in said, output
    fresh.see(shop.torch)
    if fails:
        assert "No module named 'fastopt'" in run(
            fresh.python, "-c", "import fastopt", cwd=tmp_path, expect=1
        )
        return
    seen = json.loads(run(fresh.python, "-c", LOOK, cwd=tmp_path).splitlines()[-1])
    home = shop.sources if row.what == "editable" else fresh.site_packages
    assert Path(seen["package"]).is_relative_to(home)
    assert seen["library"] == (row.outcome is KERNELS), seen
    assert (seen["reason"] is None) == (row.outcome is KERNELS)
    assert not seen["warnings"]


def test_uv_builds_again_when_the_wish_changes(
    shop: Shop, fresh: Environment, tmp_path: Path
) -> None:
    """uv keeps the wheels that it built."""
    fresh.see(shop.torch)
    link_setuptools(fresh.site_packages)
    install = (*command("uv", fresh.python, isolated=False), "--reinstall", shop.sources)
    for build, library in (("none", False), ("", True)):
        variables = shop.offline | {"PATH": shop.compiler, "FASTOPT_BUILD": build}
        run(*install, cwd=tmp_path, **variables)
        seen = json.loads(run(fresh.python, "-c", LOOK, cwd=tmp_path).splitlines()[-1])
        assert seen["library"] == library


def test_a_compiler_that_fails_is_quoted(shop: Shop, fresh: Environment, tmp_path: Path) -> None:
    fresh.see(shop.torch)
    output = run(
        *command("pip", fresh.python),
        shop.sources,
        cwd=tmp_path,
        expect=1,
        CXX="g++ -fno-such-option",
        **shop.offline,
    )
    said = paragraph(output)
    assert "this command failed, with the output above: g++ -fno-such-option -std=c++17" in said
    assert "unrecognized command-line option" in output[: output.rindex("fastopt: _")]
    assert "another compiler may do" in said and DO_WITHOUT in said


def test_build_in_isolation_says_what_is_missing(shop: Shop) -> None:
    command = (sys.executable, "-m", "build", "--wheel", "--outdir", "out", ".")
    output = run(*command, cwd=shop.sources, expect=1, PATH=shop.compiler, **shop.offline)
    for words in NO_TORCH:
        assert words in output


@pytest.mark.parametrize("variable", ["FORCE_CUDA=1", "FASTOPT_BUILD=cuda"])
def test_cuda_kernels_that_were_asked_for_have_to_build(
    shop: Shop, fresh: Environment, tmp_path: Path, variable: str
) -> None:
    fresh.see(shop.torch)
    name, value = variable.split("=")
    changes = shop.offline | {"PATH": shop.compiler, name: value}
    output = run(*command("pip", fresh.python), shop.sources, cwd=tmp_path, expect=1, **changes)
    said = paragraph(output)
    assert "_CUDA.so cannot be built: no CUDA toolkit was found in /missing" in said
    assert "`FASTOPT_BUILD=cpu pip install .` builds the CPU kernels alone" in said


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="venvs come without setuptools")
def test_setuptools_of_a_new_venv_is_told_to_upgrade(
    shop: Shop, fresh: Environment, tmp_path: Path
) -> None:
    (wheel,) = Path(ensurepip.__file__).parent.glob("_bundled/setuptools-*.whl")
    run(*command("pip", fresh.python), wheel, cwd=tmp_path, **shop.offline)
    fresh.see(shop.torch)
    install = command("pip", fresh.python, isolated=False)
    output = run(*install, shop.sources, cwd=tmp_path, expect=1, **shop.offline)
    assert "Traceback" not in output
    (line,) = (line for line in output.splitlines() if "fastopt: " in line)
    assert 'is too old to build it; upgrade it by: pip install "setuptools>=77,<82"' in line
