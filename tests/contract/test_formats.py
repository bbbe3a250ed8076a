"""Formats: identity, text, repr, refused choices, scale floors and memory for scales."""

import copy
import math
import pickle
import re
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch

import cute_quant
from cute_quant import (
    DEEP_GEMM,
    DEEP_GEMM_32,
    DEEP_GEMM_SM90,
    GROUPWISE_FP8,
    INT8,
    MXFP4,
    MXFP8,
    NAMED_FORMATS,
    NVFP4,
    ROWWISE_FP8,
    ROWWISE_INT8,
    Format,
    deep_gemm_format,
    empty_scales,
    quantize,
)
from cute_quant.contract.formats import all_formats
from tests.exact import POWERS, exact_min_scale
from tests.helpers import (
    EVERY_DTYPE,
    as_arguments,
    assert_same_bits,
    random_bits,
    upper_scale,
    whole_bytes,
)
from tests.helpers import all_formats as combinations

E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
E2M1 = torch.float4_e2m1fn_x2

LIBRARIES = ("vllm", "vllm_emulation", "flashinfer", "te", "torchao", "deepgemm")
OTHERS = ("vllm_triton", "vllm_bf16", "sglang", "tilekernels")
"""Libraries without NVFP4."""
MIN_SCALE_NAMES = ("vllm", "deepgemm", "sglang", "vllm_fused", "torchao", "ocp")

WITH_OPTIONS = [
    *(DEEP_GEMM.replace(min_scale=value) for value in ("deepgemm", "sglang", "ocp")),
    *(DEEP_GEMM.replace(min_scale=value) for value in (0, 2.0**-149, 1e-10, 0.1, 3, 2.0**100)),
    DEEP_GEMM_SM90.replace(min_scale=2.0**-126),
    DEEP_GEMM_SM90.replace(round_scale=True),
    DEEP_GEMM_SM90.replace(numerics="deepgemm"),
    GROUPWISE_FP8.replace(round_scale=True, min_scale=1 / 3),
    ROWWISE_INT8.replace(numerics="deepgemm", min_scale="sglang"),
    GROUPWISE_FP8.replace(numerics="vllm_triton"),
    GROUPWISE_FP8.replace(numerics="tilekernels", min_scale=0.1),
    DEEP_GEMM.replace(numerics="vllm_bf16"),
    DEEP_GEMM_SM90.replace(numerics="vllm_bf16", round_scale=True, min_scale="vllm"),
    ROWWISE_FP8.replace(numerics="vllm", min_scale="vllm"),
    INT8.replace(numerics="sglang", min_scale="torchao"),
    MXFP8.replace(values=E5M2, min_scale="ocp"),
    *(MXFP8.replace(numerics=name) for name in ("vllm", "flashinfer", "te", "torchao", "deepgemm")),
    *(MXFP4.replace(numerics=name) for name in ("vllm", "flashinfer", "torchao", "deepgemm")),
    *(NVFP4.replace(numerics=name) for name in LIBRARIES),
    *(NVFP4.replace(min_scale=value) for value in ("deepgemm", "torchao", 2.0**-9, 1, 448)),
    NVFP4.replace(numerics="torchao", min_scale="none", row_scale=True),
    NVFP4.replace(four_over_six=True, scale_layout="8x4"),
]
every_format = pytest.mark.parametrize("fmt", [*all_formats(), *WITH_OPTIONS], ids=str)
every_name = pytest.mark.parametrize("name", NAMED_FORMATS)


def test_every_combination_is_there():
    assert set(all_formats()) == set(combinations())
    assert len(all_formats()) == len(set(all_formats()))


@every_name
def test_names(name):
    assert getattr(cute_quant, name) is NAMED_FORMATS[name]
    assert name in cute_quant.__all__


def test_named_formats():
    """Check each named format field by field."""
    assert Format() is DEEP_GEMM
    assert Format(E4M3, 128, E8M0, "mn_major_packed") is DEEP_GEMM
    assert Format(E4M3, 32, E8M0, "mn_major_packed") is DEEP_GEMM_32
    assert Format(E4M3, 128, torch.float32, "mn_major") is DEEP_GEMM_SM90
    assert Format(E4M3, 32, E8M0, "128x4") is MXFP8
    assert Format(E4M3, 128, torch.float32, "row_major") is GROUPWISE_FP8
    assert Format(E4M3, -1, torch.float32, "row_major") is ROWWISE_FP8
    assert Format(torch.int8, 128, torch.float32, "row_major") is INT8
    assert Format(torch.int8, -1, torch.float32, "row_major") is ROWWISE_INT8
    assert Format(E2M1, 32, E8M0, "128x4") is MXFP4
    assert Format(E2M1, 16, E4M3, "128x4") is NVFP4
    assert len(set(NAMED_FORMATS.values())) == len(NAMED_FORMATS) == 10
    for fmt in NAMED_FORMATS.values():
        assert (fmt.round_scale, fmt.min_scale, fmt.numerics) == (False, None, "ieee")
        assert (fmt.row_scale, fmt.four_over_six) == (False, False)


