"""`python -m fastopt` says what is there, what serves, and why the rest is missing; and the import
warns where kernels are missing that nobody chose to do without."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastopt

KERNELS = (
    "fastopt.cross_entropy",
    "fastopt.SGD",
    "torch.ops.fastopt.cross_entropy_forward",
    "torch.ops.fastopt.cross_entropy_forward_backward",
)
LEVELS = ("baseline", "avx2", "avx512")


def run(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTOPT_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=kept | variables,
        check=False,
        capture_output=True,
        text=True,
    )


def report(expect: int = 0, **variables: str) -> str:
    result = run("-m", "fastopt", **variables)
    assert result.returncode == expect, result.stderr
    return result.stdout


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.split()[:1] == [name])


def level_in_use(text: str) -> str:
    (level,) = re.findall(r"fastopt/_C\.so \(SIMD level (\w+)\)", row(text, "cpu"))
    return level


@pytest.fixture(scope="module")
def plain_report() -> str:
    return report()


def test_report_names_versions_library_and_kernels(plain_report: str) -> None:
    assert f"fastopt {fastopt.__version__}, torch {torch.__version__}" in plain_report
    for name in KERNELS:
        assert f"C++, {level_in_use(plain_report)}" in row(plain_report, name)
    assert ("not loaded: " in row(plain_report, "cuda")) == (fastopt.backends.CUDA_LIBRARY is None)
    assert ("not used: " in row(plain_report, "triton")) == (
        fastopt.backends.GPU_FAMILY != "triton"
    )
    assert "not set" in row(plain_report, "FASTOPT_ALWAYS")


@pytest.mark.parametrize("cap", LEVELS)
def test_report_shows_the_level_in_use(plain_report: str, cap: str) -> None:
    text = report(FASTOPT_SIMD=cap)
    assert level_in_use(text) == min(cap, level_in_use(plain_report), key=LEVELS.index)
    assert row(text, "FASTOPT_SIMD").split() == ["FASTOPT_SIMD", cap]


def test_report_says_why_the_kernels_are_missing() -> None:
    text = report(expect=1, FASTOPT_LIBRARY="/missing/_C.so")
    assert "not loaded: FASTOPT_LIBRARY=/missing/_C.so does not exist" in row(text, "cpu")
    assert "C++, " not in text
    assert "torch's own" in row(text, "fastopt.cross_entropy")
    assert "torch's own" in row(text, "fastopt.SGD")
    assert "reference" in row(text, "torch.ops.fastopt.cross_entropy_forward")


def test_report_shows_that_the_reference_was_asked_for() -> None:
    text = report(FASTOPT_BACKEND="reference")
    assert "not loaded: FASTOPT_BACKEND=reference" in row(text, "cpu")
    assert "reference" in row(text, "fastopt.cross_entropy")
    assert "torch's own" in row(text, "fastopt.SGD")


def test_report_may_be_cut_short() -> None:
    command = f"'{sys.executable}' -m fastopt | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True)
    assert result.stdout.startswith("fastopt ") and result.stdout.count("\n") == 1
    assert result.stderr == ""


# Imports fastopt, after `before`, and prints the warnings that this gives on which line.
IMPORT = """
import json, platform, warnings
import torch
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastopt
    import fastopt.loss
