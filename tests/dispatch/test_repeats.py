"""Repeated calls of operators without a GPU: they launch what the first one launches."""

from __future__ import annotations

import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, MXFP8, NVFP4
from cute_quant.dispatch import launch, repeats
from tests.dispatch.test_plan import BF16, at, launched, x_at

__all__ = ["launched"]
operators = torch.ops.cute_quant
NORM = {"eps": 1e-6, "weight_offset": 0.0, "rounding": "fused"}
SILU = {"interleaved": False, "clamp": None, "alpha": 1.0, "beta": 0.0, "rounding": "fused"}


def quantize_call(fmt=DEEP_GEMM, **options):
    return operators.quantize.default, (x_at(), str(fmt)), options


def batch_call():
    return operators.quantize.default, (x_at(shape=(2, 6, 256)), str(DEEP_GEMM)), {}


def batches_call():
    return operators.quantize.default, (x_at(shape=(2, 3, 6, 256)), str(DEEP_GEMM)), {}


def strided_call():
    return operators.quantize.default, (x_at(stride=272), str(DEEP_GEMM_SM90)), {}


def nvfp4_call():
    return (
        quantize_call(NVFP4, upper_kind="amax", rows="dense")[0],
        (
            x_at(),
            str(NVFP4),
            None,
            None,
            torch.ones(1),
        ),
        {"upper_kind": "amax"},
    )


def prefix_sum_call():
    ends = torch.tensor([2, 6], dtype=torch.int32)
    return (
        operators.quantize.default,
        (x_at(), str(DEEP_GEMM), ends),
        {
            "rows": "prefix_sum",
            "alignment": 1,
        },
    )


def gathered_call():
    index = torch.arange(4, dtype=torch.int32)
    return operators.quantize.default, (x_at(), str(DEEP_GEMM), None, index), {}


def silu_call():
    return operators.silu_mul_quantize.default, (x_at(), None, str(MXFP8)), SILU


def norm_call():
    weight = at(0, (1, 256), BF16)[0]
    return operators.rms_norm_quantize.default, (x_at(), weight, str(DEEP_GEMM)), NORM


def residual_call(normalized=None):
    weight, residual = at(0, (1, 256), BF16)[0], x_at()
    arguments = (x_at(), weight, residual, x_at(), normalized, str(DEEP_GEMM))
    return operators.rms_norm_quantize_residual.default, arguments, NORM


def in_place_call():
    weight = at(0, (1, 256), BF16)[0]
    arguments = (x_at(), weight, None, x_at(), None, str(DEEP_GEMM))
    return operators.rms_norm_quantize_residual.default, arguments, NORM


def normalized_call():
    return residual_call(x_at())


CALLS = [
    quantize_call,
    batch_call,
    batches_call,
    strided_call,
    nvfp4_call,
    prefix_sum_call,
    gathered_call,
    silu_call,
    norm_call,
    residual_call,
    in_place_call,
    normalized_call,
]


@pytest.fixture
def found(monkeypatch) -> list[bool]:
    """Whether calls of operators found a recent one."""
    answers: list[bool] = []
    run = repeats.run

    def watched(*arguments):
        results = run(*arguments)
        answers.append(results is not None)
        return results

    monkeypatch.setattr(repeats, "run", watched)
    return answers


def again(function, arguments, options):
    """Call an operator on other tensors of the same looks; return these."""
    others = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            start = argument.data_ptr() % 32
            other = at(start, tuple(argument.shape), argument.dtype, row_stride(argument))
            other.copy_(argument)
            argument = other
        others.append(argument)
    return others, function(*others, **options)


def row_stride(t):
    return t.stride(-2) if t.ndim > 1 else None


def described(arguments):
    """Return arguments of a kernel without their memory."""
    return [(t.shape, t.stride(), t.dtype) if isinstance(t, torch.Tensor) else t for t in arguments]


