"""The frame of plug-ins, on an engine that a test makes: a package of three modules."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from cute_quant.cli import main
from cute_quant.integrations.engines import ENGINES, comparison, imports
from cute_quant.integrations.engines.engine import LEFT, PROBATION, REFUSED, TAKEN, WAITS, Engine
from cute_quant.integrations.engines.takeover import (
    Attribute,
    Method,
    NotComparable,
    Takeover,
    paused,
)

CPU = torch.device("cpu")
FILES = {
    "__init__.py": "",
    "functions.py": "def double(x, factor=2):\n    return x * factor\n"
    "def other(x):\n    return double(x) + 1\n",
    "caller.py": "from toy_engine.functions import double as twice\n"
    "def call(x):\n    return twice(x)\n",
    "layers.py": "class Layer:\n    def forward(self, x):\n        return x + 1\n",
}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package `toy_engine` that is not imported yet."""
    package = tmp_path / "toy_engine"
    package.mkdir()
    for name, text in FILES.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("CUTE_QUANT_TOY", raising=False)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_engine"]:
        del sys.modules[name]
    for name in [name for name in imports._finder.callbacks if name.startswith("toy_engine")]:
        del imports._finder.callbacks[name]


def load(name):
    return importlib.import_module(f"toy_engine.{name}")


def doubled(x, factor=2):
    return x + x if factor == 2 else NotImplemented


def same_as(ours, theirs, device):
    x = comparison.sample((2, 128), device)
    return comparison.difference(ours(x), theirs(x))


DOUBLE = Attribute("toy_engine.functions", "double")
OTHER = Attribute("toy_engine.functions", "other")


def make_engine(*takeovers, version="1.0", capability=None, why_not=lambda: None):
    engine = Engine(
        "toy_engine",
        tested=("1.0",),
        variable="CUTE_QUANT_TOY",
        takeovers=takeovers or [Takeover("double", DOUBLE, doubled, same_as)],
        capability=lambda: capability,
        why_not=why_not,
    )
    engine.__class__ = type("OfVersion", (Engine,), {"version": version})
    return engine


@pytest.mark.usefixtures("toy")
class TestTakeover:
    def test_nothing_is_imported(self):
        engine = make_engine()
        engine.install()
        assert "toy_engine" not in sys.modules
        assert engine.states[engine.takeovers[0].key].status == WAITS

    @pytest.mark.parametrize("imported_before", [False, True])
    def test_names_imported_with_from(self, imported_before):
        if imported_before:
            load("caller")
        engine = make_engine()
        engine.install()
        (takeover,) = engine.takeovers
        assert load("caller").call(3) == 6
        assert load("functions").other(3) == 7
        assert takeover.counter.calls == 2
        assert engine.states[takeover.key].status == TAKEN

    def test_restored(self):
        engine = make_engine()
        engine.install()
        call = load("caller").call
        engine.restore()
        call(3)
        assert engine.takeovers[0].counter.calls == 0
        assert not engine.installed
        assert load("caller").twice.__module__ == "toy_engine.functions"
        assert not hasattr(load("caller").twice, "__wrapped__")

    def test_restored_before_the_module_is_imported(self):
        engine = make_engine()
        engine.install()
        engine.restore()
        assert not hasattr(load("functions").double, "__wrapped__")

    def test_installed_twice(self):
        engine = make_engine()
        engine.install()
        wrapped = load("functions").double.__wrapped__
        engine.install()
        assert load("functions").double.__wrapped__ is wrapped
        assert not hasattr(wrapped, "__wrapped__")

    def test_declined_arguments(self):
        engine = make_engine()
        engine.install()
        assert load("functions").double(3, 5) == 15
        counter = engine.takeovers[0].counter
        assert (counter.calls, counter.declined) == (0, 1)

    def test_paused(self):
        engine = make_engine()
        engine.install()
        with paused():
            assert load("functions").double(3) == 6
        assert engine.takeovers[0].counter.calls == 0

    def test_traced_calls_do_not_recompile(self):
        engine = make_engine()
        engine.install()
        double = load("functions").double
        compiled = torch.compile(lambda x: double(x), fullgraph=True, backend="eager")
        x = torch.ones(3)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                assert compiled(x).equal(x + x)
        counter = engine.takeovers[0].counter
        assert counter.traced > 0
        assert counter.calls == 0

    def test_method_around(self):
        def forward(original, self, x):
            return 10 * original(self, x)

        place = Method("toy_engine.layers", "Layer", "forward")
        engine = make_engine(Takeover("layer", place, forward, around=True))
        engine.install()
        assert load("layers").Layer().forward(1) == 20
        engine.restore()
        assert load("layers").Layer().forward(1) == 2


