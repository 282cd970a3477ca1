"""What the cross-entropy tests share: inputs, memory layouts, options, and the check itself.

Inputs are made on the CPU, so that they are the same everywhere, and moved to torch's default
device (see conftest.py).
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import fastopt
import fastopt.backends
import served
from accuracy import assert_as_accurate, assert_same_bits

# Whose kernels are tested (cross_entropy_kernels.py).
KERNELS = os.environ.get("FASTOPT_TEST_KERNELS", "library")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]


def dtype_name(value: object) -> str:
    """The readable id of a parameter: dtypes without their prefix, shapes as 2x3x4."""
    if isinstance(value, tuple) and all(isinstance(item, int) for item in value):
        return "x".join(map(str, value)) or "scalar"
    return str(value).removeprefix("torch.")


def make_logits(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random logits with three outliers a row, so that the softmax is not nearly uniform."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator, device="cpu") * 2
    classes = logits.movedim(class_dim(logits), -1)
    if classes.numel():
        outliers = (*classes.shape[:-1], 3)
        at = torch.randint(classes.shape[-1], outliers, generator=generator, device="cpu")
        classes.scatter_(-1, at, classes.gather(-1, at) * 5)
    return logits.to(torch.get_default_device(), dtype)


def make_target(logits: Tensor, seed: int = 1) -> Tensor:
    """Class indices for these logits; the first and the last class are among them."""
    generator = torch.Generator().manual_seed(seed)
    dim = class_dim(logits)
    shape = [size for axis, size in enumerate(logits.shape) if axis != dim]
    target = torch.randint(max(logits.shape[dim], 1), shape, generator=generator, device="cpu")
    flat = target.view(-1)
    if flat.numel():
        flat[0] = max(logits.shape[dim] - 1, 0)
    if flat.numel() > 1:
        flat[-1] = 0
    return target.to(logits.device)


def make_probabilities(logits: Tensor, dtype: torch.dtype | None = None, seed: int = 2) -> Tensor:
    """Probability targets shaped like the logits."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*logits.shape, generator=generator, device="cpu") * 2
    return scores.softmax(class_dim(logits)).to(logits.device, dtype or logits.dtype)


def make_weight(classes: int, dtype: torch.dtype, kind: str = "random") -> Tensor:
    """Class weights: positive, with every third one zero, or of both signs."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(classes, generator=generator, device="cpu") + 0.25
    if kind == "zeros":
        weight[::3] = 0
    elif kind == "negative":
        weight[1::2] *= -0.5
    return weight.to(torch.get_default_device(), dtype)


def class_dim(logits: Tensor) -> int:
    return 0 if logits.dim() == 1 else 1


# -- memory layouts ---------------------------------------------------------------------------------
# Each takes dense logits and returns the same values (expanded: values of the first row or class)
# in another layout; whatever lies between the values in memory is NaN.


def _inside(logits: Tensor, buffer_shape: Sequence[int], window: tuple[slice, ...]) -> Tensor:
    buffer = torch.full(buffer_shape, math.nan, dtype=logits.dtype, device=logits.device)
    buffer[window] = logits
    return buffer[window]


def contiguous(logits: Tensor) -> Tensor:
    return logits.contiguous()


def transposed(logits: Tensor) -> Tensor:
    """Classes outermost in memory."""
    return logits.transpose(0, 1).contiguous().transpose(0, 1)


def classes_last(logits: Tensor) -> Tensor:
    """Classes innermost in memory: channels_last, or (B, T, V).transpose(1, 2)."""
    return logits.movedim(1, -1).contiguous().movedim(-1, 1)


def spatial_swapped(logits: Tensor) -> Tensor:
    """The last two dimensions swapped in memory (they collapse, but not in the order of target)."""
    return logits.transpose(-1, -2).contiguous().transpose(-1, -2)


def offset(logits: Tensor) -> Tensor:
    """Dense, but one element off the allocation's alignment."""
    return _inside(logits.reshape(-1), [logits.numel() + 2], (slice(1, -1),)).view(logits.shape)


def row_strided(logits: Tensor) -> Tensor:
    """Rows of a wider buffer: the classes stay contiguous in 2-D, d1 and d2 do not collapse."""
    shape = [*logits.shape[:-1], logits.shape[-1] + 3]
    return _inside(logits, shape, (..., slice(1, -2)))


