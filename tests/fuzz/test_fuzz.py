"""Random calls against the oracle: on the CPU, in the emulator, and on a GPU.

    FUZZ_CASES=20000 FUZZ_SEED=7 pytest tests/fuzz -m gpu
    make fuzz

Without settings the seed is fixed. ``make fuzz`` runs in the emulator until it is stopped.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from cute_quant import dequantize
from cute_quant.contract.rows import DENSE
from cute_quant.contract.upper_scales import KINDS as UPPER_KINDS
from cute_quant.kernels.config import DEFAULT_TILE, MAX_GRID_Y, MAX_GRID_Z
from cute_quant.kernels.heuristics import QUANTIZE_TILES
from tests.fuzz import dequantization, emulated
from tests.fuzz.case import OPERATIONS, Case
from tests.fuzz.dequantization import Dequantization
from tests.fuzz.draw import DOMAINS, OPTIONS, TINY, Draw, draw_kernels
from tests.helpers import EVERY_DTYPE, all_formats, as_arguments

SEED = int(os.environ.get("FUZZ_SEED", 0))
CASES = int(os.environ.get("FUZZ_CASES", 4000))
KERNELS = {"quantize": 210, "fake_quantize": 30, "silu_mul": 40, "rms_norm": 40}
DEQUANTIZATIONS = 40
CASES_PER_KERNEL = -(-CASES // (sum(KERNELS.values()) + DEQUANTIZATIONS))
CASES_ON_CPU = 3

DRAWN = {operation: draw_kernels(count, operation, SEED) for operation, count in KERNELS.items()}
DRAWN_BACK = dequantization.draw_kernels(DEQUANTIZATIONS, SEED)
EVERY_KERNEL = [kernel for kernels in DRAWN.values() for kernel in kernels]

counted = {"cases": 0}


@pytest.fixture(scope="module", autouse=True)
def announcement(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print the settings that repeat a run."""
    counted["cases"] = 0
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{counted['cases']} random cases, FUZZ_SEED={SEED}, FUZZ_CASES={CASES}")


def run(case: Case, device: str) -> None:
    """Run a case on a device, and check it."""
    before = case.arenas()
    after = {name: arena.to(device, copy=True) for name, arena in before.items()}
    try:
        results = case.call(after)
    except Exception as error:
        raise AssertionError(f"FUZZ_SEED={SEED}, {case}") from error
    case.check(before, after, results, exact=device == "cpu")
    counted["cases"] += 1


