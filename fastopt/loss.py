"""The faces of softmax cross-entropy: what our kernels serve, and autograd.

    CrossEntropyLoss.forward -> cross_entropy
        extras beyond z-loss            _with_extras (extras.py), around what follows
        not served                      stock, with the same arguments
        no gradient wanted              ops.cross_entropy_forward
        eager                           _Loss, an autograd.Function around the op
        torch.compile                   the op in the graph; its autograd kernel is _Loss

One question decides (_serves): is this a call that stock accepts, our kernels cover, and nobody but
reverse-mode autograd looks at? Every other call goes to stock. So exotic uses work, and bad input
raises stock's own exception. Only labels out of range are ours to refuse.
"""

import math
from operator import eq
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import _reduction
from torch.overrides import _get_current_function_mode_stack, has_torch_function_variadic
from torch.utils._device import DeviceContext

from fastopt import backends, extras, layouts, memory, ops, reference, selfcheck, statistics
from fastopt.options import MEAN, NONE, REDUCTIONS, Options

__all__ = ["CrossEntropyLoss", "cross_entropy"]

_stock = F.cross_entropy  # as it was: F.cross_entropy = fastopt.cross_entropy must not recurse

# Whether stock does what torch 2.13's does: ask for overrides, then call one C++ function. Not where it
# is somebody's patch, or of a torch whose function names other things.
_STOCK_IS_KNOWN = getattr(getattr(_stock, "__code__", None), "co_names", None) == (
    *("has_torch_function_variadic", "handle_torch_function", "cross_entropy", "_Reduction"),
    *("legacy_get_string", "torch", "_C", "_nn", "cross_entropy_loss", "get_enum"),
)

# The crossover: smaller calls go to stock, whose C++ autograd node costs less than a Python
# autograd.Function, 13 to 55 us of a whole forward and backward. It stands where neither of two
# machines loses; the faster one could begin at 256 x 10.
#
# time of stock / ours, forward + backward, float32, 2 threads, torch 2.13, in a tight loop:
#                  128x10 256x10 2048x10 4096x10 4096x2 512x100 1024x100 64x1000 128x1000 16x10000
#   Zen 4, AVX-512  1.04   1.24                           0.97    1.19    1.14    1.45     1.59
#   Zen 3, AVX2     0.67   0.70   0.94    1.16   0.88    0.87    1.00    1.06    1.30     1.41
#   and there (2, 21, 32, 32) 0.99, (4, 21, 32, 32) 1.25, 512x64 0.79
_MIN_COST, _ROW_COST = 80_000, 16  # in logits
# On an H200 1024 x 1000 float32 logits take the device 23 us, stock's kernels 37; the host needs some
# 30 us more than stock's whatever the size (bench/results/gpu-nvidia-h200-cuda/notes.md).
_MIN_LOGITS_ON_GPU = 1 << 20
# Under torch.compile, rough figures of another day's busy machine: 128x10 0.74, 64x1000 1.14,
# 1024x1000 2.4, 512x32000 3.1.
_MIN_LOGITS_COMPILED = 1 << 15
# Before 2.13 what torch compiled raises no error when its gradient is to be differentiated, and leaves
# the second derivative out in silence, unless the graph saved one of its inputs: stock's loss may, ours
# never does.
_COMPILES_GRADIENTS = backends.torch_version() >= (2, 13)
_MAX_CLASSES_ON_GPU = 1 << 30  # which both families of kernels count in 32 bits


def _is_too_small(count: int, classes: int, cuda: bool = False) -> bool:
    """Whether stock is faster for this many logits. Never under FASTOPT_ALWAYS."""
    if backends.ALWAYS:
        return False
    if cuda:
        return count < _MIN_LOGITS_ON_GPU
    return count + count // classes * _ROW_COST < _MIN_COST


# What no rule would let through, to be asked before anything else.
_MIN_LOGITS = 1 if backends.ALWAYS else _MIN_COST // (1 + _ROW_COST)

_ON_CPU = backends.CPU_LIBRARY is not None or backends.BACKEND == "reference"
_ON_GPU = backends.GPU_FAMILY is not None or backends.BACKEND == "reference"
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)
_TENSOR_TYPES = (Tensor, torch.nn.Parameter)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, computed by one fused kernel.

    Arguments, shapes, results, buffers and errors are those of torch.nn.CrossEntropyLoss; see
    :func:`cross_entropy` for shapes, dtypes, the keyword arguments that torch has not, and where
    results are better.
    """

    # Of objects that were made, or pickled, as torch's.
    lse_square_scale = 0.0
    softcap = None
    logit_scale = 1.0
    loss_dtype = None
    return_stats = False
    inplace = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        lse_square_scale: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        loss_dtype: torch.dtype | None = None,
        return_stats: bool = False,
        inplace: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.lse_square_scale = lse_square_scale
        self.softcap, self.logit_scale = softcap, logit_scale
        self.loss_dtype, self.return_stats, self.inplace = loss_dtype, return_stats, inplace

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None = None,
        denominator: Tensor | None = None,  # or a number, which torch.jit.script does not have
    ) -> Tensor:
        if torch.jit.is_scripting():
            assert self.lse_square_scale == 0.0, "lse_square_scale is not for torch.jit.script"
            assert (
                self.softcap is None
                and self.logit_scale == 1.0
                and self.loss_dtype is None
                and not self.return_stats
                and not self.inplace
                and token_weight is None
                and denominator is None
            ), "what torch's loss has not is not for torch.jit.script"
            options = (self.ignore_index, None, self.reduction, self.label_smoothing)
            return _stock(input, target, self.weight, None, *options)
        return self._fused(input, target, token_weight, denominator)

    @torch.jit.unused
    def _fused(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None,
        denominator: Tensor | None,
    ) -> Tensor:
        if (
            self.softcap is not None
            or type(self.logit_scale) is not float
            or self.logit_scale != 1.0
            or self.loss_dtype is not None
            or self.return_stats
            or self.inplace
            or token_weight is not None
            or denominator is not None
        ):
            return self._with_extras(input, target, token_weight, denominator)
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
        )

    @torch.jit.unused
    def _with_extras(
        self,
        input: Tensor,
        target: Tensor,
        token_weight: Tensor | None,
        denominator: Tensor | None,
    ) -> Any:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            token_weight=token_weight,
            denominator=denominator,
            loss_dtype=self.loss_dtype,
            return_stats=self.return_stats,
            inplace=self.inplace,
        )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    denominator: Tensor | float | None = None,
    loss_dtype: torch.dtype | None = None,
    return_stats: bool = False,
    inplace: bool = False,
) -> Any:
    """Cross-entropy between logits and a target, as torch.nn.functional.cross_entropy.

    With q the target's mass per class and m = max_c x_c, the loss of a row is
    ``(sum_c q_c) log(sum_c exp(x_c - m)) - sum_c q_c (x_c - m)``: one pass over memory for the
    loss, a second one (a write) for its gradient, which mean and sum compute on the way.

    Args:
        input: logits, shape (C), (N, C) or (N, C, d1, ...); float32, float64, bfloat16, float16.
        target: class indices, int64, shape (), (N) or (N, d1, ...); or probabilities, floating
            point, shaped like input.
        weight: shape (C), a factor for each class. Default: none.
        size_average: deprecated, see reduction.
        ignore_index: a class index whose rows count neither in the loss nor in the gradient.
        reduce: deprecated, see reduction.
        reduction: "none", "mean" (weighted by the true classes' weights) or "sum".
        label_smoothing: in [0, 1], the share of the target spread evenly over all classes.
        lse_square_scale: z-loss: any number; every row that is not ignored has lse_square_scale *
            logsumexp(input)**2 more, whatever its weight. The logits are kept for backward then, and
            may not be changed in place before.
        softcap: c > 0: the loss is that of c tanh(input / c), after logit_scale. Default: none.
        logit_scale: s > 0: the loss is that of s input.
        token_weight: shaped like the loss of reduction "none": factors of its elements. They do not
            change what the mean divides by. May not require grad.
        denominator: what "mean" divides by in place of its own count: a number, or a 0-dim tensor,
            on any device without waiting for it. May not require grad.
        loss_dtype: the dtype of the loss, float32 of half precision logits, say. Default: stock's.
        return_stats: return (loss, LossStats) (log-sum-exp, z-loss, entropy, predicted classes).
        inplace: allow the gradient to take the logits' memory, before backward, where that saves
            memory: logits that require grad, on a CPU, in eager mode, without softcap or
            logit_scale. They hold the gradient then, and their version is incremented, so that
            autograd refuses what needs them as they were. Without a gradient it changes nothing.

    Returns:
        The loss, 0-dim, or shaped like the class indices for reduction "none"; in the logits'
        dtype (promoted with probabilities; float32 under autocast, as stock has it), or loss_dtype.
        With return_stats (loss, fastopt.LossStats).

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index. On a GPU, where finding
            out would mean waiting for it, only under FASTOPT_DEBUG=1; otherwise the loss and that
            row's gradient are NaN.
        ValueError: softcap, logit_scale, loss_dtype or the shape of token_weight or denominator is not
            one of the above; a denominator with another reduction than "mean".
        TypeError: an extra argument of another type.
        RuntimeError: inplace for a leaf that requires grad, or a view of one; token_weight or
            denominator requires grad, or is on another device; backward where logits that inplace
            had overwritten were changed, or second derivatives need them (lse_square_scale).
        Exception: whatever torch.nn.functional.cross_entropy raises for the same arguments.

    DTensors are served where classes, rows or nothing of the logits is sharded, the classes on one
    dimension of the mesh, and the target lies as loss_parallel() asks for. Classes sharded, the logits
    are kept for backward, which cannot be differentiated again. The loss is replicated, shaped and placed
    like the target (reduction "none"), or Partial("sum") where rows are sharded, of a mean over all
    rows. What torch's loss has not, but for lse_square_scale, needs whole rows (NotImplementedError).
    Labels out of range raise on every rank that shares the row's classes, and of a mean on all.

    Differences from stock: half precision accumulates and counts in float32 and rounds once; rows that
    are ignored get gradient 0 even where their logits are NaN; the gradient has the strides of the
    logits where those are dense (channels_last, say), stock's is always contiguous. On CPU the memory of
    a gradient of 32 MB or more that goes on to another node of the graph serves the next one, too
    (fastopt.empty_cache() gives it back): its storage cannot be resized.

    Arguments from lse_square_scale on are not torch's, and torch.jit.script refuses them. softcap and
    logit_scale need up to two tensors shaped like the logits more, in float32 (float64 of float64);
    linear_cross_entropy needs none.
    """
    if type(lse_square_scale) is not float:
        lse_square_scale = extras.real("lse_square_scale", lse_square_scale)
    if (
        softcap is not None
        or type(logit_scale) is not float
        or logit_scale != 1.0
        or token_weight is not None
        or denominator is not None
        or loss_dtype is not None
        or return_stats is not False
        or inplace is not False
    ):
        stocks = (input, target, weight, size_average, ignore_index, reduce, reduction)
        ours = (softcap, logit_scale, token_weight, denominator, loss_dtype, return_stats)
        return _with_extras(*stocks, label_smoothing, lse_square_scale, ours, inplace)
    if (
        _STOCK_IS_KNOWN
        and not torch.compiler.is_compiling()
        and type(input) in _TENSOR_TYPES
        and input.numel() < _MIN_LOGITS
        and size_average is None
        and reduce is None
        and type(reduction) is str
        and reduction in REDUCTIONS
        and lse_square_scale == 0.0
        and not has_torch_function_variadic(input, target, weight)
    ):  # all that is left of stock, whose questions cost a tiny call 1 %
        enum: Any = REDUCTIONS[reduction]  # its stub says str
        return torch._C._nn.cross_entropy_loss(
            input, target, weight, enum, ignore_index, label_smoothing
        )
    served = _serves(input, target, weight, ignore_index, reduction, label_smoothing)
    if not served and type(input) not in _TENSOR_TYPES and size_average is reduce is None:
        told = (ignore_index, reduction, label_smoothing, lse_square_scale)
        if (of_ranks := _of_ranks(input, target, weight, *told)) is not None:
            return of_ranks
    if not served:  # with z-loss, too, stock says what is wrong
        loss = _by_torch(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
        if lse_square_scale == 0.0:
            return loss
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    dtype = _served_dtype(input, target) if served else loss.dtype
    # Options, as a plain tuple: names would cost 0.5 us.
    options = (ignore_index, label_smoothing, REDUCTIONS[reduction], dtype, lse_square_scale)
    if not served:
        return reference.cross_entropy(input, target, weight, Options(*options))
    return _cross_entropy(input, target, weight, options)


def _with_extras(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    label_smoothing: float,
    lse_square_scale: float,
    arguments: tuple[Any, ...],
    inplace: bool,
) -> Tensor | tuple[Tensor, extras.LossStats]:
    """Around the kernels of a served call, and around the reference of any other."""
    if isinstance(input, torch.fx.Proxy):
        stocks = (input, target, weight, size_average, ignore_index, reduce, reduction)
        keywords = dict(zip(extras.Extras._fields, arguments, strict=True))
        keywords.update(lse_square_scale=lse_square_scale, inplace=inplace)
        return extras.traced(cross_entropy, (*stocks, label_smoothing), keywords)
    extras.boolean("inplace", inplace)
    if inplace:
        _refuse_leaves(input)
    if type(input).__name__ == "DTensor":
        _refuse_sharded_classes(input)
    question = (input, target, weight, ignore_index, reduction, label_smoothing)
    served = _serves(*question)
    if not served:  # stock says what is wrong
        of_stock = _by_torch(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
        if not target.is_floating_point():
            target = target.long()  # uint8 has no -100
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    e = extras.checked(reduction, *arguments)
    extras.check_rows(e, layouts.row_shape(input.shape), input.device)
    loss_dtype = e.loss_dtype or (_served_dtype(input, target) if served else of_stock.dtype)

    dim, ignored = layouts.class_dim(input.shape), None
    if not target.is_floating_point():
        ignored = (target == ignore_index).unsqueeze(dim)
    logits = extras.scaled(input, e, ignored)
    if target.is_floating_point() and logits is not input:
        target = target.to(logits.dtype)
    exact = statistics.accumulation_type(logits.dtype)
    asked = extras.kernel_reduction(reduction, e)
    combines = e.token_weight is not None or e.denominator is not None
    of_kernel = exact if combines else loss_dtype
    options = Options(ignore_index, label_smoothing, asked, of_kernel, lse_square_scale)
    weights: Tensor | None = None
    by: Any = None
    if e.token_weight is not None:
        weights = extras.row_weights(target, ignore_index, e, exact)
    if reduction == "mean" and (combines or e.return_stats):
        by = extras.divisor(input.shape, target, weight, options, e)
    if e.return_stats:  # before the logits are overwritten
        found = statistics.in_pieces(logits, dim)
        stats = extras.loss_stats(found, target, dim, options, weights, reduction, by)

    if not served:
        loss = reference.cross_entropy(logits, target, weight, options)
    elif (
        inplace or (logits is not input and lse_square_scale == 0.0)  # ours alone
    ) and _can_be_overwritten(logits, target, weight, e.token_weight, e.denominator):
        loss = _overwriting(logits, target, weight, options)
    else:
        loss = _cross_entropy(logits, target, weight, tuple(options))
    if weights is not None:
        loss = extras.reduced(loss, weights, reduction, by)
    elif e.denominator is not None:
        loss = loss / by
    loss = loss.to(loss_dtype)
    return (loss, stats) if e.return_stats else loss


def _served_dtype(logits: Tensor, target: Tensor) -> torch.dtype:
    dtype = _loss_dtype(logits)
    if target.dtype is torch.int64:
        return dtype
    return torch.promote_types(dtype, _loss_dtype(target))


def _of_ranks(logits: Any, *call: Any) -> Tensor | None:
    """The loss of a DTensor, or of what has yet to arrive, where it is ours; else None."""
    if torch.compiler.is_compiling() or type(logits).__name__ not in _OF_RANKS:
        return None
    from fastopt import distributed

    return distributed.of_subclass(logits, *call)


_OF_RANKS = ("DTensor", "AsyncCollectiveTensor")


def _refuse_sharded_classes(logits: Any) -> None:
    """Under loss_parallel() the log_softmax of such a DTensor, of which the composition is made, has
    another gradient than its own."""
    dim = layouts.class_dim(logits.shape)
    for placement in logits.placements:
        sharded = getattr(placement, "dim", None)
        if sharded is not None and sharded % logits.dim() == dim:
            raise NotImplementedError(
                "logits whose classes are sharded take lse_square_scale only: softcap, logit_scale,"
                " token_weight, denominator, loss_dtype, return_stats and inplace need whole rows"
            )


def _by_torch(*call: Any) -> Tensor:  # reports.py replaces this, as it does _cross_entropy
    return _stock(*call)


# What torch.jit.script takes in its place.
cross_entropy.__prepare_scriptable__ = lambda: _stock  # type: ignore[attr-defined]

# Private names of torch. Where one is missing, the answer is the careful one.
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_tracing_state = getattr(torch._C, "_get_tracing_state", lambda: True)


def _is_watched() -> bool:
    """Whether somebody looks at this call who is not plain reverse-mode autograd: torch.func, forward
    mode, FakeTensorMode and other modes, a tracer or an exporter. 0.5 us."""
    if _transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling():
        # Not torch.compiler.is_exporting(): Dynamo of torch 2.10 takes it for a constant, True.
        return getattr(torch.compiler, "_is_exporting_flag", True)
    return _dispatch_modes() > 0 or _tracing_state() is not None


def _surely_same(a: Any, b: Any) -> bool:
    """Whether two shapes are equal; no, where a compiler cannot know. Asking must not guard: sizes
    that depend on data would stop the compilation."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if not guard_or_false(x == y):
            return False
    return True


def _is_compiled_too_small(count: Any) -> bool:
    """Inductor's own code wins on small calls. Of sizes that may change it is not asked, as the answer
    would become a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return not backends.ALWAYS and statically_known_true(count < _MIN_LOGITS_COMPILED)


def _serves(
    logits: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> bool:
    """Whether stock accepts this call and our kernels cover it. Cheapest questions first."""
    if type(logits) not in _TENSOR_TYPES:
        return False
    compiling = torch.compiler.is_compiling()
    if not compiling and logits.numel() < _MIN_LOGITS:
        return False
    if type(target) not in _TENSOR_TYPES:
        return False
    if has_torch_function_variadic(logits, target, weight) and not _only_a_default_device(weight):
        return False
    dtype, target_dtype = logits.dtype, target.dtype
    cuda = logits.is_cuda
    if (
        not (
            _ON_GPU
            and target.is_cuda
            and logits.device == target.device
            and backends.serves_gpu(logits.device.index)
            if cuda
            else _ON_CPU and logits.is_cpu and target.is_cpu
        )
        or dtype not in _DTYPES
        or logits.layout is not torch.strided
        or target.layout is not torch.strided
        or type(reduction) is not str
        or reduction not in REDUCTIONS
        or type(ignore_index) is not int
        or (not compiling and not -(2**63) <= ignore_index < 2**63)
        or type(label_smoothing) not in (float, int)
        or not label_smoothing <= 1.0
        or _is_watched()
    ):
        return False
    shape, target_shape = logits.shape, target.shape
    if not shape:
        return False
    classes = shape[layouts.class_dim(shape)]
    if compiling:
        if not _COMPILES_GRADIENTS and torch.is_grad_enabled() and logits.requires_grad:
            return False
        if _is_compiled_too_small(logits.numel()):
            return False
    elif _is_too_small(logits.numel(), classes, cuda):
        return False
    # Without a batch stock's mean of an ignored row is NaN on CPU and 0 on GPU: its own affair.
    if cuda and (len(shape) == 1 or shape[1] > _MAX_CLASSES_ON_GPU):
        return False
    same = _surely_same if compiling else eq
    if target_dtype is torch.int64:
        if not same(target_shape, layouts.row_shape(shape)):
            return False
    elif target_dtype in _DTYPES:
        if target.requires_grad or ignore_index >= 0 or not same(target_shape, shape):
            return False
        if target_dtype != dtype and (dtype not in _HALF or target_dtype is not torch.float32):
            return False
    else:
        return False
    if weight is not None and not (
        type(weight) in _TENSOR_TYPES
        and not weight.requires_grad
        and weight.device == logits.device
        and weight.layout is torch.strided
        and weight.dim() == 1  # a nested tensor has no shape to ask for
        and same(weight.shape, (classes,))
        and _loss_dtype(weight) == _loss_dtype(logits)
    ):
        return False
    return not cuda or selfcheck.serves("cross_entropy", dtype, logits.device.index)


def _only_a_default_device(weight: Any) -> bool:
    """Whether torch.set_default_device, a mode that leaves this call alone, is all that torch's
    overrides would call: no other mode, no subclass.
    """
    return (
        not torch.compiler.is_compiling()
        and (weight is None or type(weight) in _TENSOR_TYPES)
        and all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
    )


def _loss_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which stock would give the loss of these logits, probabilities or weights:
    autocast, where it is on, runs the loss in float32.
    """
    dtype = x.dtype
    return torch.float32 if dtype in _HALF and torch.is_autocast_enabled(x.device.type) else dtype


def _cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: tuple[Any, ...]
) -> Tensor:
    if backends.DEBUG and logits.is_cuda and target.dtype is torch.int64:
        # Waits for the GPU to find what its kernels answer with NaN.
        reference.check_labels(logits, target, Options(*options).ignore_index)
    if weight is not None and weight.dtype in _HALF:
        weight = weight.float()
    if not torch.is_grad_enabled() or not logits.requires_grad:
        if not torch.compiler.is_compiling() and memory.POOL.blocks:
            memory.POOL.age()
        return ops.cross_entropy_forward(logits, target, weight, *options)
    largest = _largest_mass(logits, target, weight, options)
    if torch.compiler.is_compiling():
        return ops.cross_entropy_forward_backward(logits, target, weight, *options, largest)[0]
    return _Loss.apply(logits, target, weight, options, largest)[0]


