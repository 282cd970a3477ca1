"""Reports: a reason wherever torch serves and nowhere else, counts and places that are right, and
nothing left behind."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import fastopt
import served
from child import run
from cross_entropy_calls import CALLS
from fastopt import backends, loss, optim, patching, reasons, reports, running
from fastopt.sgd import step
from sgd_oracle import OPTIONS, leaf, set_grads, values
from test_sgd_served import UNSERVED, stock_params  # noqa: F401

serves = served._serves  # what is counted would have to be ours


class Tagged(Tensor):
    pass


LOGITS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.randn(6, 5),
    "wants gradient": lambda: torch.randn(6, 5, requires_grad=True),
    "double": lambda: torch.randn(6, 5).double(),
    "bfloat16": lambda: torch.randn(6, 5).bfloat16(),
    "parameter": lambda: torch.nn.Parameter(torch.randn(6, 5)),
    "subclass": lambda: torch.randn(6, 5).as_subclass(Tagged),
    "no tensor": lambda: [[0.5]],  # type: ignore[dict-item, return-value]
    "int64": lambda: torch.ones(6, 5, dtype=torch.int64),
    "complex": lambda: torch.ones(6, 5, dtype=torch.complex64),
    "sparse": lambda: torch.randn(6, 5).to_sparse(),
    "meta": lambda: torch.randn(6, 5, device="meta"),
    "scalar": lambda: torch.randn(()),
    "row": lambda: torch.randn(5),
    "image": lambda: torch.randn(6, 5, 2),
    "empty": lambda: torch.randn(0, 5),
    "no class": lambda: torch.randn(6, 0),
}
TARGETS: dict[str, Callable[[], Tensor]] = {
    "labels": lambda: torch.zeros(6, dtype=torch.int64),
    "uint8": lambda: torch.zeros(6, dtype=torch.uint8),
    "int32": lambda: torch.zeros(6, dtype=torch.int32),
    "other shape": lambda: torch.zeros(7, dtype=torch.int64),
    "one label": lambda: torch.zeros((), dtype=torch.int64),
    "label image": lambda: torch.zeros(6, 2, dtype=torch.int64),
    "probabilities": lambda: torch.rand(6, 5),
    "double probabilities": lambda: torch.rand(6, 5).double(),
    "learned": lambda: torch.rand(6, 5, requires_grad=True),
    "other probabilities": lambda: torch.rand(5, 6),
    "subclass": lambda: torch.zeros(6, dtype=torch.int64).as_subclass(Tagged),
    "no tensor": lambda: 3,  # type: ignore[dict-item, return-value]
    "sparse": lambda: torch.rand(6, 5).to_sparse(),
    "meta": lambda: torch.zeros(6, dtype=torch.int64, device="meta"),
}
WEIGHTS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "plain": lambda: torch.ones(5),
    "half": lambda: torch.ones(5).half(),
    "learned": lambda: torch.ones(5, requires_grad=True),
    "too long": lambda: torch.ones(6),
    "two dimensions": lambda: torch.ones(1, 5),
    "subclass": lambda: torch.ones(5).as_subclass(Tagged),
    "sparse": lambda: torch.ones(5).to_sparse(),
    "meta": lambda: torch.ones(5, device="meta"),
    "no tensor": lambda: [1.0],  # type: ignore[dict-item, return-value]
}
CALL_OPTIONS = [
    (-100, "mean", 0.0),
    (1, "sum", 0.1),
    (-100, "batchmean", 0.0),
    (-100, None, 0.0),
    (1.0, "mean", 0.0),
    (True, "mean", 0.0),
    (2**63, "mean", 0.0),
    (-100, "none", 1.5),
    (-100, "none", float("nan")),
    (-100, "none", "0.1"),
]


class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "eager": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: torch.device("cpu"),
    "function mode": Mode,
    "forward AD": forward_ad.dual_level,
    "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True),
}


def disagreement(*call: object) -> tuple[bool, str | None]:
    """Whether it is served and why it is not, asked of both, unless they are at one."""
    answer, why = serves(*call), reasons.of_loss(*call)
    assert answer is (why is None), (answer, why, call)
    return answer, why


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_reason_if_and_only_if_torch_serves(
    mode: str, always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "ALWAYS", always)
    if not always:  # a crossover in the middle of the table
        monkeypatch.setattr(loss, "_MIN_COST", 150)
        monkeypatch.setattr(loss, "_MIN_LOGITS", 30)
    made = [[make() for make in of.values()] for of in (LOGITS, TARGETS, WEIGHTS)]
    found = []
    with MODES[mode]():
        for logits, target, weight in itertools.product(*made):
            for options in CALL_OPTIONS:
                found.append(disagreement(logits, target, weight, *options))
    if mode in ("eager", "no_grad", "inference", "autocast", "default device"):
        assert 3 < sum(answer for answer, _ in found) < len(found) / 2
    else:
        assert not any(answer for answer, _ in found)


def test_a_reason_for_no_call_of_the_matrix() -> None:
    answers = set()
    for call in CALLS[::3]:
        logits, target, keywords = call.inputs()
        options = [keywords.get(name, default) for name, default in DEFAULTS.items()]
        answers.add(disagreement(logits, target, *options)[0])
    assert True in answers


DEFAULTS = {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}


def why(logits: str = "plain", target: str = "labels", weight: str = "none") -> str | None:
    call = LOGITS[logits](), TARGETS[target](), WEIGHTS[weight]()
    return disagreement(*call, *CALL_OPTIONS[0])[1]


def test_reasons_are_words_to_act_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why() is None
    assert why(logits="subclass") == f"logits: a subclass, {__name__}.Tagged"
    assert why(logits="no tensor") == "logits: no tensor but a list"
    assert why(logits="int64") == "logits are int64"
    assert why(logits="sparse") == "logits are sparse_coo"
    assert why(logits="meta", target="meta") == "logits are on meta"
    assert why(target="uint8") == "target is uint8: use target.long()"
    assert why(target="other shape") == "target is 7, logits are 6 x 5"
    assert why(target="double probabilities") == "target is float64, logits are float32"
    assert why(target="learned") == "target are probabilities that need a gradient"
    assert why(weight="half") == "weight is float16, logits are float32"
    assert why(weight="too long") == "weight is 6, classes are 5"

    def inside(x: Tensor) -> Tensor:
        expected.append(disagreement(x, TARGETS["labels"](), None, *CALL_OPTIONS[0])[1])
        return x.sum()

    expected: list[str | None] = []
    torch.func.grad(inside)(torch.randn(6, 5))
    torch.jit.trace(inside, torch.randn(6, 5), check_trace=False)
    with Mode():
        inside(torch.randn(6, 5))
    with FakeTensorMode(allow_non_fake_inputs=True):
        disagreement(LOGITS["plain"](), TARGETS["labels"](), None, *CALL_OPTIONS[0])
    assert expected == [
        "under torch.func (grad, vmap, jvp ...)",
        "under torch.jit.trace",
        f"under {__name__}.Mode",
    ]
    monkeypatch.setattr(backends, "ALWAYS", False)
    assert why() == "too small to gain: 6 x 5"


@pytest.mark.stock
@pytest.mark.filterwarnings("ignore:.*(Sparse|sparse|complex).*")
@pytest.mark.parametrize("option", ["plain", "momentum"])
@pytest.mark.parametrize("kind", UNSERVED)
def test_a_reason_if_and_only_if_torch_steps(
    kind: str,
    option: str,
    stock_params: list[Tensor],  # noqa: F811
) -> None:
    odd, grads = UNSERVED[kind]()
    params = [leaf(values(33, seed=3)), odd, leaf(values(35, torch.float64, seed=4))]
    optimizer = fastopt.SGD(params, **OPTIONS[option])
    for number, grad in enumerate(grads):
        set_grads(params[::2], seed=number)
        odd.grad = grad
        assert reasons.of_step(optimizer) is None
        why = {
            id(p): reasons.of_param(optimizer.param_groups[0], p, p.grad, buffer_of(optimizer, p))
            for p in params
            if p.grad is not None
        }
        stock_params.clear()
        try:
            optimizer.step()
        except Exception:  # torch refuses it, with its own words
            assert why[id(odd)]
            return
        reached = {id(p) for p in stock_params}
        assert reached == {p for p, reason in why.items() if reason}, why


def buffer_of(optimizer: torch.optim.SGD, param: Tensor) -> Tensor | None:
    return optimizer.state.get(param, {}).get("momentum_buffer")


def test_reasons_of_whole_steps() -> None:
    param = leaf(values(9))
    optimizer = fastopt.SGD([param], lr=torch.tensor(0.1, requires_grad=True))
    options = optimizer.param_groups[0]
    assert reasons.of_param(options, param, param, None) == "options are more than numbers: lr"
    with forward_ad.dual_level():
        assert "forward-mode" in str(reasons.of_step(optimizer))
    optimizer.defaults["differentiable"] = True
    assert reasons.of_step(optimizer) == "differentiable=True"


# --- recording -----------------------------------------------------------------------------------

PLACES = [(loss, "_cross_entropy"), (loss, "_by_torch"), (loss, "_STOCK_IS_KNOWN")]
PLACES += [(optim, "update"), (step, "torch_update"), (patching, "_is_unsure")]


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = [getattr(*place) for place in PLACES]
    yield
    assert [getattr(*place) for place in PLACES] == before


def train() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(7, 11)
    shared = torch.nn.Parameter(torch.randn(4, 6).t()[::2])
    optimizer = torch.optim.SGD([*net.parameters(), shared], lr=0.1, momentum=0.9)
    for _ in range(3):
        x, t = torch.randn(40, 7), torch.randint(11, (40,))
        optimizer.zero_grad()
        F.cross_entropy(net(x), t).backward()
        shared.grad = torch.ones_like(shared)
        optimizer.step()
    F.cross_entropy(net(x), t.byte())


def rows(report: fastopt.reports.Report) -> list[tuple[str, str, str | None, int]]:
    found = report.as_dict()["rows"]
    assert all(row["seconds"] > 0 for row in found)
    return [(row["op"], row["what"], row["reason"], row["count"]) for row in found]


def test_a_report_counts_places_and_answers(tmp_path: Path) -> None:
    with fastopt.patched(quiet=True), fastopt.reporting() as report:
        train()
        with fastopt.reporting() as inner:
            F.cross_entropy(torch.randn(1, 3), torch.zeros(1, dtype=torch.int64))
    assert sorted(rows(report), key=str) == [
        ("cross_entropy", "1 x 3 float32", None, 1),
        ("cross_entropy", "40 x 11 float32", "target is uint8: use target.long()", 1),
        ("cross_entropy", "40 x 11 float32", None, 3),
        ("sgd", "3 x 4 float32", "parameter is not dense: shape 3 x 4, strides (2, 6)", 3),
        ("sgd", "SGD, 2 tensors", None, 3),
    ]
    assert rows(inner) == [("cross_entropy", "1 x 3 float32", None, 1)]
    assert fastopt.report() is inner
    for row in report.as_dict()["rows"]:
        assert Path(row["where"]).name.startswith("test_report.py:")
    text = str(report)
    assert "torch      1" in text and "use target.long()" in text
    for name in ("a.html", "a.json", "a.txt"):
        report.save(tmp_path / name)
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == report.as_dict()["rows"]
    page = (tmp_path / "a.html").read_text()
    assert page.count("<rect") == 5 and "http" not in page and "<script" not in page
    assert (tmp_path / "a.txt").read_text().startswith("fastopt ")


@pytest.mark.stock
def test_what_only_a_gpu_knows_of_torchs_optimizer_is_torchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(lr: float | Tensor) -> list[Tensor]:
        params = [leaf(values(9, seed=1))]
        optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9, foreach=False)
        for seed in range(3):
            set_grads(params, seed=seed)
            optimizer.step()
        return params

    expected = train(0.1)
    with fastopt.patched(quiet=True), fastopt.reporting() as report:
        monkeypatch.setattr(patching.launch, "family", lambda: "triton")
        results = train(torch.tensor(0.1))
        assert [row["count"] for row in report.as_dict()["rows"]] == [3]
        assert "use fastopt.SGD" in report.as_dict()["rows"][0]["reason"]
        assert all(map(torch.equal, results, expected))
        assert all(map(torch.equal, train(0.1), expected))
    assert [row["served_by"] for row in report.as_dict()["rows"]].count("fastopt") == 1


def test_reports_are_transparent_to_compilers() -> None:
    x, t = torch.randn(30, 11), torch.randint(11, (30,))
    expected = F.cross_entropy(x, t)
    with fastopt.reporting() as report:
        compiled = torch.compile(fastopt.cross_entropy, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, t), expected)
        scripted = torch.jit.script(fastopt.CrossEntropyLoss())
        torch.testing.assert_close(scripted(x, t), expected)
        assert not rows(report)
        fastopt.cross_entropy(x, t)
    fastopt.cross_entropy(x, t)
    assert len(rows(report)) == 1
    report.stop()  # once more


def test_many_shapes_become_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "_MOST_ROWS", 3)
    with fastopt.reporting() as report:
        for rows_ in range(1, 9):
            fastopt.cross_entropy(torch.randn(rows_, 3), torch.zeros(rows_, dtype=torch.int64))
    assert sorted(row["count"] for row in report.as_dict()["rows"]) == [1, 1, 1, 5]


def test_each_reason_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reports, "_said", set())
    caplog.set_level(logging.INFO, "fastopt")
    with fastopt.reporting():
        for _ in range(3):
            fastopt.cross_entropy(torch.randn(4, 3), torch.zeros(4, dtype=torch.uint8))
        fastopt.cross_entropy(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    assert len(caplog.messages) == 1
    assert "target is uint8: use target.long()" in caplog.messages[0]


def test_comparing_disturbs_nothing() -> None:
    def outcome(compare: int) -> tuple[list[Tensor], list[str], fastopt.reports.Report]:
        called: list[str] = []
        hook = register_optimizer_step_pre_hook(lambda *_: called.append("step"))
        torch.manual_seed(1)
        x = torch.randn(40, 11, requires_grad=True)
        x.register_hook(lambda grad: called.append("gradient"))
        optimizer = fastopt.SGD([x], lr=0.1, momentum=0.9, weight_decay=0.1)
        with fastopt.reporting(compare) as report:
            for _ in range(3):
                optimizer.zero_grad()
                fastopt.cross_entropy(x, torch.randint(11, (40,))).backward()
                optimizer.step()
        hook.remove()
        state = optimizer.state[x]["momentum_buffer"]
        return [x.detach(), x.grad, state, torch.get_rng_state()], called, report

    plain, compared = outcome(0), outcome(2)
    assert all(map(torch.equal, plain[0], compared[0])) and plain[1] == compared[1]
    assert rows(plain[2]) and len(rows(plain[2])) == len(rows(compared[2]))
    notes = compared[2].as_dict()["compared"]
    assert [note["op"] for note in notes] == ["cross_entropy", "sgd"] * 2
    for note in notes:
        assert note["difference"] < 1e-5 and note["fastopt"] > 0 and note["torch"] > 0
    assert "compared on the script's own tensors" in str(compared[2])


def test_a_difference_is_seen() -> None:
    from fastopt.comparing import _difference

    nan, inf = float("nan"), float("inf")
    assert _difference(torch.tensor([1.0, nan, inf]), torch.tensor([1.0, nan, inf])) == 0
    assert _difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == 0.25
    assert _difference(torch.tensor([nan, 3.0]), torch.tensor([1.0, 4.0])) > 1e300
    assert _difference(torch.empty(0), torch.empty(0)) == 0


SCRIPT = """\
import os, sys, torch
x = torch.randn(3000, 30, requires_grad=True)
torch.nn.CrossEntropyLoss()(x, torch.zeros(3000, dtype=torch.int64)).backward()
torch.nn.CrossEntropyLoss()(x, torch.zeros(3000, dtype=torch.uint8))
os.chdir("/")
if os.fork() == 0:
    sys.exit(0)
