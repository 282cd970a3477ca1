"""fastopt beside torch, on the tensors of the script that runs: the largest relative difference, and
the median time of each. The script's tensors, gradients, hooks and random numbers stay as they are:
what is computed, is computed on copies.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.sgd import sgd

from fastopt import loss, optim, reference
from fastopt.options import REDUCTIONS, Options
from fastopt.sgd.table import NAMES

_ROUNDS = 5
Result = Sequence[Tensor]


def of_loss(ours: Callable[..., Tensor], call: tuple[Any, ...]) -> dict[str, Any]:
    """A served call of the loss, with its gradient if it has one."""
    logits, target, weight, of_call = call
    options = Options(*of_call)
    wanted = torch.is_grad_enabled() and logits.requires_grad

    def run(function: Callable[..., Tensor], *arguments: Any) -> Result:
        x = logits.detach().requires_grad_(wanted)  # the same memory: neither writes to it
        result = function(x, *arguments)
        if not wanted:
            return [result]
        return [result.detach(), *torch.autograd.grad(result, x, torch.ones_like(result))]

    def stock(x: Tensor) -> Tensor:
        if options.lse_square_scale:  # torch has none
            return reference.cross_entropy(x, target, weight, options)
        reduction = next(name for name, n in REDUCTIONS.items() if n == options.reduction)
        ignore_index, label_smoothing = options[:2]
        result: Tensor = loss._stock(
            x, target, weight, None, ignore_index, None, reduction, label_smoothing
        )
        return result

    return _compared(logits.device, lambda: run(ours, *call[1:]), lambda: run(stock))


def of_step(update: Callable[..., None], optimizer: Any) -> dict[str, Any]:
    """A step that is about to be taken."""
    try:
        with torch.no_grad():
            ours, theirs = _copy(optimizer, optim.SGD), _copy(optimizer, torch.optim.SGD)
    except Exception as error:  # noqa: BLE001 (whatever it is, the script goes on)
        return {"failed": f"not compared: {error}"}

    def run(take: Callable[..., None], copy: Any) -> Result:
        with torch.no_grad():
            take(copy, None, None)
        return [p.detach() for group in copy.param_groups for p in group["params"]]

    first = optimizer.param_groups[0]["params"]
    device = first[0].device if first else torch.device("cpu")
    return _compared(device, lambda: run(update, ours), lambda: run(_take_torchs_step, theirs))


def _copy(optimizer: Any, kind: Callable[..., Any]) -> Any:
    groups, state = [], {}
    for group in optimizer.param_groups:
        params = []
        for param in group["params"]:
            copy = param.detach().clone().requires_grad_(param.requires_grad)
            copy.grad = None if param.grad is None else param.grad.detach().clone()
            buffer = optimizer.state.get(param, {}).get("momentum_buffer")
            if buffer is not None:
                state[copy] = {"momentum_buffer": buffer.detach().clone()}
            params.append(copy)
        groups.append({**{n: v for n, v in group.items() if n != "param_names"}, "params": params})
    made = kind(groups)
    made.state.update(state)
    return made


def _take_torchs_step(optimizer: Any, *_: None) -> None:
    """Without the hooks that the script may have set on every optimizer."""
    for group in optimizer.param_groups:
        params, grads, buffers = [], [], []
        for param in group["params"]:
            if param.grad is not None:
                params.append(param)
                grads.append(param.grad)
                buffers.append(optimizer.state[param].get("momentum_buffer"))
        options = {name: group[name] for name in NAMES}
        sparse = any(grad.is_sparse for grad in grads)
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=sparse,
            grad_scale=None,
            found_inf=None,
            **options,
        )
        for param, buffer in zip(params, buffers, strict=True):
            optimizer.state[param]["momentum_buffer"] = buffer


def _compared(
    device: torch.device, ours: Callable[[], Result], theirs: Callable[[], Result]
) -> dict[str, Any]:
    """The results of the first round, and the times of the others, in turns."""
    times: dict[str, list[float]] = {"fastopt": [], "torch": []}
    try:
        with saved_tensors_hooks(_as_it_is, _as_it_is):  # a checkpoint counts those of the script
            pairs = zip(ours(), theirs(), strict=True)
            difference = max((_difference(a, b) for a, b in pairs), default=0.0)
            for _ in range(_ROUNDS):
                for who, run in (("fastopt", ours), ("torch", theirs)):
                    _wait(device)
                    begin = time.perf_counter()
                    run()
                    _wait(device)
                    times[who].append(time.perf_counter() - begin)
    except Exception as error:  # noqa: BLE001 (as no memory for copies)
        return {"failed": f"not compared: {error}"}
    return {"difference": difference, **{who: statistics.median(t) for who, t in times.items()}}


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest |a - b|, relative to the largest finite |b|; infinite where one alone is not
    finite."""
    a, b = a.detach().double(), b.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    largest = b.abs().nan_to_num(0, 0, 0).amax().item() if b.numel() else 0.0
    apart = torch.where(same, 0.0, (a - b).abs().nan_to_num(torch.inf))
    most = apart.amax().item() if apart.numel() else 0.0
    return most / largest if most and largest else most
