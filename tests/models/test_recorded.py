"""The repeatable decode step: the numbers of the ordinary one, by the same operations at every position."""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import recorded
from models.config import BlockConfig, HybridConfig, ModelConfig
from models.errors import ConfigError
from models.feedforward.mlp import MLPConfig
from models.feedforward.moe import MoEConfig
from models.feedforward.swiglu import SwiGLUConfig
from models.language_model import LanguageModel
from models.mixers.attention import AttentionConfig
from models.mixers.lstm import LSTM, LSTMConfig
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config
from models.mixers.mamba3 import Mamba3Config
from models.ops.attention import forget_tables, kept_tables
from models.ops.kernels import load
from models.recorded import RecordedDecode, Recording, RepeatableStep

CASES = {
    "attention": AttentionConfig(heads=4, backend="sdpa"),
    "attention reference": AttentionConfig(heads=4, backend="reference"),
    "attention grouped, biased": AttentionConfig(heads=4, kv_heads=2, bias=True, backend="sdpa"),
    "attention unplaced": AttentionConfig(heads=4, rotary=False, backend="sdpa"),
    "attention short convolution": AttentionConfig(heads=4, conv_width=3, backend="sdpa"),
    "ring": AttentionConfig(heads=4, window=4, backend="sdpa"),
    "ring of one": AttentionConfig(heads=4, window=1, conv_width=4, backend="sdpa"),
    "ring that is never full": AttentionConfig(heads=4, window=50, backend="sdpa"),
    "mamba": MambaConfig(state=4, backend="torch"),
    "mamba reference": MambaConfig(state=4, negative_eigenvalues=True, backend="reference"),
    "mamba2": Mamba2Config(head_width=8, state=6, groups=2, backend="torch"),
    "mamba3": Mamba3Config(head_width=8, state=8, backend="torch"),
    "lstm": LSTMConfig(backend="torch"),
}
PROMPT, LIMIT, VOCABULARY = 5, 14, 23


def model(mixer, **changes) -> LanguageModel:
    given = {"mixer": mixer, "feedforward": SwiGLUConfig(hidden=24), "layers": 2} | changes
    return LanguageModel(ModelConfig(vocabulary=VOCABULARY, width=32, **given), seed=3, dtype=torch.float64).eval()


