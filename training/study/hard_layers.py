"""What several runs of hard_heads.py say together: accuracy by the number of hard layers, over arms and seeds."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from harness.arguments import FinetuneArguments
from harness.errors import UsageError
from harness.hard_heads import MEASURES, layer_means
from harness.results import write_atomically
from study.drawing import SINGLE, draw_estimates, png
from study.evaluation_data import evaluation_source
from study.findings import Estimate, estimate
from study.plan import deciding_settings
from study.tables import Table

JSON_FILE, TABLE_FILE, PLOT_FILE = "hard_heads.json", "hard_heads.md", "hard_layers.png"
_RUN_NAME = re.compile(r"(?P<arm>.+)-seed(?P<seed>\d+)(-[0-9a-f]+)?")
_ENVIRONMENT = ("device", "num_processes", "num_threads", "versions")
_LEGEND = (
    "Of every layer, the mean over its heads; layer 0 is next to the input. varies: share of queries whose key is not "
    "the same in all sentences of one length; differs: probability that two of these choose differently; bits: "
    "entropy of the choice among them; first, own, last: share of choices that are the first token, the query's own, "
    "the last. A head that looks at positions alone has 0 in the first three."
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose saved model is measured.

    Attributes:
        folder: its output_dir.
        args: its settings, those of this measurement among them.
    """

    folder: Path
    args: FinetuneArguments

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name

    @property
    def arm(self) -> str:
        """ARM of a folder ARM-seedN or ARM-seedN-HASH, else the name of the folder."""
        named = _RUN_NAME.fullmatch(self.name)
        return named["arm"] if named else self.name

    @property
    def seed(self) -> int:
        """N of such a folder, else the run's own setting."""
        named = _RUN_NAME.fullmatch(self.name)
        return int(named["seed"]) if named else self.args.seed


@dataclasses.dataclass(frozen=True)
class Measured:
    """A run and the report of hard_heads.py on it."""

    run: Run
    report: Mapping[str, Any]

    @property
    def sentences(self) -> int:
        """How many it was evaluated on."""
        return int(self.report["sentences"])

    @property
    def layers(self) -> int:
        """How many can be made hard."""
        return len(self.curves["top_down"]) - 1

    @property
    def curves(self) -> dict[str, list[float]]:
        """Order in which layers become hard -> accuracy with 0, 1, ... all of them hard."""
        curves: dict[str, list[float]] = self.report["accuracy_by_hard_layers"]
        return curves

    @property
    def controls(self) -> dict[str, float]:
        """Kind of fixed keys -> accuracy."""
        controls: dict[str, float] = self.report["accuracy_with_fixed_keys"]
        return controls

    @property
    def dependence(self) -> dict[str, list[float]]:
        """Measure -> a mean over heads for each layer."""
        return layer_means(self.report["dependence"])


_COUNTED: Mapping[str, Callable[[Measured], int]] = {
    "sentences": lambda measured: measured.sentences,
    "layers that can be hard": lambda measured: measured.layers,
    "attention layers": lambda measured: len(measured.dependence[MEASURES[0]]),
}
"""What all reports of a summary must have as many of."""


def check_runs(runs: Sequence[Run]) -> None:
    """Refuses runs that make no summary, before anything is measured.

    Raises:
        UsageError: two have the same arm and seed, or their evaluation data differ.
    """
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        other = seen.setdefault((run.arm, run.seed), run)
        if other is not run:
            raise UsageError(
                f"{str(other.folder)!r} and {str(run.folder)!r} are both arm {run.arm!r}, seed {run.seed}: a summary "
                "takes each seed of an arm once. Folders are called ARM-seedN or ARM-seedN-HASH."
            )
    first = runs[0]
    for run in runs[1:]:
        differing = _differences(evaluated_on(first.args), evaluated_on(run.args))
        if differing:
            raise UsageError(
                f"{str(first.folder)!r} and {str(run.folder)!r} are evaluated on different data: "
                f"{'; '.join(differing)}. A summary needs runs that share them."
            )


