"""One contract for every mixer of the registry: whoever adds a mixer adds a case here."""

from dataclasses import MISSING, fields, replace

import pytest
import torch
from torch import Tensor

from models import cost
from models.config import ModelConfig
from models.errors import BackendUnavailableError, ConfigError
from models.language_model import LanguageModel
from models.mixers import MIXERS
from models.mixers.attention import AttentionConfig
from models.mixers.lstm import LSTMConfig
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config
from models.mixers.mamba3 import Mamba3Config
from models.ops.ssd import CHUNK

CPU = torch.device("cpu")
WIDTH = 72  # expanded to 144: more than one group of channels in the compiled scan and convolution


def in_forms(name: str, config, *forms: str) -> dict:
    return {f"{name}-{form}": replace(config, backend=form) for form in forms}


CASES = {
    **in_forms("attention", AttentionConfig(heads=4), "sdpa", "reference", "numba"),
    **in_forms("attention-grouped", AttentionConfig(heads=4, kv_heads=2), "sdpa", "numba"),
    "attention-grouped-reference": AttentionConfig(heads=4, kv_heads=1, backend="reference"),
    # shorter than the texts below, as short as can be, longer than they are
    **in_forms("attention-window", AttentionConfig(heads=4, window=5), "sdpa", "reference", "numba"),
    **in_forms("attention-window-one", AttentionConfig(heads=4, window=1), "sdpa", "reference", "numba"),
    **in_forms("attention-window-long", AttentionConfig(heads=4, window=150), "sdpa", "reference", "numba"),
    **in_forms("attention-unplaced", AttentionConfig(heads=4, rotary=False, rotary_base=5.0), "sdpa", "numba"),
    **in_forms("attention-head-width", AttentionConfig(heads=3, head_width=10), "sdpa", "numba"),
    **in_forms("attention-conv", AttentionConfig(heads=4, conv_width=3), "sdpa", "reference", "numba"),
    **in_forms(
        "attention-all",
        AttentionConfig(heads=6, kv_heads=2, head_width=8, window=6, bias=True, conv_width=4, rotary_base=100.0),
        "sdpa", "reference", "numba",
    ),
    **in_forms("attention-odd", AttentionConfig(heads=4, head_width=5, rotary=False, bias=True), "sdpa", "numba"),
    **in_forms("mamba", MambaConfig(state=6), "reference", "torch", "numba"),
    **in_forms("mamba-wide", MambaConfig(state=3, expand=3, conv_width=5, dt_rank=7), "numba"),
    **in_forms("mamba-negative", MambaConfig(state=4, negative_eigenvalues=True), "reference", "torch", "numba"),
    **in_forms("mamba2", Mamba2Config(state=6, head_width=16), "reference", "torch", "numba"),
    **in_forms("mamba2-groups", Mamba2Config(state=5, head_width=9, groups=4), "reference", "torch", "numba"),
    **in_forms(
        "mamba2-whole-norm",
        Mamba2Config(state=5, head_width=8, groups=3, grouped_norm=False, expand=1, conv_width=3),
        "torch", "numba",
    ),
    **in_forms(
        "mamba2-negative",
        Mamba2Config(state=6, head_width=12, groups=2, negative_eigenvalues=True),
        "reference", "torch", "numba",
    ),
    **in_forms("mamba3", Mamba3Config(state=8, head_width=16), "reference", "torch", "numba"),
    **in_forms("mamba3-groups", Mamba3Config(state=6, head_width=9, groups=4), "reference", "torch", "numba"),
    **in_forms(
        "mamba3-rotated",
        Mamba3Config(state=7, head_width=8, groups=3, rotated_fraction=1.0, expand=1),
        "reference", "torch", "numba",
    ),
    "mamba3-rank-reference": Mamba3Config(state=8, head_width=16, groups=3, rank=2, backend="reference"),
    **in_forms("lstm", LSTMConfig(), "reference", "torch", "numba"),
    **in_forms("lstm-narrow", LSTMConfig(hidden=11), "reference", "torch", "numba"),
}  # fmt: skip
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
each_mixer = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
windowed = pytest.mark.parametrize("name", [name for name in CASES if getattr(CASES[name], "window", None)])


