"""``patch_model``: Gumbel attention inside a model of the transformers library, for this instance only.

An attention module of transformers asks its own ``self.config`` which function to call and looks the name up in
``AttentionInterface``. A patched module gets a shallow copy of its config that carries our name, and a child module
``gumbel`` with its settings; nothing else of the model changes. So the model builds the masks it always built,
unselected modules keep their implementation to the bit, other models of the class never notice, and putting the
original config back is an exact undo.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils.output_capturing import _active_collector

from ..attend import attend
from ..config import GumbelAttentionConfig
from ..selection import PatchedLayer, select
from ..state import AttentionState
from .inspection import computes_own_softmax, dispatches

NAME = "gumbel_attention"
CHILD = "gumbel"
MASK_CONVENTIONS = ("eager", "sdpa")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
REFUSED = ("cache", "indices", "block_indices", "head_mask")


class PatchedState(AttentionState):
    """The state of a patched module, with the config it had: that says how the model builds its masks."""

    def __init__(self, config: GumbelAttentionConfig, num_heads: int, module: nn.Module) -> None:
        super().__init__(config, num_heads, next((p.device for p in module.parameters()), None))
        self.source_config = cast(PretrainedConfig, module.config)
        self.train(module.training)

    def enter(self, module: Any) -> None:
        """Gives the module a config of its own with our name, and itself as a child."""
        own = copy.copy(self.source_config)
        own._attn_implementation_internal = NAME
        module.config = own
        module.add_module(CHILD, self)

    def leave(self, module: Any) -> None:
        """Puts the module's config back."""
        module.config = self.source_config
        delattr(module, CHILD)


def gumbel_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function registered in transformers' ``AttentionInterface``.

    Args:
        module: a patched attention module.
        query: (B, H, Lq, D).
        key: (B, Hk, Lk, D).
        value: (B, Hk, Lk, Dv).
        attention_mask: as the model's own implementation gets it: bool, additive, or ``None``.
        dropout: rate of the dropout on the weights.
        scaling: multiplies the scores.
        is_causal: overrides the module's own flag where the mask is ``None``.
        position_bias: added to the scores.
        softcap: bounds the scores by a tanh.
        s_aux: (H,) attention sinks.
        sinks: (H,) attention sinks, under another name.
        **kwargs: what else models pass; ignored, but for what would change the result, which is refused.

    Returns:
        Output (B, Lq, H, Dv), and the weights used (B, H, Lq, Lk) where the model was asked for its attentions.
    """
    state = getattr(module, CHILD, None)
    if not isinstance(state, PatchedState):
        raise RuntimeError(
            f"attn_implementation={NAME!r} works through patch_model: load the model with 'sdpa' or 'eager' and call "
            "gumbel_attention.patch_model(model, config)."
        )
    refused = [name for name in REFUSED if kwargs.get(name) is not None]
    if refused:
        raise NotImplementedError(
            f"Gumbel attention cannot honour {refused} (continuous batching, sparse key indices or head masks) in "
            f"{type(module).__name__}; ignoring them would change the result. Remove the patch for this use."
        )
    convention = _mask_convention(state)
    if attention_mask is not None and attention_mask.shape[-1] > key.shape[-2]:
        attention_mask = attention_mask[..., : key.shape[-2]]
    causal = attention_mask is None and query.shape[2] > 1 and _none_means_causal(module, convention, is_causal)
    info = attend(
        state,
        module.training,
        query,
        key,
        value,
        _with_bias(attention_mask, position_bias, key.shape[-2]),
        dropout,
        causal,
        scaling,
        softcap=softcap,
        sinks=sinks if s_aux is None else s_aux,
        need_weights=_weights_wanted(state, kwargs),
    )
    return info.output.transpose(1, 2).contiguous(), info.weights


def _weights_wanted(state: PatchedState, kwargs: dict[str, Any]) -> bool:
    """Whether somebody may look at the weights: only a model that says what it records can say that nobody does."""
    if kwargs.get("output_attentions") or getattr(state.source_config, "output_attentions", False):
        return True
    collected = _active_collector.get()
    return collected is None or any("attentions" in name for name in collected)


def _none_means_causal(module: nn.Module, convention: str, is_causal: bool | None) -> bool:
    """Whether a missing mask stands for a causal one: so with the model's sdpa masks, never with its eager ones."""
    flag = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return convention == "sdpa" and bool(flag)


