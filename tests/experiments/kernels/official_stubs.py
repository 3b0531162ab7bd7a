"""Stand-ins for mamba_ssm and causal_conv1d where there is no GPU: the signatures of the pinned versions, what they
insist on of layouts and types, and the mathematics as plain loops of their own."""

import math
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.cross_entropy import softmax_gradient
from models.ops.trapezoid import step

FLOAT32 = torch.float32


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    """x (B, E, T), weight (E, W), initial_states (B, E, W - 1)."""
    rows, E, _ = x.shape
    W = weight.shape[1]
    assert weight.shape == (E, W)
    assert 2 <= W <= 4
    assert bias.shape == (E,)
    assert weight.dtype == bias.dtype
    assert weight.dtype in (x.dtype, FLOAT32)
    channels_last = x.stride(1) == 1 and x.stride(2) > 1
    assert channels_last or x.stride(2) == 1
    if channels_last:
        assert E % 8 == x.stride(2) % 8 == x.stride(0) % 8 == x.storage_offset() % 8 == 0
    assert (seq_idx, return_final_states, final_states_out, activation) == (None, False, None, "silu")
    before = x.new_zeros(rows, E, W - 1)
    if initial_states is not None:
        assert channels_last
        assert initial_states.shape == before.shape
        assert initial_states.dtype == x.dtype
        assert initial_states.stride(1) == 1
        before = initial_states
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return F.silu(F.conv1d(torch.cat([before, x], 2), weight[:, None], bias, groups=E))


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    """x (B, E), conv_state (B, E, W), shifted in place."""
    assert conv_state.dtype == x.dtype
    assert weight.dtype == bias.dtype
    assert weight.dtype in (x.dtype, FLOAT32)
    assert conv_state.shape == (*x.shape, weight.shape[1])
    assert (activation, cache_seqlens, conv_state_indices) == ("silu", None, None)
    conv_state.copy_(torch.cat([conv_state[:, :, 1:], x[:, :, None]], 2))
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return F.silu(torch.einsum("bew,ew->be", conv_state, weight) + bias)


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """u, delta, z (B, E, T), A (E, N), B, C (B, N, T). The gradient of the last state is left out, as theirs is."""
    rows, E, T = u.shape
    assert delta.shape == u.shape
    assert A.shape[0] == E
    assert B.shape == C.shape == (rows, A.shape[1], T)
    assert A.dtype == D.dtype == delta_bias.dtype == FLOAT32
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert B.stride(-1) == C.stride(-1) == 1 or T == 1
    assert delta_softplus
    assert return_last_state
    dt = F.softplus(delta.float() + delta_bias[:, None])
    h, ys = torch.zeros(rows, E, A.shape[1]), []
    for t in range(T):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    y = torch.stack(ys, 2)
    return (y if z is None else y * F.silu(z.float())).to(u.dtype), h.detach()


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    """state (B, E, N) or (B, H, P, N), advanced in place; x, dt, z as it without N; B, C (B, N) or (B, G, N)."""
    assert dt_bias is not None, "its kernel unpacks the strides of a bias"
    assert dt_softplus
    assert state_batch_indices is None
    assert x.shape == dt.shape == state.shape[:-1]
    assert A.shape == state.shape[1:]
    assert D.shape == dt_bias.shape == x.shape[1:]
    if state.ndim == 4:
        groups = state.shape[1] // B.shape[1]
        B, C = (m.repeat_interleave(groups, 1)[:, :, None] for m in (B, C))
    else:
        B, C = B[:, None], C[:, None]
    step = F.softplus(dt.float() + dt_bias)
    h = torch.exp(step[..., None] * A) * state.float() + (step * x)[..., None] * B
    state.copy_(h)
    y = (h * C).sum(-1) + D * x
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """x (B, T, H, P), dt (B, T, H), A, D, dt_bias (H), B, C (B, T, G, N), states (B, H, P, N)."""
    rows, T, H, P = x.shape
    assert dt.shape == (rows, T, H)
    assert A.shape == D.shape == dt_bias.shape == (H,)
    assert B.shape == C.shape
    assert B.shape[:2] == (rows, T)
    assert x.dtype == B.dtype == C.dtype
    assert A.dtype == D.dtype == dt_bias.dtype == FLOAT32
    assert chunk_size & (chunk_size - 1) == 0
    assert (z, seq_idx, cu_seqlens, return_varlen_states) == (None, None, None, False)
    assert dt_softplus
    assert return_final_states
    assert dt_limit == (0.0, math.inf)
    B, C = (m.repeat_interleave(H // m.shape[2], 2) for m in (B, C))
    step = F.softplus(dt.float() + dt_bias)
    h = torch.zeros(rows, H, P, B.shape[-1]) if initial_states is None else initial_states.float()
    ys = []
    for t in range(T):
        written = torch.einsum("bhp,bhn->bhpn", step[:, t, :, None] * x[:, t], B[:, t].float())
        h = torch.exp(step[:, t] * A)[..., None, None] * h + written
        ys.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t].float()) + D[:, None] * x[:, t])
    return torch.stack(ys, 1).to(x.dtype), h


