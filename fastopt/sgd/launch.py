"""Which kernels serve SGD on a GPU, and how they are launched: the CUDA library (csrc/cuda/sgd.cu)
through ctypes, or Triton's (fastopt/kernels/sgd.py).
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from fastopt import backends
from fastopt.sgd.table import Launch, SgdLaunch

DEVICE_TYPE = "cuda"  # ROCm's name as well


def family() -> str | None:
    """Which kernels serve GPUs: cuda, triton, or None where torch's own do."""
    return backends.GPU_FAMILY


def serves(device: torch.device) -> bool:
    return device.type == DEVICE_TYPE and family() is not None and backends.serves_gpu(device.index)


def enqueue(launch: Launch) -> None:
    """Enqueue a step on the current stream of its device."""
    LAUNCHERS[family()](launch)


@functools.cache
def _cuda_run() -> Any:
    run = ctypes.CDLL(str(backends.CUDA_LIBRARY)).fastopt_sgd_run_cuda
    run.argtypes = [ctypes.POINTER(SgdLaunch), ctypes.c_int, ctypes.c_void_p]
    run.restype = ctypes.c_char_p
    return run


@functools.cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _cuda(launch: Launch) -> None:
    index = launch.device.index
    # torch.cuda.device and current_stream cost more than the launch: small steps would notice.
    elsewhere = torch._C._cuda_getDevice() != index
    with torch.cuda.device(index) if elsewhere else contextlib.nullcontext():
        stream = torch._C._cuda_getCurrentRawStream(index)
        error = _cuda_run()(launch.as_struct(_processors(index)), index, stream)
    if error is not None:
        raise RuntimeError(f"fastopt.SGD: CUDA refused the update: {error.decode()}")


def _triton(launch: Launch) -> None:
    from fastopt.kernels.sgd import run  # imports triton

    with torch.cuda.device(launch.device):
        run(launch, _processors(launch.device.index))


LAUNCHERS: dict[Any, Callable[[Launch], None]] = {"cuda": _cuda, "triton": _triton}
