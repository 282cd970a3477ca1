"""The faces of softmax cross-entropy: what our kernels serve, autograd, reduction.

CrossEntropyLoss.forward -> cross_entropy -> served? -> autograd.Function -> ops.cross_entropy_*
                                          -> not     -> torch.nn.functional.cross_entropy

One question decides (_serves): is this a call that stock accepts and our kernels cover? Every
other call goes to stock with the same arguments. So exotic uses work, and bad input raises stock's
own exception. Only labels out of range are ours to refuse.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import _reduction
from torch.overrides import _get_current_function_mode_stack, has_torch_function_variadic
from torch.utils._device import DeviceContext

from fastopt import ops

__all__ = ["CrossEntropyLoss", "cross_entropy"]

# The crossover: smaller calls go to stock, whose C++ autograd node costs less than a Python
# autograd.Function (13 us of 37 us for a whole forward and backward on the machine below). There,
# stock takes about 12 ns more for every logit of rows with fewer than 16 classes, which it does
# not vectorise, 50 ns more a row and 0.5 ns more a logit of longer ones.
#
# time of stock / ours, forward + backward, float32, 2 threads of an AMD EPYC (Zen 4), torch 2.13:
#   64x10 0.88   128x10 1.04   256x10 1.24   512x2 0.91   1024x2 1.10 (in a tight loop; between
#   the other steps of a training, with cold caches, 128x10 is 0.80)
#   512x16 0.87  512x64 1.01   256x100 0.85  512x100 0.97  1024x100 1.19
#   16x1000 0.79 64x1000 1.14  128x1000 1.45 4x10000 0.95  16x10000 1.59
_FEW_CLASSES = 16
_MIN_LOGITS_OF_FEW_CLASSES = 2560
_MIN_COST_OF_MANY_CLASSES, _ROW_COST = 80_000, 96  # in logits
# On an H200 1024 x 1000 float32 logits take the device 23 us, stock's kernels 37; the host needs some
# 30 us more than stock's whatever the size (bench/results/gpu-nvidia-h200-cuda/notes.md).
_MIN_LOGITS_ON_GPU = 1 << 20
_MAX_CLASSES_ON_GPU = 1 << 30  # which both families of kernels count in 32 bits


def _is_too_small(count: int, classes: int, cuda: bool = False) -> bool:
    """Whether stock is faster for this many logits. Never under FASTOPT_ALWAYS."""
    if ops.ALWAYS:
        return False
    if cuda:
        return count < _MIN_LOGITS_ON_GPU
    if classes < _FEW_CLASSES:
        return count < _MIN_LOGITS_OF_FEW_CLASSES
    return count + count // classes * _ROW_COST < _MIN_COST_OF_MANY_CLASSES


# What no rule would let through, to be asked before anything else.
_MIN_LOGITS = 1 if ops.ALWAYS else _MIN_LOGITS_OF_FEW_CLASSES

_ON_CPU = ops.CPU_LIBRARY is not None or ops.BACKEND == "reference"
_ON_GPU = ops.GPU_FAMILY is not None or ops.BACKEND == "reference"
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)
_TENSOR_TYPES = (Tensor, torch.nn.Parameter)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, computed by one fused kernel.

    Arguments, shapes, results, buffers and errors are those of torch.nn.CrossEntropyLoss; see
    :func:`cross_entropy` for shapes, dtypes and the few places where results are better.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
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
) -> Tensor:
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

    Returns:
        The loss, 0-dim, or shaped like the class indices for reduction "none"; in the logits'
        dtype (promoted with probabilities; float32 under autocast, as stock has it).

    Raises:
        IndexError: a class index outside [0, C) that is not ignore_index. On a GPU, where finding
            out would mean waiting for it, only under FASTOPT_DEBUG=1; otherwise the loss and that
            row's gradient are NaN.
        Whatever torch.nn.functional.cross_entropy raises for the same arguments.

    Differences from stock, all on the side of accuracy: half precision accumulates and counts in
    float32 and rounds once; rows that are ignored get gradient 0 even where their logits are NaN.
    """
    if torch.jit.is_scripting() or not _serves(
        input, target, weight, ignore_index, reduction, label_smoothing
    ):
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    return _cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)


