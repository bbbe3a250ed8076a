"""Draw the codes, scales and errors of each numerics on the same activations.

    python -m bench.numerics

`make figures` does it too. Needs no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

import cute_quant as cq
from cute_quant.contract.format_choices import known_numerics
from cute_quant.lab.drawing import Box, Drawing, Words

ROOT = Path(__file__).parents[1]
ACTIVATIONS = Path(__file__).parent / "data" / "activations.safetensors"
PICTURE = ROOT / "docs" / "numerics.svg"
TENSOR = "intermediate"

STALE = 2.0**14
CASES = (
    ("NVFP4", 1.0, "NVFP4, the amax of the tensor"),
    ("NVFP4", STALE, "NVFP4, 2^14 times the amax of the tensor"),
    ("MXFP4", 1.0, "MXFP4"),
    ("MXFP8", 1.0, "MXFP8"),
)
"""Format, factor of the amax, and title."""

MARGIN, LABEL, CODES, SCALES, ERROR, NUMBERS = 16, 190, 210, 330, 190, 150
LEFT = [MARGIN + sum((LABEL, CODES, SCALES, ERROR)[:i]) for i in range(1, 5)]
WIDTH = LEFT[-1] + NUMBERS + MARGIN
ROW, BAR, TITLE, HEAD = 48, 34, 34, 64
SCALE_BARS = 24
"""Powers of two of scales that are drawn: the largest of all and those below it."""
MAGNITUDE_BARS = 8


class Result(NamedTuple):
    """Results of numerics that have the same bits.

    Attributes:
        names: the numerics that have these bits.
        codes: shares of magnitudes: e2m1's, or the eight highest exponents of e4m3, zero first.
        scales: shares of scales by power of two, that of the largest scale of the case last. The
            first stands for all below.
        error: ||y - x|| / ||x||, to three digits.
        different, negative_zeros: codes that are not those of "ieee", and that are -0.
    """

    names: list[str]
    codes: list[float]
    scales: list[float]
    error: float
    different: int
    negative_zeros: int


def results(x: torch.Tensor, name: str, factor: float) -> list[Result]:
    """Return the results of every numerics of a format, one for those with equal bits."""
    base = cq.NAMED_FORMATS[name].replace(scale_layout="row_major")
    choices = base.values, base.group_size, base.scale_dtype, base.round_scale
    amax = x.abs().amax().float() * factor if base.upper_scale else None
    found: dict[bytes, tuple[list[str], torch.Tensor, torch.Tensor, float]] = {}
    for numerics in known_numerics(*choices):
        fmt = base.replace(numerics=numerics)
        q, sf = cq.quantize(x, fmt, amax=amax)
        y = cq.dequantize(q, sf, fmt, dtype=torch.float32, amax=amax).double()
        codes = q.view(torch.uint8)
        if fmt.value_type.per_byte == 2:
            codes = torch.stack([codes & 0xF, codes >> 4], -1).flatten(-2)
        bits = codes.numpy().tobytes() + sf.view(torch.uint8).numpy().tobytes()
        error = ((y - x.double()).norm() / x.double().norm()).item()
        found.setdefault(bits, ([], codes, sf.float(), error))[0].append(numerics)
    highest = max(_exponents(sf).max().item() for _, _, sf, _ in found.values())
    (_, ieee, *_) = next(iter(found.values()))
    return [
        Result(
            names,
            _shares(_magnitudes(codes, base), MAGNITUDE_BARS),
            _shares((_exponents(sf) - highest + SCALE_BARS - 1).clamp(min=0), SCALE_BARS),
            float(f"{error:.3g}"),
            int((codes != ieee).sum()),
            int((codes == (8 if base.value_type.per_byte == 2 else 0x80)).sum()),
        )
        for names, codes, sf, error in found.values()
    ]


def _magnitudes(codes: torch.Tensor, fmt: cq.Format) -> torch.Tensor:
    """Return e2m1 codes without their sign, or bins of two exponents of e4m3."""
    return codes & 7 if fmt.value_type.per_byte == 2 else (codes & 0x7F) >> 4


def _exponents(sf: torch.Tensor) -> torch.Tensor:
    """Return the exponents of scales, far below all others for 0."""
    _, exponent = torch.frexp(sf)
    return exponent.where(sf != 0, -1000)


def _shares(bins: torch.Tensor, count: int) -> list[float]:
    counts = torch.bincount(bins.flatten().long(), minlength=count)
    return (counts.double() / counts.sum()).tolist()


def picture() -> Drawing:
    """Draw the results of all formats."""
    x = load_file(ACTIVATIONS)[TENSOR]
    drawing = Drawing("Codes, scales and errors of each numerics on the same activations", WIDTH)
    drawing.add(
        Words(MARGIN, 26, "Numerics on the same activations", 16, bold=True),
        Words(LEFT[0], 50, "codes by magnitude", 12, colour="muted"),
        Words(LEFT[1], 50, "scales by power of two, underflowing ones left", 12, colour="muted"),
        Words(LEFT[2], 50, "error", 12, colour="muted"),
        Words(LEFT[3], 50, "codes unlike ieee's", 12, colour="muted"),
    )
    y = float(HEAD)
    for name, factor, title in CASES:
        y += TITLE
        drawing.add(Words(MARGIN, y - 10, title, 13, bold=True))
        found = results(x, name, factor)
        largest = max(result.error for result in found)
        for number, result in enumerate(found):
            _draw(drawing, result, largest, f"{'ab'[number % 2]}{number % 4}", y)
            y += ROW
    drawing.height = y + MARGIN
    return drawing


def _draw(drawing: Drawing, result: Result, largest: float, colour: str, y: float) -> None:
    """Draw a result as a row."""
    for line, some in enumerate((result.names[:3], result.names[3:])):
        drawing.add(Words(MARGIN, y + 14 + 16 * line, ", ".join(some), 12))
    for left, width, shares in (
        (LEFT[0], CODES, result.codes),
        (LEFT[1], SCALES, result.scales),
    ):
        step = (width - 24) / len(shares)
        drawing.add(Box(left, y + BAR, width - 24, 1, "line"))
        for i, share in enumerate(shares):
            height = round(BAR * share / max(shares), 1)
            if share:
                bar = max(height, 1.0)
                drawing.add(Box(left + i * step, y + BAR - bar, step - 2, bar, colour, "line"))
    length = round((ERROR - 80) * result.error / largest, 1)
    drawing.add(
        Box(LEFT[2], y + 8, length, 18, colour, "line"),
        Words(LEFT[2] + length + 6, y + 22, f"{result.error:.2%}", 12),
        Words(LEFT[3], y + 16, f"{result.different:,}", 12),
        Words(LEFT[3], y + 32, f"{result.negative_zeros:,} are -0", 11, colour="muted"),
    )


def main() -> None:
    PICTURE.write_text(picture().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
