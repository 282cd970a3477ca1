"""The ops on a GPU: checks, what is allocated, and the launches of the kernels."""

# Triton has no type stubs.
# mypy: disable-error-code="import-untyped,import-not-found"

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastopt import layouts, reference
from fastopt.kernels.cross_entropy import plan
from fastopt.kernels.cross_entropy.forward import forward_kernel
from fastopt.kernels.cross_entropy.scale import scale_kernel
from fastopt.kernels.cross_entropy.sums import reduce_kernel, total_weight_kernel
from fastopt.layouts import Strides, viewed
from fastopt.options import MEAN, NONE, REDUCTIONS, Options

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}


def _check(ok: bool, what: str) -> None:
    """torch.ops is callable by anyone: what memory depends on is checked before a launch."""
    if not ok:
        raise RuntimeError(f"fastopt::cross_entropy: {what}")


class _Tensors:
    """Logits, or their gradient, and targets: checked, and as the kernels see them."""

    def __init__(self, logits: Tensor, target: Tensor) -> None:
        _check(logits.dtype in _DTYPES, "logits must be float32, float64, bfloat16 or float16")
        _check(logits.dim() >= 1, "logits must have a class dimension")
        self.shape = logits.shape
        self.accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.row_shape = layouts.row_shape(self.shape)
        self.classes = self.shape[layouts.class_dim(self.shape)]
        self.positions = self.shape[2:].numel()
        self.rows = self.row_shape.numel()
        _check(self.classes <= 2**30, "logits may have at most 2^30 classes")
        self.labels = target.dtype == torch.int64
        if self.labels:
            _check(target.shape == self.row_shape, "target must have the shape of the loss")
        else:
            _check(target.shape == self.shape, "probabilities must have the shape of logits")
            _check(
                target.dtype in (logits.dtype, self.accumulate),
                "probabilities must have the type of logits, or float32 with half precision logits",
            )
        _check(target.device == logits.device, "target must be on the device of logits")
        self.logits, self.logits_strides = viewed(logits)
        self.target_strides = Strides(0, 0, 0)
        if self.labels:
            self.target = target.contiguous()
        else:
            self.target, self.target_strides = viewed(target)


class _Call(_Tensors):
    """The arguments that both losses share, checked, and what the kernels take of them."""

    def __init__(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
    ) -> None:
        super().__init__(logits, target)
        _check(options.reduction in REDUCTIONS.values(), "reduction must be 0, 1 or 2")
        _check(not options.label_smoothing > 1.0, "label_smoothing must be at most 1")
        _check(
            options.loss_dtype in _DTYPES, "the loss must be float32, float64, bfloat16 or float16"
        )
        if weight is not None:
            _check(weight.shape == (self.classes,), "weight must have shape (C)")
            _check(
                weight.dtype == self.accumulate,
                "weight must be float32, or float64 where logits are",
            )
            _check(weight.device == logits.device, "weight must be on the device of logits")
            weight = weight.contiguous()
        self.weight = weight
        self.options = options
        self.numbers = options.of_kernel(self.classes)

    def rows_tensor(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.row_shape, dtype=dtype, device=self.logits.device)

    def scalar(self, dtype: torch.dtype) -> Tensor:
        return torch.empty((), dtype=dtype, device=self.logits.device)

    def planned(self, grad: Tensor | None) -> tuple[plan.Config, int, int, dict[str, object]]:
        """The configuration, `plan.edge`, the number of programs, and the arguments that follow."""
        strides = [self.logits_strides, self.target_strides]
        strides.append(Strides(0, 0, 0) if grad is None else viewed(grad)[1])
        positions = self.positions
        if positions == 1 or all(s.batch == s.position * positions for s in strides):
            # Rows evenly spaced in every tensor are the positions of one batch entry.
            step = "batch" if positions == 1 else "position"
            strides = [s._replace(batch=0, position=getattr(s, step)) for s in strides]
            positions = self.rows
        itemsize = self.logits.dtype.itemsize
        tensors = [self.logits, None if self.labels else self.target, grad]
        used = [(t, s) for t, s in zip(tensors, strides, strict=True) if t is not None]
        class_axis = int(self.classes == 1 or all(s.cls == 1 for _, s in used))
        unit = plan.unit(self.classes, positions, strides, class_axis)
        edge = 1
        if all(t.data_ptr() % 16 == 0 for t, _ in used):
            edge = plan.edge(self.classes, [s for _, s in used], class_axis, itemsize, unit)
        dense = self.options.smoothed or not self.labels
        config = plan.config(self.classes, class_axis, itemsize, dense, edge > 1)
        in_entry = positions >= config.rows or positions == self.rows
        if in_entry:
            programs = self.rows // positions * triton.cdiv(positions, config.rows)
        else:
            programs = triton.cdiv(self.rows, config.rows)
        arguments: dict[str, object] = {
            "rows": self.rows,
            "classes": self.classes,
            "positions": positions,
            **self.numbers,
            "LABELS": self.labels,
            "WEIGHT": self.weight is not None,
            "SMOOTHING": self.options.smoothed,
            "REDUCTION": self.options.reduction,
            "ACC": _TRITON[self.accumulate],
            "UNIT": unit,
            "AXIS": class_axis,
            "IN_ENTRY": in_entry,
            "ROWS": config.rows,
            "BLOCK": config.block,
            "num_warps": config.warps,
            "enable_fp_fusion": False,
        }
        for name, s in zip(("logits", "target", "grad"), strides, strict=True):
            arguments |= {f"{name}_batch": s.batch, f"{name}_class": s.cls}
            arguments[f"{name}_position"] = s.position
        return config, edge, programs, arguments

    def total_weight_parts(self) -> Tensor | None:
        """What the mean divides by, in parts; None where that is the number of rows."""
        if not self.labels or self.options.reduction != MEAN:
            return None
        parts = min(triton.cdiv(self.rows, plan.LABELS_PER_PART), plan.PARTS)
        result = torch.empty(parts, dtype=torch.float64, device=self.logits.device)
        total_weight_kernel[(parts,)](
            self.target,
            self.weight,
            result,
            self.rows,
            triton.cdiv(self.rows, parts),
            self.classes,
            self.options.ignore_index,
            WEIGHT=self.weight is not None,
            BLOCK=plan.LABELS_PER_PART,
            num_warps=4,
            enable_fp_fusion=False,
        )
        return result

    def reduce(self, loss_parts: Tensor, parts: Tensor | None, loss: Tensor) -> None:
        reduce_kernel[(1,)](
            loss_parts,
            parts,
            loss,
            loss_parts.numel(),
            0 if parts is None else parts.numel(),
            self.rows,
            self.numbers["uniform"],
            LABELS=self.labels,
            REDUCTION=self.options.reduction,
            BLOCK=2048,
            PARTS=plan.PARTS,
            num_warps=8,
            enable_fp_fusion=False,
        )


