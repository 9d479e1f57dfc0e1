"""Attention as matrix units compute it in half precision: what its error is measured against.

The formulas of DESIGN's table in float32, with what enters a product of matrices rounded to the dtype: weights before
they meet the values, gradients of scores before they meet keys and queries; the output is kept rounded for delta.
"""

import dataclasses

import torch
from torch import Tensor

from gumbel_attention import noise
from gumbel_attention.arguments import attention_problem
from gumbel_attention.estimators import choose

Arguments = dict[str, object]


def rounded_products(arguments: Arguments, d_out: Tensor, *, truncate: bool = False) -> dict[str, Tensor]:
    """The output and the gradients of the arguments' leaves, in their dtypes; no soft cap and no sinks.

    Args:
        arguments: those of attention.
        d_out: the gradient of the output.
        truncate: bfloat16 by cutting digits off, as Triton's interpreter makes it; GPUs and torch round to nearest.
    """
    single = {name: x.float() if _is_half(x) else x for name, x in arguments.items()}
    problem = attention_problem(**single)  # type: ignore[arg-type]
    dtype, choice, visible = d_out.dtype, problem.choice, problem.visible()
    group = problem.query.shape[1] // problem.key.shape[1]
    q, bias = problem.query.detach(), problem.bias
    k, v = (x.detach().repeat_interleave(group, dim=1) for x in problem.hidden_keys_and_values())
    scores = q @ k.mT * problem.scale
    if bias is not None:
        scores = scores + (bias if visible is None else torch.where(visible, bias, 0.0))
    p = choose(scores, visible, dataclasses.replace(choice, hard=False)).weights
    hard = choose(scores, visible, choice).weights if choice.hard else None
    factor, d_o = torch.ones(()), d_out.float()
    if problem.dropout_p > 0.0:
        assert choice.where is not None
        factor = noise.dropout_factor(problem.dropout_p, choice.where).float()

    def rounded(x: Tensor) -> Tensor:
        if truncate and dtype == torch.bfloat16:
            return (x.contiguous().view(torch.int32) & -(2**16)).view(torch.float32)
        return x.to(dtype).float()

    used = rounded(p * factor) if hard is None else hard * factor
    output = rounded(used @ v)
    d_p = d_o @ v.mT * factor
    delta = (d_o * output if hard is None else p * d_p).sum(-1, keepdim=True)
    d_z = p * (d_p - delta)
    d_s = rounded(d_z / choice.tau)
    z = (scores if choice.where is None else scores + choice.noise_scale * _noise(problem)) / choice.tau
    z = z if visible is None else z.masked_fill(~visible, 0.0)

    def grouped(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    gradients = {
        "query": d_s @ k * problem.scale,
        "key": grouped(d_s.mT @ q) * problem.scale,
        "value": grouped(used.mT @ d_o),
        "tau": _summed(-(d_z * z) / choice.tau, arguments, "tau"),
        "noise_scale": _summed(d_z * _noise(problem) / choice.tau, arguments, "noise_scale"),
        "attn_mask": _summed(d_z / choice.tau, arguments, "attn_mask"),
    }
    leaves = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    exact = ("tau", "noise_scale")
    return {"output": output.to(dtype)} | {
        name: gradients[name] if name in exact else rounded(gradients[name]).to(x.dtype) for name, x in leaves.items()
    }


def _is_half(x: object) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)


def _noise(problem) -> Tensor:  # type: ignore[no-untyped-def]
    choice = problem.choice
    if choice.noise == "none":
        return torch.zeros(())
    return noise.sample(choice.noise, choice.where).float()


def _summed(each: Tensor, arguments: Arguments, name: str) -> Tensor:
    """A gradient for each score, summed to the shape of an argument."""
    x = arguments.get(name)
    if not isinstance(x, Tensor):
        return each
    return each.sum_to_size(x.shape) if name == "attn_mask" else each.sum((0, 2, 3)).sum_to_size(x.shape)
