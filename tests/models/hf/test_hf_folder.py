"""Folders in Hugging Face's form: shards, damage, types; each mistake one line that names what is wrong."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from their_models import PLAIN, saved

from models import checkpoint, folders, hf
from models.errors import ConfigError
from models.language_model import LanguageModel
from models.presets import PRESETS

LLAMA, PHI3, MAMBA, MAMBA2 = PLAIN
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def refused(folder: Path, *said: str, **options) -> None:
    with pytest.raises(ConfigError) as caught:
        hf.load(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.count(str(folder)) == 1
    for part in said:
        assert part in message


@pytest.fixture
def folder(tmp_path):
    saved(LLAMA, tmp_path)
    return tmp_path


def change(folder: Path, change) -> None:
    """Rewrite the tensors of a folder."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def assert_same(a: LanguageModel, b: LanguageModel) -> None:
    mine, other = a.state_dict(), b.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("architecture", PLAIN)
def test_shards(tmp_path, architecture):
    theirs = saved(architecture, tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="2KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same(hf.load(tmp_path / "whole"), hf.load(tmp_path / "shards"))


@pytest.fixture
def shards(tmp_path):
    saved(LLAMA, tmp_path / "whole").save_pretrained(tmp_path / "shards", max_shard_size="2KB")
    return tmp_path / "shards"


def test_a_missing_shard(shards):
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    refused(shards, f"'{gone.name}' is missing")


def test_a_truncated_shard(shards):
    short = sorted(shards.glob("*.safetensors"))[1]
    short.write_bytes(short.read_bytes()[:-10])
    refused(shards, "damaged weights", short.name)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "damaged"),
        ("[]", "must hold a table"),
        ("{}", "needs a weight_map"),
        ('{"weight_map": {}}', "needs a weight_map"),
        ('{"weight_map": {"a": 3}}', "needs a weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "only safetensors in the folder itself"),
        ('{"weight_map": {"a": "/tmp/model.safetensors"}}', "only safetensors in the folder itself"),
        ('{"weight_map": {"a": "model.bin"}}', "only safetensors in the folder itself"),
    ],
)
def test_a_bad_index(shards, index, said):
    (shards / INDEX).write_text(index)
    refused(shards, said)


def test_a_tensor_in_two_shards(shards):
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second)
    refused(shards, "is there twice, the second time in " + second.name)


GARBAGE = [b"", b"{", b"not json", b"\xff\xfe\x00", b"[]", b"3", b"null", b'"text"', b"[" * 99999]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_instead_of_a_configuration(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json")


def test_nothing_there(tmp_path):
    refused(tmp_path / "nowhere", "config.json is missing")
    refused(tmp_path, "config.json is missing")


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, f"has no weights: {WEIGHTS} or {INDEX} is missing")


class Trap:
    def __reduce__(self):
        return (os._exit, (17,))


def test_pickles_are_not_read(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(folder, "only pickled weights (pytorch_model.bin)", "save the model as safetensors")


def test_code_in_a_folder_is_not_run(folder):
    configure(folder, auto_map={"AutoModelForCausalLM": "trap.Trap"})
    (folder / "trap.py").write_text("import os\nos._exit(17)\n")
    hf.load(folder)
    assert "trap" not in sys.modules


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_weights(folder, share):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(len(content) * share)])
    refused(folder, "damaged weights", WEIGHTS)


def test_missing_extra_and_misshapen_tensors(folder):
    def spoil(tensors):
        for i in range(2):
            del tensors[f"model.layers.{i}.self_attn.q_proj.weight"]
            del tensors[f"model.layers.{i}.mlp.up_proj.weight"]
        tensors["model.layers.2.input_layernorm.weight"] = torch.zeros(16)
        tensors["model.norm.weight"] = torch.zeros(15)

    change(folder, spoil)
    refused(
        folder,
        "the tensors do not fit config.json: 4 missing: 'model.layers.0.self_attn.q_proj.weight', ",
        " and 1 more",
        "1 not of this model: 'model.layers.2.input_layernorm.weight'",
        "1 of another shape: 'model.norm.weight' (expected (16,), found (15,))",
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 41}, "'model.embed_tokens.weight' (expected (41, 16), found (40, 16))"),
        ({"num_hidden_layers": 1}, "9 not of this model: 'model.layers.1."),
        ({"num_key_value_heads": 4}, "self_attn.k_proj.weight' (expected (16, 16), found (8, 16))"),
        ({"head_dim": 6}, "self_attn.q_proj.weight' (expected (24, 16), found (16, 16))"),
        ({"attention_bias": True}, "8 missing: 'model.layers.0.self_attn.q_proj.bias'"),
        ({"architectures": [PHI3], "model_type": "phi3"}, "self_attn.qkv_proj.weight'"),
    ],
    ids=str,
)
def test_another_shape(folder, changes, said):
    configure(folder, **changes)
    refused(folder, said)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("asked", [None, torch.float32])
