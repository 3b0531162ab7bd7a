"""One training step (forward, loss, backward, clip, AdamW) of our models against Hugging Face's, on the CPU.

    python -m benchmarks.training [--json]

Shape: 8 x 256 tokens, about 4.5M parameters, vocabulary 4096, float32; then our arms at longer contexts, batch 1
(`--long-only`: these alone).
"""

from experiments.threads import quiet_thread_pools

quiet_thread_pools()

from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from benchmarks import common, hugging_face  # noqa: E402
from experiments.training import token_loss  # noqa: E402
from models.language_model import LanguageModel  # noqa: E402
from models.presets import preset  # noqa: E402

BATCH, CONTEXT = 8, 256
LONG, LONG_BATCH = (2048, 4096), 1
NAMES = {"transformer": "our transformer", "mamba": "our Mamba", "mamba2": "our Mamba-2", "mamba3": "our Mamba-3"}
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


def our_loss(model: Any, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return token_loss(model, inputs, targets)[0]


def ours(arm: str, batch: int = BATCH, context: int = CONTEXT, steps: int = STEPS) -> common.Turn:
    return _turn(LanguageModel(preset(f"{arm}-4m"), seed=0), our_loss, batch, context, steps)


def their_loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def llama() -> common.Turn:
    theirs = hugging_face.llama(LanguageModel(preset("transformer-4m"), seed=0), CONTEXT)
    return _turn(theirs, their_loss, BATCH, CONTEXT, STEPS)


def mamba(mambapy: bool) -> common.Turn:
    theirs = hugging_face.mamba(LanguageModel(preset("mamba-4m"), seed=0), mambapy=mambapy)
    return _turn(theirs, their_loss, BATCH, CONTEXT, 1)


def mamba2() -> common.Turn:
    theirs = hugging_face.mamba2(LanguageModel(preset("mamba2-4m"), seed=0))
    return _turn(theirs, their_loss, BATCH, CONTEXT, STEPS)


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--skip-slow", action="store_true", help="leave out the side that takes minutes a step")
    parser.add_argument("--long-only", action="store_true", help="our own arms at the longer contexts, nothing else")
    parser.add_argument(
        "--sittings", type=int, default=0, help="longer contexts: a sample is a sitting of new processes, not a round"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sides = {
        "our transformer": partial(ours, "transformer"),
        "Hugging Face Llama": llama,
        "our Mamba": partial(ours, "mamba"),
        "Hugging Face Mamba, mambapy": partial(mamba, True),
        "Hugging Face Mamba, torch path": partial(mamba, False),
        "our Mamba-2": partial(ours, "mamba2"),
        "Hugging Face Mamba-2, torch path": mamba2,
        "our Mamba-3": partial(ours, "mamba3"),
    }
    if options.skip_slow:
        sides = {name: side for name, side in sides.items() if name not in SLOW}
    if options.long_only:
        sides = {}
    found, losses = common.rates(sides, options.rounds, SLOW & sides.keys())
    for a, b in (("our transformer", "Hugging Face Llama"), ("our Mamba-2", "Hugging Face Mamba-2, torch path")):
        if a in losses and abs(losses[a] - losses[b]) > 1e-3 * losses[b]:
            raise SystemExit(f"after the same steps {a} has loss {losses[a]}, {b} {losses[b]}: speeds do not compare")
    for context in LONG:
        longer = {f"{NAMES[arm]}, T={context}": partial(ours, arm, LONG_BATCH, context) for arm in NAMES}
        if options.sittings:
            found |= common.rates_over_sittings(longer, options.rounds, options.sittings)
        else:
            found |= common.rates(longer, options.rounds)[0]
    aims = [
        ("our transformer", "Hugging Face Llama", 1.2),
        ("our Mamba", "Hugging Face Mamba, mambapy", 7),
        ("our Mamba", "Hugging Face Mamba, torch path", 100),
        ("our Mamba", "our transformer", 0.65),
        ("our Mamba-2", "Hugging Face Mamba-2, torch path", 1.6),
        ("our Mamba-2", "our transformer", None),
        ("our Mamba-3", "our Mamba-2", 0.5),
    ]
    for context in LONG:
        for arm, aim in (("mamba", 1.0 if context == 4096 else None), ("mamba2", 1.0), ("mamba3", None)):
            aims.append((f"{NAMES[arm]}, T={context}", f"our transformer, T={context}", aim))
    ratios = {f"{a} / {b}": common.ratio(found[a], found[b], aim) for a, b, aim in aims if a in found and b in found}
    settings = {
        **({} if options.long_only else {"batch": BATCH, "context": CONTEXT}),
        "longer_contexts": " and ".join(map(str, LONG)), "batch_at_longer_contexts": LONG_BATCH,
        "vocabulary": VOCABULARY, "threads": torch.get_num_threads(),
        "rounds": options.rounds, "sittings": options.sittings,
    }  # fmt: skip
    common.publish("training", settings, found, ratios, options.json)


if __name__ == "__main__":
    main()
