"""Calls of the loss of every kind, and the modes that test_cross_entropy_modes.py crosses them with.

The calls are a table, and so are the modes: a way takes the loss as a function of the logits and
returns what it computed, a capture takes what computes the losses of many calls and returns the same,
compiled, traced or exported. A new one is one function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product, starmap

import torch
from torch import nn

from cross_entropy_cases import (
    DTYPES,
    OPTIONS,
    REDUCTIONS,
    classes_last,
    contiguous,
    every_second_class,
    every_second_position,
    expanded_rows,
    make_probabilities,
    make_target,
    random_upstream,
    spatial_swapped,
    transposed,
)
from fastopt import backends, loss

# As users run it, the crossover is brought down so far that most of them are large enough for our
# kernels. (Of calls beyond the real one torch's float16 adds up more than it can hold.)
SCALE = 1 if backends.ALWAYS else 48
if not backends.ALWAYS:
    loss._MIN_COST, loss._MIN_LOGITS = 6000, 6000 // (1 + loss._ROW_COST)
LAYOUTS = {
    "rows": ((6 * SCALE, 11), contiguous),
    "transposed": ((6 * SCALE, 11), transposed),
    "every second class": ((6 * SCALE, 11), every_second_class),
    "one row repeated": ((6 * SCALE, 11), expanded_rows),
    "one row": ((11,), contiguous),
    "image": ((2 * SCALE, 5, 3, 4), contiguous),
    "channels_last": ((2 * SCALE, 5, 3, 4), classes_last),
    "positions swapped": ((2 * SCALE, 5, 3, 4), spatial_swapped),
    "volume": ((2 * SCALE, 5, 2, 3, 2), every_second_position),
}
TARGETS = ("labels", "probabilities", "float32 probabilities")
OF_CALLS = ("plain", "weight", "weight-zeros", "weight-negative", "smoothing", "smoothing-full",
            "ignored", "ignored-class-1", "ignored-smoothing-weight", "all-ignored")  # fmt: skip


@dataclass(frozen=True)
class Call:
    dtype: torch.dtype
    reduction: str
    layout: str
    target: str
    options: str

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype} {self.reduction} {self.layout} {self.target} {self.options}"

    def inputs(self, exact=False):
        """Logits, target and keyword arguments; in float64, if exact."""
        shape, layout = LAYOUTS[self.layout]
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        x = layout(values.double() if exact else values)
        t = make_target(x)
        if self.target != "labels":
            t = make_probabilities(values, torch.float32 if "32" in self.target else None)
        t, kw = OPTIONS[self.options].apply(values, t)
        if exact:
            t, kw = (t.double() if t.is_floating_point() else t), dict(kw)
            kw |= {name: v.double() for name, v in kw.items() if isinstance(v, torch.Tensor)}
        return x, t, {**kw, "reduction": self.reduction}


HALF = (torch.bfloat16, torch.float16)
CALLS = [
    call
    for call in starmap(Call, product(DTYPES, REDUCTIONS, LAYOUTS, TARGETS, OF_CALLS))
    if (call.target == "labels" or "ignored" not in call.options)
    and (call.target != "float32 probabilities" or call.dtype in HALF)
][:: 1 if backends.ALWAYS else 7]
WAYS = {}


def way(function):
    WAYS[function.__name__] = function
    return function


@way
def backward(loss_of, x):
    x.requires_grad_()
    loss = loss_of(x)
    loss.backward(random_upstream(loss))
    return [loss, x.grad, x.grad.stride()]


@way
def backward_twice(loss_of, x):
    x.requires_grad_()
    loss = loss_of(x)
    up = random_upstream(loss)
    return [*torch.autograd.grad(loss, x, up, retain_graph=True),
            *torch.autograd.grad(loss, x, 3 * up)]  # fmt: skip


@way
def gradient_of_gradient(loss_of, x):
    x.requires_grad_()
    loss = loss_of(x * 1)
    (g,) = torch.autograd.grad(loss, x, random_upstream(loss), create_graph=True)
    return [g, *torch.autograd.grad(g.square().sum(), x)]


@way
def hessian_times_vector(loss_of, x):
    x.requires_grad_()
    (g,) = torch.autograd.grad(loss_of(x).sum(), x, create_graph=True)
    return torch.autograd.grad(g, x, x.detach().cos())


@way
def gradients_in_batches(loss_of, x):
    x.requires_grad_()
    loss = loss_of(x)
    up = random_upstream(loss)
    return torch.autograd.grad(loss, x, torch.stack([up, 2 * up]), is_grads_batched=True)


@way
def infinite_upstream(loss_of, x):
    x.requires_grad_()
    loss = loss_of(x)
    every = [torch.full_like(loss, value) for value in (math.inf, -math.inf, math.nan, 0.0)]
    some = random_upstream(loss).flatten()
    some[::2], some[1::4] = math.inf, math.nan
    return [torch.autograd.grad(loss, x, up.view(loss.shape), retain_graph=True)[0]
            for up in (*every, some)]  # fmt: skip


@way
def logits_changed(loss_of, x):
    x.requires_grad_()
    y = x * 1
    loss = loss_of(y)
    y.data.zero_()
    return torch.autograd.grad(loss, x, random_upstream(loss))


@way
def without_gradient(loss_of, x):
    with torch.no_grad():
        out = [loss_of(x)]
    with torch.inference_mode():
        return [*out, loss_of(x) * 1]


@way
def under_autocast(loss_of, x):
    x.requires_grad_()
    out = []
    for dtype in HALF:
        with torch.autocast("cpu", dtype):
            loss = loss_of(x)
        out += [loss, *torch.autograd.grad(loss, x, random_upstream(loss))]
    return out


@way
def saved_on_cpu(loss_of, x):
    with torch.autograd.graph.save_on_cpu():
        return backward(loss_of, x)


@way
def functional_gradient(loss_of, x):
    return [torch.func.grad(lambda x: loss_of(x).sum())(x)]


SAMPLE = CALLS[::59]  # for whole graphs
CAPTURES = {}
for _backend, _dynamic in product(("eager", "aot_eager", "inductor"), (None, True)):

    def _compiled(f, *xs, options={"backend": _backend, "dynamic": _dynamic}):  # noqa: B006
        return torch.compile(f, fullgraph=True, **options)

    CAPTURES[f"compile {_backend}{' dynamic' * bool(_dynamic)} all"] = _compiled


def capture(function):
    CAPTURES[function.__name__] = function
    return function


@capture
def traced_by_make_fx(f, *xs):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(f, pre_dispatch=True)(*xs)


@capture
def traced_by_jit(f, *xs):
    return torch.jit.trace(f, xs, check_trace=False)


@capture
def exported(f, *xs):
    module = nn.Module()
    module.forward = f
    return torch.export.export(module, xs).module()


def losses_and_gradients(ce, calls, capture=None, exact=False):
    """Of many calls in one graph."""
    xs, ts, kws = zip(*(call.inputs(exact) for call in calls), strict=True)
    for x in xs:
        x.requires_grad_()

    def f(*xs):
        return tuple(ce(x, t, **kw) for x, t, kw in zip(xs, ts, kws, strict=True))

    losses = (f if capture is None else capture(f, *xs))(*xs)
    ups = [random_upstream(loss) for loss in losses]
    return list(zip(losses, torch.autograd.grad(losses, xs, ups), strict=True))
