"""Torch's MultiheadAttention and ours with the same weights, and inputs for both."""

import pytest
import torch
from torch import nn

from gumbel_attention import GumbelAttentionConfig
from gumbel_attention.modules import GumbelMultiheadAttention

E, H, L, S, N = 12, 4, 5, 6, 3
PLAIN = GumbelAttentionConfig(noise="none")
HARD = GumbelAttentionConfig(noise="none", hard=True)
HARD_GUMBEL = GumbelAttentionConfig(hard=True)
nested_is_a_prototype = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def twins(config=PLAIN, **kw):
    """A torch module and ours with the same weights, none of them zero."""
    theirs = nn.MultiheadAttention(E, H, **kw)
    ours = GumbelMultiheadAttention(E, H, **kw, config=config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict(), strict=config.learn_tau is None)
    return theirs, ours


def inputs(batch_first=False, kdim=E, vdim=E, batched=True, dtype=torch.float32):
    """Query, key and value that want gradients, in either layout."""
    shapes = [(L, E), (S, kdim), (S, vdim)]
    if batched:
        shapes = [(N, n, e) if batch_first else (n, N, e) for n, e in shapes]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