# Text.


@every_format
def test_text(fmt):
    assert Format.parse(str(fmt)) is fmt
    assert Format.parse(fmt.text) is fmt
    assert f"{fmt}" == str(fmt)


@every_name
def test_text_of_names(name):
    assert Format.parse(name) is NAMED_FORMATS[name]


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        (DEEP_GEMM, "e4m3:128:e8m0:mn_major_packed"),
        (DEEP_GEMM_SM90, "e4m3:128:float32:mn_major"),
        (MXFP8, "e4m3:32:e8m0:128x4"),
        (ROWWISE_INT8, "int8:row:float32:row_major"),
        (INT8.replace(values=E5M2, round_scale=True), "e5m2:128:float32:row_major:round_scale"),
        (DEEP_GEMM.replace(min_scale="ocp"), "e4m3:128:e8m0:mn_major_packed:min_scale=ocp"),
        (DEEP_GEMM.replace(min_scale=0.1), "e4m3:128:e8m0:mn_major_packed:min_scale=0.1"),
        (
            GROUPWISE_FP8.replace(min_scale=3, numerics="deepgemm"),
            "e4m3:128:float32:row_major:min_scale=3.0:numerics=deepgemm",
        ),
        (MXFP4, "e2m1:32:e8m0:128x4"),
        (NVFP4.replace(row_scale=True), "e2m1:16:e4m3:128x4:row_scale"),
        (
            NVFP4.replace(scale_layout="row_major_packed", numerics="te", min_scale="torchao"),
            "e2m1:16:e4m3:row_major_packed:min_scale=torchao:numerics=te",
        ),
        (NVFP4.replace(scale_layout="8x4", four_over_six=True), "e2m1:16:e4m3:8x4:four_over_six"),
    ],
    ids=str,
)
def test_text_stays_as_it_is(fmt, text):
    """Exported graphs hold this text, so it must not change."""
    assert str(fmt) == text


def test_text_is_different_for_each_format():
    formats = {*all_formats(), *WITH_OPTIONS}
    assert len({str(fmt) for fmt in formats}) == len(formats) > len(all_formats())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nobody",
        "deep_gemm",
        "ue8m0",
        "e4m3",
        "e4m3:128:e8m0",
        "e4m3:128:e8m0:",
        "e4m3:128:e8m0:mn_major",
        "e4m3:128:e8m0:mn_major_packed:",
        "e4m3:128:float16:mn_major",
        "e3m0:128:e8m0:mn_major_packed",
        "e2m1:32:e4m3:128x4",
        "e4m3:16:e4m3:128x4",
        "e2m1:32:e8m0:128x4:row_scale",
        "e2m1:16:e4m3:128x4:row_scale=True",
        "e2m1:16:e4m3:128x4:numerics=vllm:four_over_six",
        "e2m1:16:e4m3:128x4:min_scale=vllm",
        "e2m1:32:e8m0:128x4:min_scale=none",
        "float32:128:e8m0:mn_major_packed",
        "e4m3:128.0:e8m0:mn_major_packed",
        "e4m3:127:e8m0:mn_major_packed",
        "e4m3:column:e8m0:mn_major_packed",
        "e4m3:128:e8m0:128x4",
        "e4m3:128:e8m0:mn_major_packed:round_scale",
        "e4m3:128:float32:mn_major:round_scale=",
        "e4m3:128:float32:mn_major:round_scale=True",
        "e4m3:128:float32:mn_major:round_scale=False",
        "e4m3:128:float32:mn_major:round_scale:round_scale",
        "e4m3:128:float32:mn_major:min_scale",
        "e4m3:128:float32:mn_major:min_scale=nobody",
        "e4m3:128:float32:mn_major:min_scale=nan",
        "e4m3:128:float32:mn_major:min_scale=0.0",
        "e4m3:128:float32:mn_major:numerics=fast",
        "e4m3:128:float32:mn_major:values=e5m2",
    ],
)
def test_text_that_is_none(text):
    message = f"fmt: expected one of DEEP_GEMM, .*, or text such as .*, got {text!r}"
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        Format.parse(text)