def every_second_row(logits: Tensor) -> Tensor:
    shape = [2 * logits.shape[0] + 1, *logits.shape[1:]]
    return _inside(logits, shape, (slice(1, None, 2),))


def every_second_class(logits: Tensor) -> Tensor:
    shape = [logits.shape[0], 2 * logits.shape[1] + 1, *logits.shape[2:]]
    return _inside(logits, shape, (slice(None), slice(1, None, 2)))


def every_second_position(logits: Tensor) -> Tensor:
    shape = [*logits.shape[:-1], 2 * logits.shape[-1] + 1]
    return _inside(logits, shape, (..., slice(1, None, 2)))


def expanded_rows(logits: Tensor) -> Tensor:
    return logits[:1].expand(logits.shape)


def expanded_classes(logits: Tensor) -> Tensor:
    return logits[:, :1].expand(logits.shape)


def expanded_positions(logits: Tensor) -> Tensor:
    return logits[..., :1].expand(logits.shape)


def far_apart(values: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values, `strides` apart: gigabytes of which only the pages in use exist."""
    steps = zip(values.shape, strides, strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in steps)
    reserve_nothing = 0x4000  # MAP_NORESERVE, which the module does not name everywhere
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    memory = mmap.mmap(-1, elements * values.element_size(), flags=flags)
    far = torch.frombuffer(memory, dtype=values.dtype).as_strided(values.shape, strides)
    return far.copy_(values)


# Shapes and strides, each below 2^31, that put elements more than 2^32 apart; whole 16-byte words,
# so that the same values side by side give the same bits.
FAR = 2**30 + 32
FAR_APART: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "few-classes": ((6, 10), (FAR, 1)),
    "many-classes": ((6, 712), (FAR, 1)),
    "classes-last": ((1, 264, 6), (6 * FAR, 1, FAR)),
    "classes": ((2, 6, 33), (64, FAR, 1)),
    "entries": ((6, 5, 33), (FAR, 64, 1)),
    "positions": ((2, 5, 6), (16, 32, FAR)),
}


LAYOUTS_2D: list[Callable[[Tensor], Tensor]] = [
    contiguous,
    transposed,
    offset,
    row_strided,
    every_second_row,
    every_second_class,
    expanded_rows,
    expanded_classes,
]
LAYOUTS_ND: list[Callable[[Tensor], Tensor]] = [
    *LAYOUTS_2D,
    classes_last,
    spatial_swapped,
    every_second_position,
    expanded_positions,
]

# -- options ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """One way to call the loss, independent of shape and dtype."""

    weight: str | None = None
    label_smoothing: float = 0.0
    ignored: float = 0.0  # the share of rows whose label is ignore_index
    ignore_index: int = -100

    def apply(self, logits: Tensor, target: Tensor) -> tuple[Tensor, dict[str, object]]:
        """The target with its ignored rows, and the keyword arguments of the call."""
        if self.ignored:
            generator = torch.Generator().manual_seed(4)
            ignored = torch.rand(target.shape, generator=generator, device="cpu") < self.ignored
            target = target.masked_fill(ignored.to(target.device), self.ignore_index)
        keywords: dict[str, object] = {"label_smoothing": self.label_smoothing}
        if not target.is_floating_point():
            keywords["ignore_index"] = self.ignore_index
        if self.weight is not None:
            classes = logits.shape[class_dim(logits)]
            keywords["weight"] = make_weight(classes, logits.dtype, self.weight)
        return target, keywords


OPTIONS = {
    "plain": Options(),
    "weight": Options(weight="random"),
    "weight-zeros": Options(weight="zeros"),
    "weight-negative": Options(weight="negative"),
    "smoothing": Options(label_smoothing=0.1),
    "smoothing-full": Options(label_smoothing=1.0),
    "smoothing-negative": Options(label_smoothing=-0.5),
    "smoothing-nan": Options(label_smoothing=math.nan),
    "smoothing-weight": Options(weight="random", label_smoothing=0.2),
    "smoothing-weight-zeros": Options(weight="zeros", label_smoothing=0.3),
    "ignored": Options(ignored=0.3),
    "ignored-class-1": Options(ignored=0.1, ignore_index=1),
    "ignored-past-the-classes": Options(ignored=0.3, ignore_index=2**40),
    "ignored-weight": Options(ignored=0.3, weight="zeros"),
    "ignored-smoothing": Options(ignored=0.3, label_smoothing=0.1),
    "ignored-smoothing-weight": Options(ignored=0.3, label_smoothing=0.1, weight="random"),
    "all-ignored": Options(ignored=2.0),
    "all-ignored-smoothing-weight": Options(ignored=2.0, label_smoothing=0.1, weight="random"),
}
# The one that enters every term of the formula at once.
EVERYTHING = OPTIONS["ignored-smoothing-weight"]

# -- the check --------------------------------------------------------------------------------------


@dataclass
class Result:
    """A loss and the gradients of the inputs that were differentiated."""

    loss: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def cpu(self) -> Result:
        gradients = {name: gradient.cpu() for name, gradient in self.gradients.items()}
        return Result(self.loss.cpu(), gradients)


def differentiate(
    loss_function: Callable[..., Tensor],
    logits: Tensor,
    target: Tensor,
    upstream: Callable[[Tensor], Tensor] = torch.ones_like,
    wanted: Sequence[str] = ("logits",),
    **keywords: object,
) -> Result:
    """The loss and, for the upstream gradient made from it, the gradients of `wanted`."""
    inputs = {"logits": logits.detach(), "target": target.detach()}
    for name in wanted:
        inputs[name].requires_grad_()
    loss = loss_function(inputs["logits"], inputs["target"], **keywords)
    gradients = torch.autograd.grad(loss, [inputs[name] for name in wanted], upstream(loss))
    return Result(loss.detach(), dict(zip(wanted, gradients, strict=True)))


def random_upstream(loss: Tensor) -> Tensor:
    """A different factor for every row, the same in every dtype that can hold eighths."""
    generator = torch.Generator().manual_seed(5)
    eighths = torch.randint(-16, 17, loss.shape, generator=generator, device="cpu")
    return (eighths / 8).to(loss.device, loss.dtype)


def exact(result_of: Callable[..., Result], *args: Tensor, **keywords: object) -> Result:
    """The same call on the same values in float64."""
    doubled = {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in keywords.items()
    }
    return result_of(
        F.cross_entropy,
        *(arg.double() if arg.is_floating_point() else arg for arg in args),
        **doubled,
    )


def is_ours(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    wanted: Sequence[str] = ("logits",),
    **others: object,
) -> bool:
    """Whether our kernels have to answer a call that the tests make, and not torch."""
    half = (torch.bfloat16, torch.float16)
    return not (
        logits.numel() == 0
        or "target" in wanted  # stock's
        or math.isnan(label_smoothing)
        or (logits.is_cuda and logits.dim() == 1)
        or (
            target.is_floating_point()
            and target.dtype != logits.dtype
            and (logits.dtype not in half or target.dtype != torch.float32)
        )
        or (weight is not None and weight.dtype != logits.dtype)
    )


def check(
    logits: Tensor, target: Tensor, alone: bool = KERNELS != "interpreted", **keywords: object
) -> Result:
    """Compare a call with torch's: the loss, with its gradients and (`alone`) without any; dtypes;
    inputs untouched; answered by ours.

    Takes what `differentiate` takes. An ignored row's gradient has to be exactly zero, where torch
    has NaN if the row holds NaN or infinity. Returns our result.
    """
    weight = keywords.get("weight")
    inputs = [logits, target, *([weight] if isinstance(weight, Tensor) else [])]
    before = [tensor.detach().clone() for tensor in inputs]
    # With a crossover, test_crossover.py asks.
    by_torch = not is_ours(logits, target, **keywords) if fastopt.backends.ALWAYS else None
    with served.cross_entropy.answered(by_torch):
        ours = differentiate(fastopt.cross_entropy, logits, target, **keywords)
        losses = [ours.loss]
        if alone:
            of_the_call = {k: v for k, v in keywords.items() if k not in ("upstream", "wanted")}
            losses += [fastopt.cross_entropy(logits.detach(), target.detach(), **of_the_call)]
    for tensor, copy in zip(inputs, before, strict=True):
        assert_same_bits(tensor, copy, "an input after the call")

    if logits.is_cuda and not -(2**31) <= keywords.get("ignore_index", -100) < 2**31:
        # torch's CUDA kernel for (N, C, d1, ...) reads labels as 32-bit numbers (2.11, seen on an
        # H200: wrong losses, or an assertion on the device). Its CPU kernel does not.
        ours, logits, target = ours.cpu(), logits.cpu(), target.cpu()
        losses = [loss.cpu() for loss in losses]
        keywords = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in keywords.items()}
    stock = differentiate(F.cross_entropy, logits, target, **keywords)
    oracle = exact(differentiate, logits, target, **keywords)
    if not target.is_floating_point():
        ignored = (target == keywords.get("ignore_index", -100)).unsqueeze(class_dim(logits))
        oracle.gradients["logits"] = oracle.gradients["logits"].masked_fill(ignored, 0.0)
        nonzero = ours.gradients["logits"].masked_fill(~ignored, 0.0).count_nonzero()
        assert nonzero == 0, "the gradient of an ignored row is not exactly zero"

    # Masses are what torch sums one by one; exponentials it sums in vectors.
    masses = target.is_floating_point() or keywords.get("label_smoothing")
    summed = logits.shape[class_dim(logits)] if masses else 0
    for loss, what in zip(losses, ("loss", "loss alone"), strict=False):
        assert_as_accurate(loss, stock.loss, oracle.loss, what, summed)
    for name, gradient in ours.gradients.items():
        theirs, exactly = stock.gradients[name], oracle.gradients[name]
        assert_as_accurate(gradient, theirs, exactly, f"gradient of {name}", summed)
    return ours


def check_options(logits: Tensor, options: Options, **keywords: object) -> Result:
    """`check` with class indices under the given options."""
    target, option_keywords = options.apply(logits, make_target(logits))
    return check(logits, target, **option_keywords, **keywords)


def assert_same_layout(ours: Tensor, stock: Tensor, what: str) -> None:
    """Check the strides, where a stride means anything."""
    if ours.numel() == 0:
        return
    wide = [axis for axis, size in enumerate(ours.shape) if size > 1]
    our_strides = [ours.stride(axis) for axis in wide]
    strides = [stock.stride(axis) for axis in wide]
    assert our_strides == strides, f"{what}: strides {our_strides}, torch has {strides}"


# -- shapes -----------------------------------------------------------------------------------------
# One name for every branch that a kernel may take. Vector lengths are 4, 8 and 16 floats, 8, 16 and
# 32 halves, and small multiples of them, so class counts and position counts stand on both sides of
# every power of two; rows of a few classes are handled many at a time, long rows in parts.

NAMED_SHAPES: dict[str, tuple[int, ...]] = {
    "one-logit": (1, 1),
    "one-class": (77, 1),
    "two-classes": (257, 2),
    "three-classes": (77, 3),
    "below-one-vector": (77, 7),
    "tile-and-tail": (1003, 10),
    "several-tasks-of-tiles": (2003, 33),
    "one-vector-less-one": (3, 15),
    "one-vector": (3, 16),
    "one-vector-and-one": (3, 17),
    "four-vectors-and-one": (3, 65),
    "several-chunks-and-tail": (5, 2049),
    "several-tasks-of-rows": (66, 1025),
    "one-row-in-segments": (1, 32771),
    "two-rows-in-segments": (2, 65539),
    "too-long-for-the-cache": (9, 65539),
    "no-batch": (19,),
    "no-batch-long": (4099,),
    "one-position": (3, 5, 1),
    "positions-below-one-vector": (2, 21, 7),
    "positions-one-vector-and-one": (2, 21, 17),
    "positions-odd": (2, 3, 255),
    "image": (2, 21, 13, 19),
    "image-many-classes": (1, 150, 33, 7),
    "image-one-class": (2, 1, 5, 5),
    "image-classes-in-blocks": (1, 1801, 5, 3),
    "volume": (2, 5, 3, 4, 7),
}


def check_named_shapes() -> None:
    """A compact pass over every named shape, dtype and target kind."""
    for shape in NAMED_SHAPES.values():
        for dtype in DTYPES:
            logits = make_logits(shape, dtype)
            check_options(logits, OPTIONS["plain"])
            check_options(logits, EVERYTHING, reduction="none", upstream=random_upstream)
            weight = make_weight(shape[class_dim(logits)], dtype)
            wanted = ("logits", "target")
            check(logits, make_probabilities(logits), weight=weight, wanted=wanted)
