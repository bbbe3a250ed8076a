"""Bad input: every message names the argument, what was expected and what came."""

import ctypes

import pytest
import torch

import cute_quant.compile
from cute_quant import dequantize, ops, quantize
from cute_quant.compat import per_token_cast_to_fp8, per_token_group_quant_fp8_packed_for_deepgemm
from tests.helpers import UE8M0


def activations(device, mn=6, k=256, dtype=torch.bfloat16):
    return torch.ones(mn, k, dtype=dtype, device=device)


def values(device, mn=6, k=256):
    return torch.empty(mn, k, dtype=torch.float8_e4m3fn, device=device)


def scales(device, mn=6, k=256):
    return UE8M0.empty_scales(mn, k, torch.device(device))


def test_not_a_tensor():
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got list"):
        quantize([[1.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8, torch.float8_e4m3fn])
def test_dtype(dtype, device):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=rf"x: expected .*bfloat16 or float16, got {name}"):
        quantize(activations(device).to(dtype))


@pytest.mark.parametrize("shape", [(), (256,), (2, 3, 256)])
def test_dimensions(shape, device):
    with pytest.raises(ValueError, match=r"x: expected 2 dimensions .*got shape"):
        quantize(torch.ones(shape, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("k", [1, 64, 127, 129, 200])
def test_k_is_a_multiple_of_the_group(k, device):
    with pytest.raises(ValueError, match=rf"x: expected k to be a multiple of 128, got k = {k}"):
        quantize(activations(device, k=k))


def test_neighbours_are_contiguous(device):
    with pytest.raises(ValueError, match=r"x: expected neighbours .* contiguous, got .*\(1, 256\)"):
        quantize(activations(device, 256, 256).t())
    with pytest.raises(ValueError, match=r"x: expected neighbours"):
        quantize(activations(device, 4, 512)[:, ::2])


@pytest.mark.parametrize(
    "group_size", [0, -128, 1, 64, 127, 256, 128.5, "128", None, [128], torch.tensor(128)]
)
def test_group_size(group_size, device):
    with pytest.raises(ValueError, match=r"group_size: expected one of \(128,\), got"):
        quantize(activations(device), group_size)


@pytest.mark.parametrize("scale_format", ["", "e8m0", "UE8M0", None, torch.float32])
def test_scale_format(scale_format, device):
    with pytest.raises(ValueError, match=r"scale_format: expected one of \('ue8m0', 'float32'\)"):
        quantize(activations(device), scale_format=scale_format)


def test_round_scale(device):
    with pytest.raises(ValueError, match=r"round_scale: expected a bool, and False for"):
        quantize(activations(device), round_scale=True)
    with pytest.raises(ValueError, match=r"round_scale: expected a bool.*got 'yes'"):
        quantize(activations(device), scale_format="float32", round_scale="yes")


@pytest.mark.parametrize("min_scale", [-1e-10, float("nan"), float("inf"), 2.0**101])
@pytest.mark.parametrize("scale_format", ["ue8m0", "float32"])
def test_min_scale(min_scale, scale_format, device):
    with pytest.raises(ValueError, match=r"min_scale: expected .* <= min_scale <= .*, got"):
        quantize(activations(device), scale_format=scale_format, min_scale=min_scale)


def test_min_scale_of_float32_scales_is_normal(device):
    for round_scale in (False, True):
        with pytest.raises(ValueError, match=r"min_scale: expected .* got 0"):
            quantize(
                activations(device), scale_format="float32", round_scale=round_scale, min_scale=0
            )


@pytest.mark.parametrize("min_scale", ["1", None, [1e-10], 1j, torch.tensor(1e-10)])
def test_min_scale_is_a_number(min_scale, device):
    with pytest.raises(TypeError, match=r"min_scale: expected a number, got"):
        quantize(activations(device), min_scale=min_scale)


def test_gradients(device):
    x = activations(device).requires_grad_()
    with pytest.raises(RuntimeError, match=r"x: .*not differentiable"):
        quantize(x)
    with pytest.raises(RuntimeError, match=r"x: .*not differentiable"):
        torch.ops.cute_quant.quantize(x, 128, "ue8m0", False, 1e-10)
    with torch.no_grad():
        quantize(x)
        quantize(torch.nn.Parameter(x))
        torch.ops.cute_quant.quantize(x, 128, "ue8m0", False, 1e-10)
    quantize(x.detach())


def test_layout(device):
    with pytest.raises(TypeError, match=r"x: expected a strided tensor, got layout"):
        quantize(activations(device).to_sparse())


def test_negated_view(device):
    quantize(activations(device))  # of the same look
    with pytest.raises(ValueError, match=r"x: expected values in memory, got a lazily negated"):
        quantize(torch._neg_view(activations(device)))


def test_row_stride(device):
    x = torch.empty(1, dtype=torch.bfloat16, device=device).expand(2, 128)
    with pytest.raises(ValueError, match=r"x: expected neighbours"):
        quantize(x)
    far = torch.empty(0, dtype=torch.bfloat16, device="meta").as_strided((2, 128), (2**31, 1))
    with pytest.raises(ValueError, match=r"x: expected a row stride up to 2147483647 bytes"):
        quantize(far)


@pytest.mark.parametrize("out", [torch.empty(1), (torch.empty(1),), (1, 2, 3), "qs"])
def test_out_is_a_pair(out, device):
    with pytest.raises(TypeError, match=r"out: expected a pair \(q, sf\), got"):
        quantize(activations(device), out=out)


def bad_values(device):
    return [
        (TypeError, r"expected a tensor of float8_e4m3fn, got str", "q"),
        (TypeError, r"expected a tensor of float8_e4m3fn, got uint8",
         values(device).view(torch.uint8)),
        (TypeError, r"got float8_e5m2", values(device).view(torch.float8_e5m2)),
        (ValueError, r"expected shape \(6 or more, 256\), got \(5, 256\)", values(device, 5)),
        (ValueError, r"expected shape .*got \(6, 384\)", values(device, 6, 384)),
        (ValueError, r"expected shape .*got \(1536,\)", values(device).flatten()),
        (ValueError, r"expected strides .*got \(1, 256\)", values(device, 256, 256).t()),
        (ValueError, r"expected strides .*got \(0, 1\)", values(device, 1).expand(6, 256)),
        (ValueError, r"expected strides .*got \(128, 1\)",
         values(device).as_strided((6, 256), (128, 1))),
    ]  # fmt: skip


def bad_scales(device):
    aligned = torch.empty_strided((6, 1), (1, 8), dtype=torch.int32, device=device)
    return [
        (TypeError, r"expected a tensor of int32, got float32", aligned.view(torch.float32)),
        (TypeError, r"expected a tensor of int32, got tuple", (1, 2)),
        (ValueError, r"expected shape \(6, 1\), got \(6, 2\)", scales(device, 6, 1024)),
        (ValueError, r"expected shape \(6, 1\), got \(7, 1\)", scales(device, 7)),
        (ValueError, r"expected strides \(1, 8\), got \(1, 6\)",
         torch.empty_strided((6, 1), (1, 6), dtype=torch.int32, device=device)),
        (ValueError, r"expected strides \(1, 8\), got \(1, 1\)",
         torch.empty((6, 1), dtype=torch.int32, device=device)),
        (ValueError, r"expected strides \(1, 8\), got \(2, 8\)",
         torch.empty_strided((6, 1), (2, 8), dtype=torch.int32, device=device)),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(9))
def test_out_values(case, device):
    error, message, q = bad_values(device)[case]
    with pytest.raises(error, match=r"out q: .*" + message):
        quantize(activations(device), out=(q, None))


@pytest.mark.parametrize("case", range(7))
def test_out_scales(case, device):
    error, message, sf = bad_scales(device)[case]
    with pytest.raises(error, match=r"out sf: .*" + message):
        quantize(activations(device), out=(None, sf))


def test_out_overlaps(device):
    arena = torch.zeros(1 << 16, dtype=torch.uint8, device=device)

    def view(dtype, shape, strides, offset):
        typed = arena.view(dtype)
        return typed.as_strided(shape, strides, offset // typed.element_size())

    x = view(torch.bfloat16, (6, 256), (256, 1), 0)  # bytes 0 .. 3072
    q = view(torch.float8_e4m3fn, (6, 256), (256, 1), 3072)  # .. 4608
    sf = view(torch.int32, (6, 1), (1, 8), 4608)
    quantize(x, out=(q, sf))
    cases = [
        ("out q", "x", x, view(q.dtype, (6, 256), (256, 1), 3072 - 32), None),
        ("out q", "x", x, view(q.dtype, (6, 256), (256, 1), 0), None),
        ("out sf", "x", x, None, view(sf.dtype, (6, 1), (1, 8), 3072 - 4)),
        ("out sf", "out q", x, q, view(sf.dtype, (6, 1), (1, 8), 4608 - 4)),
    ]
    for name, other, x_, q_, sf_ in cases:
        with pytest.raises(ValueError, match=rf"{name}: expected memory of its own.* {other}"):
            quantize(x_, out=(q_, sf_))
    # Padding rows are written too, so they count: six rows end where x starts.
    x = view(torch.bfloat16, (6, 256), (256, 1), 8192)
    with pytest.raises(ValueError, match=r"out sf: expected memory of its own.* x"):
        quantize(x, out=(q, view(sf.dtype, (6, 1), (1, 8), 8192 - 24)))
    quantize(x, out=(q, view(sf.dtype, (6, 1), (1, 8), 8192 - 32)))


@pytest.mark.gpu
def test_devices_do_not_mix():
    for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
        with pytest.raises(ValueError, match=r"out q: expected the device of x, .*got"):
            quantize(activations(here), out=(values(there), None))
        with pytest.raises(ValueError, match=r"out sf: expected the device of x, .*got"):
            quantize(activations(here), out=(None, scales(there)))
        with pytest.raises(ValueError, match=r"sf: expected the device of q"):
            dequantize(values(here), scales(there))


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [1, 2, 8, 15])
def test_alignment_of_data(offset):
    x = torch.ones(4 * 256 + 16, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match=r"x: expected every row to start at a multiple of 32 byt"):
        quantize(x.as_strided((4, 256), (256, 1), offset))
    q = torch.empty(4 * 256 + 16, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    q = q.as_strided((4, 256), (256, 1), offset)
    with pytest.raises(ValueError, match=r"out q: expected every row to start at a multiple of 16"):
        quantize(activations("cuda", 4), out=(q, None))


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [257, 264, 271])
def test_alignment_of_rows(stride):
    x = torch.ones(4, stride, dtype=torch.bfloat16, device="cuda")[:, :256]
    with pytest.raises(ValueError, match=rf"x: expected every row .*got .*row stride of {stride} "):
        quantize(x)
    q = torch.empty(4, stride, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=rf"out q: expected every row .*row stride of {stride} "):
        quantize(activations("cuda", 4), out=(q[:, :256], None))


@pytest.mark.parametrize("capability", [(8, 9), (9, 1), (12, 0)])
def test_unsupported_architecture(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    cute_quant.compile.architecture.cache_clear()
    version = ".".join(map(str, capability))
    with pytest.raises(RuntimeError, match=rf"9.0, 10.0, 10.3 .*cuda:0, Some GPU, of {version}"):
        cute_quant.compile.architecture(0)
    cute_quant.compile.architecture.cache_clear()


def test_failed_calls_write_nothing(device):
    sf = scales(device)
    sf.fill_(7)
    with pytest.raises(ValueError, match="min_scale"):
        quantize(activations(device), min_scale=-1, out=(None, sf))
    assert sf.eq(7).all()


def test_dequantize(device):
    q, sf = quantize(activations(device))
    with pytest.raises(TypeError, match=r"q: expected a tensor of float8_e4m3fn, got uint8"):
        dequantize(q.view(torch.uint8), sf)
    with pytest.raises(TypeError, match=r"sf: expected a tensor of int32 or float32, got uint8"):
        dequantize(q, sf.to(torch.uint8))
    with pytest.raises(TypeError, match=r"dtype: expected one of .*, got torch.int8"):
        dequantize(q, sf, torch.int8)
    with pytest.raises(ValueError, match=r"q: expected 2 dimensions"):
        dequantize(q.flatten(), sf)
    with pytest.raises(
        ValueError, match=r"sf: expected .*\(6, 1\) for groups of 128, got .*\(5, 1"
    ):
        dequantize(q, sf[:5])
    with pytest.raises(ValueError, match=r"group_size: expected one of \(128,\), got 64"):
        dequantize(q, sf, group_size=64)


def test_dequantize_k(device):
    q, sf = values(device, 3, 100), torch.ones(3, 1, device=device)
    with pytest.raises(ValueError, match=r"q: expected k to be a multiple of 128, got k = 100"):
        dequantize(q, sf)
    with pytest.raises(TypeError, match=r"sf: expected a strided tensor, got layout"):
        dequantize(values(device), torch.ones(6, 2, device=device).to_sparse())


def test_out_requires_no_gradient(device):
    sf = torch.empty_strided((6, 2), (1, 8), device=device, requires_grad=True)
    q = values(device)
    q.view(torch.uint8).fill_(7)
    with pytest.raises(ValueError, match=r"out sf: expected a tensor that requires no gradient"):
        quantize(activations(device), scale_format="float32", out=(q, sf))
    assert q.view(torch.uint8).eq(7).all()


@pytest.fixture
def planned(monkeypatch):
    """CPU tensors that say CUDA, and a kernel that does nothing: what stands before a launch."""
    launched = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(ops, "_kernel", lambda *_: lambda *arguments: launched.append(arguments))
    monkeypatch.setattr(ops, "_plans", {})
    return launched


def test_plans_are_kept_for_what_they_hold(planned):
    """Each thing that a plan was checked for makes another plan."""
    x, q, sf = activations("cpu"), values("cpu"), scales("cpu")
    wide = torch.ones(6, 512, dtype=torch.bfloat16)[:, :256]
    calls = [
        lambda: quantize(x, out=(q, sf)),
        lambda: quantize(wide, out=(q, sf)),
        lambda: quantize(x.half(), out=(q, sf)),
        lambda: quantize(x[:5], out=(q, None)),
        lambda: quantize(x, out=(values("cpu", 9), sf)),
        lambda: quantize(x, out=(None, sf)),
        lambda: quantize(x),
        lambda: quantize(x, min_scale=1e-9),
        lambda: quantize(x, scale_format="float32"),
        lambda: quantize(x, scale_format="float32", round_scale=True),
    ]
    for count, call in enumerate(calls, 1):
        call()
        call()
        assert len(ops._plans) == count and len(planned) == 2 * count
    floors = [arguments[-1] for arguments in planned[::2]]
    assert floors == [94] * 7 + [98, ctypes.c_float(1e-10).value, 94]


def test_plans_skip_no_check(planned):
    x, q = activations("cpu"), values("cpu")
    sf = torch.empty_strided((6, 2), (1, 8))
    quantize(x, scale_format="float32", out=(q, sf))
    with pytest.raises(ValueError, match="out sf: expected a tensor that requires no gradient"):
        quantize(x, scale_format="float32", out=(q, sf.clone().requires_grad_()))
    with pytest.raises(ValueError, match="out sf: expected values in memory, got a lazily negated"):
        quantize(x, scale_format="float32", out=(q, torch._neg_view(sf)))
    with pytest.raises(ValueError, match="x: expected values in memory, got a lazily negated"):
        quantize(torch._neg_view(x), scale_format="float32", out=(q, sf))
    with pytest.raises(ValueError, match="out q: expected memory of its own"):
        quantize(x, scale_format="float32", out=(x.view(q.dtype)[:, :256], sf))
    # Without rows nothing is launched that would refuse these.
    quantize(x[:0], out=(values("cpu", 3), None))
    with pytest.raises(TypeError, match="out q: expected a tensor of float8_e4m3fn, got float32"):
        quantize(x[:0], out=(torch.ones(3, 256), None))


def test_what_the_kernel_refuses_is_named(planned, monkeypatch):
    """Its host code checks dtypes, devices and alignment; a plan leaves them to it."""
    x, q, sf = activations("cpu"), values("cpu"), scales("cpu")

    def refuse(*arguments):
        if arguments[1].dtype != torch.float8_e4m3fn or arguments[0].data_ptr() % 32:
            raise ValueError("Misaligned Tensor data on argument #0")

    monkeypatch.setattr(ops, "_kernel", lambda *_: refuse)
    quantize(x, out=(q, sf))
    with pytest.raises(TypeError, match="out q: expected a tensor of float8_e4m3fn, got uint8"):
        quantize(x, out=(q.view(torch.uint8), sf))
    moved = torch.ones(6 * 256 + 16, dtype=torch.bfloat16)
    moved = moved.as_strided((6, 256), (256, 1), 1 if moved.data_ptr() % 32 == 0 else 0)
    with pytest.raises(ValueError, match=r"x: expected every row to start at a multiple of 32"):
        quantize(moved, out=(q, sf))
    assert len(ops._plans) == 1


def test_too_many_rows():
    x = torch.empty(0, dtype=torch.bfloat16, device="meta").as_strided((2**31 - 4, 128), (128, 1))
    with pytest.raises(ValueError, match=r"x: expected up to 2146435072 rows"):
        quantize(x)


@pytest.mark.parametrize("eps", [None, "1e-10", 1j])
def test_eps_is_a_number(eps, device):
    with pytest.raises(TypeError, match=r"eps: expected a number, got"):
        per_token_group_quant_fp8_packed_for_deepgemm(activations(device), 128, eps=eps)


@pytest.mark.parametrize("eps", [0, 0.0, -1e-10, float("nan"), float("inf")])
def test_eps(eps, device):
    with pytest.raises(ValueError, match=r"eps: expected 0 < eps <= .*, got"):
        per_token_group_quant_fp8_packed_for_deepgemm(activations(device), 128, eps=eps)


def test_compat(device):
    x = activations(device)
    with pytest.raises(ValueError, match=r"use_ue8m0: expected True or None, got False"):
        per_token_group_quant_fp8_packed_for_deepgemm(x, 128, use_ue8m0=False)
    with pytest.raises(ValueError, match=r"group_size: expected"):
        per_token_group_quant_fp8_packed_for_deepgemm(x, 64)
    with pytest.raises(ValueError, match=r"out_q: expected"):
        per_token_group_quant_fp8_packed_for_deepgemm(x, 128, out_q=values(device)[:, :128])
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got int"):
        per_token_group_quant_fp8_packed_for_deepgemm(3, 128)
    with pytest.raises(TypeError, match=r"out_q: expected a tensor of float8_e4m3fn, got int"):
        per_token_group_quant_fp8_packed_for_deepgemm(x, 128, out_q=3)
    with pytest.raises(ValueError, match=r"gran_k: expected one of \(128,\), got 64"):
        per_token_cast_to_fp8(x, True, gran_k=64)
    with pytest.raises(TypeError, match=r"use_ue8m0: expected a bool, got 'no'"):
        per_token_cast_to_fp8(x, "no")
    with pytest.raises(ValueError, match=r"use_packed_ue8m0: expected False"):
        per_token_cast_to_fp8(x, False, use_packed_ue8m0=True)