@pytest.mark.parametrize("value", [None, 128, DEEP_GEMM, b"DEEP_GEMM", ["DEEP_GEMM"]], ids=repr)
def test_parse_takes_text_alone(value):
    with pytest.raises(TypeError, match=f"fmt: expected a str, got {type(value).__name__}"):
        Format.parse(value)


# Identity.


@every_format
def test_equal_formats_are_one_object(fmt):
    fields = ("values", "group_size", "scale_dtype", "scale_layout")
    options = ("round_scale", "min_scale", "numerics", "row_scale", "four_over_six")
    positional = [getattr(fmt, name) for name in fields]
    keywords = {name: getattr(fmt, name) for name in options}
    assert Format(*positional, **keywords) is fmt
    assert Format(**dict(zip(fields, positional, strict=True)), **keywords) is fmt
    assert fmt.replace() is fmt and fmt.replace(**keywords) is fmt
    assert {fmt: 1}[Format(*positional, **keywords)] == 1


@every_format
def test_copies_are_the_same_object(fmt):
    assert copy.copy(fmt) is fmt and copy.deepcopy([fmt])[0] is fmt
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(fmt, protocol)) is fmt


def test_numbers_are_equal_as_floats():
    three = DEEP_GEMM.replace(min_scale=3.0)
    for number in (3, Fraction(3), np.float32(3.0), np.int64(3)):
        assert DEEP_GEMM.replace(min_scale=number) is three
    assert type(three.min_scale) is float
    # A library's name and its number are different choices with the same bound.
    number = DEEP_GEMM.replace(min_scale=1e-10)
    assert number is not DEEP_GEMM and number.floor == DEEP_GEMM.floor


@pytest.mark.parametrize(
    "choice",
    [
        {"values": torch.int8},
        {"group_size": 64},
        {"scale_dtype": E8M0},
        {"scale_layout": "mn_major"},
        {"round_scale": True},
        {"min_scale": "sglang"},
        {"numerics": "deepgemm"},
    ],
    ids=str,
)
def test_each_choice_makes_another_format(choice):
    other = GROUPWISE_FP8.replace(**choice)
    assert other is not GROUPWISE_FP8 and other != GROUPWISE_FP8
    for name in ("values", "group_size", "scale_dtype", "scale_layout", "round_scale"):
        assert getattr(other, name) == choice.get(name, getattr(GROUPWISE_FP8, name))
    assert other.min_scale == choice.get("min_scale")
    assert other.numerics == choice.get("numerics", "ieee")


def test_the_default_has_a_name_and_is_one_object():
    assert DEEP_GEMM.replace(min_scale="vllm") is DEEP_GEMM.replace(min_scale=None) is DEEP_GEMM
    assert NVFP4.replace(min_scale="none") is NVFP4
    assert MXFP4.replace(numerics="torchao", min_scale="ocp") is MXFP4.replace(numerics="torchao")
    deepgemm = NVFP4.replace(numerics="deepgemm")
    assert deepgemm.replace(min_scale="deepgemm") is deepgemm
    assert deepgemm.replace(min_scale="none") is not deepgemm
    # Numerics of another library have another default.
    assert deepgemm.floor == 2.0**-9 and deepgemm.replace(numerics="ieee").floor == 0.0


@pytest.mark.parametrize("name", ["min_scale", "group_size", "floor", "text", "anything"])
def test_a_format_does_not_change(name):
    before = str(DEEP_GEMM), DEEP_GEMM.floor
    message = f"{name}: a Format does not change, use replace"
    with pytest.raises(AttributeError, match=message):
        setattr(DEEP_GEMM, name, 1)
    with pytest.raises(AttributeError, match=message):
        delattr(DEEP_GEMM, name)
    assert (str(DEEP_GEMM), DEEP_GEMM.floor) == before and Format() is DEEP_GEMM


def at_once(function, threads=8):
    """Return what `function` returns to each of several threads that call it together."""
    barrier, results = threading.Barrier(threads), [None] * threads

    def run(i):
        barrier.wait()
        results[i] = function()

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


@pytest.mark.parametrize("number", range(20))
def test_threads_make_the_same_object(number):
    # Bounds that no other test has, so that each format is new.
    bound = 0.7 + number / 1024
    made = at_once(lambda: DEEP_GEMM_32.replace(min_scale=bound))
    assert made[0] is not None and all(fmt is made[0] for fmt in made)
    parsed = at_once(lambda: Format.parse(f"int8:64:e8m0:row_major:min_scale={bound}"))
    assert parsed[0] is not None and all(fmt is parsed[0] for fmt in parsed)
    assert made[0].kernel_format is DEEP_GEMM_32


