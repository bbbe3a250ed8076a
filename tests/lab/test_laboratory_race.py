"""Layouts beside the default: nothing is timed whose bits differ."""

import pytest
import torch

from cute_quant import MXFP4, NVFP4
from cute_quant.jit import lookup
from cute_quant.lab import make_layout, race, timing
from cute_quant.lab.sweep import sweep


@pytest.fixture
def emulated(monkeypatch, kernels):
    """A GPU that takes a second for each call of a graph, but 2 for two rows a thread."""
    timed = []

    def function(spec, arch):
        def run(*operands):
            kernels.get(spec, arch)(*operands, outputs=operands[1:3])

        run.spec = spec
        return run

    def capture(calls, launches):
        return calls[0].func.spec

    def median_seconds(graphs):
        timed.append(graphs)
        return {name: float(spec.tile.rows_per_thread) for name, spec in graphs.items()}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(lookup, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(lookup, "function", function)
    monkeypatch.setattr(race, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(timing, "median_seconds", median_seconds)
    monkeypatch.setattr(timing, "warm_up", lambda: None)
    monkeypatch.setattr(timing, "buffer_count", lambda nbytes: 2)
    return timed


def test_ratios_to_the_default(emulated):
    layouts = [make_layout(), make_layout(rows_per_thread=2), make_layout(threads_per_group=4)]
    seen = []
    trials = sweep(layouts, [(5, 1024), (3, 512)], lambda *progress: seen.append(progress))
    assert [list(t.ratios.values()) for t in trials] == [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0]]
    assert trials[1].microseconds == {(5, 1024): 2e6, (3, 512): 2e6}
    assert not any(t.failure for t in trials)
    assert [done for done, _, _ in seen] == [0, 1, 2, 3]
    # A graph of the default is timed in turn with each.
    assert all(set(graphs) == {"default", "layout"} for graphs in emulated)


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)
def test_fp4(emulated, fmt):
    layouts = [make_layout(fmt), make_layout(fmt, rows_per_thread=2)]
    trials = sweep(layouts, [(5, 128)])
    assert not any(t.failure for t in trials)
    assert [t.ratios for t in trials] == [{(5, 128): 1.0}, {(5, 128): 2.0}]


def test_the_encode_scale_uses_the_range_of_scales(emulated):
    track = race.Track(make_layout(NVFP4), 64, 1024)
    scales = torch.cat([sf.float() for _, _, sf in track.buffers])
    assert 128 < scales.max() <= 448


def test_wrong_bits_are_not_timed(emulated, monkeypatch):
    right = lookup.function

    def wrong(spec, arch):
        run = right(spec, arch)

        def spoiled(*operands):
            run(*operands)
            if spec.tile.rows_per_thread == 2:
                operands[2][0, 0] ^= 1

        spoiled.spec = spec
        return spoiled

    monkeypatch.setattr(lookup, "function", wrong)
    (trial,) = sweep([make_layout(rows_per_thread=2)], [(5, 512)])
    assert "1 bytes of the scales of an (5, 512) input differ from the default's" in trial.failure
    assert not trial.ratios and not emulated


def test_a_layout_that_crashes_is_one_that_failed(emulated, monkeypatch):
    right = lookup.function

    def crashes(spec, arch):
        if spec.tile.rows_per_thread == 2:
            raise RuntimeError("CUDA error:\n  too many resources")
        return right(spec, arch)

    monkeypatch.setattr(lookup, "function", crashes)
    two, default = sweep([make_layout(rows_per_thread=2), make_layout()], [(5, 512)])
    assert two.failure == "CUDA error: too many resources" and not two.ratios
    assert default.ratios == {(5, 512): 1.0} and not default.failure


def test_shapes_that_do_not_fit(emulated):
    layout = make_layout(threads_per_group=4, rows_per_thread=4)
    (trial,) = sweep([layout], [(4, 192)])
    assert trial.failure == "k: expected a multiple of 128, what a thread holds, got 192"
    with pytest.raises(ValueError, match="mn: expected at most 65535 tiles of 1 rows"):
        race.check_shape(make_layout(row_warps=1), 65540, 512)


@pytest.mark.gpu
def test_on_a_gpu():
    layouts = [make_layout(), make_layout(threads_per_group=4), make_layout(column_warps=4)]
    for trial in sweep(layouts, [(512, 7168)]):
        assert not trial.failure
        assert 0.2 < trial.ratios[512, 7168] < 5