def test_not_floating_point(folder, dtype, asked):
    name = "model.layers.1.mlp.down_proj.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(folder, f"'{name}' has type", "weights must be floating point", dtype=asked)


def test_mixed_types(folder):
    name = "model.layers.1.input_layernorm.weight"
    whole = hf.load(folder)
    change(folder, lambda tensors: tensors.update({name: tensors[name].double()}))
    refused(folder, f"'model.embed_tokens.weight' is float32, '{name}' float64; say which with dtype")
    assert_same(hf.load(folder, dtype=torch.float32), whole)


@pytest.mark.parametrize("architecture", [MAMBA, MAMBA2])
def test_16_bit_weights_beside_wide_ones(tmp_path, architecture):
    """As an export of ours has them."""
    saved(architecture, tmp_path)
    kept = ("A_log", ".D", "dt_bias", "dt_proj.bias")
    change(tmp_path, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items() if not n.endswith(kept)}))
    assert hf.load(tmp_path).dtype == torch.float16
    change(tmp_path, lambda tensors: tensors.update({n: t.double() for n, t in tensors.items() if n.endswith(kept)}))
    refused(tmp_path, "types are mixed")


@pytest.mark.parametrize("architecture", PLAIN)
def test_a_tied_head_in_the_file(tmp_path, architecture):
    saved(architecture, tmp_path, tie_word_embeddings=True)
    expected = hf.load(tmp_path)
    embedding = "model.embed_tokens.weight" if "Mamba" not in architecture else "backbone.embeddings.weight"
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    ours = hf.load(tmp_path)
    assert ours.head.weight is ours.embedding.weight
    assert_same(ours, expected)
    change(tmp_path, lambda tensors: tensors.pop(embedding))  # transformers ties the other way round then
    assert_same(hf.load(tmp_path), expected)
    change(tmp_path, lambda tensors: tensors.update({embedding: tensors["lm_head.weight"] + 1}))
    refused(tmp_path, "tie_word_embeddings = true, but 'lm_head.weight' differs")


@pytest.mark.parametrize("architecture", PLAIN)
def test_an_untied_head_that_is_missing(tmp_path, architecture):
    saved(architecture, tmp_path, tie_word_embeddings=False)
    change(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    refused(tmp_path, "1 missing: 'lm_head.weight'")


@pytest.mark.parametrize("architecture", [MAMBA, MAMBA2])
def test_the_spelling_of_mamba_ssm(tmp_path, architecture):
    saved(architecture, tmp_path)
    expected = hf.load(tmp_path)
    name = "backbone.embeddings.weight"
    change(tmp_path, lambda tensors: tensors.update({name.replace("embeddings", "embedding"): tensors.pop(name)}))
    assert_same(hf.load(tmp_path), expected)
    change(tmp_path, lambda tensors: tensors.update({name: torch.zeros(40, expected.config.width)}))
    refused(tmp_path, f"'{name}' is there twice")


def test_old_buffers_are_passed_over(folder):
    expected = hf.load(folder)
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}))
    assert_same(hf.load(folder), expected)


def test_a_padded_vocabulary_is_preserved(tmp_path):
    saved(MAMBA, tmp_path, vocab_size=104, pad_vocab_size_multiple=8)
    ours = hf.load(tmp_path)
    assert ours.config.vocabulary == 104
    assert ours(torch.arange(4)[None]).shape == (1, 4, 104)


def test_a_model_can_be_trained(folder):
    ours = hf.load(folder)
    before = ours.embedding.weight.detach().clone()
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    ours(torch.arange(8)[None]).square().sum().backward()
    optimizer.step()
    assert not torch.equal(ours.embedding.weight, before)
    assert torch.equal(hf.load(folder).embedding.weight, before)  # the file is not written through


