"""A pass over vLLM's graphs: a norm or an activation and the quantizer after it become one kernel.

vLLM's own passes look for its own quantizers. This one runs last among them, on what they left, and
before vLLM lowers its norms. Scales stay what they are, packed UE8M0 too.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor import pattern_matcher
from torch.fx import Graph, Node
from vllm.compilation.passes.inductor_pass import enable_fake_mode
from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass

from cute_quant.contract.format_choices import WHOLE_ROW
from cute_quant.contract.formats import Format
from cute_quant.contract.prologues import MAX_NORM_COLUMNS, VLLM
from cute_quant.contract.rows import DENSE
from cute_quant.integrations.engines.takeover import Counter

_OPERATORS = torch.ops.cute_quant
_QUANTIZE = _OPERATORS.quantize.default
_NORM = torch.ops.vllm_ir.rms_norm.default
_ADD_NORM = torch.ops.vllm_ir.fused_add_rms_norm.default
_SHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


class FuseWithQuantize(VllmInductorPass):  # type: ignore[misc]
    """The pass, which counts what it fuses as traced calls."""

    def __init__(self, config: Any, counter: Counter) -> None:
        super().__init__(config)
        self.counter = counter

    def __call__(self, graph: Graph) -> None:
        """Fuse all that there is in a graph."""
        found = fuse_norms(graph) + fuse_activations(graph)
        self.counter.traced += found

    def uuid(self) -> str:
        """Return what the code of the pass is known by."""
        source = inspect.getsource(sys.modules[__name__])
        found: str = self.hash_source(source)
        return found


def fuse_norms(graph: Graph) -> int:
    """Fuse norms with the quantizers that are the first to read them; return how many."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=_QUANTIZE):
        source = _without_views(node.args[0])
        if not _is_plain(node) or not isinstance(source, Node):
            continue
        if source.target is _NORM:
            count += _fuse_norm(graph, source, node)
        elif source.target is operator.getitem and source.args[1] == 0:
            add_norm = source.args[0]
            if isinstance(add_norm, Node) and add_norm.target is _ADD_NORM:
                count += _fuse_add_norm(graph, add_norm, source, node)
    return count


def _without_views(node: Any) -> Any:
    """Return what a node views in its own shape."""
    while isinstance(node, Node) and node.target in _SHAPES:
        viewed = node.args[0]
        if not isinstance(viewed, Node) or node.meta["val"].shape != viewed.meta["val"].shape:
            break
        node = viewed
    return node


def _is_plain(node: Node) -> bool:
    """Return whether a quantizer takes every row of a matrix, and no tensor besides."""
    others = [argument for argument in node.args[2:] if argument is not None]
    return not others and node.kwargs.get("rows", DENSE) == DENSE


def _is_fusable(x: Node, weight: Any, variance_size: int | None) -> bool:
    if not isinstance(weight, Node) or variance_size is not None:
        return False
    values, weights = x.meta["val"], weight.meta["val"]
    dtypes = (torch.float32, values.dtype)
    return values.shape[-1] <= MAX_NORM_COLUMNS and weights.dtype in dtypes


def _arguments(node: Node, names: tuple[str, ...]) -> list[Any]:
    """Return the arguments of a norm by position, None for those that are left out."""
    return [*node.args, *[None] * (len(names) - len(node.args))]


def _fuse_norm(graph: Graph, norm: Node, quantize: Node) -> int:
    x, weight, eps, variance_size = _arguments(norm, ("x", "weight", "eps", "variance_size"))
    if not _is_fusable(x, weight, variance_size):
        return 0
    if len(norm.users) > 1:
        return _fuse_writing(graph, norm, quantize, (x, weight, None), eps, norm)
    with graph.inserting_before(norm):
        fused = graph.call_function(
            _OPERATORS.rms_norm_quantize.default,
            (x, weight, quantize.args[1]),
            _norm_options(eps),
        )
    fused.meta["val"] = quantize.meta["val"]
    _replace(graph, quantize, fused)
    return 1


def _norm_options(eps: float) -> dict[str, Any]:
    return {
        "eps": eps,
        "weight_offset": 0.0,
        "rounding": VLLM,
        "rows": DENSE,
        "alignment": 1,
        "upper_kind": None,
    }


