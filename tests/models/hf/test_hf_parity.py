"""Folders that transformers wrote, and folders that transformers reads: the same logits and gradients, bit for bit the
same weights."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from their_models import DRAWN, PLAIN, build, saved, transformers
from tokenizers import Tokenizer
from torch import nn

from experiments.data import tokenizer
from models import hf
from models.generation import Sampling, generate
from models.language_model import LanguageModel

LENGTHS = [1, 2, 3, 7, 63, 64, 65, 97]  # below and above the convolution, a window and a chunk of 64
few = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def assert_same_function(ours: LanguageModel, theirs: nn.Module, architecture: str, length: int) -> None:
    """Logits, and the gradient of every parameter."""
    vocabulary = ours.config.vocabulary
    generator = torch.Generator().manual_seed(length)
    inputs, targets = torch.randint(vocabulary, (2, 2, length), generator=generator)
    logits, expected = ours(inputs), theirs(input_ids=inputs, use_cache=False).logits
    assert logits.std() > 0.01  # they say something
    assert (logits - expected).abs().max() < 1e-4
    for out in (logits, expected):
        F.cross_entropy(out.reshape(-1, vocabulary), targets.reshape(-1)).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    gradients = hf.from_tensors(gradients, ours.config, architecture)
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    padding = theirs.config.pad_token_id
    for name, parameter in ours.named_parameters():
        if name == "embedding.weight" and ours.config.tie_embeddings and padding is not None:
            parameter.grad[padding] = gradients[name][padding] = 0  # theirs has the head's share only, ours the whole
        deviation = (parameter.grad - gradients[name]).abs().max()
        assert deviation < 1e-4, name
        assert deviation <= 2e-3 * gradients[name].abs().max() + 1e-7, name


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    mine, other = dict(a.named_parameters()), dict(b.named_parameters())
    assert mine.keys() == other.keys()
    for name in mine:
        assert mine[name].dtype == other[name].dtype, name
        assert torch.equal(mine[name], other[name]), name


def theirs_of(folder: Path) -> nn.Module:
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model


@pytest.mark.parametrize("architecture", DRAWN)
def test_there_and_back(architecture):
    @few
    @given(drawn=DRAWN[architecture], length=st.sampled_from(LENGTHS))
    def check(drawn, length):
        theirs = build(architecture, drawn)
        with tempfile.TemporaryDirectory() as name:
            there, back = Path(name) / "there", Path(name) / "back"
            theirs.save_pretrained(there)
            ours = hf.load(there)
            assert ours.config == hf.read_config(there)
            assert ours.config.vocabulary == drawn["vocab_size"]
            assert (ours.head.weight is ours.embedding.weight) == drawn["tie_word_embeddings"]
            assert_same_function(ours, theirs, architecture, length)
            assert hf.export(ours, back, architecture=architecture) == architecture
            again = theirs_of(back)
            assert type(again) is type(theirs)
            assert_same_weights(theirs, again)
            ours_again = hf.load(back)
            assert ours_again.config == ours.config
            assert_same_weights(ours, ours_again)
            text = torch.zeros(1, 5, dtype=torch.int64)
            assert torch.equal(ours(text), ours_again(text))

    check()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("architecture", PLAIN)
def test_every_length(tmp_path, architecture, length):
    theirs = saved(architecture, tmp_path)
    assert_same_function(hf.load(tmp_path), theirs, architecture, length)


@pytest.mark.parametrize("architecture", PLAIN)
def test_generates_the_same(tmp_path, architecture):
    theirs = saved(architecture, tmp_path, tie_word_embeddings=False)
    prompt = torch.arange(9)[None]
    made = [int(token) for token in generate(hf.load(tmp_path), prompt, 12, Sampling())]
    mask = torch.ones_like(prompt)
    expected = theirs.eval().generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert made == expected[0, 9:].tolist()
    assert len(set(made)) > 1


def test_a_window_is_as_wide_as_theirs(tmp_path):
    """A token sees itself and the window - 1 before it."""
    theirs = saved("Phi3ForCausalLM", tmp_path, num_hidden_layers=1, sliding_window=4).eval()
    ours = hf.load(tmp_path)
    text = torch.arange(9)[None]
    for model in (ours, lambda tokens: theirs(input_ids=tokens, use_cache=False).logits):
        before = model(text)[0, -1]
        seen = []
        for t in range(9):
            changed = text.clone()
            changed[0, t] = 39
            seen.append(not torch.allclose(model(changed)[0, -1], before, atol=1e-6))
        assert seen == [False] * 5 + [True] * 4


@pytest.mark.parametrize("architecture", PLAIN)
def test_16_bit_weights(tmp_path, architecture):
    theirs = build(architecture, PLAIN[architecture]).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "there")
    ours = hf.load(tmp_path / "there")
    assert ours.dtype == torch.bfloat16
    built = LanguageModel(ours.config, seed=None, dtype=torch.bfloat16)
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in built.named_parameters()}
    wide = {name.rpartition(".")[2] for name, p in ours.named_parameters() if p.dtype == torch.float32}
    assert wide == ({"A_log", "D", "dt_bias"} if "Mamba" in architecture else set())
    expected = hf.from_tensors(dict(theirs.named_parameters()), ours.config, architecture)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name
    hf.export(ours, tmp_path / "back")
    assert_same_weights(ours, hf.load(tmp_path / "back"))
    again = theirs_of(tmp_path / "back")
    assert again.dtype == torch.bfloat16
    assert_same_weights(theirs, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("architecture", PLAIN)
def test_a_type_of_ones_own(tmp_path, architecture, dtype):
    saved(architecture, tmp_path)
    ours = hf.load(tmp_path, dtype=dtype)
    built = LanguageModel(ours.config, seed=None, dtype=dtype)
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in built.named_parameters()}
    if dtype.itemsize >= 4:
        expected = hf.load(tmp_path)(torch.arange(11)[None])
        assert (ours(torch.arange(11)[None]) - expected).abs().max() < 1e-4


def test_the_tokenizer_comes_along(tmp_path):
    text = "the cat sees <|endoftext|> rain,\n\tand   music é " * 3
    trained = tokenizer.train([text], 258)
    trained.save(str(tmp_path / "tokenizer.json"))
    for architecture in PLAIN:
        folder = tmp_path / architecture
        theirs = saved(architecture, tmp_path / "from", vocab_size=258)
        ours = hf.load(tmp_path / "from")
        hf.export(ours, folder, tmp_path / "tokenizer.json", settings={"eos_token_id": 0, "bos_token_id": 0})
        there = transformers.AutoTokenizer.from_pretrained(folder)
        expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        expected.encode_special_tokens = True
        assert there(text, split_special_tokens=True).input_ids == expected.encode(text).ids
        assert type(there) is transformers.PreTrainedTokenizerFast  # not the one usual for the architecture
        assert there.decode(there(text).input_ids) == text
        assert there.eos_token_id == theirs_of(folder).generation_config.eos_token_id == 0
        assert type(theirs_of(folder)) is type(theirs)
