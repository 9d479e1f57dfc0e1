"""A training run, whatever its task: data, model, attention, loop, results.

A script defines a :class:`Task` and calls :func:`run_task` inside :func:`exit_with_status`.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch.utils.data import DataLoader

import gumbel_attention as ga
from harness.arguments import RunArguments
from harness.attention import attention_config, control_attention
from harness.checkpoints import CheckpointError
from harness.dry_run import dry_run
from harness.errors import UsageError
from harness.evaluation import evaluation_modes
from harness.library_layers import has_library_layers
from harness.loop import TrainingLoop, TrainingParts, make_optimizer, make_scheduler, total_steps
from harness.model_card import CardFacts, layer_names, write_model_card
from harness.models import enable_checkpointing, make_accelerator
from harness.nonfinite import NonFiniteError
from harness.processes import end_together, teller
from harness.results import environment, peak_memory_bytes, write_config, write_results
from harness.resume import check_data, finished_before, prepare_output
from harness.saved_run import RunIdentity, TrainingRecord, read_identity, use_plain_names
from harness.stopping import STOPPED_STATUS, Stopped, StopSignals
from harness.tracking import tracked, tracker_options, tracking_id

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Task(Protocol):
    """What a script adds to a run; its methods are called in this order.

    One whose ``compute_loss`` is no mean over examples has a method ``weight``: batch -> what it is a mean over, such
    as the number of tokens, as a 0-d tensor. One whose ``compute_loss`` honours ``estimator: score_function`` has a
    true attribute ``samples_loss``. A method ``prepare_model`` changes the weights of a model that begins its
    training, before it is patched; ``freeze_parameters``, then, says which of its parameters do not learn.

    Attributes:
        card: what the model card says of its models.
        averages_samples: whether its evaluation needs nothing but the logits of a forward pass.
    """

    card: CardFacts
    averages_samples: bool

    def load_data(self, accelerator: Accelerator) -> dict[str, Any]:
        """Loads and checks the data; returns what tells them from others (``saved_run.describe_data``)."""

    def make_loaders(self, order: torch.Generator) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Training and evaluation batches; ``order`` draws the order of the former and nothing else."""

    def make_model(self) -> Any:
        """The model before it is patched; the seed is set, so that all arms of a study start alike."""

    def compute_loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The mean loss of a batch."""

    def evaluate(self, accelerator: Accelerator, model: torch.nn.Module, loader: Any) -> Mapping[str, float | str]:
        """The metrics over all examples of all processes; the model is in train() before and after."""

    def save_model(self, model: Any, folder: Path) -> None:
        """Writes the bare model, and what it takes to use it, into ``folder``."""

    def facts(self) -> dict[str, Any]:
        """What results.json says of the task."""


def exit_with_status(script: str, action: Callable[[], object]) -> None:
    """Runs ``action``; what a user can put right ends the script with a message in place of a traceback.

    The exit status is 2 for a mistake in the settings or data, 75 for a run that a signal stopped and that was saved,
    1 for one that failed. Under ``accelerate launch`` and ``torchrun`` the launcher's own status is 1 in all cases.
    """
    try:
        action()
    except UsageError as error:
        _exit(script, f"error: {error}", 2)
    except Stopped as stop:
        _exit(script, str(stop), STOPPED_STATUS)
    except (CheckpointError, NonFiniteError) as error:
        _exit(script, f"error: {error}", 1)
    except (OSError, SafetensorError) as error:
        if not _no_space(error):
            raise
        _exit(script, f"error: no space left: {error}. Checkpoints are untouched.", 1)


def run_task(args: RunArguments, task: Task) -> TrainingRecord:
    """Trains, evaluates and writes the results; with ``dry_run`` it tells what it would do, and measures nothing.

    Raises:
        UsageError: a setting, the data or a checkpoint is not usable.
        Stopped: a signal stopped the run; a checkpoint was written.
        CheckpointError: a checkpoint could not be written.
        NonFiniteError: a loss or gradient is not finite.
    """
    started = datetime.now(UTC)
    _check_output_dir(Path(args.output_dir))
    config = attention_config(args)
    if args.attention == "gumbel" and args.estimator == "score_function" and not getattr(task, "samples_loss", False):
        raise UsageError("estimator=score_function needs a loss for each example, which this task does not give.")
    if any(mode.samples > 1 for mode in evaluation_modes(args.eval_modes)) and not task.averages_samples:
        raise UsageError(f"eval_modes {args.eval_modes}: this task decodes step by step and has no mean of samples.")
    accelerator = make_accelerator(args, **tracker_options(args))
    use_plain_names(accelerator)
    try:
        record = _run(args, task, config, accelerator, started)
    except Stopped as stop:  # all processes, together
        stop.__traceback__ = None  # it holds the model
        end_together(accelerator)
        raise
    end_together(accelerator)
    return record


def _run(
    args: RunArguments,
    task: Task,
    config: ga.GumbelAttentionConfig | None,
    accelerator: Accelerator,
    started: datetime,
) -> TrainingRecord:
    """The run between its beginning and its end, which has to find no variable that holds the model."""
    tell = teller(accelerator)
    if args.dry_run:
        _quieten_other_processes(accelerator)
        with _reading_weights(args):
            dry_run(args, task, accelerator, tell)
        return TrainingRecord()
    before = finished_before(args)
    if before is not None:
        tell(f"the run in {args.output_dir} is finished: nothing to do")
        return _record_of(before)
    checkpoint = prepare_output(args, accelerator, tell)
    _quieten_other_processes(accelerator)
    computing = environment(accelerator.device, accelerator.num_processes)  # before another commit is checked out

    data = task.load_data(accelerator)
    known_as = tracking_id(args, checkpoint)
    identity = RunIdentity(
        *(args.to_dict(), data, accelerator.num_processes, _deciding_bits(computing), known_as),
        code=_code_of_parts(computing["git"], checkpoint),
    )
    if checkpoint is not None:
        check_data(checkpoint, identity, tell)
    order = torch.Generator().manual_seed(args.seed)
    train_loader, eval_loader = accelerator.prepare(*task.make_loaders(order))

    set_seed(args.seed)  # every arm of a study starts from the same weights
    with _reading_weights(args):
        model = task.make_model()
    prepare = getattr(task, "prepare_model", None)
    if prepare is not None and checkpoint is None:
        prepare(model)
    freeze = getattr(task, "freeze_parameters", None)
    if freeze is not None:
        freeze(model)
    steps = total_steps(args, len(train_loader))
    attention = control_attention(model, args, config, steps)
    if args.gradient_checkpointing:
        enable_checkpointing(model)
    optimizer = make_optimizer(model, args, undecayed=attention.learned_parameters())
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it has settings of its own for these
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=args.per_device_train_batch_size, gradient_clipping=args.max_grad_norm
        )
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = accelerator.prepare(make_scheduler(optimizer, args, steps))

    folder = Path(args.output_dir)
    parts = TrainingParts(
        *(model, optimizer, scheduler, train_loader, eval_loader, order, attention, task.evaluate, task.compute_loss),
        weight=getattr(task, "weight", None),
    )
    with StopSignals() as signals, tracked(accelerator, args, known_as, checkpoint):  # a tracker that starts may draw
        set_seed(args.seed, device_specific=True)  # every process draws its own noise
        if accelerator.is_main_process:
            write_config(folder, args.to_dict())
        loop = TrainingLoop(accelerator, args, parts, identity, signals)
        if checkpoint is not None:
            loop.resume(checkpoint)
        record = loop.run()
    results = _summary(args, record, accelerator, started) | computing | task.facts()
    if len(identity.code) > 1:
        results["earlier_git"] = identity.code[:-1]
    if args.save_model:
        _save_model(accelerator, args, task, model, folder / "model")
    if accelerator.is_main_process:
        if args.save_model:
            layers = [] if attention.patch is None else layer_names(attention.patch)
            write_model_card(folder / "model", task.card, args, results, layers)
        write_results(folder, results)
    return record


def _check_output_dir(folder: Path) -> None:
    """Raises UsageError unless there is such a folder that can be written to, or one in which it can be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"output_dir {str(folder)!r}: {str(there)!r} is a file, expected a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"output_dir {str(folder)!r} cannot be written: no permission in {str(there)!r}.")


