"""The whole model: where norms stand, learned positions, dropout, padding, what is reported of experts."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models import cost
from models.config import ModelConfig
from models.errors import ConfigError
from models.feedforward.mlp import MLPConfig
from models.feedforward.moe import MoEConfig
from models.feedforward.swiglu import SwiGLUConfig
from models.language_model import LanguageModel
from models.mixers.attention import AttentionConfig
from models.mixers.mamba import MambaConfig
from models.presets import PRESETS, preset

FAMILIES = [name for name in PRESETS if name.endswith("-tiny")]
GPT1 = preset("gpt1").with_overrides({"vocabulary": 40, "width": 24, "layers": 2, "feedforward.hidden": 32})


def tokens(rows: int, length: int, vocabulary: int = 40) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_gpt1_by_hand():
    """LN(attention(x) + x), then LN(MLP(x) + x); no norm before the head, which has a bias."""
    model = LanguageModel(GPT1, seed=0, dtype=torch.float64).eval()
    for parameter in model.parameters():  # biases and norms that cannot be mistaken
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    text = tokens(2, 9)
    p = dict(model.named_parameters())
    x = p["embedding.weight"][text] + p["positions.weight"][:9]
    for i in range(2):
        at = {name.removeprefix(f"blocks.{i}."): value for name, value in p.items() if name.startswith(f"blocks.{i}.")}
        qkv = x @ at["mixer.qkv_proj.weight"].t() + at["mixer.qkv_proj.bias"]
        q, k, v = (m.view(2, 9, 8, 3).transpose(1, 2) for m in qkv.split(24, -1))
        scores = (q @ k.mT / 3**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 9, 24)
        y = y @ at["mixer.o_proj.weight"].t() + at["mixer.o_proj.bias"]
        x = F.layer_norm(x + y, (24,), at["mixer_norm.weight"], at["mixer_norm.bias"], 1e-5)
        y = torch.relu(x @ at["feedforward.up_proj.weight"].t() + at["feedforward.up_proj.bias"])
        y = y @ at["feedforward.down_proj.weight"].t() + at["feedforward.down_proj.bias"]
        x = F.layer_norm(x + y, (24,), at["feedforward_norm.weight"], at["feedforward_norm.bias"], 1e-5)
    expected = x @ p["head.weight"].t() + p["head.bias"]
    torch.testing.assert_close(model(text), expected, rtol=1e-10, atol=1e-10)
    assert model.norm is None


@torch.no_grad()
def test_a_pre_norm_block_by_hand():
    config = ModelConfig(
        vocabulary=40, width=24, layers=1, mixer=MambaConfig(state=4), feedforward=MLPConfig(activation="gelu")
    )
    model = LanguageModel(config, seed=0, dtype=torch.float64)
    block, text = model.blocks[0], tokens(2, 9)
    x = model.embedding.weight[text]
    x = x + block.mixer(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))[0]
    h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    h = h @ block.feedforward.up_proj.weight.t()
    x = x + (h * 0.5 * (1 + torch.erf(h / 2**0.5))) @ block.feedforward.down_proj.weight.t()
    x = 0.25 * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(model(text), x @ model.embedding.weight.t(), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_learned_positions_are_added_where_the_text_stands():
    model = LanguageModel(GPT1, seed=0).eval()
    text = torch.full((1, 12), 7)
    x = model.embed(text)
    torch.testing.assert_close(x[0] - model.embedding.weight[7], model.positions.weight[:12], rtol=1e-5, atol=1e-6)
    assert torch.equal(model.embed(text[:, :3], 9), x[:, 9:])
    assert torch.equal(model.embed(text[:, 0], 9), x[:, 9])
    whole = model(text)
    logits, state = model.prefill(text[:, :5], model.make_state(1, 12))
    torch.testing.assert_close(logits, whole[:, 4], rtol=1e-4, atol=1e-5)
    logits, state = model.prefill(text[:, 5:10], state)
    torch.testing.assert_close(logits, whole[:, 9], rtol=1e-4, atol=1e-5)
    for t in (10, 11):
        logits, state = model.step(text[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-4, atol=1e-5)
    assert (whole[0, 0] - whole[0, 5]).abs().max() > 1e-3  # the same token, another place


@torch.no_grad()
def test_beyond_the_last_position_is_one_line():
    model = LanguageModel(preset("gpt1"), seed=0)
    assert model(tokens(1, 100)).shape == (1, 100, 1000)
    with pytest.raises(ConfigError, match=r"has 100 learned positions, 101 tokens were given: use fewer") as caught:
        model(tokens(1, 101))
    assert "\n" not in str(caught.value)
    _, state = model.prefill(tokens(1, 100), model.make_state(1, 120))
    with pytest.raises(ConfigError, match=r"has 100 learned positions, 101 tokens"):
        model.step(tokens(1, 1)[:, 0], state)
    with pytest.raises(ConfigError, match=r"has 100 learned positions, 103 tokens"):
        model.prefill(tokens(1, 3), state)


@torch.no_grad()
@pytest.mark.parametrize("post_norm", [False, True])
def test_dropout_is_on_in_training_and_off_otherwise(post_norm):
    config = replace(GPT1, post_norm=post_norm, dropout=0.3)
    model, plain = LanguageModel(config, seed=0), LanguageModel(replace(config, dropout=0.0), seed=0)
    text = tokens(2, 9)
    assert model.training
    assert not torch.equal(model(text), model(text))
    torch.manual_seed(4)
    first = model(text)
    torch.manual_seed(4)
    assert torch.equal(model(text), first)
    model.eval()
    assert torch.equal(model(text), model(text))
    assert torch.equal(model(text), plain(text))
    assert torch.equal(plain(text), plain.eval()(text))


@torch.no_grad()
def test_dropout_strikes_the_embedding_and_each_branch():
    """As many as there are: a whole branch dropped leaves what stood before it."""
    config = ModelConfig(
        vocabulary=40, width=512, layers=1, mixer=AttentionConfig(heads=2), feedforward=SwiGLUConfig(), dropout=0.25
    )
    model, seen = LanguageModel(config, seed=0), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, given, out: seen.append((given[0], out)))
    model(tokens(2, 9))
    assert len(seen) == 3
    for given, out in seen:
        dropped = out == 0
        assert dropped.float().mean() == pytest.approx(0.25, abs=0.03)
        torch.testing.assert_close(out[~dropped], given[~dropped] / 0.75)


def test_padding_stays_zero_and_has_no_gradient():
    config = ModelConfig(
        vocabulary=40, width=24, layers=1, mixer=AttentionConfig(heads=4), tie_embeddings=False, padding_index=7
    )
    model = LanguageModel(config, seed=0)
    assert model.embedding.weight[7].tolist() == [0.0] * 24
    assert (model.embedding.weight.abs().amax(1) == 0).sum() == 1
    optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=0.1)
    text = torch.tensor([[7, 3, 7, 9]])
    for _ in range(3):
        model(text).square().sum().backward()
        assert model.embedding.weight.grad[7].abs().max() == 0
        assert model.embedding.weight.grad[3].abs().max() > 0
        assert model.head.weight.grad[7].abs().max() > 0  # it may be predicted, all the same
        optimizer.step()
        optimizer.zero_grad()
    assert model.embedding.weight[7].tolist() == [0.0] * 24


def test_one_routing_for_each_layer_of_experts():
    config = ModelConfig(
        vocabulary=40, width=24, layers=3, mixer=AttentionConfig(heads=4), feedforward=MoEConfig(experts=5, hidden=8)
    )
    routing = LanguageModel(config, seed=0).hidden(tokens(2, 9)).routing
    assert [tuple(used.load.shape) for used in routing] == [(5,)] * 3
    assert all(used.load.sum().item() == pytest.approx(1) for used in routing)
    assert LanguageModel(replace(config, feedforward=SwiGLUConfig()), seed=0).hidden(tokens(2, 9)).routing == ()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_causal_and_decodes(name):
    model = LanguageModel(preset(name), seed=0)
    text = tokens(2, 40, 512)
    whole = model(text)
    changed = text.clone()
    changed[:, 25] = (changed[:, 25] + 1) % 512
    after = model(changed)
    if name.startswith("moe"):  # how many tokens share an expert decides how its products are summed
        assert (after[:, :25] - whole[:, :25]).abs().max() < 2e-6
    else:
        assert torch.equal(after[:, :25], whole[:, :25])
    assert (after[:, 25] - whole[:, 25]).abs().max() > 1e-3
    logits, state = model.prefill(text[:, :33], model.make_state(2, 40))
    torch.testing.assert_close(logits, whole[:, 32], rtol=1e-4, atol=2e-5)
    for t in range(33, 40):
        logits, state = model.step(text[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=1e-4, atol=2e-5)
    assert state.length == 40


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_gradients_of_its_reference(name):
    gradients = []
    for config in (preset(name), preset(name).with_backend("reference")):
        model = LanguageModel(config, seed=0, dtype=torch.float64)
        F.cross_entropy(model(tokens(2, 21, 512)).flatten(0, 1), tokens(1, 42, 512)[0]).backward()
        gradients.append({what: parameter.grad for what, parameter in model.named_parameters()})
    for what, expected in gradients[1].items():
        if expected is not None:
            assert (gradients[0][what] - expected).abs().max() < 1e-10 * expected.abs().max(), what


def test_the_first_steps_of_every_family_learn():
    """A text of one repeated pattern: after a few steps the loss is far below that of a guess."""
    text = torch.arange(8).repeat(4, 5)
    for name in [*FAMILIES, "gpt1"]:
        model = LanguageModel(preset(name).with_overrides({"vocabulary": 16, "dropout": 0.0}), seed=0)
        optimizer = torch.optim.AdamW(model.parameter_groups(0.0), lr=1e-2 if name != "gpt1" else 3e-3)
        for _ in range(12):
            loss = F.cross_entropy(model(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 1.0, f"{name}: {loss.item():.2f} of 2.77"


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformer-tiny", "mamba-tiny", "mamba2-tiny", "mamba3-tiny", "hybrid-tiny"])
def test_a_cast_model_keeps_in_float32_what_a_mixer_wants_so(name):
    model = LanguageModel(preset(name), seed=0)
    for parameter in model.parameters():
        parameter.add_(torch.rand(parameter.shape) * 1e-3)  # no number that bfloat16 holds already
    half = model.cast(torch.bfloat16)
    assert (half.dtype, half.config, half.backend) == (torch.bfloat16, model.config, model.backend)
    assert half.head.weight is half.embedding.weight
    assert sum(p.nbytes for p in half.parameters()) == cost.weight_bytes(model.config, 2)
    for found, exact in zip(half.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, exact if found.dtype is torch.float32 else exact.bfloat16())
        assert not (found.dtype is torch.bfloat16 and torch.equal(found.float(), exact))
    tokens = torch.arange(9)[None]
    assert torch.equal(model.cast(torch.float32)(tokens), model(tokens))
    assert 0 < (half(tokens).float() - model(tokens)).abs().max() < 0.1
