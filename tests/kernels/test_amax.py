"""The largest magnitude: emulated kernels and the CPU's torch, and what the call refuses."""

import math
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cute_quant as cq
from cute_quant.dispatch import tensor_amax
from cute_quant.jit import lookup
from tests.helpers import assert_same_bits, bits, random_bits
from tests.kernels.emulated_gpu import OnGpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def filled(shape, dtype, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)


def expected(x, per_matrix):
    magnitudes = x.double().abs()
    amax = magnitudes.amax((-2, -1)) if per_matrix else magnitudes.amax()
    return amax.float()


class EmulatedGpu:
    """An emulated GPU of few multiprocessors, so that small tensors take several launches."""

    def __init__(self, kernels, arch, sms):
        self.kernels, self.arch, self.sms = kernels, arch, sms
        self.grids = []

    def amax(self, x, per_matrix):
        """``cute_quant.tensor_amax`` of a CPU tensor; results of a launch are what the next reads.

        They are NaN before it, as is the result if a part is left out.
        """
        with mock.patch.multiple(
            lookup,
            architecture=lambda device: self.arch,
            find_architecture=lambda device: self.arch,
            multiprocessors=lambda device: self.sms,
            function=self.function,
        ):
            return tensor_amax.run(x.as_subclass(OnGpu), per_matrix)

    def function(self, spec, arch):
        def run(x, parts, column_warps, column_ctas):
            kernel = self.kernels.get(spec, arch)
            parts.fill_(math.nan)
            kernel(x, parts, column_warps, column_ctas, outputs=[parts])
            self.grids.append(kernel.host.launches[-1].grid)

        return run


@pytest.fixture
def emulated(kernels, arch):
    return lambda sms=1: EmulatedGpu(kernels, arch, sms)