def _largest_mass(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: tuple[Any, ...]
) -> Tensor | None:
    """largest_mass of ops.py; None: not asked for, or 1."""
    if logits.dtype is not torch.float16:
        return None
    largest = None
    if weight is not None:  # an infinite one makes inf and NaN, or has no row
        largest = torch.where(weight.isfinite(), weight.abs(), 0).amax()
    if target.dtype is not torch.int64:
        dim = layouts.class_dim(target.shape)
        sums = torch.linalg.vector_norm(target, 1, dim, dtype=torch.float32)
        largest_row = sums.amax().clamp(min=1)  # smoothing adds up to 1
        largest = largest_row if largest is None else largest * largest_row
    if scale := Options(*options).lse_square_scale:  # of 2 |lse|, which is below 2^17
        room = logits.new_full((), min(abs(scale) * 2**17, 3e38), dtype=torch.float32)
        largest = room + (1 if largest is None else largest)
    return largest


def _kept_memory(logits: Tensor) -> Tensor | None:
    """Memory for a large gradient that an earlier one has left (memory.py). Not where its owner may
    want to enlarge it: the next node of the graph never does.
    """
    if torch.compiler.is_compiling():  # its sizes may not be asked
        return None
    if (
        not memory.AVAILABLE
        or logits.numel() * logits.element_size() < memory.MIN_BYTES
        or not logits.is_cpu
        or not _is_plain(logits)
        or logits.is_leaf
        or logits.retains_grad
        or logits._backward_hooks
    ):
        if memory.POOL.blocks:
            memory.POOL.age()
        return None
    return memory.empty(logits.shape, layouts.gradient_strides(logits), logits.dtype)


