"""`python -m fastopt run` does what `python` does: what is printed, how it ends, what __main__ is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from child import run, run_python
from fastopt import running

# Looks at what a script can see of how it was started, and ends as it is told.
SCRIPT = """\
import os, pickle, sys

class Own: pass

def fail():
    raise ValueError("as told")

def chained():
    try:
        fail()
    except ValueError as error:
        raise KeyError("then") from error

def own_hook():
    sys.excepthook = lambda kind, error, frames: print(kind, frames.tb_frame.f_code.co_name)
    fail()

def fork():
    pid = os.fork()
    if pid == 0:
        os._exit(5)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

print(sys.argv, sys.path[0], os.getcwd(), sorted(globals()))
print(__name__, __file__, __package__, __doc__, getattr(__spec__, "name", None), type(__loader__))
print(type(pickle.loads(pickle.dumps(Own()))) is Own, sys.modules["__main__"].Own is Own)
ends = {
    "returns": lambda: None,
    "raises": fail,
    "chained": chained,
    "own_hook": own_hook,
    "interrupt": lambda: signal_self(),
    "exits": lambda: sys.exit(3),
    "exits_with_words": lambda: sys.exit("words"),
    "os_exit": lambda: (sys.stdout.flush(), os._exit(4)),
    "fork": fork,
}

def signal_self():
    import signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()

sys.stdout.flush()
ends[sys.argv[1]]()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "folder" / "package").mkdir(parents=True)
    (tmp_path / "archive").mkdir()
    for name in ("script.py", "folder/__main__.py", "folder/package/__main__.py"):
        (tmp_path / name).write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text("x = (\n")
    (tmp_path / "stops.py").write_text("value = 41\nbreakpoint()\nvalue += 1\nprint(value)\n")
    (tmp_path / "keys").write_text("p __name__, value\nnext\nnext\ncontinue\n")
    (tmp_path / "link.py").symlink_to(tmp_path / "folder" / "__main__.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


CASES = {
    "arguments": ["script.py", "returns", "-m", "--report"],
    "raises": ["./script.py", "raises"],
    "chained": ["script.py", "chained"],
    "own_hook": ["script.py", "own_hook"],
    "interrupt": ["link.py", "interrupt"],
    "module": ["-m", "script", "exits"],
    "package": ["-m", "folder.package", "raises"],
    "words": ["script.py", "exits_with_words"],
    "folder": ["folder", "os_exit"],
    "fork": ["script.py", "fork"],
    "wrong": ["wrong.py"],
    "missing": ["missing.py", "x"],
    "empty": ["archive"],
    "no_module": ["-m", "missing"],
    "debugger": ["stops.py"],
}
# Importing torch takes seconds: one process does it, and forks one for each case, which goes on as
# `python -m fastopt` would.
FORKS = """
import json, os, runpy, sys
from fastopt import patching
patching.patch = lambda quiet: None  # Dynamo would make each of them slow to end
status = {}
for name, arguments in json.loads(sys.argv[1]).items():
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open("keys", os.O_RDONLY), 0)
        for number, stream in (1, "out"), (2, "err"):
            os.dup2(os.open(f"{name}.{stream}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv[1:] = ["run", "--quiet", *arguments]
        sys.path[0] = os.getcwd()
        break
    status[name] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
else:
    print(json.dumps(status))
    sys.exit()
runpy._run_module_as_main("fastopt")
"""


def test_it_ends_as_python_does(here: Path) -> None:
    status = json.loads(run_python(FORKS, json.dumps(CASES)))
    for name, arguments in CASES.items():
        plain = run("bash", "-c", 'exec "$@" <keys', "bash", sys.executable, *arguments)
        assert (here / f"{name}.out").read_text() == plain.stdout
        assert (here / f"{name}.err").read_text() == plain.stderr
        assert status[name] == plain.returncode
        assert plain.stdout.count("\n") >= 3 or plain.stderr.count("\n") == 1 or name == "wrong"
    assert "('__main__', 41)" in plain.stdout and "42" in plain.stdout  # the last case is pdb's


CHILDREN = """\
import multiprocessing, sys
import torch
from torch.nn.functional import cross_entropy

def loss(x):
    value = cross_entropy(x, torch.zeros(len(x), dtype=torch.int64))
    return value.grad_fn.name(), value.item()

if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork that has used threads hangs in OpenMP, with torch alone too
    x = torch.randn(4000, 30, requires_grad=True)
    assert "_Loss" in loss(x)[0], "the script is not served"
    for way in ("fork", "spawn"):
        with multiprocessing.get_context(way).Pool(1) as pool:
            name, value = pool.apply(loss, (x.detach().requires_grad_(),))
        assert abs(value - loss(x)[1]) < 1e-4
        print(way, name)
"""


def test_children_are_served(here: Path) -> None:
    (here / "children.py").write_text(CHILDREN)
    done = run(sys.executable, "-m", "fastopt", "run", "children.py")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert done.stderr.startswith("fastopt: serves torch.nn.functional.cross_entropy, torch.nn.Cr")
    assert done.stdout.splitlines() == ["fork _LossBackward", "spawn _LossBackward"]


@pytest.mark.parametrize("arguments", [[], ["-m"], ["--nonsense", "x.py"]], ids=" ".join)
def test_it_says_how_it_is_used(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        running.main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m fastopt run" in capsys.readouterr().err
