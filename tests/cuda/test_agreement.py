"""A model on a GPU, in the forms that run there, gives the numbers of its definition in float64 on the CPU."""

import re

import numpy as np
import pytest
import torch
from on_gpu import (
    DTYPES,
    GPU,
    TINY,
    TOKENS,
    VOCABULARY,
    allowed,
    config,
    error,
    on_gpu,
    on_the_cpu,
    on_the_gpu,
    one_configuration,  # noqa: F401 (a fixture)
    text,
)
from torch import Tensor

from experiments import gates
from experiments.data.batches import Batches, StreamHash, on_device
from experiments.kernels.check import TOLERANCES
from experiments.objectives import Objective
from experiments.spec import Training
from experiments.training import autocast, token_loss, train
from models.errors import ConfigError
from models.language_model import LanguageModel
from models.recorded import RecordedDecode
from models.state import ModelState

pytestmark = on_gpu
each_family = pytest.mark.parametrize("name", TINY)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
PIECES = (20, 37)  # of a prompt; what follows it is read step by step, past the window of `sliding`
PROMPT = sum(PIECES)

FORMS = {"mamba": "cuda", "mamba2": "cuda", "mamba3": "cuda", "hybrid": "cuda+sdpa", "lstm": "torch"}


@each_family
def test_the_forms_are_those_of_a_gpu(name: str) -> None:
    """Of what follows, the rest would hold for the fallbacks just as well."""
    chosen = on_the_gpu(name, on_the_cpu(name)).backend
    assert (chosen.name, chosen.fallback) == (FORMS.get(name.partition("-")[0], "sdpa"), None)


def test_mamba_2_is_met_as_one_operation_and_in_parts() -> None:
    whole, parts = (on_the_gpu(name, on_the_cpu(name)).blocks[0].mixer for name in ("mamba2-whole", "mamba2-tiny"))
    assert (whole.is_one_operation, parts.is_one_operation) == (True, False)


