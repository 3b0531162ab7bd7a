"""One query over the slots of a cache: torch's form and, in Triton's interpreter, the kernel that splits the keys,
against the definition in float64.

B: batch   S: slots   H: heads   K: key-value heads   P: head width
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_interpreter import interpreted

from models.config import ModelConfig
from models.language_model import LanguageModel
from models.mixers import attention as mixer
from models.mixers.attention import AttentionConfig
from models.ops import kernels
from models.ops.attention import of_slots, place_token, reference, rotary_table
from models.recorded import RecordedDecode, RepeatableStep
from models.state import KVCache, Place

# of the largest entry; bfloat16 has 8 bits of significand
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}
PROCESSORS = 5
UNSEEN = 1e9  # what stands in a slot that is not filled

Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def kernel() -> Iterator[ModuleType]:
    yield from interpreted("decode", PROCESSORS)


def draw(B: int, H: int, K: int, S: int, P: int, filled: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(S * 1000 + filled)
    q, k, v = (
        torch.randn(B, heads, n, P, generator=g, dtype=torch.float64).to(dtype) for heads, n in ((H, 1), (K, S), (K, S))
    )
    k[:, :, filled:] = v[:, :, filled:] = UNSEEN
    return [q, k, v]


def agrees(form: Form, q: Tensor, k: Tensor, v: Tensor, filled: int) -> None:
    y = form(q, k, v, torch.tensor(filled, device=q.device))
    expected = reference(q.double(), k[:, :, :filled].double(), v[:, :, :filled].double())
    assert y.dtype == q.dtype
    assert y.shape == q.shape
    worst = (y.double() - expected).abs().max() / expected.abs().max()
    assert worst < TOLERANCE[q.dtype], (worst, q.shape, k.shape, filled)


@st.composite
def shapes(draw, widths: list[int], most: int) -> tuple[int, int, int, int, int, int]:
    """B, H, K, S, P and how many slots are filled."""
    B, K, share, S = (draw(st.integers(1, largest)) for largest in (2, 3, 5, most))
    return B, share * K, K, S, draw(st.sampled_from(widths)), draw(st.integers(1, S))


@given(shape=shapes([1, 6, 64], 50), dtype=st.sampled_from(list(TOLERANCE)))
@settings(max_examples=60, deadline=None)
def test_the_form_of_torch_is_the_definition(shape, dtype):
    q, k, v = draw(*shape, dtype)
    seen = slice(shape[-1])
    # the bound is relative to the largest output: where the values cancel in all, one or two numbers, it says nothing
    largest = reference(*(m.double() for m in (q, k[:, :, seen], v[:, :, seen]))).abs().max()
    assume(largest > 0.1 * v[:, :, seen].double().abs().max())
    agrees(of_slots, q, k, v, shape[-1])


@pytest.mark.oracle
@given(shape=shapes([6, 32, 64, 96, 128], 400), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_the_kernel_is_the_definition(kernel, shape, dtype):
    agrees(kernel.attend, *draw(*shape, dtype), shape[-1])


@pytest.mark.oracle
@pytest.mark.parametrize("filled", [1, 63, 64, 65, 640, 641, 1000])
def test_splits_that_hold_nothing_weigh_nothing(kernel, filled):
    """16 blocks of 64 keys for 10 splits: whole ones, a partial last one, and empty ones at every fill."""
    B, H, K, S, P = 1, 2, 2, 1000, 64
    assert kernel.split_count(B * K, 16, PROCESSORS) == 10
    agrees(kernel.attend, *draw(B, H, K, S, P, filled, torch.float32), filled)


@pytest.mark.oracle
def test_scores_far_beyond_the_range_of_exp(kernel):
    """In float32 the exponential of the largest is infinite and that of most others 0; signs both ways."""
    q, k, v = draw(1, 2, 1, 300, 32, 290, torch.float32)
    for sign in (1, -1):
        k[:, :, :290] = sign * k[:, :, :290].abs() * 40
        scores = (q.abs() * 40) @ k.mT[..., :290] / 32**0.5
        assert scores.abs().min() > 500
        y = kernel.attend(q.abs() * 40, k, v, torch.tensor(290))
        expected = reference((q.abs() * 40).double(), k[:, :, :290].double(), v[:, :, :290].double())
        torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.oracle
def test_a_cache_in_16_bits_is_read_as_it_is(kernel):
    q, k, v = draw(2, 4, 2, 90, 32, 80, torch.float32)
    agrees(kernel.attend, q, k.bfloat16(), v.bfloat16(), 80)
    agrees(of_slots, q, k.bfloat16(), v.bfloat16(), 80)


@pytest.mark.oracle
def test_queries_may_lie_between_other_heads(kernel):
    """As the projection leaves them: every row of a batch holds queries, keys and values."""
    _, k, v = draw(3, 4, 2, 40, 16, 33, torch.float32)
    qkv = torch.randn(3, 1, 8, 16, generator=torch.Generator().manual_seed(1))
    q = qkv.transpose(1, 2)[:, :4]
    assert not q.is_contiguous()
    agrees(kernel.attend, q, k, v, 33)


@pytest.mark.oracle
@given(
    shape=shapes([6, 32, 96], 9), rotary=st.booleans(), ring=st.booleans(), late=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), kept=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_token_is_rotated_and_placed_as_by_torch(kernel, shape, rotary, ring, late, dtype, kept):
    """In one kernel; a ring is written over. In 16 bits torch rounds each product, the kernel the sum."""
    B, H, K, S, P, filled = shape
    at, base = filled - 1 + (late if ring else 0), 100.0
    g = torch.Generator().manual_seed(at)
    qkv = torch.randn(B, H + 2 * K, P, generator=g).to(dtype)
    buffers = [torch.randn(B, K, S, P, generator=g).to(kept) for _ in range(2)]
    place = Place(torch.tensor(at), at + 1, {(P, base): rotary_table(at + 1, P, base, qkv.device)})
    ours, theirs = (KVCache(*(b.clone() for b in buffers), window=S if ring else None) for _ in range(2))
    expected = place_token(qkv, base if rotary else None, theirs, place)
    tables = place.tables[P, base] if rotary else (None, None)
    q, count = kernel.place_token(qkv, *tables, place.at, ours.keys, ours.values)
    limit = {torch.float32: 1e-6, torch.bfloat16: 0.04}[torch.bfloat16 if torch.bfloat16 in (dtype, kept) else dtype]
    for found, wanted in zip((q, ours.keys, ours.values), expected, strict=False):
        torch.testing.assert_close(found, wanted, rtol=0, atol=limit)
    assert count == expected[3]
    slot = at % S
    untouched = torch.arange(S) != slot
    for new, old in zip((ours.keys, ours.values), buffers, strict=True):
        assert torch.equal(new[:, :, untouched], old[:, :, untouched])
    # the interpreter cuts off where a GPU rounds
    torch.testing.assert_close(ours.values[:, :, slot], qkv[:, H + K :].to(kept), rtol=2**-7, atol=0)


@pytest.mark.oracle
@given(rows=st.integers(1, 3000), blocks=st.integers(1, 5000), processors=st.integers(1, 200))
@settings(deadline=None)
def test_there_are_programs_for_every_processor_and_a_block_for_every_program(kernel, rows, blocks, processors):
    splits = kernel.split_count(rows, blocks, processors)
    assert 1 <= splits <= min(blocks, kernel.MOST_SPLITS)
    assert splits in (blocks, kernel.MOST_SPLITS) or rows * splits >= kernel.PROGRAMS_PER_PROCESSOR * processors
    assert splits == 1 or rows * (splits - 1) < kernel.PROGRAMS_PER_PROCESSOR * processors


@given(window=st.none() | st.integers(1, 7), slots=st.integers(1, 12), dtype=st.sampled_from(list(TOLERANCE)))
@settings(max_examples=40, deadline=None)
def test_a_cache_counts_what_is_filled(window, slots, dtype):
    """`put` at every position, against the last keys of a list; a ring holds them in another order."""
    limit = slots if window is None else 3 * window
    slots = min(limit, window or limit)
    cache = KVCache(*(torch.zeros(1, 1, slots, 1, dtype=dtype) for _ in range(2)), window=window)
    place = Place(torch.tensor(0), limit)
    for t in range(limit):
        new = torch.full((1, 1, 1, 1), t, dtype=torch.float64)
        keys, values, filled = cache.put(new, -new, place)
        assert (filled.dtype, filled.shape) == (torch.int64, ())
        assert place.at.item() == t
        seen = keys[0, 0, : int(filled), 0].tolist()
        assert sorted(seen) == list(range(max(0, t + 1 - slots), t + 1))
        assert values[0, 0, : int(filled), 0].tolist() == [-key for key in seen]
        assert keys.data_ptr() == cache.keys.data_ptr()
        place.at.add_(1)


LIMIT, VOCABULARY = 14, 23
MIXERS = {
    "grouped": AttentionConfig(heads=4, kv_heads=2, backend="sdpa"),
    "ring": AttentionConfig(heads=4, window=4, backend="sdpa"),
    "ring that is never full, short convolution": AttentionConfig(heads=4, window=50, conv_width=3, backend="sdpa"),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", MIXERS)
def test_a_model_that_decodes_through_the_kernel_gives_the_numbers_of_its_ordinary_step(kernel, name, monkeypatch):
    calls = []

    def place_by_kernel(qkv, base, cache, place):
        tables = place.tables[cache.keys.shape[3], base]
        q, filled = kernel.place_token(qkv, *tables, place.at, cache.keys, cache.values)
        return q, cache.keys, cache.values, filled

    monkeypatch.setattr(mixer, "place_token", place_by_kernel)
    monkeypatch.setattr(mixer, "of_slots", lambda *given: (calls.append(given), kernel.attend(*given))[1])
    config = ModelConfig(vocabulary=VOCABULARY, width=32, layers=2, mixer=MIXERS[name])
    model = LanguageModel(config, seed=3).eval()
    tokens = torch.randint(0, VOCABULARY, (3, LIMIT), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        _, state = model.prefill(tokens[:, :5], model.make_state(3, LIMIT))
        repeated = RepeatableStep(model, state.clone(), LIMIT)
        for token in tokens[:, 5:].unbind(1):
            expected, state = model.step(token, state)
            torch.testing.assert_close(repeated.step(token), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * (LIMIT - 5)


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from models.ops.kernels.triton_decode import _attend_split, _join, _place

def ptx(kernel, types, constants):
    types = [*types, *("constexpr" for _ in constants)]
    assert len(types) == len(kernel.arg_names)
    given = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, dict(zip(kernel.arg_names, types)), given)
    return compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]

for kind, G, P in (("bf16", 1, 64), ("fp32", 3, 96)):
    sizes = dict(K=2, G=G, P=P, group=1 if G == 1 else 4, width=64 if P == 64 else 128, block=16)
    types = ["*" + kind] * 3 + ["*i64", "*fp32", "*fp32", "i32", "i32", "i32", "fp32"]
    assert "_attend_split" in ptx(_attend_split, types, sizes)
    types = ["*" + kind, "*fp32", "*fp32", "*i64", *["*" + kind] * 3, "*i64", "i32"]
    placed = dict(H=2 * G, K=2, P=P, width=sizes["width"], rotary=kind == "bf16")
    assert "_place" in ptx(_place, types, placed)
    assert "_join" in ptx(_join, ["*fp32", "*fp32", "*" + kind, "i32"], dict(P=P, width=sizes["width"], most=32))
"""