@contextmanager
def _reading_weights(args: RunArguments) -> Iterator[None]:
    """Within this context weights that are damaged are the user's mistake."""
    try:
        yield
    except SafetensorError as error:
        raise UsageError(f"model_name_or_path {args.model_name_or_path!r} cannot be loaded: {error}") from error


def _save_model(accelerator: Accelerator, args: RunArguments, task: Task, model: Any, folder: Path) -> None:
    """Saves the bare model; one that is sharded is put together again on the first process."""
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    if accelerator.distributed_type != DistributedType.FSDP:
        if accelerator.is_main_process:
            task.save_model(bare, folder)
        return
    weights = accelerator.get_state_dict(model)  # all processes together
    if accelerator.is_main_process:
        whole = task.make_model()
        config = attention_config(args)
        if config is not None and not has_library_layers(whole):
            ga.patch_model(whole, config)
            if args.learn_tau is None:
                ga.patch_of(whole).set_tau(args.tau if args.tau_end is None else args.tau_end)
        whole.load_state_dict(weights)
        task.save_model(whole, folder)


def _summary(
    args: RunArguments, record: TrainingRecord, accelerator: Accelerator, started: datetime
) -> dict[str, Any]:
    """The content of results.json, without its status, where it was computed and what the task says."""
    return {
        "started": started.isoformat(timespec="seconds"),
        "resumed_at_steps": record.resumed_at,
        "config": args.to_dict(),
        "final": record.final,
        "series": {"train": record.train, "evaluation": record.evaluation},
        "steps": record.steps,
        "train_seconds": record.train_seconds,
        "eval_seconds": record.eval_seconds,
        "steps_per_second": record.steps / record.train_seconds,
        "tokens": record.tokens,
        "tokens_per_second": None if record.tokens is None else record.tokens / record.train_seconds,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
    }


