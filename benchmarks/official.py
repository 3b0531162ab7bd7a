"""Our Mamba and Mamba-2 against `mamba_ssm`'s own `MambaLMHeadModel`, which calls the same kernels, on one GPU.

    python -m benchmarks.official [--json]

About 130M parameters. A training step of 8 x 2048 tokens: forward, loss, backward, clipping, AdamW under bfloat16
autocast. Prefill of 2048 tokens and single-stream greedy decoding of 256 tokens after 512, prefill included, in
bfloat16, each side's steps replayed from a CUDA graph. Both sides have the same weights and must give the same loss.
"""

from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import common, hugging_face
from experiments.training import autocast, token_loss
from models import hf
from models.language_model import LanguageModel
from models.mixers.mamba2 import Mamba2Config
from models.presets import preset
from models.recorded import RecordedDecode

ARMS = {"mamba": "Mamba", "mamba2": "Mamba-2"}
DEVICE = "cuda"
BATCH, CONTEXT, PROMPT, NEW = 8, 2048, 512, 256
SAME_LOSS = 0.01  # relative, in bfloat16


def counterpart(model: LanguageModel) -> Any:
    """Their model with our weights, on the CPU in our type: for stacks of Mamba or of Mamba-2, no feed-forward."""
    from mamba_ssm.models.config_mamba import MambaConfig  # pyright: ignore[reportMissingImports]
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # pyright: ignore[reportMissingImports]

    config = model.config
    mixer: Any = config.kinds[0].mixer
    shape: dict[str, Any] = {"d_state": mixer.state, "d_conv": mixer.conv_width, "expand": mixer.expand}
    if isinstance(mixer, Mamba2Config):
        shape |= {"layer": "Mamba2", "headdim": mixer.head_width, "ngroups": mixer.groups}
    else:
        shape |= {"layer": "Mamba1", "dt_rank": mixer.dt_rank or "auto"}
    theirs = MambaLMHeadModel(
        MambaConfig(
            d_model=config.width, n_layer=config.layers, vocab_size=config.vocabulary, ssm_cfg=shape,
            tie_embeddings=config.tie_embeddings, pad_vocab_size_multiple=1,
        ),
        dtype=model.dtype,
    )  # fmt: skip
    named = hf.to_tensors(model.state_dict(), config)
    # transformers' names are mamba_ssm's, but for one letter
    weights = {name.replace("backbone.embeddings.", "backbone.embedding."): t for name, t in named.items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing  # the embedding's own tensor where it is tied
    assert not unexpected, unexpected
    return theirs


def _tokens(batch: int, length: int) -> torch.Tensor:
    vocabulary = preset("mamba-130m").vocabulary
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def _model(arm: str, ours: bool, dtype: torch.dtype) -> Any:
    """On the GPU; both sides start from the numbers that our initialisation draws there."""
    model = LanguageModel(preset(f"{arm}-130m"), seed=0, device=DEVICE, dtype=dtype)
    return model if ours else counterpart(model).to(DEVICE)


def training(arm: str, ours: bool) -> common.Turn:
    """A turn is a step, and gives its loss, which waits for the GPU."""
    model = _model(arm, ours, torch.float32).train()
    parameters = list(model.parameters())
    optimizer = hugging_face.optimizer(parameters)
    tokens = _tokens(BATCH, CONTEXT + 1)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def turn() -> tuple[int, float]:
        with autocast("bfloat16", torch.device(DEVICE)):
            if ours:
                loss = token_loss(model, inputs, targets)[0]
            else:
                loss = F.cross_entropy(model(inputs).logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return inputs.numel(), loss.item()

    return turn


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()).item()


def prefill(arm: str, ours: bool) -> common.Turn:
    """A turn names the token after a prompt, the state kept; it gives the prompt's loss."""
    model, prompt = _model(arm, ours, torch.bfloat16).eval(), _tokens(1, CONTEXT)
    with torch.inference_mode():
        loss = _loss(model(prompt) if ours else model(prompt).logits, prompt)

    @torch.inference_mode()
    def turn() -> tuple[int, float]:
        if ours:
            logits, _ = model.prefill(prompt, model.make_state(1, CONTEXT + 1))
        else:
            from mamba_ssm.utils.generation import InferenceParams  # pyright: ignore[reportMissingImports]

            kept = InferenceParams(max_seqlen=CONTEXT + 1, max_batch_size=1)
            logits = model(prompt, inference_params=kept, num_last_tokens=1).logits
        logits.argmax().item()
        return CONTEXT, loss

    return turn


def decode(arm: str, ours: bool) -> common.Turn:
    """A turn reads a prompt and writes NEW tokens; it gives the prompt's loss."""
    model, prompt = _model(arm, ours, torch.bfloat16).eval(), _tokens(1, PROMPT)
    with torch.inference_mode():
        loss = _loss(model(prompt) if ours else model(prompt).logits, prompt)
        recorded = RecordedDecode(model, model.make_state(1, PROMPT + NEW), PROMPT + NEW) if ours else None

    @torch.inference_mode()
    def turn() -> tuple[int, float]:
        if recorded is None:
            model.generate(prompt, PROMPT + NEW, top_k=1, cg=True)
        else:
            logits, state = model.prefill(prompt, model.make_state(1, PROMPT + NEW))
            recorded.load(state)
            for _ in range(NEW - 1):
                logits = recorded.step(logits.argmax(1))
            logits.argmax(1)
        torch.cuda.synchronize()
        return NEW, loss

    return turn


PHASES = {"training": training, "prefill": prefill, "decode": decode}


def main() -> None:
    options = common.arguments(__doc__ or "").parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the official models need a CUDA GPU, which torch does not see here")
    found: dict[str, list[float]] = {}
    ratios: dict[str, Any] = {}
    for phase, make in PHASES.items():
        for arm, name in ARMS.items():
            ours, theirs = f"our {name}, {phase}", f"mamba_ssm's {name}, {phase}"
            rates, losses = common.rates({ours: partial(make, arm, True), theirs: partial(make, arm, False)},
                                         options.rounds, warm_ups=3)  # fmt: skip
            if not abs(losses[ours] - losses[theirs]) <= SAME_LOSS * losses[theirs]:
                raise SystemExit(f"{ours} has loss {losses[ours]}, {theirs} {losses[theirs]}: speeds do not compare")
            found |= rates
            ratios[f"{ours} / {theirs}"] = common.ratio(rates[ours], rates[theirs], 1 if phase != "prefill" else None)
    settings = {
        "training_batch": BATCH, "training_and_prefill_context": CONTEXT, "decode_prompt": PROMPT, "new_tokens": NEW,
        "vocabulary": preset("mamba-130m").vocabulary, "threads": torch.get_num_threads(), "rounds": options.rounds,
    }  # fmt: skip
    common.publish("official", settings, found, ratios, options.json, DEVICE)


if __name__ == "__main__":
    main()
