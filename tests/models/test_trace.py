"""A model taken apart gives what it gives whole."""

import math

import numpy as np
import pytest
import torch

from models.errors import ConfigError
from models.language_model import LanguageModel
from models.presets import preset
from models.trace import AttentionTrace, MemoryTrace, stages, trace

SHAPES = {
    "phi3-mini": {"padding_index": 299, "vocabulary": 300, "width": 128, "layers": 2, "feedforward.hidden": 64},
    "gpt1": {"layers": 2},
    "mamba-tiny": {}, "mamba2-tiny": {}, "mamba3-tiny": {"layers": 2}, "hybrid-tiny": {}, "moe-tiny": {},
    "sliding-tiny": {"mixer.window": 3}, "lstm-tiny": {},
}  # fmt: skip
TEXT = [65, 1, 104, 65, 7]


def build(name: str) -> LanguageModel:
    """Far from the initial weights: tied to its embedding, a new model repeats the token that it read."""
    model = LanguageModel(preset(name).with_overrides(SHAPES[name]), seed=0).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for block in model.blocks:
            for weight in block.residual_writers():
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture(scope="module", params=SHAPES)
def model(request) -> LanguageModel:
    return build(request.param)


@torch.no_grad()
def test_stages_one_after_the_other_are_forward_bit_for_bit(model):
    tokens = torch.tensor([TEXT, TEXT[::-1]])
    x = tokens
    *until, last = stages(model)
    for stage in until:
        x = stage(x)
    assert torch.equal(x, model(tokens))
    assert torch.equal(last(x), model(tokens)[:, -1].argmax(-1))


@torch.no_grad()
def test_a_trace_says_what_the_model_says(model):
    found = trace(model, TEXT)
    logits = model(torch.tensor([TEXT]))[0, -1]
    assert torch.equal(found.logits, logits)
    assert found.chosen == int(logits.argmax()) == found.candidates[0].id
    p = logits.double().exp() / logits.double().exp().sum()
    for one in found.candidates:
        assert one.probability == pytest.approx(float(p[one.id]), rel=1e-4)
    highest = sorted(p.tolist(), reverse=True)[:10]
    assert [one.probability for one in found.candidates] == pytest.approx(highest, rel=1e-4)
    # the last depth is the model itself
    assert len(found.lens) == model.config.layers + 1
    assert found.lens[-1].chosen_rank == 1
    assert found.lens[-1].likeliest.id == found.chosen
    assert found.lens[-1].chosen_probability == pytest.approx(float(p[found.chosen]), rel=1e-4)


@torch.no_grad()
def test_shapes_sizes_and_changes(model):
    found = trace(model, TEXT)
    D, V, T = model.config.width, model.config.vocabulary, len(TEXT)
    by_name = {stage.name: stage for stage in found.stages}
    assert by_name["embedding"].input_shape == (1, T)
    assert by_name["embedding"].output_shape == (1, T, D)
    assert by_name["head"].output_shape == (1, T, V)
    assert by_name["head"].output_bytes == 4 * T * V
    assert by_name["arg max"].output_shape == (1,)
    assert ("final norm" in by_name) == (not model.config.post_norm)
    blocks = sum(p.nbytes for block in model.blocks for p in block.parameters())
    assert sum(stage.weight_bytes for stage in found.stages if stage.name.startswith("block")) == blocks
    x = model.embed(torch.tensor([TEXT]))
    assert by_name["embedding"].rms == pytest.approx(float(x.square().mean()) ** 0.5, rel=1e-5)
    y = model.blocks[0](x).stream
    first = found.stages[1]
    assert first.change == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-5)
    angle = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
    assert first.cosine == pytest.approx(float(angle.mean()), abs=1e-5)
    for before, after in zip(found.stages, found.stages[1:], strict=False):
        assert before.output_shape == after.input_shape
        assert after.ms > 0


