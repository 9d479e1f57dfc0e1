"""What the training loop costs beyond the model's own steps: loading, logging, temperature, watch over the gradients.

    python training/loop_overhead.py [--output_dir results/loop_overhead] [--steps 20]

Each case is a run of a training script, in which bare steps of a copy of the model (forward, backward, clipping,
optimiser, schedule of the learning rate, on batches in memory) take turns with those of the loop; see
harness/interleaved.py. A second run of it is profiled, a third counts what would wait for a device between two logs.
The texts are random: words for the classifier, characters for the language model, whose settings but the steps are
those of configs/finetune/tinyshakespeare.yaml. In ``output_dir`` it leaves loop_overhead.json and table.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import platform
import pstats
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers

import finetune
import language_model
from harness.arguments import FinetuneArguments, RunArguments
from harness.interleaved import FetchCounting, Profiled, TurnTaking, overhead
from harness.parsing import parse_arguments
from harness.results import environment
from harness.run import Task, run_task
from tasks.language_arguments import LanguageModelArguments

BAR = 5.0
"""Percent of the bare steps' time that the loop may take."""
LOGGING_STEPS = 4
"""Fewer than the scripts' own, so that logging is not understated."""
_SETTINGS = Path(__file__).parent.parent / "configs" / "finetune" / "tinyshakespeare.yaml"
_LOADER = "accelerate/data_loader.py"
_LISTED = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of run: its settings for so many steps with data in a folder, and its task."""

    name: str
    settings: Callable[[Path, int], RunArguments]
    task: Callable[[Any], Task]
    multiple: int = 1
    """How many times the steps of the others it makes: its steps are short."""


def classifier_settings(folder: Path, steps: int, rows: int, words: tuple[int, int], longest: int) -> RunArguments:
    """MiniLM on sentences whose number of words is drawn evenly from a range."""
    generator = np.random.default_rng(0)
    lexicon = ["a", "the", "film", "plot", "cast", "story", "fine", "dull", "warm", "weak", "never", "of", "and"]
    paths = {}
    for split, count in (("train", rows * steps), ("validation", 8)):
        lines = ["sentence\tlabel"]
        for number in range(count):
            picked = generator.choice(lexicon, size=int(generator.integers(words[0], words[1] + 1)))
            lines.append(f"{' '.join(picked)}\t{number % 2}")
        paths[f"{split}_file"] = str(folder / f"{split}.tsv")
        Path(paths[f"{split}_file"]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return FinetuneArguments(per_device_train_batch_size=rows, max_length=longest, **paths, **_common(folder, steps))


def language_settings(folder: Path, steps: int) -> RunArguments:
    """The small Llama of the tiny-shakespeare configuration, on random characters."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;:!?'-\n"))
    text = "".join(generator.choice(letters, size=1200 * (steps + 1)))  # a step takes 16 * 64, 10 % are held out
    (folder / "input.txt").write_text(text, encoding="utf-8")
    os.environ["TINYSHAKESPEARE_DIR"] = str(folder)
    changes = {key: str(value).lower() for key, value in _common(folder, steps).items() if not key.startswith("tau")}
    changes["cache_dir"] = str(folder / "cache")
    words = [f"--{key}={value}" for key, value in changes.items()]
    return parse_arguments(LanguageModelArguments, ["--config", str(_SETTINGS), *words])


def _common(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "max_train_steps": steps,
        "logging_steps": LOGGING_STEPS,
        "eval_steps": steps,
        "tau_schedule": "linear",
        "tau_end": 0.5,
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / "run"),
        "overwrite_output_dir": True,
    }


CASES = (
    Case(
        "MiniLM, 32 sentences of about 25 tokens",
        lambda folder, steps: classifier_settings(folder, steps, rows=32, words=(15, 31), longest=48),
        finetune.Classification,
    ),
    Case(
        "MiniLM, 8 texts of 128 tokens",
        lambda folder, steps: classifier_settings(folder, steps, rows=8, words=(140, 140), longest=128),
        finetune.Classification,
    ),
    Case(
        "character Llama, 16 blocks of 64 tokens",
        language_settings,
        language_model.LanguageModelling,
        multiple=10,
    ),
)


def measure(case: Case, steps: int) -> dict[str, Any]:
    """The row of a case: overhead, where it goes, and what waits for a device."""
    steps = steps * case.multiple // LOGGING_STEPS * LOGGING_STEPS
    with tempfile.TemporaryDirectory() as folder:
        args = case.settings(Path(folder), steps + 1)  # the last step has no other after it, at which its time ends
        taking = TurnTaking(case.task(args), args)
        _run(args, taking)
        found = overhead(taking.loop, taking.bare, LOGGING_STEPS)
        same = taking.same_weights()
        tokens = statistics.median(taking.tokens)
        seconds = [statistics.median(times[LOGGING_STEPS:]) for times in (taking.loop, taking.bare)]
        few = 3 * LOGGING_STEPS
        args = dataclasses.replace(args, max_train_steps=few, eval_steps=few)
        profiled = Profiled(case.task(args), args)
        _run(args, profiled)
        with FetchCounting(case.task(args), args) as counting:
            _run(args, counting)
    fetches = counting.between_logs()
    return {
        "case": case.name,
        "steps": len(taking.loop),
        "tokens_per_batch": tokens,
        "loop_seconds_per_step": seconds[0],
        "bare_seconds_per_step": seconds[1],
        "overhead": dataclasses.asdict(found),
        "same_weights": same,
        "profile": where_it_goes(profiled),
        "fetches_between_logs": {
            "steps": sum(1 for step in range(1, len(counting.steps)) if step % LOGGING_STEPS),
            "of_the_loop": sum(count for caller, count in fetches.items() if caller != "model"),
            "of_the_model": fetches["model"],
            "callers": dict(fetches),
        },
        "settings": {key: value for key, value in args.to_dict().items() if not _is_place(value)},
    }


def where_it_goes(profiled: Profiled) -> dict[str, Any]:
    """Milliseconds per step, as profiled: all of it, loading, and the functions of the harness that take the most.

    The profiler makes what is written in Python slower than it is. Those that hold more than half of the time run the
    model; they are left out.
    """
    stats = pstats.Stats(profiled.profile, stream=io.StringIO())
    rows = {(Path(file).as_posix(), name): row for (file, _, name), row in stats.stats.items()}  # type: ignore[attr-defined]
    per_step = 1000 / profiled.steps
    total = stats.total_tt * per_step  # type: ignore[attr-defined]
    taken = {
        f"{Path(file).parent.name}/{Path(file).name}:{name}": row[3] * per_step
        for (file, name), row in rows.items()
        if Path(file).parent.name in ("harness", "tasks")
        or file.endswith(("tqdm/std.py", "accelerate/data_loader.py"))
    }
    ours = {name: value for name, value in taken.items() if value < total / 2 and "interleaved.py" not in name}
    most = sorted(ours.items(), key=lambda item: -item[1])[:_LISTED]
    loading = max((row[3] for (file, name), row in rows.items() if _loads(file, name)), default=0.0) * per_step
    return {
        "milliseconds_per_step": total,
        "loading_milliseconds": loading,
        "loading_percent": 100 * loading / total,
        "functions": {name: round(value, 3) for name, value in most},
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# What the training loop costs",
        "",
        f"Time of the loop's steps beyond that of bare steps, in percent of these; the bar is {BAR:g} %. In brackets "
        "the 95 % interval of the mean, by resampling blocks of steps; then the median of the blocks and quartiles.",
        "",
        "| case | bare step | loop step | overhead | by block | loading | waits of the loop between logs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["cases"]:
        o, profile, fetches = row["overhead"], row["profile"], row["fetches_between_logs"]
        lines.append(
            f"| {row['case']} | {1000 * row['bare_seconds_per_step']:.1f} ms | "
            f"{1000 * row['loop_seconds_per_step']:.1f} ms | "
            f"**{o['percent']:.1f} %** ({o['low']:.1f} to {o['high']:.1f}) | "
            f"{o['median']:.1f} % ({o['quartiles'][0]:.1f} to {o['quartiles'][1]:.1f}) | "
            f"{profile['loading_percent']:.1f} % | {fetches['of_the_loop']} in {fetches['steps']} steps |"
        )
    lines += ["", "Milliseconds per step under the profiler, which slows Python down, with all that they call:", ""]
    for row in report["cases"]:
        listed = ", ".join(f"`{name}` {value:.2f}" for name, value in row["profile"]["functions"].items())
        lines.append(f"- {row['case']} ({row['profile']['milliseconds_per_step']:.1f} in all): {listed}")
    load = ", ".join(f"{value:.1f}" for value in report["load_average"]["before"])
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    machine = f"{report['device']}, {report['num_threads']} threads of {report['cpus']}"
    lines += ["", f"`{report['command']}`: {machine}; load averages at the start {load}; {versions}."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures all cases, writes and returns the report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("results/loop_overhead"), help="of the report")
    parser.add_argument("--steps", type=int, default=20, help="of a MiniLM case; the other: ten times")
    options = parser.parse_args(argv)
    if options.steps < 4 * LOGGING_STEPS:
        parser.error(f"expected --steps of at least {4 * LOGGING_STEPS}, got {options.steps}")
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    began, load = time.monotonic(), os.getloadavg()
    rows = []
    for case in CASES:
        rows.append(measure(case, options.steps))
        print(f"{time.monotonic() - began:6.1f} s  {case.name}: {rows[-1]['overhead']['percent']:.1f} %", flush=True)
    known = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1)
    report = {
        "command": shlex.join(["python", "training/loop_overhead.py", *argv]),
        "seconds": round(time.monotonic() - began, 1),
        "load_average": {"before": load, "after": os.getloadavg()},
        "cpus": os.cpu_count(),
        "platform": platform.machine(),
        **known,
        "cases": rows,
    }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "loop_overhead.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (options.output_dir / "table.md").write_text(table(report), encoding="utf-8")
    print(table(report))
    return report


def _run(args: RunArguments, task: Any) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        run_task(args, task)


def _loads(file: str, name: str) -> bool:
    return file.endswith(_LOADER) and name == "__iter__"


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(tempfile.gettempdir())


if __name__ == "__main__":
    main()
