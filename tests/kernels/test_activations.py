"""Real activations: what a transformer feeds its GEMMs, with its outliers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cute_quant import dequantize, quantize
from tests.exact import exact_group
from tests.helpers import FORMATS, check_every_byte

PATH = Path(__file__).parents[2] / "bench" / "data" / "activations.safetensors"
ACTIVATIONS = load_file(PATH)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_byte(name, fmt, device):
    check_every_byte(ACTIVATIONS[name].to(device), fmt)


@pytest.mark.parametrize(("name", "columns"), [("intermediate", 3), ("residual", 1)])
def test_against_exact_arithmetic(name, columns, device):
    x = ACTIVATIONS[name][::25]
    q, sf = quantize(x.to(device))
    assert sf.shape == (len(x), columns) and sf.stride() == (1, 12)
    exponents = sf.cpu().clone(memory_format=torch.contiguous_format)
    for i, row in enumerate(x):
        for j, group in enumerate(row.split(128)):
            codes, exponent = exact_group(group.tolist(), min_scale=1e-10)
            assert q[i, 128 * j : 128 * j + 128].cpu().view(torch.uint8).tolist() == codes
            assert (exponents[i, j // 4].item() >> (8 * (j % 4)) & 0xFF) == exponent


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_signal_to_noise(name, device):
    x = ACTIVATIONS[name].to(device)
    noise = dequantize(*quantize(x), dtype=torch.float32) - x.float()
    ratio = 10 * torch.log10(x.float().square().sum() / noise.square().sum())
    assert ratio > 30  # decibels; four significant bits make about 31
