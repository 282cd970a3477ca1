"""The faces of linear cross-entropy, whose logits never exist whole: what is served, and autograd.

    LinearCrossEntropyLoss.forward -> linear_cross_entropy
        small, or on a GPU              F.linear and our own cross_entropy
        not served                      stock, with the same arguments
        no gradient wanted              ops.linear_cross_entropy
        eager                           _LinearLoss, an autograd.Function around the op
        torch.compile                   the op in the graph; its autograd kernel is _LinearLoss
        with extras                     _with_extras, around linear_rows.py, whose op is the same loop

The op is the chunk loop of fastopt/kernels/linear_cross_entropy.py. What the questions mean is said in
loss.py, which asks the same ones.
"""

import math
from operator import eq
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from fastopt import extras, layouts, linear_rows, loss, ops, statistics
from fastopt.kernels import linear_cross_entropy as kernel
from fastopt.loss import _DTYPES, _HALF, _TENSOR_TYPES
from fastopt.options import NONE, REDUCTIONS, Options

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy"]

# The crossover: smaller calls are F.linear and cross_entropy. The loop costs some 30 calls more for
# each chunk, and holds as much as they do where there is but one.
#
# CPU time of F.linear and cross_entropy / the loop, mean, forward + backward, 1 thread, torch 2.13,
# Zen 3 with AVX2, a busy machine, in turns:
#   float32  512x64x10000 0.80   512x256x32000 0.93   2048x512x1000 0.92   2048x64x1000 1.01
#            1024x256x8192 1.02  1024x512x10000 1.03  2048x512x4096 1.09   1024x64x32000 1.17
#            2048x64x10000 1.36  1536x64x8192 1.42    8192x64x1024 1.44
#   half precision, for which this CPU has no instructions (bfloat16; float16 is the same)
#            32x64x100 0.74      128x64x100 1.41      32x64x1000 2.23      128x64x1000 4.93
_MIN_ROWS, _MIN_LOGITS = 2 * kernel.ROWS, 1 << 23
_MIN_HALF_PRODUCTS = 1 << 20  # N H C
# Reduction none with a gradient has a fourth GEMM, and takes the composition's time 1.1 to 1.4 times
# (2048x64x8192 0.90, 4096x64x4096 0.89, 2048x256x8192 0.71, 1024x512x16384 0.81): worth it for
# the memory alone, from logits of 256 MB in float32 on, of which the composition holds two.
_MIN_LOGITS_TO_RECOMPUTE = 1 << 26
_WHOLE = 1 << 62  # rows of a chunk


def _before_2_13(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: None = None,
) -> Tensor:
    """What torch.nn.functional.linear_cross_entropy is, of a torch that has none."""
    if options is not None:
        raise TypeError("options needs torch.nn.LinearCrossEntropyOptions, of torch 2.13")
    if not 1 <= input.dim() <= 2:
        raise RuntimeError(f"input must have 1 or 2 dimensions, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"linear_weight must have 2 dimensions or more, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "input and linear_weight must have the same last dimension, got"
            f" {input.shape[-1]} and {linear_weight.shape[-1]}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError("input must have 2 dimensions where linear_weight has more")
    shape = list(input.shape[:-1]) + list(linear_weight.shape[:-1])
    if linear_bias is not None:
        if list(linear_bias.shape) != list(linear_weight.shape[:-1]):
            raise RuntimeError(
                f"linear_bias must have shape {list(linear_weight.shape[:-1])}, got"
                f" {list(linear_bias.shape)}"
            )
        linear_bias = linear_bias.reshape(-1)
    if list(target.shape) == shape and ignore_index is not None:
        raise RuntimeError("ignore_index is for class indices, and target has probabilities")
    logits = F.linear(input, linear_weight.reshape(-1, input.shape[-1]), linear_bias)
    return F.cross_entropy(
        logits.reshape(shape),
        target,
        weight=weight,
        reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
    )


# As it was: F.linear_cross_entropy = fastopt.linear_cross_entropy must not recurse.
_stock = getattr(F, "linear_cross_entropy", _before_2_13)
_Options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)


