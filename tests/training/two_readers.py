"""What each of two processes does for test_language_processes.py.

FILE holds the settings of a run of language_model.py, with a stream: it is made once whole and, in the folder
``resumed`` beside its own, once from its second step. Every process writes the inputs that it saw to
``seen_<rank>.pt``, there, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from language_runs import start

from tasks import language_modelling


@contextmanager
def seen_inputs() -> Iterator[list[torch.Tensor]]:
    """The list gets the inputs of every training batch."""
    seen: list[torch.Tensor] = []
    compute_loss = language_modelling.compute_loss

    def looking(model: Any, batch: Any) -> torch.Tensor:
        seen.append(batch["input_ids"].clone())
        return compute_loss(model, batch)

    with mock.patch.object(language_modelling, "compute_loss", looking):
        yield seen


def main(file: Path) -> None:
    settings = yaml.safe_load(file.read_text())
    whole = Path(settings["output_dir"])
    rank = Accelerator().process_index
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(self: Any) -> None:
        """In place of ending, for the processes have another run to make together."""
        AcceleratorState._reset_state(reset_partial_state=True)

    with mock.patch.object(Accelerator, "end_training", keep):
        with seen_inputs() as seen["whole"]:
            start(settings, checkpointing_steps=2, keep_last=None)
        with seen_inputs() as seen["resumed"]:
            resumed = {"output_dir": str(whole.with_name("resumed")), "resume_from_checkpoint": whole / "checkpoint-2"}
            start(settings, **{key: str(value) for key, value in resumed.items()})
    torch.distributed.destroy_process_group()
    torch.save(seen, whole.with_name(f"seen_{rank}.pt"))
