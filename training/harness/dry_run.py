"""What a run would do, without doing it: settings, patched layers, parameters, data, steps, temperature, memory.

What is printed is YAML. Of the memory, weights, gradients and optimiser states are counted; what the activations take
is measured in a forward and backward pass over the first batch of training, or part of it, where that takes seconds.
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.utils import send_to_device, set_seed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gumbel_attention as ga
from harness.arguments import RunArguments
from harness.attention import AttentionControl, attention_config, control_attention
from harness.checkpoints import latest
from harness.errors import UsageError
from harness.library_layers import LibraryLayers
from harness.loop import steps_per_epoch, total_steps
from harness.models import enable_checkpointing
from harness.resume import COMPARED_AS_DATA, differing_settings, finished_before, prepare_output
from harness.saved_run import read_identity

SECONDS = 5.0
"""Longest pass over a whole batch, judged by one over its first row."""
OPERATIONS = 1e12
"""Floating-point operations of the first row's pass, on a CPU, from which on not even that is made."""
_COPIED = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
_OTHER_STATES = ("encoder_hidden_states", "key_value_states")
_HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")


def dry_run(args: RunArguments, task: Any, accelerator: Accelerator, tell: Callable[[str], object]) -> None:
    """Prints what a run would do; writes nothing but the caches of data sets and models.

    Args:
        args: the settings of the run.
        task: as for ``run_task``.
        accelerator: of the run; all its processes call this together, the main one prints.
        tell: prints a line.

    Raises:
        UsageError: a setting or the data is not usable.
    """
    folder = _describe_output(args, accelerator)
    task.load_data(accelerator)
    train, evaluation = task.make_loaders(torch.Generator().manual_seed(args.seed))
    batches = len(accelerator.prepare(train))
    if accelerator.is_main_process:
        set_seed(args.seed)
        model = task.make_model()
        steps = total_steps(args, batches)
        attention = control_attention(model, args, attention_config(args), steps)
        if args.gradient_checkpointing:
            enable_checkpointing(model)
        batch = send_to_device(next(iter(train)), accelerator.device)
        activations, found = _try_batch(args, task, accelerator, model.to(accelerator.device), attention, batch)
        report = {
            "configuration": dataclasses.replace(args, dry_run=False).to_dict(),
            "output_dir": folder,
            "attention": _describe_attention(args, model, attention, steps, found),
            "parameters": _count_parameters(model, attention),
            "data": {
                "training examples": len(train.dataset),
                "evaluation examples": len(evaluation.dataset),
                "processes": accelerator.num_processes,
                "batches of each process in an epoch": batches,
                "optimiser steps in an epoch": steps_per_epoch(args, batches),
                "optimiser steps": steps,
                "first batch": {name: str(list(value.shape)) for name, value in _tensors_of(batch).items()},
            },
            "memory of each process": _describe_memory(model, accelerator, activations),
        }
        tell(yaml.safe_dump(report, sort_keys=False, allow_unicode=True, width=119).rstrip())
    accelerator.wait_for_everyone()


def patched_layers(model: torch.nn.Module, patch: Any) -> dict[str, tuple[str, torch.nn.Module]]:
    """Name -> (class and way, module) of the attention layers that a run controls.

    Args:
        model: bare.
        patch: of the model, or its :class:`LibraryLayers`; None for the model's own attention.
    """
    if patch is None:
        return {}
    if isinstance(patch, LibraryLayers):
        return {name: (f"{type(layer).__name__}, of the library", layer) for name, layer in patch.layers.items()}
    found = {}
    for layer in patch.layers:
        note = f"; {layer.note}" if layer.note else ""
        found[layer.name] = (f"{layer.module_class}, by {layer.way}{note}", model.get_submodule(layer.name))
    return found


# output_dir


def _describe_output(args: RunArguments, accelerator: Accelerator) -> str:
    """What output_dir holds and what a run would do about it; nothing there changes."""
    folder = Path(args.output_dir)
    plain = dataclasses.replace(args, dry_run=False)
    try:
        if args.resume_from_checkpoint is not None:
            return _describe_resuming(plain)
        prepare_output(dataclasses.replace(plain, overwrite_output_dir=False), accelerator, lambda line: None)
    except UsageError as error:
        if args.overwrite_output_dir:
            return f"{folder}: the run in it would be removed"
        return f"{folder}: a run would be refused: {error}"
    return f"{folder}: a run would begin in it"


