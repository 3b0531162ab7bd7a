"""A mixture of SwiGLU experts, in forms that agree. No token is dropped and none is padded for.

M: tokens   D: width   F: hidden width   X: experts   K: experts per token

Signature of every form:

    x (M, D)   chosen (M, K): expert numbers   weight (M, K)   gate_up (X, 2 F, D)   down (X, D, F)  ->  y (M, D)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from models.ops.swiglu import reference as swiglu


def reference(x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The sum as it reads: every expert on every token, weighted by nought where it was not chosen."""
    y = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        share = (weight * (chosen == expert)).sum(1, keepdim=True).to(x.dtype)
        y = y + share * (swiglu(x @ gate_up[expert].t()) @ down[expert].t())
    return y


def by_expert(x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Tokens sorted by their expert; one product for each expert that was chosen at all."""
    # for gradients taken apart at once: that of a part taken by its number is as large as the whole
    up, back = (gate_up.unbind(), down.unbind()) if torch.is_grad_enabled() else (gate_up, down)

    def run(rows: Tensor, counts: Tensor) -> Tensor:
        parts = rows.split(_on_host(counts, len(rows)))
        return torch.cat([
            swiglu(part @ up[expert].t()) @ back[expert].t() if len(part) else part
            for expert, part in enumerate(parts)
        ])  # fmt: skip

    return _sorted(x, chosen, weight, gate_up.shape[0], run)


def grouped(x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `by_expert`, but all products in two grouped ones, with no synchronisation with the host."""
    width, hidden_width = x.shape[1], down.shape[2]
    # the grouped product exists for bfloat16 only, and a GPU wants rows in multiples of 16 bytes: of 8 numbers
    more, more_hidden = -width % 8, -hidden_width % 8
    up = _filled(gate_up.to(torch.bfloat16).unflatten(1, (2, hidden_width)), more, more_hidden).flatten(1, 2)
    back = _filled(down.to(torch.bfloat16), more_hidden, more)

    def run(rows: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        rows = _filled(rows.to(torch.bfloat16), more)
        hidden = swiglu(F.grouped_mm(rows, up.transpose(1, 2), offs=ends))
        return F.grouped_mm(hidden, back.transpose(1, 2), offs=ends)[:, :width].to(x.dtype)

    return _sorted(x, chosen, weight, gate_up.shape[0], run)


def _filled(x: Tensor, columns: int, rows: int = 0) -> Tensor:
    """With so many more of zeros; x itself where that is none, which `F.pad` would copy."""
    return F.pad(x, (0, columns, 0, rows)) if columns or rows else x


def by_device(x: Tensor, chosen: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`grouped` where a GPU computes in bfloat16 anyway, else `by_expert`."""
    if x.is_cuda and (x.dtype is torch.bfloat16 or torch.is_autocast_enabled("cuda")):
        return grouped(x, chosen, weight, gate_up, down)
    return by_expert(x, chosen, weight, gate_up, down)


def _sorted(x: Tensor, chosen: Tensor, weight: Tensor, experts: int, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`run` on the tokens in the order of their experts; then back, and the sum over each token's K."""
    (M, D), K = x.shape, chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)
    # all copies first, then their order: so each has a place of its own for its gradient, and these are summed after
    y = run(x[:, None].expand(M, K, D).reshape(M * K, D).index_select(0, order), load(chosen, experts))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(M * K, device=x.device))
    return (y.index_select(0, back).view(M, K, D) * weight[..., None].to(x.dtype)).sum(1)


def _on_host(counts: Tensor, rows: int) -> list[int]:
    """The numbers themselves; where tensors have shapes only, an even load of as many rows."""
    if counts.is_meta or is_fake(counts):
        X = len(counts)
        return [rows // X + (expert < rows % X) for expert in range(X)]
    return counts.tolist()


def load(chosen: Tensor, experts: int) -> Tensor:
    """How many assignments went to each expert (X)."""
    chosen = chosen.flatten()
    return chosen.new_zeros(experts).scatter_add_(0, chosen, torch.ones_like(chosen))