def check_measured(measured: Sequence[Measured]) -> None:
    """Refuses reports that cannot stand in one table.

    Raises:
        UsageError: they have different numbers of sentences or layers, or were not measured alike.
    """
    first = measured[0]
    for other in measured[1:]:
        differing = [name for name in _ENVIRONMENT if first.report[name] != other.report[name]]
        if differing:
            raise UsageError(
                f"{str(first.run.folder)!r} and {str(other.run.folder)!r} were measured with different "
                f"{', '.join(differing)}: measure both on one machine."
            )
        for what, count in _COUNTED.items():
            if count(first) != count(other):
                raise UsageError(
                    f"{str(first.run.folder)!r} has {count(first)} {what}, {str(other.run.folder)!r} {count(other)}: "
                    "a summary needs runs with the same number."
                )


def make_folder(folder: Path, runs: Sequence[Run]) -> None:
    """Makes the folder of a summary, unless it is there.

    Raises:
        UsageError: it is the folder of one of the runs, or it cannot be made or written to.
    """
    if folder.resolve() in [run.folder.resolve() for run in runs]:
        raise UsageError(
            f"--output {str(folder)!r} is the folder of a run, whose own {JSON_FILE} is there: name another."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {str(folder)!r} cannot be made: {error.strerror}. Name a folder.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--output {str(folder)!r} cannot be written to: no permission.")


def evaluated_on(args: FinetuneArguments) -> dict[str, Any]:
    """The settings that say what a run is evaluated on; ``data`` is the kind of its source and what belongs to it."""
    names = ["text_column", "text_pair_column", "label_column", "max_length"]
    if args.holdout_percentage is not None:
        names += ["holdout_percentage", "max_train_samples", "data_seed"]
    else:
        names += ["max_eval_samples"] + ([] if args.max_eval_samples is None else ["data_seed"])
    return {"data": evaluation_source(args).place, **{name: getattr(args, name) for name in names}}


def write_summary(measured: Sequence[Measured], folder: Path, command: str) -> None:
    """Writes hard_heads.json, hard_heads.md and hard_layers.png.

    Args:
        measured: at least one run; arms come in the order in which they come here, their seeds in ascending order.
        folder: an existing one.
        command: that makes the summary, without folders of a machine.

    Raises:
        UsageError: as :func:`check_runs` and :func:`check_measured`.
    """
    check_runs([item.run for item in measured])
    check_measured(measured)
    content = json.dumps(summary(measured, command), indent=1, allow_nan=False)
    write_atomically(folder / JSON_FILE, content + "\n")
    write_atomically(folder / TABLE_FILE, markdown(measured, command))
    (folder / PLOT_FILE).write_bytes(png(plot(measured)))


def summary(measured: Sequence[Measured], command: str) -> dict[str, Any]:
    """The content of hard_heads.json; of the settings, those that differ between the runs."""
    settings = [deciding_settings(item.run.args) for item in measured]
    differing = [name for name, value in settings[0].items() if any(other[name] != value for other in settings)]
    first, rows = measured[0], [item for items in _by_arm(measured).values() for item in items]
    return {
        "command": command,
        "evaluated_on": {**evaluated_on(first.run.args), "data": _data_name(first.run), "sentences": first.sentences},
        **{name: first.report[name] for name in _ENVIRONMENT},
        "runs": [
            {
                "run": item.run.name,
                "arm": item.run.arm,
                "seed": item.run.seed,
                "git": item.report["git"],
                "settings": {name: portable(deciding_settings(item.run.args)[name]) for name in differing},
                "accuracy_by_hard_layers": item.curves,
                "accuracy_with_fixed_keys": item.controls,
                "dependence": item.dependence,
            }
            for item in rows
        ],
    }


def markdown(measured: Sequence[Measured], command: str) -> str:
    """The tables, and how to make them again."""
    first = measured[0]
    versions = ", ".join(f"{name} {version}" for name, version in first.report["versions"].items())
    arms = [f"`{arm}`: {', '.join(str(item.run.seed) for item in runs)}" for arm, runs in _by_arm(measured).items()]
    parts = [
        "# What hard choices are worth",
        f"Saved models evaluated on {_data_name(first.run)}, {first.sentences} sentences, without noise. Mean over "
        "the seeds of an arm ± half width of the 95 % Student-t interval; seeds: " + "; ".join(arms) + ".",
        "## Accuracy by the number of hard layers",
        _curve_table(measured).markdown(),
        f"![Accuracy by the number of hard layers]({PLOT_FILE})",
        "## Accuracy with every head fixed to one key after training",
        _control_table(measured).markdown(),
        "## How far choices depend on the text, all layers hard",
        _dependence_table(measured).markdown(),
        f"`{command}`: {first.report['device']}; {versions}.",
    ]
    return "\n\n".join(parts) + "\n"


def portable(value: Any) -> Any:
    """``value``; of an absolute path, which names folders of a machine, its last part."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def plot(measured: Sequence[Measured]) -> Figure:
    """Accuracy by the number of hard layers: a line for each arm and order, beside each other."""
    lines = {
        f"{arm}, {_words(order)}": _over_seeds([run.curves[order] for run in runs])
        for arm, runs in _by_arm(measured).items()
        for order in runs[0].curves
    }
    apart = min(0.16, 0.7 / len(lines))
    points = {
        name: [(hard + (number - (len(lines) - 1) / 2) * apart, value) for hard, value in enumerate(values)]
        for number, (name, values) in enumerate(lines.items())
    }
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes, layers = figure.subplots(), measured[0].layers
    draw_estimates(axes, points, list(points))
    single = axes.plot([], [], ".", color="0.45", markersize=4)
    axes.set_xticks(range(layers + 1))
    axes.set_xlabel(f"hard layers, of {layers} (lines beside each other for legibility)")
    axes.set_ylabel("accuracy without noise")
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        [*handles, *single], [*names, SINGLE], loc="outside upper center", ncols=3, fontsize="small", handlelength=4
    )
    return figure


def _curve_table(measured: Sequence[Measured]) -> Table:
    rows = [
        [arm, _words(order), *map(str, _over_seeds([run.curves[order] for run in runs]))]
        for arm, runs in _by_arm(measured).items()
        for order in runs[0].curves
    ]
    return Table(["arm", "hard layers", *map(str, range(measured[0].layers + 1))], rows, text_columns=2)


def _control_table(measured: Sequence[Measured]) -> Table:
    kinds = list(measured[0].controls)
    rows = [
        [arm, *map(str, _over_seeds([[run.controls[kind] for kind in kinds] for run in runs]))]
        for arm, runs in _by_arm(measured).items()
    ]
    return Table(["arm", *kinds], rows)


def _dependence_table(measured: Sequence[Measured]) -> Table:
    rows = []
    for arm, runs in _by_arm(measured).items():
        columns = [_over_seeds([run.dependence[name] for run in runs]) for name in MEASURES]
        for layer, found in enumerate(zip(*columns, strict=True)):
            rows.append([arm, str(layer), *map(_short, found)])
    return Table(["arm", "layer", *MEASURES], rows, _LEGEND, text_columns=2)


def _by_arm(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    arms: dict[str, list[Measured]] = {}
    for item in measured:
        arms.setdefault(item.run.arm, []).append(item)
    return {arm: sorted(items, key=lambda item: item.run.seed) for arm, items in arms.items()}


def _over_seeds(values: Sequence[Sequence[float]]) -> list[Estimate]:
    """Of one row for each seed, an estimate for each column."""
    return [estimate(column) for column in zip(*values, strict=True)]


def _short(found: Estimate) -> str:
    spread = "" if found.half_width is None else f" ± {found.half_width:.3f}"
    return f"{found.mean:.3f}{spread}"


def _words(order: str) -> str:
    return order.replace("_", " ")


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs, in words."""
    names = [*first, *(name for name in second if name not in first)]
    return [
        f"{name}: {_shown(first.get(name))} and {_shown(second.get(name))}"
        for name in names
        if first.get(name) != second.get(name)
    ]


def _shown(value: Any) -> str:
    return " ".join(str(part) for part in value if part is not None) if isinstance(value, tuple) else str(value)


def _data_name(run: Run) -> str:
    """The source of the evaluation data, without folders of a machine."""
    place = evaluation_source(run.args).place[1:]
    held = run.args.holdout_percentage
    return ("" if held is None else f"{held} % of ") + _shown(tuple(map(portable, place)))
