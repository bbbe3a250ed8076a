"""Try many layouts: read their machine code, and on a GPU time them relative to the default."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from cute_quant.contract.formats import Format
from cute_quant.lab import race, timing
from cute_quant.lab.examination import Examination, examine
from cute_quant.lab.layout import DTYPES, Layout, make_layout
from cute_quant.lab.machine_code import EXAMINED

SHAPES = ((256, 7168), (2048, 7168), (16384, 7168))
"""Shapes of inputs whose buffers together exceed the L2 cache of an H100."""

Progress = Callable[[int, int, str], None]
"""Callback with the count of done layouts, that of all, and the name of the next one."""


@dataclasses.dataclass
class Trial:
    """A layout and its measurements.

    Attributes:
        layout: the layout.
        code: facts about the machine code, by architecture.
        ratios: time over the default's, by shape.
        microseconds: time of a call, by shape.
        failure: reason why timing failed, else empty.
    """

    layout: Layout
    code: dict[str, Examination] = dataclasses.field(default_factory=dict)
    ratios: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    microseconds: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    failure: str = ""

    def examine(self) -> None:
        """Compile the layout for each architecture and read its machine code, once.

        Raises:
            FileNotFoundError: NVIDIA's disassembler is not installed.
        """
        for arch in EXAMINED:
            if arch not in self.code:
                self.code[arch] = examine(self.layout, arch)


def sweep(
    layouts: Iterable[Layout],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    progress: Progress = lambda done, of, name: None,
) -> list[Trial]:
    """Try layouts of one format and dtype.

    On a GPU each layout is timed, if its results equal the default's bitwise. Otherwise
    `Trial.failure` has the reason. On a GPU without NVIDIA's disassembler `Trial.code` is empty.

    Args:
        layouts: the layouts.
        shapes: (mn, k) of the inputs to time.
        progress: callback before each layout, and at the end.

    Raises:
        FileNotFoundError: there is neither a GPU nor the disassembler.
    """
    trials = [Trial(layout) for layout in layouts]
    tracks = []
    if trials and torch.cuda.is_available():
        tracks = [race.Track(trials[0].layout.default, mn, k) for mn, k in shapes]
        timing.warm_up()
    for number, trial in enumerate(trials):
        progress(number, len(trials), trial.layout.name)
        if not tracks:
            trial.examine()
            continue
        try:
            _race(trial, tracks)
        except (RuntimeError, ValueError) as error:
            # One layout fails; others may not.
            trial.failure = " ".join(str(error).split()) or type(error).__name__
    progress(len(trials), len(trials), "done")
    return trials


def _race(trial: Trial, tracks: Sequence[race.Track]) -> None:
    try:
        trial.examine()
    except FileNotFoundError:
        trial.code.clear()
    for track in tracks:
        time = track.time(trial.layout)
        trial.ratios[track.mn, track.k] = time.ratio
        trial.microseconds[track.mn, track.k] = time.seconds * 1e6


def to_json(trials: Sequence[Trial], commit: str | None = None) -> dict[str, Any]:
    """Return trials and their origin as JSON, for `from_json`.

    Args:
        trials: the trials, at least one.
        commit: name of the measured version.
    """
    fmt, dtype = trials[0].layout.fmt, trials[0].layout.dtype
    names = {value: name for name, value in DTYPES.items()}
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "format": fmt.text,
        "dtype": names[dtype],
        "trials": [
            {
                "choices": t.layout.choices(),
                "code": {arch: dataclasses.asdict(code) for arch, code in t.code.items()},
                "times": [
                    {"mn": mn, "k": k, "ratio": ratio, "microseconds": t.microseconds[mn, k]}
                    for (mn, k), ratio in t.ratios.items()
                ],
                "failure": t.failure,
            }
            for t in trials
        ],
    }


def origin(data: dict[str, Any]) -> str:
    """Return GPU, versions, date and commit of the trials of `to_json`."""
    commit = data.get("commit") or "not recorded"
    return f"{data['gpu']}, torch {data['torch']}, {data['date']}, commit {commit}"


def from_json(data: dict[str, Any]) -> list[Trial]:
    """Return the trials that `to_json` wrote.

    Raises:
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError: `data` does not come
            from `to_json`.
    """
    for name in ("gpu", "torch", "date"):
        data[name]  # A plot names them.
    if not data["trials"]:
        raise ValueError("trials: expected at least one, got none")
    fmt = Format.parse(data["format"])
    trials = []
    for entry in data["trials"]:
        trial = Trial(make_layout(fmt, DTYPES[data["dtype"]], **entry["choices"]))
        trial.code = {arch: _examination(code) for arch, code in entry["code"].items()}
        for time in entry["times"]:
            shape = time["mn"], time["k"]
            trial.ratios[shape] = _number("ratio", time["ratio"])
            trial.microseconds[shape] = _number("microseconds", time["microseconds"])
        trial.failure = entry["failure"]
        trials.append(trial)
    return trials


def _examination(code: dict[str, Any]) -> Examination:
    numbers: dict[str, Any] = {name: _number(name, value) for name, value in code.items()}
    found = Examination(**numbers)
    if not found.budget:
        raise ValueError("budget: expected at least 1, got 0")
    return found


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number from 0, got {value!r}")
    return value
