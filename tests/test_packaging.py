"""What a user installs: wheels built from this checkout and used from new environments outside it.

The new environments borrow torch and setuptools from the one that runs the tests, by path: nothing
is downloaded, and this environment's own fastopt cannot be seen from them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from installing import ROOT, SITE_PACKAGES, copy_sources, link_setuptools, run

pytestmark = pytest.mark.packaging

PLATFORM = re.sub(r"[-.]", "_", sysconfig.get_platform())

# Run by the interpreter of a new environment. Both faces against torch: the loss in float64 within
# float32's rounding, the step bit for bit.
USE_BOTH_FACES = """
import json, sys
import torch
before = set(sys.modules)
import fastopt, fastopt.backends
imported = set(sys.modules) - before

torch.manual_seed(0)
logits = torch.randn(64, 100, requires_grad=True)
target = torch.randint(100, (64,))
loss = fastopt.CrossEntropyLoss()(logits, target)
loss.backward()
exact_logits = logits.detach().double().requires_grad_()
exact = torch.nn.functional.cross_entropy(exact_logits, target)
exact.backward()
torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
torch.testing.assert_close(logits.grad.double(), exact_logits.grad, rtol=1e-5, atol=1e-9)

parameters = [torch.randn(33, requires_grad=True) for _ in range(2)]
parameters[1].data.copy_(parameters[0].data)
ours = fastopt.SGD(parameters[:1], lr=0.1, momentum=0.9, weight_decay=1e-4)
stock = torch.optim.SGD(parameters[1:], lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=False)
for _ in range(3):
    gradient = torch.randn(33)
    for parameter in parameters:
        parameter.grad = gradient.clone()
    ours.step()
    stock.step()
assert torch.equal(*parameters)

