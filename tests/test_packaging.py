"""What a user installs: wheels built from this checkout and used from new environments outside it.

The new environments borrow torch and setuptools from the one that runs the tests, by path: nothing
is downloaded, and this environment's own fastopt cannot be seen from them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parents[1]
BUILD_VARIABLES = ("CXX", "PYTHONPATH")  # and FASTOPT_*: a test sets what it means to set
PLATFORM = re.sub(r"[-.]", "_", sysconfig.get_platform())

# Run by the interpreter of a new environment. Both faces against torch: the loss in float64 within
# float32's rounding, the step bit for bit.
USE_BOTH_FACES = """
import json, sys
import torch
before = set(sys.modules)
import fastopt, fastopt.ops
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
    "library": str(fastopt.ops.CPU_LIBRARY) if fastopt.ops.CPU_LIBRARY else None,
    "reason": fastopt.ops.CPU_LIBRARY_ERROR,
    "triton": any(name.split(".")[0] == "triton" for name in imported),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def environment(**changes: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in BUILD_VARIABLES and not name.startswith("FASTOPT_")
    }
    return kept | changes


def run(*command: str | Path, cwd: Path, expect: int = 0, **variables: str) -> str:
    """Standard output and error of a command that is expected to exit with `expect`."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(**variables),
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == expect, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is built from, without anything that was built."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("fastopt", "csrc"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    return folder


@pytest.fixture(scope="module")
def setuptools_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that holds setuptools and no torch."""
    folder = tmp_path_factory.mktemp("setuptools_only")
    installed = Path(sysconfig.get_path("purelib"))
    for path in (*installed.glob("setuptools*"), installed / "_distutils_hack"):
        (folder / path.name).symlink_to(path)
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
        (site_packages / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return python

    return install_wheel


def build(source: Path, python: Path | str, **variables: str) -> tuple[Path, str]:
    """The wheel, and what the build said."""
    shutil.rmtree(source / "dist", ignore_errors=True)
    as_pip_does = "from setuptools import build_meta; build_meta.build_wheel('dist')"
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
    assert package == modules | {"fastopt/_C.so", "fastopt/py.typed"}
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert {"Requires-Python: >=3.10", "Requires-Dist: torch>=2.10"} <= set(lines)


@pytest.mark.skipif(not Path("/usr/local/cuda/bin/nvcc").exists(), reason="no CUDA toolkit")
def test_a_wheel_with_cuda_parts(source: Path, tmp_path: Path) -> None:
    wheel, _ = build(source, sys.executable, FASTOPT_BUILD="cuda", FASTOPT_CUDA_ARCHS="80 90")
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
    entries = {"fastopt_cuda_archs", "fastopt_sgd_run_cuda"}
    assert {name for name in symbols["defined"] if name.startswith("fastopt")} == entries
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


def test_without_a_compiler_the_package_works_through_torch(
    source: Path, install: Callable[[Path], Path], tmp_path: Path
) -> None:
    nothing = tmp_path / "empty"
    nothing.mkdir()
    wheel, output = build(source, sys.executable, PATH=str(nothing))
    assert "no C++ compiler was found" in output and "WITHOUT THE CPU KERNELS" in output
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "fastopt/_C.so" not in members(wheel)

    python = install(wheel)
    output = run(python, "-c", USE_BOTH_FACES, cwd=tmp_path)
    report = json.loads(output.splitlines()[-1])
    assert report["library"] is None
    assert report["reason"]
    assert report["reason"] in run(python, "-m", "fastopt", cwd=tmp_path)


def test_without_a_compiler_a_required_build_fails(source: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "empty"
    nothing.mkdir()
    command = (sys.executable, "setup.py", "--quiet", "build_ext")
    output = run(*command, cwd=source, expect=1, PATH=str(nothing), FASTOPT_BUILD="cpu")
    assert "no C++ compiler was found" in output and "Traceback" not in output
    output = run(*command, cwd=source, expect=1, FASTOPT_BUILD="gpu")
    assert "FASTOPT_BUILD must be cpu, cuda or unset, got 'gpu'" in output


def test_without_torch_a_pure_wheel_is_built(
    source: Path, new_environment: Callable[[], Path], setuptools_only: Path
) -> None:
    wheel, output = build(source, new_environment(), PYTHONPATH=str(setuptools_only))
    assert "torch >= 2.10 was not found" in output
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {"fastopt/__init__.py", "fastopt/py.typed"} <= members(wheel)
    assert "fastopt/_C.so" not in members(wheel)


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