def back(drawn: Dequantization, arenas: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run a call of ``dequantize``."""
    kernel, upper = drawn.kernel, as_arguments(drawn.upper(arenas))
    return dequantize(*drawn.views(arenas), kernel.fmt, dtype=kernel.dtype, **upper)


@pytest.mark.parametrize("kernel", EVERY_KERNEL[::3], ids=str)
def test_on_the_cpu(kernel):
    for number in range(CASES_ON_CPU):
        run(Draw(kernel, f"{SEED} {number}", TINY).case(), "cpu")


@pytest.mark.parametrize("kernel", DRAWN_BACK, ids=str)
def test_dequantize_on_the_cpu(kernel):
    for number in range(CASES_ON_CPU):
        drawn = Dequantization(kernel, f"{SEED} {number}", 10 * TINY)
        after = {name: arena.clone() for name, arena in drawn.arenas.items()}
        drawn.check(after, back(drawn, after))
        counted["cases"] += 1


@pytest.mark.parametrize(
    "session",
    [
        pytest.param(session, marks=pytest.mark.slow if number % 3 else ())
        for number, session in enumerate(emulated.sessions())
    ],
    ids=str,
)
def test_in_the_emulator(session, kernels):
    """Run every operation, in memory where each wrong access raises."""
    for case in session.cases(SEED):
        session.run(kernels, case)
        counted["cases"] += 1


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", EVERY_KERNEL, ids=str)
def test_on_a_gpu(kernel):
    for number in range(CASES_PER_KERNEL):
        run(Draw(kernel, f"{SEED} {number}").case(), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", DRAWN_BACK, ids=str)
def test_dequantize_on_a_gpu(kernel):
    for number in range(CASES_PER_KERNEL):
        drawn = Dequantization(kernel, f"{SEED} {number}")
        on_gpu = {name: arena.cuda() for name, arena in drawn.arenas.items()}
        try:
            result = back(drawn, on_gpu)
        except Exception as error:
            raise AssertionError(f"FUZZ_SEED={SEED}, {drawn}") from error
        drawn.check(on_gpu, result)
        counted["cases"] += 1


def large_shapes() -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Return batch shape, rows and columns by name, one for each kind of launch."""
    sms = (
        torch.cuda.get_device_properties(0).multi_processor_count
        if torch.cuda.is_available()
        else 1
    )
    elements = max(table[-2].below for table in QUANTIZE_TILES.values()) * sms
    tall = DEFAULT_TILE.rows * MAX_GRID_Y
    return {
        "large": ((), elements // 992 + 2, 992),
        "large-and-wide": ((), elements // 16_000 + 3, 16_000),
        "large-batch": ((3,), elements // 3000 + 1, 1056),
        "large-and-ragged": ((), elements // 1000 + 2, 1000),
        "tall": ((), tall + 5, 3),
        "tall-and-large": ((), 2 * tall + 7, 32),
        "deep": ((MAX_GRID_Z + 4,), 2, 16),
        "deep-and-large": ((MAX_GRID_Z + 3,), 5, 33),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("name", large_shapes())
@pytest.mark.parametrize("number", range(5))
def test_large(name, number):
    """Run few cases: the oracle is slow at these sizes."""
    batch_shape, mn, k = large_shapes()[name]
    generator = random.Random(f"{SEED} {name} {number}")
    domains = [d for d in DOMAINS if d[2] == bool(batch_shape) and (d[0] == DENSE or number > 1)]
    kind, gathered, batched = generator.choice(domains)
    # The values of x of all widths, and the narrowest that the rows allow.
    kernel = replace(
        generator.choice(DRAWN["quantize"] + DRAWN["fake_quantize"][:10]),
        kind=kind,
        gathered=gathered,
        batched=batched,
        ragged=k % 16 != 0,
        operation="quantize",
    )
    if kernel.fmt.group_size == -1 and k > 1000:
        kernel = replace(kernel, fmt=kernel.fmt.replace(group_size=128))
    store = min(kernel.store_bytes, 16)
    draw = Draw(replace(kernel, store_bytes=store), f"{SEED} {name} {number}")
    run(draw.finish(batch_shape, mn, k), "cuda")


def test_the_generator_draws_everything():
    """Each choice is drawn, and rows have exactly the alignment of their kernel."""
    assert {kernel.fmt for kernel in DRAWN["quantize"]} == set(all_formats())
    for operation in OPERATIONS:
        domains = {(k.kind, k.gathered, k.batched) for k in DRAWN[operation]}
        assert operation == "fake_quantize" or domains == set(DOMAINS)
        for name, choices in OPTIONS.get(operation, {}).items():
            assert {kernel.option(name) for kernel in DRAWN[operation]} == set(choices)
    assert {kernel.fmt.values for kernel in DRAWN["fake_quantize"]} == set(EVERY_DTYPE)
    seen = set()
    for kernel in EVERY_KERNEL:
        for number in range(4):
            case = Draw(kernel, number).case()
            x = case.places["x"]
            seen |= {"sf-padding"} if "sf" in case.places else {"allocated"}
            seen |= {"expanded"} if 0 in x.strides else set()
            seen |= {"nothing"} if 0 in x.shape else set()
            if kernel.upper is not None:
                shape = case.places["upper"].shape
                seen |= {(kernel.upper, len(shape) if math.prod(shape) == 1 else "matrices")}
            address = x.start + x.offset * kernel.dtype.itemsize
            strides = [
                stride * kernel.dtype.itemsize
                for size, stride in zip(x.shape[:-1], x.strides[:-1], strict=True)
                if size > 1
            ]
            assert math.gcd(32, address, *strides) == kernel.load_bytes, case
            assert case.k % 16 == 0 or kernel.ragged
    kinds, shapes = zip(*(pair for pair in seen if isinstance(pair, tuple)), strict=True)
    assert set(kinds) == set(UPPER_KINDS) and set(shapes) >= {0, 1, "matrices"}
    assert seen >= {"sf-padding", "allocated", "expanded", "nothing"}
