"""The fused attention against the definition; rotary positions against their mathematics."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from models.language_model import LanguageModel
from models.ops import attention
from models.ops.attention import _banded, forget_tables, reference, rotary_qkv, rotary_table, rotate, sdpa
from models.ops.kernels import load
from models.presets import preset


def draw(B, H, K, T, S, P, dtype=torch.float64):
    g = torch.Generator().manual_seed(T * 100 + S)
    return [
        torch.randn(B, heads, n, P, generator=g, dtype=torch.float64).to(dtype) for heads, n in ((H, T), (K, S), (K, S))
    ]


def by_hand(q, k, v, causal=True, window=None):
    out = torch.empty_like(q)
    B, H, T, P = q.shape
    S, share = k.shape[2], H // k.shape[1]
    for b in range(B):
        for h in range(H):
            for t in range(T):
                end = S - T + t + 1 if causal else S
                seen = slice(max(0, end - window) if window and causal else 0, end)
                weights = (k[b, h // share, seen] @ q[b, h, t] / math.sqrt(P)).softmax(0)
                out[b, h, t] = weights @ v[b, h // share, seen]
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


# windows that are walked in blocks (T > 2 W), that are a mask, that hide nothing; queries that continue a cache
MASKS = [{"window": 1}, {"window": 3}, {"window": 8}, {"window": 40}, {"window": 100}, {"causal": False}]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 2, 65, 65, 4), (1, 2, 1, 25, 27, 6)], ids=str)
@pytest.mark.parametrize("form", [reference, sdpa])
def test_is_the_definition_behind_every_mask(form, shape, mask):
    q, k, v = draw(*shape)
    torch.testing.assert_close(form(q, k, v, **mask), by_hand(q, k, v, **mask), rtol=1e-12, atol=1e-12)


@given(data=st.data(), share=st.integers(1, 3), K=st.integers(1, 2), T=st.integers(1, 40), W=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_blocks_of_a_window_are_the_mask(data, share, K, T, W):
    behind = data.draw(st.integers(0, 30))
    q, k, v = draw(2, share * K, K, T, T + behind, 2)
    expected = reference(q, k, v, window=W)
    torch.testing.assert_close(_banded(q, k, v, W), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sdpa(q, k, v, window=W), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", [reference, sdpa])
@pytest.mark.parametrize("T", [5, 30])
def test_what_a_window_hides_is_nothing_at_all(form, T):
    """Not a very small weight: huge values and infinities outside leave no trace."""
    q, k, v = draw(1, 2, 2, T, T, 4)
    expected = form(q, k, v, window=4)
    k[:, :, : T - 4] *= 1e6
    v[:, :, : T - 4] = 1e300
    assert torch.equal(form(q, k, v, window=4)[:, :, -1], expected[:, :, -1])


def test_one_query_needs_no_mask(monkeypatch):
    """With one torch takes slower kernels, on a GPU others altogether."""
    masks, fused = [], F.scaled_dot_product_attention

    def attention(q, k, v, *, attn_mask, **how):
        masks.append(attn_mask)
        return fused(q, k, v, attn_mask=attn_mask, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for S, window in ((1, 4), (4, 4), (9, 4), (9, None)):
        q, k, v = draw(2, 4, 2, 1, S, 8)
        expected = reference(q, k, v, window=window)
        torch.testing.assert_close(sdpa(q, k, v, window=window), expected, rtol=1e-12, atol=1e-12)
    assert masks == [None] * 4


def test_blocks_of_a_window_never_hold_the_whole_matrix():
    T, W = 512, 16
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, one.numel() if isinstance(one, torch.Tensor) else 0)
            return out

    with Watch():
        sdpa(*draw(1, 1, 1, T, T, 2), window=W)
    assert largest <= (T + W) * 2 * W


@pytest.mark.parametrize("mask", [{}, *MASKS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_the_fused_form(shape, dtype, mask):
    gradients = []
    for form, kind in ((sdpa, dtype), (reference, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in draw(*shape, dtype=dtype)]
        y = form(*leaves, **mask)
        (
            y * torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(kind)
        ).sum().backward()
        gradients.append([x.grad.double() for x in leaves])
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mask", [{}, {"window": 2}, {"causal": False}], ids=str)
def test_gradients_of_the_reference_are_those_of_finite_differences(mask):
    leaves = [x.requires_grad_() for x in draw(1, 2, 1, 3, 5, 2)]
    assert torch.autograd.gradcheck(lambda *qkv: reference(*qkv, **mask), leaves)


def compiled_rotation(x, rotated, start, base):
    """By the pass that also takes queries, keys and values apart; put together again."""
    q, k, v = load("numba").rotary_qkv(x, x.shape[2] - rotated, start, base)
    assert k.shape == v.shape
    return torch.cat([q, k, v], 1).transpose(1, 2)


ROTATIONS = {"reference": rotate, "numba": compiled_rotation}
each_rotation = pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)


@each_rotation
@given(start=st.integers(0, 3000), half=st.integers(1, 16), T=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_rotation_preserves_norms_and_passes_the_other_heads_through(rotation, start, half, T):
    x = torch.randn(2, T, 4, 2 * half, dtype=torch.float64, generator=torch.Generator().manual_seed(start))
    y = rotation(x, 3, start, 10000.0)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    pairs = [torch.hypot(*z.chunk(2, -1)) for z in (x, y)]  # entry i with i + P/2
    torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-12)
    assert torch.equal(y[:, :, 3], x[:, :, 3])


@each_rotation
@given(a=st.integers(0, 1000), b=st.integers(0, 1000), shift=st.integers(0, 3000), base=st.floats(1.5, 1e6))
@settings(max_examples=40, deadline=None)
def test_scores_depend_on_the_distance_only(rotation, a, b, shift, base):
    g = torch.Generator().manual_seed(a)
    q, k = torch.randn(2, 1, 1, 1, 12, dtype=torch.float64, generator=g)
    here = (rotation(q, 1, a, base) * rotation(k, 1, b, base)).sum()
    there = (rotation(q, 1, a + shift, base) * rotation(k, 1, b + shift, base)).sum()
    assert here.item() == pytest.approx(there.item(), abs=1e-5)


@each_rotation
def test_rotation_by_hand(rotation):
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 8, 1, 4)
    y = rotation(x, 1, 5, 100.0)[0, :, 0]
    for t in range(8):
        slow, fast = (5 + t) * 100 ** (-2 / 4), 5 + t
        expected = [
            math.cos(fast) - 3 * math.sin(fast), 2 * math.cos(slow) - 4 * math.sin(slow),
            3 * math.cos(fast) + math.sin(fast), 4 * math.cos(slow) + 2 * math.sin(slow),
        ]  # fmt: skip
        assert y[t].tolist() == pytest.approx(expected, abs=1e-5)


@each_rotation
def test_position_zero_is_left_alone_and_pieces_equal_the_whole(rotation):
    x = torch.randn(1, 20, 2, 8, generator=torch.Generator().manual_seed(0))
    whole = rotation(x, 2, 0, 10000.0)
    assert torch.equal(whole[:, 0], x[:, 0])
    parts = [rotation(x[:, :7], 2, 0, 10000.0), rotation(x[:, 7:], 2, 7, 10000.0)]
    assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 37, 6, 10), (2, 70, 40, 24)], ids=str)  # the last on threads
def test_the_compiled_rotation_agrees_with_the_reference(dtype, tolerance, shape):
    heads = (shape[2] + 1) // 2
    found = []
    for rotation, kind in ((ROTATIONS["numba"], dtype), (rotate, torch.float64)):
        g = torch.Generator().manual_seed(1)
        x = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(kind).requires_grad_()
        y = rotation(x, heads, 11, 500.0)
        (y * torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)).sum().backward()
        found.append((y.detach().double(), x.grad.double()))
        with torch.no_grad():
            assert torch.equal(rotation(x, heads, 11, 500.0), y)
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("H", "K", "length"), [(1, 1, 0), (4, 2, 7), (6, 1, 40), (4, 4, 1500)])
def test_the_compiled_step_is_the_last_row_of_the_whole(dtype, tolerance, H, K, length):
    P, base = 8, 300.0
    qkv = torch.randn(2, length + 1, H + 2 * K, P, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q, k, v = rotary_qkv(qkv, K, 0, base)
    keys, values = (torch.zeros(2, K, length + 3, P, dtype=dtype) for _ in range(2))
    keys[:, :, :length], values[:, :, :length] = k[:, :, :length], v[:, :, :length]
    now = qkv[:, -1].to(dtype).contiguous()
    y = load("numba").attention_step(now, base, keys, values, length, length, length + 1)
    torch.testing.assert_close(
        y.double().view(2, H, P), reference(q, k, v)[:, :, -1], rtol=10 * tolerance, atol=10 * tolerance
    )
    for cache, whole in ((keys, k), (values, v)):
        torch.testing.assert_close(cache[:, :, : length + 1].double(), whole, rtol=tolerance, atol=tolerance)
        assert not cache[:, :, length + 1 :].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("length", [0, 3, 4, 5, 17])
def test_the_compiled_step_writes_into_a_ring(dtype, tolerance, length):
    """A window of 5 in 5 slots: position t stands in slot t % 5, and what it overwrites is out of sight."""
    B, H, K, P, W, base = 2, 4, 2, 6, 5, 300.0
    qkv = torch.randn(B, length + 1, H + 2 * K, P, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    q, k, v = rotary_qkv(qkv, K, 0, base)
    keys, values = (torch.zeros(B, K, W, P, dtype=dtype) for _ in range(2))
    for t in range(length):
        keys[:, :, t % W], values[:, :, t % W] = k[:, :, t].to(dtype), v[:, :, t].to(dtype)
    now = qkv[:, -1].to(dtype).contiguous()
    y = load("numba").attention_step(now, base, keys, values, length, length % W, min(length + 1, W))
    expected = reference(q[:, :, -1:], k, v, window=W)[:, :, 0]
    torch.testing.assert_close(y.double().view(B, H, P), expected, rtol=10 * tolerance, atol=10 * tolerance)
    for cache, whole in ((keys, k), (values, v)):
        for t in range(max(0, length - W + 1), length + 1):
            torch.testing.assert_close(cache[:, :, t % W].double(), whole[:, :, t], rtol=tolerance, atol=tolerance)


def test_the_compiled_step_with_scores_far_beyond_the_range_of_exp():
    P, length = 8, 50
    g = torch.Generator().manual_seed(3)
    qkv = torch.randn(1, 3, P, generator=g) * 40
    keys, values = torch.randn(2, 1, 1, length + 1, P, generator=g) * 40
    y = load("numba").attention_step(qkv, 300.0, keys, values, length, length, length + 1)
    q = rotate(qkv.double()[None], 1, length, 300.0)[0, :, :1, None]
    scores = (q @ keys.double().mT / math.sqrt(P)).squeeze()
    assert scores.max() - scores[0] > 1000  # in float32 its exponential is infinite
    torch.testing.assert_close(y.double().view(P), scores.softmax(0) @ values.double()[0, 0], rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_a_compiled_step_on_two_threads_is_that_on_one(monkeypatch):
    from models.ops.kernels import numba_step

    g = torch.Generator().manual_seed(0)
    qkv, keys, values = (torch.randn(*shape, generator=g) for shape in ((2, 12, 8), (2, 4, 50, 8), (2, 4, 50, 8)))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        made = []
        for per_thread in (1, 1 << 30):
            monkeypatch.setattr(numba_step, "WORK_PER_THREAD", per_thread)
            made.append(numba_step.attention_step(qkv, 1e4, keys.clone(), values.clone(), 40, 40, 41))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)
    assert made[0].abs().min() > 0


def test_one_query_on_a_gpu_is_no_matter_for_cudnn(monkeypatch):
    """Its plan is of one number of keys, which no other token has."""
    asked = []

    def attend(q, k, v, **_):
        asked.append((q.shape[2], torch.backends.cuda.cudnn_sdp_enabled()))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with FakeTensorMode():
        for T in (1, 4):
            q, k = (torch.empty(1, 2, length, 8, device="cuda") for length in (T, 4))
            sdpa(q, k, k)
    assert asked == [(1, False), (4, before)]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_a_gpu_is_given_the_mask_of_a_window_with_an_axis_for_heads(monkeypatch):
    """cuDNN, which torch prefers on Hopper, expands a mask of two or three axes to one head for all."""
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: seen.append((q, attn_mask)) or q)
    q, k, v = (torch.empty(2, 3, 40, 8, device="meta") for _ in range(3))
    assert sdpa(q, k, v, window=8).shape == q.shape
    ((blocks, mask),) = seen
    assert mask.expand(len(blocks), mask.shape[1], 8, 16).shape == (*blocks.shape[:3], 16)


@pytest.mark.parametrize("backend", ["sdpa", "numba"])
def test_a_step_finds_its_rotary_tables_made(backend: str, monkeypatch: pytest.MonkeyPatch):
    made, make = [], attention._rotary_table
    monkeypatch.setattr(
        attention, "_rotary_table", lambda positions, *rest: made.append(positions) or make(positions, *rest)
    )
    forget_tables()
    model = LanguageModel(preset("transformer-tiny").with_backend(backend), seed=0).eval()
    with torch.inference_mode():
        _, state = model.prefill(torch.zeros(1, 16).long(), model.make_state(1, 20))
        for _ in range(4):
            _, state = model.step(torch.zeros(1).long(), state)
    assert made == [20]


def test_one_rotary_table_is_kept():
    """In place of shorter ones; others' widths and bases have their own."""
    forget_tables()
    cpu = torch.device("cpu")
    short = rotary_table(10, 8, 100.0, cpu)
    long = rotary_table(24, 8, 100.0, cpu)
    assert rotary_table(10, 8, 100.0, cpu) is long
    assert len(rotary_table(3, 8, 50.0, cpu)[0]) == 3
    for kept, gone in zip(long, short, strict=True):
        assert kept.shape == (24, 4)
        assert torch.equal(kept[:10], gone)
    angle = 23 * 100.0 ** (-2 * 3 / 8)
    assert (long[0][23, 3].item(), long[1][23, 3].item()) == pytest.approx((math.cos(angle), math.sin(angle)), rel=1e-6)