# What a format says of itself.


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        (
            DEEP_GEMM,
            "<DEEP_GEMM = Format(float8_e4m3fn, 128, float8_e8m0fnu, 'mn_major_packed'): "
            "sf int32 (mn, ceil(k/512)), strides (1, align(mn, 4)); read by DeepGEMM on SM100>",
        ),
        (
            DEEP_GEMM_SM90.replace(min_scale="deepgemm", numerics="deepgemm"),
            "<Format(float8_e4m3fn, 128, float32, 'mn_major', min_scale='deepgemm', "
            "numerics='deepgemm'): sf float32 (mn, ceil(k/128)), strides (1, align(mn, 4)); "
            "read by DeepGEMM on SM90>",
        ),
        (
            MXFP8,
            "<MXFP8 = Format(float8_e4m3fn, 32, float8_e8m0fnu, '128x4'): sf float8_e8m0fnu "
            "(align(mn, 128) * align(ceil(k/32), 4),), contiguous blocks of 128x4; "
            "read by cuBLAS (torch's scaled_mm), CUTLASS>",
        ),
        (
            ROWWISE_FP8,
            "<ROWWISE_FP8 = Format(float8_e4m3fn, -1, float32, 'row_major'): "
            "sf float32 (mn, 1), contiguous; read by cuBLAS (torch's scaled_mm)>",
        ),
        (
            INT8.replace(values=E5M2, group_size=64, round_scale=True),
            "<Format(float8_e5m2, 64, float32, 'row_major', round_scale=True): "
            "sf float32 (mn, ceil(k/64)), contiguous; read by kernels of your own>",
        ),
        (
            NVFP4,
            "<NVFP4 = Format(float4_e2m1fn_x2, 16, float8_e4m3fn, '128x4'): sf float8_e4m3fn "
            "(align(mn, 128) * align(ceil(k/16), 4),), contiguous blocks of 128x4; "
            "read by cuBLAS (torch's scaled_mm), CUTLASS>",
        ),
        (
            NVFP4.replace(scale_layout="8x4", row_scale=True),
            "<Format(float4_e2m1fn_x2, 16, float8_e4m3fn, '8x4', row_scale=True): "
            "sf float8_e4m3fn (align(mn, 8) * align(ceil(k/16), 4),), contiguous blocks of 8x4; "
            "read by TensorRT-LLM's kernels for few rows>",
        ),
        (
            MXFP8.replace(scale_layout="row_major_packed"),
            "<Format(float8_e4m3fn, 32, float8_e8m0fnu, 'row_major_packed'): "
            "sf int32 (mn, ceil(k/128)), contiguous; read by DeepGEMM's mega-MoE on SM100>",
        ),
    ],
    ids=str,
)
def test_repr(fmt, text):
    assert repr(fmt) == text


@every_name
def test_repr_of_named_formats(name):
    fmt = NAMED_FORMATS[name]
    assert repr(fmt).startswith(f"<{name} = Format(")
    assert repr(fmt).endswith(f"read by {fmt.readers}>") and fmt.readers != "kernels of your own"


