"""Learning from a teacher: a classifier, fine-tuned for the same labels, whose answers are targets beside the labels.

The teacher runs in eval, without gradient and without noise, once for each training batch; its time is the run's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification as _Classifier
from transformers import PretrainedConfig

import gumbel_attention as ga
from harness.errors import UsageError
from harness.models import load_tokenizer, resolve_model_path
from harness.splicing import splice

_SETTINGS = "gumbel_attention"
"""The entry of a saved config.json that ``gumbel_attention.from_pretrained`` reads."""


@dataclasses.dataclass
class Distillation:
    r"""The loss of a student.

    .. math:: (1 - w)\, \mathrm{CE} + w\, T^2\, \mathrm{KL}(p_{\mathrm{teacher}}^{1/T} \| p_{\mathrm{student}}^{1/T})
              + v\, \mathrm{mean}_l \frac{\|h_l - h_l^{\mathrm{teacher}}\|^2}{\|h_l^{\mathrm{teacher}}\|^2}

    with the probabilities of logits / T (Hinton et al. 2015) and the hidden states after each layer at the tokens that
    are no padding (the mean squared error of Jiao et al. 2020, TinyBERT, here relative to the teacher's states). Each
    term is a mean over examples. In training a share of them can be texts without labels, each made of two of the
    batch (:func:`harness.splicing.splice`): for these w is 1.

    Args:
        teacher: in eval.
        weight: w, of the teacher's answers against the labels.
        temperature: T.
        hidden: v, of the hidden states; with 0 they are not computed.
        spliced: the share.
        pad_token_id: of the spliced texts.
        precision: what the teacher runs in; Accelerate's ``autocast`` gives it the student's.
    """

    teacher: nn.Module
    weight: float
    temperature: float
    hidden: float = 0.0
    spliced: float = 0.0
    pad_token_id: int = 0
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext

    def loss(self, student: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The mean loss of a batch with ``labels``."""
        wants_states = self.hidden > 0.0
        weight = torch.full_like(inputs["labels"], self.weight, dtype=torch.float32)
        if self.spliced > 0.0 and student.training:
            inputs, unlabelled = splice(inputs, self.spliced, self.pad_token_id)
            weight = weight.masked_fill(unlabelled, 1.0)
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        self.teacher.to(inputs["labels"].device)
        with torch.no_grad(), self.precision():
            target = self.teacher(**asked, output_hidden_states=wants_states)
        output = student(**asked, output_hidden_states=wants_states)
        logits = output.logits.float()
        labels = nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")
        answers = divergence(logits, target.logits.float(), self.temperature)
        loss = ((1.0 - weight) * labels + weight * answers).mean()
        if not wants_states:
            return loss
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        return loss + self.hidden * distance(output.hidden_states[1:], target.hidden_states[1:], mask)

    def describe(self) -> dict[str, Any]:
        """What tells this teacher from others."""
        digest = hashlib.sha256()
        for name, value in sorted(self.teacher.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return {"teacher_sha256": digest.hexdigest()}


def divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) (B,) of logits (B, classes) at temperature T."""
    log_p, log_q = (target / temperature).log_softmax(-1), (logits / temperature).log_softmax(-1)
    return temperature**2 * nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def distance(states: tuple[Tensor, ...], targets: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Squared distance of hidden states (B, L, D) from the teacher's, relative to these, the mean over layers and B.

    Args:
        states: the student's, one for each layer.
        targets: the teacher's.
        mask: (B, L), 0 at padding.
    """
    kept = mask[..., None].float()

    def squares(x: Tensor) -> Tensor:
        return (x.float().square() * kept).sum((1, 2))

    ratios = [squares(ours - theirs) / squares(theirs) for ours, theirs in zip(states, targets, strict=True)]
    return torch.stack(ratios).mean()


def load_teacher(path: str, label_names: list[str], tokenizer: Any, cache_dir: str | None = None) -> nn.Module:
    """A fine-tuned classifier in eval, with the attention that it was saved with, its noise off.

    Args:
        path: a folder that ``save_model`` wrote (``output_dir/model``), or another model's name or folder.
        label_names: what its outputs must be, in this order.
        tokenizer: of the student, whose token ids it gets.
        cache_dir: of transformers.

    Raises:
        UsageError: it cannot be loaded, was not fine-tuned, or for other labels or tokens.
    """
    name, options = resolve_model_path(path), {"cache_dir": cache_dir, "dtype": torch.float32}
    try:
        carries = _SETTINGS in PretrainedConfig.get_config_dict(name, cache_dir=cache_dir)[0]
        if carries:
            model, info = ga.from_pretrained(_Classifier, name, output_loading_info=True, **options)
            ga.patch_of(model).noise(False)
        else:
            model, info = _Classifier.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"distill_from {path!r} cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"distill_from {path!r} is no fine-tuned classifier: it has no weights for {', '.join(missing[:3])}. Use "
            "a folder that a run with save_model: true has written, its output_dir/model."
        )
    found = [model.config.id2label[index] for index in sorted(model.config.id2label)]
    if found != label_names:
        raise UsageError(
            f"distill_from {path!r} tells the labels {found}, this data has {label_names}: a teacher must have the "
            "same labels in the same order (id2label in its config.json)."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a plain load restores no attention: it was loaded above
        vocabulary = load_tokenizer(path, cache_dir).get_vocab()
    if vocabulary != tokenizer.get_vocab():
        raise UsageError(f"distill_from {path!r} reads other tokens than model_name_or_path does: it cannot teach it.")
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]  # of transformers' loaders


def check_states(student: Any, teacher: Any) -> None:
    """Raises UsageError unless both have hidden states of the same number and size."""
    names = ("num_hidden_layers", "hidden_size")
    ours, theirs = ([getattr(model.config, name, None) for name in names] for model in (student, teacher))
    if ours != theirs:
        raise UsageError(
            f"distill_hidden compares the states after each layer: the teacher has {theirs[0]} layers of size "
            f"{theirs[1]}, the model {ours[0]} of size {ours[1]}. Set distill_hidden: 0."
        )