class _LossBefore213(torch.nn.modules.loss._WeightedLoss):
    """torch.nn.LinearCrossEntropyLoss without forward, of a torch that has none."""

    ignore_index: int | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"weight must have shape {(num_classes,)}, got {weight.shape}")
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        super().__init__(weight, reduction=reduction)
        self.num_classes, self.out_features = num_classes, out_features
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.linear = torch.nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias, device, dtype
        )
        self.options = options

    def extra_repr(self) -> str:
        return (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes},"
            f" out_features={self.out_features}, bias={self.linear.bias is not None},"
            f" reduction={self.reduction}, ignore_index={self.ignore_index},"
            f" label_smoothing={self.label_smoothing}, options={self.options}"
        )


_Module: Any = getattr(torch.nn, "LinearCrossEntropyLoss", _LossBefore213)


class LinearCrossEntropyLoss(_Module):  # type: ignore[misc]
    """torch.nn.LinearCrossEntropyLoss (torch 2.13): a linear layer and the cross-entropy of what it
    gives, in chunks of rows, so that logits never exist whole.

    Arguments, shapes, results, parameters, state_dict and errors are torch's; see
    :func:`linear_cross_entropy` for shapes, dtypes and the few places where results are better.

    Args:
        in_features: H, the size of each row of the input.
        num_classes: C, the number of classes.
        out_features: (d1, ..., dK), of a loss in K dimensions. Default: ().
        bias: whether the layer adds a bias. Default: False.
        device: of the layer.
        dtype: of the layer.
        reduction: "none", "mean" or "sum".
        weight: shape (C), a factor for each class; a buffer. Default: none.
        ignore_index: a class index whose rows do not count. Default: None, which is -100 for class
            indices, and has to be None for probabilities.
        label_smoothing: in [0, 1].
        options: a torch.nn.LinearCrossEntropyOptions, or None.
        lse_square_scale, softcap, logit_scale, loss_dtype, return_stats: as in
            :func:`linear_cross_entropy`; forward takes token_weight and denominator.
    """

    # Of objects that were made, or pickled, as torch's.
    lse_square_scale = 0.0
    softcap = None
    logit_scale = 1.0
    loss_dtype = None
    return_stats = False

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        loss_dtype: torch.dtype | None = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            out_features=out_features,
            bias=bias,
            device=device,
            dtype=dtype,
            reduction=reduction,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        self.lse_square_scale = lse_square_scale
        self.softcap, self.logit_scale = softcap, logit_scale
        self.loss_dtype, self.return_stats = loss_dtype, return_stats

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        denominator: Tensor | float | None = None,
    ) -> Any:
        shape = [self.num_classes, *self.out_features]
        linear_weight, linear_bias = self.linear.weight, self.linear.bias
        if len(shape) > 1:
            linear_weight = linear_weight.reshape([*shape, self.linear.in_features])
            if linear_bias is not None:
                linear_bias = linear_bias.reshape(shape)
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            token_weight=token_weight,
            denominator=denominator,
            loss_dtype=self.loss_dtype,
            return_stats=self.return_stats,
        )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    denominator: Tensor | float | None = None,
    loss_dtype: torch.dtype | None = None,
    return_stats: bool = False,
) -> Any:
    """cross_entropy(linear(input, linear_weight, linear_bias), target, ...) without the logits.

    As torch.nn.functional.linear_cross_entropy (torch 2.13), on every torch that fastopt runs with.
    Logits are made for some rows at a time; mean and sum compute the gradients on the way, so that
    without a backward `torch.no_grad` saves two thirds of the work; none computes them in backward.

    Args:
        input: shape (N, H), or (H); float32, float64, bfloat16, float16. Of (B, T, H) pass
            `input.flatten(0, -2)`.
        linear_weight: shape (C, H), or (C, d1, ..., dK, H), which torch serves.
        target: class indices, int64, shape (N), () or (N, d1, ..., dK); or probabilities, floating
            point, shape (N, C), (C) or (N, C, d1, ..., dK).
        linear_bias: shape (C), or (C, d1, ..., dK). Default: none.
        weight: shape (C), a factor for each class. Default: none.
        reduction: "none", "mean" (weighted by the true classes' weights) or "sum".
        ignore_index: a class index whose rows count neither in the loss nor in the gradient, and are
            not computed. Default: None, which is -100 for class indices; has to be None for
            probabilities.
        label_smoothing: in [0, 1], the share of the target spread evenly over all classes.
        options: a torch.nn.LinearCrossEntropyOptions. batch_chunk_size and chunking_method say how
            many rows at a time ("auto" leaves it to us); acc_policy="compact" or a half precision
            acc_dtype sum the weight's gradient in the input's dtype instead of float32.
            allow_retain_graph is always granted. None leaves all to us.
        lse_square_scale, softcap, logit_scale, token_weight, denominator, loss_dtype, return_stats: not
            torch's, and as in :func:`cross_entropy`. logit_scale multiplies the bias, too. They are
            chunked like the rest; softcap and return_stats work on a few rows of the chunk at a time.

    Returns:
        The loss, 0-dim, or shaped like the class indices for reduction "none"; in the logits' dtype
        (promoted with probabilities; float32 under autocast, as stock has it), or loss_dtype. With
        return_stats (loss, fastopt.LossStats).

    Raises:
        ValueError, TypeError, RuntimeError: of the arguments that are not torch's, as in
            :func:`cross_entropy`.
        IndexError: a class index outside [0, C) that is not ignore_index; RuntimeError with options.
        Exception: whatever torch.nn.functional.linear_cross_entropy raises for the same arguments.

    Differences from stock, where chunks are the faster way, and with options always: memory beyond
    inputs and results is that of the chunk, whatever N is. The weight's gradient is summed in float32
    and rounded once. Half precision is multiplied in float32 where the CPU has no instructions for it.
    Rows that are ignored get gradient 0, and give none, even where they are NaN. With options:
    gradients may be differentiated again, label smoothing and probabilities are served, all rows
    ignored gives gradients 0, not NaN. Reduction none has a fourth matrix product in chunks, so that
    without options only logits that would be very large are served so.
    """
    if (
        softcap is not None
        or type(lse_square_scale) is not float
        or lse_square_scale != 0.0
        or type(logit_scale) is not float
        or logit_scale != 1.0
        or token_weight is not None
        or denominator is not None
        or loss_dtype is not None
        or return_stats is not False
    ):
        stocks = (input, linear_weight, target, linear_bias, weight, reduction, ignore_index)
        ours = (softcap, logit_scale, token_weight, denominator, loss_dtype, return_stats)
        return _with_extras(*stocks, label_smoothing, options, lse_square_scale, ours)
    if options is None and _composes(
        input, linear_weight, target, linear_bias, weight, reduction, ignore_index
    ):
        logits = F.linear(input, linear_weight, linear_bias)
        ignored = -100 if ignore_index is None else ignore_index
        return loss.cross_entropy(
            logits, target, weight, None, ignored, None, reduction, label_smoothing
        )
    tensors = (input, linear_weight, target, linear_bias, weight)
    if not _serves(*tensors, reduction, ignore_index, label_smoothing, options):
        return _stock(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
    ignore_index = -100 if ignore_index is None else ignore_index
    call = (*tensors, reduction, ignore_index, label_smoothing, options)
    if options is None or torch.compiler.is_compiling():
        return _linear_cross_entropy(*call)
    try:
        return _linear_cross_entropy(*call)
    except IndexError as error:  # stock's chunks gather labels by another function
        raise RuntimeError(str(error)) from None


def _with_extras(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
    label_smoothing: float,
    options: Any,
    lse_square_scale: Any,
    arguments: tuple[Any, ...],
) -> Any:
    """The loop where it serves the same call without extras, else F.linear and cross_entropy."""
    if isinstance(input, torch.fx.Proxy):
        keywords = dict(zip(extras.Extras._fields, arguments, strict=True))
        keywords.update(
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            lse_square_scale=lse_square_scale,
        )
        return extras.traced(linear_cross_entropy, (input, linear_weight, target), keywords)
    lse_square_scale = extras.real("lse_square_scale", lse_square_scale)
    e = extras.checked(reduction, *arguments)
    tensors = (input, linear_weight, target, linear_bias, weight)
    composes = options is None and _composes(*tensors, reduction, ignore_index)
    if not composes and not _serves(*tensors, reduction, ignore_index, label_smoothing, options):
        _stock(  # says what is wrong
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
        )
        if not target.is_floating_point():
            target = target.long()
        composes = True
    ignore_index = -100 if ignore_index is None else ignore_index
    if composes:
        head = linear_weight.flatten(0, -2)
        bias = None if linear_bias is None else linear_bias.flatten()
        logits = F.linear(input, head, bias)
        return loss.cross_entropy(
            logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1]),
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            lse_square_scale=lse_square_scale,
            **e._asdict(),
        )
    extras.check_rows(e, input.shape[:1], input.device)
    call = (*tensors, reduction, ignore_index, label_smoothing, options, lse_square_scale, e)
    if options is None or torch.compiler.is_compiling():
        return _rows_with_extras(*call)
    try:
        return _rows_with_extras(*call)
    except IndexError as error:
        raise RuntimeError(str(error)) from None


