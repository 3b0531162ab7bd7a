"""Maps of one input taken together and apart: the same outputs and gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.projections import apart, time_innermost, together


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=2), D=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99),
)  # fmt: skip
def test_apart_is_together(shape: list[int], D: int, sizes: list[int], seed: int):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, D, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(sum(sizes), D, generator=g, dtype=torch.float64, requires_grad=True)
    found = []
    for form in (apart, together):
        parts = form(x, weight, sizes)
        assert [part.shape for part in parts] == [(*shape, size) for size in sizes]
        loss = sum((part.sin() * (i + 1)).sum() for i, part in enumerate(parts))
        found.append((*(part.detach() for part in parts), *torch.autograd.grad(loss, (x, weight))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    B=st.integers(1, 4), T=st.integers(1, 6), D=st.integers(1, 9),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99),
)  # fmt: skip
def test_time_innermost_is_together_and_needs_no_copy(B: int, T: int, D: int, sizes: list[int], seed: int):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, D, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(sum(sizes), D, generator=g, dtype=torch.float64, requires_grad=True)
    out = [torch.randn(D, size, generator=g, dtype=torch.float64) for size in sizes]
    found, kept = [], []
    for form in (time_innermost, together):
        parts = form(x, weight, sizes)
        assert [part.shape for part in parts] == [(B, T, size) for size in sizes]
        for part in parts:
            if form is time_innermost:  # as (size, B, T) it is one block of memory, and so is its gradient
                assert part.permute(2, 0, 1).is_contiguous()
                part.register_hook(lambda gradient: kept.append(gradient.permute(2, 0, 1).is_contiguous()))
        y = sum(torch.nn.functional.linear(part, w) for part, w in zip(parts, out, strict=True)).sin().sum()
        found.append((*(part.detach() for part in parts), *torch.autograd.grad(y, (x, weight))))
    assert len(kept) == len(sizes)
    assert all(kept)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_apart_gives_each_a_matrix_of_its_own():
    parts = apart(torch.randn(2, 3, 4), torch.randn(9, 4), (2, 7))
    assert all(part.is_contiguous() for part in parts)