@every_format
@pytest.mark.parametrize(("mn", "k"), [(1, 1), (5, 70), (128, 512), (301, 1030)])
def test_repr_tells_shape_and_strides(fmt, mn, k):
    """Evaluate the shape and strides in the text, and compare them with allocated scales."""
    dtype, _, facts = fmt.sf_shape_facts.partition(" ")
    assert fmt.sf_shape_facts in repr(fmt) and dtype == str(fmt.sf_dtype).removeprefix("torch.")
    names = {"mn": mn, "k": k, "ceil": math.ceil, "align": lambda a, b: -(-a // b) * b}
    shape, _, layout = facts.rpartition("), ")
    sf = empty_scales(fmt, (mn, k))
    assert sf.shape == eval(f"{shape})", names) and sf.dtype is fmt.sf_dtype
    if layout.startswith("contiguous"):
        assert sf.is_contiguous()
        return
    shape, _, strides = facts.partition(", strides ")
    assert sf.shape == eval(shape, names) and sf.stride() == eval(strides, names)


# Refusals.


class Unprintable:
    def __repr__(self):
        raise AssertionError("a message must not look into what it describes")


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.float16, "torch.float16"),
        (torch.uint8, "torch.uint8"),
        (E8M0, "torch.float8_e8m0fnu"),
        ("e4m3", "'e4m3'"),
        (None, "None"),
        (torch.ones(1), "a tensor of float32"),
        ([E4M3], "list"),
        (Unprintable(), "Unprintable"),
    ],
    ids=lambda value: "" if isinstance(value, Unprintable) else None,
)
def test_values(value, got):
    message = (
        "values: expected one of float8_e4m3fn or float8_e5m2 or int8 or float4_e2m1fn_x2, "
        f"got {got}"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        Format(value)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (128.0, "128.0"),
        (True, "True"),
        (False, "False"),
        (0, "0"),
        (-128, "-128"),
        (8, "8"),
        (100, "100"),
        (512, "512"),
        ("128", "'128'"),
        ("row", "'row'"),
        (None, "None"),
        (np.int64(128), "int64"),
        ([128], "list"),
        (Unprintable(), "Unprintable"),
    ],
    ids=lambda value: "" if isinstance(value, Unprintable) else None,
)
def test_group_size(value, got):
    message = (
        f"group_size: expected one of (16, 32, 64, 128, 256) or -1 for the whole row, got {got}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DEEP_GEMM.replace(group_size=value)


@pytest.mark.parametrize("layout", ["128x4", "8x4"])
@pytest.mark.parametrize("group_size", [16, 64, 128, 256, -1])
def test_group_size_of_blocks(group_size, layout):
    message = f"group_size: expected 32 for scale_layout={layout}, .*, got {group_size}"
    with pytest.raises(ValueError, match=message):
        MXFP8.replace(group_size=group_size, scale_layout=layout)


def test_choices_of_nvfp4():
    cases = [
        ("group_size: expected 16 for scale_layout=128x4, .*, got 32", {"group_size": 32}),
        (
            "group_size: expected 16 for float8_e4m3fn scales, those of NVFP4, got 64",
            {"group_size": 64, "scale_layout": "row_major"},
        ),
        (
            "values: expected float4_e2m1fn_x2 for float8_e4m3fn scales, .*, got float8_e4m3fn",
            {"values": E4M3},
        ),
        (
            "scale_layout: expected one of .* for float8_e4m3fn scales, got 'mn_major'",
            {"scale_layout": "mn_major"},
        ),
        (
            "four_over_six: expected False for numerics=te, which has one scale, got True",
            {"numerics": "te", "four_over_six": True},
        ),
        ("round_scale: expected False for float8_e4m3fn scales, .*", {"round_scale": True}),
    ]
    for message, choices in cases:
        with pytest.raises(ValueError, match=f"^{message}$"):
            NVFP4.replace(**choices)


@pytest.mark.parametrize("name", ["row_scale", "four_over_six"])
def test_flags_of_e4m3_scales(name):
    for value, got in ((1, "1"), (None, "None"), ("yes", "'yes'")):
        with pytest.raises(TypeError, match=f"^{name}: expected a bool, got {got}$"):
            NVFP4.replace(**{name: value})
    for fmt in (MXFP4, DEEP_GEMM_SM90):
        dtype = str(fmt.scale_dtype).removeprefix("torch.")
        message = f"^{name}: expected False for {dtype} scales, over which .*, got True$"
        with pytest.raises(ValueError, match=message):
            fmt.replace(**{name: True})


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.bfloat16, "torch.bfloat16"),
        (torch.int32, "torch.int32"),
        (E5M2, "torch.float8_e5m2"),
        ("float32", "'float32'"),
        (None, "None"),
        ([torch.float32], "list"),
    ],
    ids=str,
)
def test_scale_dtype(value, got):
    message = f"scale_dtype: expected float8_e8m0fnu or float8_e4m3fn or float32, got {got}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        DEEP_GEMM.replace(scale_dtype=value)


BYTE_LAYOUTS = ("mn_major_packed", "row_major", "row_major_packed", "128x4", "8x4")


@pytest.mark.parametrize(
    ("scale_dtype", "layouts", "value", "got"),
    [
        (E8M0, BYTE_LAYOUTS, "mn_major", "'mn_major'"),
        (E8M0, BYTE_LAYOUTS, "ue8m0", "'ue8m0'"),
        (E8M0, BYTE_LAYOUTS, None, "None"),
        (torch.float32, ("mn_major", "row_major"), "mn_major_packed", "'mn_major_packed'"),
        (torch.float32, ("mn_major", "row_major"), "128x4", "'128x4'"),
        (torch.float32, ("mn_major", "row_major"), "row_major_packed", "'row_major_packed'"),
        (torch.float32, ("mn_major", "row_major"), ["mn_major"], "list"),
    ],
)
def test_scale_layout(scale_dtype, layouts, value, got):
    name = str(scale_dtype).removeprefix("torch.")
    message = f"scale_layout: expected one of {layouts} for {name} scales, got {got}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Format(E4M3, 32, scale_dtype, value)


