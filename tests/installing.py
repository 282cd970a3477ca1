"""What the tests of packaging and of installing share: a copy of the sources, commands that run in
environments of their own, and packages that those borrow from the one that runs the tests. Nothing
is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
# Their effect on a build or an import is what a test sets, or nothing.
VARIABLES = ("FASTOPT_", "PIP_", "UV_", "PYTHON", "CXX", "CUDA_HOME", "FORCE_CUDA", "VIRTUAL_ENV")


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)}
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


def copy_sources(folder: Path) -> Path:
    """What the package is built from, without anything that was built."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)  # its age tells whether objects are out of date
    for name in ("fastopt", "csrc"):
        built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    return folder


def link_setuptools(folder: Path) -> None:
    for path in (*SITE_PACKAGES.glob("setuptools*"), SITE_PACKAGES / "_distutils_hack"):
        (folder / path.name).symlink_to(path)


def link_all_but_build_tools(folder: Path) -> None:
    """torch and what it needs, without fastopt and what could build it."""
    left_out = ("fastopt", "__editable__", "setuptools", "_distutils_hack", "pip", "wheel")
    for path in SITE_PACKAGES.iterdir():
        if not path.name.startswith(left_out) and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)


def repack(name: str, folder: Path) -> None:
    """The installed distribution as the wheel that it was installed from."""
    installed = distribution(name)
    with zipfile.ZipFile(folder / f"{name}-{installed.version}-py3-none-any.whl", "w") as wheel:
        for file in installed.files or ():
            if file.suffix != ".pyc" and ".." not in file.parts:
                wheel.write(str(file.locate()), str(file))
