"""The architectures of the installed transformers: what they read, and the model class that is tested of each."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers as hf
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

hf.logging.set_verbosity_error()

TEXT_HEADS = ("SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM", "TOKEN_CLASSIFICATION", "TEXT_ENCODING")
SIGHT = ("pixel", "image", "video", "visual", "vision", "bbox", "grid_thw", "spatial")
SOUND = ("input_features", "input_values", "audio", "speech", "acoustic", "speaker", "codec", "waveform", "langs_mel")
MODALITIES = {  # what the arguments of forward and the sub-configurations do not tell
    **dict.fromkeys(("qwen3_vl_text", "qwen3_vl_moe_text", "cohere_compass_text", "granite_docling_text"), "text"),
    **dict.fromkeys(("lxmert", "evolla"), "multimodal"),
    **dict.fromkeys(("clvp", "dia", "csm", "bark", "vits"), "speech"),
    **dict.fromkeys(("imagegpt",), "vision"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "other"),  # read another model's keys and values
    **dict.fromkeys(("jev",), "other"),  # one prompt with marks
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model type.

    Attributes:
        name: its ``model_type``.
        modality: "text", "vision", "speech", "multimodal" or "other".
        head: the auto mapping its class was taken from, "" for the bare model.
        class_name: the model class that is built.
    """

    name: str
    modality: str
    head: str
    class_name: str

    @property
    def cls(self) -> type[hf.PreTrainedModel]:
        """The model class."""
        found: type[hf.PreTrainedModel] = getattr(hf, self.class_name)
        return found


@functools.cache
def architectures() -> tuple[Architecture, ...]:
    """All model types with a model of their own. Imports every one of them, which takes about a minute."""
    return tuple(found for name in CONFIG_MAPPING_NAMES if (found := architecture(name)) is not None)


@functools.cache
def architecture(name: str) -> Architecture | None:
    """The model type of this name, or ``None`` where no auto class knows a model that has its own configuration."""
    candidates = [(head, cls) for head, cls in _classes(name) if cls.config_class.model_type == name]
    if not candidates:
        return None
    base = [cls for head, cls in candidates if not head]
    modality = _modality(name, base[0] if base else candidates[0][1])
    if modality == "text":
        candidates = [(head, cls) for head, cls in candidates if _modality(name, cls) == "text"]
    head, cls = candidates[0] if modality == "text" or not base else ("", base[0])
    return Architecture(name, modality, head, cls.__name__)


def _classes(name: str) -> Iterator[tuple[str, type[hf.PreTrainedModel]]]:
    heads = list(TEXT_HEADS) + [""]
    others = [n[len("MODEL_FOR_") : -len("_MAPPING_NAMES")] for n in dir(modeling_auto) if n.startswith("MODEL_FOR_")]
    for head in heads + [head for head in others if head.isupper() and head not in heads]:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES", {})
        entry = mapping.get(name, ())
        for class_name in (entry,) if isinstance(entry, str) else entry:
            cls = getattr(hf, class_name, None)
            if inspect.isclass(cls) and issubclass(cls, hf.PreTrainedModel) and cls.config_class is not None:
                yield head, cls


def _modality(name: str, cls: type[hf.PreTrainedModel]) -> str:
    if name in MODALITIES:
        return MODALITIES[name]
    parameters = list(inspect.signature(cls.forward).parameters)[1:]
    words = " ".join([*parameters, *getattr(cls.config_class, "sub_configs", {})])
    text = "input_ids" in parameters
    sight = any(word in words for word in SIGHT)
    sound = any(word in words for word in SOUND)
    if text and not sight and not sound:
        return "text"
    if text or (sight and sound):
        return "multimodal"
    return "vision" if sight else "speech" if sound else "other"
