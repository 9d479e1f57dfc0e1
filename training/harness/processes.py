"""A run on several processes: who speaks, and how they end."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator
from tqdm import tqdm


def teller(accelerator: Accelerator) -> Callable[[str], None]:
    """A function that prints a line, past progress bars, in the main process; in the others it does nothing."""

    def tell(line: str) -> None:
        if accelerator.is_main_process:
            tqdm.write(line)

    return tell


def end_together(accelerator: Accelerator) -> None:
    """Waits for all processes, frees the model and then closes the group of processes.

    The order matters. DistributedDataParallel holds the group, and whoever lets go of it last waits for the threads
    of gloo. DistributedDataParallel does so without giving up the interpreter's lock, which such a thread may need to
    free the tensors of the last collective call: both would wait for ever. torch.distributed, which still holds the
    group when the model goes, gives the lock up.

    Args:
        accelerator: of the run; nothing else may hold the model that it prepared, no variable and no traceback.
    """
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    accelerator.end_training()
