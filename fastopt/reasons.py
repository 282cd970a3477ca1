"""Why torch serves a call, in words that a user can act on. The faces only ask whether; here the same
questions are asked in the same order, slowly. tests/test_report.py holds both to one answer.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack, has_torch_function_variadic
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastopt import backends, layouts, loss, selfcheck
from fastopt.options import REDUCTIONS
from fastopt.sgd import gather, launch, shards, step
from fastopt.sgd.table import FLOAT64_SERVED, NOT_SERVED, SERVED, Groups

_NO_KERNELS = "there are no kernels of fastopt for the {} here: `python -m fastopt` says why"


def of_loss(
    logits: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> str | None:
    """Why torch serves this call of the loss; None where our kernels do: loss._serves in words."""
    if shards.is_dtensor(logits):
        return "logits are a DTensor, and not placed with their target as for loss_parallel()"
    if type(logits) not in loss._TENSOR_TYPES:
        return _subclass("logits", logits)
    compiling = torch.compiler.is_compiling()
    if not compiling and logits.numel() < loss._MIN_LOGITS:
        return _too_small(logits)
    if type(target) not in loss._TENSOR_TYPES:
        return _subclass("target", target)
    if has_torch_function_variadic(logits, target, weight) and not loss._only_a_default_device(
        weight
    ):
        modes = [m for m in _get_current_function_mode_stack() if type(m) is not DeviceContext]
        return f"under {_name(type(modes[-1]))}" if modes else _subclass("weight", weight)
    return (
        _of_places(logits, target)
        or _of_options(ignore_index, reduction, label_smoothing)
        or _of_watchers()
        or _of_shapes(logits, target, ignore_index)
        or (None if weight is None else _of_weight(logits, weight))
        or _of_check(logits)
    )


def _of_places(logits: Tensor, target: Tensor) -> str | None:
    if logits.device != target.device and (logits.is_cuda or not target.is_cpu):
        return f"logits are on {logits.device}, target is on {target.device}"
    if logits.is_cuda:
        if not loss._ON_GPU:
            return _NO_KERNELS.format("GPU")
        if not backends.serves_gpu(logits.device.index):
            return f"on {logits.device}: {backends.why_not_gpu(logits.device.index)}"
    elif not logits.is_cpu:
        return f"logits are on {logits.device.type}"
    elif not loss._ON_CPU:
        return _NO_KERNELS.format("CPU")
    if logits.dtype not in loss._DTYPES:
        return f"logits are {_dtype(logits)}"
    for name, x in (("logits are", logits), ("target is", target)):
        if x.layout is not torch.strided:
            return f"{name} {str(x.layout).removeprefix('torch.')}"
    return None


def _of_options(ignore_index: Any, reduction: Any, label_smoothing: Any) -> str | None:
    if type(reduction) is not str or reduction not in REDUCTIONS:
        return f"reduction is {reduction!r}"
    if type(ignore_index) is not int:
        return f"ignore_index is {_a(ignore_index)}, not an int"
    if not torch.compiler.is_compiling() and not -(2**63) <= ignore_index < 2**63:
        return f"ignore_index is {ignore_index}, beyond 64 bits"
    if type(label_smoothing) not in (float, int):
        return f"label_smoothing is {_a(label_smoothing)}, not a float"
    if not label_smoothing <= 1.0:
        return f"label_smoothing is {label_smoothing}"
    return None


def _of_watchers() -> str | None:
    if not loss._is_watched():
        return None
    if loss._transforms_active():
        return "under torch.func (grad, vmap, jvp ...)"
    if forward_ad._current_level >= 0:
        return "under forward-mode AD"
    if torch.compiler.is_compiling():
        return "under torch.export"
    if loss._dispatch_modes() > 0:
        return f"under {_name(type(_get_current_dispatch_mode()))}"
    return "under torch.jit.trace"


def _of_shapes(logits: Tensor, target: Tensor, ignore_index: int) -> str | None:
    shape = logits.shape
    if not shape:
        return "logits have no dimension"
    classes = shape[layouts.class_dim(shape)]
    if torch.compiler.is_compiling():
        if not loss._COMPILES_GRADIENTS and torch.is_grad_enabled() and logits.requires_grad:
            return f"under torch.compile of torch {torch.__version__}, before 2.13"
        if loss._is_compiled_too_small(logits.numel()):
            return _too_small(logits)
    elif loss._is_too_small(logits.numel(), classes, logits.is_cuda):
        return _too_small(logits)
    if logits.is_cuda and len(shape) == 1:
        return "logits are one row without a batch, on a GPU: use logits[None]"
    if logits.is_cuda and shape[1] > loss._MAX_CLASSES_ON_GPU:
        return f"{shape[1]} classes are more than GPU kernels count"
    same = loss._surely_same if torch.compiler.is_compiling() else loss.eq
    if target.dtype is torch.int64:
        if not same(target.shape, layouts.row_shape(shape)):
            return f"target is {_shape(target)}, logits are {_shape(logits)}"
    elif target.dtype in loss._DTYPES:
        if target.requires_grad:
            return "target are probabilities that need a gradient"
        if ignore_index >= 0:
            return "target are probabilities, and ignore_index is not negative"
        if not same(target.shape, shape):
            return f"target is {_shape(target)}, logits are {_shape(logits)}"
        if target.dtype != logits.dtype and (
            logits.dtype not in loss._HALF or target.dtype is not torch.float32
        ):
            return f"target is {_dtype(target)}, logits are {_dtype(logits)}"
    else:
        return f"target is {_dtype(target)}: use target.long()"
    return None


def _of_weight(logits: Tensor, weight: Any) -> str | None:
    if type(weight) not in loss._TENSOR_TYPES:
        return _subclass("weight", weight)
    if weight.requires_grad:
        return "weight needs a gradient"
    if weight.device != logits.device:
        return f"weight is on {weight.device}, logits are on {logits.device}"
    if weight.layout is not torch.strided:
        return f"weight is {str(weight.layout).removeprefix('torch.')}"
    classes = logits.shape[layouts.class_dim(logits.shape)]
    if weight.dim() != 1:
        return f"weight has {weight.dim()} dimensions"
    same = loss._surely_same if torch.compiler.is_compiling() else loss.eq
    if not same(weight.shape, (classes,)):
        return f"weight is {_shape(weight)}, classes are {classes}"
    if loss._loss_dtype(weight) != loss._loss_dtype(logits):
        return f"weight is {_dtype(weight)}, logits are {_dtype(logits)}"
    return None


def _of_check(logits: Tensor) -> str | None:
    if not logits.is_cuda or selfcheck.serves("cross_entropy", logits.dtype, logits.device.index):
        return None
    verdict = selfcheck.known("cross_entropy", logits.dtype, logits.device.index)
    return f"not proved on {logits.device}: {verdict or 'not while a CUDA graph is captured'}"


# --- SGD -------------------------------------------------------------------------------------------


def of_step(optimizer: Any) -> str | None:
    """Why torch serves a whole step; None where our kernels take what they can: step.update in
    words."""
    if gather.LAYOUT is None and launch.family() is None:
        return _NO_KERNELS.format("CPU")
    if torch.compiler.is_compiling():
        return "under torch.compile"
    if not step.is_plain_call():
        return "under a mode, a tracer, a transform or forward-mode AD"
    return "differentiable=True" if optimizer.defaults["differentiable"] else None


def of_param(options: dict[str, Any], param: Any, grad: Any, buffer: Any) -> str | None:
    """Why torch updates this parameter of a group with these options; None where nothing of its own
    keeps it from our kernels, as memory that it shares with another does."""
    on_gpu = step.gpu_of(param)
    device = on_gpu or torch.device("cpu")
    group = Groups(tuple(options[name] for name in step.NAMES), on_gpu).structs[0]
    if on_gpu is None and gather.LAYOUT is None:
        return _NO_KERNELS.format("CPU")
    if group.served == NOT_SERVED:
        odd = [name for name in step.NAMES[:4] if type(options[name]) not in (float, int)]
        return f"options are more than numbers: {', '.join(odd or step.NAMES)}"
    tensors = [("parameter", param), ("gradient", grad)]
    if group.has_momentum and buffer is not None:
        tensors.append(("momentum buffer", buffer))
    for name, x in tensors:
        if (memory := shards.local(x)) is None:
            memory = x
        if reason := _of_tensor(name, memory, device):
            return reason
        if not shards.same_sharding(param, x):
            return f"{name} is not sharded as its parameter is"
        if name == "parameter":
            shard = memory
        if memory.dtype is not shard.dtype:
            return f"{name} is {_dtype(memory)}, parameter is {_dtype(shard)}"
        if memory.shape != shard.shape:
            return f"{name} is {_shape(memory)}, parameter is {_shape(shard)}"
        if name == "parameter" and not layouts.is_dense(shard):
            return f"parameter is not dense: shape {_shape(shard)}, strides {shard.stride()}"
        steps = zip(shard.shape, shard.stride(), memory.stride(), strict=True)
        if any(size > 1 and a != b for size, a, b in steps):
            return f"{name} has strides {memory.stride()}, parameter {shard.stride()}"
    if group.served == FLOAT64_SERVED and param.dtype is not torch.float64:
        return "options are beyond float32"
    assert group.served in (SERVED, FLOAT64_SERVED)
    return None


def _of_tensor(name: str, x: Any, device: torch.device) -> str | None:
    if shards.is_dtensor(x):
        return f"{name} is a DTensor that has yet to arrive or to be summed up"
    if type(x) not in gather.PLAIN:
        return _subclass(name, x)
    if x.layout is not torch.strided:
        return f"{name} is {str(x.layout).removeprefix('torch.')}"
    if x.device != device:
        return f"{name} is on {x.device}"
    if x.dtype not in gather.ELEMENTS:
        return f"{name} is {_dtype(x)}"
    if gather.dispatch_keys(x) != gather._plain_keys(device):
        kinds = {"is_neg": "a negative view", "is_inference": "made under inference_mode"}
        words = [kind for test, kind in kinds.items() if getattr(x, test)()]
        return f"{name} is {' and '.join(words) or 'no plain tensor: its dispatch keys differ'}"
    if x.numel() and (x.data_ptr() == 0 or x.data_ptr() % x.element_size()):
        return f"{name} has no memory of its own, or is not aligned"
    return None


# --- words -----------------------------------------------------------------------------------------


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _a(x: Any) -> str:
    return f"a {_name(type(x))}"


def _subclass(name: str, x: Any) -> str:
    if not isinstance(x, Tensor):
        return f"{name}: no tensor but {_a(x)}"
    return f"{name}: a subclass, {_name(type(x))}"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _shape(x: Tensor) -> str:
    return " x ".join(map(str, x.shape)) or "one number"


def _too_small(logits: Tensor) -> str:
    return f"too small to gain: {_shape(logits)}"
