"""The modes of PyTorch in which a loss may be called, for test_cross_entropy_modes.py.

A mode is a function that takes a loss callable (torch's, or ours), calls it its own way on small
inputs and returns what it computed, tensors and plain values in lists of any depth. What torch does is
right: values, gradients, second derivatives and the class of an exception. A new mode is one function.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastopt

STOCK = F.cross_entropy
NOTES: list[str] = []  # what a mode saw on the way: compared with torch's, or shown
N, C = 6, 11
MODES = {}


def mode(function):
    MODES[function.__name__] = function
    return function


def data(dtype=torch.float32, n=N, c=C, grad=True):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, generator=g).to(dtype).requires_grad_(grad)
    return x, torch.randint(0, c, (n,), generator=g)


# ---- eager ----
for _dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for _red in ("mean", "sum", "none"):

        def _plain(ce, dtype=_dtype, red=_red):
            x, t = data(dtype)
            w = torch.linspace(0.5, 2, C).to(dtype)
            out = []
            for kw in ({}, {"label_smoothing": 0.1}, {"weight": w, "ignore_index": int(t[0])}):
                loss = ce(x, t, reduction=red, **kw)
                up = torch.linspace(-1, 3, loss.numel()).reshape(loss.shape).to(loss.dtype)
                out += [loss, *torch.autograd.grad(loss, x, up)]
            p = x.detach().flip(1).softmax(1)
            loss = ce(x, p, reduction=red)
            return [*out, loss, *torch.autograd.grad(loss.sum(), x)]

        MODES[f"eager {str(_dtype)[6:]} {_red}"] = _plain
        if _dtype in (torch.float32, torch.float64):

            def _twice(ce, dtype=_dtype, red=_red):
                x, t = data(dtype)
                w = torch.linspace(0.5, 2, C).to(dtype)
                out = []
                for kw in ({}, {"label_smoothing": 0.1, "weight": w, "ignore_index": int(t[0])}):
                    loss = ce(x, t, reduction=red, **kw)
                    (g,) = torch.autograd.grad(loss.pow(2).sum(), x, create_graph=True)
                    (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
                    (k,) = torch.autograd.grad(h.pow(2).sum(), x)
                    out += [g, h, k]
                return out

            MODES[f"create_graph once, twice, thrice {str(_dtype)[6:]} {_red}"] = _twice


@mode
def penalty_eager(ce):
    x, t = data()
    loss = ce(x * 1, t)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + 100 * g.pow(2).sum()).backward()
    return x.grad


@mode
def create_graph_target_depends(ce):
    x, _t = data(torch.float64)
    return [
        torch.autograd.grad(ce(x, x.softmax(1)), x, create_graph=True)[0],
        torch.autograd.grad(ce(x, x), x, create_graph=True)[0],
    ]


@mode
def probabilities_with_gradient(ce):
    x, _t = data(grad=False)
    p = x.softmax(1).requires_grad_()
    ce(x, p).backward()
    return p.grad


@mode
def hooks_and_retain_grad(ce):
    x, t = data()
    out, calls = [], []
    for create in (False, True):
        y = x * 1
        y.register_hook(lambda g: (calls.append(1), 2 * g)[1])
        out += torch.autograd.grad(ce(y, t), x, create_graph=create)
        z = x * 1
        z.retain_grad()
        ce(z, t).backward(create_graph=create)
        out += [z.grad, torch.tensor(float(len(calls)))]
        x.grad = None
    return out


@mode
def retain_graph_twice(ce):
    x, t = data()
    loss = ce(x, t)
    (3 * loss).backward(retain_graph=True)
    first = x.grad.clone()
    x.grad.mul_(100)
    x.grad.zero_()
    loss.backward(retain_graph=True)
    second = x.grad.clone()
    loss.backward()
    return [first, second, x.grad]


@mode
def backward_a_second_time_raises(ce):
    x, t = data()
    loss = ce(x, t)
    loss.backward()
    loss.backward()


@mode
def is_grads_batched(ce):
    x, t = data()
    out = []
    for red in ("mean", "none"):
        loss = ce(x, t, reduction=red)
        up = torch.linspace(0, 1, 3 * loss.numel()).reshape(3, *loss.shape)
        out += torch.autograd.grad(loss, x, up, is_grads_batched=True, retain_graph=True)
        out += torch.autograd.grad(loss, x, up, is_grads_batched=True)
    return out


@mode
def functional_hessian(ce):
    x, t = data()
    f = torch.autograd.functional
    return [
        f.hessian(lambda x: ce(x, t), x.detach(), vectorize=False),
        f.hessian(lambda x: ce(x, t), x.detach(), vectorize=True),
        f.jacobian(lambda x: ce(x, t, reduction="none"), x.detach(), vectorize=True),
        f.hvp(lambda x: ce(x, t), x.detach(), x.detach().cos())[1],
        f.vhp(lambda x: ce(x, t), x.detach(), x.detach().cos())[1],
    ]


@mode
def functional_forward_mode(ce):
    x, t = data()
    f = torch.autograd.functional
    return [
        f.jacobian(
            lambda x: ce(x, t, reduction="none"),
            x.detach(),
            vectorize=True,
            strategy="forward-mode",
        ),
        f.hessian(
            lambda x: ce(x, t), x.detach(), vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
    ]


@mode
def dual_numbers(ce):
    import torch.autograd.forward_ad as fw

    x, t = data(grad=False)
    with fw.dual_level():
        return fw.unpack_dual(ce(fw.make_dual(x, x.cos()), t)).tangent


@mode
def gradcheck_and_gradgradcheck(ce):
    x, t = data(torch.float64, 3, 4)
    w = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    for red in ("mean", "sum", "none"):
        f = lambda x, red=red: ce(x, t, w, label_smoothing=0.1, reduction=red)
        torch.autograd.gradcheck(f, x, check_batched_grad=True)
        torch.autograd.gradgradcheck(f, x, check_batched_grad=True)


def _in_place(how, red, create):
    def run(ce):
        x, t = data()
        y = x * 1
        loss = ce(y, t, reduction=red).sum()
        with torch.no_grad():
            if how == "mul_":
                y.mul_(2)
            elif how == ".data":
                y.data.mul_(2)
            else:
                y.detach().numpy()[:] = 0
        (g,) = torch.autograd.grad(loss, x, create_graph=create)
        return [g, *torch.autograd.grad(g.pow(2).sum(), x)] if create else g

    return run


for _how in ("mul_", ".data", "numpy"):
    for _red in ("mean", "none"):
        for _create in (False, True):
            MODES[f"in place after forward {_how} {_red}{' create_graph' * _create}"] = _in_place(
                _how, _red, _create
            )


@mode
def in_place_half(ce):
    x, t = data(torch.float16)
    y = x * 1
    loss = ce(y, t)
    with torch.no_grad():
        y.mul_(2)
    return torch.autograd.grad(loss, x)


@mode
def target_changed_in_place_raises(ce):
    x, t = data()
    loss = ce(x, t)
    t.zero_()
    loss.backward()


@mode
def inference_logits(ce):
    with torch.inference_mode():
        x, t = data(grad=False)
    out = [ce(x, t)]
    p = torch.full((N, C), 1 / C, requires_grad=True)
    ce(x, p).backward()
    return [*out, p.grad]


@mode
def inference_target_raises(ce):
    x, _ = data()
    with torch.inference_mode():
        t = torch.zeros(N, dtype=torch.long)
    ce(x, t).backward()
    return x.grad


@mode
def inside_inference_mode(ce):
    with torch.inference_mode():
        return ce(*data(grad=False)) * 1


@mode
def save_on_cpu(ce):
    x, t = data()
    y = x * 1
    with torch.autograd.graph.save_on_cpu():
        loss = ce(y, t, reduction="none").sum() + ce(y, t)
    with torch.no_grad():
        y.mul_(2)
    return torch.autograd.grad(loss, x)


@mode
def hooks_that_deduplicate(ce):
    x, t = data(grad=False)
    store = {}

    def pack(s):
        key = hash(s.detach().numpy().tobytes())
        store.setdefault(key, s.detach().clone())
        return key

    out = []
    for factor in (1, 3):
        with torch.autograd.graph.saved_tensors_hooks(pack, store.__getitem__):
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            la, lb = ce(a, t), ce(b, t)
        (factor * la).backward()
        a.grad.mul_(7)
        (factor * lb).backward()
        out += [a.grad, b.grad]
    return out


@mode
def hooks_that_keep(ce):
    x, t = data()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda s: (kept.append((s, s.detach().clone())), s)[1], lambda s: s
    ):
        loss = ce(x, t)
    (3 * loss).backward()
    assert all(torch.equal(a, b) for a, b in kept)
    return x.grad


@mode
def hooks_disabled(ce):
    x, t = data()
    with torch.autograd.graph.disable_saved_tensors_hooks("no"):
        ce(x, t).backward()
    return x.grad


def _checkpoint(reentrant):
    def run(ce):
        from torch.utils.checkpoint import checkpoint

        x, t = data()
        out = []
        for red in ("mean", "none"):
            x.grad = None
            loss = checkpoint(
                lambda x, red=red: ce(x * 2, t, reduction=red), x, use_reentrant=reentrant
            )
            (loss.sum() * 3).backward()
            out += [loss, x.grad]
        return out

    return run


MODES["checkpoint reentrant"], MODES["checkpoint not reentrant"] = (
    _checkpoint(True),
    _checkpoint(False),
)


@mode
def checkpoint_create_graph(ce):
    from torch.utils.checkpoint import checkpoint

    x, t = data()
    loss = checkpoint(lambda x: ce(x * 2, t), x, use_reentrant=False)
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    return [g, *torch.autograd.grad(g.pow(2).sum(), x)]


@mode
def autocast(ce):
    x, t = data()
    w = torch.eye(C)
    out = []
    for dtype in (torch.bfloat16, torch.float16):
        for red in ("mean", "none"):
            with torch.autocast("cpu", dtype):
                loss = ce(x @ w, t, reduction=red)
            (g,) = torch.autograd.grad(loss.sum() * 1024, x)
            out += [loss, g.to(dtype)]  # it was rounded to the logits' dtype on the way
    return out


@mode
def deterministic(ce):
    torch.use_deterministic_algorithms(True)
    try:
        x, t = data()
        return [torch.autograd.grad(ce(x, t, reduction=r).sum(), x)[0] for r in ("mean", "none")]
    finally:
        torch.use_deterministic_algorithms(False)


@mode
def anomaly_mode(ce):
    x, t = data()
    with torch.autograd.detect_anomaly(check_nan=True):
        return torch.autograd.grad(ce(x, t), x)


@mode
def user_writes_into_grad(ce):
    x, t = data()
    y = x.detach().clone().requires_grad_()
    loss = ce(x, t) + ce(y, t)
    loss.backward(retain_graph=True)
    x.grad.mul_(0)
    loss.backward()
    return [x.grad, y.grad]


@mode
def patched_functional(ce):
    x, t = data()
    if ce is F.cross_entropy:
        return nn.CrossEntropyLoss()(x, t)
    F.cross_entropy, kept = ce, F.cross_entropy
    try:
        return [
            nn.CrossEntropyLoss()(x, t),
            ce(x.to_sparse().to_dense(), t),
            ce(x, t.int().long()),
        ][0]
    finally:
        F.cross_entropy = kept


@mode
def patched_functional_to_stock(ce):
    x = torch.randn(2, 3, dtype=torch.complex64)
    if ce is not F.cross_entropy:
        F.cross_entropy, _kept = ce, F.cross_entropy
    try:
        return F.cross_entropy(x, torch.tensor([0, 1]))
    finally:
        if ce is not F.cross_entropy or ce is fastopt.cross_entropy:
            F.cross_entropy = STOCK


# ---- torch.func, eager and compiled ----
def _func_modes():
    from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

    def at(what, ce):
        x, t = data(grad=False)
        h = torch.linspace(-1, 1, N * 4).reshape(N, 4)
        w = torch.linspace(-1, 1, C * 4).reshape(C, 4)
        loss = lambda x: ce(x, t)
        rows = lambda x: ce(x, t, reduction="none")
        return {
            "grad": (grad(loss), x),
            "vjp": (lambda x: vjp(rows, x)[1](torch.ones(N)), x),
            "jvp": (lambda x: jvp(loss, (x,), (x.cos(),)), x),
            "jacrev": (jacrev(rows), x),
            "jacfwd": (jacfwd(rows), x),
            "hessian": (hessian(loss), x),
            "grad of grad": (grad(lambda x: grad(lambda x: ce(x * 1, t))(x).pow(2).sum()), x),
            "vmap": (vmap(lambda x, t: ce(x, t)), x, t),
            "vmap(grad)": (
                vmap(grad(lambda w, a, b: ce(F.linear(a, w), b)), (None, 0, 0)),
                w,
                h,
                t,
            ),
            "vmap(grad) rows": (
                vmap(grad(lambda w, a, b: ce(F.linear(a, w), b)), (None, 0, 0)),
                w,
                h.expand(2, N, 4),
                t.expand(2, N),
            ),
        }[what]

    names = ("grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian", "grad of grad", "vmap",
             "vmap(grad)", "vmap(grad) rows")  # fmt: skip
    for what in names:

        def eager(ce, what=what):
            f, *args = at(what, ce)
            return f(*args)

        MODES[f"func {what} eager"] = eager
        for backend in ("eager", "aot_eager", "inductor"):

            def compiled(ce, what=what, backend=backend):
                f, *args = at(what, ce)
                return torch.compile(f, backend=backend)(*args)

            MODES[f"func {what} compile {backend}"] = compiled


_func_modes()


@mode
def func_grad_around_compile(ce):
    x, t = data(grad=False)
    return torch.func.grad(torch.compile(lambda x: ce(x, t), backend="aot_eager"))(x)


@mode
def vmap_around_compile(ce):
    x, t = data(grad=False)
    f = torch.compile(lambda x, t: ce(x, t), backend="aot_eager")
    return torch.vmap(f)(x, t)


@mode
def dual_numbers_compiled(ce):
    import torch.autograd.forward_ad as fw

    x, t = data(grad=False)
    f = torch.compile(lambda x: ce(x, t), backend="aot_eager")
    f(x)
    with fw.dual_level():
        return fw.unpack_dual(f(fw.make_dual(x, x.cos()))).tangent


@mode
def functionalize(ce):
    x, t = data(grad=False)
    return torch.func.functionalize(lambda x: ce(x, t))(x)


# ---- torch.compile ----
def _compile_modes(backend):
    def add(name):
        def wrap(function):
            MODES[f"compile {backend}: {name}"] = function
            return function

        return wrap

    def comp(f, **kw):
        return torch.compile(f, backend=backend, **kw)

    @add("fullgraph static")
    def _(ce):
        out = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, t = data(dtype)
            for red in ("mean", "sum", "none"):
                torch._dynamo.reset()  # one code object: nine compilations would hit the limit
                f = comp(
                    lambda x, t, red=red: ce(x, t, reduction=red), fullgraph=True, dynamic=False
                )
                loss = f(x, t)
                out += [loss, *torch.autograd.grad(loss.sum() * 3, x)]
        return out

    @add("fullgraph weight, smoothing, probabilities")
    def _(ce):
        x, t = data()
        w, p = torch.linspace(0.5, 2, C), x.detach().flip(1).softmax(1)
        f = comp(
            lambda x, t: (
                ce(x, t, w, ignore_index=3, label_smoothing=0.1),
                ce(x, p, w, reduction="none"),
            ),
            fullgraph=True,
        )
        a, b = f(x, t)
        return [a, b, *torch.autograd.grad(a + b.sum(), x)]

    @add("fullgraph dynamic=True")
    def _(ce):
        f = comp(lambda x, t: ce(x, t), fullgraph=True, dynamic=True)
        out = []
        for n in (6, 7, 9):
            x, t = data(n=n)
            loss = f(x, t)
            out += [loss, *torch.autograd.grad(loss, x)]
        return out

    @add("no_grad, then with")
    def _(ce):
        x, t = data()
        f = comp(lambda x, t: ce(x, t), fullgraph=True)
        with torch.no_grad():
            a = f(x, t)
        b = f(x, t)
        return [a, b, *torch.autograd.grad(b, x)]

    @add("unbacked batch (mask)")
    def _(ce):
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            x, t = data()

            def f(x, t):
                keep = t != t[0]
                return ce(x[keep], t[keep])

            loss = comp(f, fullgraph=True)(x, t)
            return [loss, *torch.autograd.grad(loss, x)]

    @add("unbacked batch (mark_unbacked)")
    def _(ce):
        x, t = data()
        y = x.detach().clone()
        torch._dynamo.decorators.mark_unbacked(y, 0)
        torch._dynamo.decorators.mark_unbacked(t, 0)
        return comp(lambda x, t: ce(x, t), fullgraph=True)(y, t)

    @add("wrong shapes raise")
    def _(ce):
        x, t = data()
        return comp(lambda x, t: ce(x, t), fullgraph=True)(x, t[:-1])

    @add("labels out of range")
    def _(ce):
        x, t = data()
        return comp(lambda x, t: ce(x, t), fullgraph=True)(x, t + C)

    for red in ("mean", "none"):

        @add(f"in place after {red}")
        def _(ce, red=red):
            x, t = data()

            def f(x):
                y = x * 1
                loss = ce(y, t, reduction=red).sum()
                y.mul_(2)
                return loss + 0 * y.sum()

            return torch.autograd.grad(comp(f)(x), x)

        @add(f"in place outside, after {red}")
        def _(ce, red=red):
            x, t = data()
            y = x * 1
            loss = comp(lambda y: ce(y, t, reduction=red).sum())(y)
            with torch.no_grad():
                y.mul_(2)
            return torch.autograd.grad(loss, x)

        @add(f"penalty around {red}")
        def _(ce, red=red):
            x, t = data()
            loss = comp(lambda x: ce(x * 1, t, reduction=red).sum())(x)
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + 100 * g.pow(2).sum()).backward()
            return x.grad

        for traced in (False, True):

            @add(f"penalty inside {red}{' trace_autograd_ops' * traced}")
            def _(ce, red=red, traced=traced):
                x, t = data()

                def f(x):
                    y = x * 1
                    loss = ce(y, t, reduction=red).sum()
                    (g,) = torch.autograd.grad(loss, y, create_graph=True)
                    return loss + 100 * g.pow(2).sum()

                patch = (
                    {"trace_autograd_ops": traced}
                    if hasattr(torch._dynamo.config, "trace_autograd_ops")
                    else {}
                )
                with torch._dynamo.config.patch(**patch):
                    comp(f)(x).backward()
                return x.grad

    @add("retain_graph twice")
    def _(ce):
        x, t = data()
        loss = comp(lambda x: ce(x, t))(x)
        (3 * loss).backward(retain_graph=True)
        first = x.grad.clone()
        x.grad = None
        loss.backward()
        return [first, x.grad]

    @add("checkpoint inside")
    def _(ce):
        from torch.utils.checkpoint import checkpoint

        x, t = data()
        f = comp(lambda x: checkpoint(lambda x: ce(x * 2, t), x, use_reentrant=False))
        return torch.autograd.grad(f(x), x)

    @add("autocast inside and around")
    def _(ce):
        x, t = data()

        def f(x):
            with torch.autocast("cpu", torch.bfloat16):
                return ce(x @ torch.eye(C), t)

        a = comp(f)(x)
        with torch.autocast("cpu", torch.bfloat16):
            b = comp(lambda x: ce(x @ torch.eye(C), t))(x)
        return [a, b, *torch.autograd.grad(a + b, x)]

    @add("whole training step")
    def _(ce):
        torch.manual_seed(0)
        m = nn.Linear(4, C)
        x, t = torch.randn(N, 4), data()[1]

        def step():
            loss = ce(m(x), t)
            loss.backward()
            return loss

        loss = comp(step)()
        return [loss, *(p.grad for p in m.parameters())]

    for where in ("eager forward", "compiled forward"):

        @add(f"compiled autograd, {where}")
        def _(ce, where=where):
            from torch._dynamo import compiled_autograd

            x, t = data()
            out = []
            for red in ("mean", "none"):
                f = lambda x, red=red: ce(x * 1, t, reduction=red).sum()
                loss = (f if where[0] == "e" else comp(f))(x)
                with compiled_autograd._enable(torch.compile(backend=backend)):
                    (loss * 3).backward()
                out.append(x.grad)
                x.grad = None
            return out

    @add("module, hook on its input")
    def _(ce):
        cls = nn.CrossEntropyLoss if ce is STOCK else fastopt.CrossEntropyLoss
        loss_of = comp(cls(weight=torch.linspace(0.5, 2, C), label_smoothing=0.1), fullgraph=True)
        x, t = data()
        y = x * 1
        y.register_hook(lambda g: 2 * g)
        loss = loss_of(y, t)
        return [loss, *torch.autograd.grad(loss, x)]

    @add("patched functional")
    def _(ce):
        x, t = data()
        F.cross_entropy = ce
        try:
            loss = comp(nn.CrossEntropyLoss(label_smoothing=0.1), fullgraph=True)(x, t)
        finally:
            F.cross_entropy = STOCK
        return [loss, *torch.autograd.grad(loss, x)]

    for stance in (
        "force_eager",
        "eager_on_recompile",
        "fail_on_recompile",
        "aot_eager_then_compile",
    ):

        @add(f"stance {stance}")
        def _(ce, stance=stance):
            f, out = comp(lambda x, t: ce(x * 1, t, reduction="none")), []
            out.append(f(*data()))
            with torch.compiler.set_stance(stance):
                for n in (N, N, N + 1, N + 2):
                    x, t = data(n=n)
                    loss = f(x, t)
                    out += [loss, *torch.autograd.grad(loss.sum(), x)]
            return out

    @add("graph breaks and disabled")
    def _(ce):
        @torch.compiler.disable
        def eager(x, t):
            return ce(x, t, reduction="none")

        def f(x, t):
            a = ce(x * 1, t)
            torch._dynamo.graph_break()
            return a + eager(x, t).sum() + ce(x, t, label_smoothing=0.1)

        x, t = data()
        loss = comp(f)(x, t)
        return [loss, *torch.autograd.grad(loss, x)]

    @add("allow_in_graph")
    def _(ce):
        x, t = data()
        opaque = torch.compiler.allow_in_graph(lambda x, t: ce(x, t, label_smoothing=0.1))
        loss = comp(lambda x, t: opaque(x * 1, t), fullgraph=True)(x, t)
        return [loss, *torch.autograd.grad(loss, x)]

    @add("cond")
    def _(ce):
        x, t = data()

        def f(x, t):
            return torch.cond(
                x.sum() > 0,
                lambda x, t: ce(x * 1, t),
                lambda x, t: ce(x * 2, t, label_smoothing=0.1),
                (x, t),
            )

        loss = comp(f, fullgraph=True)(x, t)
        return [loss, *torch.autograd.grad(loss, x)]

    if backend != "eager":  # which runs torch's own loss on memory that nobody wrote

        @add("nested region")
        def _(ce):
            region = torch.compiler.nested_compile_region(lambda x, t: ce(x * 1, t))
            x, t = data()
            loss = comp(lambda x, t: region(x, t) + region(x * 2, t), fullgraph=True)(x, t)
            return [loss, *torch.autograd.grad(loss, x)]

    @add("compiled autograd by its option")
    def _(ce):
        m, (x, t) = Model(ce), (torch.linspace(-1, 1, N * 4).reshape(N, 4), data()[1])

        def step(x, t):
            loss = m(x, t)
            loss.backward()
            return loss

        with torch._dynamo.config.patch(compiled_autograd=True):
            loss = comp(step)(x, t)
        return [loss, *(p.grad for p in m.parameters())]

    @add("saved tensors on CPU, and a small memory budget")
    def _(ce):
        x, t = data()
        with torch._functorch.config.patch(activation_memory_budget=0.1):
            f = comp(lambda x, t: ce((x * 2).sin().exp(), t, reduction="none").sum())
            with torch.autograd.graph.save_on_cpu():
                loss = f(x, t)
            return [loss, *torch.autograd.grad(3 * loss, x)]

    @add("sizes that change: classes, positions")
    def _(ce):
        out = []
        f = comp(lambda x, t: ce(x, t, label_smoothing=0.1), dynamic=True)
        for c, d in ((5, 3), (7, 3), (7, 4), (9, 9)):
            x = torch.linspace(-1, 1, 2 * c * d).reshape(2, c, d).requires_grad_()
            loss = f(x, torch.arange(2 * d).reshape(2, d) % c)
            out += [loss, *torch.autograd.grad(loss, x)]
        return out

    @add("unbacked classes")
    def _(ce):
        x, t = data()
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            keep = torch.arange(C) < C - 2

            def f(x, t, keep):
                return ce(x[:, keep], t.clamp(max=2), reduction="none")

            loss = comp(f, fullgraph=True)(x, t, keep)
            return [loss, *torch.autograd.grad(loss.sum(), x)]

    @add("dynamic probabilities and weight")
    def _(ce):
        x, p = data()[0], data()[0].detach().softmax(1)
        w = torch.linspace(0.5, 2, C)
        loss = comp(lambda x, p, w: ce(x, p, w, label_smoothing=0.1), dynamic=True)(x, p, w)
        return [loss, *torch.autograd.grad(loss, x)]

    for what, values in (
        ("batch", [{"n": n} for n in (6, 7, 8, 9, 10)]),
        ("ignore_index", [{"ignore_index": i} for i in (-100, 0, 1, 2, 3, 4, -1)]),
        ("label_smoothing", [{"label_smoothing": s} for s in (0.0, 0.1, 0.2, 0.3, 0.4)]),
        ("batch, reduction none", [{"n": n, "reduction": "none"} for n in (6, 7, 8, 9, 10)]),
    ):
        if backend == "eager":

            @add(f"compilations for varied {what}")
            def _(ce, values=values):
                from torch._dynamo.testing import CompileCounter

                count = CompileCounter()
                f = torch.compile(lambda x, t, kw: ce(x, t, **kw), backend=count)
                for kw in values:
                    kw = dict(kw)
                    x, t = data(n=kw.pop("n", N))
                    f(x, t, kw)
                NOTES.append(f"{count.frame_count}")


for _backend in ("eager", "aot_eager", "inductor"):
    _compile_modes(_backend)


def _inductor_modes():
    def add(name, **options):
        def run(ce):
            out = []
            for red in ("mean", "none"):
                x, t = data(n=64, c=33)  # wider than a vector
                f = torch.compile(lambda x, t, red=red: ce(x * 1, t, reduction=red), **options)
                for factor in (1, 3):
                    loss = f(x, t)
                    out += [loss, *torch.autograd.grad(loss.sum() * factor, x)]
                with torch.no_grad():
                    out.append(f(x, t))
                torch._dynamo.reset()
            return out

        MODES[f"inductor {name}"] = run

    add("reduce-overhead", mode="reduce-overhead")
    add("max-autotune", mode="max-autotune")
    add("cpp_wrapper", options={"cpp_wrapper": True})
    add("freezing", options={"freezing": True})
    add("dynamic, reduce-overhead", mode="reduce-overhead", dynamic=True)


_inductor_modes()


@mode
def inductor_ahead_of_time(ce):
    import tempfile

    x, t = torch.linspace(-1, 1, N * 4).reshape(N, 4), data()[1]
    out = []
    for red in ("mean", "none"):
        b = torch.export.Dim("b", min=2, max=4096)
        shapes = {"x": {0: b}, "t": {0: b}}
        program = torch.export.export(Model(ce, red).eval(), (x, t), dynamic_shapes=shapes)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = torch._inductor.aoti_compile_and_package(
                program, package_path=f"{folder}/model.pt2"
            )
            model = torch._inductor.aoti_load_package(path)
            out += [model(x, t), model(x[:4], t[:4])]
    return out


# ---- capture ----
class Model(nn.Module):
    def __init__(self, ce, reduction="mean"):
        super().__init__()
        torch.manual_seed(0)
        self.ce, self.head, self.reduction = ce, nn.Linear(4, C), reduction

    def forward(self, x, t):
        return self.ce(self.head(x), t, reduction=self.reduction)


def _export_modes():
    from torch.export import Dim, export

    x, t = torch.linspace(-1, 1, N * 4).reshape(N, 4), data()[1]
    for strict in (True, False):
        for what in ("static", "Dim", "AUTO"):
            for red in ("mean", "none"):

                def run(ce, strict=strict, what=what, red=red):
                    m = Model(ce, red)
                    shapes = None
                    if what == "Dim":
                        b = Dim("b", min=2, max=4096)
                        shapes = {"x": {0: b}, "t": {0: b}}
                    elif what == "AUTO":
                        shapes = {"x": {0: Dim.AUTO}, "t": {0: Dim.AUTO}}
                    p = export(m, (x, t), dynamic_shapes=shapes, strict=strict)
                    NOTES.append(f"{p.range_constraints}" * (what != "static"))
                    NOTES.append("op in graph" * ("fastopt" in str(p.graph)))
                    q = p.module()
                    n = N if what == "static" else 4
                    loss = q(x[:n], t[:n])
                    loss.sum().backward()
                    d = p.run_decompositions().module()(x[:n], t[:n])
                    return [loss, d, *(w.grad for w in q.parameters())]

                MODES[f"export strict={strict} {what} {red}"] = run

    @mode
    def func_grad_of_exported(ce):
        p = export(Model(ce), (x, t)).module()
        return torch.func.grad(lambda x: p(x, t))(x)

    @mode
    def penalty_through_exported(ce):
        p = export(Model(ce), (x, t)).module()
        y = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(p(y, t), y, create_graph=True)
        return torch.autograd.grad(g.pow(2).sum(), y)

    @mode
    def saved_export(ce):
        import io

        file = io.BytesIO()
        torch.export.save(export(Model(ce), (x, t)), file)
        file.seek(0)
        loaded = torch.export.load(file)
        return [loaded.module()(x, t), "fastopt" in str(loaded.graph)]

    @mode
    def export_of_loss_and_gradients(ce):
        from torch.export.experimental import _export_forward_backward

        program = export(Model(ce), (x, t), strict=True)
        joint = _export_forward_backward(program)
        return joint.graph_module(*(p.detach() for p in program.parameters()), x, t)

    @mode
    def draft_export(ce):
        return torch.export.draft_export(Model(ce), (x, t)).module()(x, t)

    @mode
    def export_compiled_again(ce):
        program = export(Model(ce), (x, t)).module()
        loss = torch.compile(program, backend="aot_eager")(x, t)
        loss.backward()
        return [loss, *(p.grad for p in program.parameters())]

    @mode
    def ahead_of_time_functions(ce):
        from torch._functorch.aot_autograd import aot_export_module, aot_function

        (y, u), out = data(), []
        loss = aot_function(lambda x, t: ce(x * 1, t), fw_compiler=lambda g, _: g)(y, u)
        out += [loss, *torch.autograd.grad(loss, y)]
        m = Model(ce)
        tupled = Model(lambda *call, **kw: (ce(*call, **kw),))
        for joint in (False, True):
            kw = {"output_loss_index": 0} if joint else {}
            graph, _ = aot_export_module(tupled, (x, t), trace_joint=joint, **kw)
            out += graph(*(p.detach() for p in m.parameters()), x, t)
        return out

    for dynamo in (False, True):

        def onnx(ce, dynamo=dynamo):
            import io

            for package in ("onnx", "onnxscript", "onnxruntime"):
                pytest.importorskip(package, reason=f"torch's ONNX exporters need {package}")
            import onnxruntime

            file = io.BytesIO()
            made = torch.onnx.export(
                Model(ce).eval(), (x, t), file, dynamo=dynamo, input_names=["x", "t"], verbose=False
            )
            if made is not None:
                made.save(file)
            session = onnxruntime.InferenceSession(file.getvalue())
            run = session.run(None, {"x": x.numpy(), "t": t.numpy()})
            return [torch.tensor(value) for value in run]

        MODES[f"onnx dynamo={dynamo}"] = onnx


_export_modes()

for _kind in ("real", "fake", "symbolic"):

    def _make_fx(ce, kind=_kind):
        from torch.fx.experimental.proxy_tensor import make_fx

        x, t = data()
        f = lambda x, t: torch.autograd.grad(ce(x, t) * 3, x)
        g = make_fx(f, tracing_mode=kind)(x, t)
        return [*g(x, t), make_fx(lambda x, t: ce(x, t), tracing_mode=kind)(x, t)(x, t)]

    MODES[f"make_fx {_kind}"] = _make_fx


@mode
def fake_tensor_mode(ce):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, t = torch.randn(N, C, requires_grad=True), torch.zeros(N, dtype=torch.long)
        out = []
        for red in ("mean", "none"):
            loss = ce(x, t, reduction=red)
            loss.sum().backward()
            out += [tuple(loss.shape), tuple(x.grad.shape)]
    return out


@mode
def meta_tensors(ce):
    x = torch.empty(N, C, device="meta", requires_grad=True)
    loss = ce(x, torch.empty(N, dtype=torch.long, device="meta"))
    loss.backward()
    return [tuple(loss.shape), x.grad.shape]


@mode
def jit_trace(ce):
    x, t = data()
    out = []
    for grad in (True, False):
        j = torch.jit.trace(lambda x, t: ce(x * 1, t), (x.detach().clone().requires_grad_(grad), t))
        NOTES.append("op in trace" * ("fastopt" in str(j.graph)))
        out += [j(x, t), *torch.autograd.grad(j(x, t), x)]
    return out


@mode
def jit_script_module(ce):
    cls = nn.CrossEntropyLoss if ce is STOCK else fastopt.CrossEntropyLoss

    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = cls(label_smoothing=0.1, weight=torch.linspace(0.5, 2, C))

        def forward(self, x, t):
            return self.loss(x, t)

    x, t = data()
    s = torch.jit.script(M())
    return [s(x, t), *torch.autograd.grad(s(x, t), x)]


@mode
def jit_script_function(ce):
    x, t = data()
    s = torch.jit.script(ce)
    return [s(x, t), *torch.autograd.grad(s(x, t, reduction="sum"), x)]


@mode
def flop_counter(ce):
    from torch.utils.flop_counter import FlopCounterMode

    x, t = data()
    with FlopCounterMode(display=False):
        return torch.autograd.grad(ce(x, t), x)


@mode
def pickle_and_deepcopy_of_module(ce):
    import copy
    import pickle

    cls = nn.CrossEntropyLoss if ce is STOCK else fastopt.CrossEntropyLoss
    m = pickle.loads(pickle.dumps(copy.deepcopy(cls(weight=torch.ones(C)))))
    return m(*data())


@mode
def multiprocessing_threads(ce):
    import threading

    x, t = data()
    loss = ce(x, t)
    out = []
    th = threading.Thread(target=lambda: out.extend(torch.autograd.grad(loss, x)))
    th.start()
    th.join()
    return out


# ---- more that looks on: dispatch modes, hooks, function modes, tracers ----
@mode
def selective_checkpoint(ce):
    from torch.utils import checkpoint as c

    x, t = data()
    kept = [torch.ops.aten._log_softmax.default]
    f = lambda x: ce(x * 2, t, label_smoothing=0.1)
    context = lambda: c.create_selective_checkpoint_contexts(kept)
    loss = c.checkpoint(f, x, use_reentrant=False, context_fn=context)
    return [loss, *torch.autograd.grad(loss, x)]


@mode
def mutation_of_saved_tensors_allowed(ce):
    x, t = data()
    y = x * 1
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        loss = ce(y, t)
        y.mul_(2)
        t.zero_()
        return torch.autograd.grad(loss, x)


@mode
def hooks_on_graphs_and_accumulation(ce):
    x, t = data()
    y, seen = x.detach().clone().requires_grad_(), []
    x.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    torch.autograd.graph.register_multi_grad_hook([x, y], lambda grads: seen.extend(grads))
    with torch.autograd.set_multithreading_enabled(False):
        (ce(x, t) + 2 * ce(y, t, reduction="sum")).backward(inputs=[x, y])
    z = x * 1
    edge = torch.autograd.graph.get_gradient_edge(z)
    return [*seen, *torch.autograd.grad(ce(z, t), edge)]


@mode
def a_mode_that_counts(ce):
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    x, t = data()
    with Count():
        (g,) = torch.autograd.grad(ce(x, t), x)
    return [g, names]


@mode
def a_function_mode_and_a_subclass(ce):
    from torch.overrides import TorchFunctionMode

    names = []

    class Count(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    class Mine(torch.Tensor):
        pass

    x, t = data()
    with Count():
        loss = ce(x, t)
    of_mine = ce(x.as_subclass(Mine), t)
    plain = of_mine.as_subclass(torch.Tensor)
    return [loss, names.count("cross_entropy"), plain, type(of_mine).__name__]


@mode
def default_dtype_of_float64(ce):
    torch.set_default_dtype(torch.float64)
    try:
        x, t = data()
        return [ce(x, t), *torch.autograd.grad(ce(x.double(), t, label_smoothing=0.1), x)]
    finally:
        torch.set_default_dtype(torch.float32)


@mode
def negated_and_zero_tensors(ce):
    x, t = data(grad=False)
    w, up = torch.linspace(-2, -0.5, C), torch.linspace(-1, 1, N)
    y = torch._neg_view(x).requires_grad_()
    loss = ce(y, t, torch._neg_view(w), reduction="none")
    out = [loss, *torch.autograd.grad(loss, y, torch._neg_view(up), retain_graph=True)]
    out += torch.autograd.grad(loss, y, torch._efficientzerotensor((N,)))
    return [*out, ce(x, torch._neg_view(x)), ce(torch._efficientzerotensor((N, C)), t)]


@mode
def linearize(ce):
    x, t = data(grad=False)
    value, push = torch.func.linearize(lambda x: ce(x, t), x)
    return [value, push(x.cos())]


@mode
def functional_call(ce):
    m, x, t = nn.Linear(4, C), torch.linspace(-1, 1, N * 4).reshape(N, 4), data()[1]
    params = {"weight": torch.linspace(-1, 1, 4 * C).reshape(C, 4), "bias": torch.zeros(C)}
    f = lambda params: ce(torch.func.functional_call(m, params, x), t)
    plain = {name: p.clone().requires_grad_() for name, p in params.items()}
    return [*torch.func.grad(f)(params).values(), *torch.autograd.grad(f(plain), plain.values())]


@mode
def symbolic_trace(ce):
    class M(nn.Module):
        def forward(self, x, t):
            return ce(x, t, label_smoothing=0.1)

    x, t = data()
    traced = torch.fx.symbolic_trace(M())
    return [traced(x, t), str(traced.graph).count("cross_entropy")]


@mode
def scaler(ce):
    from torch.amp import GradScaler

    x, t = data(torch.float16)
    opt, scaler = torch.optim.SGD([p := x.detach().float().requires_grad_()], 1), GradScaler("cpu")
    for _ in range(2):
        opt.zero_grad()
        scaler.scale(ce(p.half(), t, reduction="sum")).backward()
        scaler.step(opt)
        scaler.update()
    return p.half()


@mode
def sharded_logits(ce):
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    x, t = data(grad=False)
    # A fake group does not copy in torch 2.10: its tensors hold whatever was there.
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        y = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
        u = distribute_tensor(t, mesh, [Replicate()])
        with loss_parallel():
            loss = ce(y, u)
            (g,) = torch.autograd.grad(loss, y)
        return [loss.to_local(), g.to_local()]
    finally:
        dist.destroy_process_group()


@mode
def tensorboard_graph(ce):
    pytest.importorskip("tensorboard", reason="TensorBoard's add_graph needs tensorboard")
    from torch.utils.tensorboard._pytorch_graph import graph

    found, _ = graph(Model(ce), (torch.zeros(N, 4), data()[1]))
    return sorted(node.op for node in found.node)


@mode
def frozen_script(ce):
    cls = nn.CrossEntropyLoss if ce is STOCK else fastopt.CrossEntropyLoss
    x, t = data()
    s = torch.jit.freeze(torch.jit.script(cls(weight=torch.linspace(0.5, 2, C)).eval()))
    return [s(x, t), s(x, x.softmax(1)), *torch.autograd.grad(s(x, t), x)]


@mode
def saved_trace(ce):
    import io

    t, file = data()[1], io.BytesIO()
    torch.jit.save(torch.jit.trace(Model(ce), (torch.ones(N, 4), t)), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    return [loaded(torch.ones(N, 4), t), "fastopt" in str(loaded.graph)]
