"""linear_logprobs, selective_log_softmax, entropy_from_logits: values and gradients against log_softmax
of whole logits in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastopt
import fastopt.linear_loss
import fastopt.loss
import served
from accuracy import assert_as_accurate, assert_same_bits
from cross_entropy_cases import DTYPES, dtype_name
from fastopt import statistics
from linear_cross_entropy_cases import small_chunks  # noqa: F401

pytestmark = [pytest.mark.usefixtures("small_chunks"), pytest.mark.library]
SHAPE, HIDDEN, CLASSES = (3, 9), 5, 70


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "PIECE", 3 * CLASSES)


def make_tokens(
    dtype: torch.dtype = torch.float64, ignored: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (B, T, H), a head (C, H) with its bias, tokens (B, T) of which some are -100."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*SHAPE, HIDDEN, generator=generator)
    head = torch.randn(CLASSES, HIDDEN, generator=generator)
    bias = torch.randn(CLASSES, generator=generator)
    tokens = torch.randint(CLASSES, SHAPE, generator=generator)
    hidden[0] += 3 * head[tokens[0]]  # sure of them
    tokens.masked_fill_(torch.rand(SHAPE, generator=generator) < ignored, -100)
    return hidden.to(dtype), head.to(dtype), bias.to(dtype), tokens


def materialised(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    **_: Any,
) -> fastopt.LogProbs:
    logits = F.linear(hidden, head, linear_bias)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    log_p = (logits / temperature).log_softmax(-1)
    live = tokens != -100
    chosen = log_p.gather(-1, torch.where(live, tokens, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return fastopt.LogProbs(torch.where(live, chosen, 0), torch.where(live, entropy, 0))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def weighted(found: fastopt.LogProbs, parts: str) -> Tensor:
    """A different upstream gradient for every token, of both or one of the results."""
    terms = []
    for i, (name, x) in enumerate(zip("le", found, strict=True)):
        factor = torch.linspace(-1, 2 + i, x.numel()).reshape(x.shape)
        terms += [(x * factor).sum()] if name in parts else []
    return torch.stack(terms).sum()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 3.0},
    "both": {"temperature": 1.7, "softcap": 3.0},
}


def check(options: dict[str, Any], parts: str, bias: bool = True) -> None:
    hidden, head, b, tokens = make_tokens()
    mine, theirs = (leaves(hidden, head, *([b] if bias else [])) for _ in range(2))
    found = []
    for of, f in ((mine, fastopt.linear_logprobs), (theirs, materialised)):
        keywords = {**options, "linear_bias": of[2] if bias else None, "entropy": True}
        result = f(of[0], of[1], tokens, **keywords)
        grads = torch.autograd.grad(weighted(result, parts), of, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in grads), of)
        plain = torch.autograd.grad(weighted(f(of[0], of[1], tokens, **keywords), parts), of)
        found.append([*result, *grads, *twice, *plain])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("parts", ["l", "e", "le"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values(name: str, parts: str) -> None:
    with served.linear_cross_entropy.answered():
        check(OPTIONS[name], parts, bias=name != "plain")


@pytest.mark.stock
@pytest.mark.parametrize("name", OPTIONS)
def test_calls_that_are_not_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastopt.loss, "_is_watched", lambda: True)
    check(OPTIONS[name], "le")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_dtype(dtype: torch.dtype) -> None:
    """Rounded once: hidden states and head are multiplied in float32."""
    hidden, head, bias, tokens = make_tokens(dtype)
    of = leaves(hidden, head, bias)
    keywords = {"temperature": 0.7, "entropy": True}
    found = fastopt.linear_logprobs(of[0], of[1], tokens, linear_bias=of[2], **keywords)
    exact = leaves(*(x.double() for x in (hidden, head, bias)))
    right = materialised(exact[0], exact[1], tokens, linear_bias=exact[2], **keywords)
    for one, other in zip(found, right, strict=True):
        assert one.dtype is statistics.accumulation_type(dtype)
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-5)
    grads = torch.autograd.grad(weighted(found, "le"), of)
    for grad, other in zip(grads, torch.autograd.grad(weighted(right, "le"), exact), strict=True):
        eps = max(torch.finfo(dtype).eps, 1e-6)
        assert grad.dtype is dtype
        scale = other.abs().max().item()
        torch.testing.assert_close(grad.double(), other, rtol=eps, atol=16 * eps * scale)


def policy_loss(found: fastopt.LogProbs, old: Tensor, advantages: Tensor, tokens: Tensor) -> Tensor:
    """The example of linear_logprobs' docstring."""
    ratio = (found.logprobs - old).exp()
    clipped = ratio.clamp(1 - 0.2, 1 + 0.2)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    counts = tokens != -100
    return -((gain + 0.01 * found.entropy) * counts).sum() / counts.sum()