@pytest.mark.parametrize("make", CALLS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_repeat_launches_the_same(make, inference, launched, found):
    with torch.inference_mode(inference):
        function, arguments, options = make()
        first = function(*arguments, **options)
        tensors, second = again(function, arguments, options)
    assert found == [False, True]
    one, other = launched
    assert described(one.arguments) == described(other.arguments)
    assert described(first) == described(second)
    own = {t.data_ptr() for t in [*tensors, *second] if isinstance(t, torch.Tensor)}
    taken = {t.data_ptr() for t in other.arguments if isinstance(t, torch.Tensor)}
    assert taken <= own
    assert {t.data_ptr() for t in second} <= taken


def test_order_of_tensors(launched, found):
    """Each tensor goes where the one that it looks like went."""
    function, arguments, options = residual_call()
    function(*arguments, **options)
    others, _ = again(function, arguments, options)
    places = [
        [
            next((i for i, t in enumerate(given) if t is argument), None)
            for argument in call.arguments
        ]
        for given, call in zip((arguments, others), launched, strict=True)
    ]
    assert places[0] == places[1]


def test_a_tensor_that_is_given_twice(launched, found):
    function, (x, weight, residual, *rest), options = residual_call()
    function(x, weight, x, *rest, **options)
    function(x, weight, residual, *rest, **options)
    assert found == [False, False]
    x_taken, residual_taken = launched[1].arguments[0], launched[1].arguments[-3]
    assert x_taken.data_ptr() == x.data_ptr()
    assert residual_taken.data_ptr() == residual.data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 1e-5},
        {"rounding": "unfused"},
        {"weight_offset": 1.0, "rounding": "unfused"},
    ],
)
def test_options_are_compared(change, launched, found):
    function, arguments, options = norm_call()
    function(*arguments, **options)
    function(*arguments, **options | change)
    assert found == [False, False]


def test_formats_are_compared(launched, found):
    x = x_at()
    for fmt in (DEEP_GEMM, DEEP_GEMM_SM90, DEEP_GEMM):
        operators.quantize.default(x, str(fmt))
    assert found == [False, False, True]


@pytest.mark.parametrize("other", [x_at(2), x_at(shape=(7, 256)), x_at(stride=512), x_at().half()])
def test_looks_are_compared(other, launched, found):
    operators.quantize.default(x_at(), str(DEEP_GEMM))
    operators.quantize.default(other, str(DEEP_GEMM))
    assert found == [False, False]


def test_inference_after_training(launched, found):
    """Tensors of inference mode have other looks, and are found again too."""
    operators.quantize.default(x_at(), str(DEEP_GEMM))
    with torch.inference_mode():
        x = x_at()
        for _ in range(3):
            operators.quantize.default(x, str(DEEP_GEMM))
    assert found == [False, False, True, True]


def test_overlap_is_refused_again(launched, found):
    function, arguments, options = residual_call()
    function(*arguments, **options)
    _, weight, residual, _, *rest = arguments
    both = x_at(shape=(7, 256))
    with pytest.raises(ValueError, match=r"out residual: .* overlaps x"):
        function(both[:6], weight, residual, both[1:], *rest, **options)
    assert found == [False, False]


def test_writes_are_told_to_autograd(launched):
    function, arguments, options = residual_call()
    function(*arguments, **options)
    before = [t._version for t in arguments[:4]]
    function(*arguments, **options)
    assert [t._version > old for t, old in zip(arguments[:4], before, strict=True)] == [
        False,
        False,
        False,
        True,
    ]


def test_what_is_bound_is_not_launched(launched, found):
    function, arguments, options = norm_call()
    function(*arguments, **options)
    launch.bind(lambda: function(*arguments, **options))
    assert found == [False, False]
    assert len(launched) == 1


def test_recent_calls_are_few(launched, found):
    calls = [(x_at(shape=(rows, 256)), str(DEEP_GEMM)) for rows in range(1, repeats.MAX_RECENT + 2)]
    for _ in range(2):
        for arguments in calls:
            operators.quantize.default(*arguments)
    assert not any(found)
    operators.quantize.default(*calls[-1])
    assert found[-1]
