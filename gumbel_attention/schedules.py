"""Temperature schedules: tau as a pure function of the training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .config import check_positive, choose

KINDS = ("constant", "linear", "exponential", "cosine", "step", "clipped_exponential")
_OWN_SETTINGS = {"step": ("drops",), "clipped_exponential": ("rate", "every")}


def temperature_schedule(
    kind: str,
    start: float,
    end: float | None = None,
    steps: int | None = None,
    *,
    drops: int | None = None,
    rate: float | None = None,
    every: int | None = None,
) -> Callable[[int], float]:
    """A function from the step to the temperature, from ``start`` at step 0 to ``end`` at step ``steps``.

    With ``x = min(step / steps, 1)``:

    - ``"constant"``: ``start`` throughout (``end`` must be ``None`` or equal to it; ``steps`` has no effect);
    - ``"linear"``: ``start + (end - start) * x``;
    - ``"exponential"``: ``start * (end / start) ** x``;
    - ``"cosine"``: ``end + (start - end) * (1 + cos(pi * x)) / 2``;
    - ``"step"``: the exponential one on stairs. The temperature stays at ``start`` for the first ``steps / drops``
      steps and then is multiplied by ``(end / start) ** (1 / drops)`` there and at each further multiple of ``steps
      / drops``. The last of the ``drops`` is at ``steps``: to train at ``end`` too, let the training be longer.

    After ``steps`` the temperature stays at ``end``. The annealing of Jang et al. (2017) has a rate in place of an
    end in time, and takes no ``steps``:

    - ``"clipped_exponential"``: ``max(end, start * exp(-rate * t))`` with ``t = every * floor(step / every)``, the
      step of the last update. Theirs: ``start`` 1, ``end`` 0.5, ``rate`` 1e-5 or 1e-4, ``every`` 500 or 1000.

    The function has no state: a resumed run asks for its step.

    Args:
        kind: one of the above.
        start: temperature at step 0.
        end: the last temperature; that of ``"clipped_exponential"`` must not be above ``start``.
        steps: from which step on the temperature is ``end``.
        drops: of ``"step"``: how many there are; ``None`` is 4.
        rate: of ``"clipped_exponential"``: the decay in one step, > 0.
        every: of ``"clipped_exponential"``: steps from one update to the next; ``None`` is 1.

    Raises:
        TypeError, ValueError: an unknown kind, a temperature or rate that is not > 0, a count below 1, an argument
            that this kind needs and did not get, or one that it has no use for.
    """
    choose("schedule kind", kind, KINDS)
    check_positive("start", start)
    _check_arguments(kind, end, steps, drops=drops, rate=rate, every=every)
    if kind == "constant":
        if end not in (None, start):
            raise ValueError(f"a constant schedule has one temperature, got start={start} and end={end}.")
        return _from_step_zero(lambda step: float(start))
    assert end is not None
    if kind == "clipped_exponential":
        assert rate is not None
        return _clipped_exponential(float(start), float(end), rate, every or 1)
    assert steps is not None
    return _between(kind, float(start), float(end), steps, drops or 4)


def _check_arguments(kind: str, end: float | None, steps: int | None, **own: Any) -> None:
    """Raises unless the arguments are those of the kind, each in its range."""
    needed = {"constant": {}, "clipped_exponential": {"end": end, "rate": own["rate"]}}
    for name, value in needed.get(kind, {"end": end, "steps": steps}).items():
        if value is None:
            raise ValueError(f"a schedule of kind {kind!r} needs {name}, got none.")
    for name, value in own.items():
        if value is not None and name not in _OWN_SETTINGS.get(kind, ()):
            owner = next(other for other, names in _OWN_SETTINGS.items() if name in names)
            raise ValueError(f"{name} belongs to schedules of kind {owner!r}, got {name}={value!r} for {kind!r}.")
    if kind == "clipped_exponential" and steps is not None:
        raise ValueError(f"a schedule of kind {kind!r} ends by its rate and takes no steps, got steps={steps!r}.")
    for name, value in (("end", end), ("rate", own["rate"])):
        if value is not None:
            check_positive(name, value)
    for name, count in (("steps", steps), ("drops", own["drops"]), ("every", own["every"])):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{name} must be an integer >= 1, got {count!r}.")


def _between(kind: str, start: float, end: float, steps: int, drops: int) -> Callable[[int], float]:
    """The kinds that run from ``start`` to ``end`` in so many steps."""
    low, high = min(start, end), max(start, end)

    def tau(step: int) -> float:
        if step >= steps:
            return end
        x = step / steps
        if kind == "step":
            x = (step * drops // steps) / drops  # in whole numbers: 29 / 100 * 100 is below 29
        if x == 0:
            return start
        if kind == "linear":
            value = start + (end - start) * x
        elif kind == "cosine":
            value = end + (start - end) * (1 + math.cos(math.pi * x)) / 2
        else:
            value = math.exp((1 - x) * math.log(start) + x * math.log(end))
        return min(max(value, low), high)

    return _from_step_zero(tau)


def _clipped_exponential(start: float, end: float, rate: float, every: int) -> Callable[[int], float]:
    if end > start:
        raise ValueError(
            f"a schedule of kind 'clipped_exponential' falls from start to end, got start={start} and end={end}."
        )
    return _from_step_zero(lambda step: max(end, start * math.exp(-rate * (step // every * every))))


def _from_step_zero(tau: Callable[[int], float]) -> Callable[[int], float]:
    """``tau``, refusing negative steps."""

    def checked(step: int) -> float:
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step!r}.")
        return tau(step)

    return checked