def _rows_with_extras(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    options: Any,
    lse_square_scale: float,
    e: extras.Extras,
) -> Any:
    dtype = _logits_dtype(input, linear_weight, linear_bias)
    assert dtype is not None  # as _serves knows
    exact = statistics.accumulation_type(dtype)
    loss_dtype = e.loss_dtype or _served_dtype(dtype, target)
    if weight is not None and weight.dtype in _HALF:
        weight = weight.float()
    asked = REDUCTIONS["none" if reduction == "none" else "sum"]
    of_rows = exact if reduction == "none" and e.token_weight is not None else loss_dtype
    row_options = Options(ignore_index, label_smoothing, asked, of_rows, lse_square_scale)
    shape = torch.Size([*input.shape[:1], *linear_weight.shape[:1]])
    weights, factor, by = None, None, None
    if e.token_weight is not None:
        weights = extras.row_weights(target, ignore_index, e, exact)
    if reduction == "mean":
        by = extras.divisor(shape, target, weight, row_options, e)
    if reduction != "none":
        factor = torch.ones(input.shape[0], dtype=torch.float64, device=input.device)
        factor = factor if weights is None else weights.to(factor.dtype)
        factor = factor if by is None else factor / by
    rows, accumulate = _rows(options), _accumulate(options, dtype)
    cap = 0.0 if e.softcap is None else e.softcap
    plan = linear_rows.Plan(dtype, accumulate, rows, e.logit_scale, cap, e.return_stats)
    parameters = (input, linear_weight, linear_bias)
    result, found = linear_rows.linear_rows(*parameters, target, weight, factor, row_options, plan)
    if weights is not None and reduction == "none":
        result = result * weights
    result = result.to(loss_dtype)
    if not e.return_stats:
        return result
    dim = layouts.class_dim(shape)
    found = statistics.Statistics(*(x.detach() for x in found))
    stats = extras.loss_stats(found, target, dim, row_options, weights, reduction, by)
    return result, stats