_below_autograd = torch._C._AutoDispatchBelowAutograd
_is_alias_of = getattr(torch._C, "_is_alias_of", lambda a, b: True)
_uses = getattr(torch._C, "_storage_Use_Count", lambda storage: math.inf)
_is_batched_by_autograd = torch._C._functorch.is_legacy_batchedtensor
_keeps_graph = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)  # private


class _Loss(torch.autograd.Function):
    """logits -> (loss, grad, unit), where grad * unit is the gradient for an upstream gradient of 1.

    All that backward needs is grad, which is an output, and so differentiable itself: second
    derivatives come from the same two formulas as first ones, and nothing of the logits is kept.
    Stock has the same plan, and saves the output of log_softmax. 2 passes over memory (reduction
    none: 4), and one buffer of the logits' size.

    With z-loss a + 2 z lse may be 0, and grad says nothing of the softmax: the logits are kept, and
    second derivatives are the reference's.
    """

    @staticmethod
    def forward(ctx, logits, target, weight, options, largest):
        with _below_autograd():
            grad = _kept_memory(logits)
            if grad is None:
                loss, grad, unit = ops.cross_entropy_forward_backward(
                    logits, target, weight, *options, largest
                )
            else:
                loss, unit = ops.cross_entropy_forward_backward_out(
                    logits, target, weight, *options, largest, grad
                )
        ctx.set_materialize_grads(False)
        of_half = unit if grad.dtype is torch.float16 else None
        kept = logits if options[-1] else None  # lse_square_scale
        ctx.mark_non_differentiable(unit, *(() if kept is None else (grad,)))
        ctx.save_for_backward(grad, target, weight, of_half, kept)
        ctx.options, ctx.overwritten = options, None
        return loss, grad, unit

    @staticmethod
    def backward(ctx, grad_loss, grad_grad, _):
        if grad_loss is None and grad_grad is None:
            return None, None, None, None, None
        grad, target, weight, unit, logits = ctx.saved_tensors
        options = Options(*ctx.options)
        if logits is not None and torch.is_grad_enabled():
            loss = reference.cross_entropy(logits, target, weight, options)
            result = torch.autograd.grad(loss, logits, grad_loss, create_graph=True)[0]
            return result, None, None, None, None
        if grad_grad is not None or torch.is_grad_enabled():
            result = _differentiable(grad, target, weight, unit, options, grad_loss, grad_grad)
            return result, None, None, None, None
        scale = (unit, target, options.ignore_index, options.smoothed, options.reduction)
        if _is_plain(grad_loss):
            grad = grad.detach()
            ctx.maybe_clear_saved_tensors()  # unless the graph is kept
            # Whoever alone holds the memory may write to it: this tensor and its storage's Python
            # object. A kept graph, a saved-tensor hook or a view would be a third.
            memory_of_grad = grad.untyped_storage()._cdata
            own = _uses(memory_of_grad) <= 2 or (
                ctx.overwritten is not None
                and ctx.overwritten.cdata == memory_of_grad
                and not _keeps_graph()
            )
            result = _times(grad, grad_loss, *scale, own)
        else:
            result = ops.cross_entropy_times(grad, grad_loss, *scale)
        return result, None, None, None, None


