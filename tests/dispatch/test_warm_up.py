"""After a warm-up no call in its range compiles anything, and what is missing has a remedy."""

import os
import random
import shlex

import pytest
import torch

import cute_quant as cq
from cute_quant import Indexed, Masked, PrefixSum
from cute_quant.cli import main
from cute_quant.dispatch import launch, warm_up
from cute_quant.dispatch.call_range import OPERATIONS
from cute_quant.dispatch.warm_up import WarmKernel, WarmUp
from cute_quant.jit import compilation, keys, lookup
from tests.fuzz.warm import RANGES, draw_call

CALLS = int(os.environ.get("CUTE_QUANT_TEST_CALLS", "150"))
"""Calls that are drawn: ``CUTE_QUANT_TEST_CALLS=2000`` for long."""
GPU_CALLS = 2000


class Compiled(dict):
    """Functions of kernels that were compiled, none of which does anything."""

    forbidden = False

    def function(self, spec, arch):
        if (spec, arch) not in self:
            if self.forbidden:
                raise lookup.NotBuilt(f"{keys.spec_name(spec)} for {arch} is missing")
            self[spec, arch] = lambda *arguments: None
        return self[spec, arch]

    def resolve(self, spec, arch):
        source = lookup.MEMORY if (spec, arch) in self else lookup.COMPILED
        return lookup.Resolved(self.function(spec, arch), source)