def test_a_clipped_policy_loss() -> None:
    """PPO's, and GRPO's with its advantages, against the one of whole logits."""
    hidden, head, bias, tokens = make_tokens()
    rewards = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    advantages = ((rewards - rewards.mean()) / rewards.std()).unsqueeze(1)
    before = materialised(hidden, head + 0.1 * head.sin(), tokens, linear_bias=bias).logprobs
    results = []
    for f in (fastopt.linear_logprobs, materialised):
        of = leaves(hidden, head, bias)
        keywords = {"linear_bias": of[2], "temperature": 0.7, "entropy": True}
        old = before + 0.1 * before.cos()  # some ratios are clipped
        loss = policy_loss(f(of[0], of[1], tokens, **keywords), old, advantages, tokens)
        results.append([loss, *torch.autograd.grad(loss, of)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_ignored_tokens_are_absent() -> None:
    hidden, head, _, tokens = make_tokens()
    hidden[tokens == -100] = math.nan
    of = leaves(hidden, head)
    found = fastopt.linear_logprobs(of[0], of[1], tokens, entropy=True, softcap=3.0)
    assert all(not x[tokens == -100].any() for x in found)
    grads = torch.autograd.grad(weighted(found, "le"), of)
    assert not grads[0][tokens == -100].any() and all(g.isfinite().all() for g in grads)
    found = fastopt.linear_logprobs(of[0], of[1], tokens.fill_(-100), entropy=True)
    assert not any(g.any() for g in torch.autograd.grad(weighted(found, "le"), of))


@pytest.mark.stock
@pytest.mark.parametrize("composes", [False, True])
def test_ignored_tokens_may_be_nan(composes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastopt.linear_loss, "_composes", lambda *call: composes)
    hidden, head = torch.randn(8, 16), torch.randn(10, 16, requires_grad=True)
    hidden[0] = math.nan
    hidden.requires_grad_()
    tokens = torch.randint(10, (8,))
    tokens[0] = -100
    found = fastopt.linear_logprobs(hidden, head, tokens, entropy=True)
    assert found.entropy is not None and found.logprobs[0] == found.entropy[0] == 0
    (found.logprobs + found.entropy).sum().backward()
    for grad in (hidden.grad, head.grad):
        assert grad is not None and grad.isfinite().all()


def test_limits_of_the_entropy() -> None:
    hidden, head = torch.zeros(4, HIDDEN), torch.randn(CLASSES, HIDDEN)
    tokens = torch.arange(4)
    found = fastopt.linear_logprobs(hidden, head, tokens, entropy=True)
    torch.testing.assert_close(found.entropy, torch.full((4,), math.log(CLASSES)))
    sure = 1e4 * F.normalize(head[:4])
    found = fastopt.linear_logprobs(sure, F.normalize(head), tokens, entropy=True)
    assert not found.entropy.any() and not found.logprobs.any()


def test_without_entropy_and_without_gradients() -> None:
    hidden, head, _, tokens = make_tokens(torch.float32)
    found = fastopt.linear_logprobs(*leaves(hidden, head), tokens)
    assert found.entropy is None and found.logprobs.requires_grad
    with torch.no_grad():
        alone = fastopt.linear_logprobs(*leaves(hidden, head), tokens, entropy=True)
    assert_same_bits(alone.logprobs, found.logprobs.detach())
    assert not alone.entropy.requires_grad
    for frozen in (0, 1):  # the other is not computed
        of = leaves(hidden, head)
        of[frozen].requires_grad_(False)
        found = fastopt.linear_logprobs(of[0], of[1], tokens, entropy=True)
        both = leaves(hidden, head)
        whole = fastopt.linear_logprobs(both[0], both[1], tokens, entropy=True)
        grad = torch.autograd.grad(weighted(found, "le"), of[1 - frozen])[0]
        assert_same_bits(grad, torch.autograd.grad(weighted(whole, "le"), both[1 - frozen])[0])
    one = fastopt.linear_logprobs(hidden[0, 0], head, tokens[0, 0])
    torch.testing.assert_close(one.logprobs, alone.logprobs[0, 0])


def test_compiled() -> None:
    hidden, head, bias, tokens = make_tokens(torch.float32)
    compiled = torch.compile(fastopt.linear_logprobs, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, fastopt.linear_logprobs):
        of = leaves(hidden, head, bias)
        found = f(of[0], of[1], tokens, linear_bias=of[2], temperature=0.7, entropy=True)
        results.append([*found, *torch.autograd.grad(weighted(found, "le"), of)])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)
    logits, index = F.linear(hidden, head), tokens.clamp(min=0)
    for f, arguments in (
        (fastopt.selective_log_softmax, (logits, index)),
        (fastopt.entropy_from_logits, (logits,)),
    ):
        again = torch.compile(f, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(again(*arguments), f(*arguments))


# -- of logits --------------------------------------------------------------------------------------


def of_logits(dtype: torch.dtype) -> list[tuple[Callable[..., Tensor], Callable[..., Tensor]]]:
    """Each function of logits, and what it is."""
    generator = torch.Generator().manual_seed(1)
    one = torch.randint(CLASSES, SHAPE, generator=generator)
    several = torch.randint(CLASSES, (*SHAPE, 4), generator=generator)

    def entropy(x: Tensor) -> Tensor:
        log_p = x.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    return [
        (
            lambda x: fastopt.selective_log_softmax(x, one),
            lambda x: x.log_softmax(-1).gather(-1, one.unsqueeze(-1)).squeeze(-1),
        ),
        (
            lambda x: fastopt.selective_log_softmax(x, several),
            lambda x: x.log_softmax(-1).gather(-1, several),
        ),
        (fastopt.entropy_from_logits, entropy),
        (lambda x: fastopt.entropy_from_logits(x, chunk_size=2), entropy),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_functions_of_logits(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(*SHAPE, CLASSES)).to(dtype)
    for ours, right in of_logits(dtype):
        results = []
        for f, to in ((ours, dtype), (right, torch.promote_types(dtype, torch.float32)), (right, torch.float64)):  # fmt: skip
            x = logits.to(to).requires_grad_()
            value = f(x)
            results.append((value, *torch.autograd.grad((value * value.detach()).sum(), x)))
        (value, grad), stock, exact = results
        assert_as_accurate(value, stock[0].to(dtype), exact[0], "value", CLASSES)
        near = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), exact[1], rtol=near, atol=near)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=dtype_name)