def _is_plain(x: Tensor) -> bool:
    """Whether this is memory, and nobody's idea of a tensor."""
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not _transforms_active()
        and _dispatch_modes() == 0
        and _tracing_state() is None
        and not _is_batched_by_autograd(x)
    )


def _times(
    grad: Tensor,
    grad_loss: Tensor,  # 0-dim, or with reduction none one for each row
    unit: Tensor | None,
    target: Tensor,
    ignore_index: int,
    smoothed: bool,
    reduction: int,
    own: bool = False,
) -> Tensor:
    """grad * unit * grad_loss; in grad's memory where that is its caller's own."""
    if grad.is_cpu and reduction:
        value = grad_loss.item() if unit is None else grad_loss.item() * unit.item()
        if math.isfinite(value):
            if not own:
                return grad * value
            return grad if value == 1 else grad.mul_(value)
    factor = grad_loss.to(statistics.accumulation_type(grad.dtype))
    if unit is not None:
        factor = factor * unit
    # Logits that inplace had overwritten may be part of something wider, which scale does not take.
    result = grad if own and layouts.is_dense(grad) else grad.clone()
    # The kernels of GPUs take one factor. Rows' factors are one pass in plain torch, too.
    scale = ops.cross_entropy_scale_ if reduction or grad.is_cpu else reference.cross_entropy_scale_
    scale(result, factor, target, ignore_index, smoothed)
    return result


