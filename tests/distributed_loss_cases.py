"""What holds for the loss over sharded classes and rows on every rank of a world of any size; ranks.py
runs it. The oracle is torch's loss of the whole logits, in float64, which every rank computes alone.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

import fastopt
from fastopt import distributed
from sgd_oracle import assert_same_bits, class_or_value, values

C = 37  # not a multiple of 2 or 3
ROWS = 24


def labels(rows: Any = (ROWS,), ignored: float = 0.3, classes: int = C) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    found = torch.randint(classes, rows, generator=generator)
    found[torch.rand(rows, generator=generator) < ignored] = -100
    return found


def parts(classes: int = C) -> list[tuple[int, int]]:
    """DTensor's split: (start, end) of each rank."""
    size = dist.get_world_size()
    each = -(-classes // size)
    return [(min(r * each, classes), min((r + 1) * each, classes)) for r in range(size)]


def on_ranks(
    logits: Tensor,
    target: Tensor,
    weight: Any = None,
    split: Any = None,
    upstream: Any = 1.5,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of this rank's logits."""
    dim = 0 if logits.dim() == 1 else 1
    start, end = (split or parts(logits.shape[dim]))[dist.get_rank()]
    own = slice(start, end)
    x = logits.narrow(dim, start, end - start).clone().requires_grad_()
    if target.is_floating_point():
        target = target.narrow(dim, start, end - start)
    w = None if weight is None else weight[own]
    place = {"num_classes": logits.shape[dim]} | ({} if split is None else {"class_start": start})
    loss = distributed.cross_entropy(x, target, w, **place, **how)
    (loss * upstream).sum().backward()
    return loss.detach(), x.grad


def expected(
    logits: Tensor,
    target: Tensor,
    weight: Any = None,
    z: float = 0.0,
    upstream: Any = 1.5,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    x = logits.double().requires_grad_()
    t = target.double() if target.is_floating_point() else target
    w = None if weight is None else weight.double()
    loss = fastopt.loss.reference.cross_entropy(
        *(x, t, w),
        fastopt.loss.Options(
            *(how.get("ignore_index", -100), how.get("label_smoothing", 0.0)),
            *(fastopt.loss.REDUCTIONS[how.get("reduction", "mean")], torch.float64, z),
        ),
    )
    if z == 0.0:
        torch.testing.assert_close(loss, F.cross_entropy(x, t, w, **how), equal_nan=True)
    (loss * upstream).sum().backward()
    # Rows that are ignored have gradient 0 where there is none to divide by, too.
    return loss.detach(), x.grad


def compare(
    logits: Tensor, target: Tensor, weight: Any = None, split: Any = None, **how: Any
) -> None:
    loss, grad = on_ranks(logits, target, weight, split, **how)
    z = how.pop("lse_square_scale", 0.0)
    right, right_grad = expected(logits, target, weight, z, **how)
    dim = 0 if logits.dim() == 1 else 1
    start, end = (split or parts(logits.shape[dim]))[dist.get_rank()]
    right_grad = right_grad.narrow(dim, start, end - start)
    rounding = {torch.float64: 1e-13, torch.float32: 2e-6}.get(logits.dtype, 1e-2)
    close = {"rtol": rounding, "atol": rounding, "equal_nan": True, "check_dtype": False}
    torch.testing.assert_close(loss, right, **close)
    torch.testing.assert_close(grad, right_grad, **close)
    assert grad.dtype is logits.dtype
    same_on_every_rank(loss)


def same_on_every_rank(x: Tensor) -> None:
    every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(every, x)
    for other in every:
        assert_same_bits(x, other)


def check_loss_options() -> None:
    logits = 3 * values((ROWS, C))
    weight = values(C, seed=1).abs() + 0.1
    for ignored, smoothing, w, reduction, z in itertools.product(
        (0.0, 0.3, 1.0), (0.0, 0.1), (None, weight), ("mean", "sum", "none"), (0.0, 1e-3)
    ):
        how = {"reduction": reduction, "label_smoothing": smoothing, "lse_square_scale": z}
        compare(logits, labels(ignored=ignored), w, **how)


def check_probabilities() -> None:
    logits, target = 3 * values((ROWS, C)), values((ROWS, C), seed=5).softmax(1)
    for smoothing, w, reduction in itertools.product(
        (0.0, 0.1), (None, values(C, seed=1).abs()), ("mean", "sum", "none")
    ):
        compare(logits, target, w, reduction=reduction, label_smoothing=smoothing)


def check_shapes_and_dtypes() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        compare(values((ROWS, C), dtype), labels(), reduction="sum")
    for shape in ((3, C, 5), (2, C, 2, 3), (C,), (0, C), (5, 1), (5, 2)):
        rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
        classes = shape[0 if len(shape) == 1 else 1]
        for reduction in ("mean", "none"):
            compare(values(shape), labels(rows, 0.0, classes), reduction=reduction)
    large = values((700, 3 * 701))  # several chunks
    compare(large, labels((700,), 0.3, 3 * 701), label_smoothing=0.1)


def check_odd_splits() -> None:
    """Any split in order will do, ranks without classes too; and labels at every edge."""
    size = dist.get_world_size()
    for ends in ([0] * (size - 1), [C] * (size - 1), [5 * (r + 1) for r in range(size - 1)]):
        edges = [0, *ends, C]
        split = list(itertools.pairwise(edges))
        target = torch.tensor(
            [0, C - 1, *(min(max(e, 0), C - 1) for e in edges), *[e - 1 for e in edges[1:] if e]]
        )
        compare(values((len(target), C)), target, None, split, label_smoothing=0.1)


def check_hazards() -> None:
    """A common offset, whole parts of -inf, NaN in ignored rows."""
    logits, target = values((4, C)), torch.tensor([1, C - 1, 5, -100])
    compare(logits + 1e4, target)
    hidden = logits.clone()
    hidden[:2, 2 : C - 2] = -math.inf
    compare(hidden, target)
    nothing = logits.clone()
    nothing[3] = math.nan
    loss, grad = on_ranks(nothing, target)
    assert loss.isfinite() and (grad[3] == 0).all()
    loss, _ = on_ranks(torch.full((2, C), -math.inf), torch.tensor([0, 1]), reduction="none")
    assert loss.isnan().all()


def check_upstream_and_versions() -> None:
    logits, target = values((ROWS, C)), labels(ignored=0.0)
    compare(logits, target, reduction="none", upstream=values(ROWS, seed=8))
    start, end = parts()[dist.get_rank()]
    x = logits[:, start:end].clone().requires_grad_()
    loss = distributed.cross_entropy(x, target, num_classes=C)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert_same_bits(first, torch.autograd.grad(loss, x, retain_graph=True)[0])
    with torch.no_grad():
        x.add_(1)
    assert class_or_value(loss.backward) is RuntimeError


def check_collectives() -> None:
    """One in forward, none in backward, whatever the options."""
    start, end = parts()[dist.get_rank()]
    x = values((ROWS, C))[:, start:end].requires_grad_()
    w = values(C)[start:end].abs()
    mode = CommDebugMode()
    with mode:
        loss = distributed.cross_entropy(x, labels(), w, num_classes=C, label_smoothing=0.1)
    assert mode.get_total_counts() == 1, mode.get_comm_counts()
    with mode:
        loss.backward()
    assert mode.get_total_counts() == 0, mode.get_comm_counts()


def check_errors() -> None:
    """A label out of range, on one rank only: IndexError on every one, and nobody hangs."""
    for wrong in (C, -1):
        for rank in {0, dist.get_world_size() - 1}:
            target = labels(ignored=0.0)
            if dist.get_rank() == rank:
                target[2] = wrong
            assert class_or_value(lambda t=target: on_ranks(values((ROWS, C)), t)) is IndexError
    x, target = values((ROWS, 5)), labels(ignored=0.0, classes=5)

    def error(*call: Any, **how: Any) -> Any:
        return class_or_value(lambda: distributed.cross_entropy(*call, **how))

    assert error(x, target[:3]) is ValueError
    assert error(x, target.int()) is TypeError
    assert error(x.int(), target) is TypeError
    assert error(x, target, values(3)) is ValueError
    assert error(x, target, reduction="most") is ValueError
    assert error(x, target, label_smoothing=1.5) is ValueError
    assert error(x, target, num_classes=5 * dist.get_world_size() + 7) is ValueError
    assert error(x, target, class_start=1, num_classes=5) is ValueError
    size, rank = dist.get_world_size(), dist.get_rank()
    if size > 1:  # each of a rank's numbers is right by itself
        uneven = values((ROWS, 2 * size - 1)).chunk(size, 1)[rank]
        inside = labels(ignored=0.0, classes=2 * size - 2)
        assert error(uneven, inside) is ValueError
        assert error(x, target, class_start=0, num_classes=5 * size) is ValueError
    assert error("x", target) is TypeError
    assert error(x, x.softmax(1), ignore_index=1) is ValueError


def check_float64() -> None:
    """Numbers of Python are not rounded to torch's default dtype, and autocast leaves float64 alone."""
    logits, target = 100 * values((ROWS, C), torch.float64), labels()
    compare(logits, target, label_smoothing=0.1)
    start, end = parts()[dist.get_rank()]
    head = values((C, 8), torch.float64, seed=2)[start:end]
    input = values((ROWS, 8), torch.float64)
    alone = distributed.linear_cross_entropy(input, head, target, num_classes=C)
    with torch.autocast("cpu", torch.bfloat16):
        cast = distributed.linear_cross_entropy(input, head, target, num_classes=C)
    assert_same_bits(cast, alone)


def check_count() -> None:
    target = labels((10 + dist.get_rank(),), 0.5)
    every = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(every, (target != -100).sum())
    assert distributed.count(target).equal(sum(every))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    assert fastopt.distributed.count(target, group=mesh).equal(sum(every))


# --- DTensors ------------------------------------------------------------------------------------


def meshes() -> list[tuple[Any, list[Any]]]:
    """Meshes of one, two and three dimensions, and how logits of (N, C, positions) lie on them."""
    size = dist.get_world_size()
    one = init_device_mesh("cpu", (size,))
    found = [(one, [p]) for p in (Shard(1), Shard(0), Shard(2), Replicate(), Shard(-2))]
    for shape in ((size, 1), (1, size)):
        two = init_device_mesh("cpu", shape)
        for batch in (Shard(0), Shard(2), Replicate()):
            found += [(two, [batch, Shard(1)]), (two, [Shard(1), batch])]
    three = init_device_mesh("cpu", (1, size, 1))
    found += [(three, [Shard(0), Shard(1), Shard(2)]), (three, [Shard(1), Shard(0), Replicate()])]
    return found


def rows_of(placements: list[Any]) -> list[Any]:
    """Those of the class indices."""
    found: list[Any] = []
    for p in placements:
        if not p.is_shard() or p.dim % 3 == 1:
            found.append(Replicate())
        else:
            found.append(Shard(0 if p.dim == 0 else 1))
    return found


def check_dtensors() -> None:
    logits, target = 3 * values((5, C, 4)), labels((5, 4))
    weight = values(C, seed=1).abs() + 0.1
    for mesh, placements in meshes():
        of_rows = rows_of(placements)
        for reduction, w, smoothing in (
            *(("mean", None, 0.0), ("mean", weight, 0.1)),
            *(("sum", weight, 0.1), ("none", None, 0.0)),
        ):
            how = {"reduction": reduction, "label_smoothing": smoothing}
            right, right_grad = expected(logits, target, w, **how)
            x = distribute_tensor(logits, mesh, placements).requires_grad_()
            loss = fastopt.cross_entropy(x, distribute_tensor(target, mesh, of_rows), w, **how)
            wanted = tuple(of_rows)
            if reduction != "none":
                wanted = tuple(Partial() if p.is_shard() else p for p in of_rows)
            assert type(loss) is DTensor and loss.placements == wanted, (loss.placements, wanted)
            assert loss.shape == right.shape
            (loss * 1.5).sum().backward()
            assert x.grad.placements == x.placements
            close = {"rtol": 2e-6, "atol": 2e-6, "check_dtype": False}
            torch.testing.assert_close(loss.full_tensor().detach(), right, **close)
            torch.testing.assert_close(x.grad.full_tensor(), right_grad, **close)


def check_ignored_rows_of_dtensors() -> None:
    """NaN in one of them harms nothing, however the logits lie and however few there are."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits, target = values((7, 3, 2)), labels((7, 2), 0.0, 3)
    logits[0, :, 1], target[0, 1] = math.nan, -100
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        x = distribute_tensor(logits, mesh, [placement]).requires_grad_()
        loss = fastopt.cross_entropy(x, distribute_tensor(target, mesh, rows_of([placement])))
        loss.backward()
        grad = x.grad.full_tensor()
        assert grad.isfinite().all() and (grad[0, :, 1] == 0).all(), placement


def check_like_loss_parallel() -> None:
    """Where torch's context manager works: its values, placements and gradients, inside and outside."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for reduction, target in itertools.product(
        ("mean", "sum", "none"), (labels(), distribute_tensor(labels(), mesh, [Replicate()]))
    ):
        leaves = [
            distribute_tensor(values((ROWS, C)), mesh, [Shard(1)]).requires_grad_() for _ in "123"
        ]
        with loss_parallel():
            theirs = F.cross_entropy(leaves[0], target, reduction=reduction)
            theirs.sum().backward()
            inside = fastopt.cross_entropy(leaves[1], target, reduction=reduction)
            inside.sum().backward()
        outside = fastopt.CrossEntropyLoss(reduction=reduction)(leaves[2], target)
        outside.sum().backward()
        assert_same_bits(inside.to_local(), outside.to_local())
        assert outside.placements == theirs.placements and outside.shape == theirs.shape
        torch.testing.assert_close(outside.full_tensor(), theirs.full_tensor())
        for leaf in leaves[1:]:
            assert leaf.grad.placements == leaves[0].grad.placements
            torch.testing.assert_close(leaf.grad.full_tensor(), leaves[0].grad.full_tensor())


def check_dtensor_probabilities_and_half() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits, target = values((ROWS, C)), values((ROWS, C), seed=5).softmax(1)
    for placement in (Shard(1), Shard(0), Replicate()):
        x = distribute_tensor(logits, mesh, [placement])
        t = distribute_tensor(target, mesh, [placement])
        loss = fastopt.cross_entropy(x, t, label_smoothing=0.1).full_tensor()
        right, _ = expected(logits, target, label_smoothing=0.1)
        torch.testing.assert_close(loss, right, rtol=2e-6, atol=2e-6, check_dtype=False)
        many = 300 * torch.ones((ROWS, C), dtype=torch.float16)  # a sum beyond float16
        many[:, 0] = -300
        x = distribute_tensor(many, mesh, [placement])
        t = distribute_tensor(
            torch.zeros(ROWS).long(),
            mesh,
            rows_of([placement]) if placement != Shard(1) else [Replicate()],
        )
        assert abs(fastopt.cross_entropy(x, t).full_tensor().item() - 603.6) < 1


def check_extras_of_dtensors() -> None:
    """Of whole rows they are composed; of sharded classes refused, under loss_parallel() or not."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits, target = torch.randn(ROWS, C, dtype=torch.float64), labels()
    dist.broadcast(logits, 0)
    for extra in ({"softcap": 2.0}, {"denominator": 5}, {"token_weight": torch.rand(ROWS)}):
        if "token_weight" in extra:
            dist.broadcast(extra["token_weight"], 0)
        x = logits.clone().requires_grad_()
        right = fastopt.cross_entropy(x, target, **extra)
        right.backward()
        for placement in (Replicate(), Shard(0), Shard(1)):
            given = dict(extra)
            t = distribute_tensor(target, mesh, [Replicate()])
            if "token_weight" in extra:
                given["token_weight"] = distribute_tensor(
                    extra["token_weight"], mesh, [Replicate()]
                )
            y = distribute_tensor(logits, mesh, [placement]).requires_grad_()
            if placement == Shard(1):
                with loss_parallel():
                    error = class_or_value(
                        lambda y=y, t=t, k=given: fastopt.cross_entropy(y, t, **k)
                    )
                assert error is NotImplementedError, error
                continue
            loss = fastopt.cross_entropy(y, t, **given)
            loss.full_tensor().backward()
            torch.testing.assert_close(loss.full_tensor(), right)
            torch.testing.assert_close(y.grad.full_tensor(), x.grad)


def check_reports() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    target = distribute_tensor(labels(ignored=0.0), mesh, [Replicate()])
    calls = [distribute_tensor(values((ROWS, C)), mesh, [p]) for p in (Shard(1), Replicate())]
    calls.append(DTensor.from_local(values((ROWS, C)), mesh, [Partial()]))
    served_by = []
    for logits in calls:
        with fastopt.reporting() as report:
            fastopt.cross_entropy(logits, target)
        served_by.append([row["served_by"] for row in report.as_dict()["rows"]])
    assert served_by == [["fastopt"], ["fastopt"], ["torch"]], served_by


def check_torch_says_what_it_means() -> None:
    """What is not ours ends as torch's does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = distribute_tensor(values((ROWS, C)), mesh, [Shard(0)])
    target, odd = labels(ignored=0.0), distribute_tensor(labels(ignored=0.0), mesh, [Replicate()])
    calls: list[tuple[Any, ...]] = [
        (x, target),
        (x, odd),
        (DTensor.from_local(values((ROWS, C)), mesh, [Partial()]), odd),
        (x, distribute_tensor(target.int(), mesh, [Shard(0)])),
        (x, "target"),
    ]
    for call in calls:
        ours, theirs = (
            class_or_value(lambda f=f, c=call: f(*c))
            for f in (fastopt.cross_entropy, F.cross_entropy)
        )
        if isinstance(theirs, DTensor):
            torch.testing.assert_close(ours.full_tensor(), theirs.full_tensor())
        else:
            assert ours == theirs
    with_wrong = target.clone()
    with_wrong[0] = C
    t = distribute_tensor(with_wrong, mesh, [Shard(0)])
    assert class_or_value(lambda: fastopt.cross_entropy(x, t)) is IndexError
    y = distribute_tensor(values((ROWS, C)), mesh, [Shard(1)])
    assert class_or_value(lambda: fastopt.cross_entropy(y, with_wrong)) is IndexError


def check_what_has_yet_to_arrive() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    own = values((4, C), seed=dist.get_rank()).requires_grad_()
    gather = getattr(collectives, "all_gather_single_autograd", None)
    logits = (gather or collectives.all_gather_tensor_autograd)(own, 0, mesh)
    assert type(logits) is collectives.AsyncCollectiveTensor
    target = labels((4 * dist.get_world_size(),))
    loss = fastopt.cross_entropy(logits, target)
    right, right_grad = expected(logits.detach() + 0, target)
    torch.testing.assert_close(loss.detach(), right, check_dtype=False)
    (loss * 1.5).backward()
    of_own = right_grad[4 * dist.get_rank() :][:4] * dist.get_world_size()  # summed over the ranks
    torch.testing.assert_close(own.grad, of_own, check_dtype=False, rtol=2e-6, atol=2e-6)
    split = distribute_tensor(values((ROWS, C)), mesh, [Shard(0)]).redistribute(
        mesh, [Shard(1)], async_op=True
    )
    right, _ = expected(values((ROWS, C)), labels())
    loss = fastopt.cross_entropy(split, labels()).full_tensor()
    torch.testing.assert_close(loss, right, check_dtype=False, rtol=2e-6, atol=2e-6)


def check_tensor_parallel_head() -> None:
    """A plan of parallelize_module, its head left sharded by classes: the loss alone is changed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def train(sharded: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, C)).double()
        if sharded:
            head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
            parallelize_module(model, mesh, {"2": head})
        optimizer = fastopt.SGD(model.parameters(), lr=0.5, momentum=0.9)
        losses = []
        for step in range(10):
            loss = fastopt.cross_entropy(
                model(values((ROWS, 6), torch.float64, seed=step)), labels()
            )
            losses.append((loss.full_tensor() if isinstance(loss, DTensor) else loss).item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses

    alone, on_all = train(False), train(True)
    assert all(math.isclose(a, b, rel_tol=1e-10) for a, b in zip(alone, on_all, strict=True))
    assert alone[-1] < alone[0]


def check_linear() -> None:
    """The head as well: loss, and the gradients of input, weight and bias, against one process."""
    rows, width, classes = 150, 9, 701
    input, head, bias = values((rows, width)), values((classes, width), seed=2), values(classes)
    start, end = parts(classes)[dist.get_rank()]
    w = values(classes, seed=4).abs() + 0.1
    probabilities = values((rows, classes), seed=5).softmax(1)
    saved, distributed._LOGITS = distributed._LOGITS, 64  # three chunks
    for dtype, target, how in (
        (torch.float64, labels((rows,), 0.3, classes), {"reduction": "mean"}),
        (torch.float64, labels((rows,), 0.3, classes), {"label_smoothing": 0.1, "weight": w}),
        (torch.float64, labels((rows,), 0.3, classes), {"reduction": "none", "weight": w}),
        (torch.float64, probabilities, {"reduction": "sum"}),
        (torch.float32, labels((rows,), 0.0, classes), {"reduction": "mean"}),
        (torch.bfloat16, labels((rows,), 0.0, classes), {"reduction": "sum"}),
    ):
        whole = [x.to(dtype).double().requires_grad_() for x in (input, head, bias)]
        mine = [
            x.to(dtype).clone().requires_grad_() for x in (input, head[start:end], bias[start:end])
        ]
        of_all = dict(how)
        own = dict(how)
        if "weight" in how:
            of_all["weight"], own["weight"] = w.double(), w.to(dtype)[start:end]
        t = target.double() if target.is_floating_point() else target
        right = F.cross_entropy(F.linear(*whole), t, **of_all)
        t = target[:, start:end].to(dtype) if target.is_floating_point() else target
        loss = distributed.linear_cross_entropy(
            mine[0], mine[1], t, linear_bias=mine[2], num_classes=classes, **own
        )
        same_on_every_rank(loss.detach())
        for each in (loss, right):
            (each * 1.5).sum().backward()
        rounding = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
        close = {"rtol": rounding, "atol": rounding, "check_dtype": False}
        if dtype is torch.bfloat16:
            close["atol"] = 0.5  # sums of 150 rows, over logits of eight bits
        torch.testing.assert_close(loss, right, **close)
        grads = [whole[0].grad, whole[1].grad[start:end], whole[2].grad[start:end]]
        for x, grad in zip(mine, grads, strict=True):
            torch.testing.assert_close(x.grad, grad, **close)
    input[0] = math.nan  # ignored: what is not there cannot harm
    mine = [x.clone().requires_grad_() for x in (input, head[start:end])]
    target = labels((rows,), 0.3, classes)
    target[0] = -100
    distributed.linear_cross_entropy(*mine, target, num_classes=classes).backward()
    assert (mine[0].grad[0] == 0).all() and all(x.grad.isfinite().all() for x in mine)
    mode = CommDebugMode()
    with mode:
        distributed.linear_cross_entropy(*mine, target, num_classes=classes)
    assert mode.get_total_counts() == 1
    distributed._LOGITS = saved
