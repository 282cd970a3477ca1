"""Kernels of a GPU serve there once they gave right values there.

    serves     asked by the faces, last: one look into a dict
    _decide    the first time, a verdict: this process's, the disk's, or _examine's
    _examine   runs small cases in a thread and a stream of their own, against float64 on the CPU
    Gpu        all that is done with a GPU for it; the tests have others

A verdict is of an op, a dtype and a GPU: "" where all was right, else the reason why torch serves.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import queue
import threading
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from fastopt import backends
from fastopt.selfcheck_cases import CHECKS, DTYPES, Wrong
from fastopt.sgd import launch

_LIMIT_S = 60.0  # of silence: most of it would be Triton's compiler
# What has verdicts. One kernel of SGD updates parameters of every dtype.
EVERY = [*product(["cross_entropy"], DTYPES), ("sgd", None)]

_known: dict[tuple[str, torch.dtype | None, int], str] = {}
_lock = threading.RLock()


def _new_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # a child has not the thread that may hold it
    os.register_at_fork(after_in_child=_new_lock)


def serves(op: str, dtype: torch.dtype | None, index: int) -> bool:
    """Whether this GPU's kernels have proved themselves. The first question runs them. Under a
    capture, and where that shows nothing (no memory is left), the answer is no, for this once."""
    try:  # every call of the loss on a GPU asks: 0.14 us
        return not _known[op, dtype, index]
    except KeyError:
        pass
    return _decide(op, dtype, index)


serves._dynamo_marked_constant = True  # type: ignore[attr-defined] # see backends.serves_gpu


def _decide(op: str, dtype: torch.dtype | None, index: int) -> bool:
    key = op, dtype, index
    with _lock:
        if key in _known:
            return not _known[key]
        verdict = _verdict(op, dtype, index)
        if verdict is None:
            return False
        _known[key] = verdict
    if verdict:
        warnings.warn(
            f"fastopt: torch's own kernels serve {name(op, dtype)} on cuda:{index}, where ours did"
            f" not pass their check: {verdict}\n`python -m fastopt check` checks them again.",
            backends.MissingKernelsWarning,
            stacklevel=3,
        )
    return not verdict


def _verdict(op: str, dtype: torch.dtype | None, index: int) -> str | None:
    """None where none can be had now."""
    if not backends.CHECK or launch.family() is None:
        return ""
    gpu = Gpu(index)
    try:
        if gpu.is_capturing():
            return None
        verdict = _read(gpu, op, dtype)
        if verdict is None:
            verdict = examine(op, dtype, index)
    except Exception as error:  # noqa: BLE001 (there may be no GPU behind a fake tensor)
        return _first_line(error)
    return None if _is_passing(verdict) else verdict


_BEFORE = "before any kernel of ours: "


def _is_passing(verdict: str) -> bool:
    """Whether this error says nothing of the kernels."""
    return any(words in verdict for words in (_BEFORE, "out of memory", "capturing"))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def name(op: str, dtype: torch.dtype | None) -> str:
    return op if dtype is None else f"{op} in {str(dtype).removeprefix('torch.')}"


def known(op: str, dtype: torch.dtype | None, index: int) -> str | None:
    """The verdict that this process or the disk has; None where none is known."""
    verdict = _known.get((op, dtype, index))
    return _read(Gpu(index), op, dtype) if verdict is None else verdict


def examine(op: str, dtype: torch.dtype | None, index: int) -> str:
    """The verdict of a run, whatever was known before; written down if it is one."""
    gpu = Gpu(index)
    with gpu.undisturbed():
        verdict = _examine(gpu, op, dtype)
    if not _is_passing(verdict):
        remember(op, dtype, index, verdict)
    return verdict


def _examine(gpu: "Gpu", op: str, dtype: torch.dtype | None) -> str:
    """In a fresh thread: grad, inference and dispatch modes, autocast, torch.func, Dynamo, the current
    device and stream are all the asking thread's own. Should it hang, it is left behind."""
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None: all is well so far
    when = _BEFORE

    def run() -> None:
        nonlocal when
        try:
            with gpu.stream_of_its_own():
                torch.ones((), device=gpu.device).item()  # raises what others have left behind
                when = ""
                answers.put(None)
                for _ in CHECKS[op](gpu.device, dtype):
                    answers.put(None)
            answers.put("")
        except Wrong as error:
            answers.put(str(error))
        except BaseException as error:  # noqa: BLE001 (whatever it is, torch serves)
            answers.put(when + _first_line(error))

    threading.Thread(target=run, name="fastopt.selfcheck", daemon=True).start()
    answer = None
    while answer is None:
        try:
            answer = answers.get(timeout=_LIMIT_S)
        except queue.Empty:
            return f"{when}no answer within {_LIMIT_S:g} s"
    return answer


class Gpu:
    """A GPU as a check needs it."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)

    def is_capturing(self) -> bool:
        """Whether what the asking thread enqueues becomes part of a CUDA graph."""
        if torch.cuda.is_current_stream_capturing():
            return True
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """For the asking thread, which goes on also after a hang: the process's own settings."""
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(0)
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    @contextlib.contextmanager
    def stream_of_its_own(self) -> Iterator[None]:
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def identity(self) -> list[str]:
        """This very GPU, and the driver that compiles and runs code for it."""
        p = torch.cuda.get_device_properties(self.device)
        identity = [p.name, f"{p.major}.{p.minor}", str(getattr(p, "uuid", ""))]
        identity.append(str(getattr(torch._C, "_cuda_getDriverVersion", int)()))
        for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
            with contextlib.suppress(OSError):
                identity.append(Path(path).read_text())
        return identity


# --- on disk -------------------------------------------------------------------------------------
# A file for each verdict. What cannot be read or written is as if it were not there.


def remember(op: str, dtype: torch.dtype | None, index: int, verdict: str) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        path = _path(Gpu(index), op, dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({"kernels": name(op, dtype), "verdict": verdict}) + "\n")
        os.replace(unfinished, path)


def _read(gpu: Gpu, op: str, dtype: torch.dtype | None) -> str | None:
    try:
        verdict = json.loads(_path(gpu, op, dtype).read_text())["verdict"]
    except (OSError, RuntimeError, ValueError, LookupError, TypeError):
        return None
    return verdict if isinstance(verdict, str) else None


def _path(gpu: Gpu, op: str, dtype: torch.dtype | None) -> Path:
    """Named after all that a verdict depends on."""
    depends = [op, str(dtype), str(launch.family()), torch.__version__, _sources()]
    digest = hashlib.sha256(json.dumps([*depends, *gpu.identity()]).encode()).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) if cache else Path.home() / ".cache"
    return folder / "fastopt" / f"{op}-{digest[:32]}.json"


@functools.cache
def _sources() -> str:
    """Of the package's modules, and of the CUDA library or Triton."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    if backends.CUDA_LIBRARY is not None:
        files.append(backends.CUDA_LIBRARY)
    elif (spec := importlib.util.find_spec("triton")) is not None and spec.origin is not None:
        files.append(Path(spec.origin))  # says its version
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()
