"""What the tests of the losses' extras share: the formula in torch's own functions, and the tables."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cross_entropy_cases import class_dim, make_probabilities, make_target, make_weight


def composed(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    denominator: Tensor | float | None = None,
    **_: Any,
) -> Tensor:
    """The definition: of scaled and capped logits, each row's loss and z-loss, weighted; their sum over
    the denominator, or over the mean's own."""
    x = logit_scale * logits
    if softcap is not None:
        x = softcap * (x / softcap).tanh()
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    rows = F.cross_entropy(x, target, weight, reduction="none", **options)
    z_loss = lse_square_scale * x.logsumexp(class_dim(x)).square()
    divisor: Tensor | float = rows.numel()
    if not target.is_floating_point():
        live = target != ignore_index
        z_loss = torch.where(live, z_loss, 0)
        w = x.new_ones(x.shape[class_dim(x)]) if weight is None else weight
        divisor = torch.where(live, w[torch.where(live, target, 0)], 0).sum()
    rows = rows + z_loss
    if token_weight is not None:
        rows = rows * token_weight.to(rows.dtype)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / (divisor if denominator is None else denominator)


def token_weights(shape: torch.Size) -> Tensor:
    """Of both signs, with zeros."""
    generator = torch.Generator().manual_seed(6)
    return torch.randint(-2, 9, shape, generator=generator) / 4


# What takes part in pairs; token_weight is made for the call's rows.
EXTRAS: dict[str, Any] = {
    "lse_square_scale": 0.03,
    "softcap": 2.5,
    "logit_scale": 0.4,
    "token_weight": token_weights,
    "denominator": 7,
    "loss_dtype": torch.float64,
    "return_stats": True,
}
PAIRS = [*combinations(EXTRAS, 2)]
ALL = tuple(EXTRAS)


def keywords_of(names: tuple[str, ...], rows: torch.Size) -> dict[str, Any]:
    found = {name: EXTRAS[name] for name in names if name in EXTRAS}
    if "token_weight" in found:
        found["token_weight"] = token_weights(rows)
    return found


def of_every_target(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Targets for logits of a shape, with other arguments: every term of the formula in both kinds."""
    like = torch.zeros(shape, dtype=dtype)
    labels = make_target(like)
    some = labels.clone()
    some.view(-1)[::3] = -100
    weight = make_weight(shape[class_dim(like)], dtype)
    masses = make_probabilities(like)
    return [
        (labels, {}),
        (some, {"weight": weight, "label_smoothing": 0.1}),
        (some, {"weight": weight}),
        (masses, {"weight": weight, "label_smoothing": 0.1}),
    ]


def result_of(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found
