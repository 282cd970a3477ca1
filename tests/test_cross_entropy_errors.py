"""cross_entropy: bad inputs raise what torch raises, and the faces look like torch's."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastopt
from cross_entropy_cases import REDUCTIONS, make_logits, make_probabilities, make_target

LOGITS = make_logits((4, 5))
TARGET = make_target(LOGITS)
IMAGE = make_logits((2, 5, 3, 4))
IMAGE_TARGET = make_target(IMAGE)
SEQUENCE = make_logits((2, 5, 7))


def outcome(
    function: Callable[..., Tensor], args: tuple[object, ...], keywords: dict[str, object]
) -> tuple[type[BaseException] | None, str, list[tuple[type[Warning], str]]]:
    """How a call ends: the exception's class and first line, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function(*args, **keywords)
            ended: type[BaseException] | None = None
            message = ""
        except Exception as error:
            ended, message = type(error), (str(error).splitlines() or [""])[0]
    return ended, message, [(entry.category, str(entry.message)) for entry in caught]


def labels(*values: int) -> Tensor:
    return torch.tensor(values)


# name: (positional arguments, keyword arguments). What torch makes of them is asked at run time.
BAD_CALLS: dict[str, tuple[tuple[object, ...], dict[str, object]]] = {
    # labels outside [0, C)
    "label-past-the-classes": ((LOGITS, labels(0, 5, 1, 2)), {}),
    "label-minus-one": ((LOGITS, labels(0, 1, 1, -1)), {}),
    "label-huge": ((LOGITS, labels(0, 2**62, 1, 2)), {}),
    "label-lowest": ((LOGITS, labels(-(2**63), 2, 1, 2)), {}),
    "label-that-wraps-in-32-bits": ((LOGITS, labels(0, 2**32 + 1, 1, 2)), {}),
    "label-default-ignore-replaced": ((LOGITS, labels(0, -100, 1, 2)), {"ignore_index": -1}),
    "label-out-of-image": ((IMAGE, IMAGE_TARGET + 1), {}),
    "label-out-of-sequence": ((SEQUENCE, torch.full((2, 7), 5)), {}),
    "label-out-of-one-row": ((LOGITS[0], torch.tensor(5)), {}),
    "label-negative-in-one-row": ((LOGITS[0], torch.tensor(-1)), {}),
    "label-without-classes": ((torch.empty(3, 0), labels(0, 0, 0)), {}),
    "label-with-smoothing": ((LOGITS, labels(0, 5, 1, 2)), {"label_smoothing": 0.1}),
    "label-with-weight": ((LOGITS, labels(0, 5, 1, 2)), {"weight": torch.ones(5)}),
    # target dtypes
    **{
        f"target-{dtype}".replace("torch.", ""): ((LOGITS, TARGET.to(dtype)), {})
        for dtype in (torch.int32, torch.int16, torch.int8, torch.bool, torch.uint16)
    },
    "target-float-indices": ((LOGITS, TARGET.float()), {}),
    "target-byte-image": ((IMAGE, IMAGE_TARGET.to(torch.uint8)), {}),
    "target-int32-image": ((IMAGE, IMAGE_TARGET.int()), {}),
    "target-byte-smoothing-weight": (
        (LOGITS, TARGET.to(torch.uint8)),
        {"weight": torch.ones(5), "label_smoothing": 0.1},
    ),
    "target-integer-probabilities": ((LOGITS, torch.ones(4, 5, dtype=torch.int64)), {}),
    "target-integer-one-class": ((LOGITS[:, :1], torch.zeros(4, 1, dtype=torch.int64)), {}),
    "target-complex": ((LOGITS, torch.ones(4, 5, dtype=torch.complex64)), {}),
    "probabilities-ignore-index": ((LOGITS, make_probabilities(LOGITS)), {"ignore_index": 0}),
    # shapes
    "batch-mismatch": ((LOGITS, TARGET[:3]), {}),
    "batch-mismatch-image": ((IMAGE, IMAGE_TARGET[:1]), {}),
    "spatial-mismatch-image": ((IMAGE, torch.zeros(2, 4, 5, dtype=torch.int64)), {}),
    "spatial-mismatch-sequence": ((SEQUENCE, torch.zeros(2, 5, dtype=torch.int64)), {}),
    "spatial-mismatch-volume": (
        (make_logits((2, 5, 2, 2, 2)), torch.zeros(2, 2, 2, 3, dtype=torch.int64)),
        {},
    ),
    "classes-last": ((torch.randn(2, 7, 5), torch.zeros(2, 7, dtype=torch.int64)), {}),
    "target-column": ((LOGITS, TARGET[:, None]), {}),
    "target-scalar-for-a-batch": ((LOGITS, torch.tensor(1)), {}),
    "target-too-deep": ((IMAGE, IMAGE_TARGET[..., None]), {}),
    "target-too-flat": ((IMAGE, IMAGE_TARGET.reshape(-1)), {}),
    "one-row-two-labels": ((LOGITS[0], labels(0, 1)), {}),
    "one-row-no-label": ((LOGITS[0], torch.empty(0, dtype=torch.int64)), {}),
    "scalar-logits": ((torch.tensor(1.0), torch.tensor(0)), {}),
    "scalar-logits-and-probability": ((torch.tensor(1.0), torch.tensor(1.0)), {}),
    "probabilities-of-another-shape": ((LOGITS, torch.rand(5, 5)), {}),
    "probabilities-broadcastable": ((LOGITS, torch.rand(1, 5)), {}),
    # weights
    "weight-short": ((LOGITS, TARGET), {"weight": torch.ones(4)}),
    "weight-long": ((LOGITS, TARGET), {"weight": torch.ones(6)}),
    "weight-empty": ((LOGITS, TARGET), {"weight": torch.ones(0)}),
    "weight-scalar": ((LOGITS, TARGET), {"weight": torch.tensor(1.0)}),
    "weight-matrix": ((LOGITS, TARGET), {"weight": torch.ones(1, 5)}),
    "weight-short-image": ((IMAGE, IMAGE_TARGET), {"weight": torch.ones(4)}),
    "weight-short-probabilities": (
        (LOGITS, make_probabilities(LOGITS)),
        {"weight": torch.ones(4)},
    ),
    "weight-matrix-probabilities": (
        (LOGITS, make_probabilities(LOGITS)),
        {"weight": torch.ones(1, 5)},
    ),
    "weight-double": ((LOGITS, TARGET), {"weight": torch.ones(5).double()}),
    "weight-half": ((LOGITS, TARGET), {"weight": torch.ones(5).half()}),
    "weight-integer": ((LOGITS, TARGET), {"weight": torch.ones(5).long()}),
    "weight-float-for-bfloat16": ((LOGITS.bfloat16(), TARGET), {"weight": torch.ones(5)}),
    "weight-float-for-half": ((LOGITS.half(), TARGET), {"weight": torch.ones(5)}),
    "weight-float-for-double": ((LOGITS.double(), TARGET), {"weight": torch.ones(5)}),
    "weight-wants-a-gradient": (
        (LOGITS, TARGET),
        {"weight": torch.ones(5, requires_grad=True)},
    ),
    "weight-list": ((LOGITS, TARGET), {"weight": [1.0] * 5}),
    "weight-nested": (
        (LOGITS, TARGET),
        {"weight": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
    ),
    # options
    "reduction-unknown": ((LOGITS, TARGET), {"reduction": "avg"}),
    "reduction-upper-case": ((LOGITS, TARGET), {"reduction": "Mean"}),
    "reduction-none-object": ((LOGITS, TARGET), {"reduction": None}),
    "reduction-number": ((LOGITS, TARGET), {"reduction": 1}),
    "reduction-list": ((LOGITS, TARGET), {"reduction": ["mean"]}),
    "reduction-elementwise-mean": ((LOGITS, TARGET), {"reduction": "elementwise_mean"}),
    "smoothing-above-one": ((LOGITS, TARGET), {"label_smoothing": 1.5}),
    "smoothing-infinite": ((LOGITS, TARGET), {"label_smoothing": math.inf}),
    "smoothing-above-one-probabilities": (
        (LOGITS, make_probabilities(LOGITS)),
        {"label_smoothing": 1.5},
    ),
    "smoothing-text": ((LOGITS, TARGET), {"label_smoothing": "0.1"}),
    "smoothing-none": ((LOGITS, TARGET), {"label_smoothing": None}),
    "smoothing-tensor": ((LOGITS, TARGET), {"label_smoothing": torch.tensor(0.1)}),
    "smoothing-integer": ((LOGITS, TARGET), {"label_smoothing": 1}),
    "smoothing-bool": ((LOGITS, TARGET), {"label_smoothing": True}),
    "ignore-index-float": ((LOGITS, TARGET), {"ignore_index": 1.0}),
    "ignore-index-none": ((LOGITS, TARGET), {"ignore_index": None}),
    "ignore-index-too-large": ((LOGITS, TARGET), {"ignore_index": 2**63}),
    "ignore-index-bool": ((LOGITS, TARGET), {"ignore_index": True}),
    "ignore-index-text": ((LOGITS, TARGET), {"ignore_index": "0"}),
    # logits
    **{
        f"logits-{dtype}".replace("torch.", ""): ((LOGITS.to(dtype), TARGET), {})
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
    },
    "logits-sparse": ((LOGITS.to_sparse(), TARGET), {}),
    "target-sparse": ((LOGITS, TARGET.to_sparse()), {}),
    "probabilities-sparse": ((LOGITS, make_probabilities(LOGITS).to_sparse()), {}),
    "weight-sparse": ((LOGITS, TARGET), {"weight": torch.ones(5).to_sparse()}),
    "logits-meta": ((LOGITS.to("meta"), TARGET), {}),
    "target-meta": ((LOGITS, TARGET.to("meta")), {}),
    "weight-meta": ((LOGITS, TARGET), {"weight": torch.ones(5, device="meta")}),
    "everything-meta": ((LOGITS.to("meta"), TARGET.to("meta")), {}),
    # not tensors, wrong calls
    "target-none": ((LOGITS, None), {}),
    "target-list": ((LOGITS, [0, 1, 2, 3]), {}),
    "logits-list": (([[1.0, 2.0]], labels(0)), {}),
    "logits-none": ((None, TARGET), {}),
    "no-target": ((LOGITS,), {}),
    "no-arguments": ((), {}),
    "unknown-keyword": ((LOGITS, TARGET), {"smoothing": 0.1}),
    "too-many-arguments": ((LOGITS, TARGET, None, None, -100, None, "mean", 0.0, 1), {}),
    "argument-twice": ((LOGITS, TARGET), {"input": LOGITS}),
    # deprecated
    **{
        f"size-average-{size_average}-reduce-{reduce}": (
            (LOGITS, TARGET),
            {"size_average": size_average, "reduce": reduce, "reduction": "sum"},
        )
        for size_average in (None, True, False)
        for reduce in (None, True, False)
    },
    "deprecated-positional": ((LOGITS, TARGET, None, False, 1), {}),
}


@pytest.mark.stock
@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_ends_as_in_torch(call: tuple[tuple[object, ...], dict[str, object]]) -> None:
    args, keywords = call
    for wants_gradient in (False, True):
        logits = args[0] if args else None
        if wants_gradient and isinstance(logits, Tensor) and logits.is_floating_point():
            args = (logits.detach().clone().requires_grad_(), *args[1:])
        expected = outcome(F.cross_entropy, args, keywords)
        assert outcome(fastopt.cross_entropy, args, keywords) == expected


LABEL_CALLS = {
    name: call
    for name, call in BAD_CALLS.items()
    if name.startswith("label-") and name != "label-without-classes"
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("call", LABEL_CALLS.values(), ids=LABEL_CALLS)
def test_a_label_out_of_range_is_an_index_error(
    call: tuple[tuple[Tensor, Tensor], dict[str, object]], reduction: str
) -> None:
    (logits, target), keywords = call
    for dtype in (torch.float32, torch.bfloat16):
        for wants_gradient in (False, True):
            values = logits.detach().to(dtype).requires_grad_(wants_gradient)
            options = dict(keywords, reduction=reduction)
            if "weight" in options:
                options["weight"] = torch.ones(5, dtype=dtype)
            with pytest.raises(IndexError, match="is out of bounds"):
                fastopt.cross_entropy(values, target, **options)


@pytest.mark.parametrize("where", [0, 5000, 9999])
def test_one_bad_label_among_many_is_found(where: int) -> None:
    """Whichever thread's share it lies in; and the next call is not disturbed."""
    for shape in [(10_000, 10), (10_000, 65), (2, 10, 5000), (1, 3, 100, 100)]:
        logits = make_logits(shape)
        target = make_target(logits)
        expected = F.cross_entropy(logits, target)
        for label in (shape[1], -1):
            bad = target.clone()
            bad.view(-1)[where] = label
            for reduction in REDUCTIONS:
                with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
                    fastopt.cross_entropy(logits, bad, reduction=reduction)
                with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
                    fastopt.cross_entropy(logits.requires_grad_(), bad, reduction=reduction)
                logits.requires_grad_(False)
        torch.testing.assert_close(fastopt.cross_entropy(logits, target), expected)


def test_labels_are_looked_at_even_where_the_row_is_nan() -> None:
    logits = torch.full((3, 5), math.nan)
    with pytest.raises(IndexError):
        fastopt.cross_entropy(logits, labels(0, 5, 1))


@pytest.mark.stock
def test_a_one_row_batch_with_a_one_element_target() -> None:
    """torch computes the loss, then fails in backward; a gradient, if there is one, is right."""
    logits = LOGITS[0].detach().requires_grad_()
    loss = fastopt.cross_entropy(logits, labels(1))
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels(1)))
    try:
        (grad,) = torch.autograd.grad(loss, logits)
    except RuntimeError:
        return
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor(1)), logits)
    torch.testing.assert_close(grad, expected)