@torch.no_grad()
def test_inside_the_blocks(model):
    found = trace(model, TEXT)
    assert len(found.blocks) == model.config.layers
    found_at, x = {}, torch.tensor([TEXT])
    for stage in stages(model):
        found_at[stage.name], x = x, stage(x)
    for block, kind in zip(found.blocks, model.config.blocks, strict=True):
        said = block.mixer
        if kind.mixer.kind == "attention":
            assert isinstance(said, AttentionTrace)
            torch.testing.assert_close(said.weights.sum(-1), torch.ones(kind.mixer.heads, len(TEXT)))
            assert torch.equal(said.seen, (said.weights > 0).all(0))
        else:
            assert isinstance(said, MemoryTrace)
            assert (said.half_life.diff(dim=1) >= 0).all()
            x = found_at[block.name]
            lives = model.blocks[int(block.name.split()[1].rstrip(":")) - 1].explain(x)[0].half_life[0]
            middle = np.median(lives.transpose(0, 1).flatten(1).numpy(), axis=1)  # of an even number, of both
            np.testing.assert_allclose(said.half_life[:, 1].numpy(), middle, rtol=1e-6)
            assert said.written.shape == said.left.shape == (len(TEXT),)
            assert float(said.left[-1]) == pytest.approx(float(said.written[-1]), rel=1e-5)
            assert (said.matrix is None) == (kind.mixer.kind == "lstm")
        if kind.feedforward is not None and kind.feedforward.kind == "moe":
            assert block.experts.chosen.shape == (len(TEXT), 2)
            assert block.experts.weight.sum(-1).tolist() == pytest.approx([1] * len(TEXT))
        else:
            assert block.experts is None


@pytest.mark.parametrize(
    "name", ["transformer-tiny", "mamba-tiny", "mamba2-tiny", "mamba3-tiny", "moe-tiny", "lstm-tiny"]
)
def test_a_16_bit_model_is_traced_in_numbers_of_32(name):
    model = LanguageModel(preset(name), seed=0, dtype=torch.bfloat16).eval()
    found = trace(model, TEXT)
    tensors = [found.logits]
    for block in found.blocks:
        assert block.mixer is not None
        parts = [*vars(block.mixer).values(), *(vars(block.experts).values() if block.experts else ())]
        tensors += [x for x in parts if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert len(tensors) > 3
    assert {x.dtype for x in tensors} == {torch.float32}
    assert found.lens[-1].chosen_rank == 1
    assert found.candidates[0].id == found.chosen == int(found.logits.argmax())


def test_a_mixer_that_says_nothing_is_traced_all_the_same():
    model = LanguageModel(preset("mamba3-tiny").with_overrides({"mixer.rank": 2}), seed=0)
    found = trace(model, TEXT)
    assert [block.mixer for block in found.blocks] == [None]
    assert math.isfinite(found.candidates[0].probability)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([], "no tokens"),
        ([3] * 257, "at most 256"),
        ([3, 1000], "token 1000 is not in the model's vocabulary of 1000"),
        ([-1], "token -1 is not in"),
        ([3] * 101, "100 learned positions, 101 tokens were given"),
    ],
)
def test_what_cannot_be_traced(tokens, said):
    with pytest.raises(ConfigError, match=said):
        trace(build("gpt1"), tokens)


@torch.no_grad()
def test_a_wide_model_shows_the_shapes_of_its_kind():
    """phi3-mini's width, one layer: two tokens are 1 x 2 x 3072 after the decoder, 1 x 2 x V after the head."""
    config = preset("phi3-mini").with_overrides(
        {"padding_index": None, "vocabulary": 300, "layers": 1, "feedforward.hidden": 64}
    )
    model = LanguageModel(config, seed=0)
    shapes = {stage.name: stage.output_shape for stage in trace(model, [72, 105]).stages}
    assert shapes["final norm"] == (1, 2, 3072)
    assert shapes["head"] == (1, 2, 300)