def views():
    """Return names and makers of tensors of every kind of strides, from a dtype."""
    return {
        "one row": lambda d: filled((1, 7), d),
        "contiguous": lambda d: filled((3, 5, 1000), d),
        "odd and long": lambda d: filled((67, 8191), d),
        "rows apart": lambda d: filled((13, 1200), d)[:, 4:1101],
        "matrices apart": lambda d: filled((3, 9, 264), d)[:, 1:6],
        "rows between": lambda d: filled((9, 3, 264), d).transpose(0, 1),
        "odd address": lambda d: filled((1, 4000), d)[:, 1:],
        "one column": lambda d: filled((40, 8), d)[:, 3:4],
        "broadcast": lambda d: filled((1, 1, 600), d).expand(3, 4, 600),
        "leading dimensions": lambda d: filled((2, 3, 4, 50), d),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_matrix", [False, True])
@pytest.mark.parametrize("name", views())
def test_every_element_counts(name, per_matrix, dtype, emulated):
    """The largest is moved over a few places, the ends of every row and matrix among them."""
    x = views()[name](dtype)
    gpu = emulated()
    rows, k = x.shape[-2:]
    batch = math.prod(x.shape[:-2])
    places = {(0, 0, 0), (0, 0, k - 1), (batch - 1, rows - 1, k - 1), (batch // 2, rows // 2, 0)}
    for place in sorted(places) if name != "broadcast" else [None]:
        y = x if place is None else moved_largest(x, place)
        amax = gpu.amax(y, per_matrix)
        assert amax.dtype is torch.float32
        assert_same_bits(amax.as_subclass(torch.Tensor), expected(y, per_matrix))


def moved_largest(x, place):
    """Return a tensor with the strides of `x` whose element at a place is its largest, negative."""
    storage = x.untyped_storage().clone()
    y = torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.shape, x.stride())
    batch, row, column = place
    index = torch.arange(math.prod(x.shape[:-2])).view(x.shape[:-2])
    matrix = tuple((index == batch).nonzero()[0].tolist())
    y[(*matrix, row, column)] = -100.0
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [math.nan, -math.nan, math.inf, -math.inf, 0.0])
def test_what_is_not_finite(special, dtype, emulated):
    x = filled((2, 9, 3000), dtype).mul(special == special and special != 0.0)
    x[1, 8, 2999] = special
    for per_matrix in (False, True):
        amax = emulated().amax(x, per_matrix).as_subclass(torch.Tensor)
        assert_same_bits(amax, cq.tensor_amax(x, per_matrix=per_matrix))
        assert_same_bits(amax, expected(x, per_matrix).abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pattern_of_bits(dtype, emulated):
    """Random bits, so that payloads of NaN and subnormal numbers are among them."""
    x = random_bits((64, 1, 48), dtype, seed=1)
    x[::2] = x[::2].where(x[::2].isfinite(), 0.0)
    x[1::4] *= 2.0**-130 if dtype is not torch.float16 else 2.0**-20
    amax = emulated().amax(x, True).as_subclass(torch.Tensor)
    reference = cq.tensor_amax(x, per_matrix=True)
    assert torch.equal(amax.isnan(), x.isnan().any(-1).squeeze(-1))
    assert torch.equal(bits(amax), bits(reference))  # one NaN
    assert torch.equal(reference.nan_to_num(-1.0), expected(x, True).nan_to_num(-1.0))


def test_launches_of_small_and_large_inputs(emulated):
    """One CTA has a small input to itself; the parts of a large one are reduced by another one."""
    small, large = emulated(132), emulated(132)
    small.amax(filled((1, 7168), torch.bfloat16), False)
    assert small.grids == [(1, 1, 1)]
    large.amax(filled((64, 7168), torch.bfloat16), False)
    assert large.grids == [(28, 1, 1), (1, 1, 1)]
    matrices = emulated(1)
    matrices.amax(filled((3, 40, 512), torch.bfloat16)[:, 1:33], True)
    assert matrices.grids == [(1, 1, 3)]


def test_every_cta_has_its_part(emulated):
    gpu, x = emulated(4), filled((64, 20008), torch.bfloat16)[:, :20000]
    assert_same_bits(gpu.amax(x, False).as_subclass(torch.Tensor), expected(x, False))
    column_ctas, row_ctas, _ = gpu.grids[0]
    assert column_ctas > 1 and row_ctas > 1


@pytest.mark.parametrize("per_matrix", [False, True])
def test_more_matrices_than_a_grid_counts(per_matrix, kernels, arch, monkeypatch):
    from cute_quant.kernels import amax

    monkeypatch.setattr(amax, "MAX_GRID_Z", 2)
    monkeypatch.setattr(kernels, "_kernels", {})
    x = filled((5, 3, 72), torch.bfloat16)[:, :2, :70]
    gpu = EmulatedGpu(kernels, arch, 1)
    assert_same_bits(gpu.amax(x, per_matrix).as_subclass(torch.Tensor), expected(x, per_matrix))
    assert gpu.grids[0][2] == 2


def strided(shape, strides):
    return torch.empty(0, dtype=torch.bfloat16, device="meta").as_strided(shape, strides)


@pytest.mark.parametrize(
    ("shape", "strides", "per_matrix", "rows", "k"),
    [
        ((4, 8, 64), None, False, 1, 4 * 8 * 64),
        ((4, 8, 64), None, True, 1, 8 * 64),
        ((4, 8, 64), (640, 64, 1), False, 4, 8 * 64),
        ((8, 64), (72, 1), False, 8, 64),
        ((3, 1, 64), (2**31, 64, 1), False, 1, 64),
        ((3, 1, 64), (2**16, 64, 1), False, 3, 64),
        ((2**17, 2**14), None, False, 8, 2**28),
        ((2**31 - 1, 2), None, False, 2**31 - 1, 2),
        ((2**20, 2**12, 2), None, False, 2**5, 2**28),
        ((2**20, 2**12, 2), None, True, 1, 2**13),
    ],
)
def test_memory_without_gaps_has_few_rows(shape, strides, per_matrix, rows, k):
    t = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    t = t if strides is None else strided(shape, strides)
    view = tensor_amax.merged_view(t, per_matrix=per_matrix)
    assert view.shape[1:] == (rows, k)
    assert math.prod(view.shape) == t.numel()


@pytest.mark.parametrize("sms", [1, 132])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2**28), (70000, 3, 8), (1, 2**31 - 1, 2)])
def test_a_grid_fills_the_gpu_once(shape, sms):
    grid = tensor_amax.choose_grid(shape, 4, sms)
    assert grid.column_warps in (1, 2, 4, 8)
    assert 1 <= grid.parts <= max(1, 4 * sms // shape[0])


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 3, 8), (3, 0, 8)])
def test_no_elements(shape, device):
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    assert cq.tensor_amax(x).item() == 0.0
    per_matrix = cq.tensor_amax(x, per_matrix=True)
    assert per_matrix.shape == shape[:-2] and per_matrix.eq(0).all()