@pytest.mark.oracle
def test_the_kernels_compile_for_a_gpu():
    """Which needs none; the interpreter runs more than the compiler takes."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, timeout=300, env=compiled)
    assert done.returncode == 0, done.stderr


def test_without_triton_there_is_the_form_of_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    assert not kernels.has_triton()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 12, 12, 32768, 64), (2, 16, 4, 5000, 128), (1, 32, 1, 3000, 96), (64, 4, 4, 300, 32)], ids=str
)
def test_the_kernel_is_the_definition_on_a_gpu(shape, dtype):
    form = kernels.attention_of_splits
    S = shape[3]
    for filled in (1, 257, S - 1, S):
        agrees(form, *(x.cuda() for x in draw(*shape, filled, dtype)), filled)


@pytest.mark.cuda
@pytest.mark.parametrize("name", MIXERS)
def test_a_recording_reads_what_is_filled_when_it_is_repeated(name):
    """In bfloat16, where the ordinary step and the recorded one have different kernels."""
    config = ModelConfig(vocabulary=VOCABULARY, width=256, layers=2, mixer=MIXERS[name])
    model = LanguageModel(config, seed=3, device="cuda", dtype=torch.bfloat16).eval()
    tokens = torch.randint(0, VOCABULARY, (3, 200), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        _, state = model.prefill(tokens[:, :5], model.make_state(3, 200))
        recorded = RecordedDecode(model, state.clone(), 200)
        for token in tokens[:, 5:].unbind(1):
            expected, state = model.step(token, state)
            torch.testing.assert_close(recorded.step(token), expected, rtol=0.05, atol=0.05)