def wrong(x, factor=2):
    return x * factor + 1


def more_parameters(x, factor=2, scale=None):
    return x


def other_default(x, factor=3):
    return x


@pytest.mark.usefixtures("toy")
class TestSelfCheck:
    def test_equal_results(self):
        engine = make_engine()
        engine.install()
        engine.check(CPU)
        assert engine.states[engine.takeovers[0].key].checked == "equal on cpu"

    def test_other_results_are_given_back(self, caplog):
        engine = make_engine(Takeover("double", DOUBLE, wrong, same_as))
        engine.install()
        caller = load("caller")
        assert caller.call(3) == 7
        engine.check(CPU)
        assert caller.call(3) == 6
        state = engine.states[engine.takeovers[0].key]
        assert state.status == REFUSED
        assert "bytes" in state.reason
        assert "does not take over" in caplog.text

    def test_own_errors(self):
        def raises(x, factor=2):
            raise ValueError("expected something else")

        engine = make_engine(Takeover("double", DOUBLE, raises, same_as))
        engine.install()
        engine.check(CPU)
        state = engine.states[engine.takeovers[0].key]
        assert state.status == REFUSED
        assert "ValueError: expected something else" in state.reason

    @pytest.mark.parametrize("compute", [more_parameters, other_default])
    def test_other_parameters(self, compute, caplog):
        engine = make_engine(Takeover("double", DOUBLE, compute))
        engine.install()
        assert load("caller").call(3) == 6
        assert engine.states[engine.takeovers[0].key].status == REFUSED
        assert "expected the parameters" in caplog.text

    def test_function_is_missing(self):
        place = Attribute("toy_engine.functions", "triple")
        engine = make_engine(Takeover("double", place, doubled))
        engine.install()
        load("functions")
        assert engine.states[engine.takeovers[0].key].status == REFUSED

    def test_module_is_missing(self):
        place = Attribute("toy_engine.nowhere", "double")
        engine = make_engine(Takeover("double", place, doubled))
        engine.install()
        engine.check(CPU)
        assert "module is missing" in engine.states[engine.takeovers[0].key].reason

    def test_untested_version(self, caplog):
        def fails(ours, theirs, device):
            raise NotComparable("no kernel for cpu")

        engine = make_engine(
            Takeover("double", DOUBLE, doubled, same_as),
            Takeover("other", OTHER, lambda x: x, fails),
            version="1.1",
        )
        engine.install()
        double, other = (engine.states[t.key] for t in engine.takeovers)
        caller = load("caller")
        assert caller.call(3) == 6
        assert (double.status, other.status) == (PROBATION, PROBATION)
        assert engine.takeovers[0].counter.calls == 0
        assert "tested with toy_engine 1.0, not with 1.1" in caplog.text
        engine.check(CPU)
        assert (double.status, other.status) == (TAKEN, REFUSED)
        assert caller.call(3) == 6
        assert engine.takeovers[0].counter.calls == 1
        assert load("functions").other(3) == 7

    def test_engine_that_cannot_run_here(self):
        def triple(x):
            return 3 * x

        def fails(ours, theirs, device):
            return comparison.difference(ours(torch.ones(1)), theirs())

        engine = make_engine(Takeover("other", OTHER, triple, fails))
        engine.install()
        engine.check(CPU)
        state = engine.states[engine.takeovers[0].key]
        assert state.status == TAKEN
        assert state.checked.startswith("not compared on cpu: TypeError: other() missing 1")