@pytest.mark.parametrize("name", views())
@pytest.mark.parametrize("per_matrix", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call(dtype, per_matrix, name, device):
    x = views()[name](dtype)
    on_device = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device)
    if name != "broadcast":
        on_device.copy_(x)
    else:
        on_device = x[:1, :1].to(device).expand(x.shape)
    amax = cq.tensor_amax(on_device, per_matrix=per_matrix)
    assert amax.device.type == device and not amax.requires_grad
    assert_same_bits(amax.cpu(), expected(x, per_matrix))


def test_it_is_what_a_format_takes(device):
    x = filled((3, 40, 96), torch.bfloat16).to(device)
    for per_matrix in (False, True):
        amax = cq.tensor_amax(x, per_matrix=per_matrix)
        ours = cq.quantize(x, cq.NVFP4, amax=amax)
        theirs = cq.quantize(x, cq.NVFP4, amax=expected(x.cpu(), per_matrix).to(device))
        for a, b in zip(ours, theirs, strict=True):
            assert_same_bits(a, b)


def test_tracers_see_an_operator():
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 8, device="cuda")
        amax = cq.tensor_amax(x, per_matrix=True)
        assert amax.shape == (2, 3) and amax.dtype is torch.float32 and amax.is_cuda
        assert cq.tensor_amax(x).shape == ()
    x = filled((6, 40), torch.bfloat16)
    torch.library.opcheck(torch.ops.cute_quant.tensor_amax.default, (x, False))
    compiled = torch.compile(
        lambda x: cq.tensor_amax(x * 2), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for rows in (6, 3):
        assert_same_bits(compiled(x[:rows]), 2 * expected(x[:rows], False))


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (1.0, {}, TypeError, "x: expected a torch.Tensor, got"),
        (torch.ones(2, 2, dtype=torch.float64), {}, TypeError, "x: expected a tensor of"),
        (torch.ones(2), {}, ValueError, "x: expected 2 or more dimensions"),
        (torch.ones(8, 8).t(), {}, ValueError, "x: expected rows contiguous along k"),
        (torch.ones(2, 3, 4, 8)[:, :2], {}, ValueError, "x: expected leading dimensions"),
        (torch.ones(2, 2), {"per_matrix": 1}, TypeError, "per_matrix: expected a bool, got"),
        (torch.ones(2, 2, requires_grad=True), {}, RuntimeError, "tensor_amax is not differen"),
    ],
)
def test_refusals(x, options, error, message):
    with pytest.raises(error, match=message):
        cq.tensor_amax(x, **options)


def test_vmap_and_gradients_of_the_operator_are_refused():
    with pytest.raises(RuntimeError, match="vmap is not supported"):
        torch.vmap(cq.tensor_amax)(torch.ones(2, 3, 8))
    with pytest.raises(RuntimeError, match=r"torch\.vmap is not supported"):
        torch.vmap(lambda x: torch.ops.cute_quant.tensor_amax(x, False))(torch.ones(2, 3, 8))
    x = torch.ones(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="tensor_amax is not differentiable"):
        torch.ops.cute_quant.tensor_amax(x, False).backward()


def test_a_missing_kernel_is_named(monkeypatch):
    monkeypatch.setattr(lookup, "_functions", {})
    monkeypatch.setattr(lookup, "_found", lambda spec, arch: None)
    with (
        mock.patch.multiple(
            lookup,
            architecture=lambda device: "sm_90a",
            find_architecture=lambda device: "sm_90a",
            multiprocessors=lambda device: 132,
        ),
        cq.forbid_compilation(),
        pytest.raises(RuntimeError, match=r"amax-float32 for sm_90a.*call tensor_amax before"),
    ):
        tensor_amax.run(torch.ones(2, 8, dtype=torch.bfloat16).as_subclass(OnGpu), False)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 2**31 + 5, 300000 * 7184 - 1])
def test_offsets_past_32_bits(place):
    x = torch.zeros(300000, 7184, dtype=torch.bfloat16, device="cuda")
    x.view(-1)[place] = -3.0
    assert cq.tensor_amax(x).item() == 3.0
    assert cq.tensor_amax(x[:, 8:]).item() == (3.0 if place % 7184 >= 8 else 0.0)