def _composes(
    input: Any,
    linear_weight: Any,
    target: Any,
    linear_bias: Any,
    weight: Any,
    reduction: Any,
    ignore_index: Any,
) -> bool:
    """Whether F.linear and our cross_entropy are what stock would do, and faster than the loop."""
    # Every microsecond counts: with these questions the smallest call takes 5 % longer.
    if (
        type(input) not in _TENSOR_TYPES
        or type(linear_weight) not in _TENSOR_TYPES
        or type(target) not in _TENSOR_TYPES
    ):
        return False
    shape, head = input.shape, linear_weight.shape
    if len(shape) != 2 or len(head) != 2:
        return False
    if not _is_too_small(shape, head, input, linear_weight, linear_bias, reduction):
        return False
    same = loss._surely_same if torch.compiler.is_compiling() else eq
    return (
        same(shape[1:], head[1:])
        and (linear_bias is None or same(linear_bias.shape, head[:1]))
        and (ignore_index is None or target.dim() == 1)
        and (
            not has_torch_function_variadic(input, linear_weight, target, linear_bias, weight)
            or (linear_bias is None or type(linear_bias) in _TENSOR_TYPES)
            and loss._only_a_default_device(weight)
        )
    )


def _is_too_small(
    shape: torch.Size,
    head: torch.Size,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Any,
    reduction: Any,
) -> bool:
    """Whether the composition is faster. On a CPU never under FASTOPT_ALWAYS; on a GPU the loop has
    never run."""
    if input.is_cuda:
        return True
    if loss.backends.ALWAYS:
        return False
    surely: Any = bool
    if torch.compiler.is_compiling():  # of sizes that may change no answer is to become a guard
        from torch.fx.experimental.symbolic_shapes import statically_known_true as surely
    rows, classes = shape[0], head[0]
    recomputes = (
        reduction == "none"
        and torch.is_grad_enabled()
        and _wants_any(input, linear_weight, linear_bias)
    )
    least = _MIN_LOGITS_TO_RECOMPUTE if recomputes else _MIN_LOGITS
    if not (surely(rows < _MIN_ROWS) or surely(rows * classes < least)):
        return False
    if surely(rows * classes * shape[1] < _MIN_HALF_PRODUCTS):
        return True
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
    return dtype not in _HALF or _multiplies(dtype)


