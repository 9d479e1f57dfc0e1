"""The probe of early wrong choices (training/local_minimum.py) as a section of a report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from harness.errors import UsageError
from study.figures import Plot
from study.local_minimum_report import findings, plot_shares, plot_trajectories
from study.tables import words

PROBE_FILE = "local_minimum.json"


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the probe says.

    Attributes:
        title: of the section.
        command: that ran it.
        sentences: what came out.
        plots: its figures.
        facts: name -> what was run.
    """

    title: str
    command: str
    sentences: tuple[str, ...]
    plots: tuple[Plot, ...]
    facts: dict[str, str]


def is_probe(folder: str | Path) -> bool:
    """Whether a folder holds results of the probe."""
    return (Path(folder) / PROBE_FILE).is_file()


def read_probe(folder: str | Path) -> Probe:
    """Reads the results of the probe.

    Raises:
        UsageError: the file is damaged.
    """
    path = Path(folder) / PROBE_FILE
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        settings = results["settings"]
        shares = Plot(
            "shares",
            "Escapes by noise scale",
            "Share of seeds whose highest score is the cue's at the end, noise off. Noise scale 0: temperature alone.",
            plot_shares(results),
        )
        trajectories = Plot(
            "trajectories",
            "Escapes over training",
            "Share of seeds whose highest score is the cue's at each step, at the largest noise scale.",
            plot_trajectories(results),
        )
        return Probe(
            title="Escape from an early choice that is good but not best",
            command=results["command"],
            sentences=tuple(findings(results)),
            plots=(shares, trajectories),
            facts={
                "Runs": f"{settings['seeds']} seeds of {settings['steps']} steps for each of {len(results['rows'])} "
                f"settings, {results['process_seconds'] / 3600:.2g} hours in all.",
                "Versions": words(f"{name} {version}" for name, version in results["versions"].items()),
            },
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{str(path)!r} is not what training/local_minimum.py writes: {error!r}.") from error