def config(name: str) -> ModelConfig:
    return ModelConfig(vocabulary=11, width=WIDTH, layers=2, mixer=CASES[name])


def make(case, dtype: torch.dtype = torch.float32):
    torch.set_default_dtype(dtype)
    try:
        mixer = MIXERS[case.kind](case, WIDTH, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        mixer.reset_parameters(torch.Generator().manual_seed(0))
    return mixer


def build(name: str, dtype: torch.dtype = torch.float32):
    return make(CASES[name], dtype)


def tokens(batch: int, time: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def reach(name: str) -> int:
    """How many tokens a token sees, itself among them."""
    case = CASES[name]
    if getattr(case, "window", None) is None:
        return 10**9
    return case.window + (case.conv_width or 1) - 1


def test_every_registered_mixer_and_backend_has_a_case():
    assert {case.kind for case in CASES.values()} == set(MIXERS)
    assert {name: build(name).backend.name for name in CASES} == {name: c.backend for name, c in CASES.items()}
    for kind, mixer in MIXERS.items():
        forms = {"sdpa", "reference", "numba"} if kind == "attention" else set(mixer.forms) - {"cuda"}
        assert {case.backend for case in CASES.values() if case.kind == kind} == forms


# of the initialisation (tests/models/test_initialisation.py); too small to be seen here
APART = {"kind", "backend", "causal", "A_min", "A_max", "dt_min", "dt_max", "dt_floor", "A_floor", "norm_eps"}


def test_every_option_has_a_case():
    for kind, mixer in MIXERS.items():
        for field in fields(mixer.Config):
            if field.name in APART or field.default is MISSING:
                continue
            values = [getattr(case, field.name) for case in CASES.values() if case.kind == kind]
            assert any(value != field.default for value in values), f"{kind}.{field.name}"


@each_mixer
@pytest.mark.parametrize(("batch", "time"), [(1, 1), (2, 3), (3, 35)])
@torch.no_grad()
def test_shapes(name, batch, time):
    mixer, x = build(name), tokens(batch, time)
    y, state = mixer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert state is None
    state = mixer.make_state(batch, time + 1, torch.float32, CPU)
    assert state.length == 0
    y, state = mixer(x, state)
    assert y.shape == x.shape
    assert state.length == time
    y, state = mixer.step(x[:, 0], state)
    assert y.shape == (batch, WIDTH)
    assert state.length == time + 1


@each_mixer
@pytest.mark.parametrize("t", [0, 1, 16])
@torch.no_grad()
def test_a_token_changes_nothing_before_it(name, t):
    mixer, x = build(name), tokens(2, 37)
    changed = x.clone()
    changed[:, t] += 3
    before, after = mixer(x)[0], mixer(changed)[0]
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t] - after[:, t]).abs().amax(-1).min() > 1e-3
    # not forgotten while it is within reach, and of no influence at all beyond
    far = t + reach(name)
    assert (before[:, min(far - 1, 36)] - after[:, min(far - 1, 36)]).abs().max() > 0
    assert torch.equal(before[:, far:], after[:, far:])


@each_mixer
@each_dtype
@pytest.mark.parametrize("chunk", [1, 3, 17])
@torch.no_grad()
def test_chunks_through_the_state_equal_the_whole(name, dtype, chunk):
    mixer, x = build(name, dtype), tokens(2, 37, dtype)
    state = mixer.make_state(2, 37, dtype, CPU)
    parts = []
    for start in range(0, 37, chunk):
        y, state = mixer(x[:, start : start + chunk], state)
        parts.append(y)
    close(torch.cat(parts, 1), mixer(x)[0])
    assert state.length == 37


@each_mixer
@each_dtype
@pytest.mark.parametrize("prompt", [0, 2, 20])
@torch.no_grad()
def test_prefill_and_steps_equal_the_whole(name, dtype, prompt):
    mixer, x = build(name, dtype), tokens(3, 24, dtype)
    whole = mixer(x)[0]
    state = mixer.make_state(3, 24, dtype, CPU)
    if prompt:
        y, state = mixer(x[:, :prompt], state)
        close(y, whole[:, :prompt])
    for t in range(prompt, 24):
        y, state = mixer.step(x[:, t], state)
        close(y, whole[:, t])