def after_prompt(made: LanguageModel, batch: int = 3):
    """The state after a prompt, and the tokens that are to follow."""
    tokens = torch.randint(0, VOCABULARY, (batch, LIMIT), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(made.device)
    _, state = made.prefill(tokens[:, :PROMPT], made.make_state(batch, LIMIT))
    return state, tokens[:, PROMPT:]


def same_numbers(made: LanguageModel) -> None:
    with torch.inference_mode():
        state, tokens = after_prompt(made)
        repeated = RepeatableStep(made, state.clone(), LIMIT)
        for token in tokens.unbind(1):
            expected, state = made.step(token, state)
            torch.testing.assert_close(repeated.step(token), expected, rtol=1e-10, atol=1e-11)
        assert repeated.place.at.item() == LIMIT


@pytest.mark.parametrize("name", CASES)
def test_a_repeatable_step_gives_the_numbers_of_the_ordinary_one(name):
    same_numbers(model(CASES[name]))


def test_it_holds_for_learned_positions_and_post_norm():
    same_numbers(
        model(CASES["attention unplaced"], feedforward=MLPConfig(), positions=LIMIT, post_norm=True, norm="layernorm")
    )


def test_it_holds_for_a_hybrid():
    kinds = {"A": CASES["ring"], "M": CASES["mamba"], "L": CASES["lstm"]}
    blocks = {letter: BlockConfig(mixer=mixer) for letter, mixer in kinds.items()}
    same_numbers(model(None, feedforward=None, layers=4, hybrid=HybridConfig(pattern="MALA", blocks=blocks)))


def test_a_state_that_comes_back_in_new_memory_is_written_back(monkeypatch):
    ordinary = LSTM.step
    monkeypatch.setattr(LSTM, "step", lambda self, x, state: ordinary(self, x, state.clone()))
    made = model(CASES["lstm"])
    same_numbers(made)
    with torch.inference_mode():
        step = RepeatableStep(made, after_prompt(made)[0], LIMIT)
        where = [buffer.data_ptr() for block in step.state.blocks for buffer in block.buffers.values()]
        step.repeat()
        assert where == [buffer.data_ptr() for block in step.state.blocks for buffer in block.buffers.values()]


@pytest.mark.parametrize("name", ["attention", "ring", "mamba3", "lstm"])
def test_a_step_goes_on_from_another_state(name):
    made = model(CASES[name])
    with torch.inference_mode():
        state, tokens = after_prompt(made)
        step = RepeatableStep(made, state.clone(), LIMIT)
        for _ in range(3):
            step.repeat()
        later = tokens[:, :1].flip(0)
        expected, state = made.step(later[:, 0], made.prefill(tokens[:, :2], made.make_state(3, LIMIT))[1])
        step.load(made.prefill(tokens[:, :2], made.make_state(3, LIMIT))[1])
        torch.testing.assert_close(step.step(later[:, 0]), expected, rtol=1e-10, atol=1e-11)
        assert step.place.at.item() == state.length


@pytest.mark.parametrize("name", ["ring", "mamba"])
def test_a_step_goes_on_with_the_likeliest_token(name):
    made = model(CASES[name])
    with torch.inference_mode():
        state, tokens = after_prompt(made)
        step, token = RepeatableStep(made, state.clone(), LIMIT), tokens[:, 0]
        step.step(token)
        chosen = []
        for _ in range(LIMIT - PROMPT - 1):
            logits, state = made.step(token, state)
            token = logits.argmax(1)
            assert torch.equal(step.token, token)
            torch.testing.assert_close(step.step(), made.step(token, state.clone())[0], rtol=1e-10, atol=1e-11)
            chosen.append(token)
        assert len(set(torch.stack(chosen).flatten().tolist())) > 2
        with pytest.raises(ConfigError, match="raise the limit"):
            step.step()


class Operations(TorchDispatchMode):
    """What was asked for: each operation, its numbers and flags, and the shapes of its tensors; of those in `fixed`,
    which one."""

    def __init__(self, fixed: dict[int, str]) -> None:
        super().__init__()
        self.fixed, self.seen = fixed, []

    def _named(self, value):
        if isinstance(value, torch.Tensor):
            layout = tuple(value.shape), value.stride(), value.storage_offset()
            return self.fixed.get(value.untyped_storage().data_ptr()), layout
        return [self._named(one) for one in value] if isinstance(value, (list, tuple)) else repr(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read by the host"
        self.seen.append((str(func), self._named(args), sorted((key, repr(v)) for key, v in (kwargs or {}).items())))
        return func(*args, **(kwargs or {}))


def operations(step: RepeatableStep) -> list:
    fixed = {step.token: "token", step.logits: "logits", step.place.at: "place"}
    fixed |= {table: "table" for tables in step.place.tables.values() for table in tables}
    fixed |= {p: name for name, p in step.model.named_parameters()}
    fixed |= {b: f"{i}.{name}" for i, block in enumerate(step.state.blocks) for name, b in block.buffers.items()}
    with Operations({t.untyped_storage().data_ptr(): name for t, name in fixed.items()}) as seen:
        step.repeat()
    return seen.seen


@pytest.mark.parametrize("name", CASES)
def test_every_position_takes_the_same_operations_on_the_same_memory(name):
    """What a recording rests on: nothing that it bakes in may differ from step to step."""
    with torch.inference_mode():
        made = model(CASES[name])
        state, _ = after_prompt(made)
        step = RepeatableStep(made, state, LIMIT)
        step.repeat()
        first = operations(step)
        for _ in range(LIMIT - PROMPT - 2):
            assert operations(step) == first


def test_a_recording_keeps_the_tables_that_it_reads():
    """Others may push them out of the cache, and what is freed there would be read all the same."""
    with torch.inference_mode():
        made = model(CASES["attention"])
        step = RepeatableStep(made, after_prompt(made)[0], LIMIT)
        step.repeat()
        before = operations(step)
        forget_tables()
        assert operations(step) == before
        assert "'table'" in repr(before)


@pytest.mark.parametrize("name", ["attention", "mamba", "mamba2", "mamba3"])
def test_a_step_has_no_operation_that_it_can_do_without(name):
    """Each costs a launch: a branch is added to the residual stream by its last product, and decay rates, which no step
    changes, are made before."""
    with torch.inference_mode():
        made = model(CASES[name])
        for block in made.blocks:
            block.feedforward.ops = load("torch")  # as on a GPU; a CPU's own has compiled steps
        names, given, _ = zip(*operations(RepeatableStep(made, after_prompt(made)[0], LIMIT)), strict=True)
    assert names.count("aten.addmm_.default") == 2 * len(made.blocks)
    assert "in_proj.weight" in repr(given) or "qkv_proj.weight" in repr(given)
    assert "A_log" not in repr(given)


def test_the_comparison_sees_an_ordinary_step_change():
    """A cache that keeps its length on the host is read by another slice at every step."""
    with torch.inference_mode():
        made = model(CASES["attention"])
        state, tokens = after_prompt(made)
        seen = []
        for token in tokens.unbind(1)[:2]:
            with Operations({}) as one:
                _, state = made.step(token, state)
            seen.append(one.seen)
    assert seen[0] != seen[1]


def test_what_cannot_be_recorded_says_why():
    with torch.inference_mode():
        experts = model(CASES["attention"], feedforward=MoEConfig(experts=4, hidden=8))
        with pytest.raises(ConfigError, match="outside bfloat16 the number of tokens of each expert"):
            RepeatableStep(experts, after_prompt(experts)[0], LIMIT)
        compiled = model(MambaConfig(backend="numba"))
        with pytest.raises(ConfigError, match="run on the host"):
            RepeatableStep(compiled, after_prompt(compiled)[0], LIMIT)
        plain = model(CASES["mamba"])
        with pytest.raises(ConfigError, match="needs a GPU"):
            RecordedDecode(plain, after_prompt(plain)[0], LIMIT)
    with pytest.raises(ConfigError, match="needs a GPU"):
        Recording(lambda: pytest.fail("it ran"), torch.device("cpu"))


@pytest.fixture
def graphs(monkeypatch):
    """What happens on a GPU that is none: a replay runs nothing and is told of."""
    told = []

    class Graph:
        def replay(self) -> None:
            told.append("replay")

    @contextmanager
    def on(what, stream):
        told.append(what)
        yield
        told.append(f"end of {what}")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(recorded, "_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on("stream", stream))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: on(f"recording in {pool}", stream))
    return told


def test_a_recording_holds_what_its_graph_reads_and_writes(graphs):
    """Nobody else may: memory that was freed would be another's by the next replay."""

    class Work:
        def __call__(self) -> None:
            graphs.append("work")

    work = Work()
    alive = weakref.ref(work)
    take = Recording(work, torch.device("cuda"), before=lambda: graphs.append("before"), pool=7)
    del work
    assert graphs == ["stream", *["before", "work"] * 3, "end of stream",
                      "recording in 7", "work", "end of recording in 7"]  # fmt: skip
    graphs.clear()
    take()
    assert graphs == ["replay"]
    assert alive() is not None
    del take
    assert alive() is None


def test_a_recording_holds_rotary_tables_whose_place_longer_ones_take(graphs):
    forget_tables()
    made = model(CASES["attention"])

    def read(tokens: int) -> None:
        made(torch.zeros(1, tokens, dtype=torch.int64))

    take = Recording(lambda: read(16), torch.device("cuda"))
    short = [weakref.ref(table) for table in kept_tables()]
    assert len(short) == 2
    read(32)
    assert not {id(table) for table in kept_tables()} & {id(table()) for table in short}
    assert all(table() is not None for table in short)
    del take
    assert all(table() is None for table in short)


def test_recordings_of_a_gpu_are_made_on_one_stream_however_it_is_named(graphs, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(recorded, "_stream", lambda device: asked.append(device) or stream)
    for name in ("cuda", "cuda:3", "cuda:1"):
        Recording(lambda: None, torch.device(name))
    assert asked == [3, 3, 1]


def test_a_recorded_decode_goes_with_whoever_used_it(graphs, monkeypatch):
    """Not only when garbage is collected: its cache may be most of the memory there is."""

    class OnAGpu(Recording):
        def __init__(self, operation, device, **how) -> None:
            super().__init__(operation, torch.device("cuda"), **how)

    monkeypatch.setattr(recorded, "Recording", OnAGpu)
    with torch.inference_mode():
        made = model(CASES["mamba"])
        state, tokens = after_prompt(made)
        step = RecordedDecode(made, state, LIMIT)
        graphs.clear()
        step.step(tokens[:, 0])
        assert graphs == ["replay"]
        for kept, given in zip(step.state.blocks, state.blocks, strict=True):
            assert all(torch.equal(buffer, given.buffers[name]) for name, buffer in kept.buffers.items())
        gone = weakref.ref(step)
        del step
        assert gone() is None


def test_learned_positions_bound_the_limit():
    with torch.inference_mode():
        made = model(CASES["attention unplaced"], positions=LIMIT)
        step = RepeatableStep(made, after_prompt(made)[0], LIMIT + 1)
        with pytest.raises(ConfigError, match=f"{LIMIT} learned positions, {LIMIT + 1}"):
            step.repeat()
