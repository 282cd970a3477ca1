"""Log-probabilities and entropies of tokens, for evaluation and reinforcement learning.

linear_logprobs has them from hidden states and the head of a language model, without logits:
the rows of linear_rows.py, computed again in backward. The other two take logits. Where our kernels
are not for a call, plain torch computes it, and differentiates it in every way.
"""

from typing import NamedTuple

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
        logits = F.linear(rows, linear_weight, linear_bias)
        logits = logits.to(statistics.accumulation_type(logits.dtype))
        if entropy or cap:
            logits = torch.where((labels == ignore_index).unsqueeze(1), 0, logits)
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
    exact = statistics.accumulation_type(logits.dtype)
    rows = logits.reshape(-1, logits.shape[-1])
    several = index.dim() == logits.dim()
    # Of several, any class may be the one whose loss the kernels have; the largest adds no rounding.
    label = rows.detach().argmax(1) if several else index.reshape(-1)
    found = -loss.cross_entropy(
        rows, label, ignore_index=_NO_INDEX, reduction="none", loss_dtype=exact
    )
    if several:
        chosen = rows.gather(1, index.reshape(len(rows), index.shape[-1])).to(exact)
        found = found.unsqueeze(1) + (chosen - rows.gather(1, label.unsqueeze(1)).to(exact))
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
    rows = logits.reshape(-1, logits.shape[-1])
    if torch.compiler.is_compiling() or not loss._is_plain(rows) or loss._is_watched():
        exact = rows.to(statistics.accumulation_type(rows.dtype))
        found = statistics.entropy(exact, 1).to(rows.dtype)
    else:
        found = _Entropy.apply(rows, chunk_size or statistics.entries_at_a_time(rows))
    return found.reshape(logits.shape[:-1])


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, size):
        found = [statistics.of_rows(part, 1) for part in rows.split(size)]
        lse, entropy, _ = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(rows, lse, entropy)
        ctx.size = size
        return entropy.to(rows.dtype)

    @staticmethod
    def backward(ctx, grad_entropy):
        rows, *others = ctx.saved_tensors
        if torch.is_grad_enabled():
            exact = rows.to(others[0].dtype)
            again = statistics.entropy(exact, 1).to(rows.dtype)
            return torch.autograd.grad(again, rows, grad_entropy, create_graph=True)[0], None
        grad = torch.empty_like(rows)
        parts = (x.split(ctx.size) for x in (grad, rows, *others, grad_entropy))
        for out, *row_call in zip(*parts, strict=True):
            out.copy_(statistics.entropy_gradient(*row_call))
        return grad, None
