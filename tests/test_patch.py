"""fastopt.patch: every reference to torch's own loss and SGD is served, nothing else changes, and
unpatch leaves nothing behind."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as imported_before

import fastopt
import served
from accuracy import assert_same_bits
from child import run_python

REGISTRY = {"ce": F.cross_entropy, "module": nn.CrossEntropyLoss, "list": [F.cross_entropy]}
Loss = Callable[..., Tensor]


class OwnLoss(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


class OwnSGD(torch.optim.SGD):
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(closure)


def default_argument(x: Tensor, t: Tensor, loss: Loss = F.cross_entropy) -> Tensor:
    return loss(x, t)


def closure() -> Loss:
    loss = F.cross_entropy
    return lambda x, t: loss(x, t)


EARLIER: dict[str, Loss] = {
    "name": lambda x, t: F.cross_entropy(x, t),
    "imported name": imported_before,
    "registry": lambda x, t: REGISTRY["ce"](x, t),
    "list": lambda x, t: REGISTRY["list"][0](x, t),
    "class in a registry": lambda x, t: REGISTRY["module"]()(x, t),
    "default argument": default_argument,
    "closure": closure(),
    "partial": functools.partial(F.cross_entropy, label_smoothing=0.0),
    "instance": nn.CrossEntropyLoss(),
    "subclass": OwnLoss(),
    "in a network": nn.ModuleDict({"loss": nn.CrossEntropyLoss()})["loss"],
}


@pytest.fixture(autouse=True)
def _unpatched_at_the_end() -> Iterator[None]:
    yield
    fastopt.unpatch()
    assert "torch/nn/functional.py" in F.cross_entropy.__code__.co_filename


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(30, 11, requires_grad=True), torch.randint(11, (30,))


def is_ours(loss: Loss) -> bool:
    """Whether it is; with the values that torch has, whoever computes them."""
    x, t = inputs()
    factor = 2 if isinstance(loss, OwnLoss) else 1
    expected = factor * fastopt.loss._stock(x, t)
    result = loss(x, t)
    torch.testing.assert_close(result, expected)
    names, node = [], result.grad_fn
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    return any("_Loss" in name for name in names)


@pytest.mark.parametrize("which", EARLIER)
def test_whoever_held_the_loss_before_is_served(which: str) -> None:
    loss = EARLIER[which]
    assert not is_ours(loss)
    with fastopt.patched("loss", quiet=True):
        assert is_ours(loss)
    assert not is_ours(loss)


def test_names_imported_while_patched_are_torchs_afterwards() -> None:
    with fastopt.patched(quiet=True):
        from torch.nn import CrossEntropyLoss
        from torch.nn.functional import cross_entropy
        from torch.optim import SGD

        made = CrossEntropyLoss()
        assert is_ours(cross_entropy) and is_ours(made)
    assert not is_ours(cross_entropy) and not is_ours(made)
    assert cross_entropy is imported_before
    assert (CrossEntropyLoss, SGD) == (nn.CrossEntropyLoss, torch.optim.SGD)


def looks() -> list[object]:
    """All that people look at."""
    seen: list[object] = []
    for thing in (F.cross_entropy, torch.optim.SGD.step, torch.optim.SGD, nn.CrossEntropyLoss):
        seen += [thing, thing.__module__, thing.__qualname__, thing.__doc__]
        seen += [str(inspect.signature(thing)), pickle.dumps(thing)]
    seen += [sorted(vars(torch.optim.SGD)), sorted(vars(nn.CrossEntropyLoss))]
    return seen


def test_identity_is_torchs() -> None:
    torch.optim.SGD([torch.zeros(1)])  # which wraps its class's step
    before = looks()
    with fastopt.patched(quiet=True):
        assert looks() == before
        assert isinstance(EARLIER["instance"], nn.CrossEntropyLoss)
        assert isinstance(fastopt.CrossEntropyLoss(), nn.CrossEntropyLoss)
        assert type(nn.CrossEntropyLoss()) is nn.CrossEntropyLoss
        assert torch.overrides.resolve_name(F.cross_entropy) == "torch.nn.functional.cross_entropy"
    assert looks() == before


def make_optimizer(kind: type[torch.optim.SGD] = torch.optim.SGD) -> torch.optim.SGD:
    generator = torch.Generator().manual_seed(7)
    params = [torch.randn(n, generator=generator, requires_grad=True) for n in (3, 17, 64)]
    return kind(params, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True, foreach=False)


def steps(optimizer: torch.optim.SGD, count: int = 2) -> list[Tensor]:
    """Steps, and what they left: parameters and momentum buffers."""
    params = optimizer.param_groups[0]["params"]
    for _ in range(count):
        for param in params:
            param.grad = param.detach().cos()
        optimizer.step()
    return [t for p in params for t in (p.detach(), optimizer.state[p]["momentum_buffer"])]


@pytest.mark.parametrize("kind", [torch.optim.SGD, OwnSGD])
@pytest.mark.parametrize("made", ["before", "inside"])
def test_sgd_is_served_bit_by_bit(kind: type[torch.optim.SGD], made: str) -> None:
    expected = steps(make_optimizer(kind), 6)
    optimizer = make_optimizer(kind) if made == "before" else None
    with fastopt.patched("sgd", quiet=True):
        optimizer = optimizer or make_optimizer(kind)
        steps(optimizer)
        with served.sgd.answered():  # all but the first step, which makes buffers
            steps(optimizer)
        assert type(optimizer) is kind
    counts = served.sgd.counts()
    for result, value in zip(steps(optimizer), expected, strict=True):  # torch's from here on
        assert_same_bits(result, value, "after six steps")
    assert served.sgd.counts() == counts


def test_schedulers_hooks_and_closures_go_on() -> None:
    called: list[str] = []

    def train(optimizer: torch.optim.SGD, halfway: Callable[[], None]) -> list[Tensor]:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
        optimizer.register_step_post_hook(lambda *_: called.append("post"))
        param = optimizer.param_groups[0]["params"][0]
        for i in range(4):
            if i == 2:
                halfway()
            result = steps(optimizer, 1)
            assert optimizer.step(lambda: param.sum()).grad_fn is not None
            scheduler.step()
        return result

    expected = train(make_optimizer(), lambda: None)
    before, called[:] = list(called), []
    # The scheduler has wrapped the step before it is patched.
    results = train(make_optimizer(), lambda: fastopt.patch("sgd", quiet=True))
    for result, value in zip(results, expected, strict=True):
        assert_same_bits(result, value, "a scheduler's training")
    assert called == before and served.sgd.ours


@pytest.mark.parametrize("inside", [True, False])
def test_pickles_and_copies_work_both_ways(inside: bool) -> None:
    """Written while patched and read afterwards, or the other way round."""
    optimizer, loss = make_optimizer(), OwnLoss(weight=torch.ones(11))
    if inside:
        fastopt.patch(quiet=True)
    steps(optimizer)
    written = pickle.dumps((optimizer, loss))
    copied = copy.deepcopy((optimizer, loss))
    saved = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "loss": loss.state_dict()}, saved)
    fastopt.unpatch() if inside else fastopt.patch(quiet=True)
    assert b"fastopt" not in written
    for other_optimizer, other_loss in (pickle.loads(written), copied):
        assert type(other_optimizer) is torch.optim.SGD and type(other_loss) is OwnLoss
        assert is_ours(other_loss) is not inside
        later = make_optimizer()
        saved.seek(0)
        later.load_state_dict(torch.load(saved, weights_only=True)["optimizer"])
        later.param_groups[0]["params"] = later_params = other_optimizer.param_groups[0]["params"]
        assert len(later_params) == 3
        for result, value in zip(
            steps(other_optimizer), steps(copy.deepcopy(optimizer)), strict=True
        ):
            assert_same_bits(result, value, "after a pickle")


def test_patching_twice_is_patching_once() -> None:
    fastopt.patch("loss", quiet=True)
    fastopt.patch("loss", "sgd", quiet=True)
    with fastopt.patched(quiet=True):
        fastopt.unpatch("sgd")
        assert is_ours(F.cross_entropy)
    assert is_ours(F.cross_entropy)  # as before the with statement
    fastopt.unpatch()
    assert not is_ours(F.cross_entropy)
    fastopt.unpatch()
    with pytest.raises(ValueError, match="must be one of loss, sgd, got 'adam'"):
        fastopt.patch("adam")


def test_with_statements_of_threads_overlap() -> None:
    start, wrong = threading.Barrier(4), []

    def go() -> None:
        x, t = torch.randn(3, 5), torch.randint(5, (3,))
        expected = F.cross_entropy(x, t)
        start.wait()
        for _ in range(300):
            with fastopt.patched(quiet=True):
                if "patching.py" not in F.cross_entropy.__code__.co_filename:
                    wrong.append("unpatched by another thread")
                torch.testing.assert_close(F.cross_entropy(x, t), expected)

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not is_ours(F.cross_entropy)


class Watching(Tensor):
    seen: ClassVar[list[object]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.stock
def test_subclasses_and_modes_see_torchs_function() -> None:
    x, t = inputs()
    with fastopt.patched(quiet=True):
        F.cross_entropy(x.detach().as_subclass(Watching), t)
        assert Watching.seen[0] is imported_before
        traced = torch.fx.symbolic_trace(lambda x, t: F.cross_entropy(x, t))
    assert imported_before in [node.target for node in traced.graph.nodes]
    torch.testing.assert_close(traced(x, t), F.cross_entropy(x, t))


def scripted(x: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(x, t, label_smoothing=0.1)


@pytest.mark.stock
def test_torchscript_is_torchs() -> None:
    x, t = inputs()
    expected = scripted(x, t)
    with fastopt.patched(quiet=True):
        for function in (torch.jit.script(scripted), torch.jit.trace(scripted, (x, t))):
            torch.testing.assert_close(function(x, t), expected)
        module = torch.jit.script(nn.CrossEntropyLoss(label_smoothing=0.1))
        torch.testing.assert_close(module(x, t), expected)
    torch.testing.assert_close(torch.jit.script(scripted)(x, t), expected)
    torch.testing.assert_close(module(x, t), expected)


def test_compiled_code_follows() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Loss:
        graphs.append(graph.code)
        return graph.forward

    def function(x: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(x, t)

    torch._dynamo.reset()
    module = nn.CrossEntropyLoss()
    losses = [torch.compile(f, backend=backend, dynamic=False) for f in (function, module)]
    x, t = inputs()
    for inside in (False, True, False):
        fastopt.patch(quiet=True) if inside else fastopt.unpatch()
        for loss in losses:
            graphs.clear()
            torch.testing.assert_close(loss(x, t), fastopt.loss._stock(x, t))
            ours = inside and fastopt.loss._COMPILES_GRADIENTS
            who = "torch.ops.fastopt" if ours else "torch.nn.functional"
            # Back at torch's, the first graph is still there.
            assert f"{who}.cross_entropy" in graphs[0] if graphs else not ours
    optimizer = make_optimizer()
    with fastopt.patched(quiet=True):
        step = torch.compile(optimizer.step, backend="eager")
        for param in optimizer.param_groups[0]["params"]:
            param.grad = param.detach().cos()
        step()
    for result, value in zip(steps(optimizer, 1), steps(make_optimizer(), 2), strict=True):
        torch.testing.assert_close(result, value)


def test_what_is_somebody_elses_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def own(input: Tensor, target: Tensor) -> Tensor:
        return input.sum() * 0

    monkeypatch.setattr(F, "cross_entropy", own)
    fastopt.patch()
    said = capsys.readouterr().err
    assert f"left alone: torch.nn.functional.cross_entropy (it is {__name__}'s)" in said
    assert "serves torch.optim.sgd.SGD.step" in said and said.count("\n") == 1
    assert F.cross_entropy is own
    fastopt.unpatch()
    monkeypatch.undo()


def test_one_line_says_what_was_patched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "a.trainer", ModuleType("a.trainer"))
    vars(sys.modules["a.trainer"])["xent"] = F.cross_entropy
    fastopt.patch("loss")
    said = capsys.readouterr().err
    assert said.startswith("fastopt: serves torch.nn.functional.cross_entropy, torch.nn.CrossEnt")
    assert "a.trainer" in said and "TorchScript" in said and said.count("\n") == 1
    fastopt.patch("loss")
    fastopt.unpatch("loss")
    monkeypatch.setenv("FASTOPT_QUIET", "1")
    fastopt.patch("loss")
    assert capsys.readouterr().err == ""


def test_a_plain_import_imports_none_of_it() -> None:
    run_python(
        """
        import sys, torch
        code = torch.nn.functional.cross_entropy.__code__
        import fastopt
        assert "fastopt.patching" not in sys.modules
        assert torch.nn.functional.cross_entropy.__code__ is code
        assert not hasattr(fastopt, "nothing") and fastopt.patched
        """
    )
