"""The compiled decode step of Mamba against the operations it is made of."""

import pytest
import torch
import torch.nn.functional as F

from models.ops import causal_conv1d, selective_scan
from models.ops.kernels import load

step = load("numba").mamba_step
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
B, E, N, R, W = 3, 70, 5, 6, 4


def draw(dtype):
    g = torch.Generator().manual_seed(4)
    shapes = [(B, 2 * E), (E, W), (E,), (R + 2 * N, E), (E, R), (E,), (E, N), (E,), (B, E, W), (B, E, N)]
    scales = [1, 0.5, 0.5, 0.2, 0.4, 1, 1, 1, 1, 1]
    return [
        (torch.randn(s, generator=g, dtype=torch.float64) * k).to(dtype) for s, k in zip(shapes, scales, strict=True)
    ]


def composed(uz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, conv, state, negative):
    u, z = uz.chunk(2, -1)
    u = causal_conv1d.step_reference(u, conv_weight, conv_bias, conv)
    dt, b, c = F.linear(u, x_proj).split([R, N, N], -1)
    dt = F.linear(dt, dt_proj)
    return selective_scan.step_reference(u, dt, -A_log.exp(), b, c, D, z, dt_bias, state, negative)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("negative", [False, True])
def test_is_its_operations_one_after_the_other(dtype, negative):
    given, exact = draw(dtype), [x.double() for x in draw(dtype)]
    for _ in range(3):  # through the state
        actual, expected = step(*given, negative), composed(*exact, negative)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(
            actual.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
        )
        assert torch.equal(given[8].double(), exact[8])
        torch.testing.assert_close(given[9].double(), exact[9], rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("which", range(10))
def test_refuses_to_be_differentiated(which):
    given = draw(torch.float32)
    before = given[9].clone()
    given[which].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        step(*given, False)
    assert torch.equal(given[9], before)
    with torch.no_grad():
        step(*given, False)
    assert not torch.equal(given[9], before)


@pytest.mark.parametrize("which", range(10))
def test_refuses_what_it_would_misread(which):
    for spoil in (torch.Tensor.double, torch.Tensor.bfloat16, lambda x: x.repeat_interleave(2, -1)[..., ::2]):
        given = draw(torch.float32)
        given[which] = spoil(given[which])
        with pytest.raises(ValueError, match="contiguous tensors, all float32 or all float64"):
            step(*given, False)