@each_mixer
@torch.no_grad()
def test_steps_then_a_chunk_equal_the_whole(name):
    mixer, x = build(name), tokens(2, 9)
    state = mixer.make_state(2, 9, torch.float32, CPU)
    for t in range(2):
        _, state = mixer.step(x[:, t], state)
    y, state = mixer(x[:, 2:], state)
    close(y, mixer(x)[0][:, 2:])


@each_mixer
@each_dtype
def test_gradients_are_finite_and_reach_everything(name, dtype):
    mixer, x = build(name, dtype), tokens(2, 21, dtype).requires_grad_()
    mixer(x)[0].square().sum().backward()
    for what, tensor in [("x", x), *mixer.named_parameters()]:
        assert tensor.grad is not None, what
        assert tensor.grad.isfinite().all(), what
        assert tensor.grad.abs().max() > 0, what


@each_mixer
@torch.no_grad()
def test_what_a_mixer_gives_may_be_written_over(name):
    """It is memory of its own, whether or not it leaves a state."""
    mixer, x = build(name), tokens(1, 3)

    def own(y: Tensor, x: Tensor, after) -> bool:
        others = [x, *mixer.parameters(), *(after.buffers.values() if after is not None else ())]
        return y.untyped_storage().data_ptr() not in {other.untyped_storage().data_ptr() for other in others}

    y, after = mixer(x)
    assert own(y, x, after)
    y, after = mixer(x, mixer.make_state(1, 4, torch.float32, CPU))
    assert own(y, x, after)
    y, after = mixer.step(x[:, 0], after)
    assert own(y, x, after)


@each_mixer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "max_len"), [(1, 1), (3, 50)])
def test_state_bytes_are_counted(name, dtype, batch, max_len):
    expected = cost.state_bytes(config(name), batch, max_len, dtype.itemsize)
    state = LanguageModel(config(name), seed=0).make_state(batch, max_len, dtype)
    assert state.nbytes == expected
    assert sum(block.nbytes for block in state.blocks) == expected
    one = build(name).make_state(batch, max_len, dtype, CPU)
    assert one.nbytes * 2 == expected


@each_mixer
def test_parameters_are_counted(name):
    """All of them, and those that stay in float32 where the others have 16 bits."""
    counted = cost.parameters(config(name)).total
    assert counted == sum(weight.numel() for weight in LanguageModel(config(name), seed=None).parameters())
    half = LanguageModel(config(name), seed=0).cast(torch.bfloat16)
    assert cost.weight_bytes(config(name), 2) == sum(weight.nbytes for weight in half.parameters())


@each_mixer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_16_bit_state_changes_only_the_precision(name, dtype):
    mixer, x = build(name), tokens(2, 12)
    whole = mixer(x)[0]
    state = mixer.make_state(2, 12, dtype, CPU)
    nbytes = state.nbytes
    y, state = mixer(x[:, :5], state)
    parts = [y]
    for t in range(5, 8):
        y, state = mixer.step(x[:, t], state)
        parts.append(y[:, None])
    y, state = mixer(x[:, 8:], state)
    got = torch.cat([*parts, y], 1)
    assert got.dtype == torch.float32
    assert (got - whole).abs().max() < 0.02 * whole.abs().max()
    assert state.nbytes == nbytes


@each_mixer
@torch.no_grad()
def test_a_clone_is_independent(name):
    mixer, x = build(name), tokens(2, 8)
    _, state = mixer(x[:, :5], mixer.make_state(2, 8, torch.float32, CPU))
    clone = state.clone()
    expected, _ = mixer(x[:, 5:], state.clone())
    mixer(-x[:, 5:], state)  # writes into the buffers of `state`
    for t in range(5, 8):
        y, clone = mixer.step(x[:, t], clone)
        close(y, expected[:, t - 5])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("attention") and reach(name) > 9])
@torch.no_grad()
def test_a_full_cache_is_a_user_error(name):
    mixer, x = build(name), tokens(1, 6)
    with pytest.raises(ConfigError, match=r"holds 5 tokens, 6 were asked for"):
        mixer(x, mixer.make_state(1, 5, torch.float32, CPU))
    _, state = mixer(x, mixer.make_state(1, 6, torch.float32, CPU))
    with pytest.raises(ConfigError, match=r"holds 6 tokens, 7 were asked for"):
        mixer.step(x[:, 0], state)


