"""Views that hold the negative or the conjugate, and memory that parameters share: as torch.optim.SGD's
for-loop updates them, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sgd_oracle import assert_same, leaf, values

pytestmark = pytest.mark.stock


NEGATIVE: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: torch._neg_view(values((4, 5))),
    "transposed": lambda: torch._neg_view(values((5, 4))).t(),
    "of a complex view": lambda: torch.complex(values((4, 5)), values((4, 5))).conj().imag,
    "packed complex view": lambda: (
        torch.complex(values((4, 5)), values((4, 5))).conj().imag.as_strided((4, 5), (5, 1))
    ),
    "one element": lambda: torch._neg_view(values((1, 1))),
}


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("where", ["parameter", "gradient", "buffer"])
@pytest.mark.parametrize("kind", NEGATIVE)
def test_negative_views(kind: str, where: str, momentum: float) -> None:
    def run(make: Any) -> Any:
        odd = NEGATIVE[kind]()
        tensors = [torch.empty_strided(odd.shape, odd.stride()) for _ in range(3)]
        for i, t in enumerate(tensors):
            t.copy_(values(t.shape, seed=i))
        tensors[["parameter", "gradient", "buffer"].index(where)] = odd
        p, p.grad, b = tensors[0], tensors[1], tensors[2]
        optimizer = make([p], lr=0.5, momentum=momentum, weight_decay=0.1)
        optimizer.state[p]["momentum_buffer"] = b
        optimizer.step()
        return [t.clone() for t in tensors], [t.is_neg() for t in tensors]

    assert_same(run)


def conjugates(make: Any, where: str) -> Any:
    p, g = (torch.complex(values(9, seed=i), values(9, seed=i + 1)) for i in (1, 2))
    p, g = (p.conj(), g) if where == "parameter" else (p, g.conj())
    q = leaf(values(7))
    p.grad, q.grad = g, values(7, seed=5)
    optimizer = make([p, q], lr=0.5, momentum=0.5)
    optimizer.step()
    optimizer.step()
    return torch.view_as_real(p.resolve_conj()), q


@pytest.mark.parametrize("where", ["parameter", "gradient"])
def test_conjugate_views(where: str) -> None:
    assert_same(lambda make: conjugates(make, where))


def sparse_beside(base: Tensor) -> Any:
    index = torch.tensor([[0, 3, 3]])
    return [base, base.detach()], [
        values(base.shape, seed=1),
        torch.sparse_coo_tensor(index, values((3, base.shape[1]), seed=2), base.shape),
    ]


SHARED: dict[str, Callable[[Tensor], Any]] = {
    "dense, sparse": sparse_beside,
    "sparse, dense": lambda base: tuple(t[::-1] for t in sparse_beside(base)),
    "whole, columns": lambda base: (
        [base, base[:, :4]],
        [values(base.shape, seed=1), values((8, 4), seed=2)],
    ),
    "columns, whole": lambda base: (
        [base[:, :4], base],
        [values((8, 4), seed=2), values(base.shape, seed=1)],
    ),
    "a gradient is another's columns": lambda base: (
        [base[:4], values((8, 8), seed=5)[:, ::2][:4]],
        [values((4, 8), seed=1), base[:4, :4]],
    ),
    "of a subclass": lambda base: (
        [base[:4].as_subclass(Odd), base],
        [values((4, 8), seed=1), values((8, 8), seed=2)],
    ),
    "between others": lambda base: (
        [values(9), base, values(9), base[:, 4:], values(9), base, values(9)],
        [values(n, seed=i) for i, n in enumerate((9, (8, 8), 9, (8, 4), 9, (8, 8), 9))],
    ),
}


class Odd(Tensor):
    pass


@pytest.mark.filterwarnings("ignore:.*(S|s)parse.*")
@pytest.mark.parametrize("groups", ["one", "one each"])
@pytest.mark.parametrize("options", [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}], ids=str)
@pytest.mark.parametrize("case", SHARED)
def test_shared_memory_is_updated_in_torchs_order(case: str, options: Any, groups: str) -> None:
    def run(make: Any) -> Any:
        base = values((8, 8), seed=7).clone()
        params, grads = SHARED[case](base)
        params = [p.detach().requires_grad_() for p in params]
        parts = [{"params": params}] if groups == "one" else [{"params": [p]} for p in params]
        optimizer = make(parts, **options)
        for _ in range(3):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.detach() if grad.is_sparse else grad.detach().clone()
            optimizer.step()
        return base, [p.detach().as_subclass(Tensor) for p in params]

    assert isinstance(assert_same(run, case)[0], Tensor)
