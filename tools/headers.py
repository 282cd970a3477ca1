"""Compile every unit of both libraries, warnings as errors, against the headers alone of other
torch versions than the one that is installed.

    python -m tools.headers 2.10.0 newest        downloaded once, kept in build/headers/VERSION
    python -m tools.headers FOLDER/              a folder like these: the headers are in FOLDER/torch

Compilers, flags and sources are setup.py's, CXX and CUDA_HOME included. No code is generated and
nothing is linked: the front ends of g++ and of both halves of nvcc read all of our code and
instantiate all of its templates, which is what headers can break, in a fraction of the time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setup  # the one beside us, which changes to its own folder

CACHE = Path("build/headers")
# What our sources reach, of the 10,000 headers in a wheel.
WANTED = (
    "torch/include/torch/csrc/stable/",
    "torch/include/torch/headeronly/",
    "torch/include/torch/csrc/inductor/aoti_torch/",
    "torch/include/torch/csrc/api/include/",
    "torch/version.py",
)
# macOS's wheels hold the same headers as Linux's, and are by far the smallest.
WHEEL = ["--no-deps", "--only-binary=:all:", "--platform=macosx_14_0_arm64", "--python-version=311"]


class NotFound(Exception):
    """Headers that cannot be had, in words for the user."""


def pip(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], check=False, capture_output=True, text=True
    )
    if result.returncode:
        raise NotFound(result.stderr.strip())
    return result.stdout


def newest_version() -> str:
    """The newest that pip offers here. It only looks; --target makes it accept another platform."""
    only_look = ["--dry-run", "--ignore-installed", "--target=build/headers", "--report=-"]
    report = pip("install", "--quiet", *only_look, *WHEEL, "torch")
    return str(json.loads(report)["install"][0]["metadata"]["version"])


def headers_of(version: str) -> Path:
    """The folder of one version's headers."""
    if version == "newest":
        version = newest_version()
    folder = CACHE / version
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        pip("download", "--quiet", *WHEEL, f"--dest={temporary}", f"torch=={version}")
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            wanted = [name for name in archive.namelist() if name.startswith(WANTED)]
            archive.extractall(f"{temporary}/headers", wanted)
        os.replace(f"{temporary}/headers", folder)  # whole or not at all
    return folder


def calls(torch: setup.Torch) -> Iterator[tuple[str, list[str]]]:
    """(name of the object, command) of every compiler call, the longest first."""
    try:
        toolkit = setup.find_cuda()
    except setup.CannotBuild as reason:
        print(f"headers: the CUDA units are left out: {reason}", file=sys.stderr)
    else:
        nvcc = setup.cuda_compiler(torch, toolkit, ["90"], strict=True)
        nvcc += ["-fdevice-syntax-only", "-Xcompiler=-fsyntax-only", "-c", "-o", os.devnull]
        for source, name, flags in setup.cuda_units():
            yield f"cuda/{name}", [*nvcc, *flags, str(source)]
    compiler = [*setup.find_compiler(), *setup.FLAGS, *setup.OPTIMIZE, "-Werror", *torch.include]
    for source, name, flags in setup.cpu_units(setup.target_machine(compiler)):
        yield f"cpu/{name}", [*compiler, "-fsyntax-only", *flags, str(source)]


def check(folder: Path, only: str) -> bool:
    """Whether the units compile; what the compilers say of those that do not is printed."""

    def complaints(call: tuple[str, list[str]]) -> str:
        result = subprocess.run(
            call[1], check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return f"{call[0]}: {result.stdout}" if result.returncode else ""

    torch = setup.Torch(folder / "torch", folder.name, None)
    chosen = [call for call in calls(torch) if Path(call[0]).match(only)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [text for text in pool.map(complaints, chosen) if text]
    print(*found, f"headers: {len(chosen)} units, {len(found)} fail: {folder}", sep="\n")
    return bool(chosen) and not found


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile against the headers of other torches.")
    parser.add_argument("torches", nargs="+", help="versions, `newest`, or folders with a slash")
    parser.add_argument("--only", default="*", help="units, as cpu/sgd* or cuda/*")
    arguments = parser.parse_args()
    good = True
    for name in arguments.torches:
        try:
            folder = Path(name) if "/" in name else headers_of(name)
        except NotFound as reason:
            print(f"headers: no headers of {name}: {reason}", file=sys.stderr)
            good &= name == "newest"  # which is a bonus: most days nothing is newer
            continue
        good &= check(folder, arguments.only)
    sys.exit(not good)


if __name__ == "__main__":
    main()