def test_the_gradient_of_several_classes_is_rounded_once(dtype: torch.dtype) -> None:
    """That of the largest class, too, where the sum of all others is taken from it."""
    logits = (0.1 * torch.randn(16, 2000)).to(dtype)
    index = torch.randint(2000, (16, 3))
    index[:8, 1] = logits[:8].argmax(1)
    index[4:8, 2] = index[4:8, 1]  # twice the same
    grads = []
    for f, to in (
        (lambda x: fastopt.selective_log_softmax(x, index), dtype),
        (lambda x: x.log_softmax(-1).gather(-1, index), torch.float64),
    ):
        x = logits.to(to, copy=True).requires_grad_()
        f(x).sum().backward()
        grads.append(x.grad)
    once = 0.6 * torch.finfo(dtype).eps
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=once, atol=1e-7)


@pytest.mark.stock
def test_functions_of_logits_are_differentiable_in_every_way() -> None:
    logits = torch.randn(*SHAPE, CLASSES, dtype=torch.float64)
    for ours, right in of_logits(torch.float64):
        results = []
        for f in (ours, right):
            x = logits.clone().requires_grad_()
            grad = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0]
            tangent = torch.func.jvp(f, (logits,), (logits.cos(),))[1]
            of_func = torch.func.grad(lambda x, f=f: f(x).square().sum())(logits)
            results.append([*torch.autograd.grad(grad.square().sum(), x), tangent, of_func])
            results[-1].append(torch.autograd.functional.jacobian(f, logits, vectorize=True))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    batched = torch.func.vmap(fastopt.entropy_from_logits)(logits)
    torch.testing.assert_close(batched, fastopt.entropy_from_logits(logits))