def _describe_resuming(args: RunArguments) -> str:
    folder, wanted = Path(args.output_dir), str(args.resume_from_checkpoint)
    if finished_before(args) is not None:
        return f"{folder}: the run in it is finished, there is nothing to do"
    checkpoint = latest(folder, lambda line: None) if wanted == "latest" else Path(wanted)
    if checkpoint is None:
        return f"{folder}: a run would begin in it, there is no checkpoint to go on from"
    different = differing_settings(read_identity(checkpoint).config, args, COMPARED_AS_DATA)
    if different:
        listed = "; ".join(f"{name}: {then!r} -> {now!r}" for name, (then, now) in different.items())
        return f"{folder}: {checkpoint.name} is of other settings (there -> here): {listed}"
    return f"{folder}: a run would go on from {checkpoint.name}"


# Attention


def _describe_attention(
    args: RunArguments, model: torch.nn.Module, attention: AttentionControl, steps: int, found: Mapping[str, str]
) -> dict[str, Any] | str:
    if attention.patch is None:
        return "the model's own"
    layers = {
        name: f"{way}; heads: {_heads(layer)}; implementation: {found.get(name, 'not known')}"
        for name, (way, layer) in patched_layers(model, attention.patch).items()
    }
    moments = {"at the first step": 0, "in the middle": steps // 2, "at the end": steps}
    tau: Any = {name: attention.tau(step) for name, step in moments.items()}
    scale = (
        {} if args.noise_scale_end is None else {"noise scale": f"from {args.noise_scale} to {args.noise_scale_end}"}
    )
    modes = {"evaluation": [mode.name for mode in attention.evaluation_modes()]}
    return (
        scale
        | modes
        | {"tau": f"learned per {args.learn_tau}, from {args.tau}" if args.learn_tau else tau, "layers": layers}
    )


def _heads(layer: Any) -> str:
    state = layer.gumbel
    return f"{state.num_heads}" if state.config.heads is None else f"{list(state.config.heads)} of {state.num_heads}"


@contextmanager
def _implementations(layers: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, str]]:
    """Within this context the mapping gets, for each layer that runs, the implementation of a call of its shape."""
    found: dict[str, str] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[name] = _implementation(module, args, kwargs)

        return look

    handles = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _implementation(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What ``ga.explain`` says of the layer's call in training, its masks left out."""
    if isinstance(module, ga.GumbelSetAttention):
        return "reference, which holds the weights it returns"
    state = module.gumbel
    if getattr(state, "way", "") != "registry":
        return "its own scores, their softmax exchanged"
    states = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim == 3]
    if not states or not states[0].is_floating_point():
        return "not known"
    crossed = next((kwargs[name] for name in _OTHER_STATES if isinstance(kwargs.get(name), torch.Tensor)), None)
    own, other = states[0], crossed if crossed is not None else states[-1]
    sizes = (getattr(module, name, None) for name in _HEAD_SIZES)
    head_dim = next((size for size in sizes if isinstance(size, int)), own.shape[-1] // state.num_heads)
    device_type = own.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else own.dtype
    query, key = (
        torch.zeros((), device=own.device, dtype=dtype, requires_grad=True).expand(
            x.shape[0], state.num_heads, x.shape[1], head_dim
        )
        for x in (own, other)
    )
    try:
        return ga.explain(query, key, key, dropout_p=_dropout(module), **state.arguments(True)).impl
    except (TypeError, ValueError) as error:
        return f"not known ({error})"


def _dropout(module: Any) -> float:
    """The rate of the dropout on the weights, as far as modules of transformers agree on where it is."""
    for name in ("attention_dropout", "attn_dropout", "dropout", "dropout_prob"):
        rate = getattr(module, name, None)
        rate = getattr(rate, "p", rate)
        if isinstance(rate, (int, float)) and not isinstance(rate, bool):
            return float(rate)
    return 0.0


# Parameters and memory


def _count_parameters(model: torch.nn.Module, attention: AttentionControl) -> dict[str, int]:
    parameters = list(model.parameters())
    return {
        "all": sum(each.numel() for each in parameters),
        "trained": sum(each.numel() for each in parameters if each.requires_grad),
        "learned temperatures": sum(each.numel() for each in attention.learned_parameters()),
    }


def state_bytes(model: torch.nn.Module) -> dict[str, int]:
    """What weights, gradients and the states of AdamW take: two moments for each trained weight, and step counts."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(each.nbytes for each in trained)
    return {
        "weights": sum(each.nbytes for each in [*model.parameters(), *model.buffers()]),
        "gradients": gradients,
        "optimiser": 2 * gradients + 4 * len(trained),
    }


def _describe_memory(model: torch.nn.Module, accelerator: Accelerator, activations: tuple[int | None, str]) -> Any:
    states, (extra, how) = state_bytes(model), activations
    shards = accelerator.num_processes if accelerator.distributed_type == DistributedType.FSDP else 1
    parts = {name: size // shards for name, size in states.items()}
    if accelerator.distributed_type in _COPIED:
        parts["gradients in the buckets of DistributedDataParallel"] = states["gradients"]
    described = {name: _readable(size) for name, size in parts.items()}
    described["activations"] = f"{how}" if extra is None else f"{_readable(extra)}, {how}"
    described["together"] = _readable(sum(parts.values()) + (extra or 0))
    notes = []
    if shards > 1:
        notes.append(f"weights, gradients and optimiser as shares of {shards} processes")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        notes.append("DeepSpeed divides them as its own settings say, which is not taken into account")
    return described | ({"note": "; ".join(notes)} if notes else {})


def _try_batch(
    args: RunArguments, task: Any, accelerator: Accelerator, model: torch.nn.Module, attention: AttentionControl,
    batch: Any,
) -> tuple[tuple[int | None, str], dict[str, str]]:  # fmt: skip
    """Bytes of activations (None: not known) with how they were found, and the layers' implementations."""
    rows = _rows(batch)
    layers = {name: layer for name, (_, layer) in patched_layers(model, attention.patch).items()}
    model.train()

    def passing(count: int, backward: bool = True) -> Callable[[], None]:
        def run() -> None:
            with accelerator.autocast():
                loss = task.compute_loss(model, _first(batch, count))
            if backward:
                loss.backward()

        return run

    if accelerator.device.type == "cpu" and _operations(model, _first(batch, 1)) > OPERATIONS:
        return estimated_bytes(model, batch, args), {}
    passing(1)()  # makes the gradients, and compiles what is compiled at the first call
    with _implementations(layers) as found:
        begun = time.perf_counter()
        passing(1)()
        quick = rows * (time.perf_counter() - begun) <= SECONDS
        if quick:
            return (_extra_bytes(passing(rows), model, batch), "measured over the first batch"), found
        one, two = (_extra_bytes(passing(count, backward=False), model, batch) for count in (1, 2))
        least = _extra_bytes(passing(2), model, batch)  # for few rows mostly what does not grow with them
    how = f"an estimate: the forward pass, linear in the rows, measured over 1 and 2 of the {rows} of the first batch"
    return (max(least, one + (rows - 1) * (two - one)), how), found


def estimated_bytes(model: Any, batch: Any, args: RunArguments) -> tuple[int | None, str]:
    """Activations of a transformer by a formula, and what it says; None where the model's sizes are not known.

    Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1, for elements of e bytes in place of 2: b s h (16 e + 2) +
    b a s^2 (2 e + 1) in each layer, which with checkpointing keeps its input, b s h e, and is computed again.
    """
    config = getattr(model, "config", None)
    sizes: list[Any] = [
        getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    ]
    shapes = [value.shape for value in _tensors_of(batch).values() if value.ndim == 2]
    if not shapes or not all(isinstance(size, int) for size in sizes):
        return None, "not measured, for a pass takes too long, and not known by a formula"
    layers, width, heads = sizes
    rows, length = max(shapes, key=lambda shape: shape[1])
    size = 4 if args.mixed_precision in (None, "no") else 2
    layer = rows * length * width * (16 * size + 2) + rows * heads * length**2 * (2 * size + 1)
    total = layers * rows * length * width * size + layer if args.gradient_checkpointing else layers * layer
    return total, (
        f"an estimate by the formula of Korthikanti et al. 2022 for {layers} layers, width {width}, {heads} heads, "
        f"{rows} x {length} tokens; embeddings and logits are left out"
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make while it is active.

    Attributes:
        alive: bytes of those that exist.
        peak: the most at one time.

    Args:
        known: tensors that were there before.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.alive += self._known[key]
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.alive -= self._known.pop(key)


def _extra_bytes(run: Callable[[], None], model: torch.nn.Module, batch: Any) -> int:
    """Most bytes that a pass takes beyond weights, gradients and batch: on a GPU as torch allocates them."""
    own = [*model.parameters(), *model.buffers()]
    device = own[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with LiveBytes([*own, *gradients, *_tensors_of(batch).values()]) as live:
        run()
    return live.peak


def _operations(model: torch.nn.Module, batch: Any) -> float:
    """About the floating-point operations of a pass: six for each weight and token."""
    tokens = max((value.numel() for value in _tensors_of(batch).values()), default=1)
    return 6.0 * sum(parameter.numel() for parameter in model.parameters()) * tokens


def _tensors_of(batch: Any) -> dict[str, torch.Tensor]:
    items = batch.items() if isinstance(batch, Mapping) else enumerate(tree_leaves(batch))
    return {str(name): value for name, value in items if isinstance(value, torch.Tensor)}


def _rows(batch: Any) -> int:
    return max((len(value) for value in _tensors_of(batch).values() if value.ndim), default=1)


def _first(batch: Any, rows: int) -> Any:
    return {name: value[:rows] for name, value in batch.items()} if isinstance(batch, Mapping) else batch


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
