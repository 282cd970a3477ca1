"""What was served, by call site and optimizer, and why the rest was not: reporting(), report().

While a report is open, functions of loss.py, optim.py and step.py are replaced by others that count
and time; while none is, they are what they were, and nothing is asked.
"""

import html
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

import fastopt
from fastopt import backends, comparing, loss, optim, patching, reasons
from fastopt.sgd import launch, step

logger = logging.getLogger("fastopt")
_TORCH, _OURS = (os.path.dirname(str(package.__file__)) + os.sep for package in (torch, fastopt))
_FOLDER = os.getcwd() + os.sep
_MOST_ROWS = 1000  # beyond, rows of other shapes are one


@final
class Report:
    """Calls of the loss and steps of SGD, by who served them. Printed, it is a table.

    Open until stop() or the end of its with statement. Calls in graphs of torch.compile are not in
    it. Times are the host's: what a GPU still does is not in them. A loss of ours holds its gradient's
    time, torch's comes in backward.
    """

    def __init__(self, compare: int = 0) -> None:
        self.to_compare = {"cross_entropy": compare, "sgd": compare}
        self.rows: dict[tuple[str, str, str, str], list[Any]] = {}  # [count, seconds]
        self.begin, self.seconds = time.perf_counter(), 0.0
        self.notes: list[dict[str, Any]] = []  # of comparisons
        with _lock:
            _open.append(self)
            _replace()

    def stop(self) -> None:
        """Record no more."""
        with _lock:
            if self in _open:
                self.seconds = time.perf_counter() - self.begin
                _open.remove(self)
                _replace()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def add(self, op: str, where: str, what: str, reason: str, seconds: float) -> None:
        key = op, where, what, reason
        if key not in self.rows and len(self.rows) >= _MOST_ROWS:
            key = op, where, "other shapes", reason.partition(":")[0]
        row = self.rows.setdefault(key, [0, 0.0])
        row[0] += 1
        row[1] += seconds

    def as_dict(self) -> dict[str, Any]:
        """What JSON takes: versions, the machine's kernels, and a row for each place, shape and
        answer, slowest first."""
        with _lock:
            rows = [
                {
                    "op": op,
                    "where": where,
                    "what": what,
                    "served_by": "torch" if reason else "fastopt",
                    "reason": reason or None,
                    "count": count,
                    "seconds": seconds,
                }
                for (op, where, what, reason), (count, seconds) in self.rows.items()
            ]
        return {
            "fastopt": fastopt.__version__,
            "torch": str(torch.__version__),
            "cpu": backends.simd_level(),
            "gpu": backends.GPU_FAMILY,
            "checks": _verdicts(),
            "seconds": self.seconds or time.perf_counter() - self.begin,
            "rows": sorted(rows, key=lambda row: -float(row["seconds"])),
            "compared": list(self.notes),
        }

    def json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        found = self.as_dict()
        lines = [["served by", "count", "time", "where", "what", ""]]
        for row in found["rows"]:
            cells = [row["served_by"], str(row["count"]), _time(row["seconds"]), row["where"]]
            lines.append([*cells, f"{row['op']}: {row['what']}", row["reason"] or ""])
        text = [_head(found), _table(lines) if found["rows"] else "  nothing was called"]
        if found["compared"]:
            text.append("compared on the script's own tensors")
            text.append(
                _table([["", "difference", "fastopt", "torch"], *map(_compared, self.notes)])
            )
        return "\n".join(text)

    def html(self) -> str:
        """One page, with a picture of where time went."""
        found = self.as_dict()
        longest = max([row["seconds"] for row in found["rows"]], default=0) or 1
        bars = []
        for row in found["rows"]:
            words = f"{_time(row['seconds'])}, {row['count']} x {row['op']}: {row['what']}, "
            words += row["where"] + (f", torch: {row['reason']}" if row["reason"] else "")
            bars.append(
                f'<p>{html.escape(words)}<br><svg width="100%" height="14">'
                f'<rect width="{row["seconds"] / longest:.1%}" height="14"'
                f' fill="{"#c60" if row["reason"] else "#286"}"/></svg></p>'
            )
        return (
            '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>fastopt: report</title>'
            '<meta name="viewport" content="width=device-width">'
            "<style>body{font:14px sans-serif;margin:2em}pre{overflow:auto}</style>"
            "<h1>Where time went: "
            '<span style="color:#286">fastopt</span>, <span style="color:#c60">torch</span></h1>'
            f"{''.join(bars)}<pre>{html.escape(str(self))}</pre></html>\n"
        )

    def save(self, path: str | Path) -> None:
        """Write it to FILE.html, FILE.json or, under any other name, as the table."""
        write = {".html": self.html, ".json": self.json}.get(Path(path).suffix, self.__str__)
        Path(path).write_text(write(), encoding="utf-8")