@each_mixer
@pytest.mark.parametrize("feedforward", [False, True])
@torch.no_grad()
def test_the_model_continues_its_own_state(name, feedforward):
    given = config(name).to_dict() | {"feedforward": {"kind": "swiglu"} if feedforward else None}
    model = LanguageModel(ModelConfig.from_dict(given), seed=3)
    text = torch.randint(11, (2, 15), generator=torch.Generator().manual_seed(0))
    whole = model(text)
    logits, state = model.prefill(text[:, :3], model.make_state(2, 15))
    close(logits, whole[:, 2])
    logits, state = model.prefill(text[:, 3:8], state)
    close(logits, whole[:, 7])
    for t in range(8, 15):
        logits, state = model.step(text[:, t], state)
        close(logits, whole[:, t])
    assert state.length == 15


@each_mixer
@torch.no_grad()
def test_a_16_bit_model_runs_and_resembles_the_full_one(name):
    full = LanguageModel(config(name), seed=3)
    half = LanguageModel(config(name), seed=None, dtype=torch.bfloat16).to_empty(device="cpu")
    half.tie()
    half.load_state_dict(full.state_dict())
    text = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = full(text)
    got = half(text)
    assert got.dtype == torch.bfloat16
    assert (got - whole).abs().max() < 0.05 * whole.abs().max()
    logits, state = half.prefill(text[:, :7], half.make_state(2, 9))
    assert (logits - whole[:, 6]).abs().max() < 0.05 * whole.abs().max()
    for t in (7, 8):
        logits, state = half.step(text[:, t], state)
        assert (logits - whole[:, t]).abs().max() < 0.05 * whole.abs().max()


@each_mixer
@torch.no_grad()
def test_a_form_is_the_reference_over_several_chunks(name):
    time = 2 * CHUNK + 13
    mixer, x = build(name, torch.float64), tokens(2, time, torch.float64)
    reference = make(replace(CASES[name], backend="reference"), torch.float64)
    close(mixer(x)[0], reference(x)[0])
    state, parts = mixer.make_state(2, time, torch.float64, CPU), []
    for start, end in ((0, CHUNK + 5), (CHUNK + 5, 2 * CHUNK), (2 * CHUNK, time)):
        y, state = mixer(x[:, start:end], state)
        parts.append(y)
    close(torch.cat(parts, 1), reference(x)[0])


@each_mixer
def test_gradients_are_those_of_the_reference(name):
    gradients = []
    for case in (CASES[name], replace(CASES[name], backend="reference")):
        mixer, x = make(case, torch.float64), tokens(2, CHUNK + 6, torch.float64).requires_grad_()
        (mixer(x)[0] * tokens(2, CHUNK + 6, torch.float64, seed=2)).sum().backward()
        gradients.append({"x": x.grad} | {what: p.grad for what, p in mixer.named_parameters()})
    for what, expected in gradients[1].items():
        deviation = (gradients[0][what] - expected).abs().max() / expected.abs().max()
        assert deviation < 1e-11, what


@each_mixer
def test_under_autocast_forward_and_gradients_resemble_the_full_ones(name):
    mixer, x = build(name), tokens(2, CHUNK + 6).requires_grad_()
    results = []
    for enabled in (False, True):
        mixer.zero_grad()
        x.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = mixer(x)[0]
        (y.float() * tokens(2, CHUNK + 6, seed=2)).sum().backward()
        gradients = {what: p.grad.clone() for what, p in mixer.named_parameters()}
        results.append({"y": y.detach().float(), "x": x.grad} | gradients)
    full, rough = results
    for what in full:
        if CASES[name].kind == "mamba2" and what in ("A_log", "dt_bias"):
            continue  # tests/models/test_ssd.py, test_gradients_of_16_bit_inputs
        assert (rough[what] - full[what]).norm() < 0.05 * full[what].norm(), what