@pytest.mark.parametrize(("value", "got"), [(1, "1"), (None, "None"), ("yes", "'yes'")])
def test_round_scale(value, got):
    with pytest.raises(TypeError, match=f"^round_scale: expected a bool, got {got}$"):
        DEEP_GEMM_SM90.replace(round_scale=value)


@pytest.mark.parametrize("fmt", [DEEP_GEMM, MXFP8, DEEP_GEMM.replace(scale_layout="row_major")])
def test_round_scale_of_exponents(fmt):
    message = "round_scale: expected False for float8_e8m0fnu scales, .*, got True"
    with pytest.raises(ValueError, match=message):
        fmt.replace(round_scale=True)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (True, "True"),
        ([1.0], "list"),
        (1j, "complex"),
        (torch.tensor(1.0), "a tensor of float32"),
        (Unprintable(), "Unprintable"),
    ],
    ids=lambda value: "" if isinstance(value, Unprintable) else None,
)
def test_type_of_min_scale(value, got):
    message = f"min_scale: expected a number or one of {MIN_SCALE_NAMES}, got {got}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        DEEP_GEMM.replace(min_scale=value)


@pytest.mark.parametrize("name", ["nobody", "", "VLLM", "1e-10"])
def test_name_of_min_scale(name):
    message = f"min_scale: expected a number or one of {MIN_SCALE_NAMES}, got {name!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DEEP_GEMM.replace(min_scale=name)