MEMORY = """
import sys, torch
from pathlib import Path
from experiments.measurement.memory import PeakMemory, resident_bytes, settle
from models import hf
def own():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
def load(name, dtype):
    model = hf.load(Path(sys.argv[1]) / name, dtype=dtype)
    for parameter in model.parameters():
        parameter.sum()
    return model
for dtype in (None, torch.bfloat16):
    load("small", dtype)  # code and libraries
for name, dtype in (("large", None), ("shards", None), ("large", torch.bfloat16)):
    settle()
    before = resident_bytes(), own()
    with PeakMemory(torch.device("cpu")) as memory:
        model = load(name, dtype)
    print(memory.host_bytes - before[0], own() - before[1], sum(p.nbytes for p in model.parameters()))
    del model
"""
LARGE = {
    LLAMA: {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 4000, "num_hidden_layers": 6},
    PHI3: {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 4000, "num_hidden_layers": 6},
    MAMBA: {"hidden_size": 512, "vocab_size": 4000, "num_hidden_layers": 12},
    MAMBA2: {"hidden_size": 512, "num_heads": 8, "head_dim": 128, "vocab_size": 4000, "num_hidden_layers": 12},
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("architecture", PLAIN)
def test_no_second_copy(tmp_path, architecture):
    """The peak, the file's pages included, is little more than the weights: as the file has them, from several files,
    and converted. What is taken as the file has it is not the process's own."""
    theirs = saved(architecture, tmp_path / "large", **LARGE[architecture])
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20MB")
    saved(architecture, tmp_path / "small")
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=Path.cwd())
    joined = 0.7 if architecture == LLAMA else 0.0
    for line, copied in zip(done.stdout.splitlines(), (joined, joined, 1.0), strict=True):
        peak, own, size = map(int, line.split())
        assert size > 35e6
        assert size < peak < 1.15 * size + 2e6  # 2 MB: Python's own, and pages beside those asked for
        assert own < (copied + 0.1) * size


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", PLAIN)
def test_on_a_gpu(tmp_path, architecture, dtype):
    saved(architecture, tmp_path)
    ours = hf.load(tmp_path, "cuda", dtype)
    assert {parameter.device.type for parameter in ours.parameters()} == {"cuda"}
    assert_same(ours.cpu(), hf.load(tmp_path, dtype=dtype))


def test_export_writes_nothing_for_a_model_without_counterpart(tmp_path):
    with pytest.raises(ConfigError, match="mixer 'lstm'"):
        hf.export(LanguageModel(PRESETS["lstm-tiny"], seed=0), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_exported(tmp_path):
    model = LanguageModel(PRESETS["mamba-tiny"], seed=0)
    hf.export(model, tmp_path, settings={"eos_token_id": 5})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    header = (tmp_path / WEIGHTS).read_bytes()
    header = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}
    assert "lm_head.weight" not in header
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["eos_token_id"], values["dtype"]) == (5, "float32")


def test_either_kind_of_folder(tmp_path):
    model = LanguageModel(PRESETS["mamba-tiny"], seed=0)
    checkpoint.save(model, tmp_path / "ours")
    hf.export(model, tmp_path / "theirs")
    for name in ("ours", "theirs"):
        assert folders.is_model(tmp_path / name)
        assert folders.read_config(tmp_path / name) == model.config
        assert folders.configuration(str(tmp_path / name)) == model.config
        assert_same(folders.load(tmp_path / name), model)


def test_a_name_or_a_folder(tmp_path, monkeypatch):
    checkpoint.save(LanguageModel(PRESETS["mamba-tiny"], seed=0), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert folders.configuration("mine") == folders.configuration("./mine") == PRESETS["mamba-tiny"]
    (tmp_path / "transformer-1m").mkdir()  # a preset goes before a folder of its name
    assert folders.configuration("transformer-1m") == PRESETS["transformer-1m"]
    for name, said in (
        ("mamba-tinny", "unknown model 'mamba-tinny': did you mean 'mamba-tiny'?"),
        ("./mamba-tiny", "mamba-tiny is no checkpoint: config.json is missing"),
    ):
        with pytest.raises(ConfigError) as caught:
            folders.configuration(name)
        assert said in str(caught.value)


@pytest.mark.parametrize("content", ['{"d_model": 3}', "{}", "[]", "{"])
def test_of_neither_kind(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for call in (folders.load, folders.read_config, lambda path: folders.configuration(str(path))):
        with pytest.raises(ConfigError) as caught:
            call(tmp_path)
        assert str(caught.value).count(str(tmp_path)) == 1
        assert "\n" not in str(caught.value)


def test_the_tokenizer_of_a_folder(folder):
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        folders.tokenizer_file(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert folders.tokenizer_file(folder) == folder / "tokenizer.json"