def reporting(compare: int = 0) -> Report:
    """Open a report, which records until its stop(), or the end of `with fastopt.reporting():`.

    Args:
        compare: how many of the losses and of the steps that our kernels serve torch computes as
            well, on copies, to note the largest difference and the time of each. Default: none
    """
    global _last
    _last = Report(compare)
    return _last


def report() -> Report:
    """The report that was opened last.

    Raises:
        RuntimeError: none was.
    """
    if _last is None:
        raise RuntimeError("nothing was recorded: fastopt.reporting() begins to")
    return _last


_last: Report | None = None
_lock = threading.RLock()
_open: list[Report] = []
_said: set[str] = set()


# --- what replaces the faces' functions --------------------------------------------------------------

_known = loss._STOCK_IS_KNOWN
_real: dict[str, Any] = {}
_of_this_thread = threading.local()


def _replace() -> None:
    loss._STOCK_IS_KNOWN = _known and not _open  # or tiny calls would pass unseen
    for module, name, mine in (
        (loss, "_cross_entropy", _served),
        (loss, "_overwriting", _overwriting),
        (loss, "_by_torch", _unserved),
        (loss, "_of_ranks", _of_ranks),
        (optim, "update", _step),
        (step, "torch_update", _left_to_torch),
        (patching, "_is_unsure", _is_unsure),
    ):
        there = getattr(module, name)
        if _open and there is not mine:
            _real[name] = there
            setattr(module, name, mine)
        elif not _open and there is mine:
            setattr(module, name, _real[name])


def _served(*call: Any) -> Tensor:
    ours = _real["_cross_entropy"]
    if torch.compiler.is_compiling():
        return ours(*call)
    with _timed("cross_entropy", _described(call[0]), ""):
        result = ours(*call)
    _compare("cross_entropy", _described(call[0]), lambda: comparing.of_loss(ours, call))
    return result


def _overwriting(*call: Any) -> Tensor:
    with _timed("cross_entropy", _described(call[0]), ""):  # and nothing is left to compare with
        return _real["_overwriting"](*call)


def _of_ranks(*call: Any) -> Tensor | None:
    ours = _real["_of_ranks"]
    if torch.compiler.is_compiling():
        return ours(*call)
    before, begin = getattr(_of_this_thread, "records", 0), time.perf_counter()
    result = ours(*call)
    # Rows that are whole have been recorded by the plain loss.
    if result is not None and getattr(_of_this_thread, "records", 0) == before:
        _record("cross_entropy", _described(call[0]), "", time.perf_counter() - begin)
    return result


def _unserved(*call: Any) -> Tensor:
    theirs = _real["_by_torch"]
    if torch.compiler.is_compiling():
        return theirs(*call)
    logits, target, weight, _, ignore_index, _, reduction, label_smoothing = call
    otherwise = "of a kind that nobody has met"
    question = logits, target, weight, ignore_index, reduction, label_smoothing
    why = _why(otherwise, reasons.of_loss, *question)
    with _timed("cross_entropy", _described(logits), why):
        return theirs(*call)


def _step(optimizer: Any, grad_scale: Any, found_inf: Any) -> None:
    update = _real["update"]
    if torch.compiler.is_compiling():
        return update(optimizer, grad_scale, found_inf)
    params = [p for group in optimizer.param_groups for p in group.get("params", ())]
    count = sum(getattr(p, "grad", None) is not None for p in params)
    _of_this_thread.why, _of_this_thread.left = reasons.of_step(optimizer), [0, 0.0]
    _of_this_thread.where = where = _where()
    name = f"{type(optimizer).__name__}, {_tensors(count)}"
    if grad_scale is found_inf is None and _of_this_thread.why is None:
        _compare("sgd", name, lambda: comparing.of_step(update, optimizer))
    begin = time.perf_counter()
    try:
        update(optimizer, grad_scale, found_inf)
    finally:
        left, in_torch = _of_this_thread.left
        if left < count or not count:
            name = f"{type(optimizer).__name__}, {_tensors(count - left)}"
            _record("sgd", name, "", time.perf_counter() - begin - in_torch, where)


def _is_unsure(optimizer: Any) -> bool:
    unsure: bool = _real["_is_unsure"](optimizer)
    if unsure:
        why = "a GradScaler with fused=True, options that are tensors, or a CUDA graph: use fastopt.SGD"
        _record("sgd", type(optimizer).__name__, why, 0.0)
    return unsure