def inner(projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_weight, chunk, groups, eps):
    """projected (B, T, 2 E + 2 G N + H), conv_weight (E + 2 G N, W), out_weight (D, E). Ours, of their kernels."""
    (H,), (E,) = D.shape, norm_weight.shape
    GN = (conv_weight.shape[0] - E) // 2
    assert projected.shape[-1] == 2 * E + 2 * GN + H
    assert out_weight.dtype == projected.dtype
    z, xBC, dt = projected.split([E, E + 2 * GN, H], -1)
    xBC = causal_conv1d_fn(xBC.transpose(1, 2), conv_weight, conv_bias, activation="silu").transpose(1, 2)
    x, B, C = xBC.split([E, GN, GN], -1)
    B, C = (m.unflatten(-1, (groups, -1)) for m in (B, C))
    y, _ = mamba_chunk_scan_combined(
        x.unflatten(-1, (H, -1)), dt, A, B, C, chunk, D=D, dt_bias=dt_bias, dt_softplus=True, return_final_states=True
    )
    y = rmsnorm_fn(y.flatten(-2), norm_weight, None, z, eps, E // groups, norm_before_gate=False)
    return F.linear(y, out_weight)


def mamba3_siso_combined(
    Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D=None, Z=None, Input_States=None, chunk_size=64,
    return_final_states=False, cu_seqlens=None,
):  # fmt: skip
    """Q, K (B, T, G, N), V, Z (B, T, H, P), ADT, DT, Trap (B, H, T), Angles (B, T, H, S), biases (H, N)."""
    rows, T, G, N = Q.shape
    H, P, S = *V.shape[2:], Angles.shape[-1]
    assert K.shape == Q.shape
    assert V.shape[:2] == (rows, T)
    assert Z.shape == V.shape
    assert H % G == 0
    assert ADT.shape == DT.shape == Trap.shape == (rows, H, T)
    assert ADT.dtype == DT.dtype == Q_bias.dtype == K_bias.dtype == D.dtype == FLOAT32
    assert Q_bias.shape == K_bias.shape == (H, N)
    assert Angles.shape == (rows, T, H, S)
    assert N & (N - 1) == P & (P - 1) == 0, "powers of two"
    assert (cu_seqlens, return_final_states) == (None, True)
    for m in (Q, K, V, Z):  # a descriptor's rows, of what it is copied to where it does not count as contiguous
        assert m.contiguous().stride(1) * m.element_size() % 16 == 0
    Q, K = (m.repeat_interleave(H // G, 2) for m in (Q, K))
    theta, h, before_k, before_v = (
        (torch.zeros(rows, H, S), torch.zeros(rows, H, P, N), torch.zeros(rows, H, N), torch.zeros(rows, H, P))
        if Input_States is None
        else Input_States
    )
    assert theta.shape == (rows, H, S)
    assert h.shape == (rows, H, P, N)
    assert before_k.shape == (rows, H, N)
    assert before_v.shape == (rows, H, P)

    def turned(m: Tensor, angle: Tensor) -> Tensor:
        pairs = torch.view_as_complex(m[..., : 2 * S].float().unflatten(-1, (S, 2)).contiguous())
        whole = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
        return torch.cat([whole, m[..., 2 * S :].float()], -1)

    ys = []
    for t in range(T):
        dt, alpha, mix = DT[:, :, t, None, None], ADT[:, :, t, None, None].exp(), Trap[:, :, t, None, None].sigmoid()
        theta = theta + math.pi * torch.tanh(Angles[:, t].float()) * DT[:, :, t, None]
        k, q, v = turned(K[:, t] + K_bias, theta), turned(Q[:, t] + Q_bias, theta), V[:, t].float()
        old = before_v.float()[..., None] * before_k.float()[:, :, None]
        h = alpha * h + (1 - mix) * dt * alpha * old + mix * dt * v[..., None] * k[:, :, None]
        ys.append(((h * q[:, :, None]).sum(-1) + D[:, None] * v) * F.silu(Z[:, t].float()))
        before_k, before_v = k, v
    return torch.stack(ys, 1).to(V.dtype), theta, h, before_k, before_v


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    """x, z (..., E), weight (E)."""
    assert x.shape == z.shape
    assert x.dtype == z.dtype
    assert weight.shape == x.shape[-1:]
    assert (bias, norm_before_gate) == (None, False)
    y = (x.float() * F.silu(z.float())).unflatten(-1, (-1, group_size))
    return ((y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight).to(x.dtype)


def of_sum(x, branch, weight, eps, dtype, own):
    """x, branch (..., D) or None, weight (D). Ours, which writes over what it may: here no sum and no norm."""
    assert branch is None or x.shape == branch.shape
    assert weight.shape == x.shape[-1:]
    total = x if branch is None else x + branch
    wide = total.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)
    if branch is not None and not torch.is_grad_enabled():
        branch.fill_(math.nan)
        if own:
            x.fill_(math.nan)
    return total, normed


def modules() -> dict[str, ModuleType]:
    """By the names under which `models.ops.kernels.cuda_form` imports them."""
    scan = "mamba_ssm.ops.selective_scan_interface"
    triton = "mamba_ssm.ops.triton"
    holds = {
        "causal_conv1d": (causal_conv1d_fn, causal_conv1d_update), "causal_conv1d.cpp_functions": (),
        "mamba_ssm": (), "mamba_ssm.ops": (), triton: (),
        scan: (selective_scan_fn,), f"{triton}.selective_state_update": (selective_state_update,),
        f"{triton}.ssd_combined": (mamba_chunk_scan_combined,),
        f"{triton}.layernorm_gated": (rmsnorm_fn,),
        f"{triton}.mamba3": (),
        f"{triton}.mamba3.mamba3_siso_combined": (mamba3_siso_combined,),
        # ours, where there is no triton
        "models.ops.kernels.cuda_mamba2": (inner,),
        "models.ops.kernels.triton_cross_entropy": (softmax_gradient,), "models.ops.kernels.triton_trapezoid": (step,),
        "models.ops.kernels.triton_norm": (of_sum,),
    }  # fmt: skip
    found = {}
    for name, functions in holds.items():
        found[name] = ModuleType(name)
        for function in functions:
            setattr(found[name], function.__name__, function)
    return found
