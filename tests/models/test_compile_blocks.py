"""Compiled block by block: the numbers of the plain model, from one compilation for all blocks and all positions."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from models import compiled, ops
from models.compiled import compile_blocks
from models.config import ModelConfig
from models.feedforward.swiglu import SwiGLUConfig
from models.language_model import LanguageModel
from models.mixers.attention import AttentionConfig
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config
from models.mixers.mamba3 import Mamba3Config
from models.ops.kernels import reference_form, torch_form
from models.recorded import RepeatableStep

MIXERS = {
    "attention": AttentionConfig(heads=4, kv_heads=2, backend="sdpa"),
    "ring": AttentionConfig(heads=4, window=4, backend="sdpa"),
    "mamba": MambaConfig(state=4, backend="torch"),
    "mamba2": Mamba2Config(head_width=8, state=6, backend="torch"),
}
STEPPING = MIXERS | {
    "mamba2 in groups": Mamba2Config(head_width=8, state=6, groups=2, backend="torch"),
    "mamba3": Mamba3Config(head_width=8, state=8, backend="torch"),
}
PROMPT, LIMIT, VOCABULARY = 5, 12, 23


@pytest.fixture
def frames(monkeypatch):
    """Counts compilations, by a backend that needs no compiler of C++."""
    torch.compiler.reset()
    counter, compile_ = CompileCounterWithBackend("aot_eager"), torch.compile

    counter.options = []

    def compile_counted(function, *, options, **how):  # the options are those of another backend
        counter.options.append(options)
        return compile_(function, backend=counter, **how)

    monkeypatch.setattr(compiled.torch, "compile", compile_counted)
    settings, keys = torch._dynamo.config, torch.compiler.config
    limits = {"recompile_limit": settings.recompile_limit, "fail_on_recompile_limit_hit": False}
    with settings.patch(**limits), keys.patch(cache_key_tag=keys.cache_key_tag):
        yield counter  # what it sets does not outlive the test
    torch.compiler.reset()


def model(mixer, layers: int = 3) -> LanguageModel:
    feedforward = SwiGLUConfig(hidden=24)
    config = ModelConfig(vocabulary=VOCABULARY, width=32, layers=layers, mixer=mixer, feedforward=feedforward)
    made = LanguageModel(config, seed=3, dtype=torch.float64)
    for part in made.modules():  # what surrounds the mixers would be the CPU's own kernels
        if hasattr(part, "ops") and part.ops is not reference_form:
            part.ops = torch_form
    return made


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, LIMIT), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MIXERS)
def test_a_compiled_trunk_has_the_plain_ones_outputs_and_gradients(name, frames):
    plain, made, one = model(MIXERS[name]), model(MIXERS[name]), model(MIXERS[name], layers=1)
    compile_blocks(one, "forward")
    one(tokens())
    of_one_block, frames.frame_count = frames.frame_count, 0
    torch.compiler.reset()
    compile_blocks(made, "forward")
    found = []
    for one in (plain, made):
        logits = one(tokens())
        logits.sin().sum().backward()
        found.append([logits, *(p.grad for p in one.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert 0 < frames.frame_count == of_one_block


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", STEPPING)
def test_a_compiled_step_is_compiled_once_for_every_block_position_and_prompt(name, rows, frames):
    """One row is traced otherwise; norms with weights, whose place in a product counts."""
    plain, made = model(STEPPING[name]).eval(), model(STEPPING[name]).eval()
    for one in (plain, made):
        for parameter in one.parameters():
            if parameter.ndim == 1:
                parameter.data += torch.linspace(-0.3, 0.3, len(parameter), dtype=parameter.dtype)
    with torch.inference_mode():
        text = tokens(rows)
        prompts = PROMPT, PROMPT + 2
        states = [
            [one.prefill(text[:, :read], one.make_state(rows, LIMIT))[1] for one in (plain, made)] for read in prompts
        ]
        compile_blocks(made, "step")
        for read, (state, own) in zip(prompts, states, strict=True):
            repeated, now = RepeatableStep(made, own, LIMIT), state
            for token in text[:, read:].unbind(1):
                expected, now = plain.step(token, now)
                torch.testing.assert_close(repeated.step(token), expected, rtol=1e-10, atol=1e-11)
    assert frames.frame_count == 2  # and of what stands after the blocks


def test_where_torch_would_stop_compiling_there_is_an_error(frames, monkeypatch):
    """An ordinary step is another one at every position."""
    monkeypatch.setattr(compiled, "MOST_VERSIONS", 3)
    made = model(MIXERS["attention"]).eval()
    with torch.inference_mode():
        state = made.prefill(tokens()[:, :PROMPT], made.make_state(2, LIMIT))[1]
        compile_blocks(made, "step")
        for token in tokens()[:, PROMPT : PROMPT + 3].unbind(1):
            _, state = made.step(token, state)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            made.step(tokens()[:, -1], state)


@pytest.mark.parametrize("method", ["forward", "step"])
def test_only_a_step_is_compiled_with_its_products_as_sums(method, frames):
    compile_blocks(model(MIXERS["mamba"], layers=2), method)
    expected = {"forward": [None] * 2, "step": [{"coordinate_descent_tuning": True, "triton.enable_pdl": True}] * 3}
    assert frames.options == expected[method]
    known = torch._inductor.list_options()
    assert all(name in known for options in frames.options if options for name in options)


def test_what_torch_keeps_on_disk_is_of_this_code_and_these_libraries(frames, monkeypatch, tmp_path):
    """torch puts the tag into the key of what it compiled; of an operator, nothing else but its name."""
    compile_blocks(model(MIXERS["mamba"], layers=1), "forward")
    assert torch.compiler.config.cache_key_tag == compiled.operators_version()
    found = {compiled.operators_version()}
    for changed in ("version", "code", "name"):
        if changed == "version":
            monkeypatch.setattr(compiled.metadata, "version", lambda library: "2.3.3")
        else:
            copy = shutil.copytree(Path(ops.__file__).parent, tmp_path / changed)
            file = copy / "kernels" / "cuda_operators.py"
            file.write_text(file.read_text() + "#") if changed == "code" else file.rename(copy / "other.py")
            monkeypatch.setattr(compiled, "ops", SimpleNamespace(__file__=str(copy / "__init__.py")))
        found.add(compiled.operators_version.__wrapped__())
    assert len(found) == 4