def _left_to_torch(options: Any, params: Any, grads: Any, buffers: Any, *others: Any) -> None:
    torch_update = _real["torch_update"]
    if torch.compiler.is_compiling() or getattr(_of_this_thread, "compares", False):
        return torch_update(options, params, grads, buffers, *others)
    found = []
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        why = getattr(_of_this_thread, "why", None)
        if why is None:
            question = options, param, grad, buffers[i] if buffers else None
            otherwise = "shares memory with others, or they refuse fused=True"
            why = _why(otherwise, reasons.of_param, *question)
        found.append((_described(param), why))
    begin = time.perf_counter()
    try:
        torch_update(options, params, grads, buffers, *others)
    finally:
        seconds = time.perf_counter() - begin
        for what, why in found:
            where = getattr(_of_this_thread, "where", None)
            _record("sgd", what, why, seconds / len(found), where)
        if left := getattr(_of_this_thread, "left", None):
            left[0] += len(found)
            left[1] += seconds


def _why(otherwise: str, of: Callable[..., str | None], *question: Any) -> str:
    """A script is not to fail over a reason."""
    try:
        return of(*question) or otherwise
    except Exception as error:  # noqa: BLE001
        return f"of a kind that raises {type(error).__name__} when it is asked"


def _compare(op: str, what: str, compare: Callable[[], dict[str, Any]]) -> None:
    with _lock:
        takers = [each for each in _open if each.to_compare[op] > 0]
        for each in takers:
            each.to_compare[op] -= 1
    if takers:
        _of_this_thread.compares = True
        try:
            note = {"op": op, "what": what, "where": _where(), **compare()}
        finally:
            _of_this_thread.compares = False
        for each in takers:
            each.notes.append(note)


@contextmanager
def _timed(op: str, what: str, reason: str) -> Iterator[None]:
    begin = time.perf_counter()
    try:
        yield
    finally:
        _record(op, what, reason, time.perf_counter() - begin)


def _record(op: str, what: str, reason: str, seconds: float, where: str | None = None) -> None:
    where = where or _where()
    _of_this_thread.records = getattr(_of_this_thread, "records", 0) + 1
    with _lock:
        for each in _open:
            each.add(op, where, what, reason, seconds)
        first = f"{op}: {reason.partition(':')[0]}"
        new = reason and first not in _said
        _said.add(first)
    if new:
        logger.info("torch serves %s at %s: %s", op, where, reason)


def _where() -> str:
    """The file and line of the innermost frame that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if (
            not name.startswith((_TORCH, _OURS, "<frozen"))
            and name != contextmanager.__code__.co_filename
        ):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename.removeprefix(_FOLDER)}:{frame.f_lineno}"


def speak() -> None:
    """FASTOPT_VERBOSE=1: each reason on standard error when it is first met."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fastopt: %(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    reporting()


# --- words -----------------------------------------------------------------------------------------


def _described(x: Any) -> str:
    if not isinstance(x, Tensor) or x.is_nested:
        return type(x).__name__
    on = "" if x.device.type == "cpu" else f" on {x.device}"
    return f"{' x '.join(map(str, x.shape)) or 'scalar'} {str(x.dtype).removeprefix('torch.')}{on}"


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _head(found: dict[str, Any]) -> str:
    total = {who: 0.0 for who in ("fastopt", "torch")}
    for row in found["rows"]:
        total[row["served_by"]] += row["seconds"]
    gpu = found["gpu"] or "none"
    wrong = [
        " ".join(row) for row in found["checks"] if row[-1] not in ("right", "not checked yet")
    ]
    return (
        f"fastopt {found['fastopt']}, torch {found['torch']}, kernels: CPU {found['cpu']}, GPU {gpu}"
        f"{''.join(f', {words}' for words in wrong)}; of {_time(found['seconds'])}"
        f" {_time(total['fastopt'])} in fastopt's and {_time(total['torch'])} in torch's"
    )


def _compared(note: dict[str, Any]) -> list[str]:
    times = [_time(note[who]) if note.get(who) else "" for who in ("fastopt", "torch")]
    said = note.get("failed") or f"{note['difference']:.1e}"
    return [f"{note['op']}: {note['what']}, {note['where']}", said, *times]


def _verdicts() -> list[list[str]]:
    if launch.family() is None or not torch.cuda.is_initialized():
        return []
    from fastopt.__main__ import verdicts

    return verdicts()


def _table(rows: list[list[str]]) -> str:
    from fastopt.__main__ import table

    return table(rows)