def cross_entropy_forward(
    logits: Tensor,  # (C), (N, C) or (N, C, d1, ...)
    target: Tensor,  # int64 (N, d1, ...), or floating point like logits
    weight: Tensor | None,  # (C)
    options: Options,
) -> Tensor:
    call = _Call(logits, target, weight, options)
    if logits.numel() == 0:
        return reference.cross_entropy_forward(logits, target, weight, options)
    return _forward(call)


def cross_entropy_forward_backward_out(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    largest_mass: Tensor | None,  # 0-dim, of float16 logits
    grad_logits: Tensor,
) -> tuple[Tensor, Tensor]:
    call = _Call(logits, target, weight, options)
    _check(
        grad_logits.shape == logits.shape
        and grad_logits.dtype == logits.dtype
        and grad_logits.device == logits.device,
        "grad_logits must have the shape, the type and the device of logits",
    )
    _check(
        viewed(grad_logits)[0] is grad_logits and layouts.has_no_overlap(grad_logits),
        "grad_logits must have a layout that kernels can write",
    )
    if logits.numel() == 0:
        return reference.cross_entropy_forward_backward_out(
            logits, target, weight, options, largest_mass, grad_logits
        )
    storages = {x.untyped_storage()._cdata for x in (grad_logits, logits)}
    _check(len(storages) == 2, "grad_logits must have memory of its own on a GPU")
    unit = call.scalar(torch.float32)
    scale = None
    if logits.dtype == torch.float16:
        if largest_mass is None:
            largest_mass = torch.ones_like(unit)
        _check(
            largest_mass.numel() == 1 and largest_mass.device == logits.device,
            "largest_mass must be one number on the device of logits",
        )
        scale = reference.half_gradient_scale(largest_mass)
    return _forward(call, grad_logits, unit, scale), unit


cross_entropy_forward_backward = reference.allocating(cross_entropy_forward_backward_out)


def _forward(
    call: _Call,
    grad_logits: Tensor | None = None,
    unit: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    config, edge, programs, arguments = call.planned(grad_logits)
    with torch.cuda.device_of(call.logits):
        parts = call.total_weight_parts()
        if call.options.reduction == NONE:
            loss = loss_parts = call.rows_tensor(call.options.loss_dtype)
        else:
            loss = call.scalar(call.options.loss_dtype)
            loss_parts = torch.empty(programs, dtype=torch.float64, device=loss.device)
        forward_kernel[(programs,)](
            call.logits,
            call.target,
            call.weight,
            parts,
            loss_parts,
            grad_logits,
            unit,
            scale,
            parts=0 if parts is None else parts.numel(),
            GRADIENT=grad_logits is not None,
            LOOP=config.loop,
            EDGE=edge,
            PARTS=plan.PARTS,
            **arguments,
        )
        if call.options.reduction != NONE:
            call.reduce(loss_parts, parts, loss)
    return loss


def cross_entropy_scale_(
    grad_logits: Tensor,  # dense, in any order of its dimensions
    factor: Tensor,  # 0-dim, or one for each row; on the device of grad_logits
    target: Tensor,
    ignore_index: int,
    smoothed: bool,
) -> None:
    """Multiplies in place; a factor of 1 touches no memory."""
    call = _Tensors(grad_logits, target)
    _check(factor.dtype in _DTYPES, "factor must be floating point")
    _check(factor.device == grad_logits.device, "every tensor must be on one device")
    if factor.numel() != 1:
        _check(factor.shape == call.row_shape, "factor must be one number, or one for each row")
        # One pass, as ours would be.
        reference.cross_entropy_scale_(grad_logits, factor, target, ignore_index, smoothed)
        return
    count = grad_logits.numel()
    if count == 0:
        return
    _check(
        layouts.is_dense(grad_logits) and call.logits is grad_logits,
        "grad_logits must be dense, in a layout of the ops' own",
    )
    with torch.cuda.device_of(grad_logits):
        scale_kernel[(min(triton.cdiv(count, plan.SCALE_BLOCK), plan.SCALE_PROGRAMS),)](
            grad_logits,
            factor,
            call.target if call.labels else None,
            count,
            call.classes,
            call.positions,
            *call.logits_strides,
            ignore_index,
            SMOOTHED=smoothed,
            ACC=_TRITON[call.accumulate],
            BLOCK=plan.SCALE_BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )
