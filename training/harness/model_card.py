"""The README.md beside a saved model: what it is, how it was trained and measured, how it is loaded."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from harness.arguments import RunArguments
from harness.evaluation import NOISE_OFF, NOISE_ON
from harness.models import MINILM
from harness.results import write_atomically
from harness.resume import FREE_SETTINGS

CARD_FILE = "README.md"
_HUB_NAMES = {MINILM: "sentence-transformers/all-MiniLM-L6-v2"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_MODES = {NOISE_OFF: "noise off", NOISE_ON: "noise on"}
_DATA = ("dataset_name", "dataset_config_name", "train_file", "validation_file", "train_split", "validation_split")


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a task says about its models.

    Attributes:
        kind: what they do, as in "a model for text classification".
        loading: Python that loads one from ``folder``: imports, a blank line, the rest; ``{from_pretrained}`` stands
            for the call with ``auto_class`` and the folder.
        auto_class: of transformers; None for a model that is none of theirs.
        pipeline_tag: the hub's name of the task.
    """

    kind: str
    loading: str
    auto_class: str | None = None
    pipeline_tag: str | None = None


def write_model_card(
    folder: Path, facts: CardFacts, args: RunArguments, results: Mapping[str, Any], layers: Sequence[str]
) -> None:
    """Writes README.md, without any path of this machine.

    Args:
        folder: of the saved model.
        facts: of the task.
        args: settings of the run.
        results: the content of results.json.
        layers: names of the layers whose attention the settings are about.
    """
    data = _metadata(facts, args, results)
    body = "\n\n".join(
        [
            f"# {_title(facts, args)}",
            _introduction(facts, args, results),
            f"## Attention\n\n{_attention(args, results, layers)}",
            f"## Use\n\n{_use(facts, args)}",
            f"## Training data\n\n{_training_data(args)}",
            f"## Results\n\n{_results(results)}",
            f"## Settings\n\n{_settings(args)}",
            f"## Versions\n\n{_versions(results)}",
        ]
    )
    write_atomically(folder / CARD_FILE, str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")))


def layer_names(patch: Any) -> list[str]:
    """The names of the layers of a patch, or of a model's own :class:`LibraryLayers`."""
    return list(patch.layers) if isinstance(patch.layers, Mapping) else [layer.name for layer in patch.layers]


def arm_of(args: RunArguments) -> str:
    """The name of the settings in the ablations, such as ``gumbel-st``, or ``gumbel-gumbel_rao`` by its estimator."""
    if args.attention == "unpatched":
        return "unpatched"
    if not args.hard:
        return "softmax-tau" if args.noise == "none" else f"{args.noise}-soft"
    if args.estimator == "score_function":
        return "reinforce"
    way = "st" if args.estimator in (None, "straight_through") else args.estimator
    return f"{'det' if args.noise == 'none' else args.noise}-{way}"


def base_model(name_or_path: str | None) -> str | None:
    """The hub's name of the model that the run began with; None for a folder, or no pretrained model."""
    name = _HUB_NAMES.get(name_or_path or "", name_or_path)
    if name is None or name == "scratch" or Path(name).exists() or not _HUB_NAME.fullmatch(name):
        return None
    return name


def without_machine(value: Any) -> Any:
    """``value`` with the last component in place of every absolute path."""
    if isinstance(value, Mapping):
        return {key: without_machine(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_machine(item) for item in value]
    if not isinstance(value, str):
        return value
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(value).is_absolute() or value.startswith("~"):
            return kind(value).name
    return value


def _metadata(facts: CardFacts, args: RunArguments, results: Mapping[str, Any]) -> ModelCardData:
    patched = args.attention != "unpatched"
    name = without_machine(_data_of(args).get("dataset_name"))
    source = name or without_machine(_data_of(args).get("train_file")) or "generated"
    measured = [
        EvalResult(
            task_type=facts.pipeline_tag or "other",
            dataset_type=source,
            dataset_name=source,
            metric_type=metric,
            metric_name=f"{metric}, {_MODES.get(mode, mode)}",
            metric_value=value,
        )
        for mode, metrics in results["final"].items()
        for metric, value in metrics.items()
        if math.isfinite(value)
    ]
    return ModelCardData(
        model_name=_title(facts, args),
        library_name="transformers" if facts.auto_class else "pytorch",
        pipeline_tag=facts.pipeline_tag,
        base_model=base_model(args.model_name_or_path),
        datasets=[name] if name else None,
        tags=["gumbel-attention", arm_of(args)] if patched else ["unpatched"],
        metrics=sorted({metric for metrics in results["final"].values() for metric in metrics} - {"loss"}),
        eval_results=measured or None,
    )


def _title(facts: CardFacts, args: RunArguments) -> str:
    base = _origin(args)
    return f"{facts.kind.capitalize()}, {arm_of(args)}" + ("" if base is None else f", from {base}")


def _origin(args: RunArguments) -> str | None:
    """The pretrained model as it may be shown."""
    name = args.model_name_or_path
    return None if name in (None, "scratch") else base_model(name) or str(without_machine(name))


def _introduction(facts: CardFacts, args: RunArguments, results: Mapping[str, Any]) -> str:
    base = _origin(args)
    began = "trained from random weights" if base is None else f"fine-tuned from `{base}`"
    if args.attention == "unpatched":
        what = "its own softmax attention"
    else:
        what = "attention whose softmax is replaced by `gumbel_attention`"
    return (
        f"A model for {facts.kind} with {what}, {began} in {results['steps']} optimiser steps. This card was written "
        "by the training script."
    )


def _attention(args: RunArguments, results: Mapping[str, Any], layers: Sequence[str]) -> str:
    if args.attention == "unpatched":
        return "The model's own."
    last = results["series"]["evaluation"][-1]["tau"]
    if args.learn_tau is not None:
        tau = f"learned per {args.learn_tau}, from {args.tau:g}; {last:.4g} in the mean at the end"
    elif args.tau_schedule == "constant":
        tau = f"{args.tau:g}"
    else:
        tau = f"{args.tau_schedule}, from {args.tau:g} to {last:.4g}, which the saved model has"
    chosen = "one key" if args.top_k is None else f"{args.top_k} keys"
    rows = {
        "arm": arm_of(args),
        "tau": tau,
        "choice": f"hard, {chosen} of each query" if args.hard else "soft, a weighted mean",
        "gradient of the choice": (args.estimator or "straight_through") if args.hard else "exact",
        "noise in training": args.noise if args.noise == "none" else f"{args.noise}, times {_noise_scale(args)}",
        "noise in evaluation": "on" if args.eval_noise and args.noise != "none" else "off, unless switched on",
        "choice in evaluation": {None: "as in training", True: "hard", False: "soft"}[args.eval_hard],
        "heads": "all" if args.heads is None else ", ".join(map(str, args.heads)),
        "layers": ", ".join(f"`{name}`" for name in layers),
    }
    return _table(("setting", "value"), rows.items())


def _noise_scale(args: RunArguments) -> str:
    return f"{args.noise_scale:g}" + ("" if args.noise_scale_end is None else f" to {args.noise_scale_end:g}")


def _use(facts: CardFacts, args: RunArguments) -> str:
    own = args.attention == "unpatched"
    call = f"{facts.auto_class}.from_pretrained(folder)"
    if not own:
        call = f"gumbel_attention.from_pretrained({facts.auto_class}, folder)"
    imports, rest = facts.loading.strip().replace("{from_pretrained}", call).split("\n\n", 1)
    if facts.auto_class is not None and not own:
        imports = f"import gumbel_attention\n{imports}"
    text = f'```python\n{imports}\n\nfolder = "model"  # where this file is\n{rest}\n```'
    if own or facts.auto_class is None:
        return text
    return (
        f"{text}\n\nA plain `{facts.auto_class}.from_pretrained` gives these weights with the model's own attention, "
        "and other results."
    )


def _data_of(args: RunArguments) -> dict[str, Any]:
    settings = args.to_dict()
    if settings.get("dataset_name") is None:  # the splits are those of a hub data set
        settings = {name: value for name, value in settings.items() if not name.endswith("_split")}
    return {name: settings[name] for name in _DATA if settings.get(name)}


def _training_data(args: RunArguments) -> str:
    given = {name: f"`{without_machine(value)}`" for name, value in _data_of(args).items()}
    return _table(("setting", "value"), given.items()) if given else "Generated by the training script."


def _results(results: Mapping[str, Any]) -> str:
    """A row for each mode; the metrics of the last step."""
    final = results["final"]
    metrics = list(dict.fromkeys(metric for values in final.values() for metric in values))
    rows = (
        (_MODES.get(mode, mode), *(f"{values[metric]:.4f}" for metric in metrics)) for mode, values in final.items()
    )
    return _table(("mode", *metrics), rows) + "\n\nAt the last step, which was not chosen by its score."


def _settings(args: RunArguments) -> str:
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    shown = {name: value for name, value in args.to_dict().items() if name not in FREE_SETTINGS}
    changed = {
        f"`{name}`": f"`{without_machine(value)}`"
        for name, value in shown.items()
        if value != (list(default) if isinstance(default := defaults[name], tuple) else default)
    }
    return f"Those that differ from their defaults in this version:\n\n{_table(('setting', 'value'), changed.items())}"


def _versions(results: Mapping[str, Any]) -> str:
    rows = dict(results["versions"]) | {"device": results["device"], "processes": results["num_processes"]}
    git = results.get("git")
    if git is not None:
        rows["commit"] = git["commit"] + (", with changes" if git["dirty"] else "")
    return _table(("what", "version"), rows.items())


def _table(heads: Sequence[str], rows: Any) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
