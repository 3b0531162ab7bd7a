"""One training step (forward, loss, backward, clip, AdamW) of our models against Hugging Face's, on the CPU.

    python -m benchmarks.training [--json]

Shape: 8 x 256 tokens, about 4.5M parameters, vocabulary 4096, float32; then our two arms at longer contexts.
"""

from experiments.measurement.process import quiet_thread_pools

quiet_thread_pools()

import torch  # noqa: E402

from benchmarks import common, hugging_face  # noqa: E402
from experiments.training import token_loss  # noqa: E402
from models.language_model import LanguageModel  # noqa: E402
from models.presets import preset  # noqa: E402

BATCH, CONTEXT, LONG = 8, 256, 4096
SLOW = frozenset({"Hugging Face Mamba, torch path"})


def tokens(batch: int, context: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(0, vocabulary, (batch, context + 1), generator=torch.Generator().manual_seed(0))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def step_of(model: torch.nn.Module, loss_of, batch: int, context: int, vocabulary: int) -> common.Side:
    parameters = list(model.parameters())
    optimizer = hugging_face.optimizer(parameters)
    inputs, targets = tokens(batch, context, vocabulary)

    def step() -> int:
        loss_of(model, inputs, targets).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return batch * context

    return step


def their_loss(model, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    options = common.arguments(__doc__ or "").parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformer, mamba = (LanguageModel(preset(f"{name}-4m"), seed=0) for name in ("transformer", "mamba"))
    vocabulary = transformer.config.vocabulary
    shape = (BATCH, CONTEXT, vocabulary)
    theirs = {
        "Hugging Face Llama": hugging_face.llama(transformer, CONTEXT),
        "Hugging Face Mamba, mambapy": hugging_face.mamba(mamba, mambapy=True),
        "Hugging Face Mamba, torch path": hugging_face.mamba(mamba, mambapy=False),
    }
    sides = {
        "our transformer": step_of(transformer, token_loss, *shape),
        "our Mamba": step_of(mamba, token_loss, *shape),
    } | {name: step_of(model, their_loss, *shape) for name, model in theirs.items()}
    found = common.rates(sides, options.rounds, SLOW)
    long = {
        f"our {name} at T={LONG}": step_of(model, token_loss, 1, LONG, vocabulary)
        for name, model in (("transformer", transformer), ("Mamba", mamba))
    }
    found |= common.rates(long, options.rounds)
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
    settings = {"batch": BATCH, "context": CONTEXT, "vocabulary": vocabulary, "threads": torch.get_num_threads()}
    common.publish("training", settings, found, ratios, options.json)


if __name__ == "__main__":
    main()