def differentiated(model: LanguageModel, precision: str) -> tuple[float, Tensor, dict[str, Tensor]]:
    """The loss in nats, the logits, and the gradient of each parameter."""
    inputs, targets = (x.contiguous().to(model.device) for x in (text()[:, :-1], text()[:, 1:]))
    with autocast(precision, model.device):
        loss, balance = token_loss(model, inputs, targets)
    (loss + balance).backward()
    with torch.no_grad(), autocast(precision, model.device):
        logits = model(inputs)
    return loss.item(), logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_kind(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a parameter in all blocks side by side. Of a block's few numbers, Mamba-2's A_log for one, each is a sum
    over all tokens of terms of both signs; where these happen to cancel, what is left does not measure their rounding.
    """
    kinds: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        kinds.setdefault(re.sub(r"^blocks\.\d+\.", "", name), []).append(gradient.flatten())
    return {kind: torch.cat(parts) for kind, parts in kinds.items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@each_family
def test_loss_logits_and_gradients(name: str, precision: str) -> None:
    """float32, and float32 weights under autocast."""
    exact = on_the_cpu(name)
    model = on_the_gpu(name, exact)
    loss, logits, gradients = differentiated(model, precision)
    expected_loss, expected_logits, expected_gradients = differentiated(exact, "float32")
    limit = allowed(model, precision)
    assert abs(loss - expected_loss) <= limit
    assert error(logits, expected_logits) <= limit
    assert gradients.keys() == expected_gradients.keys()
    found, expected = by_kind(gradients), by_kind(expected_gradients)
    errors = {kind: error(found[kind], expected[kind]) for kind in found}
    assert {kind: e for kind, e in errors.items() if not e <= limit} == {}


def curve(model: LanguageModel) -> tuple[list[float], str]:
    settings = Training(context=24, batch=4, steps=30, warmup_steps=3)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 200).astype("<u2")  # few, so that they are learned
    batches, stream = Batches(tokens, context=24, batch=4, seed=0), StreamHash()
    steps = train(model, batches, settings, 4e-3, stream, Objective("causal", VOCABULARY))
    return [step.loss for step in steps], stream.hexdigest()


CURVES = 1e-3  # nats; on a CPU float32 gives 1e-6, and an error of 0.1% in a weight 3e-3


@pytest.mark.parametrize("name", ["transformer-tiny", "mamba-tiny"])
def test_curves_of_training_overlay(name: str) -> None:
    exact = on_the_cpu(name)
    model = on_the_gpu(name, exact)
    (found, consumed), (expected, same) = curve(model), curve(exact)
    assert consumed == same
    assert expected[-1] < 0.8 * expected[0]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < CURVES


@each_family
def test_the_gates_pass(name: str) -> None:
    model = LanguageModel(config(name), seed=0, device=GPU)
    checked = gates.check(model, text()[:, :24].to(GPU))
    assert len(checked) == 4
    checked += [gates.check_gradients(model, text()[:, :-1].to(GPU), text()[:, 1:].to(GPU), kind) for kind in DTYPES]
    assert [gate for gate in checked if not gate.passed] == []


def prompted(model: LanguageModel, tokens: Tensor) -> tuple[list[Tensor], ModelState]:
    """The logits after each piece of the prompt, and the state after all of it."""
    state, after = model.make_state(len(tokens), TOKENS), []
    for piece in tokens[:, :PROMPT].split(PIECES, 1):
        logits, state = model.prefill(piece.contiguous(), state)
        after.append(logits)
    return after, state


@each_dtype
@each_family
def test_a_prompt_in_pieces_and_steps_give_what_the_whole_text_gives(name: str, dtype: str) -> None:
    """All against the definition with the weights that the GPU has."""
    exact = on_the_cpu(name)
    model = on_the_gpu(name, exact, DTYPES[dtype]).eval()
    exact.load_state_dict(model.state_dict())
    tokens = text().to(GPU)
    with torch.inference_mode():
        whole, expected = model(tokens), exact(text())
        found, state = prompted(model, tokens)
        for token in tokens[:, PROMPT:].unbind(1):
            logits, state = model.step(token, state)
            found.append(logits)
    assert state.length == TOKENS
    assert whole.dtype == DTYPES[dtype]
    limit = allowed(model, dtype)
    assert error(whole, expected) <= limit
    assert error(torch.stack(found, 1), expected[:, [PIECES[0] - 1, *range(PROMPT - 1, TOKENS)]]) <= limit


RECORDED = [(name, dtype) for name in TINY for dtype in DTYPES if (name, dtype) != ("moe-tiny", "float32")]


@pytest.mark.parametrize(("name", "dtype"), RECORDED)  # experts in float32 need the host: tests/models/test_recorded.py
def test_a_recorded_step_gives_the_numbers_of_the_ordinary_one(name: str, dtype: str) -> None:
    model = on_the_gpu(name, on_the_cpu(name), DTYPES[dtype]).eval()
    tokens, found, expected = text().to(GPU), [], []
    with torch.inference_mode():
        _, state = prompted(model, tokens)
        start = state.clone()
        recorded = RecordedDecode(model, state.clone(), TOKENS)
        for token in tokens[:, PROMPT:].unbind(1):
            logits, state = model.step(token, state)
            expected.append(logits)
            found.append(recorded.step(token).clone())
        with pytest.raises(ConfigError, match="raise the limit"):
            recorded.step(tokens[:, 0])
        recorded.load(start)
        again = recorded.step(tokens[:, PROMPT])
    assert error(torch.stack(found), torch.stack(expected)) <= TOLERANCES[dtype]
    assert error(again, expected[0]) <= TOLERANCES[dtype]


def test_a_batch_goes_to_the_gpu_while_the_host_goes_on() -> None:
    batch = torch.arange(1 << 22).view(4, -1), torch.arange(1 << 22).view(4, -1) + 1
    sum(x.sum() for x in on_device(batch, GPU)).item()  # the first time takes memory, here and there
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second
    there = on_device(batch, GPU)
    assert not torch.cuda.current_stream().query()  # it still sleeps
    for x, y in zip(there, batch, strict=True):
        assert torch.equal(x.cpu(), y)
