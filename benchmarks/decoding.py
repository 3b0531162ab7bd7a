"""Single-stream greedy decoding of our models against Hugging Face's `generate`, on the CPU.

    python -m benchmarks.decoding [--json]

About 1.2M parameters (the size of the cpu profile), float32, batch 1, a prompt of 64 tokens, 128 new tokens. Both sides
are timed over the whole call, prefill included, and must produce the same tokens.
"""

from experiments.threads import quiet_thread_pools

quiet_thread_pools()

from functools import partial  # noqa: E402

import torch  # noqa: E402

from benchmarks import common, hugging_face  # noqa: E402
from models.generation import Sampling, generate  # noqa: E402
from models.language_model import LanguageModel  # noqa: E402
from models.presets import preset  # noqa: E402

PROMPT, NEW = 64, 128


def _prompt() -> torch.Tensor:
    """(1, PROMPT)"""
    vocabulary = preset("transformer-1m").vocabulary
    return torch.randint(0, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))


def ours(arm: str) -> common.Turn:
    """A turn gives the tokens it made."""
    model, prompt = LanguageModel(preset(f"{arm}-1m"), seed=0), _prompt()
    return lambda: (NEW, [int(token) for token in generate(model, prompt, NEW, Sampling())])


def theirs(arm: str) -> common.Turn:
    start = LanguageModel(preset(f"{arm}-1m"), seed=0)
    model = hugging_face.llama(start, PROMPT + NEW) if arm == "transformer" else hugging_face.mamba(start, mambapy=True)
    model.eval()
    prompt = _prompt()

    @torch.inference_mode()
    def turn() -> tuple[int, list[int]]:
        mask = torch.ones_like(prompt)
        made = model.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=True)  # type: ignore[operator]
        return NEW, made[0, PROMPT:].tolist()

    return turn


def main() -> None:
    options = common.arguments(__doc__ or "").parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    found, made = common.rates({
        "our transformer": partial(ours, "transformer"),
        "Hugging Face Llama": partial(theirs, "transformer"),
        "our Mamba": partial(ours, "mamba"),
        "Hugging Face Mamba": partial(theirs, "mamba"),
    }, options.rounds)  # fmt: skip
    for a, b in (("our transformer", "Hugging Face Llama"), ("our Mamba", "Hugging Face Mamba")):
        if made[a] != made[b]:
            raise SystemExit(f"{a} and {b} decoded different tokens: the speeds do not compare")
    ratios = {
        "our transformer / generate": common.ratio(found["our transformer"], found["Hugging Face Llama"], 4),
        "our Mamba / generate": common.ratio(found["our Mamba"], found["Hugging Face Mamba"], 4),
    }
    settings = {"prompt": PROMPT, "new tokens": NEW, "threads": torch.get_num_threads()}
    common.publish("decoding", settings, found, ratios, options.json)


if __name__ == "__main__":
    main()