def _mask_convention(state: PatchedState) -> str:
    """The implementation the model builds its masks for. Others' are refused: flash's has the shape (B, Lk)."""
    convention = state.source_config._attn_implementation or "eager"
    if convention not in MASK_CONVENTIONS:
        raise RuntimeError(
            f"a patched model builds its masks for {convention!r}, expected one of {MASK_CONVENTIONS}: call "
            "model.set_attn_implementation('sdpa')."
        )
    return convention


def _with_bias(mask: Tensor | None, bias: Tensor | None, k_len: int) -> Tensor | None:
    """A mask and a learned bias (cut to the number of keys) as one additive mask."""
    if bias is None:
        return mask
    bias = bias[..., :k_len]
    if mask is None:
        return bias
    return bias + mask if mask.is_floating_point() else bias.masked_fill(~mask, float("-inf"))


AttentionInterface.register(NAME, gumbel_attention_forward)
AttentionMaskInterface.register(NAME, eager_mask)


def patch_model(model: PreTrainedModel, config: GumbelAttentionConfig | Iterable[GumbelAttentionConfig]) -> ModelPatch:
    """Puts Gumbel attention into the attention layers of this model instance.

    Args:
        model: a transformers model whose attention dispatches through ``AttentionInterface``, with
            ``attn_implementation`` "eager" or "sdpa".
        config: the settings of the layers it selects; or several, for groups of layers that do not overlap.

    Returns:
        The patch: a handle for the temperature, the noise and the undo, and a context manager that undoes itself.

    Raises:
        TypeError: not a transformers model, or not a config.
        ValueError: a module that cannot be reached, a selection that matches nothing, overlapping selections, or a
            model that is patched already. Nothing has changed then.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}.")
    configs = list(config) if isinstance(config, Iterable) else [config]
    if not configs:
        raise ValueError("config must be a GumbelAttentionConfig or several, got none.")
    for entry in configs:
        if not isinstance(entry, GumbelAttentionConfig):
            raise TypeError(f"config must be a GumbelAttentionConfig or several, got {entry!r}.")
    found = _attention_layers(model)
    chosen: dict[str, GumbelAttentionConfig] = {}
    for entry in configs:
        for layer in select(found, entry.layers):
            if layer.name in chosen:
                raise ValueError(f"two configurations select the layer {layer.name!r}; their layers must not overlap.")
            chosen[layer.name] = entry
    _refuse_handwritten(model, everything=any(entry.layers is None for entry in configs))
    layers = [layer for layer in found if layer.name in chosen]
    states = [_state(model.get_submodule(layer.name), chosen[layer.name], layer.name) for layer in layers]
    return ModelPatch(model, layers, states)


class ModelPatch:
    """A patch in force, as :func:`patch_model` returns it.

    Attributes:
        layers: the patched layers; printable.
    """

    def __init__(self, model: nn.Module, layers: list[PatchedLayer], states: list[PatchedState]) -> None:
        self.layers = layers
        self._states = states
        self._modules = [model.get_submodule(layer.name) for layer in layers]
        for module, state in zip(self._modules, states, strict=True):
            state.enter(module)

    @property
    def tau(self) -> list[Tensor]:
        """The current temperature of each patched layer."""
        return [state.tau.detach().clone() for state in self._states]

    def set_tau(self, tau: float) -> _Restore:
        """Sets the temperature of the patched layers that do not learn theirs; as a context manager, until its end.

        Raises:
            TypeError, ValueError: ``tau`` is not a finite number > 0.
            RuntimeError: all layers learn their temperature.
        """
        self._check_in_force()
        scheduled = [state for state in self._states if state.log_tau is None] or self._states
        for state in scheduled:
            state.check_tau(tau)
        before = [state.tau.clone() for state in scheduled]
        for state in scheduled:
            state.set_tau(tau)

        def restore() -> None:
            for state, value in zip(scheduled, before, strict=True):
                state.set_tau(value.item())

        return _Restore(restore)

    def noise(self, on: bool | str | None) -> _Restore:
        """Switches the noise, whatever the mode; as a context manager, until its end.

        Args:
            on: ``False`` is off; ``True`` is each layer's own noise; the name of a family is that noise in every
                patched layer; ``None`` goes back to noise in training and, with ``eval_noise``, in eval.

        Raises:
            TypeError, ValueError: not one of these, or ``True`` for a layer whose settings have no noise.
        """
        self._check_in_force()
        for state in self._states:
            state.check_override(on)
        before = [state.noise_override for state in self._states]
        for state in self._states:
            state.noise_override = on

        def restore() -> None:
            for state, value in zip(self._states, before, strict=True):
                state.noise_override = value

        return _Restore(restore)

    def learned_tau_parameters(self) -> list[nn.Parameter]:
        """The learned temperatures (their logarithms), to be kept out of weight decay."""
        return [state.log_tau for state in self._states if state.log_tau is not None]

    def remove(self) -> None:
        """Takes the patch out: every module is as it was.

        Raises:
            RuntimeError: it has been taken out before.
        """
        self._check_in_force()
        for module, state in zip(self._modules, self._states, strict=True):
            state.leave(module)
        self._modules = []

    def _check_in_force(self) -> None:
        if not self._modules:
            raise RuntimeError("this patch has been removed; patch the model again with patch_model(model, config).")

    def __enter__(self) -> ModelPatch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._modules:
            self.remove()

    def __repr__(self) -> str:
        lines = [f"{layer} {{{state.extra_repr()}}}" for layer, state in zip(self.layers, self._states, strict=True)]
        return "\n".join([f"ModelPatch of {len(lines)} attention layers:", *(f"  {line}" for line in lines)])


class _Restore:
    """Runs a function at the end of a ``with`` block."""

    def __init__(self, restore: Callable[[], None]) -> None:
        self._restore = restore

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc_info: object) -> None:
        self._restore()


def _attention_layers(model: PreTrainedModel) -> list[PatchedLayer]:
    """The modules of the model that dispatch, in its own order; raises where there are none or one cannot be taken."""
    names = [
        name
        for name, module in model.named_modules()
        if not isinstance(module, PreTrainedModel) and dispatches(type(module))
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no attention that dispatches through transformers' AttentionInterface; "
            f"patch_model cannot reach it. {_handwritten_hint(model)}"
        )
    for name in names:
        module: Any = model.get_submodule(name)
        if hasattr(module, CHILD):
            raise ValueError(f"the layer {name!r} is patched already: call remove() on its patch first.")
        implementation = module.config._attn_implementation or "eager"
        if implementation not in MASK_CONVENTIONS:
            raise ValueError(
                f"the layer {name!r} uses attn_implementation={implementation!r}, whose masks Gumbel attention does "
                f"not read; expected one of {MASK_CONVENTIONS}: call model.set_attn_implementation('sdpa') first."
            )
    return [PatchedLayer(name, type(model.get_submodule(name)).__name__, "registry") for name in names]


def _refuse_handwritten(model: PreTrainedModel, everything: bool) -> None:
    """Raises where all layers are asked for but some compute their own softmax."""
    hidden = _handwritten(model)
    if everything and hidden:
        raise ValueError(
            f"these attention modules of {type(model).__name__} compute their own softmax and cannot be reached: "
            f"{hidden}. Select the layers to patch with layers=..., or use another model."
        )


def _handwritten(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if computes_own_softmax(type(module))]


def _handwritten_hint(model: nn.Module) -> str:
    hidden = _handwritten(model)
    return f"These modules compute their own softmax: {hidden}." if hidden else "It has no softmax attention at all."


def _state(module: nn.Module, config: GumbelAttentionConfig, name: str) -> PatchedState:
    heads = next(
        (getattr(owner, attr) for owner in (module, module.config) for attr in HEAD_COUNTS if hasattr(owner, attr)),
        None,
    )
    if not isinstance(heads, int):
        raise ValueError(f"cannot tell how many heads the layer {name!r} has; looked for {HEAD_COUNTS}.")
    return PatchedState(config, heads, module)
