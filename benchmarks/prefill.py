"""Reading a prompt and naming the next token, our models against Hugging Face's, on the CPU.

    python -m benchmarks.prefill [--json]

About 4.5M parameters, vocabulary 4096, float32, one prompt of 2048 tokens, the cache or state kept. Both sides must
name the same token, and ask the head for no other one.
"""

from experiments.threads import quiet_thread_pools

quiet_thread_pools()

from functools import partial  # noqa: E402

import torch  # noqa: E402

from benchmarks import common, hugging_face  # noqa: E402
from models.language_model import LanguageModel  # noqa: E402
from models.presets import preset  # noqa: E402

PROMPT = 2048
SLOW = frozenset({"Hugging Face Mamba, torch path"})  # a step of its loop per token
PAIRS = (
    ("our transformer", "Hugging Face Llama", None),
    ("our Mamba", "Hugging Face Mamba, torch path", 10),
    ("our Mamba-2", "Hugging Face Mamba-2, torch path", None),
)


def _prompt() -> torch.Tensor:
    """(1, PROMPT)"""
    vocabulary = preset("transformer-4m").vocabulary
    return torch.randint(0, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def ours(arm: str) -> common.Turn:
    """A turn gives the token it names."""
    model, prompt = LanguageModel(preset(f"{arm}-4m"), seed=0).eval(), _prompt()

    @torch.inference_mode()
    def turn() -> tuple[int, int]:
        logits, _ = model.prefill(prompt, model.make_state(1, PROMPT + 1))
        return PROMPT, int(logits.argmax())

    return turn


def theirs(arm: str) -> common.Turn:
    start = LanguageModel(preset(f"{arm}-4m"), seed=0)
    make = {
        "transformer": lambda: hugging_face.llama(start, PROMPT + 1),
        "mamba": lambda: hugging_face.mamba(start, mambapy=False),
        "mamba2": lambda: hugging_face.mamba2(start),
    }
    model, prompt = make[arm]().eval(), _prompt()

    @torch.inference_mode()
    def turn() -> tuple[int, int]:
        # as their `generate` reads a prompt: the head is asked for the last token alone
        return PROMPT, int(model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits.argmax())

    return turn


def main() -> None:
    options = common.arguments(__doc__ or "").parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    sides = {}
    for arm, (mine, other, _) in zip(("transformer", "mamba", "mamba2"), PAIRS, strict=True):
        sides |= {mine: partial(ours, arm), other: partial(theirs, arm)}
    found, named = common.rates(sides, options.rounds, SLOW)
    for mine, other, _ in PAIRS:
        if named[mine] != named[other]:
            raise SystemExit(f"{mine} and {other} name different tokens: the speeds do not compare")
    ratios = {f"{a} / {b}": common.ratio(found[a], found[b], aim) for a, b, aim in PAIRS}
    settings = {"prompt": PROMPT, "batch": 1, "threads": torch.get_num_threads()}
    common.publish("prefill", settings, found, ratios, options.json)


if __name__ == "__main__":
    main()
