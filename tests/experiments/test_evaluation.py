"""Bits per byte against values computed by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from experiments.data.dataset import TokenSplit
from experiments.errors import CorpusError
from experiments.evaluation import evaluate, mean_loss

V = 32


class Stub(nn.Module):
    """Logits that favour the token that equals the input by `favour` nats over all others."""

    device = torch.device("cpu")

    def __init__(self, favour: float = 0.0) -> None:
        super().__init__()
        self.favour = favour

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.favour * nn.functional.one_hot(tokens, V).float()


def split(tokens: np.ndarray, size: int = 100) -> TokenSplit:
    return TokenSplit(tokens=tokens.astype("<u2"), bytes=size, documents=1, sha256="")  # type: ignore[arg-type]


def run(model: nn.Module, tokens: np.ndarray, context: int = 8, batch: int = 3, size: int = 100):
    return evaluate(model, split(tokens, size), context=context, batch=batch, precision="float32")  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [9, 41, 44, 50])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_uniform_model(length: int, batch: int) -> None:
    quality = run(Stub(), np.arange(length) % V, batch=batch, size=77)
    assert quality.tokens == length - 1
    assert quality.bits_per_byte == pytest.approx(math.log2(V) * (length - 1) / 77, rel=1e-6)
    assert quality.nats_per_token == pytest.approx(math.log(V), rel=1e-6)
    assert quality.token_perplexity == pytest.approx(V, rel=1e-5)
    assert quality.loss_at_position == pytest.approx([math.log(V)] * 8, rel=1e-6)
    assert quality.windows == (length - 1) // 8
    assert quality.bytes == 77


def test_known_losses_by_position_and_in_total() -> None:
    favour = 3.0
    # a token repeats its predecessor at every even place: targets at positions 1, 3, 5, 7 of a window of 8 miss
    tokens = np.arange(33) // 2 % V
    hit = math.log(math.exp(favour) + V - 1) - favour
    miss = math.log(math.exp(favour) + V - 1)
    quality = run(Stub(favour), tokens)
    assert quality.loss_at_position == pytest.approx([hit, miss] * 4, rel=1e-5)
    assert quality.bits_per_byte == pytest.approx(16 * (hit + miss) / math.log(2) / 100, rel=1e-5)


def test_the_model_is_left_in_its_mode() -> None:
    model = Stub().train()
    run(model, np.arange(20) % V)
    assert model.training
    model.eval()
    run(model, np.arange(20) % V)
    assert not model.training


def test_too_short_is_an_error() -> None:
    with pytest.raises(CorpusError, match="context = 8 needs 9"):
        run(Stub(), np.arange(8) % V)
    with pytest.raises(CorpusError, match="context = 8 needs 9"):
        mean_loss(Stub(), split(np.arange(8)), context=8, sequences=2, precision="float32")  # type: ignore[arg-type]