def _record_of(results: dict[str, Any]) -> TrainingRecord:
    return TrainingRecord(
        train=results["series"]["train"],
        evaluation=results["series"]["evaluation"],
        final=results["final"],
        steps=results["steps"],
        train_seconds=results["train_seconds"],
        eval_seconds=results["eval_seconds"],
        resumed_at=results.get("resumed_at_steps", []),
        tokens=results.get("tokens"),
    )


def _deciding_bits(computing: Mapping[str, Any]) -> dict[str, Any]:
    """What the last bits of a run may depend on beside its settings and code."""
    return {"device": computing["device"], "num_threads": computing["num_threads"], **computing["versions"]}


def _code_of_parts(git: dict[str, Any] | None, checkpoint: Path | None) -> list[dict[str, Any] | None]:
    """The git states of the parts of a run, the present one last; none twice in a row."""
    before = [] if checkpoint is None else read_identity(checkpoint).code
    return before if before[-1:] == [git] else [*before, git]


def _quieten_other_processes(accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        return
    import datasets  # a second that a script without them would wait for

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _no_space(error: Exception) -> bool:
    """Whether the disk, quota or limit of file sizes is exhausted; safetensors says so in words only."""
    return getattr(error, "errno", None) in _NO_SPACE or any(os.strerror(code) in str(error) for code in _NO_SPACE)


def _exit(script: str, words: str, status: int) -> None:
    print(f"{script}: {words}", file=sys.stderr)
    sys.exit(status)