assert fastopt.MissingKernelsWarning in [w.category for w in caught] or not caught
print(json.dumps([[str(w.message), w.filename, w.lineno] for w in caught]))
"""
IMPORT_LINE = 7


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package as it was built here, in a folder to run in."""
    source = Path(fastopt.__file__).parent
    shutil.copytree(source, tmp_path / "fastopt", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "fastopt"


def import_warnings(package: Path, before: str = "", **variables: str) -> list[str]:
    script = package.parent / "script.py"
    script.write_text(IMPORT.format(before=before))
    result = run(script.name, cwd=package.parent, **variables)
    assert result.returncode == 0, result.stderr
    caught = json.loads(result.stdout)
    for _, filename, line in caught:
        assert (Path(filename).name, line) == (script.name, IMPORT_LINE)
    return [message for message, *_ in caught]


def write_record(package: Path, asked: str, reason: str) -> None:
    record = {"asked": asked, "kernels": "none", "left_out": {"fastopt._C": reason}}
    (package / "_build.json").write_text(json.dumps(record))


def not_built(package: Path) -> None:
    (package / "_C.so").unlink()
    (package / "_build.json").unlink(missing_ok=True)


def lost(package: Path) -> None:
    (package / "_C.so").unlink()
    (package / "_build.json").write_text(json.dumps({"asked": "", "left_out": {}}))


def of_another_version(package: Path) -> None:
    content = (package / "_C.so").read_bytes()
    ours = f"fastopt_version={fastopt.__version__}\0".encode()
    assert content.count(ours) == 1
    (package / "_C.so").write_bytes(content.replace(ours, ours.replace(b"=0.", b"=9.")))


def of_a_version_that_does_not_say(package: Path) -> None:
    (package / "_C.so").write_bytes((package / "_C.so").read_bytes().replace(b"_version=", b"_v="))


def of_another_machine(package: Path) -> None:
    content = bytearray((package / "_C.so").read_bytes())
    content[18:20] = {62: 183, 183: 62}[content[18]].to_bytes(2, "little")
    (package / "_C.so").write_bytes(content)


def cut_off(package: Path) -> None:
    path = package / "_C.so"
    said = b"\0fastopt_version=" + fastopt.__version__.encode() + b"\0"
    path.write_bytes(path.read_bytes()[:64] + said)


def of_other_sources(package: Path) -> None:
    content = (package / "_C.so").read_bytes()
    renamed = content.replace(b"fastopt_sgd_struct_bytes", b"fastopt_sgd_struct_bytex")
    (package / "_C.so").write_bytes(renamed)


NEW_TORCH = "torch.__version__ = torch.torch_version.TorchVersion('2.99.0')"
OLD_TORCH = "torch.__version__ = torch.torch_version.TorchVersion('2.9.1')"
BROKEN = [
    (not_built, "", "_C.so was not built; in a checkout: python setup.py build_ext --inplace"),
    (lost, "", "_C.so was built, and is gone; install fastopt again"),
    (of_another_version, "", f"is one of fastopt's version 9.1.0, not {fastopt.__version__}"),
    (of_a_version_that_does_not_say, "", "is one of fastopt's another version"),
    (of_another_machine, "", f"and this is {platform.machine()}"),
    (cut_off, "", "_C.so does not load: "),
    (cut_off, NEW_TORCH, "(torch 2.15 is the newest that it was tested with)"),
    (None, OLD_TORCH, "torch 2.9.1 is too old for _C.so; 2.10 is the oldest"),
    (of_other_sources, "", "SGD works through torch until it is rebuilt"),
]


@pytest.mark.parametrize(
    "break_it, before, reason", BROKEN, ids=lambda value: getattr(value, "__name__", None)
)
def test_missing_kernels_are_told(
    package: Path, break_it: Callable[[Path], None] | None, before: str, reason: str
) -> None:
    if break_it is not None:
        break_it(package)
    (message,) = import_warnings(package, before)
    assert message.startswith("fastopt works without some of its kernels: ")
    assert reason in message and "FASTOPT_BUILD=none silences this" in message


@pytest.mark.parametrize("choice", ["FASTOPT_BACKEND=reference", "FASTOPT_BUILD=none"])
def test_a_choice_silences_the_import(package: Path, choice: str) -> None:
    not_built(package)
    name, value = choice.split("=")
    assert not import_warnings(package, **{name: value})


def test_kernels_that_were_not_asked_for_are_not_missed(package: Path) -> None:
    not_built(package)
    write_record(package, "none", "FASTOPT_BUILD=none")
    assert not import_warnings(package)
    result = run("-m", "fastopt", cwd=package.parent)
    assert "not loaded: _C.so was not built (FASTOPT_BUILD=none)" in row(result.stdout, "cpu")
    assert (result.returncode, result.stderr) == (0, "")


def test_report_fails_where_kernels_could_serve(package: Path) -> None:
    not_built(package)
    result = run("-m", "fastopt", cwd=package.parent)
    assert "not loaded: _C.so was not built; in a checkout" in row(result.stdout, "cpu")
    assert "MissingKernelsWarning" in result.stderr
    assert result.returncode == 1
    assert run("-m", "fastopt", cwd=package.parent, FASTOPT_BACKEND="reference").returncode == 0


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_report_where_there_are_no_kernels_yet(package: Path, system: str) -> None:
    not_built(package)
    write_record(package, "", f"fastopt has no kernels for {system} yet")
    elsewhere = f"platform.system = lambda: {system!r}"
    (message,) = import_warnings(package, elsewhere)
    assert f"fastopt has no kernels for {system} yet" in message
    result = run("-c", f"import platform, runpy, torch; {elsewhere}; {REPORT}", cwd=package.parent)
    assert f"fastopt has no kernels for {system} yet" in row(result.stdout, "cpu")
    assert result.returncode == 0


REPORT = "runpy.run_module('fastopt', run_name='__main__')"


@pytest.mark.parametrize("gpus", [0, 1])
def test_report_fails_where_a_gpu_has_no_kernels(gpus: int) -> None:
    machine = (
        f"torch.version.cuda = '13.0'; torch.cuda.device_count = lambda: {gpus};"
        " torch.cuda.get_device_name = lambda index: 'A100'"
    )
    # cuda: Triton's kernels, which may be there, are not to serve.
    result = run("-c", f"import runpy, torch; {machine}; {REPORT}", FASTOPT_BACKEND="cuda")
    assert "not loaded: " in row(result.stdout, "cuda")
    assert ("A100  torch's own: no kernels for GPUs" in result.stdout) == bool(gpus)
    assert result.returncode == gpus


def test_warnings_as_errors_make_the_import_fail(package: Path) -> None:
    not_built(package)
    result = run("-W", "error::UserWarning", "-c", "import fastopt", cwd=package.parent)
    assert result.returncode == 1
    assert "fastopt.backends.MissingKernelsWarning: fastopt works without" in result.stderr
