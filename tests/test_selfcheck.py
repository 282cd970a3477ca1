"""Kernels of a GPU serve once they gave right values there: the emulation is the GPU, with kernels that
are right, wrong in one value, raise, hang and end the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import queue
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import emulated
import fastopt
import fastopt.__main__ as main
import served
import test_sgd_cuda
from child import run_python
from fastopt import MissingKernelsWarning, backends, loss, ops, selfcheck, selfcheck_cases
from fastopt.sgd import devices, gather, launch, step
from fastopt.sgd.table import NAMES, Launch

f32, bf16 = torch.float32, torch.bfloat16
ALL = selfcheck_cases._CASES
QUICK = [case for case in ALL if case.shape in ((33, 10), (2, 21, 33))]


class Machine(selfcheck.Gpu):
    """The emulation's GPU."""

    capturing = False
    driver = "1"

    def __init__(self, index: int) -> None:
        self.device = torch.device("cpu")

    def is_capturing(self) -> bool:
        return self.capturing

    def identity(self) -> list[str]:
        return ["emulated", self.driver]

    undisturbed = stream_of_its_own = contextlib.nullcontext


@contextlib.contextmanager
def a_machine(cache: Path) -> Iterator[list[Any]]:
    """CPU tensors are on a GPU that this process has not asked yet; the checks that ran there."""
    emulated.library()
    emulated.set_device(emulated.H200)
    ran: list[Any] = []

    def counted(op: str, check: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
        def run(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
            ran.append((op, dtype))
            return check(device, dtype)

        return run

    device = test_sgd_cuda.emulated(test_sgd_cuda.library())
    with device.in_place(), pytest.MonkeyPatch.context() as patch:
        for name in ops.SCHEMAS:
            patch.setattr(ops, name, getattr(torch.ops.fastopt_emulated, name))
        patch.setattr(gather, "LAYOUT", None)  # the kernels of the CPU are not for it
        patch.setattr(devices, "READER", gather.PythonGather)
        patch.setattr(loss, "_ON_GPU", True)
        patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        patch.setattr(backends, "CHECK", True)
        patch.setattr(selfcheck, "Gpu", Machine)
        patch.setattr(selfcheck, "_known", {})
        patch.setattr(selfcheck_cases, "_CASES", QUICK)
        for op, check in selfcheck_cases.CHECKS.items():
            patch.setitem(selfcheck_cases.CHECKS, op, counted(op, check))
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield ran


@pytest.fixture
def ran(tmp_path: Path) -> Iterator[list[Any]]:
    with a_machine(tmp_path / "cache") as ran:
        yield ran


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(selfcheck, "_known", {})
    selfcheck._sources.cache_clear()


def train(dtype: torch.dtype = f32) -> tuple[bool, bool]:
    """Whether our kernels serve the loss, and SGD."""
    logits = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    loss = fastopt.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    loss.backward()
    torchs = served.sgd.torchs
    fastopt.SGD([logits], lr=0.1, momentum=0.9).step()
    return "_Loss" in type(loss.grad_fn).__name__, served.sgd.torchs == torchs


# -- kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", selfcheck_cases.DTYPES, ids=str)
def test_right_kernels_serve(dtype: torch.dtype, ran: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(dtype) == train(dtype) == (True, True)
    assert ran == [("cross_entropy", dtype), ("sgd", None)]


def test_right_kernels_pass_all_cases(ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of long rows, which take the emulation seconds."""
    monkeypatch.setattr(selfcheck_cases, "_CASES", ALL)
    assert selfcheck.serves("cross_entropy", bf16, 0)
    assert ran == [("cross_entropy", bf16)]


def interpret() -> None:
    """In a process with TRITON_INTERPRET=1: what becomes of Triton's kernels."""
    from fastopt.kernels import sgd
    from fastopt.kernels.cross_entropy import launch as triton_launch

    launch.family = lambda: "triton"
    launch.LAUNCHERS["triton"] = functools.partial(sgd.run, processors=2)
    for name in ops.SCHEMAS:
        setattr(ops, name, ops.flat(name, getattr(triton_launch, name)))
    for op, dtype in [("cross_entropy", torch.float16), ("sgd", None)]:
        print(selfcheck._examine(Machine(0), op, dtype) or "right")


def test_right_kernels_of_triton_pass() -> None:
    pytest.importorskip("triton")
    program = "import test_selfcheck; test_selfcheck.interpret()"
    assert run_python(program, TRITON_INTERPRET="1").split() == ["right"] * 2


def wrong_gradient(*arguments: Any) -> Any:
    """Right losses, and one value of a gradient an eighth too large."""
    loss, grad, unit = torch.ops.fastopt_emulated.cross_entropy_forward_backward(*arguments)
    grad.view(-1)[grad.numel() // 2].mul_(1.125)
    return loss, grad, unit


def wrong_loss(*arguments: Any) -> Any:
    return torch.ops.fastopt_emulated.cross_entropy_forward(*arguments) * 1.01


def wrong_scale(grad: torch.Tensor, *arguments: Any) -> None:
    """Without the last element."""
    torch.ops.fastopt_emulated.cross_entropy_scale_(grad.view(-1)[:-1].view(1, -1), *arguments[:1],
        torch.zeros(1, dtype=torch.int64), *arguments[2:])  # fmt: skip


def refuse(*arguments: Any) -> Any:
    raise RuntimeError("no kernel image is available\nand more")


hanging, over = threading.Event(), threading.Event()


def hang(*arguments: Any) -> Any:
    hanging.set()
    over.wait()
    raise RuntimeError("released")


class Impatient:
    """A queue that knows at once when a minute would be spent in vain."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.put = self.queue.put

    def get(self, timeout: float) -> Any:
        assert timeout == 60
        while not (hanging.is_set() and self.queue.empty()):
            with contextlib.suppress(queue.Empty):
                return self.queue.get(timeout=0.01)
        raise queue.Empty


@pytest.fixture
def quick_minutes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    hanging.clear()
    over.clear()
    module = types.SimpleNamespace(SimpleQueue=Impatient, Empty=queue.Empty)
    monkeypatch.setattr(selfcheck, "queue", module)
    yield
    over.set()


@pytest.fixture(params=["wrong gradient", "wrong loss", "wrong scale", "raises", "hangs"])
def bad_loss(
    ran: list[Any], quick_minutes: None, request: Any, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Kernels of the loss that are bad in one way, and words of the reason."""
    op, kernel, reason = {
        "wrong gradient": ("_forward_backward", wrong_gradient, "gradient of 33x10"),
        "wrong loss": ("_forward", wrong_loss, "loss alone of 2x21x33"),
        "wrong scale": ("_scale_", wrong_scale, "scaled gradient of 33x10"),
        "raises": ("_forward", refuse, "RuntimeError: no kernel image is available\n"),
        "hangs": ("_forward_backward", hang, "check: no answer within 60 s"),
    }[request.param]
    monkeypatch.setattr(ops, f"cross_entropy{op}", kernel)
    return reason


@pytest.mark.stock
def test_bad_kernels_of_the_loss_do_not_serve(
    bad_loss: str, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> Any:
        logits = torch.ones(4, 3, requires_grad=True)
        return fastopt.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))

    for _ in range(2):  # the second time as in another process: the disk knows
        with pytest.warns(MissingKernelsWarning) as caught:
            losses = [call() for _ in range(3)]
        assert len(caught) == 1
        message = str(caught[0].message)
        assert "serve cross_entropy in float32 on cuda:" in message and bad_loss in message
        assert all("_Loss" not in type(loss.grad_fn).__name__ for loss in losses)
        assert ran == [("cross_entropy", f32)]
        forget(monkeypatch)


@pytest.mark.stock
@pytest.mark.parametrize("kind", ["wrong", "raises", "hangs"])
def test_bad_kernels_of_sgd_do_not_serve(
    kind: str, ran: list[Any], quick_minutes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = launch.LAUNCHERS["tested"]

    def wrong(run: Launch) -> None:
        right(run)
        ctypes.c_float.from_address(run.rows[0].param).value *= 1.001

    bad = {"wrong": wrong, "raises": refuse, "hangs": hang}[kind]
    monkeypatch.setitem(launch.LAUNCHERS, "tested", bad)
    param = torch.ones(5, requires_grad=True)
    param.grad = torch.ones(5)
    with pytest.warns(MissingKernelsWarning, match="serve sgd on cuda:") as caught:
        optimizer, _ = (fastopt.SGD([param], lr=0.1) for _ in range(2))
    with warnings.catch_warnings(), served.sgd.answered(by_torch=True):
        warnings.simplefilter("error")
        optimizer.step()
    assert len(caught) == 1 and torch.equal(param, torch.full((5,), 0.9))
    assert ran == [("sgd", None)]


@pytest.mark.stock
@pytest.mark.parametrize("served", [True, False])
def test_a_gpu_that_is_not_served_has_the_step_that_torch_would_choose(
    served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's for-loop is for parameters beside such as our kernels take."""
    monkeypatch.setattr(launch, "DEVICE_TYPE", "meta")
    monkeypatch.setattr(launch, "family", lambda: "tested")
    monkeypatch.setattr(backends, "serves_gpu", lambda index: True)
    monkeypatch.setattr(selfcheck, "serves", lambda *of: served)
    chosen: dict[str, Any] = {}
    monkeypatch.setattr(step, "sgd", lambda *tensors, **options: chosen.update(options))
    param = torch.ones(2, device="meta")
    options = dict(zip(NAMES, (0.1, 0, 0, 0, False, False, None, True), strict=True))
    step.torch_update(options, [param], [param], [None], False, step.Scale(None, None))
    assert (chosen["foreach"], chosen["fused"]) == ((False, False) if served else (None, True))


def no_memory(*arguments: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")


@pytest.mark.parametrize("module, function, bad, runs", [
    (ops, "cross_entropy_forward", no_memory, 2),
    (torch, "ones", refuse, 1),  # as after an illegal access of somebody else
    (torch, "ones", hang, 1),
])  # fmt: skip
def test_what_says_nothing_of_kernels_is_no_verdict(
    module: Any, function: str, bad: Any, runs: int,
    ran: list[Any], quick_minutes: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(module, function, bad)
        assert not selfcheck.serves("cross_entropy", f32, 0)
    hanging.clear()
    assert selfcheck.serves("cross_entropy", f32, 0)
    assert len(ran) == runs


# -- on disk --------------------------------------------------------------------------------------


def ask(cache: str) -> None:
    """In a child: whether kernels serve, and how often they were run for it."""
    with a_machine(Path(cache)) as ran:
        print(selfcheck.serves("cross_entropy", bf16, 0), selfcheck.serves("sgd", None, 0), ran)


def test_another_process_believes_the_disk(tmp_path: Path, ran: list[Any]) -> None:
    assert selfcheck.serves("cross_entropy", bf16, 0) and selfcheck.serves("sgd", None, 0)
    program = "import sys, test_selfcheck; test_selfcheck.ask(sys.argv[1])"
    assert run_python(program, str(tmp_path / "cache")).strip() == "True True []"


def test_other_sources_or_drivers_are_checked_again(
    ran: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "_CUDA.so"
    library.write_bytes(b"one")
    monkeypatch.setattr(backends, "CUDA_LIBRARY", library)

    def runs() -> int:
        forget(monkeypatch)
        before = len(ran)
        assert selfcheck.serves("cross_entropy", bf16, 0)
        return len(ran) - before

    assert [runs(), runs()] == [1, 0]
    library.write_bytes(b"two")
    assert [runs(), runs()] == [1, 0]
    monkeypatch.setattr(Machine, "driver", "2")
    assert [runs(), runs()] == [1, 0]
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert [runs(), runs()] == [1, 0]
    selfcheck._sources.cache_clear()


@pytest.mark.parametrize("content", ["", "[]", '{"verdict": null}', '"text"'])
def test_a_file_that_says_nothing_is_none(
    content: str, ran: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert selfcheck.serves("cross_entropy", bf16, 0)
    (file,) = (tmp_path / "cache/fastopt").iterdir()
    right = file.read_text()
    file.write_text(content)
    forget(monkeypatch)
    assert selfcheck.serves("cross_entropy", bf16, 0)
    assert len(ran) == 2 and file.read_text() == right


@pytest.mark.parametrize("where", ["a file", "no home"])
def test_without_a_folder_the_process_remembers(
    where: str, ran: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file") if where == "a file" else "")
    if where == "no home":
        monkeypatch.setattr(Path, "home", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selfcheck.serves("cross_entropy", bf16, 0)
        assert selfcheck.serves("cross_entropy", bf16, 0)
    assert len(ran) == 1


# -- whoever asks ---------------------------------------------------------------------------------


def test_threads_that_ask_at_once_run_it_once(ran: list[Any]) -> None:
    barrier, answers = threading.Barrier(3), []

    def ask() -> None:
        barrier.wait()
        answers.append(selfcheck.serves("cross_entropy", bf16, 0))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 3 and len(ran) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_child_holds_no_lock() -> None:
    program = """
    import os, threading
    from fastopt import selfcheck
    selfcheck._lock.acquire()
    pid = os.fork()
    if pid == 0:
        taken = []
        thread = threading.Thread(target=lambda: taken.append(selfcheck._lock.acquire(False)))
        thread.start()
        thread.join()
        os._exit(0 if taken == [True] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    """
    run_python(program)


@pytest.mark.stock
def test_nothing_is_decided_under_capture(ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "capturing", True)
    assert train() == (False, False)
    assert ran == [] and selfcheck._known == {}
    monkeypatch.setattr(Machine, "capturing", False)
    assert train() == (True, True)
    monkeypatch.setattr(Machine, "capturing", True)
    assert train() == (True, True)
    assert len(ran) == 2


def test_who_trusts_does_not_ask(ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "CHECK", False)
    monkeypatch.setattr(ops, "cross_entropy_scale_", refuse)
    assert train() == (True, True) and ran == []
    program = "from fastopt import backends; print(backends.CHECK)"
    assert run_python(program, FASTOPT_CHECK="0").strip() == "False"
    assert run_python(program, FASTOPT_CHECK="").strip() == "True"


def test_without_kernels_of_a_gpu_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under FASTOPT_BACKEND=reference."""
    monkeypatch.setattr(backends, "CHECK", True)
    monkeypatch.setattr(backends, "GPU_FAMILY", None)
    monkeypatch.setattr(selfcheck, "_known", {})
    assert selfcheck.serves("cross_entropy", f32, 0)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "mode",
    [
        contextlib.nullcontext,
        torch.no_grad,
        torch.inference_mode,
        FakeTensorMode,
        lambda: torch.autocast("cpu", bf16),
        lambda: torch.device("meta"),
        default_dtype,
    ],
)
def test_the_modes_of_whoever_asks_are_not_in_the_way_nor_touched(
    mode: Callable[[], Any], ran: list[Any]
) -> None:
    state = torch.get_rng_state()
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert selfcheck.serves("cross_entropy", torch.float16, 0)
        assert selfcheck.serves("sgd", None, 0)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_question_under_vmap_and_forward_mode(ran: list[Any]) -> None:
    def answer(x: torch.Tensor) -> torch.Tensor:
        assert selfcheck.serves("cross_entropy", f32, 0)
        return x

    torch.func.vmap(answer)(torch.ones(3))
    torch.func.jvp(answer, (torch.ones(3),), (torch.ones(3),))
    assert len(ran) == 1


@pytest.mark.parametrize("right", [True, False])
def test_the_answer_is_a_constant_to_dynamo(
    right: bool, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check runs while it traces."""
    if not right:
        monkeypatch.setattr(ops, "cross_entropy_forward_backward", wrong_gradient)

    def double_if_served(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if selfcheck.serves("cross_entropy", bf16, 0) else x

    torch._dynamo.reset()
    compiled = torch.compile(double_if_served, fullgraph=True, backend="eager")
    with contextlib.nullcontext() if right else pytest.warns(MissingKernelsWarning):
        assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 1.0 + right))
    assert torch.equal(compiled(torch.ones(4)), torch.full((4,), 1.0 + right))
    assert ran == [("cross_entropy", bf16)]


# -- a GPU itself, as far as it goes without one --------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be asked of torch.cuda, in order."""
    log: list[Any] = []

    @contextlib.contextmanager
    def entered(of: Any) -> Iterator[None]:
        log.append(("enter", of))
        yield
        log.append(("leave", of))

    stream = types.SimpleNamespace(synchronize=lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", log.append)
    return log


def test_a_check_waits_for_its_own_stream_alone(cuda: list[Any]) -> None:
    with selfcheck.Gpu(1).stream_of_its_own():
        device, stream = cuda
        assert device == ("enter", torch.device("cuda:1")) and stream[0] == "enter"
        cuda.clear()
    assert cuda == [("leave", stream[1]), ("leave", device[1]), "synchronize"]


def test_the_sync_debug_mode_comes_back(cuda: list[Any]) -> None:
    with pytest.raises(KeyboardInterrupt), selfcheck.Gpu(1).undisturbed():
        assert cuda == [0]
        raise KeyboardInterrupt
    assert cuda == [0, 2]


@pytest.mark.parametrize("captured", [[True], [False, True], [False, False]])
def test_captures_on_the_current_and_on_its_device_are_seen(
    captured: list[bool], cuda: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(captured)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(answers))
    assert selfcheck.Gpu(1).is_capturing() == any(captured)


def test_two_gpus_of_a_kind_are_not_one(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = [types.SimpleNamespace(name="H200", major=9, minor=0, uuid=i) for i in "ab"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: properties[d.index])
    first, second = (selfcheck.Gpu(i).identity() for i in (0, 1))
    assert first[:3] == ["H200", "9.0", "a"] and second[:3] == ["H200", "9.0", "b"]


def test_a_gpu_that_cannot_be_asked_does_not_serve(
    ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "is_capturing", refuse)
    with pytest.warns(MissingKernelsWarning, match="no kernel image is available"):
        assert not selfcheck.serves("cross_entropy", f32, 0)


# -- python -m fastopt check ----------------------------------------------------------------------

CHILD = "import sys, test_selfcheck; test_selfcheck.check_in_a_child(*sys.argv[1:])"


def check_in_a_child(cache: str, kernels: str, index: str, name: str) -> None:
    with a_machine(Path(cache)), pytest.MonkeyPatch.context() as patch:
        if kernels == "wrong":
            patch.setattr(ops, "cross_entropy_forward_backward", wrong_gradient)
        if kernels == "dies":
            patch.setattr(ops, "cross_entropy_forward_backward", lambda *_: sys.exit(3))
            patch.setattr(selfcheck, "Gpu", lambda index: sys.exit(3))
        main.check_one(index, name)


@pytest.mark.parametrize("kernels", ["right", "wrong", "dies", "hangs"])
def test_the_command_checks_in_children(
    kernels: str, ran: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(selfcheck, "EVERY", [("cross_entropy", bf16)])
    command = [sys.executable, "-c", CHILD, str(tmp_path / "cache"), kernels]
    if kernels == "hangs":
        command = [sys.executable, "-c", "import time; time.sleep(1000)"]
        monkeypatch.setattr(main, "CHILD_LIMIT_S", 0.1)
    monkeypatch.setattr(main, "CHILD", command)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parents[1]}")
    reason = {
        "right": "right",
        "wrong": "gradient of 33x10",
        "dies": "the process that checked it ended with status 3",
        "hangs": "the process that checked it gave no answer within 0.1 s",
    }[kernels]
    assert main.verdicts() == [["cuda:0", "cross_entropy in bfloat16", "not checked yet"]]
    assert main.check() == (kernels != "right")
    assert f"cuda:0  cross_entropy in bfloat16  {reason}" in capsys.readouterr().out
    # What was found is on disk, and in the report.
    assert main.verdicts()[0][2].startswith(reason) and ran == []
    monkeypatch.setattr(backends, "CHECK", False)
    assert main.verdicts()[0][2] == "trusted: FASTOPT_CHECK=0"


def test_without_a_gpu_the_command_says_so(capsys: Any) -> None:
    assert main.check() == 0
    assert "no kernels on a GPU to check" in capsys.readouterr().out