@pytest.mark.parametrize(
    ("fmt", "lowest", "value"),
    [
        *((DEEP_GEMM, 0.0, value) for value in (-1, -1e-30, 2**101, 10**400, math.inf, math.nan)),
        *(
            (DEEP_GEMM_SM90, 2.0**-126, value)
            for value in (0, 0.0, 2.0**-127, -1, 2**101, math.nan)
        ),
        (DEEP_GEMM_SM90.replace(round_scale=True), 2.0**-126, 0),
        (GROUPWISE_FP8, 2.0**-126, "ocp"),
        *((NVFP4, 0.0, value) for value in (-1, 448.5, 2.0**100, math.inf, math.nan)),
    ],
    ids=lambda value: repr(value)[:20] if isinstance(value, (int, float)) else str(value),
)
def test_value_of_min_scale(fmt, lowest, value):
    message = (
        f"min_scale: expected {lowest} <= min_scale <= {448.0 if fmt is NVFP4 else 2.0**100} for "
        f"{str(fmt.scale_dtype).removeprefix('torch.')} scales, got {value!r}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fmt.replace(min_scale=value)


FLOAT32_NUMERICS = (
    "ieee",
    "vllm",
    "vllm_triton",
    "vllm_bf16",
    "sglang",
    "torchao",
    "tilekernels",
    "deepgemm",
)
NUMERICS = [
    (NVFP4, ("ieee", *LIBRARIES)),
    (MXFP8, ("ieee", "vllm", "flashinfer", "te", "torchao", "deepgemm")),
    (MXFP4, ("ieee", "vllm", "flashinfer", "torchao", "deepgemm")),
    (MXFP8.replace(values=E5M2), ("ieee",)),
    (DEEP_GEMM, ("ieee", "vllm_bf16")),
    (DEEP_GEMM_SM90, FLOAT32_NUMERICS),
    (ROWWISE_FP8, FLOAT32_NUMERICS),
    (INT8, ("ieee", "vllm", "vllm_triton", "sglang", "deepgemm")),
    (ROWWISE_INT8, ("ieee", "vllm", "sglang", "deepgemm")),
    (DEEP_GEMM_SM90.replace(values=E5M2), ("ieee", "deepgemm")),
    (DEEP_GEMM_SM90.replace(round_scale=True), ("ieee", "vllm_bf16")),
    (DEEP_GEMM.replace(values=E5M2), ("ieee",)),
]


@pytest.mark.parametrize(("fmt", "known"), NUMERICS, ids=str)
def test_numerics(fmt, known):
    for name in known:
        assert fmt.replace(numerics=name).numerics == name
    wrong = [(name, repr(name)) for name in ("ieee", *LIBRARIES, *OTHERS) if name not in known]
    for value, got in (*wrong, ("fast", "'fast'"), ("", "''"), (None, "None"), (["ieee"], "list")):
        message = f"numerics: expected one of {known} for "
        with pytest.raises(ValueError, match=f"^{re.escape(message)}.* scales.*, got {got}$"):
            fmt.replace(numerics=value)


def test_choices_that_there_are_not():
    with pytest.raises(TypeError, match="dtype"):
        DEEP_GEMM.replace(dtype=torch.int8)
    with pytest.raises(TypeError, match="positional"):
        Format(E4M3, 128, torch.float32, "mn_major", True)


# Kernels.


@every_format
def test_kernel_format(fmt):
    """Formats that differ in `min_scale` alone share a kernel."""
    kernel_format = fmt.kernel_format
    assert kernel_format.min_scale is None and kernel_format.kernel_format is kernel_format
    assert kernel_format.replace(min_scale=fmt.min_scale) is fmt
    assert (kernel_format is fmt) == (fmt.min_scale is None)
    for name in ("round_scale", "numerics", "group_size", "values", "row_scale", "four_over_six"):
        assert getattr(kernel_format, name) == getattr(fmt, name)


@pytest.mark.parametrize("values", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("min_scale", MIN_SCALE_NAMES)
def test_floor(min_scale, values):
    """Named bounds are UE8M0 bytes if scales are powers of two, else float32."""
    bound = exact_min_scale(min_scale, values)
    byte = next(e for e, power in enumerate(POWERS) if power >= Fraction(float(np.float32(bound))))
    choices = {"values": values, "min_scale": min_scale}
    fmt = DEEP_GEMM.replace(**choices)
    assert fmt.floor == byte and type(fmt.floor) is int
    if min_scale == "ocp":
        assert byte == 0
        return
    fmt = DEEP_GEMM_SM90.replace(round_scale=True, **choices)
    assert fmt.floor == byte and type(fmt.floor) is int
    fmt = DEEP_GEMM_SM90.replace(**choices)
    assert fmt.floor == np.float32(bound) and type(fmt.floor) is float


def test_numerics_that_bound_the_amax():
    """Their floor is an amax, exactly that of the library, which by default is the library's."""
    for name, amax in (("sglang", 1e-10), ("vllm_triton", 1e-10), ("torchao", 1e-12)):
        fmt = GROUPWISE_FP8.replace(numerics=name)
        assert fmt.bounds_amax and fmt.floor == np.float32(amax)
    assert GROUPWISE_FP8.replace(numerics="tilekernels").floor == np.float32(1e-4)
    assert INT8.replace(numerics="sglang", min_scale=0.5).floor == 63.5
    fmt = GROUPWISE_FP8.replace(numerics="vllm")
    assert not fmt.bounds_amax and fmt.floor == np.float32(1 / (512 * 448))
    for name in OTHERS:
        message = "min_scale: expected 8.077935669463161e-28 <= min_scale <= .* for float32 scales"
        with pytest.raises(ValueError, match=message):
            GROUPWISE_FP8.replace(numerics=name, min_scale=2.0**-91)


def test_floors_of_e4m3_scales():
    """Names are bounds of the scale; numbers are rounded to e4m3, to nearest even."""
    floors = {None: 0.0, "none": 0.0, "deepgemm": 2.0**-9, "torchao": 2.0**-6}
    floors |= {2.0**-11: 0.0, 2.0**-10: 0.0, 1.1 * 2.0**-10: 2.0**-9, 0.3: 0.3125, 17: 16.0}
    for min_scale, floor in floors.items():
        assert NVFP4.replace(min_scale=min_scale).floor == floor
    for name in ("vllm", "sglang", "ocp", "ieee"):
        message = "min_scale: expected a number or one of ('none', 'deepgemm', 'torchao'), got"
        with pytest.raises(ValueError, match=re.escape(f"{message} {name!r}")):
            NVFP4.replace(min_scale=name)


def test_floors_of_e4m3():
    assert DEEP_GEMM.floor == 94
    assert DEEP_GEMM.replace(min_scale="deepgemm").floor == 105
    assert DEEP_GEMM.replace(min_scale="sglang").floor == 85
    assert DEEP_GEMM.replace(min_scale="ocp").floor == 0


@pytest.mark.parametrize(
    ("number", "byte"),
    [
        *((0, 0), (2.0**-149, 0), (2.0**-127, 0), (1.1 * 2.0**-127, 1), (2.0**-126, 1)),
        *((1e-10, 94), (1, 127), (1 + 2.0**-25, 127), (1 + 2.0**-23, 128), (3, 129)),
        (2**100, 227),
    ],
)
def test_floors_of_numbers(number, byte):
    """Numbers are rounded to float32, then up to a power of two."""
    assert DEEP_GEMM.replace(min_scale=number).floor == byte


# Memory for scales.


@every_format
@pytest.mark.parametrize("shape", [(5, 70), (1, 300), (3, 5, 70), (2, 1, 6, 33), (0, 70), (4, 0)])
def test_empty_scales(fmt, shape, device):
    """Scales match those that an operation allocates, and `out` takes them."""
    x = whole_bytes(random_bits(shape, torch.bfloat16, seed=1).to(device), fmt)
    sf = empty_scales(fmt, x.shape, device=device)
    scale = as_arguments(upper_scale(x, fmt, turn=len(shape)))
    q, expected, *row_scales = quantize(x, fmt, **scale)
    assert (sf.shape, sf.stride(), sf.dtype) == (expected.shape, expected.stride(), fmt.sf_dtype)
    assert sf.device == expected.device
    assert sf.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    results = quantize(x, fmt, out=(None, sf, *[None] * fmt.row_scale), **scale)
    assert results[1] is sf and len(results) == 2 + len(row_scales)
    assert_same_bits(results[0], q)
    assert_same_bits(sf, expected)


def test_empty_scales_take_any_shape_and_device():
    shape = torch.Size((3, 5, 70))
    assert empty_scales(DEEP_GEMM, shape).device == torch.device("cpu")
    assert empty_scales(DEEP_GEMM, [3, 5, 70]).shape == (3, 5, 1)
    assert empty_scales(MXFP8, shape, device="meta").is_meta
    with torch.device("meta"):
        assert empty_scales(DEEP_GEMM, shape).is_meta
        assert empty_scales(ROWWISE_FP8, shape).is_meta
        assert empty_scales(ROWWISE_FP8, shape, device="cpu").is_cpu


@pytest.mark.parametrize(
    ("fmt", "got"),
    [
        (128, "128"),
        (None, "None"),
        ("DEEP_GEMM", "'DEEP_GEMM': Format.parse reads text"),
        (torch.ones(1), "a tensor of float32: other tensors are keywords"),
    ],
    ids=["int", "none", "str", "tensor"],
)
def test_empty_scales_take_a_format(fmt, got):
    message = f"fmt: expected a Format, such as cute_quant.DEEP_GEMM, got {got}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        empty_scales(fmt, (5, 70))


@pytest.mark.parametrize("shape", [(), (5,), [70], torch.Size((3,))], ids=repr)
def test_empty_scales_take_matrices(shape):
    given = tuple(shape)
    message = (
        f"shape: expected (..., mn, k), each from 0 to 2147483647, with k up to 1048576, "
        f"got {given}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        empty_scales(DEEP_GEMM, shape)


# The format of a device.


@pytest.mark.parametrize(
    ("capability", "fmt"),
    [((9, 0), DEEP_GEMM_SM90), ((10, 0), DEEP_GEMM), ((10, 3), DEEP_GEMM)],
)
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 1)], ids=str)
def test_deep_gemm_format(capability, fmt, device, monkeypatch):
    seen = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: seen.append(device) or capability
    )
    assert deep_gemm_format(device) is fmt
    assert deep_gemm_format() is fmt
    assert seen == [torch.device(device), torch.device("cuda")]


@pytest.mark.parametrize(("capability", "got"), [((12, 0), "12.0"), ((8, 9), "8.9")])
def test_deep_gemm_format_of_other_devices(capability, got, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    message = (
        f"device: expected compute capability 9 or 10, which DeepGEMM has GEMMs for, got {got}"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        deep_gemm_format()


@pytest.mark.parametrize("device", ["cpu", "meta", torch.device("cpu")], ids=repr)
def test_deep_gemm_format_of_no_gpu(device):
    message = f"device: expected a CUDA device, got {torch.device(device)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        deep_gemm_format(device)


@pytest.mark.gpu
def test_deep_gemm_format_of_this_gpu():
    formats = {9: DEEP_GEMM_SM90, 10: DEEP_GEMM}
    fmt = formats[torch.cuda.get_device_capability()[0]]
    assert deep_gemm_format() is fmt and deep_gemm_format(0) is fmt


def test_negative_zero_is_zero():
    """Also where it comes first, so that no equal format is there."""
    fmt = Format(torch.int8, 64, min_scale=-0.0)
    assert math.copysign(1.0, fmt.min_scale) == 1.0 and "-0.0" not in fmt.text
