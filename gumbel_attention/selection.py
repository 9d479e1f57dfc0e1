"""Which attention layers of a model a configuration means."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Sequence

_CROSS = re.compile(r"cross_?att|encdecatt|encoder_att|encoder_decoder_att", re.IGNORECASE)
_NUMBER = re.compile(r"\.(\d+)(?=\.|$)")
_SLICE = re.compile(r"(-?\d*):(-?\d*)")
PARTS = ("encoder", "decoder", "cross")


@dataclasses.dataclass(frozen=True)
class PatchedLayer:
    """An attention layer of a model: its module's name and class, the way Gumbel attention gets in, and what to know.

    ``way`` is "registry", "rewrite" or "both"; ``note`` says where a row of its weights is not one row of attention.
    """

    name: str
    module_class: str
    way: str
    note: str | None = None

    @property
    def index(self) -> int | None:
        """Its number in its stack of layers: the first number in the name."""
        number = _NUMBER.search("." + self.name)
        return int(number.group(1)) if number else None

    @property
    def stack(self) -> str:
        """The name with that number left out: layers of one stack share it."""
        return _NUMBER.sub(".*", "." + self.name, count=1)[1:]

    @property
    def is_cross(self) -> bool:
        """Whether it attends from one sequence to another, going by its name."""
        return bool(_CROSS.search(self.name))

    def is_in(self, part: str) -> bool:
        """Whether it belongs to ``"encoder"`` or ``"decoder"`` (without cross attention), or is ``"cross"``."""
        if part == "cross" or self.is_cross:
            return part == "cross" and self.is_cross
        return part in self.name.split(".")

    def __str__(self) -> str:
        return f"{self.name} ({self.module_class}, by {self.way}{f'; {self.note}' if self.note else ''})"


def select(layers: Sequence[PatchedLayer], wanted: Sequence[int | str] | None) -> list[PatchedLayer]:
    """The layers that ``wanted`` names, in the order of the model.

    An int is the number of a layer in its stack, negative ones counting from the end; in an encoder-decoder it
    means that layer of every stack. A string is ``"encoder"``, ``"decoder"``, ``"cross"``, a slice of the layers of
    every stack such as ``"2:"`` or ``":-1"``, or a pattern of names.

    Raises:
        ValueError: an element of ``wanted`` that matches nothing.
    """
    if wanted is None:
        return list(layers)
    picked: set[str] = set()
    for item in wanted:
        names = {layer.name for layer in layers if _matches(layer, item, layers)}
        if not names:
            raise ValueError(
                f"layers={item!r} matches nothing; there are {[layer.name for layer in layers]}, their numbers, "
                f"slices of these such as '2:', and the parts {PARTS} where a model has them."
            )
        picked |= names
    return [layer for layer in layers if layer.name in picked]


def _matches(layer: PatchedLayer, item: int | str, layers: Sequence[PatchedLayer]) -> bool:
    if item in PARTS:
        return layer.is_in(str(item))
    bounds = _SLICE.fullmatch(item) if isinstance(item, str) else None
    if isinstance(item, str) and bounds is None:
        return fnmatch.fnmatchcase(layer.name, item)
    if layer.index is None:
        return False
    numbers = sorted({other.index for other in layers if other.stack == layer.stack and other.index is not None})
    if bounds is not None:
        start, stop = (_number(bound, numbers) for bound in bounds.groups())
        return (start is None or start <= layer.index) and (stop is None or layer.index < stop)
    assert isinstance(item, int)
    return layer.index == item if item >= 0 else -item <= len(numbers) and layer.index == numbers[item]


def _number(bound: str, numbers: list[int]) -> int | None:
    """The layer number that a bound of a slice means; a negative one counts from the end."""
    if not bound or int(bound) >= 0:
        return int(bound) if bound else None
    return numbers[max(int(bound), -len(numbers))]
