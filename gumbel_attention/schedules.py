"""Temperature schedules: tau as a pure function of the training step."""

from __future__ import annotations

import math
from collections.abc import Callable

from .config import check_positive, choose

KINDS = ("constant", "linear", "exponential", "cosine", "step")


def temperature_schedule(
    kind: str, start: float, end: float | None = None, steps: int = 1, *, drops: int = 4
) -> Callable[[int], float]:
    """A function from the step to the temperature, from ``start`` at step 0 to ``end`` at step ``steps``.

    With ``x = min(step / steps, 1)``:

    - ``"constant"``: ``start`` throughout (``end`` must be ``None`` or equal to it);
    - ``"linear"``: ``start + (end - start) * x``;
    - ``"exponential"``: ``start * (end / start) ** x``, as Gumbel-softmax is usually annealed (Jang et al. 2017);
    - ``"cosine"``: ``end + (start - end) * (1 + cos(pi * x)) / 2``;
    - ``"step"``: the exponential one, held on ``drops`` stairs of equal length after the first.

    After ``steps`` the temperature stays at ``end``. The function has no state: a resumed run asks for its step.

    Raises:
        TypeError, ValueError: an unknown kind, a temperature that is not > 0, or a count below 1.
    """
    choose("schedule kind", kind, KINDS)
    check_positive("start", start)
    end = start if end is None else end
    check_positive("end", end)
    for name, count in (("steps", steps), ("drops", drops)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {count!r}.")
    if kind == "constant" and end != start:
        raise ValueError(f"a constant schedule has one temperature, got start={start} and end={end}.")

    def tau(step: int) -> float:
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step!r}.")
        x = min(step / steps, 1.0)
        if kind == "linear":
            return start + (end - start) * x
        if kind == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * x)) / 2
        if kind == "step":
            x = math.floor(x * drops) / drops
        return start * math.exp(x * math.log(end / start))

    return tau
