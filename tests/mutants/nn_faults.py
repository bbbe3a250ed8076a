"""Faults in the layers that are trained in FP8."""

from tests.mutants.fault import Fault

LINEAR = "nn/linear.py"
GROUPED = "nn/grouped.py"
GEMMS = "nn/gemms.py"
ROWS = "nn/rows.py"

ON_LAYERS = "tests/nn/test_linear.py"

FAULTS = [
    Fault(
        "linear-keeps-the-input",
        LINEAR,
        "ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *columns)",
        "ctx.x = ctx.save_for_backward(weight, *columns, x)",
        [f"{ON_LAYERS}::test_what_is_kept_is_fp8"],
    ),
    Fault(
        "linear-keeps-what-nobody-needs",
        LINEAR,
        "ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *columns)",
        "ctx.save_for_backward(weight, *columns)",
        [f"{ON_LAYERS}::test_what_needs_no_gradient_is_not_kept"],
    ),
    Fault(
        "linear-padding-that-is-not-zero",
        LINEAR,
        "torch.nn.functional.pad(q.view(torch.uint8), (0, padding))",
        "torch.nn.functional.pad(q.view(torch.uint8), (0, padding), value=0x7E)",
        [f"{ON_LAYERS}::test_gradients"],
    ),
    Fault(
        "linear-second-derivative",
        LINEAR,
        "if torch.is_grad_enabled():",
        "if False:",
        [f"{ON_LAYERS}::test_second_derivatives_are_refused"],
    ),
    Fault(
        "linear-gradient-that-is-a-little-large",
        LINEAR,
        "transposed = quantize_blocks(weight.mT, recipe.fmt)",
        "transposed = quantize_blocks(weight.mT * 1.0625, recipe.fmt)",
        [f"{ON_LAYERS}::test_gradients_are_those_of_bf16_within_the_noise"],
    ),
    Fault(
        "grouped-gradient-of-another-group",
        GROUPED,
        "transposed = quantize_blocks(weight.mT, recipe.fmt)",
        "transposed = quantize_blocks(weight.mT.roll(1, 0), recipe.fmt)",
        [f"{ON_LAYERS}::test_gradients_are_those_of_bf16_within_the_noise"],
    ),
    Fault(
        "linear-ignores-autocast",
        LINEAR,
        "return torch.get_autocast_dtype(x.device.type)",
        "return x.dtype",
        [f"{ON_LAYERS}::test_autocast"],
    ),
    Fault(
        "grouped-rows-of-no-group",
        GROUPED,
        "q, sf = quantize(x, recipe.fmt, rows=rows)",
        "q, sf = quantize(x, recipe.fmt)",
        ["tests/nn/test_gemms.py::test_rows_between_groups"],
    ),
    Fault(
        "grouped-empty-groups",
        ROWS,
        "sizes.append(stop - start)",
        "sizes.append(max(stop - start, GROUP_ALIGNMENT))",
        [f"{ON_LAYERS}::test_groups", f"{ON_LAYERS}::test_sizes_of_groups"],
    ),
    Fault(
        "grouped-rows-past-an-end",
        ROWS,
        "where(row < end[:, None], -1)",
        "where(row <= end[:, None], -1)",
        [f"{ON_LAYERS}::test_groups_of_rows"],
    ),
    Fault(
        "recipes-of-larger-scales",
        "nn/recipes.py",
        "DEEP_GEMM_SM90.replace(min_scale=SMALLEST_NORMAL)",
        "DEEP_GEMM_SM90",
        [f"{ON_LAYERS}::test_small_gradients"],
    ),
    Fault(
        "gemms-any-recipe",
        GEMMS,
        "if _deep_gemm(device) is not None and recipe != recipe_of(device):",
        "if False:",
        ["tests/nn/test_gemms.py::test_a_recipe_that_it_does_not_read"],
    ),
    Fault(
        "gemms-that-dynamo-traces",
        GEMMS,
        "torch.ops.cute_quant.fp8_weight_gradient if is_traced(grad[0]) else _weight_gradient",
        "_weight_gradient",
        ["tests/nn/test_gemms.py::test_a_graph_calls_it"],
    ),
    Fault(
        "grouped-weights-of-other-experts",
        LINEAR,
        "if weight.shape != shape:",
        "if weight.shape[1:] != shape[1:]:",
        [f"{ON_LAYERS}::test_weights_that_do_not_fit"],
    ),
    Fault(
        "gemms-under-autocast",
        GEMMS,
        "with torch.autocast(a.device.type, enabled=False):",
        "with torch.autocast(a.device.type, enabled=True):",
        [f"{ON_LAYERS}::test_operands"],
    ),
    Fault(
        "gemms-groups-of-the-first-rows",
        GEMMS,
        "part = words[:, start:end]",
        "part = words[:, : end - start]",
        ["tests/nn/test_gemms.py::test_groups"],
    ),
    Fault(
        "gemms-gradient-of-rows-in-words",
        GEMMS,
        "q = q if transposed else q.mT.contiguous()",
        "q = q.reshape(q.shape[::-1]) if not transposed else q",
        [f"{ON_LAYERS}::test_groups"],
    ),
]
