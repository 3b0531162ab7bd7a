"""One training step (forward, loss, backward, clip, AdamW) of our models against Hugging Face's, on the CPU.

    python -m benchmarks.training [--json]

Shape: 8 x 256 tokens, about 4.5M parameters, vocabulary 4096, float32; then our two arms at longer contexts.
"""

from experiments.measurement.process import quiet_thread_pools

quiet_thread_pools()

from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from benchmarks import common, hugging_face  # noqa: E402
from experiments.training import token_loss  # noqa: E402
from models.language_model import LanguageModel  # noqa: E402
from models.presets import preset  # noqa: E402

BATCH, CONTEXT, LONG = 8, 256, 4096
STEPS = 4  # in a turn, of a side that takes less than a few seconds a step
VOCABULARY = preset("transformer-4m").vocabulary
Loss = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]  # of a model, inputs, targets
SLOW = frozenset({"Hugging Face Mamba, torch path"})


def tokens(batch: int, context: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(0, vocabulary, (batch, context + 1), generator=torch.Generator().manual_seed(0))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def _turn(model: torch.nn.Module, loss_of: Loss, batch: int, context: int, steps: int) -> common.Turn:
    """Turns of `steps` training steps; a turn gives its last loss."""
    parameters = list(model.parameters())
    optimizer = hugging_face.optimizer(parameters)
    inputs, targets = tokens(batch, context, VOCABULARY)

    def turn() -> tuple[int, float]:
        loss = torch.tensor(torch.nan)
        for _ in range(steps):
            loss = loss_of(model, inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return steps * batch * context, loss.item()

    return turn


def ours(arm: str, batch: int = BATCH, context: int = CONTEXT, steps: int = STEPS) -> common.Turn:
    return _turn(LanguageModel(preset(f"{arm}-4m"), seed=0), token_loss, batch, context, steps)


def their_loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def llama() -> common.Turn:
    theirs = hugging_face.llama(LanguageModel(preset("transformer-4m"), seed=0), CONTEXT)
    return _turn(theirs, their_loss, BATCH, CONTEXT, STEPS)


def mamba(mambapy: bool) -> common.Turn:
    theirs = hugging_face.mamba(LanguageModel(preset("mamba-4m"), seed=0), mambapy=mambapy)
    return _turn(theirs, their_loss, BATCH, CONTEXT, 1)


def main() -> None:
    options = common.arguments(__doc__ or "").parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    found, losses = common.rates({
        "our transformer": partial(ours, "transformer"),
        "Hugging Face Llama": llama,
        "our Mamba": partial(ours, "mamba"),
        "Hugging Face Mamba, mambapy": partial(mamba, True),
        "Hugging Face Mamba, torch path": partial(mamba, False),
    }, options.rounds, SLOW)  # fmt: skip
    a, b = losses["our transformer"], losses["Hugging Face Llama"]
    if abs(a - b) > 1e-3 * b:
        raise SystemExit(f"after the same steps our transformer's loss is {a}, Llama's {b}: the speeds do not compare")
    long, _ = common.rates(
        {f"our {name} at T={LONG}": partial(ours, name.lower(), 1, LONG) for name in ("transformer", "Mamba")},
        options.rounds,
    )
    found |= long
    ratio = common.ratio
    ratios = {
        "our transformer / Hugging Face Llama": ratio(found["our transformer"], found["Hugging Face Llama"], 1.1),
        "our Mamba / mambapy": ratio(found["our Mamba"], found["Hugging Face Mamba, mambapy"], 5),
        "our Mamba / torch path": ratio(found["our Mamba"], found["Hugging Face Mamba, torch path"], 100),
        f"our Mamba / our transformer, T={CONTEXT}": ratio(found["our Mamba"], found["our transformer"], 0.5),
        f"our Mamba / our transformer, T={LONG}": ratio(
            found[f"our Mamba at T={LONG}"], found[f"our transformer at T={LONG}"], 1.0
        ),
    }
    settings = {"batch": BATCH, "context": CONTEXT, "vocabulary": VOCABULARY, "threads": torch.get_num_threads()}
    common.publish("training", settings, found, ratios, options.json)


if __name__ == "__main__":
    main()
