"""Faults in the plug-ins of inference engines."""

from tests.mutants.fault import Fault

TAKEOVER = "integrations/engines/takeover.py"
ENGINE = "integrations/engines/engine.py"
IMPORTS = "integrations/engines/imports.py"
COMPARISON = "integrations/engines/comparison.py"
SEEN = "dispatch/seen.py"

ON_ENGINES = "tests/integrations/test_engines.py"
ON_PLAN = "tests/dispatch/test_plan.py"

FAULTS = [
    Fault(
        "engine-names-imported-with-from",
        IMPORTS,
        "            if value is old:",
        "            if value is old and name.endswith('functions'):",
        [f"{ON_ENGINES}::TestTakeover::test_names_imported_with_from"],
    ),
    Fault(
        "engine-declined-arguments",
        TAKEOVER,
        "return results if taken else original(*args, **kwargs)",
        "return results",
        [f"{ON_ENGINES}::TestTakeover::test_declined_arguments"],
    ),
    Fault(
        "engine-counts-in-graphs",
        TAKEOVER,
        "            if torch.compiler.is_compiling():",
        "            if False:",
        [f"{ON_ENGINES}::TestTakeover::test_traced_calls_do_not_recompile"],
    ),
    Fault(
        "engine-defaults-of-parameters",
        TAKEOVER,
        "found.append(p.replace(annotation=p.empty, default=default))",
        "found.append(p.replace(annotation=p.empty, default=p.empty))",
        [f"{ON_ENGINES}::TestSelfCheck::test_other_parameters"],
    ),
    Fault(
        "engine-untested-version",
        ENGINE,
        "            if self.is_tested:\n                self._await(takeover)",
        "            if True:\n                self._await(takeover)",
        [f"{ON_ENGINES}::TestSelfCheck::test_untested_version"],
    ),
    Fault(
        "engine-different-results-stay",
        ENGINE,
        "        if state.status == TAKEN:\n            self._give_back(takeover, state)\n"
        "        state.status, state.reason = REFUSED, reason",
        "        state.status, state.reason = REFUSED, reason",
        [f"{ON_ENGINES}::TestSelfCheck::test_other_results_are_given_back"],
    ),
    Fault(
        "engine-own-errors-pass",
        ENGINE,
        '            difference = f"{type(error).__name__}: {_one_line(error)}"',
        "            return None",
        [f"{ON_ENGINES}::TestSelfCheck::test_own_errors"],
    ),
    Fault(
        "engine-architectures",
        ENGINE,
        "    if takeover.majors and major not in takeover.majors:",
        "    if False:",
        [f"{ON_ENGINES}::TestSelection::test_architectures"],
    ),
    Fault(
        "engine-compares-bytes",
        COMPARISON,
        "unequal = (_bytes(a) != _bytes(b)).sum().item()",
        "unequal = 0",
        [f"{ON_ENGINES}::TestComparison::test_a_bit"],
    ),
    Fault(
        "seen-the-most-rows",
        SEEN,
        "max(calls.max_rows, _ranges.get(key, 0))",
        "calls.max_rows",
        [f"{ON_PLAN}::TestSeen::test_the_most_rows"],
    ),
    Fault(
        "seen-nothing-is-new",
        SEEN,
        "any(rows > _ready.get(key, 0) for",
        "any(key not in _ready for",
        [f"{ON_PLAN}::TestSeen::test_new_calls"],
    ),
]
