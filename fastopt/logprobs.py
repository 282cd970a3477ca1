"""Log-probabilities and entropies of tokens, for evaluation and reinforcement learning.

linear_logprobs has them from hidden states and the head of a language model, without logits:
the rows of linear_rows.py, computed again in backward. The other two take logits. Where our kernels
are not for a call, plain torch computes it, and differentiates it in every way.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastopt import extras, linear_loss, linear_rows, loss, statistics
from fastopt.options import NONE, Options

__all__ = ["LogProbs", "entropy_from_logits", "linear_logprobs", "selective_log_softmax"]

_NO_INDEX = -(2**63)  # an ignore_index that no class has


class LogProbs(NamedTuple):
    """Shaped like the target; float32, or float64 of float64; 0 where it is ignored."""

    logprobs: Tensor
    entropy: Tensor | None


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
) -> LogProbs:
    """Log-probabilities of tokens, and the entropy where they stand, from hidden states and a head.

    Those of softmax(x / temperature) with x = linear(input, linear_weight, linear_bias), after
    softcap tanh(x / softcap) where there is a softcap. Both may be differentiated, by input,
    linear_weight and linear_bias. On CPUs logits are made for some rows at a time, and again in
    backward: memory beyond inputs and results is that of a chunk. Logits are whole where they are few
    (under 1,024 rows or 8 million logits), on GPUs, for second derivatives, and in calls that
    linear_cross_entropy would leave to torch.

    Args:
        input: shape (..., H): float32, float64, bfloat16, float16.
        linear_weight: shape (C, H).
        target: tokens, int64, shape (...).
        linear_bias: shape (C). Default: none.
        ignore_index: the target of positions that are not computed: result and gradient are 0.
        temperature: > 0.
        softcap: > 0. Default: none.
        entropy: compute the entropy of the softmax, too.

    Returns:
        LogProbs(logprobs, entropy), shaped like target, in float32 (float64 of float64 logits);
        entropy is None unless asked for.

    Raises:
        ValueError: temperature or softcap is not positive and finite; shapes do not fit.
        TypeError: temperature, softcap or entropy of another type; target is not int64.
        IndexError: a token outside [0, C) that is not ignore_index. On a GPU see cross_entropy.
        Exception: whatever torch.nn.functional.linear raises for the same arguments.

    A clipped policy loss (PPO, GRPO) with an entropy bonus, of hidden states (B, T, H), completion
    tokens (B, T), -100 where there are none, and log-probabilities from when they were sampled::

        new = fastopt.linear_logprobs(hidden, head.weight, tokens, temperature=0.7, entropy=True)
        ratio = (new.logprobs - old_logprobs).exp()
        clipped = ratio.clamp(1 - 0.2, 1 + 0.2)
        gain = torch.minimum(ratio * advantages, clipped * advantages)
        counts = tokens != -100
        loss = -((gain + 0.01 * new.entropy) * counts).sum() / counts.sum()
        loss.backward()
    """
    temperature = extras.positive("temperature", temperature)
    cap = 0.0 if softcap is None else extras.positive("softcap", softcap) / temperature
    extras.boolean("entropy", entropy)
    if target.dtype is not torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if input.shape[:-1] != target.shape or input.dim() == 0:
        raise ValueError(
            f"target must have the shape of input without its last dimension, got"
            f" {tuple(target.shape)} for input {tuple(input.shape)}"
        )
    rows, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    tensors = (rows, linear_weight, labels, linear_bias, None)
    # Of the crossovers that of "mean": memory is what this is for.
    composes = linear_loss._composes(*tensors, "mean", ignore_index)
    if not composes and linear_loss._serves(*tensors, "none", ignore_index, 0.0, None):
        dtype = linear_loss._logits_dtype(rows, linear_weight, linear_bias)
        assert dtype is not None  # as _serves knows
        exact = statistics.accumulation_type(dtype)
        options = Options(ignore_index, 0.0, NONE, exact)
        plan = linear_rows.Plan(dtype, exact, 0, 1 / temperature, cap, entropy)
        parameters = (rows, linear_weight, linear_bias)
        losses, found = linear_rows.linear_rows(*parameters, labels, None, None, options, plan)
        entropies = found.entropy
    else:
        rows = torch.where((labels == ignore_index).unsqueeze(1), 0, rows)  # they may be NaN
        logits = F.linear(rows, linear_weight, linear_bias)
        logits = logits.to(statistics.accumulation_type(logits.dtype))
        scale = extras.Extras(cap or None, 1 / temperature, None, None, None, False)
        logits = extras.scaled(logits, scale)
        losses = loss.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")
        entropies = losses
        if entropy:
            entropies = torch.where(labels == ignore_index, 0, entropy_from_logits(logits))
    logprobs = torch.where(labels == ignore_index, 0, -losses).reshape(target.shape)
    return LogProbs(logprobs, entropies.reshape(target.shape) if entropy else None)


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """log_softmax(logits, -1) at some classes, without the others.

    Args:
        logits: shape (..., C): float32, float64, bfloat16, float16.
        index: classes, int64, shape (...), or (..., K) for K of them each.

    Returns:
        Log-probabilities, shaped like index, in the logits' dtype; half precision computes in float32
        and rounds once.

    Raises:
        ValueError: the shapes do not fit.
        TypeError: index is not int64.
        IndexError, RuntimeError: a class outside [0, C), of index (...), (..., K). On a GPU see
            cross_entropy and torch.gather.
    """
    if index.dtype is not torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if logits.dim() == 0 or logits.shape[:-1] not in (index.shape, index.shape[:-1]):
        raise ValueError(
            f"index must have shape {tuple(logits.shape[:-1])}, or one dimension more, got"
            f" {tuple(index.shape)}"
        )
    rows = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])
    if index.dim() == logits.dim():
        found = _Chosen.of(rows, index.reshape(len(rows), index.shape[-1]))
    else:
        found = -loss.cross_entropy(
            *(rows, index.reshape(-1)),
            ignore_index=_NO_INDEX,
            reduction="none",
            loss_dtype=statistics.accumulation_type(logits.dtype),
        )
    return found.to(logits.dtype).reshape(index.shape)


def entropy_from_logits(logits: Tensor, chunk_size: int | None = None) -> Tensor:
    """The entropy of softmax(logits, -1), for some rows at a time.

    Args:
        logits: shape (..., C): float32, float64, bfloat16, float16. Kept for backward.
        chunk_size: how many rows at a time. Default: our own rule.

    Returns:
        Entropies, shape (...), in the logits' dtype; half precision computes in float32 and rounds
        once. Can be differentiated in every way; beside the gradient backward holds a few rows.

    Raises:
        ValueError: logits have no dimension; chunk_size is not a positive number.
    """
    if logits.dim() == 0:
        raise ValueError("logits must have a dimension of classes")
    if chunk_size is not None and not (type(chunk_size) is int and chunk_size > 0):
        raise ValueError(f"chunk_size must be a positive int, got {chunk_size!r}")
    rows = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])
    found = _Entropy.of(rows, chunk_size or statistics.entries_at_a_time(rows))
    return found.to(logits.dtype).reshape(logits.shape[:-1])


class _OfRows(torch.autograd.Function):
    """Something of each row, in the accumulation type, some rows at a time; where its gradient is to be
    more than numbers, that of the same in plain torch."""

    @classmethod
    def of(cls, rows: Tensor, other: Any) -> Tensor:
        if torch.compiler.is_compiling() or not loss._is_plain(rows) or loss._is_watched():
            return cls.plain(rows, other)
        result: Tensor = cls.apply(rows, other)
        return result

    @staticmethod
    def plain(rows: Tensor, other: Any) -> Tensor:
        raise NotImplementedError

    @classmethod
    def again(cls, rows: Tensor, other: Any, upstream: Tensor) -> Tensor | None:
        """The gradient, where it is differentiated again or one of many; else None."""
        differentiates = torch.is_grad_enabled()
        if not differentiates and loss._is_plain(upstream):
            return None
        with torch.enable_grad():
            result = cls.plain(rows, other)
            return torch.autograd.grad(result, rows, upstream, create_graph=differentiates)[0]


class _Entropy(_OfRows):
    @staticmethod
    def plain(rows, size):
        return statistics.entropy(rows.to(statistics.accumulation_type(rows.dtype)), 1)

    @staticmethod
    def forward(ctx, rows, size):
        found = [statistics.of_rows(part, 1) for part in rows.split(size)]
        lse, entropy, _ = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(rows, lse, entropy)
        ctx.size = size
        return entropy

    @staticmethod
    def backward(ctx, upstream):
        rows, *others = ctx.saved_tensors
        grad = _Entropy.again(rows, ctx.size, upstream)
        if grad is None:
            grad = torch.empty_like(rows)
            parts = (x.split(ctx.size) for x in (grad, rows, *others, upstream))
            for out, *row_call in zip(*parts, strict=True):
                out.copy_(statistics.entropy_gradient(*row_call))
        return grad, None


class _Chosen(_OfRows):
    """log_softmax at several classes of each row, (N, K)."""

    @staticmethod
    def plain(rows, index):
        exact = rows.to(statistics.accumulation_type(rows.dtype))
        return exact.log_softmax(1).gather(1, index)

    @staticmethod
    def forward(ctx, rows, index):
        size, exact = statistics.entries_at_a_time(rows), statistics.accumulation_type(rows.dtype)
        if rows.shape[1] == 0:
            ctx.mark_non_differentiable(empty := rows.new_empty(index.shape, dtype=exact))
            return empty
        base = rows.amax(1, keepdim=True).to(exact)
        parts = zip(rows.split(size), base.split(size), strict=True)
        # Beside the maximum, not as one number: large logits would round it away.
        log_sum = torch.cat([(x - b).exp_().sum(1, keepdim=True).log_() for x, b in parts])
        ctx.save_for_backward(rows, index, base, log_sum)
        return (rows.gather(1, index) - base) - log_sum

    @staticmethod
    def backward(ctx, upstream):
        rows, *others = ctx.saved_tensors
        grad = _Chosen.again(rows, others[0], upstream)
        if grad is None:
            grad = torch.empty_like(rows)
            size = statistics.entries_at_a_time(rows)
            parts = (x.split(size) for x in (grad, rows, *others, upstream))
            for out, x, index, base, log_sum, up in zip(*parts, strict=True):
                own = (x - base).sub_(log_sum).exp_().mul_(-up.sum(1, keepdim=True))
                out.copy_(own.scatter_add_(1, index, up))
        return grad, None
