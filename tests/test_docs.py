"""What README.md and docs/ say: their examples run, and give what stands there; their lists of names,
variables and messages are those of the code. (`make docs` builds the pages.)"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastopt
import fastopt.__main__
from child import HERE, run
from doc_examples import FENCE

ROOT = HERE.parent
DOCS = ROOT / "docs"
PACKAGE = Path(fastopt.__file__).parent
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def test_every_example_gives_what_the_page_says() -> None:
    """As a user runs them: with the crossover, without a GPU."""
    pages = [page for page in PAGES if FENCE.search(page.read_text())]
    assert len(pages) > 8
    optim = PACKAGE / "optim.py"
    settings = {"FASTOPT_ALWAYS": "0", "FASTOPT_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = run(sys.executable, HERE / "doc_examples.py", *pages, optim, **settings)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_page_has_python_that_nobody_runs() -> None:
    for page in PAGES:
        text = page.read_text()
        kinds = re.findall(r"^ *```((?:\{code-block\} )?py.*|console)$", text, re.MULTILINE)
        assert len(kinds) == len(FENCE.findall(text)), page


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    """Of the pages in docs/, Sphinx sees to it."""
    links = re.findall(r"\]\((?!https:)([^)#]+)", page.read_text())
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_reference_has_every_public_name_and_variable() -> None:
    python = (DOCS / "reference/python.md").read_text()
    documented = re.findall(r"^\.\. auto\w+:: (\w+)$", python, re.MULTILINE)
    assert sorted(documented) == sorted(fastopt.__all__)
    variables = (DOCS / "reference/command_line.md").read_text()
    names = {*fastopt.__main__.ENVIRONMENT, *re.findall(r'get\("([A-Z_]+)"', source("setup.py"))}
    assert not [name for name in names if f"`{name}" not in variables]


def test_the_citation_is_of_this_version() -> None:
    assert f"\nversion: {fastopt.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# --- messages: docs/troubleshooting.md --------------------------------------------------------------

# Where messages for users are raised, and functions that return some.
MESSAGES = {
    "setup.py": "left_out",
    "packaging/cuda13/setup.py": "",
    "fastopt/backends.py": "_load.*|_?why_not.*",
    "fastopt/reasons.py": "_?of_.*|_subclass|_too_small",
    "fastopt/__main__.py": "sgd_kernel",
    "fastopt/patching.py": "",
    "fastopt/reports.py": "",
}


def source(name: str) -> str:
    return ((PACKAGE.parent if name.startswith("fastopt/") else ROOT) / name).read_text()


def template(node: ast.AST) -> str:
    """A string of the sources, with ... for what is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value.replace("{}", "…") if constant else "…"


def templates(node: ast.AST) -> Iterator[str]:
    """Of every string in a piece of code, and of those that are put into it."""
    if isinstance(node, ast.JoinedStr):
        yield template(node)
        inside = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
    elif isinstance(node, ast.Constant):
        yield template(node)
        inside = []
    else:
        inside = list(ast.iter_child_nodes(node))
    for part in inside:
        yield from templates(part)


def messages(name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from [template(argument) for argument in node.exc.args[:1]]
        elif isinstance(node, ast.FunctionDef) and re.fullmatch(MESSAGES[name], node.name):
            for part in ast.walk(node):
                if isinstance(part, ast.Return) and part.value is not None:
                    yield from templates(part.value)


def fixed(text: str) -> list[str]:
    return [part for part in map(str.strip, text.split("…")) if len(part) >= 5]


def terms() -> list[str]:
    """What the page has before `: `, as code."""
    page = (DOCS / "troubleshooting.md").read_text()
    lines = re.findall(r"^(`.*)\n: ", page, re.MULTILINE)
    return [
        term for line in lines for term in re.findall(r"`` (.+?) ``|`(.+?)`", line) for term in term
    ]


def test_every_term_is_a_message_of_the_sources() -> None:
    sources = [*map(source, MESSAGES), *(path.read_text() for path in PACKAGE.glob("*.py"))]
    texts = [text for one in sources for text in templates(ast.parse(one))]
    texts.append("Target … is out of bounds.")  # raised in C++
    unknown = [t for t in terms() if not any(all(p in text for p in fixed(t)) for text in texts)]
    assert not unknown


@pytest.mark.parametrize("name", MESSAGES)
def test_every_message_is_a_term(name: str) -> None:
    known = [fixed(term) for term in terms() if fixed(term)]
    left = [
        message
        for message in messages(name)
        if " " in message
        and fixed(message)
        and not any(all(p in message for p in parts) for parts in known)
    ]
    assert not left