@pytest.fixture
def compiled(monkeypatch) -> Compiled:
    """A GPU of CPU tensors, whose kernels do nothing."""
    made = Compiled()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(warm_up, "_cuda_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(launch.library, "as_kernel_arguments", lambda arguments: arguments)
    monkeypatch.setattr(lookup, "function", made.function)
    monkeypatch.setattr(lookup, "resolve", made.resolve)
    monkeypatch.setattr(lookup, "find", lambda *task: task in made or None)
    for name, empty in (("_plans", {}), ("_recent", []), ("_recent_out", [])):
        monkeypatch.setattr(launch, name, empty)
    return made


@pytest.fixture
def gpu(compiled, monkeypatch):
    """Return what makes the GPU one of an architecture and a number of multiprocessors."""

    def put(arch: str, sms: int) -> Compiled:
        monkeypatch.setattr(lookup, "architecture", lambda index: arch)
        monkeypatch.setattr(lookup, "find_architecture", lambda index: arch)
        monkeypatch.setattr(lookup, "multiprocessors", lambda index: sms)
        return compiled

    return put


@pytest.mark.slow
@pytest.mark.parametrize("name", RANGES)
def test_nothing_is_compiled_after_a_warm_up(name, gpu):
    seen = set()
    for arch, sms in (("sm_100a", 1), ("sm_100a", 20), ("sm_90a", 132)):
        compiled = gpu(arch, sms)
        compiled.clear()
        compiled.forbidden = False
        cq.warm_up(**RANGES[name])
        assert compiled
        compiled.forbidden = True
        for number in range(max(1, CALLS // len(RANGES) // 3)):
            launch._plans.clear()
            launch._recent.clear()
            launch._recent_out.clear()
            draw_call(RANGES[name], f"{name} {arch} {sms} {number}")("cpu")
        seen |= {spec for spec, _ in compiled}
    assert len(seen) >= 2


def test_the_generator_reaches_size_classes_and_alignments(gpu):
    """Outside of the range something is missing, so the test above can fail."""
    compiled = gpu("sm_100a", 20)
    narrow = {**RANGES["batches"], "max_rows": 1, "batched": False, "alignment": 32}
    cq.warm_up(**narrow)
    compiled.forbidden = True
    missing = set()
    for number in range(40):
        try:
            draw_call(RANGES["batches"], number)("cpu")
        except RuntimeError as error:
            missing.add(str(error).split(" for ")[0])
    assert any("rows_per_thread_2" in name for name in missing)
    assert any("load_bytes_16" in name for name in missing)
    assert any("batched" in name for name in missing)


SCATTERED = {"k": (512, 24), "max_rows": 300, "scattered": True, "alignment": 8}


@pytest.mark.parametrize("rows", [None, Masked, PrefixSum, Indexed])
@pytest.mark.parametrize(
    "fmt",
    [
        cq.DEEP_GEMM,
        pytest.param(cq.NVFP4, marks=pytest.mark.slow),
        pytest.param(cq.NVFP4.replace(row_scale=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_scattered_calls(rows, fmt, gpu):
    """Of all operations, with every further tensor, and of any number of places and rows."""
    compiled = gpu("sm_90a", 132)
    operations = ("quantize", "silu_mul_quantize", "rms_norm_quantize")
    cq.warm_up(fmt, operations=operations, rows=(rows,), **SCATTERED)
    compiled.forbidden = True
    generator = random.Random(0)
    upper = {"encode_scale": torch.ones(())} if fmt is cq.NVFP4 else {}
    for _ in range(15):
        k, tokens = generator.choice(SCATTERED["k"]), generator.randint(1, 300)
        mn, width = generator.choice((1, 3, 300)), generator.randint(1, 32)
        places = torch.zeros(tokens, width, dtype=torch.int32)
        counts = torch.zeros(mn if rows is Indexed else generator.randint(1, 5), dtype=torch.int32)
        domain = None if rows is None else rows(counts)
        call = {"rows": domain, "scatter": places, "num_rows": mn, **upper}
        gate_up = torch.zeros(tokens, 2 * k, dtype=torch.bfloat16)
        x, weight = gate_up[:, :k], torch.ones(k, dtype=torch.bfloat16)
        results = cq.quantize(x, fmt, **call)
        of_rows = generator.choice((None, torch.ones(tokens)))
        cq.silu_mul_quantize(gate_up, fmt, weight=of_rows, **call)
        residual = generator.choice((None, x.clone()))
        normalized = generator.random() < 0.5
        cq.rms_norm_quantize(x, weight, fmt, residual=residual, normalized=normalized, **call)
        assert results[0].shape[-2] == mn
        if rows is not Indexed:
            taller = cq.quantize(x, fmt, **{**call, "num_rows": mn + 1})
            assert taller[0].shape[-2] == mn + 1
    compiled.clear()
    launch._plans.clear()
    with pytest.raises(RuntimeError, match="--scattered") as raised:
        cq.quantize(x, fmt, **call)
    command = shlex.split(str(raised.value).split("`")[1])
    kernel = str(raised.value).split(" for sm_90a is missing: ")[0]
    assert kernel in listed(["build", *command[2:], "--list"])


LAUNCHED = {
    "quantize": {"fmt": cq.MXFP8, "k": (20, 64), "max_rows": 3, "alignment": 8, "batched": True},
    "silu": {"operations": "silu_mul_quantize", "k": 24, "max_rows": 3, "rows": (None, Masked)},
    "norm": {"operations": "rms_norm_quantize", "k": 12, "max_rows": 3, "rows": (None, PrefixSum)},
    "back": {"operations": ("dequantize", "fake_quantize"), "k": 33, "max_rows": 3},
    "upper": {"fmt": cq.NVFP4, "k": 72, "max_rows": 3, "rows": (None, PrefixSum, Indexed)},
    "scales of rows": {
        "operations": ("quantize", "dequantize", "fake_quantize"),
        "fmt": cq.NVFP4.replace(row_scale=True),
        "k": 72,
        "max_rows": 3,
        "batched": True,
    },
    "gradients": {
        "operations": ("quantize", "silu_mul_backward_quantize"),
        "k": (48, 64),
        "max_rows": 3,
        "batched": True,
        "stochastic": True,
    },
    "interleaved gradients": {
        "operations": "silu_mul_backward_quantize",
        "k": 48,
        "max_rows": 3,
        "interleaved": True,
        "clamp": 7.0,
    },
    "columns": {
        "operations": "quantize_columns",
        "fmt": cq.DEEP_GEMM_SM90,
        "k": 64,
        "max_rows": 20,
        "batched": True,
        "transposed": True,
        "stochastic": True,
    },
    "both directions": {
        "operations": ("quantize_both", "silu_mul_quantize_both"),
        "column_fmt": cq.DEEP_GEMM_32,
        "k": 72,
        "max_rows": 3,
        "rows": (PrefixSum,),
    },
    "gradients in both directions": {
        "operations": "silu_mul_backward_quantize_both",
        "column_fmt": cq.MXFP8,
        "k": (256, 64),
        "max_rows": 20,
    },
    "gathered": {"k": 128, "max_rows": 3, "rows": (Masked, Indexed), "gathered": True},
    "scattered": {"k": 128, "max_rows": 3, "rows": (Masked, PrefixSum), "scattered": True},
    "scattered silu": {**SCATTERED, "operations": "silu_mul_quantize", "rows": (None,)},
    "weights": {
        "operations": "dequantize_blocks",
        "fmt": cq.DEEP_GEMM_SM90,
        "k": 72,
        "max_rows": 3,
        "batched": True,
    },
    "checkpoints": {"operations": "requantize_blocks", "fmt": cq.MXFP4, "k": 72, "max_rows": 3},
    "scales": {
        "operations": "convert_scales",
        "fmt": cq.GROUPWISE_FP8,
        "to": cq.DEEP_GEMM_SM90,
        "k": 700,
        "max_rows": 3,
        "rows": (None, Masked, PrefixSum, Indexed),
        "alignment": 4,
    },
    "bytes": {
        "operations": "convert_scales",
        "fmt": cq.MXFP8,
        "to": cq.MXFP8.replace(scale_layout="row_major"),
        "k": 100,
        "max_rows": 3,
        "alignment": 1,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHED)
def test_each_kernel_takes_the_launch_of_a_warm_up(name, gpu, kernels, monkeypatch):
    """Kernels run in the emulator, whose host code checks the alignment that a kernel needs."""
    compiled, launched = gpu("sm_90a", 132), []

    def function(spec, arch):
        def run(*operands):
            launched.append(spec)
            kernels.get(spec, arch)(*operands)

        compiled[spec, arch] = run
        return run

    monkeypatch.setattr(lookup, "function", function)
    monkeypatch.setattr(compiled, "function", function, raising=False)
    done = cq.warm_up(**LAUNCHED[name])
    assert {keys.spec_name(spec) for spec in launched} == {kernel.name for kernel in done}


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_warm_up_of_gradients(interleaved, stochastic, gpu):
    """Calls that differ from the range are missing, and say with which options they are not."""
    compiled = gpu("sm_90a", 132)
    options = {"interleaved": interleaved, "alpha": 1.702}
    operations = "quantize", "silu_mul_backward_quantize"
    for k in (40, 64, 512):
        cq.warm_up(
            k=k, max_rows=8, operations=operations, stochastic=stochastic, batched=True, **options
        )
    compiled.forbidden = True
    given = torch.zeros(2, dtype=torch.int64)
    for shape in ((3, 40), (1, 64), (2, 4, 512)):
        x = torch.zeros(shape, dtype=torch.bfloat16)
        grad = torch.zeros(*shape[:-1], shape[-1] // 2, dtype=torch.bfloat16)
        state, other = (given, None) if stochastic else (None, given)
        cq.quantize(x, rng_state=state)
        cq.silu_mul_backward_quantize(grad, x, rng_state=state, **options)
        for call in (
            lambda x=x, other=other: cq.quantize(x, rng_state=other),
            lambda x=x, grad=grad, other=other: cq.silu_mul_backward_quantize(
                grad, x, rng_state=other, **options
            ),
        ):
            with pytest.raises(RuntimeError) as raised:
                call()
            assert ("--stochastic" in str(raised.value)) == (not stochastic)


COLUMN_OPERATIONS = (
    "quantize_columns",
    "quantize_both",
    "silu_mul_quantize_both",
    "silu_mul_backward_quantize_both",
)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_warm_up_of_columns(transposed, stochastic, gpu):
    """No call of the range is missing, into any memory; others say with which options they are."""
    compiled = gpu("sm_90a", 132)
    options = {"transposed": transposed, "stochastic": stochastic}
    sizes = {"k": (256, 72, 36), "max_rows": 300, "rows": (None, PrefixSum), "batched": True}
    formats = cq.DEEP_GEMM_32, cq.DEEP_GEMM_32
    cq.warm_up(formats[0], column_fmt=formats[1], operations=COLUMN_OPERATIONS, **sizes, **options)
    compiled.forbidden = True
    given, generator = torch.zeros(2, dtype=torch.int64), random.Random(1)
    call = {"transposed": transposed, "rng_state": given if stochastic else None}
    for number in range(12):
        k, mn = generator.choice(sizes["k"]), generator.choice((1, 3, 16, 33, 144))
        leading, rows = ((), PrefixSum(given.int())) if number % 3 == 0 else ((number % 3,), None)
        gate_up = torch.zeros(*leading, mn, 2 * k, dtype=torch.bfloat16)
        x, grad = gate_up[..., :k], gate_up[..., : k // 2]
        call["rows"], out = rows, None
        if number % 2:
            shape = (*leading, k, mn) if transposed else (*leading, mn, k)
            wide = torch.zeros(*shape[:-1], shape[-1] + -shape[-1] % 32 + 32 * (number % 4 == 1))
            out = wide.to(torch.float8_e4m3fn)[..., : shape[-1]], None
        cq.quantize_columns(x.contiguous(), formats[0], out=out, **call)
        out = None if out is None else (None, out)
        cq.quantize_both(x.contiguous(), *formats, out=out, **call)
        weight = generator.choice((None, torch.ones(*leading, mn)))
        cq.silu_mul_quantize_both(gate_up, *formats, weight=weight, out=out, **call)
        cq.silu_mul_backward_quantize_both(
            grad.contiguous(), x.contiguous(), *formats, out=out, **call
        )
    for other in ({"transposed": not transposed}, {"rng_state": None if stochastic else given}):
        for missing, arguments in (
            (cq.quantize_columns, (x, formats[0])),
            (cq.quantize_both, (x, *formats)),
            (cq.silu_mul_quantize_both, (gate_up, *formats)),
            (cq.silu_mul_backward_quantize_both, (grad, x, *formats)),
        ):
            with pytest.raises(RuntimeError) as raised:
                missing(*arguments, **call | other)
            command = shlex.split(str(raised.value).split("`")[1])
            kernel = str(raised.value).split(" for sm_90a is missing: ")[0]
            assert kernel in listed(["build", *command[2:], "--list"])


@pytest.mark.parametrize("kind", ["encode_scale", "decode_scale", "amax"])
def test_a_warm_up_is_of_one_kind_of_upper_scale(kind, gpu):
    compiled = gpu("sm_90a", 132)
    cq.warm_up(cq.NVFP4, k=64, max_rows=4, upper_scale=kind)
    compiled.forbidden = True
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    for other in ("encode_scale", "decode_scale", "amax"):
        if other == kind:
            cq.quantize(x, cq.NVFP4, **{other: torch.ones(())})
            continue
        with pytest.raises(RuntimeError, match=f"--upper-scale {other} --arch sm_90a"):
            cq.quantize(x, cq.NVFP4, **{other: torch.ones(())})


@pytest.mark.parametrize("rows", [PrefixSum, Indexed])
def test_a_warm_up_has_an_upper_scale_of_each_group(rows, gpu):
    compiled = gpu("sm_90a", 132)
    cq.warm_up(cq.NVFP4, k=64, max_rows=4, rows=(rows,))
    compiled.forbidden = True
    x, counts = torch.zeros(4, 64), torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    for shape in ((), (1,), (4,)):
        cq.quantize(x.bfloat16(), cq.NVFP4, rows=rows(counts), encode_scale=torch.ones(shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", RANGES)
def test_the_remedy_of_a_call_makes_its_kernel(name, gpu):
    """The command of the message lists what the call asked for."""
    generator = random.Random(0)
    for number in range(3):
        compiled = gpu("sm_90a", 132)
        compiled.clear()
        compiled.forbidden = True
        with pytest.raises(RuntimeError) as raised:
            draw_call(RANGES[name], f"{number} {generator.random()}")("cpu")
        message = str(raised.value)
        kernel = message.split(" for sm_90a is missing: ")[0]
        assert "call cute_quant.warm_up before, or run `cute-quant warm-up --operation" in message
        command = shlex.split(message.split("`")[1])
        assert command[:2] == ["cute-quant", "warm-up"]
        assert kernel in listed(["build", *command[2:], "--list"])


def listed(arguments: list[str]) -> list[str]:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main.main(arguments) == 0
    return out.getvalue().splitlines()


def test_what_is_missing_under_forbid_compilation(monkeypatch):
    monkeypatch.setattr(lookup, "_functions", {})
    spec_and_arch = lookup_of_default()
    with cq.forbid_compilation(), pytest.raises(lookup.NotBuilt) as raised:
        lookup.function(*spec_and_arch)
    assert str(raised.value) == (
        "quantize-bfloat16-e4m3_128_e8m0_mn_major_packed for sm_90a is not built yet, and "
        "cute_quant.forbid_compilation() was called"
    )


def lookup_of_default():
    from cute_quant.kernels.config import QuantizeSpec

    return QuantizeSpec(torch.bfloat16, cq.DEEP_GEMM), "sm_90a"


def test_forbidding_nests_and_ends():
    assert compilation.why_refused() is None
    with cq.forbid_compilation():
        with cq.forbid_compilation():
            pass
        assert compilation.why_refused()
    assert compilation.why_refused() is None
    forbidden = cq.forbid_compilation()
    try:
        assert compilation.why_refused()
    finally:
        forbidden.__exit__(None, None, None)
        forbidden.__exit__(None, None, None)
    assert compilation.why_refused() is None


@pytest.mark.parametrize("mode", ["off", "on", "", "never"])
def test_the_variable(mode, monkeypatch):
    monkeypatch.setenv("CUTE_QUANT_JIT", mode)
    if mode == "never":
        with pytest.raises(ValueError, match=r"CUTE_QUANT_JIT: expected one of .*, got 'never'"):
            compilation.why_refused()
    else:
        refused = compilation.why_refused()
        assert refused == ("CUTE_QUANT_JIT=off forbids compiling" if mode == "off" else None)


def test_nothing_is_compiled_or_loaded_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(lookup, "_functions", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(lookup, "_found", lambda *task: pytest.fail("looked for it"))
    with pytest.raises(lookup.NotBuilt, match="not built yet, and the current stream is captured"):
        lookup.function(*lookup_of_default())
    # Who has its kernel is not asked.
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("asked of a warm call")
    )
    function = object()
    lookup._functions[lookup_of_default()] = function
    assert lookup.function(*lookup_of_default()) is function


def test_a_summary_reads_well():
    done = WarmUp(
        [
            WarmKernel("a", "sm_90a", lookup.DISK_CACHE),
            WarmKernel("b", "sm_90a", lookup.COMPILED),
            WarmKernel("c", "sm_90a", lookup.MEMORY),
        ],
        1.25,
    )
    assert repr(done) == (
        "3 kernels for sm_90a in 1.2 s: 1 in memory, 1 from the disk cache, 1 compiled"
    )
    assert done[0].name == "b" and len(done) == 3 and done.count(lookup.COMPILED) == 1
    assert repr(WarmUp([], 0.0)) == "no kernels"
    assert repr(WarmUp(done[:1], 0.0)) == "1 kernel for sm_90a in 0.0 s: 1 compiled"


def test_on_the_cpu_there_is_nothing_to_do():
    assert not cq.warm_up(k=128, max_rows=4, device="cpu")


WRONG = {
    "fmt: expected a Format": {"fmt": "e4m3"},
    "k: expected an int": {"k": "many"},
    "k: expected 1 to": {"k": 0},
    "k: expected at least one number, got none": {"k": ()},
    "k: expected at most 32768 for rms_norm": {"k": 2**16, "operations": "rms_norm_quantize"},
    "max_rows: expected 1 to": {"max_rows": 0},
    "max_rows: expected an int, got": {"max_rows": 1.5},
    "alignment: expected a power of two": {"alignment": 24},
    "operations: expected some of": {"operations": "bind"},
    "rows: expected some of None, Masked": {"rows": ("sparse",)},
    "dtype: expected one of": {"dtype": torch.int8},
    "rounding: expected one of": {"rounding": "up"},
    "clamp: expected": {"clamp": -1.0},
    "device: expected a CUDA device or the CPU": {"device": "meta"},
    "fmt: expected a group_size for blocks": {
        "operations": "dequantize_blocks",
        "fmt": cq.ROWWISE_FP8,
    },
    "fmt: expected groups of rows, none over whole rows": {
        "operations": "requantize_blocks",
        "fmt": cq.NVFP4.replace(row_scale=True),
    },
    "to: expected a Format, such as .*, got None": {"operations": "convert_scales"},
    "to: expected group_size 128": {"operations": "convert_scales", "to": cq.MXFP8},
    "k: expected multiples of 2 for e2m1": {"k": (64, 65), "fmt": cq.MXFP4},
    "k: expected at most 32768 for quantize to e2m1": {
        "k": 2**15 + 2,
        "fmt": cq.NVFP4.replace(row_scale=True),
    },
    "upper_scale: expected one of .*'encode_scale'.*, got 'scale'": {"upper_scale": "scale"},
}


@pytest.mark.parametrize(("message", "arguments"), WRONG.items(), ids=WRONG)
def test_arguments_that_are_wrong(message, arguments):
    with pytest.raises((TypeError, ValueError), match=message):
        cq.warm_up(**{"k": 128, "max_rows": 4, **arguments})


def test_operations_are_public():
    assert all(callable(getattr(cq, name)) for name in OPERATIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RANGES)
def test_nothing_is_compiled_after_a_warm_up_on_the_gpu(name, monkeypatch):
    monkeypatch.setattr(lookup, "_functions", {})
    for kept, empty in (("_plans", {}), ("_recent", []), ("_recent_out", [])):
        monkeypatch.setattr(launch, kept, empty)
    assert cq.warm_up(**RANGES[name]).count(lookup.COMPILED)
    assert cq.warm_up(**RANGES[name]).count(lookup.MEMORY)
    with cq.forbid_compilation():
        for number in range(GPU_CALLS // len(RANGES)):
            draw_call(RANGES[name], f"gpu {name} {number}")("cuda")
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_the_first_call_after_a_warm_up_may_be_captured(monkeypatch):
    monkeypatch.setattr(lookup, "_functions", {})
    for kept, empty in (("_plans", {}), ("_recent", []), ("_recent_out", [])):
        monkeypatch.setattr(launch, kept, empty)
    small, large = (
        torch.randn(rows, 7168, dtype=torch.bfloat16, device="cuda") for rows in (8, 1024)
    )
    refused = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="captured: call cute_quant"),
        torch.cuda.graph(refused),
    ):
        cq.quantize(small)
    cq.warm_up(k=7168, max_rows=1024)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [cq.quantize(x) for x in (small, large)]
    graph.replay()
    for x, (q, sf) in zip((small, large), results, strict=True):
        expected_q, expected_sf = cq.quantize(x.cpu())
        assert torch.equal(q.cpu().view(torch.uint8), expected_q.view(torch.uint8))
        assert torch.equal(sf.cpu(), expected_sf)