@pytest.mark.usefixtures("toy")
class TestSelection:
    TAKEOVERS = (
        Takeover("double", DOUBLE, doubled),
        Takeover("blackwell", OTHER, lambda x: x, None, (10,)),
    )

    @pytest.mark.parametrize(
        ("text", "selected"),
        [("", {"double", "blackwell"}), ("0", set()), ("off", set()), (" double,", {"double"})],
    )
    def test_names(self, text, selected, monkeypatch):
        monkeypatch.setenv("CUTE_QUANT_TOY", text)
        engine = make_engine(*self.TAKEOVERS)
        assert engine.selected() == selected
        engine.install()
        taken = {t.name for t in engine.takeovers if engine.states.get(t.key)}
        assert taken == (set() if not selected else {"double", "blackwell"})
        statuses = {t.name: engine.states[t.key].status for t in engine.takeovers if taken}
        assert {name for name, status in statuses.items() if status == WAITS} == selected

    def test_unknown_names(self, monkeypatch, caplog):
        monkeypatch.setenv("CUTE_QUANT_TOY", "double,tripel")
        engine = make_engine(*self.TAKEOVERS)
        with pytest.raises(ValueError, match=r"0 or some of double, blackwell, got tripel"):
            engine.selected()
        engine.install()
        assert not engine.installed
        assert "got tripel" in caplog.text

    @pytest.mark.parametrize(
        ("capability", "status", "reason"),
        [
            (None, WAITS, ""),
            ((10, 0), WAITS, ""),
            ((9, 0), LEFT, "on compute capability 10.x, this is 9.0"),
            ((8, 0), LEFT, "no kernels for compute capability 8.0"),
        ],
    )
    def test_architectures(self, capability, status, reason):
        engine = make_engine(*self.TAKEOVERS, capability=capability)
        engine.install()
        state = engine.states[engine.takeovers[1].key]
        assert state.status == status
        assert reason in state.reason

    def test_other_platforms(self):
        engine = make_engine(*self.TAKEOVERS, why_not=lambda: "the engine runs on rocm")
        engine.install()
        assert {state.reason for state in engine.states.values()} == {"the engine runs on rocm"}
        assert "leaves: double (the engine runs on rocm)" in engine.summary()

    def test_one_line_says_it(self, monkeypatch, caplog):
        monkeypatch.setenv("CUTE_QUANT_TOY", "double")
        engine = make_engine(*self.TAKEOVERS)
        with caplog.at_level("INFO"):
            engine.install()
        (record,) = caplog.records
        assert "in toy_engine 1.0 takes over: double; leaves: blackwell (not selected)" in (
            record.getMessage()
        )


class TestComparison:
    def test_a_bit(self):
        x = comparison.sample((3, 128), CPU)
        y = x.clone()
        y[2, 3] = -y[2, 3]
        assert comparison.difference(x, x.clone()) is None
        assert comparison.difference((x, x), (x, y)) == "1 of 768 bytes of result 1"

    @pytest.mark.parametrize(
        ("other", "text"),
        [
            (lambda x: x.float(), "dtype"),
            (lambda x: x[:, :64], "shape"),
            (lambda x: x.mT.contiguous().mT, "strides"),
        ],
    )
    def test_looks(self, other, text):
        x = comparison.sample((3, 128), CPU)
        assert f"result 0 has {text}" in comparison.difference(other(x), x)

    def test_declined(self):
        assert "not taken" in comparison.difference(NotImplemented, torch.ones(1))


@pytest.mark.usefixtures("toy")
class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch, capsys):
        def run(engine, *arguments):
            module = type(sys)("toy_plugin")
            module.ENGINE = engine
            monkeypatch.setitem(sys.modules, "toy_plugin", module)
            monkeypatch.setitem(ENGINES, "toy_engine", "toy_plugin")
            status = main.main(["engines", "--engine", "toy_engine", *arguments])
            return status, capsys.readouterr().out

        return run

    def test_all_is_well(self, run):
        status, out = run(make_engine())
        assert status == 0
        assert "toy_engine 1.0: tested" in out
        assert "equal on cpu" in out

    def test_other_results(self, run):
        status, out = run(make_engine(Takeover("double", DOUBLE, wrong, same_as)))
        assert status == 1
        assert "self-check failed on cpu" in out

    def test_switched_off(self, run, monkeypatch):
        monkeypatch.setenv("CUTE_QUANT_TOY", "0")
        status, out = run(make_engine())
        assert status == 0
        assert "off: CUTE_QUANT_TOY is 0" in out

    def test_unknown_names(self, run, monkeypatch):
        monkeypatch.setenv("CUTE_QUANT_TOY", "tripel")
        assert run(make_engine())[0] == 2

    def test_not_installed(self, run):
        status, out = run(make_engine(version=None))
        assert status == 1
        assert "toy_engine: not installed" in out

    def test_json(self, run):
        _, out = run(make_engine(), "--json")
        (report,) = json.loads(out)
        assert report["calls"][0]["status"] == TAKEN


def test_plugins_import_no_engine():
    """Modules of plug-ins are loaded by every process of an engine."""
    script = (
        "import importlib, sys\n"
        "from cute_quant.integrations.engines import ENGINES\n"
        "modules = [importlib.import_module(name) for name in ENGINES.values()]\n"
        "assert all(module.ENGINE.takeovers for module in modules)\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'vllm', 'sglang', 'cutlass'})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_module_that_is_not_there():
    imports.when_imported("toy_engine.nowhere", print)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("toy_engine.nowhere")
    imports.forget("toy_engine.nowhere", print)
    assert not imports._finder.callbacks["toy_engine.nowhere"]
