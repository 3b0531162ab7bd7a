"""The compiled decode steps of Mamba, Mamba-2 and Mamba-3 against the operations they are made of."""

import pytest
import torch
import torch.nn.functional as F

from models.ops import causal_conv1d, rms_norm, selective_scan, ssd, trapezoid
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


step2 = load("numba").mamba2_step
H, P, N2 = 6, 7, 5


def draw2(dtype, G):
    g, E = torch.Generator().manual_seed(5), H * P
    channels = E + 2 * G * N2
    shapes = [
        (B, E + channels + H), (channels, W), (channels,), (H,), (H,), (H,), (E,), (B, channels, W), (B, H, P, N2)
    ]  # fmt: skip
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def composed2(projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, conv, state, negative, eps, groups):
    E, channels = H * P, len(conv_bias)
    z, xBC, dt = projected.split([E, channels, H], -1)
    GN = (channels - E) // 2
    x, b, c = causal_conv1d.step_reference(xBC, conv_weight, conv_bias, conv).split([E, GN, GN], -1)
    x, (b, c) = x.unflatten(-1, (H, P)), (m.unflatten(-1, (-1, N2)) for m in (b, c))
    y = ssd.step_reference(x, dt, -A_log.exp(), b, c, D, dt_bias, state, negative)
    return rms_norm.gated(y.flatten(-2), z, norm_weight, eps, groups)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(("G", "norm_groups"), [(1, 1), (3, 3), (2, 1)])
def test_of_mamba2_is_its_operations_one_after_the_other(dtype, negative, G, norm_groups):
    given, exact = draw2(dtype, G), [x.double() for x in draw2(dtype, G)]
    for _ in range(3):  # through the state
        actual, expected = (f(*all_, negative, 0.01, norm_groups) for f, all_ in ((step2, given), (composed2, exact)))
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(
            actual.double(), expected, rtol=10 * tolerance, atol=tolerance * expected.abs().max().item()
        )
        assert torch.equal(given[7].double(), exact[7])
        torch.testing.assert_close(given[8].double(), exact[8], rtol=10 * tolerance, atol=10 * tolerance)


step3 = load("numba").mamba3_step
H3, P3, N3, S3 = 4, 5, 8, 3


def draw3(dtype, G):
    g, E, GN = torch.Generator().manual_seed(6), H3 * P3, G * N3
    shapes = [
        (B, 2 * E + 2 * GN + 3 * H3 + S3), (N3,), (N3,), (H3, 1, N3), (H3, 1, N3), (H3,), (H3,), (B, H3, S3),
        (B, H3, P3, N3), (B, 1, H3, N3), (B, H3, P3),
    ]  # fmt: skip
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def composed3(projected, B_norm, C_norm, B_bias, C_bias, dt_bias, D, *state_and_constants):
    *state, eps, floor = state_and_constants
    E, GN = H3 * P3, (projected.shape[1] - 2 * H3 * P3 - 3 * H3 - S3) // 2
    z, x, b, c, dt, a, trap, angle = projected.split([E, E, GN, GN, H3, H3, H3, S3], -1)
    b, c = (rms_norm.reference(m.unflatten(-1, (1, -1, N3)), w, eps) for m, w in ((b, B_norm), (c, C_norm)))
    x, z = (m.unflatten(-1, (H3, P3)) for m in (x, z))
    biases = B_bias.transpose(0, 1), C_bias.transpose(0, 1)
    y, after = trapezoid.step(x, dt, a, trap, angle, b, c, z, D, dt_bias, *biases, floor, trapezoid.State(*state))
    for buffer, new in zip(state, after, strict=True):
        buffer.copy_(new)
    return y.flatten(-2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("G", [1, 2, 4])
def test_of_mamba3_is_its_operations_one_after_the_other(dtype, G):
    given, exact = draw3(dtype, G), [x.double() for x in draw3(dtype, G)]
    for _ in range(3):  # through the state; the floor is reached by some rates
        actual, expected = (f(*all_, 0.01, 0.7) for f, all_ in ((step3, given), (composed3, exact)))
        tolerance = 2 * TOLERANCE[dtype]
        for found, exact_one in ((actual, expected), *zip(given[7:], exact[7:], strict=True)):
            error = (found.double() - exact_one).abs().max()
            assert error <= tolerance * exact_one.abs().max().clamp_min(1)


OTHERS = {"mamba2": (step2, draw2, (False, 1e-5, 1)), "mamba3": (step3, draw3, (1e-5, 1e-4))}
STATE = 8  # of the inputs of each of them
EACH_INPUT = [
    (name, which) for name, (_, draw_of, _) in OTHERS.items() for which in range(len(draw_of(torch.float32, 1)))
]


@pytest.mark.parametrize(("name", "which"), EACH_INPUT)
def test_the_others_refuse_gradients_and_what_they_would_misread(name, which):
    run, draw_of, constants = OTHERS[name]
    given = draw_of(torch.float32, 1)
    before = given[STATE].clone()
    given[which].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        run(*given, *constants)
    assert torch.equal(given[STATE], before)
    for spoil in (torch.Tensor.double, torch.Tensor.bfloat16, lambda x: x.repeat_interleave(2, -1)[..., ::2]):
        given = draw_of(torch.float32, 1)
        given[which] = spoil(given[which])
        with pytest.raises(ValueError, match="contiguous tensors, all float32 or all float64"):
            run(*given, *constants)


@pytest.mark.parametrize("name", OTHERS)
def test_the_others_refuse_a_state_of_another_batch(name):
    run, draw_of, constants = OTHERS[name]
    given = draw_of(torch.float32, 1)
    with pytest.raises(ValueError, match="the state is of 3 sequences"):
        run(given[0][:1].contiguous(), *given[1:], *constants)