def _differentiable(
    grad: Tensor,
    target: Tensor,
    weight: Tensor | None,
    unit: Tensor | None,
    options: Options,
    grad_loss: Tensor | None,
    grad_grad: Tensor | None,
) -> Tensor:
    """The gradient of the logits from that of the loss and that of `grad`, in terms that can be
    differentiated again.

    With g = grad * unit = P - M, where P_c = a p_c and M_c = q_c over what the mean divides by, and
    a = sum_c M_c:  d g_c / d x_j = P_c ([c = j] - P_j / a). What arrives as the gradient of `grad` is
    that of g.
    """
    dim = layouts.class_dim(grad.shape)
    g = grad.to(statistics.accumulation_type(grad.dtype))
    if unit is not None:
        # The derivative of g, not of grad: float16 could not hold that, a unit smaller. Only this
        # function and backward below know the output, so that it is a matter between them.
        g = (g * unit).detach() + (g - g.detach())
    live = None if target.is_floating_point() else (target != options.ignore_index).unsqueeze(dim)
    result = g.new_zeros(())
    if grad_loss is not None:
        upstream = grad_loss.to(g.dtype)
        if options.reduction == NONE:
            upstream = upstream.unsqueeze(dim)
        result = g * upstream
        if live is not None:
            result = torch.where(live, result, 0)
    if grad_grad is not None:
        v = grad_grad.to(g.dtype)
        mass = _mass(g, target, weight, live, options)
        total = mass.sum(dim, keepdim=True)
        softmax_mass = g + mass
        if grad.dtype in _HALF and live is not None:
            label = reference.labels_in_range(target.unsqueeze(dim), ~live, g.shape[dim])
            softmax_mass = _mend_true_class(softmax_mass, total, label)
        mean = (v * softmax_mass).sum(dim, keepdim=True) / torch.where(total == 0, 1, total)
        result = result + softmax_mass * (v - mean)
    return result.to(grad.dtype)


