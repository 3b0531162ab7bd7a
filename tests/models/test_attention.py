"""The fused attention against the definition; rotary positions against their mathematics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.attention import reference, rotate, sdpa


def draw(B, H, K, T, S, P, dtype=torch.float64):
    g = torch.Generator().manual_seed(T * 100 + S)
    return [
        torch.randn(B, heads, n, P, generator=g, dtype=torch.float64).to(dtype) for heads, n in ((H, T), (K, S), (K, S))
    ]


def by_hand(q, k, v):
    out = torch.empty_like(q)
    B, H, T, P = q.shape
    S, share = k.shape[2], H // k.shape[1]
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = S - T + t + 1
                weights = (k[b, h // share, :seen] @ q[b, h, t] / math.sqrt(P)).softmax(0)
                out[b, h, t] = weights @ v[b, h // share, :seen]
    return out


SHAPES = [
    (2, 4, 4, 7, 7, 6),
    (1, 4, 2, 5, 9, 8),
    (2, 6, 1, 1, 4, 4),
    (1, 2, 2, 1, 1, 2),
    (1, 3, 3, 33, 70, 16),
    (2, 4, 2, 2, 3, 4),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", [reference, sdpa])
def test_is_the_definition(form, shape):
    q, k, v = draw(*shape)
    torch.testing.assert_close(form(q, k, v), by_hand(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_the_fused_form(shape, dtype):
    gradients = []
    for form, kind in ((sdpa, dtype), (reference, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in draw(*shape, dtype=dtype)]
        (form(*leaves) * torch.linspace(-1, 2, shape[5], dtype=kind)).sum().backward()
        gradients.append([x.grad.double() for x in leaves])
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@given(start=st.integers(0, 3000), half=st.integers(1, 16), T=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_rotation_preserves_norms(start, half, T):
    x = torch.randn(2, T, 3, 2 * half, dtype=torch.float64, generator=torch.Generator().manual_seed(start))
    y = rotate(x, start, 10000.0)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    pairs = [torch.hypot(*z.chunk(2, -1)) for z in (x, y)]  # entry i with i + P/2
    torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-12)


@given(a=st.integers(0, 1000), b=st.integers(0, 1000), shift=st.integers(0, 3000), base=st.floats(1.5, 1e6))
@settings(max_examples=40, deadline=None)
def test_scores_depend_on_the_distance_only(a, b, shift, base):
    g = torch.Generator().manual_seed(a)
    q, k = torch.randn(2, 1, 1, 1, 12, dtype=torch.float64, generator=g)
    here = (rotate(q, a, base) * rotate(k, b, base)).sum()
    there = (rotate(q, a + shift, base) * rotate(k, b + shift, base)).sum()
    assert here.item() == pytest.approx(there.item(), abs=1e-5)


def test_rotation_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 8, 1, 4)
    y = rotate(x, 5, 100.0)[0, :, 0]
    for t in range(8):
        slow, fast = (5 + t) * 100 ** (-2 / 4), 5 + t
        expected = [
            math.cos(fast) - 3 * math.sin(fast), 2 * math.cos(slow) - 4 * math.sin(slow),
            3 * math.cos(fast) + math.sin(fast), 4 * math.cos(slow) + 2 * math.sin(slow),
        ]  # fmt: skip
        assert y[t].tolist() == pytest.approx(expected, abs=1e-5)


def test_position_zero_is_left_alone_and_pieces_equal_the_whole():
    x = torch.randn(1, 20, 2, 8, generator=torch.Generator().manual_seed(0))
    whole = rotate(x, 0, 10000.0)
    assert torch.equal(whole[:, 0], x[:, 0])
    assert torch.equal(torch.cat([rotate(x[:, :7], 0, 10000.0), rotate(x[:, 7:], 7, 10000.0)], 1), whole)