# -- what goes to torch, works as in torch ----------------------------------------------------------


class Wrapped(Tensor):
    """A tensor subclass that keeps its type, as libraries write them."""


def test_subclasses_keep_their_type() -> None:
    logits = LOGITS.detach().as_subclass(Wrapped)
    for target in (TARGET, TARGET.as_subclass(Wrapped)):
        ours, stock = fastopt.cross_entropy(logits, target), F.cross_entropy(logits, target)
        assert type(ours) is type(stock) is Wrapped
        assert torch.equal(ours, stock)
    parameter = nn.Parameter(LOGITS.clone())
    fastopt.cross_entropy(parameter, TARGET).backward()
    assert parameter.grad is not None


@pytest.mark.stock
def test_torch_function_of_a_subclass_sees_the_call() -> None:
    seen = []

    class Recorder(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    fastopt.cross_entropy(LOGITS.detach().as_subclass(Recorder), TARGET)
    assert F.cross_entropy in seen


def test_sparse_probabilities_and_negated_logits() -> None:
    logits = torch.view_as_real(torch.complex(LOGITS, LOGITS).conj().resolve_conj())[..., 0]
    torch.testing.assert_close(
        fastopt.cross_entropy(logits, TARGET), F.cross_entropy(logits, TARGET)
    )
    # The imaginary part of a conjugate view is a lazily negated tensor: its memory has other signs.
    negated = torch.complex(LOGITS, LOGITS).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(
        fastopt.cross_entropy(negated, TARGET), F.cross_entropy(negated, TARGET)
    )
    probabilities = torch.complex(make_probabilities(LOGITS), -make_probabilities(LOGITS))
    lazily = probabilities.conj().imag
    torch.testing.assert_close(
        fastopt.cross_entropy(LOGITS, lazily), F.cross_entropy(LOGITS, lazily)
    )
    weight = torch.complex(torch.ones(5), -torch.arange(1.0, 6.0)).conj().imag
    torch.testing.assert_close(
        fastopt.cross_entropy(LOGITS, TARGET, weight=weight),
        F.cross_entropy(LOGITS, TARGET, weight=weight),
    )


def test_the_default_dtype_and_device_do_not_matter() -> None:
    expected = F.cross_entropy(LOGITS, TARGET)
    with torch.device("meta"):
        torch.testing.assert_close(fastopt.cross_entropy(LOGITS, TARGET), expected)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(fastopt.cross_entropy(LOGITS, TARGET), expected)
    finally:
        torch.set_default_dtype(torch.float32)


# -- the faces --------------------------------------------------------------------------------------


def _parameters(function: Callable[..., object]) -> list[tuple[str, object, object]]:
    return [
        (parameter.name, parameter.kind, parameter.default)
        for parameter in inspect.signature(function).parameters.values()
    ]


def test_signatures() -> None:
    """torch's, and behind them, by keyword only, what is ours alone."""
    of_loss = {"lse_square_scale": 0.0, "softcap": None, "logit_scale": 1.0}
    of_call = {"token_weight": None, "denominator": None}
    others = {"loss_dtype": None, "return_stats": False, "inplace": False}

    def extras(*defaults: dict[str, object]) -> list[tuple[str, object, object]]:
        keyword = inspect.Parameter.KEYWORD_ONLY
        return [(name, keyword, value) for of in defaults for name, value in of.items()]

    ours, stock = fastopt.CrossEntropyLoss, nn.CrossEntropyLoss
    assert _parameters(fastopt.cross_entropy) == [
        *_parameters(F.cross_entropy),
        *extras(of_loss, of_call, others),
    ]
    assert _parameters(ours.__init__) == [*_parameters(stock.__init__), *extras(of_loss, others)]
    of_forward = [(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, None) for name in of_call]
    assert _parameters(ours.forward) == [*_parameters(stock.forward), *of_forward]
    assert ours.__constants__ == stock.__constants__


def test_positional_order() -> None:
    weight = torch.rand(5)
    args = (weight, None, 1, None, "sum", 0.1)
    torch.testing.assert_close(
        fastopt.cross_entropy(LOGITS, TARGET, *args), F.cross_entropy(LOGITS, TARGET, *args)
    )
    torch.testing.assert_close(
        fastopt.CrossEntropyLoss(*args)(LOGITS, TARGET),
        nn.CrossEntropyLoss(*args)(LOGITS, TARGET),
    )
    torch.testing.assert_close(
        fastopt.CrossEntropyLoss()(input=LOGITS, target=TARGET), F.cross_entropy(LOGITS, TARGET)
    )


DEPRECATED = [
    {"size_average": size_average, "reduce": reduce}
    for size_average in (None, True, False)
    for reduce in (None, True, False)
]


@pytest.mark.parametrize("keywords", DEPRECATED, ids=lambda keywords: str(list(keywords.values())))
def test_deprecated_arguments_choose_the_reduction(keywords: dict[str, bool | None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for reduction in REDUCTIONS:
            ours = fastopt.CrossEntropyLoss(reduction=reduction, **keywords)
            stock = nn.CrossEntropyLoss(reduction=reduction, **keywords)
            assert ours.reduction == stock.reduction
            torch.testing.assert_close(ours(LOGITS, TARGET), stock(LOGITS, TARGET))
            torch.testing.assert_close(
                fastopt.cross_entropy(LOGITS, TARGET, reduction=reduction, **keywords),
                F.cross_entropy(LOGITS, TARGET, reduction=reduction, **keywords),
            )
    constructed = [
        outcome(cls, (), dict(keywords)) for cls in (fastopt.CrossEntropyLoss, nn.CrossEntropyLoss)
    ]
    assert constructed[0] == constructed[1]


@pytest.mark.stock
@pytest.mark.parametrize(
    "keywords",
    [
        {"reduction": "avg"},
        {"label_smoothing": 1.5},
        {"weight": [1.0] * 5},
        {"weight": torch.ones(4)},
        {"ignore_index": 1.5},
        {"nonsense": 1},
    ],
    ids=lambda keywords: next(iter(keywords)),
)
def test_the_constructor_checks_what_torch_checks(keywords: dict[str, object]) -> None:
    ours = outcome(fastopt.CrossEntropyLoss, (), keywords)
    assert ours[::2] == outcome(nn.CrossEntropyLoss, (), keywords)[::2]
    if ours[0] is None:
        module = fastopt.CrossEntropyLoss(**keywords)
        stock = nn.CrossEntropyLoss(**keywords)
        assert outcome(module, (LOGITS, TARGET), {}) == outcome(stock, (LOGITS, TARGET), {})


def test_module_state() -> None:
    weight = torch.rand(5)
    module = fastopt.CrossEntropyLoss(weight, ignore_index=3, label_smoothing=0.1)
    stock = nn.CrossEntropyLoss(weight, ignore_index=3, label_smoothing=0.1)
    assert isinstance(module, nn.CrossEntropyLoss)
    assert repr(module) == repr(stock) == "CrossEntropyLoss()"
    assert [name for name, _ in module.named_buffers()] == ["weight"]
    assert not list(module.parameters())
    assert module.state_dict().keys() == stock.state_dict().keys() == {"weight"}
    assert not fastopt.CrossEntropyLoss().state_dict()
    assert module.double().weight.dtype == torch.float64
    assert module.half().weight.dtype == torch.float16
    for name in ("reduction", "ignore_index", "label_smoothing", "training"):
        assert getattr(module, name) == getattr(stock, name)


def test_module_state_goes_both_ways() -> None:
    ours = fastopt.CrossEntropyLoss(torch.rand(5))
    stock = nn.CrossEntropyLoss(torch.rand(5))
    stock.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(LOGITS, TARGET), stock(LOGITS, TARGET))
    stock = nn.CrossEntropyLoss(torch.rand(5))
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(LOGITS, TARGET), stock(LOGITS, TARGET))
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict({"weight": torch.rand(4)})
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({})


def test_modules_are_copied_and_stored() -> None:
    module = fastopt.CrossEntropyLoss(torch.rand(5), reduction="sum", label_smoothing=0.1)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(module),
        copy.copy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(twin) is fastopt.CrossEntropyLoss
        assert torch.equal(twin(LOGITS, TARGET), module(LOGITS, TARGET))
    assert pickle.loads(pickle.dumps(fastopt.cross_entropy)) is fastopt.cross_entropy


def test_module_attributes_are_read_at_every_call() -> None:
    module = fastopt.CrossEntropyLoss()
    module.reduction = "none"
    module.label_smoothing = 0.1
    module.ignore_index = 2
    module.weight = torch.rand(5)
    torch.testing.assert_close(
        module(LOGITS, TARGET),
        F.cross_entropy(
            LOGITS,
            TARGET,
            reduction="none",
            label_smoothing=0.1,
            ignore_index=2,
            weight=module.weight,
        ),
    )


def test_public_names() -> None:
    assert {"cross_entropy", "CrossEntropyLoss", "SGD"} <= set(fastopt.__all__)
    assert fastopt.cross_entropy.__doc__ and fastopt.CrossEntropyLoss.__doc__
    assert fastopt.cross_entropy.__module__.startswith("fastopt")