def _mend_true_class(softmax_mass: Tensor, total: Tensor, label: Tensor) -> Tensor:
    """Of half precision: where the true class is improbable its a p - q is nearly -q, and rounded so
    that the sum with q has lost its digits. What the other classes leave of `total` has more."""
    dim = layouts.class_dim(softmax_mass.shape)
    true = softmax_mass.gather(dim, label)
    rest = total - (softmax_mass.sum(dim, keepdim=True) - true)
    return softmax_mass.scatter(dim, label, torch.where(2 * true.abs() < total.abs(), rest, true))


def _mass(
    like: Tensor,
    target: Tensor,
    weight: Tensor | None,
    live: Tensor | None,
    options: Options,
) -> Tensor:
    """q of every class, over what the mean divides by."""
    dim = layouts.class_dim(like.shape)
    classes = like.shape[dim]
    smoothing = options.smoothing
    w = layouts.along_classes(weight, like)
    if live is None:
        mass = w * ((1 - smoothing) * target.to(like.dtype) + smoothing / classes)
        return mass / (like.numel() // classes) if options.reduction == MEAN else mass
    label = reference.labels_in_range(target.unsqueeze(dim), ~live, classes)
    counts = live & (target.unsqueeze(dim) == label)  # not where a label is out of range
    one_hot = torch.zeros_like(like).scatter(dim, label, counts.to(like.dtype))
    # Elsewhere 0 also where the weight is infinite, or no row is left to divide by.
    has_mass = live if options.smoothed else one_hot > 0
    mass = w * ((1 - smoothing) * one_hot + smoothing / classes)
    if options.reduction == MEAN:
        mass = mass / torch.where(one_hot > 0, w, 0).sum()
    return torch.where(has_mass, mass, 0)


def _op_autograd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    largest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Loss.apply(logits, target, weight, options, largest)
    with _below_autograd():
        return ops.cross_entropy_forward_backward(logits, target, weight, *options, largest)


def _refuse_leaves(logits: Any) -> None:
    """As torch does where such a tensor is to be changed in place."""
    if not isinstance(logits, Tensor) or not (torch.is_grad_enabled() and logits.requires_grad):
        return
    if logits.is_leaf:
        raise RuntimeError("inplace: a leaf that requires grad may not be overwritten")
    if not torch.compiler.is_compiling() and logits._is_view():
        base = logits._base
        if base is not None and base.is_leaf and base.requires_grad:
            raise RuntimeError(
                "inplace: a view of a leaf that requires grad may not be overwritten"
            )


def _can_be_overwritten(logits: Tensor, *others: Any) -> bool:
    """others: what is read afterwards, too."""
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and logits.requires_grad
        and logits.is_cpu
        and _is_plain(logits)
        and layouts.has_no_overlap(logits)
        and layouts.positions_are_even(logits)
        and not any(isinstance(x, Tensor) and _is_alias_of(logits, x) for x in others)
    )