def test_odd_shapes_and_infinities() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    entropy = fastopt.entropy_from_logits(logits)
    torch.testing.assert_close(entropy, torch.tensor([math.log(2)]))
    assert torch.autograd.grad(entropy.sum(), logits)[0].isfinite().all()
    assert fastopt.entropy_from_logits(torch.empty(0, 4)).shape == (0,)
    assert fastopt.entropy_from_logits(torch.zeros(4)).shape == ()
    one = fastopt.selective_log_softmax(torch.zeros(4), torch.tensor(1))
    torch.testing.assert_close(one, torch.tensor(-math.log(4)))
    assert fastopt.selective_log_softmax(torch.ones(2, 0), torch.ones(2, 0).long()).shape == (2, 0)
    assert fastopt.selective_log_softmax(torch.ones(0, 3), torch.ones(0, 2).long()).shape == (0, 2)
    # The chosen class far below the others.
    far = torch.tensor([[0.0, -300.0, 1e-3]])
    found = fastopt.selective_log_softmax(far, torch.tensor([[2, 1, 0]]))
    torch.testing.assert_close(found, far.double().log_softmax(1).gather(1, torch.tensor([[2, 1, 0]])).float())  # fmt: skip


HIDDEN_STATES, HEAD, _, TOKENS = make_tokens(torch.float32)
WRONG: list[tuple[dict[str, Any], type[Exception]]] = [
    *(({name: 0.0}, ValueError) for name in ("temperature", "softcap")),
    *(({name: math.nan}, ValueError) for name in ("temperature", "softcap")),
    *(({name: "1"}, TypeError) for name in ("temperature", "softcap")),
    ({"entropy": 1}, TypeError),
    ({"target": TOKENS.int()}, TypeError),
    ({"target": TOKENS[1:]}, ValueError),
    ({"target": TOKENS.unsqueeze(-1)}, ValueError),
    ({"target": torch.full(SHAPE, CLASSES)}, IndexError),
    ({"linear_weight": HEAD[:, 1:]}, RuntimeError),
    ({"linear_bias": torch.ones(3)}, RuntimeError),
]


@pytest.mark.stock
@pytest.mark.parametrize(("keywords", "error"), WRONG, ids=lambda x: str(x)[:40])
def test_errors(keywords: dict[str, Any], error: type[Exception]) -> None:
    call = {"input": HIDDEN_STATES, "linear_weight": HEAD, "target": TOKENS, **keywords}
    with pytest.raises(error):
        fastopt.linear_logprobs(**call)


@pytest.mark.stock
def test_errors_of_functions_of_logits() -> None:
    logits, index = torch.zeros(2, 3), torch.tensor([0, 1])
    for wrong, error in (
        (index.int(), TypeError),
        (index[1:], ValueError),
        (torch.tensor([0, 3]), IndexError),
        (torch.tensor([0, -100]), IndexError),
        (torch.tensor([[0], [3]]), RuntimeError),
    ):
        with pytest.raises(error):
            fastopt.selective_log_softmax(logits, wrong)
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="chunk_size"):
            fastopt.entropy_from_logits(logits, size)
    with pytest.raises(ValueError, match="dimension"):
        fastopt.entropy_from_logits(torch.tensor(1.0))