def _multiplies(dtype: torch.dtype) -> bool:
    return kernel.multiplies(dtype)


_multiplies._dynamo_marked_constant = True  # type: ignore[attr-defined] # see backends.serves_gpu


def _wants_any(*parameters: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in parameters)


def _serves(
    input: Any,
    linear_weight: Any,
    target: Any,
    linear_bias: Any,
    weight: Any,
    reduction: Any,
    ignore_index: Any,
    label_smoothing: Any,
    options: Any,
) -> bool:
    """Whether stock accepts this call and the loop covers it."""
    others = [x for x in (linear_bias, weight) if x is not None]
    tensors = [input, linear_weight, target, *others]
    if not all(type(x) in _TENSOR_TYPES for x in tensors):
        return False
    if has_torch_function_variadic(*tensors) and not loss._only_a_default_device(None):
        return False
    compiling = torch.compiler.is_compiling()
    if (
        not loss._ON_CPU
        or not all(x.is_cpu and x.layout is torch.strided for x in tensors)
        or type(reduction) is not str
        or reduction not in REDUCTIONS
        or type(label_smoothing) not in (float, int)
        or not label_smoothing <= 1.0
        or not (ignore_index is None or type(ignore_index) is int)
        or (not compiling and ignore_index is not None and not -(2**63) <= ignore_index < 2**63)
        or input.dim() != 2
        or linear_weight.dim() != 2
        or loss._is_watched()
    ):
        return False
    if compiling:
        trains = torch.is_grad_enabled() and _wants_any(input, linear_weight, linear_bias)
        if trains and not loss._COMPILES_GRADIENTS:
            return False
    elif input.numel() == 0 or linear_weight.numel() == 0:
        return False
    same = loss._surely_same if compiling else eq
    dtype = _logits_dtype(input, linear_weight, linear_bias)
    classes = linear_weight.shape[0]
    if (
        dtype is None
        or not same(input.shape[1:], linear_weight.shape[1:])
        or (linear_bias is not None and not same(linear_bias.shape, (classes,)))
        or not _serves_options(options, dtype)
    ):
        return False
    if target.dtype is torch.int64:
        if not same(target.shape, input.shape[:1]):
            return False
    elif (
        target.requires_grad
        or ignore_index is not None
        or not same(target.shape, (input.shape[0], classes))
        or not (target.dtype is dtype or (dtype in _HALF and target.dtype is torch.float32))
    ):
        return False
    return weight is None or (
        not weight.requires_grad
        and weight.dim() == 1
        and same(weight.shape, (classes,))
        and _loss_dtype(weight.dtype) is _loss_dtype(dtype)
    )