def _overwriting(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> Tensor:  # reports.py replaces this, too
    if weight is not None and weight.dtype in _HALF:
        weight = weight.float()
    largest = _largest_mass(logits, target, weight, options)
    loss: Tensor = _OverwritingLoss.apply(logits, target, weight, options, largest)[0]
    return loss


class _OverwritingLoss(_Loss):
    """_Loss, whose grad is in the memory of the logits.

    Whoever saved them before is told by their version; whoever changes them before backward changes
    the gradient, and is told there. Of the logits nothing is held but what says so: hooks of saved
    tensors, as checkpoint's, may take their memory away.
    """

    @staticmethod
    def forward(ctx, logits, target, weight, options, largest):
        grad = logits.data  # the same memory; of autograd's it knows nothing
        with _below_autograd():
            loss, unit = ops.cross_entropy_forward_backward_out(
                logits, target, weight, *options, largest, grad
            )
        torch.autograd.graph.increment_version(logits)
        ctx.set_materialize_grads(False)
        of_half = unit if grad.dtype is torch.float16 else None
        ctx.mark_non_differentiable(unit, *((grad,) if options.lse_square_scale else ()))
        ctx.save_for_backward(grad, target, weight, of_half, None)
        ctx.counter = logits.detach()  # has their version,
        ctx.counter.data = logits.new_empty(0)  # and none of their memory
        ctx.options, ctx.version = options, logits._version
        ctx.overwritten = StorageWeakRef(logits.untyped_storage())
        return loss, grad, unit

    @staticmethod
    def backward(ctx, grad_loss, grad_grad, _):
        if ctx.counter._version != ctx.version:
            raise RuntimeError(
                "logits that inplace=True had overwritten with their gradient have been modified by"
                " an inplace operation since"
            )
        if torch.is_grad_enabled() and ctx.options.lse_square_scale:
            raise RuntimeError(
                "inplace=True has overwritten the logits, which second derivatives with"
                " lse_square_scale need"
            )
        return _Loss.backward(ctx, grad_loss, grad_grad, _)


ops.register("cross_entropy_forward_backward", "Autograd", _op_autograd)
ops.library.impl("cross_entropy_times", _times, "CompositeExplicitAutograd")
