"""Triton kernels on a machine without a GPU: what a launcher launches, compiled ahead of time."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SM80 = GPUTarget("cuda", 80, 32)
SM90 = GPUTarget("cuda", 90, 32)
SM100 = GPUTarget("cuda", 100, 32)
GFX942 = GPUTarget("hip", "gfx942", 64)
NVIDIA_TARGETS = [SM80, SM90, SM100]

_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


def target_name(target: GPUTarget) -> str:
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what stood in its brackets and parentheses."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def warps(self) -> int:
        return self.arguments["num_warps"]

    def source(self) -> ASTSource:
        """What triton.jit would compile for these arguments on a GPU: the same specialisation."""
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, self.arguments[parameter.name]
            aligned = False
            if parameter.is_constexpr or value is None:
                signature[name] = "constexpr"
            elif isinstance(value, Tensor):
                signature[name] = _POINTERS[value.dtype]
                aligned = value.data_ptr() % 16 == 0 if value.device.type != "meta" else True
            elif parameter.annotation_type:
                signature[name] = parameter.annotation_type
            elif value == 1 and not parameter.do_not_specialize:
                signature[name] = "constexpr"
            else:
                assert isinstance(value, int), f"{name}: {value!r} has no annotation"
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                aligned = value % 16 == 0 and not parameter.do_not_specialize
            if signature[name] == "constexpr":
                constants[(index,)] = value
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)

    def compile(self, target: GPUTarget) -> Compiled:
        options = {name: self.arguments[name] for name in _OPTIONS if name in self.arguments}
        return Compiled(triton.compile(self.source(), target=target, options=options), target)


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one target."""

    kernel: Any
    target: GPUTarget

    def accesses(self, kind: str) -> set[int]:
        """Bits that single threads move by the PTX instructions whose name begins like `kind`."""
        found = set()
        for name in re.findall(rf"\b({kind}\S*)\s", self.kernel.asm["ptx"]):
            vector = re.search(r"\.v(\d)\b", name)
            width = re.search(r"\.[bfsu](\d+)$", name)
            assert width, name
            found.add(int(width[1]) * int(vector[1] if vector else 1))
        return found

    def resources(self) -> dict[str, int]:
        """Registers a thread, bytes of stack (spills) and so on, as cuobjdump tells."""
        tool = Path(triton.backends.nvidia.__file__).with_name("bin") / "cuobjdump"
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(self.kernel.asm["cubin"])
            report = subprocess.run(
                [tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True
            ).stdout
        return {
            name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)
        }


class _Recorder:
    """Stands for a kernel in its module: keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **keywords: object) -> None:
            named = dict(zip((p.name for p in self.kernel.params), args, strict=False))
            assert not named.keys() & keywords.keys()
            self.launches.append(Launch(self.kernel, grid, {**named, **keywords}))

        return launch


@contextlib.contextmanager
def recorded(module: ModuleType) -> Iterator[list[Launch]]:
    """Every kernel of the module is recorded instead of run, so tensors may be on `meta`."""
    launches: list[Launch] = []
    kernels = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }
    for name, kernel in kernels.items():
        setattr(module, name, _Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
