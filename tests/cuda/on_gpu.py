"""What the tests on a GPU share: where they run, the models, and by how much numbers may differ."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from experiments.kernels.check import tolerance
from models.config import ModelConfig
from models.language_model import LanguageModel
from models.ops.kernels.tuning import untimed
from models.presets import PRESETS, preset

on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")]
GPU = torch.device("cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Mamba-2 behind its first projection as one operation, which takes channels in eights: the preset has too few heads
CHANGED = {"mamba2-whole": ("mamba2-tiny", {"mixer.head_width": 16})}
TINY = [*(name for name in PRESETS if name.endswith("-tiny")), *CHANGED]
# one text, past two windows and a chunk of 64: Triton compiles some kernels anew for other sizes
VOCABULARY, ROWS, TOKENS = 64, 2, 75
OPINION = 2.0  # weight of the final norm: the first logits are flat, and give a loss of ln V whatever a mixer gives


@pytest.fixture(autouse=True)
def one_configuration() -> Iterator[None]:
    """Of each Triton kernel, as in `lab kernels check`: numbers are compared here, not speed. To try all that Mamba-2's
    and Mamba-3's kernels have takes minutes in each type, longer than everything else. For modules to import."""
    with untimed(GPU):
        yield


def config(name: str) -> ModelConfig:
    base, changes = CHANGED.get(name, (name, {}))
    return preset(base).with_overrides(changes | {"vocabulary": VOCABULARY})


def text(rows: int = ROWS, length: int = TOKENS) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def on_the_cpu(name: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """The definition: every mixer as its readable loop, in float64; its weights are numbers that float32 holds."""
    made = LanguageModel(config(name).with_backend("reference"), seed=0)
    (made.norm or made.blocks[-1].last_norm).reset_parameters(OPINION)
    exact = LanguageModel(made.config, seed=0, dtype=dtype)
    exact.load_state_dict(made.state_dict())
    return exact


def on_the_gpu(name: str, weights: LanguageModel, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The same weights in the forms that `auto` chooses there."""
    made = LanguageModel(config(name), seed=0, device=GPU, dtype=dtype)
    made.load_state_dict(weights.state_dict())
    return made


def allowed(model: LanguageModel, dtype: str) -> float:
    """By what the model's operations multiply in, as `lab kernels check` has it."""
    return max(tolerance(block.mixer.backend.name, block.mixer.operation, dtype) for block in model.blocks)


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of `expected`."""
    expected = expected.detach().cpu().double()
    return ((found.detach().cpu().double() - expected).norm() / expected.norm()).item()
