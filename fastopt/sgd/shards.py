"""The local shards of DTensors (FSDP2, tensor parallelism), which an update that goes element by
element takes for tensors of their own.

torch's own step runs through DTensor's dispatch, 90 us for each parameter.
"""

import sys
from typing import Any

from torch import Tensor

from fastopt.sgd.gather import PLAIN, attributes_of

Tensors = tuple[Any, ...]
_MODULE = "torch.distributed.tensor"
_OTHER: Any = ...  # in the place of a tensor that the kernels cannot take: gather does not, either
_local_tensors, _specs = attributes_of("_local_tensor"), attributes_of("_spec")


def is_dtensor(tensor: Any) -> bool:
    """Whether it is exactly a DTensor: a subclass may mean anything."""
    # Not imported: then there is no DTensor.
    return type(tensor) is getattr(sys.modules.get(_MODULE), "DTensor", None)


def any_dtensor(tensors: Tensors) -> bool:
    return _MODULE in sys.modules and any(map(is_dtensor, tensors))


def local(tensor: Any) -> Tensor | None:
    """The memory of a tensor: itself, or the local shard of a DTensor. None if there is more to it:
    other subclasses, shards that have yet to arrive or to be summed up."""
    if type(tensor) in PLAIN:
        return tensor
    if is_dtensor(tensor) and not _is_partial(tensor._spec):
        shard = tensor._local_tensor
        if type(shard) in PLAIN:
            return shard
    return None


def same_sharding(param: Any, other: Any) -> bool:
    """Of two that have local memory: whether that of one is the same part of the whole."""
    if type(param) in PLAIN or type(other) in PLAIN:
        return type(param) in PLAIN and type(other) in PLAIN
    return _same_spec(param._spec, other._spec)


def locals_of(params: Tensors, *others: Tensors) -> tuple[Tensors, ...]:
    """The local memory of parameters and of what goes with each, as gradients, in their places. None
    stays None; what the kernels cannot take becomes what gather takes for no tensor."""
    return (
        tuple(map(_matching, params, params)),
        *(tuple(map(_matching, params, tensors)) for tensors in others),
    )


def _matching(param: Any, tensor: Any) -> Any:
    if tensor is None:
        return None
    shard = local(tensor)
    if shard is None or local(param) is None or not same_sharding(param, tensor):
        return _OTHER
    return shard


def _same_spec(a: Any, b: Any) -> bool:
    # Not all of the specs: their strides are those of a whole that is nowhere.
    return a is b or (
        (a.shape, a.placements, a.mesh) == (b.shape, b.placements, b.mesh)
        # Of placements that shard one dimension twice (torch 2.11 and later).
        and getattr(a, "shard_order", None) == getattr(b, "shard_order", None)
    )


def _is_partial(spec: Any) -> bool:
    return any(placement.is_partial() for placement in spec.placements)


class Shards:
    """locals_of for every step: specs are compared once, while they stay the same. No tensor is kept.
    Its memory may be another in each step, as FSDP2's is after a move."""

    def __init__(self) -> None:
        self.known: Tensors = ()

    def of(self, params: Tensors, grads: Tensors, buffers: Tensors) -> tuple[Tensors, ...]:
        """As locals_of; buffers may be ()."""
        tensors, count = params + grads + buffers, len(params)
        kinds = set(map(type, tensors))
        if len(kinds) == 1 and is_dtensor(tensors[0]):
            specs = _specs(tensors)
            if specs == self.known or self._fit(specs, count):
                self.known = specs
                shards = _local_tensors(tensors)
                return shards[:count], shards[count : 2 * count], shards[2 * count :]
        return locals_of(params, grads, buffers) if buffers else (*locals_of(params, grads), ())

    @staticmethod
    def _fit(specs: Tensors, count: int) -> bool:
        own = specs[:count]
        return not any(map(_is_partial, own)) and all(
            map(_same_spec, own * (len(specs) // count), specs)
        )
