"""`python -m fastopt run script.py` and `run -m module`: what `python` would do, with torch's names
patched before.

The script becomes the module __main__ of this very process, so that signals, threads, forks, os._exit
and Python's own end of a process are what they are. An exception leaves through our frames, which
are taken out of its traceback where Python prints it.
"""

import atexit
import io
import multiprocessing
import os
import pkgutil
import runpy
import sys
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any

from fastopt import patching

USAGE = """\
usage: python -m fastopt run [option ...] script.py [argument ...]
       python -m fastopt run [option ...] -m module [argument ...]

  --report            at the end, print what was served and why the rest was not
  --report=FILE       write it to FILE.html, FILE.json or, as a table, to any other FILE
  --compare           and torch's results and times beside ours, for the first losses and steps
  --quiet             do not say what is patched"""
_COMPARED = 5


def main(arguments: list[str]) -> None:
    """Run a script with the arguments of `python -m fastopt run`."""
    options: dict[str, str] = {}
    while arguments and arguments[0].startswith("-") and arguments[0] != "-m":
        option, _, value = arguments.pop(0).partition("=")
        if option in ("-h", "--help"):
            print(USAGE)
            return
        if option not in ("--report", "--compare", "--quiet") or (value and option != "--report"):
            _refuse(f"there is no option {option}{value and '='}{value}\n{USAGE}")
        options[option] = value
    if not arguments or arguments == ["-m"]:
        _refuse(f"there is nothing to run\n{USAGE}")
    as_module = arguments[0] == "-m"
    if as_module:
        del arguments[0]
    if not (as_module or os.path.exists(arguments[0])):
        _cannot_open(_absolute(arguments[0]), FileNotFoundError(2, os.strerror(2)))
    if "--report" in options or "--compare" in options:
        _report(options.get("--report", ""), _COMPARED if "--compare" in options else 0)
    patching.patch(quiet="--quiet" in options)
    # What a process hands to those that it starts with multiprocessing, pickled unless it forks.
    getattr(multiprocessing.current_process(), "_config", {})["fastopt"] = _PatchesToo()
    _become(as_module, arguments)


class _PatchesToo:
    """Patches the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _patch_child, ()


def _patch_child() -> _PatchesToo:
    patching.patch(quiet=True)
    return _PatchesToo()


def _refuse(message: str) -> None:
    patching.say(f"fastopt: {message}")
    sys.exit(2)


def _report(file: str, compare: int) -> None:
    """Record from now on, and tell when this process ends: after its traceback, however it ends short
    of os._exit and a deadly signal."""
    if file:
        name, ending = os.path.splitext(os.path.abspath(file))  # the script may change the folder
        rank = os.environ.get("RANK")  # that torchrun gives to each of its processes
        file = f"{name}{rank and f'-{rank}' or ''}{ending}"
        try:
            with open(file, "a"):  # now, not after hours
                pass
        except OSError as error:
            _refuse(f"the report cannot be written: {error}")
    from fastopt import reports

    report, process = reports.reporting(compare), os.getpid()

    def finish() -> None:
        if os.getpid() != process:  # a fork's end is not the script's
            return
        report.stop()
        try:
            if file:
                report.save(file)
                patching.say(f"fastopt: the report is in {file}")
                return
        except OSError as error:
            patching.say(f"fastopt: the report cannot be written: {error}")
        patching.say(report)

    atexit.register(finish)


def _absolute(path: str) -> str:
    return os.path.join(os.getcwd(), path)  # as Python: not normalized


def _cannot_open(path: str, error: OSError) -> None:
    reason = f"[Errno {error.errno}] {error.strerror}"
    patching.say(f"{sys.orig_argv[0]}: can't open file {path!r}: {reason}")
    sys.exit(2)


def _become(as_module: bool, argv: list[str]) -> None:
    """Run argv as the module __main__. As `python` does it, in its order."""
    first_on_path = not getattr(sys.flags, "safe_path", False)
    sys.argv[:] = argv
    main_module = sys.modules["__main__"] = ModuleType("__main__")
    its_globals = main_module.__dict__
    its_globals["__builtins__"] = sys.modules["builtins"]
    if sys.version_info < (3, 14):
        its_globals["__annotations__"] = {}
    path = _absolute(argv[0])
    try:
        if as_module:
            runpy._run_module_as_main(argv[0])  # type: ignore[attr-defined]
        elif pkgutil.get_importer(path) is not None:  # a folder or an archive
            sys.path[:first_on_path] = [path]
            runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        else:
            if first_on_path:
                sys.path[0] = os.path.dirname(os.path.realpath(argv[0]))
            exec(_read(path, its_globals), its_globals)  # noqa: S102
    except SystemExit:
        raise
    except BaseException:
        _hide_frames()
        raise


def _read(path: str, its_globals: dict[str, Any]) -> CodeType:
    """The code of a script; its loader into __main__."""
    try:
        with io.open_code(path) as file:
            content = file.read()
    except OSError as error:
        _cannot_open(path, error)
    compiled = pkgutil.read_code(io.BytesIO(content))  # None unless it is bytecode
    loader = SourceFileLoader if compiled is None else SourcelessFileLoader
    its_globals.update(__file__=path, __cached__=None, __loader__=loader("__main__", path))
    return compiled or compile(content, path, "exec", dont_inherit=True)


def _hide_frames() -> None:
    """Whoever is asked to print what ends this process, Python's hook or the script's, gets the
    traceback as plain Python would have it."""
    hook = sys.excepthook

    def without_ours(kind: Any, error: BaseException, frames: TracebackType | None) -> None:
        while frames is not None and frames.tb_frame.f_code is not _become.__code__:
            frames = frames.tb_next
        frames = None if frames is None else frames.tb_next
        if frames is not None and frames.tb_frame.f_code is _read.__code__:
            frames = None  # the script does not compile
        hook(kind, error.with_traceback(frames), frames)

    sys.excepthook = without_ours
