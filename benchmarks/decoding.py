"""Single-stream greedy decoding of our models against Hugging Face's `generate`, on the CPU.

    python -m benchmarks.decoding [--json]

About 1.2M parameters (the size of the cpu profile), float32, batch 1, a prompt of 64 tokens, 128 new tokens. Both sides
are timed over the whole call, prefill included, and must produce the same tokens.
"""

from experiments.measurement.process import quiet_thread_pools

quiet_thread_pools()

import torch  # noqa: E402

from benchmarks import common, hugging_face  # noqa: E402
from models.generation import Sampling, generate  # noqa: E402
from models.language_model import LanguageModel  # noqa: E402
from models.presets import preset  # noqa: E402

PROMPT, NEW = 64, 128


def ours(model: LanguageModel, prompt: torch.Tensor) -> tuple[common.Side, list[int]]:
    def decode() -> int:
        made = [int(token) for token in generate(model, prompt, NEW, Sampling())]
        out[:] = made
        return NEW

    out: list[int] = []
    return decode, out


def theirs(model: torch.nn.Module, prompt: torch.Tensor) -> tuple[common.Side, list[int]]:
    model.eval()

    @torch.inference_mode()
    def decode() -> int:
        mask = torch.ones_like(prompt)
        made = model.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=True)  # type: ignore[operator]
        out[:] = made[0, PROMPT:].tolist()
        return NEW

    out: list[int] = []
    return decode, out


def main() -> None:
    options = common.arguments(__doc__ or "").parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformer, mamba = (LanguageModel(preset(f"{name}-1m"), seed=0) for name in ("transformer", "mamba"))
    prompt = torch.randint(0, transformer.config.vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    made = {
        "our transformer": ours(transformer, prompt),
        "Hugging Face Llama": theirs(hugging_face.llama(transformer, PROMPT + NEW), prompt),
        "our Mamba": ours(mamba, prompt),
        "Hugging Face Mamba": theirs(hugging_face.mamba(mamba, mambapy=True), prompt),
    }
    found = common.rates({name: side for name, (side, _) in made.items()}, options.rounds)
    for a, b in (("our transformer", "Hugging Face Llama"), ("our Mamba", "Hugging Face Mamba")):
        if made[a][1] != made[b][1]:
            raise SystemExit(f"{a} and {b} decoded different tokens: the speeds do not compare")
    ratios = {
        "our transformer / generate": common.ratio(found["our transformer"], found["Hugging Face Llama"], 3),
        "our Mamba / generate": common.ratio(found["our Mamba"], found["Hugging Face Mamba"], 3),
    }
    settings = {"prompt": PROMPT, "new tokens": NEW, "threads": torch.get_num_threads()}
    common.publish("decoding", settings, found, ratios, options.json)


if __name__ == "__main__":
    main()
