"""silu(gate) up on a CPU, one pass forward and one backward, compiled by numba.

M: rows   F: hidden width. A task is `ROWS` rows.
"""

import torch
from torch import Tensor

from models.ops.kernels.numba_runtime import addresses, at, compiled, run_tasks, sigmoid

ROWS = 16


@compiled
def _forward(kind, gate_up_at, out_at, M, F, first, last):
    gate_up, out = at(gate_up_at, kind, (M, 2, F)), at(out_at, kind, (M, F))
    for row in range(first * ROWS, min(last * ROWS, M)):
        for f in range(F):
            gate = gate_up[row, 0, f]
            out[row, f] = gate * sigmoid(gate) * gate_up[row, 1, f]


@compiled
def _backward(kind, gate_up_at, d_out_at, d_gate_up_at, M, F, first, last):
    gate_up, d_out = at(gate_up_at, kind, (M, 2, F)), at(d_out_at, kind, (M, F))
    d_gate_up = at(d_gate_up_at, kind, (M, 2, F))
    one = gate_up.dtype.type(1)
    for row in range(first * ROWS, min(last * ROWS, M)):
        for f in range(F):
            gate = gate_up[row, 0, f]
            s = sigmoid(gate)
            d = d_out[row, f] * s
            # silu' = s (1 + gate (1 - s))
            d_gate_up[row, 0, f] = d * gate_up[row, 1, f] * (one + gate * (one - s))
            d_gate_up[row, 1, f] = d * gate


def _shape(gate_up: Tensor) -> tuple[int, int, int]:
    """M, F and the number of tasks."""
    width = gate_up.shape[-1]
    M = gate_up.numel() // width
    return M, width // 2, -(-M // ROWS)


def _gate(gate_up: Tensor) -> Tensor:
    M, F, tasks = _shape(gate_up)
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(*gate_up.shape[:-1], F)
    run_tasks(_forward, tasks, *addresses(gate_up, out), M, F, work=gate_up.numel())
    return out


_gated = torch.library.custom_op("lab::swiglu_cpu", _gate, mutates_args=(), device_types="cpu")


@_gated.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("lab::swiglu_cpu_backward", mutates_args=(), device_types="cpu")
def _gated_backward(gate_up: Tensor, d_out: Tensor) -> Tensor:
    M, F, tasks = _shape(gate_up)
    gate_up, d_out = gate_up.contiguous(), d_out.contiguous()
    d_gate_up = torch.empty_like(gate_up)
    run_tasks(_backward, tasks, *addresses(gate_up, d_out, d_gate_up), M, F, work=gate_up.numel())
    return d_gate_up


@_gated_backward.register_fake
def _(gate_up, d_out):
    return gate_up.new_empty(gate_up.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, d_out):
    return _gated_backward(*ctx.saved_tensors, d_out)


_gated.register_autograd(_differentiate, setup_context=_save)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `models.ops.swiglu.reference`, in float32 or float64."""
    if not torch.is_grad_enabled() and gate_up.is_cpu:
        return _gate(gate_up)  # as for the norm: the operator's dispatch would cost more than a decode step's work
    return _gated(gate_up)
