"""The loss where ranks share its classes or its rows: over a process group, and of DTensors.

    cross_entropy    logits whose classes are spread over a group, as a column-parallel head leaves them
    of_dtensor       fastopt.cross_entropy of a DTensor
    linear_cross_entropy  the head as well, its logits never whole
    count            what a mean over the rows of all ranks divides by

Each rank sweeps its own classes and keeps four numbers of a row, RowStats of csrc/rules/softmax.h.
One all-gather takes them to all ranks, which merge the same numbers in the same order: to the same
bits. Backward asks nobody. loss_parallel of torch takes three all-reduces.

In plain torch, some rows at a time: beyond the logits there is no more memory than their gradient.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fastopt import layouts, linear_loss, loss, reference, statistics
from fastopt.options import MEAN, NONE, REDUCTIONS, SUM, Options

__all__ = ["count", "cross_entropy", "linear_cross_entropy"]

# From torch 2.13 on by another name. None where torch was built without distributed.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)
_CHUNK = 1 << 18  # logits at a time: 1 MB in float32, which stays in cache between the passes


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: Any = None,
    num_classes: int | None = None,
    class_start: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
) -> Tensor:
    """fastopt.cross_entropy of logits whose classes are spread over the ranks of a group.

    Args:
        logits: of this rank's classes, which follow one another: shape (C'), (N, C') or
            (N, C', d1, ...), C' perhaps 0; float32, float64, bfloat16 or float16. Kept for backward:
            not to be changed in place before.
        target: the same on every rank: class indices among all classes, int64, shape (), (N) or
            (N, d1, ...); or probabilities of this rank's classes, shaped like logits.
        weight: shape (C'), a factor for each class of this rank. Default: none
        group: a ProcessGroup, or a DeviceMesh of one dimension. Default: all ranks
        num_classes: of all ranks together. Default: C' times the size of the group, where every rank
            has as many
        class_start: the first of this rank's classes. Default: where DTensor splits,
            rank * ceil(num_classes / size)
        ignore_index, reduction, label_smoothing, lse_square_scale: as of fastopt.cross_entropy.

    Returns:
        The loss of all classes, to the same bits on every rank; 0-dim, or shaped like the class
        indices for reduction "none"; in the dtype in which fastopt.cross_entropy has it. Backward gives
        each rank the gradient of its own logits, for the upstream gradient that is there, without any
        communication. It cannot be differentiated again.

    Raises:
        IndexError: on every rank, a class index outside [0, num_classes) that is not ignore_index on
            any of them. On a GPU, where finding out would mean waiting for it, the loss and that row's
            gradient are NaN.
        TypeError: dtypes that are not served; tensors of other types.
        ValueError: shapes or options that do not go together.
    """
    logits, target = _waited(logits), _waited(target)
    _check(logits, target, weight, ignore_index, reduction, label_smoothing)
    own = logits.shape[layouts.class_dim(logits.shape)]
    classes = _classes(own, group, num_classes, class_start)
    dtype = loss._served_dtype(logits, target)
    options = Options(
        ignore_index, float(label_smoothing), REDUCTIONS[reduction], dtype, float(lse_square_scale)
    )
    result: Tensor = _ShardedLoss.apply(logits, target, weight, options, classes, ())
    return result


def count(target: Tensor, ignore_index: int = -100, *, group: Any = None) -> Tensor:
    """How many labels of all ranks of a group count: what the mean over a batch that is shared out by
    rows (data, context or sequence parallel) divides by.

        loss = fastopt.cross_entropy(logits, target, reduction="sum") / count(target)

    Args:
        target: class indices of this rank's rows, of any shape, of which there may be none.
        ignore_index: the class index that does not count.
        group: a ProcessGroup, or a DeviceMesh of one dimension. Default: all ranks

    Returns:
        0-dim, int64, on target's device, which nobody waits for. One all-reduce.
    """
    number = (_waited(target) != ignore_index).sum()
    dist.all_reduce(number, group=_group_of(group))
    return number


def _group_of(group: Any) -> Any:
    return group.get_group() if hasattr(group, "get_group") else group


def _classes(own: int, group: Any, num_classes: int | None, class_start: int | None) -> "_Classes":
    """Those of this rank, which are `own`."""
    group = _group_of(group)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError("this rank is not in the group")
    if num_classes is None:
        num_classes = own * size
    if class_start is None:
        class_start, _ = _split(num_classes, size, rank)
    # Whether they are all of them, and each once, _exchange finds out on all ranks: an error here alone
    # would leave the others waiting.
    return _Classes(group, size, class_start, num_classes)


def _split(num_classes: int, size: int, rank: int) -> tuple[int, int]:
    """DTensor's: the first class of a rank, and how many it has."""
    each = -(-num_classes // size)
    start = min(rank * each, num_classes)
    return start, min(each, num_classes - start)


def _check(
    logits: Any,
    target: Any,
    weight: Any,
    ignore_index: int,
    reduction: Any,
    label_smoothing: float,
) -> None:
    for name, x in (("logits", logits), ("target", target), ("weight", weight)):
        if x is not None and type(x) not in loss._TENSOR_TYPES:
            raise TypeError(f"{name} must be a Tensor of this rank's, got {type(x).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if logits.dtype not in loss._DTYPES or target.dtype not in (torch.int64, *loss._DTYPES):
        raise TypeError(f"logits are {logits.dtype}, target is {target.dtype}")
    if logits.dim() == 0:
        raise ValueError("logits have no dimension")
    rows = layouts.row_shape(logits.shape)
    shape = rows if target.dtype is torch.int64 else logits.shape
    if target.shape != shape:
        raise ValueError(f"target must be {tuple(shape)}, got {tuple(target.shape)}")
    if target.requires_grad:
        raise ValueError("probabilities must not need a gradient")
    if target.is_floating_point() and ignore_index >= 0:
        raise ValueError(f"probabilities have no class to ignore, got ignore_index={ignore_index}")
    if weight is not None:
        classes = logits.shape[layouts.class_dim(logits.shape)]
        if weight.shape != (classes,):
            raise ValueError(f"weight must be ({classes},), got {tuple(weight.shape)}")
        if weight.requires_grad:
            raise ValueError("weight must not need a gradient")


# --- the exchange ----------------------------------------------------------------------------------


class _Classes(NamedTuple):
    """Whose classes these are."""

    group: Any
    size: int  # of the group
    start: int  # the first of this rank's
    total: int  # of all ranks


class _Rows(NamedTuple):
    """What all ranks know of the rows, each shaped like them."""

    base: Tensor  # their maximum, 0 where that is -inf
    sum: Tensor  # sum_c exp(x_c - base)
    dot: Tensor  # sum_c q_c (x_c - base)
    mass: Tensor  # sum_c q_c
    live: Tensor  # bool
    divisor: Tensor  # 0-dim, float64: what the mean divides by


class _Masses:
    """q of this rank's classes, some rows at a time: own_c t_c + even_c (csrc/rules/target.h)."""

    def __init__(
        self,
        dtype: torch.dtype,
        classes: int,
        target: Tensor,
        weight: Tensor | None,
        options: Options,
        of: _Classes,
    ) -> None:
        self.exact = statistics.accumulation_type(dtype)
        self.labels = None if target.is_floating_point() else target
        self.probabilities = None if self.labels is not None else target
        self.weight = None if weight is None else weight.to(self.exact)
        self.keep, self.even = 1.0 - options.smoothing, options.smoothing / max(of.total, 1)
        self.smoothed, self.ignore_index = options.smoothed, options.ignore_index
        self.start, self.classes = of.start, classes
        self.w: Any = 1.0
        if self.weight is not None:
            positions = target.dim() - (1 if self.probabilities is None else 2)
            self.w = self.weight.view(-1, *[1] * positions)
        even = self.classes if self.weight is None else self.weight.sum(dtype=torch.float64)
        self.of_smoothing = even * self.even

    def of_rows(self, part: slice) -> "_Masses":
        masses = copy.copy(self)
        masses.labels = None if self.labels is None else self.labels[part]
        masses.probabilities = None if self.probabilities is None else self.probabilities[part]
        return masses

    def label(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row: whether its label is here; its place, or another class's; its own mass, or 0."""
        assert self.labels is not None
        place = self.labels[part] - self.start
        here = (place >= 0) & (place < self.classes) & (self.labels[part] != self.ignore_index)
        place = torch.where(here, place, 0)
        if self.weight is None:
            own = here.to(self.exact) * self.keep
        else:  # which may be infinite
            own = torch.where(here, self.keep * self.weight[place], 0)
        return here, place.unsqueeze(1), own

    def of_probabilities(self, part: slice) -> Tensor:
        assert self.probabilities is not None
        return self.w * (self.keep * self.probabilities[part].to(self.exact) + self.even)


def _step(logits: Tensor) -> int:
    return max(1, _CHUNK * logits.shape[0] // max(logits.numel(), 1))


def _chunks(logits: Tensor) -> list[slice]:
    rows, step = logits.shape[0], _step(logits)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _buffer(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """For a chunk: made anew for each, its pages would take longer than the arithmetic."""
    return torch.empty_like(logits[: _step(logits)], dtype=dtype)


def _sweep(logits: Tensor, masses: _Masses, stats: Tensor) -> None:
    """Fill in (max, sum, dot, mass) of every row over this rank's classes."""
    stats.zero_()[0].fill_(-math.inf)
    if masses.classes == 0:
        return
    buffer = _buffer(logits, masses.exact)
    for part in _chunks(logits):
        largest = logits[part].amax(1).to(masses.exact)
        x = buffer[: largest.shape[0]]
        base = largest.masked_fill(largest == -math.inf, 0).unsqueeze(1)
        torch.sub(logits[part], base, out=x)
        if masses.labels is None:
            q = masses.of_probabilities(part)
            dot, mass = (q * x).sum(1), q.sum(1)
        else:
            here, place, mass = masses.label(part)
            of_label = x.gather(1, place).squeeze(1)
            dot = torch.where(here & (of_label != 0), mass * of_label, 0)  # inf * 0 is no NaN
            if masses.smoothed:
                dot = dot + (masses.w * x).sum(1) * masses.even
                mass = mass + masses.of_smoothing
        stats[0, part], stats[2, part], stats[3, part] = largest, dot, mass
        stats[1, part] = x.exp_().sum(1)


def _exchange(
    sweep: Callable[[Tensor], None],  # fills in the statistics
    shape: torch.Size,  # of the rows
    like: Tensor,
    masses: _Masses,
    of: _Classes,
    batch_groups: tuple[Any, ...] = (),
) -> _Rows:
    rows = math.prod(shape)
    own = like.new_empty(4 * rows + 5, dtype=masses.exact)
    sweep(own[: 4 * rows].view(4, *shape))
    live = like.new_ones(shape, dtype=torch.bool)
    wrong = like.new_zeros(shape, dtype=torch.bool)
    own[4 * rows :] = 0
    if masses.labels is not None:
        live = masses.labels != masses.ignore_index
        wrong = live & ((masses.labels < 0) | (masses.labels >= of.total))
        place = masses.labels - masses.start
        here = live & (place >= 0) & (place < masses.classes)
        if masses.weight is None:
            own[4 * rows] = here.sum()
        elif masses.classes:
            weights = masses.weight[torch.where(here, place, 0)]
            own[4 * rows] = torch.where(here, weights, 0).sum(dtype=torch.float64)
        own[4 * rows + 1] = wrong.any()
    for at, number in enumerate((of.start, masses.classes, of.total), 4 * rows + 2):
        own[at] = number
    every = own.new_empty(of.size * own.numel())
    _all_gather(every, own, group=of.group)
    every = every.view(of.size, -1)
    whole = _make_up_all(*every[:, 4 * rows + 2 :].unbind(1))
    if like.is_cpu and not whole:
        raise ValueError(
            f"the ranks' classes are not each of num_classes once: {masses.classes} from {of.start} on,"
            f" of {of.total}, are here; class_start and num_classes say otherwise"
        )

    largest, sums, dots, mass = every[:, : 4 * rows].view(of.size, 4, *shape).unbind(1)
    bases = largest.masked_fill(largest == -math.inf, 0)
    largest = largest.amax(0)
    base = largest.masked_fill(largest == -math.inf, 0)
    shift = bases - base
    # Nothing summed up, no mass: 0 * inf must not become NaN.
    total = torch.where(sums == 0, 0, sums * shift.exp()).sum(0)
    total = torch.where(largest == -math.inf, math.nan, total)  # no softmax, as in torch
    dot = (dots + torch.where(mass == 0, 0, mass * shift)).sum(0)
    dot = torch.where(wrong, math.nan, dot)
    # The divisor, and labels out of range.
    of_all = every[:, 4 * rows : 4 * rows + 2].sum(0, dtype=torch.float64)
    if masses.labels is None:
        of_all[0] = rows
    for group in batch_groups:
        dist.all_reduce(of_all, group=group)
    if masses.labels is not None and like.is_cpu and of_all[1] != 0:
        raise _out_of_bounds(masses.labels, wrong)
    divisor = of_all[0]
    if masses.smoothed:  # weights that add up to 0 make label smoothing's part NaN
        divisor = torch.where(divisor == 0, math.nan, divisor)
    nonsense = wrong | ~whole
    return _Rows(base, total, dot, torch.where(nonsense, math.nan, mass.sum(0)), live, divisor)


def _make_up_all(starts: Tensor, sizes: Tensor, totals: Tensor) -> Tensor:
    """Whether the classes of the ranks, numbers in float32, are all of them, and each once."""
    before = torch.where(starts <= starts.unsqueeze(1), sizes, 0).sum(1) - sizes
    follow = (sizes == 0) | (starts == before)
    return follow.all() & (totals == totals[0]).all() & (sizes.sum() == totals[0])


def _out_of_bounds(labels: Tensor, wrong: Tensor) -> IndexError:
    if wrong.any():
        return IndexError(f"Target {labels[wrong][0].item()} is out of bounds.")
    return IndexError("Target is out of bounds on another rank.")


def _ended(rows: _Rows, options: Options) -> tuple[Tensor, Tensor]:
    """The loss, and what exp(x - base) is multiplied by in the gradient of each row."""
    log_sum = rows.sum.log()
    result, factor = rows.mass * log_sum - rows.dot, rows.mass
    if options.lse_square_scale != 0.0:
        lse = rows.base + log_sum
        result = result + options.lse_square_scale * lse * lse
        factor = factor + 2 * options.lse_square_scale * lse
    result = torch.where(rows.live, result, 0)
    if options.reduction != NONE:
        result = result.sum(dtype=torch.float64)
    if options.reduction == MEAN:
        result = result / rows.divisor
    return result.to(options.loss_dtype), factor / rows.sum


def _upstream(
    grad_loss: Tensor, masses: _Masses, options: Options, live: Tensor, divisor: Tensor
) -> Tensor:
    """What each row's gradient is multiplied by."""
    if options.reduction == MEAN:
        grad_loss = grad_loss.double() / divisor
    return grad_loss.to(masses.exact).expand(live.shape)


def _write_gradient(
    grad: Tensor,  # like x, or x
    x: Tensor,
    masses: _Masses,
    upstream: Tensor,
    base: Tensor,
    factor: Tensor,
    live: Tensor,
) -> None:
    exact = grad.dtype is masses.exact
    buffer = None if exact else _buffer(x, masses.exact)
    for part in _chunks(x) if masses.classes else ():
        up = upstream[part]
        g = grad[part] if buffer is None else buffer[: up.shape[0]]
        torch.sub(x[part], base[part].unsqueeze(1), out=g)
        g.exp_().mul_((up * factor[part]).unsqueeze(1))
        if masses.labels is None:
            g.sub_(up.unsqueeze(1) * masses.of_probabilities(part))
        else:
            if masses.smoothed:
                g.sub_((up * masses.even).unsqueeze(1) * masses.w)
            here, place, mass = masses.label(part)
            g.scatter_add_(1, place, torch.where(here, -up * mass, 0).unsqueeze(1))
        if not (x.is_cpu and live[part].all()):
            g.masked_fill_(~live[part].unsqueeze(1), 0)
        if buffer is not None:
            grad[part] = g


class _ShardedLoss(torch.autograd.Function):
    """Saves the logits and three numbers a row; backward reads the logits again, and asks nobody."""

    @staticmethod
    def forward(ctx, logits, target, weight, options, of, batch_groups):
        x, t = (logits, target) if logits.dim() > 1 else (logits[None], target[None])
        masses = _Masses(x.dtype, x.shape[1], t, weight, options, of)
        shape = layouts.row_shape(x.shape)
        rows = _exchange(lambda stats: _sweep(x, masses, stats), shape, x, masses, of, batch_groups)
        result, factor = _ended(rows, options)
        ctx.save_for_backward(logits, target, weight, rows.base, factor, rows.live, rows.divisor)
        ctx.options, ctx.of = options, of
        return result[0] if result.dim() > 0 and logits.dim() == 1 else result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        logits, target, weight, base, factor, live, divisor = ctx.saved_tensors
        x, t = (logits, target) if logits.dim() > 1 else (logits[None], target[None])
        masses = _Masses(x.dtype, x.shape[1], t, weight, ctx.options, ctx.of)
        upstream = _upstream(grad_loss, masses, ctx.options, live, divisor)
        grad = torch.empty_like(x)
        _write_gradient(grad, x, masses, upstream, base, factor, live)
        return grad if logits.dim() > 1 else grad[0], None, None, None, None, None


# --- a head whose classes are sharded --------------------------------------------------------------


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    group: Any = None,
    num_classes: int | None = None,
    class_start: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
) -> Tensor:
    """fastopt.linear_cross_entropy of a head whose classes are spread over the ranks of a group: the
    logits of some rows at a time, in forward and again in backward.

    Args:
        input: the same on every rank, shape (N, H); float32, float64, bfloat16 or float16.
        linear_weight, linear_bias: of this rank's classes, shapes (C', H) and (C').
        target: as of cross_entropy, with rows (N).
        weight, group, num_classes, class_start: as of cross_entropy.
        ignore_index, reduction, label_smoothing, lse_square_scale: as of cross_entropy.

    Returns:
        The loss of all classes, to the same bits on every rank. Backward gives linear_weight and
        linear_bias this rank's gradient; input the whole one, on every rank: summed over the ranks in
        float32, while the next rows are computed. It cannot be differentiated again.

    Raises:
        ValueError: input, linear_weight and linear_bias do not go together.
        Exception: whatever cross_entropy raises.
    """
    input, target = _waited(input), _waited(target)
    for name, x in (("input", input), ("linear_weight", linear_weight)):
        if type(x) not in loss._TENSOR_TYPES or x.dim() != 2:
            raise ValueError(f"{name} must be a Tensor of two dimensions")
    own = linear_weight.shape[0]
    if input.shape[1] != linear_weight.shape[1]:
        raise ValueError(
            f"input has {input.shape[1]} columns, linear_weight {linear_weight.shape[1]}"
        )
    if linear_bias is not None and linear_bias.shape != (own,):
        raise ValueError(f"linear_bias must be ({own},), got {tuple(linear_bias.shape)}")
    dtype = linear_loss._logits_dtype(input, linear_weight, linear_bias)
    if dtype is None:
        raise TypeError("input, linear_weight and linear_bias must be of one dtype")
    logits = input.new_empty((), dtype=dtype).expand(input.shape[0], own)  # their shape, no memory
    _check(logits, target, weight, ignore_index, reduction, label_smoothing)
    of = _classes(own, group, num_classes, class_start)
    of_loss = loss._served_dtype(logits, target)
    options = Options(
        *(ignore_index, float(label_smoothing), REDUCTIONS[reduction], of_loss),
        float(lse_square_scale),
    )
    result: Tensor = _ShardedLinearLoss.apply(
        *(input, linear_weight, linear_bias, target, weight, options, of, dtype)
    )
    return result


_LOGITS = 1 << 22  # at a time, on the rank with most classes


class _Head:
    """Logits of some rows, as autocast has them; without its casts, as it is off in backward."""

    def __init__(
        self, input: Any, weight: Any, bias: Any, of: _Classes, dtype: torch.dtype
    ) -> None:
        self.input, self.weight = input.to(dtype), weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        # As many on every rank, as each sums up their gradients with the others.
        rows = max(64, _LOGITS // max(-(-of.total // of.size), 1))
        self.parts = [slice(i, i + rows) for i in range(0, input.shape[0], rows)]

    def logits(self, part: slice) -> Tensor:
        return torch.nn.functional.linear(self.input[part], self.weight, self.bias)


class _ShardedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, weight, options, of, dtype):
        with torch.autocast(input.device.type, enabled=False):
            head = _Head(input, linear_weight, linear_bias, of, dtype)
            masses = _Masses(dtype, linear_weight.shape[0], target, weight, options, of)

            def sweep(stats: Tensor) -> None:
                for part in head.parts:
                    _sweep(head.logits(part), masses.of_rows(part), stats[:, part])

            rows = _exchange(sweep, input.shape[:1], input, masses, of)
            result, factor = _ended(rows, options)
        ctx.save_for_backward(
            *(input, linear_weight, linear_bias, target, weight),
            *(rows.base, factor, rows.live, rows.divisor),
        )
        ctx.options, ctx.of, ctx.dtype = options, of, dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        input, linear_weight, linear_bias, target, weight, *of_rows = ctx.saved_tensors
        base, factor, live, divisor = of_rows
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        head = _Head(input, linear_weight, linear_bias, ctx.of, ctx.dtype)
        masses = _Masses(*(ctx.dtype, linear_weight.shape[0], target, weight, ctx.options, ctx.of))
        upstream = _upstream(grad_loss, masses, ctx.options, live, divisor)
        of_input = input.new_zeros(input.shape if wants_input else 0, dtype=masses.exact)
        of_weight = input.new_zeros(linear_weight.shape, dtype=masses.exact)
        of_bias = input.new_zeros(linear_weight.shape[:1], dtype=masses.exact)
        sums = []
        for part in head.parts:
            grad = head.logits(part)
            told = (upstream[part], base[part], factor[part], live[part])
            _write_gradient(grad, grad, masses.of_rows(part), *told)
            if wants_input:
                of_input[part] = grad @ head.weight
                sums.append(dist.all_reduce(of_input[part], group=ctx.of.group, async_op=True))
            if wants_weight:
                # What is ignored is multiplied by nothing, and may be NaN.
                x = torch.where(live[part].unsqueeze(1), head.input[part], 0)
                of_weight += grad.t() @ x
            if wants_bias:
                of_bias += grad.sum(0, dtype=masses.exact)
        for each in sums:
            each.wait()
        return (
            of_input.to(input.dtype) if wants_input else None,
            of_weight.to(linear_weight.dtype) if wants_weight else None,
            of_bias.to(linear_bias.dtype) if wants_bias else None,
            *[None] * 5,
        )


# --- subclasses of tensors ---------------------------------------------------------------------------


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.trigger_wait().detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def _waited(x: Any) -> Any:
    """What an AsyncCollectiveTensor becomes when its collective is over; all else as it is."""
    if type(x).__name__ != "AsyncCollectiveTensor":
        return x
    return _Wait.apply(x) if x.requires_grad and torch.is_grad_enabled() else x.trigger_wait()


def of_subclass(
    logits: Any,
    target: Any,
    weight: Any,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
    lse_square_scale: float,
) -> Tensor | None:
    """fastopt.cross_entropy of logits that are a DTensor, or have yet to arrive. None: torch's."""
    if type(logits).__name__ == "AsyncCollectiveTensor":
        return loss.cross_entropy(
            *(_waited(logits), _waited(target), weight, None),
            *(ignore_index, None, reduction, label_smoothing),
            lse_square_scale=lse_square_scale,
        )
    from torch.distributed.tensor import DTensor

    if (
        type(logits) is not DTensor
        or torch.compiler.is_compiling()
        or loss._transforms_active()
        or forward_ad._current_level >= 0
        or loss._tracing_state() is not None
        or not loss._only_a_default_device(None)
        or type(reduction) is not str
        or reduction not in REDUCTIONS
        or type(ignore_index) is not int
        or type(label_smoothing) not in (float, int)
        or not label_smoothing <= 1.0
    ):
        return None
    call = _placed(logits, target, weight)
    if call is None or (call.target.is_floating_point() and ignore_index >= 0):
        return None
    options = Options(
        ignore_index,
        float(label_smoothing),
        REDUCTIONS[reduction],
        call.loss_dtype,
        lse_square_scale,
    )
    return call.loss(options)


class _Placed(NamedTuple):
    """A call whose tensors are placed as one of ours: local tensors, and where results belong."""

    logits: Any  # DTensor
    target: Tensor
    weight: Tensor | None  # of all classes
    class_dims: tuple[int, ...]  # of the mesh: none or one
    row_placements: tuple[Any, ...]
    loss_dtype: torch.dtype

    def loss(self, options: Options) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        mesh = self.logits.device_mesh
        local = _waited(self.logits.to_local())
        batch = [i for i, p in enumerate(self.row_placements) if p.is_shard()]
        groups = tuple(mesh.get_group(i) for i in batch)
        if self.class_dims:
            i, dim = self.class_dims[0], layouts.class_dim(self.logits.shape)
            classes, size = self.logits.shape[dim], mesh.size(i)
            start, own = _split(classes, size, mesh.get_local_rank(i))
            if local.shape[dim] != own:
                raise ValueError(f"{local.shape[dim]} classes are here, where DTensor has {own}")
            weight = None if self.weight is None else self.weight[start : start + own]
            of = _Classes(mesh.get_group(i), size, start, classes)
            result = _ShardedLoss.apply(local, self.target, weight, options, of, groups)
        else:
            result = _of_rows(local, self.target, self.weight, options, groups)
        placements = self.row_placements
        if options.reduction != NONE:
            placements = tuple(Partial() if p.is_shard() else p for p in placements)
        shape = layouts.row_shape(self.logits.shape) if options.reduction == NONE else ()
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            result, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
        )


def _of_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    batch_groups: tuple[Any, ...],
) -> Tensor:
    """The loss of rows whose classes are all here; of a mean the share that these rows have in it."""
    divisor = None
    if options.reduction == MEAN and batch_groups:
        of_all = logits.new_zeros(2, dtype=torch.float64)
        if target.is_floating_point():
            of_all[0] = math.prod(layouts.row_shape(logits.shape))
        else:
            classes = logits.shape[layouts.class_dim(logits.shape)]
            live = target != options.ignore_index
            inside = live & (target >= 0) & (target < classes)
            weights = 1.0 if weight is None else weight[torch.where(inside, target, 0)]
            of_all[0] = torch.where(inside, weights, 0.0).sum(dtype=torch.float64)
            of_all[1] = (live & ~inside).any()
        for group in batch_groups:
            dist.all_reduce(of_all, group=group)
        if logits.is_cpu and of_all[1] != 0:
            raise IndexError("Target is out of bounds.")
        divisor = of_all[0]
        exact = statistics.accumulation_type(logits.dtype)
        options, dtype = options._replace(reduction=SUM, loss_dtype=exact), options.loss_dtype
    names = {value: name for name, value in REDUCTIONS.items()}
    question = (options.ignore_index, names[options.reduction], options.label_smoothing)
    if loss._serves(logits, target, weight, *question):
        result = loss._cross_entropy(logits, target, weight, tuple(options))
    else:
        if logits.is_cpu and not target.is_floating_point():
            reference.check_labels(logits, target, options.ignore_index)
            live = (target != options.ignore_index).unsqueeze(layouts.class_dim(logits.shape))
            logits = torch.where(live, logits, 0)  # what is ignored may be NaN
        result = reference.cross_entropy(logits, target, weight, options)
    if divisor is None:
        return result
    if options.smoothed:
        divisor = torch.where(divisor == 0, math.nan, divisor)
    return (result / divisor).to(dtype)


def _placed(logits: Any, target: Any, weight: Any) -> _Placed | None:
    """None where torch has to say what it means. Nothing here may be otherwise on another rank."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, shape = logits.device_mesh, logits.shape
    if not shape or logits.dtype not in loss._DTYPES or mesh.get_coordinate() is None:
        return None
    dim = layouts.class_dim(shape)
    class_dims: list[int] = []
    rows: list[Any] = []
    for i, placement in enumerate(logits.placements):
        if type(placement) is Shard:
            place = placement.dim % len(shape)
            if place == dim:
                class_dims.append(i)
                rows.append(Replicate())
            else:
                rows.append(Shard(place - (place > dim)))
        elif placement.is_replicate():
            rows.append(placement)
        else:
            return None
    row_placements = tuple(rows)
    if len(class_dims) > 1:
        return None
    labels = target.dtype is torch.int64 if isinstance(target, Tensor) else False
    placements = row_placements if labels else logits.placements
    if type(target) is DTensor:
        if target.device_mesh != mesh or target.placements != placements:
            return None
    elif not isinstance(target, Tensor) or any(p.is_shard() for p in placements):
        return None
    if target.shape != (layouts.row_shape(shape) if labels else shape):
        return None
    if not labels and (target.dtype not in loss._DTYPES or target.requires_grad):
        return None
    if weight is not None:
        if type(weight) is DTensor and not all(p.is_replicate() for p in weight.placements):
            return None
        if weight.shape != (shape[dim],) or weight.requires_grad:
            return None
    local = [_waited(x.to_local() if type(x) is DTensor else x) for x in (target, weight)]
    if any(x is not None and type(x) not in loss._TENSOR_TYPES for x in local):
        return None
    dtype = loss._served_dtype(logits, target)
    if weight is not None and loss._loss_dtype(weight) != loss._loss_dtype(logits):
        return None
    return _Placed(logits, local[0], local[1], tuple(class_dims), row_placements, dtype)