def _logits_dtype(*tensors: Tensor | None) -> torch.dtype | None:
    """The dtype of what F.linear gives; None where it would raise. autocast leaves float64 alone."""
    found = {x.dtype for x in tensors if x is not None}
    kind = tensors[0].device.type  # type: ignore[union-attr]
    if torch.is_autocast_enabled(kind):
        reduced = torch.get_autocast_dtype(kind)
        found = {x if x is torch.float64 or x not in _DTYPES else reduced for x in found}
    dtype = found.pop()
    return None if found or dtype not in _DTYPES else dtype


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """autocast, where it is on, runs the loss in float32."""
    return torch.float32 if dtype in _HALF and torch.is_autocast_enabled("cpu") else dtype


def _served_dtype(dtype: torch.dtype, target: Tensor) -> torch.dtype:
    """Of the loss of logits in this dtype."""
    if target.dtype is torch.int64:
        return _loss_dtype(dtype)
    return torch.promote_types(_loss_dtype(dtype), _loss_dtype(target.dtype))


def _serves_options(options: Any, dtype: torch.dtype) -> bool:
    """Whether these are torch's, and ask for nothing that torch may refuse: two chunk sizes, sums in
    other types."""
    return options is None or (
        type(options) is _Options
        and (options.batch_chunk_size is None or options.chunking_method in (None, "auto"))
        and options.acc_dtype in (None, dtype, *([torch.float32] if dtype in _HALF else []))
    )


def _rows(options: Any) -> int:
    """How many rows at a time, as the op takes it."""
    if options is None:
        return 0
    if options.batch_chunk_size is not None:
        return min(options.batch_chunk_size, _WHOLE)
    if options.chunking_method is None:
        return _WHOLE
    if options.chunking_method == "auto":
        return 0
    return -int(options.chunking_method.partition(":")[2] or 1)


def _accumulate(options: Any, dtype: torch.dtype) -> torch.dtype:
    """In which the weight's gradient is summed."""
    if options is not None and (options.acc_policy == "compact" or options.acc_dtype is dtype):
        return dtype
    return statistics.accumulation_type(dtype)


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    options: Any,
) -> Tensor:
    dtype = _logits_dtype(input, linear_weight, linear_bias)
    assert dtype is not None  # as _serves knows
    loss_dtype = _served_dtype(dtype, target)
    if weight is not None and weight.dtype in _HALF:
        weight = weight.float()
    accumulate = _accumulate(options, dtype)
    row_options = Options(ignore_index, label_smoothing, REDUCTIONS[reduction], loss_dtype)
    plan = (dtype, accumulate, _rows(options))
    wants = [x is not None and x.requires_grad for x in (input, linear_weight, linear_bias)]
    if not torch.is_grad_enabled():
        wants = [False] * 3
    call = (input, linear_weight, linear_bias, target, weight)
    if any(wants) and not torch.compiler.is_compiling():
        return _LinearLoss.apply(*call, row_options, *plan)[0]
    if row_options.reduction == NONE:  # computes gradients in backward
        wants = [False] * 3
    return ops.linear_cross_entropy(*call, None, *row_options, *plan, *wants)[0]


