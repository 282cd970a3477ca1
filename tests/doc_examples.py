"""Runs the examples of README.md, docs/ and docstrings, and prints what is not as the page says.

    python tests/doc_examples.py PAGE ...

The exit status is 1 then. A Python file's examples are those after `>>>`. A page's examples run in its order, in one namespace and a folder of their own:

    ```pycon                    as doctest has it, `...` in the output stands for anything
    ```python                   runs
    ```{code-block} python      with a :caption:, is a file of that name
    ```console                  runs what follows each `$ `; both outputs are compared, and a line
                                of `...` stands for any lines, or none
"""

from __future__ import annotations

import doctest
import functools
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

FENCE = re.compile(
    r"^ *```(?:\{code-block\} )?(pycon|python|console)\n(?::caption: (\S+)\n\n)?(.*?)^ *```\n",
    re.MULTILINE | re.DOTALL,
)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def failures(page: Path) -> Iterator[str]:
    text = page.read_text()
    names: dict[str, object] = {"__name__": "__main__"}
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    parser = doctest.DocTestParser()
    found: list[str] = []
    parts = [
        (text.count("\n", 0, fence.start(3)), *fence.groups()) for fence in FENCE.finditer(text)
    ]
    if page.suffix == ".py":
        parts = [(0, "pycon", None, text)]
    for line, kind, caption, body in parts:
        if kind == "pycon":
            test = parser.get_doctest(body, names, page.name, str(page), line)
            runner.run(test, clear_globs=False, out=found.append)
            names.update(test.globs)
        elif kind == "console":
            found += commands(body, f"{page}, line {line}")
        elif caption:
            Path(caption).write_text(body)
        else:
            exec(compile("\n" * line + body, str(page), "exec"), names)  # noqa: S102
    yield from found


def commands(body: str, where: str) -> Iterator[str]:
    for command, wanted in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", body, re.MULTILINE):
        words = shlex.split(command)
        given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        words = [sys.executable if word == "python" else word for word in words[len(given) :]]
        done = subprocess.run(
            words, env=os.environ | given, capture_output=True, text=True, check=False
        )
        got = done.stdout + done.stderr
        any_lines = re.sub(r"\s*^ *\.\.\.$\s*", "...", wanted, flags=re.MULTILINE)
        if not doctest.OutputChecker().check_output(any_lines, got, OPTIONS):
            yield f"{where}: {command}\nexpected:\n{wanted}got:\n{got}"


def main(pages: list[str]) -> int:
    # Inductor takes a quarter of a minute for what a page shows, and adds nothing to its results.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    failed = False
    for page in [Path(page).absolute() for page in pages]:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            for failure in failures(page):
                failed = True
                print(failure)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