print(json.dumps({
    "package": fastopt.__file__,
    "version": fastopt.__version__,
    "library": str(fastopt.backends.CPU_LIBRARY) if fastopt.backends.CPU_LIBRARY else None,
    "reason": fastopt.backends.CPU_LIBRARY_ERROR,
    "triton": any(name.split(".")[0] == "triton" for name in imported),
    "cuda": torch.cuda.is_initialized(),
}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from, with the objects that `make build` compiled."""
    folder = copy_sources(tmp_path_factory.mktemp("source"))
    for library in ("cpu", "cuda"):  # what is compiled already
        if (ROOT / "build" / library).exists():
            shutil.copytree(ROOT / "build" / library, folder / "build" / library)
    return folder


@pytest.fixture(scope="module")
def setuptools_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that holds setuptools and no torch."""
    folder = tmp_path_factory.mktemp("setuptools_only")
    link_setuptools(folder)
    return folder


@pytest.fixture
def new_environment(tmp_path: Path) -> Callable[[], Path]:
    """Creates an empty environment and returns its Python."""

    def create() -> Path:
        venv.create(tmp_path / "environment", symlinks=True)
        return tmp_path / "environment/bin/python"

    return create


@pytest.fixture
def install(new_environment: Callable[[], Path], tmp_path: Path) -> Callable[[Path], Path]:
    """Installs a wheel into a new environment that also sees our torch, and returns its Python."""

    def install_wheel(wheel: Path) -> Path:
        python = new_environment()
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        run(*pip, "--no-index", "--no-deps", wheel, cwd=tmp_path)
        (site_packages,) = (tmp_path / "environment/lib").glob("python*/site-packages")
        # Only the folder: the .pth files in it, such as an editable fastopt's, are not followed.
        (site_packages / "torch.pth").write_text(f"{SITE_PACKAGES}\n")
        return python

    return install_wheel


def build(source: Path, python: Path | str, before: str = "", **variables: str) -> tuple[Path, str]:
    """The wheel, and what the build said."""
    shutil.rmtree(source / "dist", ignore_errors=True)
    as_pip_does = f"from setuptools import build_meta\n{before}\nbuild_meta.build_wheel('dist')"
    output = run(python, "-c", as_pip_does, cwd=source, **variables)
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel, output


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    built, _ = build(source, sys.executable, FASTOPT_BUILD="cpu")
    return Path(shutil.move(built, tmp_path_factory.mktemp("wheel")))


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_serves_every_python_and_holds_the_library(wheel: Path) -> None:
    assert wheel.name.endswith(f"-py3-none-{PLATFORM}.whl")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastopt").rglob("*.py")}
    package = {name for name in members(wheel) if ".dist-info/" not in name}
    assert package == modules | {"fastopt/_C.so", "fastopt/_build.json", "fastopt/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
        record = json.loads(archive.read("fastopt/_build.json"))
    assert (record["kernels"], record["asked"]) == ("cpu", "cpu")
    assert record["left_out"] == {"fastopt._CUDA": "FASTOPT_BUILD=cpu"}
    assert {"Requires-Python: >=3.10", "Requires-Dist: torch>=2.10"} <= set(lines)


@pytest.mark.skipif(not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no CUDA toolkit")
def test_a_wheel_with_cuda_parts(source: Path, tmp_path: Path) -> None:
    wheel, _ = build(source, sys.executable, FASTOPT_BUILD="cuda", FASTOPT_CUDA_ARCHS="90")
    assert wheel.name.endswith(f"-py3-none-{PLATFORM}.whl")
    assert {"fastopt/_C.so", "fastopt/_CUDA.so"} <= members(wheel)
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("fastopt/_CUDA.so", tmp_path)
    symbols = {
        kind: set(
            run(
                "nm", "-D", f"--{kind}-only", "--format=just-symbols", library, cwd=tmp_path
            ).split()
        )
        for kind in ("defined", "undefined")
    }
    entries = {"cuda_archs", "cuda_why_not", "sgd_run_cuda", "version"}
    ours = [name for name in symbols["defined"] if name.startswith("fastopt_")]
    assert {name.removeprefix("fastopt_") for name in ours} == entries
    # torch by its stable C functions alone; no CUDA library, the runtime is linked in.
    foreign = {name for name in symbols["undefined"] if "@" not in name and name[:2] != "__"}
    stable = ("aoti_torch_", "torch_", "_ITM_")
    assert not {name for name in foreign if not name.startswith(stable)}


def test_installed_wheel_serves_both_faces(
    wheel: Path, install: Callable[[Path], Path], tmp_path: Path
) -> None:
    python = install(wheel)
    output = run(python, "-c", USE_BOTH_FACES, cwd=tmp_path, FASTOPT_ALWAYS="1")
    report = json.loads(output.splitlines()[-1])
    package = tmp_path / "environment/lib"
    assert Path(report["package"]).is_relative_to(package)
    assert Path(report["library"]).is_relative_to(package)
    assert report["reason"] is None
    assert not report["triton"] and not report["cuda"]
    assert str(report["library"]) in run(python, "-m", "fastopt", cwd=tmp_path)


def test_without_kernels_the_package_works_through_torch(
    source: Path, install: Callable[[Path], Path], tmp_path: Path
) -> None:
    nothing = tmp_path / "empty"
    nothing.mkdir()
    wheel, _ = build(source, sys.executable, PATH=str(nothing), FASTOPT_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "fastopt/_build.json" in members(wheel) and "fastopt/_C.so" not in members(wheel)

    python = install(wheel)
    output = run(python, "-c", USE_BOTH_FACES, cwd=tmp_path)
    assert "Warning" not in output
    report = json.loads(output.splitlines()[-1])
    assert report["library"] is None
    assert report["reason"] == "_C.so was not built (FASTOPT_BUILD=none)"
    assert report["reason"] in run(python, "-m", "fastopt", cwd=tmp_path)


# Another platform, as far as our Python code can tell. setuptools and torch, which have modules of
# their own for each, are imported before.
PRETEND = """
import os, platform, sys, sysconfig
sysconfig.get_config_vars()  # reads files that are named after the real platform, and keeps them
sys.platform, platform.system = {platform!r}, lambda: {system!r}
for name in ("fork", "sched_getaffinity", "sched_setaffinity"):
    delattr(os, name)
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "termios")))
"""


@pytest.mark.parametrize("platform, system", [("darwin", "Darwin"), ("win32", "Windows")])
def test_other_platforms_have_torchs_kernels_and_say_so(
    source: Path, install: Callable[[Path], Path], tmp_path: Path, platform: str, system: str
) -> None:
    pretend = PRETEND.format(platform=platform, system=system)
    wheel, output = build(source, sys.executable, before=pretend)
    reason = f"fastopt has no kernels for {system} yet"
    assert f"fastopt: without _C.so: {reason}" in output
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not {name for name in members(wheel) if name.endswith(".so")}

    python = install(wheel)
    output = run(python, "-c", f"import torch\n{pretend}\n{USE_BOTH_FACES}", cwd=tmp_path)
    assert "MissingKernelsWarning: fastopt works without some of its kernels" in output
    assert reason in output
    assert json.loads(output.splitlines()[-1])["library"] is None


def test_a_build_that_cannot_be_done_ends_in_a_paragraph(source: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "empty"
    nothing.mkdir()
    command = (sys.executable, "setup.py", "--quiet", "build_ext")
    for asked in ("", "cpu"):
        output = run(*command, cwd=source, expect=1, PATH=str(nothing), FASTOPT_BUILD=asked)
        first, *others = output.strip().splitlines()
        assert first.startswith("fastopt: _C.so cannot be built: no C++ compiler was found")
        assert [line.partition(":")[0] for line in others] == ["To mend that", "To do without"]
    output = run(*command, cwd=source, expect=1, FASTOPT_BUILD="gpu")
    assert "FASTOPT_BUILD must be none, cpu, cuda or unset, got 'gpu'" in output


def test_metadata_and_sdist_need_no_torch(
    source: Path, new_environment: Callable[[], Path], setuptools_only: Path
) -> None:
    python = new_environment()
    run(python, "-c", "import torch", cwd=source, expect=1)
    for command in ("egg_info", "sdist"):
        run(python, "setup.py", command, cwd=source, PYTHONPATH=str(setuptools_only))


def test_isolated_build_finds_the_torch_of_its_environment(
    source: Path, wheel: Path, setuptools_only: Path, tmp_path: Path
) -> None:
    # How pip isolates a build: sitecustomize takes the environment's packages off sys.path.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, sysconfig\nsys.path.remove(sysconfig.get_path('purelib'))\n"
    )
    isolated = f"{tmp_path}{os.pathsep}{setuptools_only}"
    run(sys.executable, "-c", "import torch", cwd=tmp_path, expect=1, PYTHONPATH=isolated)
    built, output = build(source, sys.executable, PYTHONPATH=isolated, FASTOPT_BUILD="cpu")
    assert members(built) == members(wheel)
    assert "compiler calls" not in output  # nothing had changed since the first wheel


def test_source_distribution_is_complete(source: Path) -> None:
    run(sys.executable, "setup.py", "--quiet", "sdist", cwd=source)
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    needed = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "fastopt")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".h", ".cpp", ".py", ".typed"}
    }
    assert needed | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= packed