class _LinearLoss(torch.autograd.Function):
    """(input, linear_weight, linear_bias) -> (loss, their gradients for an upstream gradient of 1).

    Mean and sum: 3 GEMMs in forward, and backward only multiplies. None: 1 GEMM in forward, and 4
    in backward, which has the rows' upstream gradients. Gradients that are to be differentiated again
    are stock's, and make the logits whole.
    """

    @staticmethod
    def forward(
        ctx,
        input,
        linear_weight,
        linear_bias,
        target,
        weight,
        options,
        dtype,
        accumulate,
        rows,
    ):
        wants = [False] * 3 if options.reduction == NONE else ctx.needs_input_grad[:3]
        call = (input, linear_weight, linear_bias, target, weight)
        plan = (dtype, accumulate, rows)
        with loss._below_autograd():
            result, *grads = ops.linear_cross_entropy(*call, None, *options, *plan, *wants)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*grads)
        # As torch's graph: the weight for the input's gradient, the input for the weight's, unless they
        # were converted. What it would not hold may change, or be an inference tensor; of ours only a
        # gradient that is to be differentiated again needs it, and asks whether it changed.
        trains, recomputes = ctx.needs_input_grad, options.reduction == NONE
        holds = (
            trains[1] and input.dtype is dtype,
            trains[0] and linear_weight.dtype is dtype,
            False,
        )
        held = [x if h or recomputes else None for x, h in zip(call, holds, strict=False)]
        ctx.save_for_backward(*held, target, weight, *(grads if any(wants) else ()))
        ctx.others = [
            None if x is None or h is not None else (x, _version(x))
            for x, h in zip(call, held, strict=False)
        ]
        ctx.dtypes = [None if x is None else x.dtype for x in call[:3]]
        ctx.options, ctx.plan = options, plan
        return result, *grads

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 9
        input, linear_weight, linear_bias, target, weight, *grads = ctx.saved_tensors
        parameters, wants = (input, linear_weight, linear_bias), ctx.needs_input_grad[:3]
        dtypes, options = ctx.dtypes, ctx.options
        if torch.is_grad_enabled():
            parameters = tuple(map(_unchanged, parameters, ctx.others))
            grads = _differentiable(
                parameters, wants, target, weight, options, ctx.plan[0], grad_loss
            )
            return *grads, *(None,) * 6
        if options.reduction == NONE:
            _, *grads = ops.linear_cross_entropy(
                *parameters, target, weight, grad_loss, *options, *ctx.plan, *wants
            )
            grads = [g.to(d) if w else None for g, d, w in zip(grads, dtypes, wants, strict=True)]
            return *grads, *(None,) * 6
        del input, linear_weight, linear_bias, parameters
        if not loss._keeps_graph():
            ctx.others = None
        return *linear_rows.multiplied(ctx, grads, grad_loss, target, dtypes), *(None,) * 6


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version  # which has none, nor can be changed in place


def _unchanged(held: Tensor | None, other: tuple[Tensor, int | None] | None) -> Any:
    if other is None:
        return held
    if _version(other[0]) != other[1]:
        raise RuntimeError(
            "what this gradient was computed from has been modified by an inplace operation since"
        )
    return other[0]


def _differentiable(
    parameters: tuple[Tensor, Tensor, Tensor | None],
    wants: tuple[bool, bool, bool],
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    grad_loss: Tensor,
) -> list[Tensor | None]:
    """The gradients in terms that can be differentiated again: those of the composition.

    Of views, so that only the way through this call counts where one parameter depends on another
    (tied weights). Multiplied in the accumulation type, as the loop does.
    """
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        views = [None if x is None else x.view_as(x) for x in parameters]
        exact = statistics.accumulation_type(dtype)
        x, w, b = (None if v is None else linear_rows.rounded(v, dtype, exact) for v in views)
        assert x is not None and w is not None
        again = F.cross_entropy(
            F.linear(x, w, b),
            target.to(exact) if target.is_floating_point() else target,
            weight,
            ignore_index=options.ignore_index,
            reduction=next(name for name, n in REDUCTIONS.items() if n == options.reduction),
            label_smoothing=options.label_smoothing,
        )
        wanted = [v for v, w in zip(views, wants, strict=True) if w and v is not None]
        found = iter(torch.autograd.grad(again, wanted, grad_loss.to(exact), create_graph=True))
        return [next(found) if w else None for w in wants]


def _op_autograd(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    grad_loss: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    accumulate: torch.dtype,
    rows: int,
    *wants: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = (input, linear_weight, linear_bias, target, weight)
    plan = (dtype, accumulate, rows)
    if torch.is_grad_enabled() and _wants_any(input, linear_weight, linear_bias):
        return _LinearLoss.apply(*call, options, *plan)
    with loss._below_autograd():
        return ops.linear_cross_entropy(*call, grad_loss, *options, *plan, *wants)


ops.register("linear_cross_entropy", "Autograd", _op_autograd)
