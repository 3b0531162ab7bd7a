"""Cross-entropy of a linear head, without ever holding all logits.

M: rows (batch x time)   D: width   V: vocabulary

The fast form walks the rows in chunks and computes a chunk's gradient together with its loss, so at most
(CHUNK_BYTES / 4) logits exist at a time and nothing (M, V) is kept for the backward pass. A chunk fills a CPU's cache,
or a GPU's multiprocessors.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.precision import autocast_type

SoftmaxGradient = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}  # of float32 logits


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Mean over rows of -log softmax(hidden weight^T + bias)[target], in nats. hidden (M, D), weight (V, D), bias (V)
    or None."""
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


def softmax_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits (m, V), which may be overwritten, and targets (m): the sum of the losses in nats, in float32 at least;
    and its gradient, softmax minus one-hot, computed in it and no coarser than the logits."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    target = targets[:, None]
    loss = -log_p.gather(1, target).sum()
    return loss, log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=log_p.dtype))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None,
    softmax_gradient: SoftmaxGradient = softmax_gradient,
) -> Tensor:  # fmt: skip
    """As `reference`, in chunks. Under autocast the products run in the autocast type, the rest in float32.
    softmax_gradient: who does what lies between the products, with the signature of the one above."""
    if bias is not None:  # one more input that is always 1
        hidden = torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)
        weight = torch.cat([weight, bias[:, None]], 1)
    dtype = autocast_type(hidden.device) or hidden.dtype
    return _LinearCrossEntropy.apply(hidden, weight, targets, dtype, softmax_gradient, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, softmax_gradient: SoftmaxGradient,
        differentiates: bool,
    ) -> Tensor:  # fmt: skip
        M, V = hidden.shape[0], weight.shape[0]
        rows = max(1, CHUNK_BYTES["cuda" if hidden.is_cuda else "cpu"] // (4 * V))
        total = hidden.new_zeros((), dtype=torch.promote_types(dtype, torch.float32))
        wanted = differentiates and any(ctx.needs_input_grad[:2])  # which tells nothing of `torch.no_grad`
        h, w = hidden.to(dtype), weight.to(dtype)
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_weight = torch.zeros_like(weight) if wanted else None
        logits = h.new_empty(min(rows, M), V)  # one for all chunks: pages once touched stay cheap
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, M, rows):
                now = slice(start, min(start + rows, M))
                chunk = torch.mm(h[now], w.t(), out=logits[: now.stop - start])
                loss, d_logits = softmax_gradient(chunk, targets[now])  # the mean's 1 / M comes in `backward`
                total += loss
                if d_hidden is not None and d_weight is not None:
                    d_logits = d_logits.to(dtype)
                    d_hidden[now] = d_logits @ w
                    if d_weight.dtype == dtype:
                        d_weight.addmm_(d_logits.t(), h[now])
                    elif hidden.is_cuda:  # summed in d_weight's type, as the product has it before it is rounded
                        torch.addmm(d_weight, d_logits.t(), h[now], out_dtype=d_weight.dtype, out=d_weight)
                    else:
                        d_weight += d_logits.t() @ h[now]
        if d_hidden is not None and d_weight is not None:
            ctx.save_for_backward(d_hidden, d_weight)
        ctx.rows = M
        return total / M

    @staticmethod
    def backward(ctx, d_loss: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        scale = d_loss / ctx.rows
        return _scaled(d_hidden, scale), _scaled(d_weight, scale), None, None, None, None


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """gradient (M, D) times scale, in float32 and rounded once. A scale on a GPU that has no dimensions would itself be
    rounded to the gradient's type before."""
    return torch.mul(gradient, scale.view(1, 1), out=torch.empty_like(gradient))
