"""What the softmax of each row says, in plain torch: log-sum-exp, entropy, the most probable class.

With p = softmax(x) and entropy H = -sum_c p_c log p_c:  dH/dx_c = -p_c (log p_c + H).
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Logits that are worked on at a time: what is held beside them are a few buffers of this size.
PIECE = 1 << 20


class Statistics(NamedTuple):
    lse: Tensor  # of each row, in the accumulation type
    entropy: Tensor  # likewise
    predicted: Tensor  # int64, the first where several are largest


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def of_rows(x: Tensor, dim: int) -> Statistics:
    """In terms that can be differentiated."""
    exact = x.to(accumulation_type(x.dtype))
    return Statistics(exact.logsumexp(dim), entropy(exact, dim), x.argmax(dim))


def entropy(x: Tensor, dim: int) -> Tensor:
    log_p = x.log_softmax(dim)
    p = log_p.exp()
    return -(p * torch.where(p > 0, log_p, 0)).sum(dim)  # no 0 * -inf


def in_pieces(x: Tensor, dim: int) -> Statistics:
    """of_rows without a gradient, for some entries of the first dimension at a time, and of the last
    where it has positions."""
    x = x.detach()
    if x.dim() == 1 or torch.compiler.is_compiling() or x.numel() <= PIECE:
        return of_rows(x, dim)
    found = []
    for part in x.split(entries_at_a_time(x)):
        size = part.shape[-1]
        if x.dim() > 2:
            size = max(PIECE * size // max(part.numel(), 1), 1)
        found.append(_joined([of_rows(piece, dim) for piece in part.split(size, -1)], -1))
    return _joined(found, 0)


def _joined(parts: list[Statistics], dim: int) -> Statistics:
    if len(parts) == 1:
        return parts[0]
    return Statistics(*(torch.cat(each, dim) for each in zip(*parts, strict=True)))


def entries_at_a_time(x: Tensor) -> int:
    return max(PIECE // max(x.shape[1:].numel(), 1), 1)


def entropy_gradient(
    x: Tensor,  # (N, C)
    lse: Tensor,  # (N)
    entropy: Tensor,  # (N)
    grad_entropy: Tensor,  # (N)
) -> Tensor:
    """Of x, in the accumulation type."""
    log_p = x.to(lse.dtype) - lse.unsqueeze(1)
    p = log_p.exp()
    log_p.add_(entropy.unsqueeze(1)).mul_(grad_entropy.to(lse.dtype).neg().unsqueeze(1))
    return torch.where(p > 0, p.mul_(log_p), 0)