@windowed
@pytest.mark.parametrize(("time", "max_len"), [(4, 40), (31, 40), (31, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_cache_of_a_window_is_a_ring(name, time, max_len, dtype):
    """Prompts shorter and longer than the window, whole and in pieces, then steps; bytes never beyond the window's."""
    mixer, case, x = build(name), CASES[name], tokens(2, 40)
    H, K, P = case.sizes(WIDTH)
    conv = (case.conv_width or 0) * (H + 2 * K) * P
    whole = mixer(x)[0]
    for pieces in ([time], [time - 3, 1, 2], [1] * time):
        state = mixer.make_state(2, max_len, dtype, CPU)
        assert state.nbytes == 2 * (2 * K * P * min(case.window, max_len) + conv) * dtype.itemsize
        parts, start = [], 0
        for piece in pieces:
            y, state = mixer(x[:, start : start + piece], state)
            parts.append(y)
            start += piece
        while start < max_len:
            y, state = mixer.step(x[:, start], state)
            parts.append(y[:, None])
            start += 1
        got = torch.cat(parts, 1)
        tolerance = 2e-5 if dtype is torch.float32 else 0.02 * whole.abs().max()
        assert (got - whole[:, :max_len]).abs().max() < tolerance
        assert state.length == max_len


@windowed
def test_no_gradient_comes_from_beyond_the_window(name):
    mixer, x = build(name), tokens(1, 23).requires_grad_()
    y = mixer(x)[0]
    for t in (0, 7, 22):
        (gradient,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        seen = gradient[0].abs().amax(-1) > 0
        expected = [max(0, t - reach(name) + 1) <= s <= t for s in range(23)]
        assert seen.tolist() == expected


@pytest.mark.parametrize("backend", ["sdpa", "reference", "numba"])
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("rotary", [True, False])
class TestBothWays:
    """Attention without a mask."""

    def case(self, backend, kv_heads, rotary):
        return AttentionConfig(heads=4, kv_heads=kv_heads, rotary=rotary, causal=False, backend=backend)

    @torch.no_grad()
    def test_every_token_sees_every_other(self, backend, kv_heads, rotary):
        mixer, x = make(self.case(backend, kv_heads, rotary)), tokens(2, 19)
        for t in (0, 9, 18):
            changed = x.clone()
            changed[:, t] += 3
            moved = (mixer(x)[0] - mixer(changed)[0]).abs().amax(-1)
            assert moved.min() > 1e-4

    @torch.no_grad()
    def test_without_positions_the_order_does_not_matter(self, backend, kv_heads, rotary):
        mixer, x = make(self.case(backend, kv_heads, rotary), torch.float64), tokens(2, 19, torch.float64)
        order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
        difference = (mixer(x)[0][:, order] - mixer(x[:, order])[0]).abs().max()
        assert difference > 1e-3 if rotary else difference < 1e-12

    def test_gradients_are_those_of_the_reference(self, backend, kv_heads, rotary):
        gradients = []
        for form in (backend, "reference"):
            mixer, x = (
                make(self.case(form, kv_heads, rotary), torch.float64),
                tokens(2, 9, torch.float64).requires_grad_(),
            )
            (mixer(x)[0] * tokens(2, 9, torch.float64, seed=2)).sum().backward()
            gradients.append([x.grad, *(p.grad for p in mixer.parameters())])
        for actual, expected in zip(*gradients, strict=True):
            close(actual, expected)

    @torch.no_grad()
    def test_it_cannot_decode_and_says_so(self, backend, kv_heads, rotary):
        mixer, x = make(self.case(backend, kv_heads, rotary)), tokens(2, 5)
        causal = make(replace(self.case(backend, kv_heads, rotary), causal=True))
        state = causal.make_state(2, 9, torch.float32, CPU)
        for attempt in (
            lambda: mixer.make_state(2, 9, torch.float32, CPU),
            lambda: mixer(x, state),
        ):
            with pytest.raises(ConfigError, match=r"causal = false.*cannot decode") as caught:
                attempt()
            assert "\n" not in str(caught.value)


def test_the_form_with_ranks_has_the_reference_only():
    case = CASES["mamba3-rank-reference"]
    for backend in ("torch", "numba", "cuda"):
        with pytest.raises(BackendUnavailableError, match=r"rank above 1.*only 'reference'"):
            make(replace(case, backend=backend))
    chosen = make(replace(case, backend="auto")).backend
    assert (chosen.name, chosen.asked) == ("reference", "auto")
    assert chosen.fallback is not None
