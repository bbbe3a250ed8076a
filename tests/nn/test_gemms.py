"""What DeepGEMM is called with, by an emulation that checks what its own checks demand."""

from __future__ import annotations

import pickle

import pytest
import torch

import cute_quant as cq
from cute_quant.nn import SM90, SM100, Fp8GroupedLinear, Fp8Linear, Recipe, gemms
from tests.nn.test_linear import activations, relative_error

ALIGNMENT = 16
"""Bytes of TMA."""


class CheckedDeepGemm:
    """The calls of the layers, with the assertions of DeepGEMM's ``csrc`` that concern them.

    Attributes:
        recipe: of the layer.
        calls: names of the functions that were called.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.calls: list[str] = []

    def scales(self, sf: torch.Tensor, mn: int, k: int, group: int) -> None:
        """``check_sf_layout`` for scales of rows, as TMA reads them."""
        per_word = 1 if sf.dtype is torch.float32 else 4
        assert sf.shape[-2:] == (mn, -(-k // (group * per_word)))
        assert sf.stride(-2) == 1 and sf.stride(-1) == -(-mn // 4) * 4

    def fp8_gemm_nt(self, a, b, d, c=None, recipe=None):
        (m, k), (n, k_) = a[0].shape, b[0].shape
        assert k == k_ and d.shape == (m, n) and d.stride() == (n, 1)
        for q in (a[0], b[0]):
            # One of its kernels takes k for the stride of rows.
            assert q.dtype is torch.float8_e4m3fn and q.is_contiguous() and k % ALIGNMENT == 0
        if recipe is None:
            self.calls.append("rows")
            assert d.dtype is torch.bfloat16 and c is None
            self.scales(a[1], m, k, 128)
            d.copy_(gemms._rows(a, self.recipe) @ gemms._blocks(b, self.recipe).mT)
            return
        self.calls.append("columns")
        assert m > gemms.NARROW_FEATURES or not self.recipe.transposed_groups
        group = self.recipe.column_fmt.group_size
        assert recipe == (1, 1, group) and c is d and d.dtype is torch.float32 and not d.any()
        for q, sf in (a, b):
            self.scales(sf, len(q), k, group)
        d.copy_(
            gemms._columns((a[0], a[1].mT), self.recipe)
            @ gemms._columns((b[0], b[1].mT), self.recipe).mT
        )

    def m_grouped_fp8_gemm_nt_contiguous(self, a, b, d, m_indices):
        self.calls.append("grouped rows")
        m, k = a[0].shape
        assert m_indices.shape == (m,) and m_indices.dtype is torch.int32
        assert a[0].is_contiguous() and b[0].is_contiguous() and d.is_contiguous()
        self.scales(a[1], m, k, 128)
        x, w = gemms._rows(a, self.recipe), gemms._blocks(b, self.recipe)
        for tile in range(0, m, 128):
            group = int(m_indices[tile])
            of_tile = m_indices[tile : tile + 128]
            assert ((of_tile == group) | (of_tile == -1)).all()
            if group >= 0:  # all rows of a tile are computed
                d[tile : tile + 128] = (x[tile : tile + 128] @ w[group].mT).to(d.dtype)

    def k_grouped_fp8_gemm_nt_contiguous(self, a, b, d, ks_cpu, grouped_layout, c, recipe):
        """That of SM90: each group's (n, k) contiguous, one after the other."""
        self.calls.append("grouped columns")
        groups, m, n = d.shape
        assert grouped_layout.tolist() == ks_cpu and len(ks_cpu) == groups and c is d
        assert recipe == (1, 1, 128) and all(k % 128 == 0 for k in ks_cpu)
        for (q, sf), rows in ((a, m), (b, n)):
            assert q.ndim == 1 and q.numel() == sum(ks_cpu) * rows
            self.scales(sf, rows, sum(ks_cpu), 128)
        start = 0
        for i, k in enumerate(ks_cpu):
            parts = []
            for (q, sf), rows in ((a, m), (b, n)):
                own = q[start * rows : (start + k) * rows].view(rows, k)
                own_sf = sf[:, start // 128 : (start + k) // 128]
                parts.append(cq.dequantize(own, own_sf, cq.DEEP_GEMM_SM90, dtype=torch.float32))
            d[i] = parts[0] @ parts[1].mT
            start += k

    def k_grouped_fp8_gemm_tn_contiguous(self, a, b, d, ks_cpu, grouped_layout, c, recipe):
        """That of SM100: (k, m) as it lies, and words of four groups of 32 rows."""
        self.calls.append("grouped columns")
        groups, m, n = d.shape
        assert grouped_layout.tolist() == ks_cpu and len(ks_cpu) == groups and c is d
        assert recipe == (1, 1, 32) and all(k % 128 == 0 for k in ks_cpu)
        for (q, sf), columns in ((a, m), (b, n)):
            assert q.shape == (sum(ks_cpu), columns) and q.is_contiguous()
            assert sf.shape == (sum(ks_cpu) // 128, columns) and sf.dtype is torch.int32
            assert sf.is_contiguous()
        start = 0
        for i, k in enumerate(ks_cpu):
            parts = [
                gemms._columns(
                    (q[start : start + k], sf[start // 128 : (start + k) // 128]),
                    self.recipe,
                    transposed=False,
                )
                for q, sf in (a, b)
            ]
            d[i] = parts[0] @ parts[1].mT
            start += k


@pytest.fixture(params=[SM90, SM100], ids=["sm90", "sm100"])
def emulated(request, monkeypatch) -> CheckedDeepGemm:
    torch.manual_seed(0)
    made = CheckedDeepGemm(request.param)
    monkeypatch.setattr(gemms, "_deep_gemm", lambda device: made)
    monkeypatch.setattr(gemms, "recipe_of", lambda device: made.recipe)
    return made


def both_ways(layer: torch.nn.Module, monkeypatch, *inputs: torch.Tensor) -> None:
    """Results and gradients on DeepGEMM's calls and on torch's GEMMs are the same."""
    results = []
    for _ in range(2):
        layer.zero_grad()
        inputs[0].grad = None
        y = layer(*inputs)
        y.backward(torch.ones_like(y) / 3 + y.detach())
        results.append([y.detach(), inputs[0].grad, *(p.grad for p in layer.parameters())])
        monkeypatch.setattr(gemms, "_deep_gemm", lambda device: None)
    for actual, expected in zip(*results, strict=True):
        assert expected.any() and relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("m", [133, 256])
def test_linear(emulated, monkeypatch, m):
    layer = Fp8Linear(208, 304, dtype=torch.bfloat16, recipe=emulated.recipe)
    both_ways(layer, monkeypatch, activations(m, 208).requires_grad_())
    assert emulated.calls == ["rows", "rows", "columns"]


@pytest.mark.parametrize(("features", "others"), [(208, 32), (32, 208), (32, 32)])
def test_narrow_gradients(emulated, monkeypatch, features, others):
    """On SM90 the other operand has to be that of many rows, or torch multiplies."""
    layer = Fp8Linear(features, others, dtype=torch.bfloat16, recipe=emulated.recipe)
    both_ways(layer, monkeypatch, activations(64, features).requires_grad_())
    narrow = emulated.recipe is SM90 and max(features, others) <= gemms.NARROW_FEATURES
    assert emulated.calls == ["rows", "rows", *([] if narrow else ["columns"])]


def test_groups(emulated, monkeypatch):
    """Of which one has no rows, and the last ends before the rows do."""
    layer = Fp8GroupedLinear(4, 208, 160, dtype=torch.bfloat16, recipe=emulated.recipe)
    ends = torch.tensor([130, 256, 300, 390], dtype=torch.int32)
    both_ways(layer, monkeypatch, activations(768, 208).requires_grad_(), ends)
    assert emulated.calls == ["grouped rows", "grouped rows", "grouped columns"]


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_between_groups(emulated, frozen):
    """DeepGEMM computes whole tiles, so rows of no group have to be zeros to it."""
    layer = Fp8GroupedLinear(2, 64, 32, dtype=torch.bfloat16, recipe=emulated.recipe)
    layer.weight.requires_grad_(not frozen)
    x = activations(256, 64)
    x[100:128], x[140:] = torch.nan, torch.nan
    x.requires_grad_()
    y = layer(x, torch.tensor([100, 140], dtype=torch.int32))
    y.backward(y.detach().masked_fill(y == 0, torch.nan))
    for t in (y, x.grad):
        assert t.isfinite().all() and not t[100:128].any() and not t[140:].any()
        assert t[:100].any() and t[128:140].any()


@pytest.mark.parametrize("grouped", [False, True], ids=["linear", "grouped"])
def test_a_graph_calls_it(emulated, grouped):
    """Of a compiled layer, without a break: Dynamo sees operators, and none of its functions."""
    torch._dynamo.reset()
    made = {"dtype": torch.bfloat16, "recipe": emulated.recipe}
    layer = Fp8GroupedLinear(2, 64, 48, **made) if grouped else Fp8Linear(64, 48, **made)
    ends = [torch.tensor([100, 200], dtype=torch.int32)] if grouped else []
    x = activations(256, 64).requires_grad_()
    results, calls = [], []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        x.grad = None
        y = call(x, *ends)
        y.float().square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
        calls.append(emulated.calls[:])
        emulated.calls.clear()
    assert sorted(calls[0]) == sorted(calls[1]) and len(calls[0]) == 3
    for eager, graph in zip(*results, strict=True):
        assert eager.any() and torch.equal(eager, graph)


def test_a_recipe_that_it_does_not_read(emulated):
    other = SM100 if emulated.recipe is SM90 else SM90
    x, ends = torch.zeros(128, 64), torch.tensor([128], dtype=torch.int32)
    read = emulated.recipe.name
    for layer, inputs in (
        (Fp8Linear(64, 32, recipe=other), (x,)),
        (Fp8GroupedLinear(1, 64, 32, recipe=other), (x, ends)),
    ):
        with pytest.raises(ValueError, match=f"recipe: expected None or {read}, .* {other.name}"):
            layer(*inputs)
    own = pickle.loads(pickle.dumps(Fp8Linear(64, 32, recipe=emulated.recipe)))
    assert own(x).shape == (128, 32)


def test_devices_without_its_gemms_take_torch():
    assert gemms._deep_gemm(torch.device("cpu")) is None