os.wait()
raise ValueError("at the end")
"""


def test_run_writes_the_report_of_a_script_that_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    options = ["--quiet", "--report=out.json", "--compare"]
    done = run(
        *(sys.executable, "-m", "fastopt", "run", *options, "script.py"), FASTOPT_VERBOSE="1"
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[0].endswith("target is uint8: use target.long()")
    assert lines[-2:] == [
        "ValueError: at the end",
        f"fastopt: the report is in {tmp_path}/out.json",
    ]
    found = json.loads((tmp_path / "out.json").read_text())
    assert sorted((row["where"][-11:], row["served_by"]) for row in found["rows"]) == [
        ("script.py:3", "fastopt"),
        ("script.py:4", "torch"),
    ]
    assert found["compared"][0]["difference"] < 1e-5


def test_a_report_that_cannot_be_written_is_said_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise AssertionError('it ran')")
    with pytest.raises(SystemExit) as ended:
        running.main([f"--report={tmp_path}/missing/out.html", str(script)])
    assert ended.value.code == 2
    assert "the report cannot be written: [Errno 2]" in capsys.readouterr().err


def test_a_comparison_saves_nothing_under_the_hooks_of_a_script() -> None:
    """A checkpoint counts what is saved in forward and in its own repetition of it."""
    x = torch.randn(33, 10, requires_grad=True)
    target = torch.arange(33) % 10
    with fastopt.reporting(compare=1) as report:
        loss = checkpoint(lambda y: fastopt.cross_entropy(y * 2, target), x, use_reentrant=False)
        loss.backward()
    assert x.grad is not None
    assert [note["op"] for note in report.as_dict()["compared"]] == ["cross_entropy"]