def _fuse_add_norm(graph: Graph, add_norm: Node, normalized: Node, quantize: Node) -> int:
    names = ("x", "residual", "weight", "eps", "variance_size")
    x, residual, weight, eps, variance_size = _arguments(add_norm, names)
    if not _is_fusable(x, weight, variance_size):
        return 0
    return _fuse_writing(graph, add_norm, quantize, (x, weight, residual), eps, normalized)


def _fuse_writing(
    graph: Graph,
    norm: Node,
    quantize: Node,
    inputs: tuple[Node, Node, Node | None],
    eps: float,
    normalized: Node,
) -> int:
    """Fuse a norm whose sum or whose rows are read by others, too: the operator writes them."""
    x, weight, residual = inputs
    with graph.inserting_before(norm):
        new_sum = None if residual is None else _empty_like(graph, x)
        rows = _empty_like(graph, x) if len(normalized.users) > 1 else None
        fused = graph.call_function(
            auto_functionalized,
            (_OPERATORS.rms_norm_quantize_residual.default,),
            {
                "x": x,
                "weight": weight,
                "residual": residual,
                "residual_out": new_sum,
                "normalized": rows,
                "fmt": quantize.args[1],
                "row_data": None,
                "index": None,
                "upper": None,
            }
            | _norm_options(eps),
        )
        value = x.meta["val"]
        written = [
            None if node is None else value.new_empty(value.shape) for node in (new_sum, rows)
        ]
        fused.meta["val"] = (*quantize.meta["val"], *written)
    outputs = [
        (2, None if new_sum is None else _output(norm, 1)),
        (3, None if rows is None else normalized),
    ]
    for index, node in outputs:
        if node is None:
            continue
        with graph.inserting_before(norm):
            output = graph.call_function(operator.getitem, (fused, index))
        output.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(output, delete_user_cb=lambda user: user is not quantize)
    _replace(graph, quantize, fused)
    return 1


def _output(node: Node, index: int) -> Node | None:
    """Return the node of one output of another, None if nothing reads it."""
    outputs = (u for u in node.users if u.target is operator.getitem and u.args[1] == index)
    return next(outputs, None)


def _empty_like(graph: Graph, x: Node) -> Node:
    node = graph.call_function(torch.ops.aten.empty_like.default, (x,))
    node.meta["val"] = torch.empty_like(x.meta["val"])
    return node


def _replace(graph: Graph, quantize: Node, fused: Node) -> None:
    """Have the results of another node, and remove what nothing reads any more.

    The results come earlier, where the norm was.
    """
    quantize.replace_all_uses_with(fused)
    sources = [quantize]
    while sources:
        node = sources.pop()
        if not node.users and node.op == "call_function":
            sources += node.all_input_nodes
            graph.erase_node(node)


def fuse_activations(graph: Graph) -> int:
    """Fuse vLLM's native ``SiluAndMul`` with quantizers; return how many."""
    count = 0
    nodes = graph.find_nodes(op="call_function", target=_QUANTIZE)
    for fmt, dtype in {(n.args[1], n.args[0].meta["val"].dtype) for n in nodes if _is_plain(n)}:
        count += _silu_patterns(fmt, dtype).apply(graph)
    return count


@functools.cache
@enable_fake_mode  # type: ignore[untyped-decorator]
def _silu_patterns(fmt: str, dtype: torch.dtype) -> pattern_matcher.PatternMatcherPass:
    """Return the pattern of an activation before a quantizer to a format.

    The result of the activation is rounded once, as Inductor rounds where it computes it.
    """
    from vllm.model_executor.layers.activation import SiluAndMul

    def pattern(gate_up: torch.Tensor) -> Any:
        return _QUANTIZE(SiluAndMul.forward_native(gate_up), fmt, rows=DENSE, alignment=1)

    def replacement(gate_up: torch.Tensor) -> Any:
        return _OPERATORS.silu_mul_quantize.default(
            gate_up,
            None,
            fmt,
            interleaved=False,
            clamp=None,
            alpha=1.0,
            beta=0.0,
            rounding=VLLM,
        )

    found = pattern_matcher.PatternMatcherPass(pass_name="cute_quant_silu_mul_quantize")
    size = Format.parse(fmt).group_size
    columns = 2 * (128 if size == WHOLE_ROW else size)
    pattern_matcher.register_replacement(
        pattern,
        replacement,
        [torch.empty(5, columns, dtype=dtype)],
        pattern_matcher.fwd_only,
        found,
    )
    return found