def _serves(
    logits: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> bool:
    """Whether stock accepts this call and our kernels cover it. Cheapest questions first."""
    if type(logits) not in _TENSOR_TYPES or logits.numel() < _MIN_LOGITS:
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
            and ops.serves_gpu(logits.device.index)
            if cuda
            else _ON_CPU and logits.is_cpu and target.is_cpu
        )
        or dtype not in _DTYPES
        or logits.layout is not torch.strided
        or target.layout is not torch.strided
        or type(reduction) is not str
        or reduction not in _REDUCTIONS
        or type(ignore_index) is not int
        or not -(2**63) <= ignore_index < 2**63
        or type(label_smoothing) not in (float, int)
        or not label_smoothing <= 1.0
        or forward_ad._current_level >= 0
    ):
        return False
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return False
    shape, target_shape = logits.shape, target.shape
    if not shape or _is_too_small(logits.numel(), shape[0 if len(shape) == 1 else 1], cuda):
        return False
    # Without a batch stock's mean of an ignored row is NaN on CPU and 0 on GPU: its own affair.
    if cuda and (len(shape) == 1 or shape[1] > _MAX_CLASSES_ON_GPU):
        return False
    if target_dtype is torch.int64:
        if len(target_shape) != len(shape) - 1 or (
            len(shape) > 1 and (target_shape[0] != shape[0] or target_shape[1:] != shape[2:])
        ):
            return False
    elif target_dtype in _DTYPES:
        if target_shape != shape or ignore_index >= 0:
            return False
        if target_dtype != dtype and (dtype not in _HALF or target_dtype is not torch.float32):
            return False
    else:
        return False
    return weight is None or (
        type(weight) in _TENSOR_TYPES
        and not weight.requires_grad
        and weight.device == logits.device
        and weight.layout is torch.strided
        and weight.shape == (shape[0 if len(shape) == 1 else 1],)
        and _loss_dtype(weight) == _loss_dtype(logits)
    )


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
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    loss_dtype = _loss_dtype(logits)
    if target.dtype is not torch.int64:
        loss_dtype = torch.promote_types(loss_dtype, _loss_dtype(target))
    elif ops.DEBUG and logits.is_cuda:
        _check_labels(target, logits.shape[0 if logits.dim() == 1 else 1], ignore_index)
    if weight is not None and weight.dtype in _HALF:
        weight = weight.float()
    options = (ignore_index, label_smoothing, _REDUCTIONS[reduction], loss_dtype)
    if not torch.is_grad_enabled() or not (logits.requires_grad or target.requires_grad):
        return ops.cross_entropy_forward(logits, target, weight, *options)[0]
    # float16 gradients are not kept before the upstream factor (a GradScaler's) has reached them:
    # most would underflow.
    if reduction == "none" or logits.dtype is torch.float16 or target.requires_grad:
        return _Recompute.apply(logits, target, weight, options)
    return _GradientInForward.apply(logits, target, weight, options)


def _check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """FASTOPT_DEBUG=1 waits for the GPU to find what its kernels answer with NaN."""
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if wrong.numel():
        raise IndexError(f"Target {wrong[0].item()} is out of bounds.")


class _GradientInForward(torch.autograd.Function):
    """Mean and sum: the row is in cache, so its gradient is written while it is there.

    2 passes over memory instead of 3, and one logits-sized buffer. Backward multiplies by the
    upstream gradient, in place unless the graph is kept; a factor of 1 costs nothing.
    """

    @staticmethod
    def forward(ctx, logits, target, weight, options):
        loss, grad_logits = ops.cross_entropy_forward_backward(logits, target, weight, *options)
        ctx.save_for_backward(grad_logits, logits, target, weight)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():
            _, *inputs = ctx.saved_tensors
            return *_differentiable_backward(ctx, grad_loss, *inputs), None, None
        if torch.compiler.is_compiling():
            return ctx.saved_tensors[0] * grad_loss, None, None, None
        try:
            grad_logits = ctx.saved_tensors[0]
        except RuntimeError:
            # An input was changed in place after forward. Only the gradient is needed, and it
            # was right when it was computed; if that is gone as well, this raises again.
            saved = ctx._raw_saved_tensors[0]
            if not hasattr(saved, "unpack"):  # older torch
                raise
            grad_logits = saved.unpack()
        # A kept graph will want the saved gradient again; a batched upstream gradient (torch's
        # is_grads_batched) has no value of its own.
        if _keeps_graph() or _is_batched(grad_loss):
            grad_logits = grad_logits * grad_loss
        elif grad_logits.is_cuda:
            ops.cross_entropy_scale_(grad_logits, grad_loss)  # no value of a GPU on the host
        elif grad_loss.item() != 1:
            grad_logits = grad_logits.mul_(grad_loss)
        return grad_logits, None, None, None


# Whether the backward pass under way keeps its graph; assumed where torch does not tell.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _is_batched(x: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)


class _Recompute(torch.autograd.Function):
    """Reduction none, float16, or probabilities that need a gradient: backward reads the logits
    again, with the row's maximum and sum kept by forward. 3 passes over memory.
    """

    @staticmethod
    def forward(ctx, logits, target, weight, options):
        loss, *kept = ops.cross_entropy_forward(logits, target, weight, *options)
        ctx.save_for_backward(logits, target, weight, *kept)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        logits, target, weight, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = logits, target, weight
            return *_differentiable_backward(ctx, grad_loss, *inputs), None, None
        arguments = (grad_loss, logits, target, weight, *ctx.options[:-1], *kept)
        grad_logits = grad_target = None
        if ctx.needs_input_grad[0]:
            grad_logits = ops.cross_entropy_backward(*arguments)
        if ctx.needs_input_grad[1]:
            grad_target = ops.cross_entropy_backward_target(*arguments)
        return grad_logits, grad_target, None, None


def _differentiable_backward(ctx, grad_loss, logits, target, weight):
    """Gradients that can be differentiated again (create_graph): through stock."""
    ignore_index, label_smoothing, reduction, loss_dtype = ctx.options
    with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
        loss = F.cross_entropy(
            logits.to(loss_dtype),
            target.to(loss_dtype) if target.is_floating_point() else target,
            None if weight is None else weight.to(loss_dtype),
            ignore_index=ignore_index,
            reduction=next(name for name, value in _REDUCTIONS.items() if value == reduction),
            label_smoothing=label_smoothing,
        )
        wanted = [
            x for x, need in zip((logits, target), ctx.needs_input_grad, strict=False) if need
        ]
        gradients = iter(torch.autograd.grad(loss, wanted, grad_loss, create_graph=True))
    return tuple(next(gradients) if need else None for need in ctx.needs_input_grad[:2])
