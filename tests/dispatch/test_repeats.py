"""Repeated calls of operators without a GPU: they launch what the first one launches."""

from __future__ import annotations

import pytest
import torch

from cute_quant import DEEP_GEMM, DEEP_GEMM_SM90, MXFP8, NVFP4, quantize
from cute_quant.dispatch import launch, repeats
from tests.dispatch.test_plan import BF16, at, launched, x_at

__all__ = ["launched"]
operators = torch.ops.cute_quant
NORM = {"eps": 1e-6, "weight_offset": 0.0, "rounding": "fused"}
SILU = {"interleaved": False, "clamp": None, "alpha": 1.0, "beta": 0.0, "rounding": "fused"}


def quantize_call(x=None, fmt=DEEP_GEMM, *tensors, **options):
    return operators.quantize.default, (x_at() if x is None else x, str(fmt), *tensors), options


def batch_call():
    return quantize_call(x_at(shape=(2, 6, 256)))


def batches_call():
    return quantize_call(x_at(shape=(2, 3, 6, 256)))


def strided_call():
    return quantize_call(x_at(stride=272), DEEP_GEMM_SM90)


def nvfp4_call():
    return quantize_call(None, NVFP4, None, None, torch.ones(1), upper_kind="amax")


def prefix_sum_call():
    ends = torch.tensor([2, 6], dtype=torch.int32)
    return quantize_call(None, DEEP_GEMM, ends, rows="prefix_sum")


def masked_call():
    counts = torch.tensor([2, 6], dtype=torch.int32)
    return quantize_call(x_at(shape=(2, 6, 256)), DEEP_GEMM, counts, rows="masked")


def gathered_call():
    return quantize_call(None, DEEP_GEMM, None, torch.arange(4, dtype=torch.int32))


def scattered_call():
    scatter = torch.tensor([[0, 7], [1, 6], [2, 5], [3, -1], [4, -1], [-1, -1]], dtype=torch.int32)
    return quantize_call(None, DEEP_GEMM_SM90, None, None, None, scatter, num_rows=8)


def stochastic_call():
    state = torch.tensor([1, 2])
    return quantize_call(None, DEEP_GEMM, None, None, None, None, state)


def weighted_call():
    return operators.silu_mul_quantize.default, (x_at(), torch.ones(6), str(MXFP8)), SILU


def gradients_call():
    options = {name: value for name, value in SILU.items() if name != "rounding"}
    arguments = (x_at(shape=(6, 128)), x_at(), str(MXFP8))
    return operators.silu_mul_backward_quantize.default, arguments, options


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
    masked_call,
    gathered_call,
    scattered_call,
    stochastic_call,
    weighted_call,
    gradients_call,
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


def test_weights_with_gradients(launched, found):
    """Under no_grad they are read as others are."""
    function, (x, weight, *rest), options = norm_call()
    with torch.no_grad():
        for _ in range(2):
            function(x, torch.nn.Parameter(weight), *rest, **options)
    assert found == [False, True]


def test_tensors_without_memory_are_named(launched):
    operators.quantize.default(x_at(), str(DEEP_GEMM))
    for x in (x_at().to_sparse(), x_at().float().to_mkldnn()):
        with pytest.raises(TypeError, match="x: expected a strided tensor"):
            operators.quantize.default(x, str(DEEP_GEMM))


def test_functions_find_tensors_of_inference_mode_again(launched, monkeypatch):
    looked_up = []
    key = launch._key
    monkeypatch.setattr(launch, "_key", lambda call: looked_up.append(call) or key(call))
    quantize(x_at())
    with torch.inference_mode():
        x = x_at()
        for _ in range(3):
            quantize(x)
    assert len(looked_up) == 2


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
    calls = [(x_at(shape=(rows, 256)), str(DEEP_GEMM)) for rows in range(1, launch.MAX_RECENT + 2)]
    for _ in range(2):
        for arguments in calls:
            operators.quantize.default(*arguments)
    assert not any(found)
    operators.quantize.default(*calls[-1])
    assert found[-1]
