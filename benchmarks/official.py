"""Our Mamba and Mamba-2 against `mamba_ssm`'s own `MambaLMHeadModel`, which calls the same kernels, on one GPU.

    python -m benchmarks.official [--phases training,prefill,decode] [--json]

About 130M parameters. A training step of 8 x 2048 tokens: forward, loss, backward, clipping, AdamW under bfloat16
autocast. Prefill of 2048 tokens and single-stream greedy decoding of 256 tokens after 512, prefill included, in
bfloat16, each side's steps replayed from a CUDA graph. Both sides have the same weights and must give the same logits.
Ours comes twice: as it is, and with its blocks compiled (models/compiled.py); theirs as its users run it.
"""

import math
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import common, hugging_face
from experiments.training import autocast, token_loss
from models import hf
from models.compiled import compile_blocks
from models.language_model import LanguageModel
from models.mixers.mamba2 import Mamba2Config
from models.ops.kernels.tuning import keep_choices, untimed
from models.presets import preset
from models.recorded import RecordedDecode

keep_choices()

ARMS = {"mamba": "Mamba", "mamba2": "Mamba-2"}
OURS, COMPILED, THEIRS = "our {}, {}", "our {} compiled, {}", "mamba_ssm's {}, {}"
DEVICE = "cuda"
BATCH, CONTEXT, PROMPT, NEW = 8, 2048, 512, 256
ALIKE, READ = 0.2, 256  # what logits may differ by in bfloat16, over their own spread, and of how many tokens


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


def _model(arm: str, side: str, dtype: torch.dtype) -> Any:
    """On the GPU; both sides start from the numbers that our initialisation draws there."""
    model = LanguageModel(preset(f"{arm}-130m"), seed=0, device=DEVICE, dtype=dtype)
    return counterpart(model).to(DEVICE) if side == THEIRS else model


@torch.no_grad()
def _opinion(model: Any, side: str) -> list[float]:
    """What it thinks of every next token of a text: its logit, less the mean of all."""
    tokens = _tokens(1, READ)
    with untimed(DEVICE), autocast("bfloat16", torch.device(DEVICE)):  # so short a text is to choose no kernel
        logits = (model(tokens).logits if side == THEIRS else model(tokens))[0].float()
    return (logits[:-1].gather(1, tokens[0, 1:, None])[:, 0] - logits[:-1].mean(1)).tolist()


def training(arm: str, side: str) -> common.Turn:
    """A turn is a step, which ends when the GPU has done it."""
    model = _model(arm, side, torch.float32).train()
    opinion = _opinion(model, side)
    if side == COMPILED:
        compile_blocks(model, "forward")
    parameters = list(model.parameters())
    optimizer = hugging_face.optimizer(parameters)
    tokens = _tokens(BATCH, CONTEXT + 1)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def turn() -> tuple[int, list[float]]:
        with autocast("bfloat16", torch.device(DEVICE)):
            if side == THEIRS:
                loss = F.cross_entropy(model(inputs).logits.float().flatten(0, 1), targets.flatten())
            else:
                loss = token_loss(model, inputs, targets)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return inputs.numel(), opinion

    return turn


def prefill(arm: str, side: str) -> common.Turn:
    """A turn names the token after a prompt, the state kept."""
    model, prompt = _model(arm, side, torch.bfloat16).eval(), _tokens(1, CONTEXT)
    opinion = _opinion(model, side)
    if side == COMPILED:
        compile_blocks(model, "forward")

    @torch.inference_mode()
    def turn() -> tuple[int, list[float]]:
        if side == THEIRS:
            from mamba_ssm.utils.generation import InferenceParams  # pyright: ignore[reportMissingImports]

            kept = InferenceParams(max_seqlen=CONTEXT + 1, max_batch_size=1)
            logits = model(prompt, inference_params=kept, num_last_tokens=1).logits
        else:
            logits, _ = model.prefill(prompt, model.make_state(1, CONTEXT + 1))
        logits.argmax().item()
        return CONTEXT, opinion

    return turn


def decode(arm: str, side: str) -> common.Turn:
    """A turn reads a prompt and writes NEW tokens."""
    model, prompt = _model(arm, side, torch.bfloat16).eval(), _tokens(1, PROMPT)
    opinion = _opinion(model, side)
    if side == COMPILED:
        compile_blocks(model, "step")
    recorded = None
    if side != THEIRS:
        with torch.inference_mode():
            recorded = RecordedDecode(model, model.make_state(1, PROMPT + NEW), PROMPT + NEW)

    @torch.inference_mode()
    def turn() -> tuple[int, list[float]]:
        if recorded is None:
            model.generate(prompt, PROMPT + NEW, top_k=1, cg=True)
        else:
            logits, state = model.prefill(prompt, model.make_state(1, PROMPT + NEW))
            recorded.load(state)
            recorded.step(logits.argmax(1))
            for _ in range(NEW - 2):
                recorded.step()
        torch.cuda.synchronize()
        return NEW, opinion

    return turn


PHASES = {"training": training, "prefill": prefill, "decode": decode}


def unlike(ours: list[float], theirs: list[float]) -> float:
    """Root mean square of the difference over theirs; about 1.4 of models that have nothing in common."""
    return math.dist(ours, theirs) / math.hypot(*theirs)


def compared(phase: str, arm: str, rounds: int) -> dict[str, Any]:
    """The samples of every side, and ours over theirs; a turn gives what the side thought of a text before it. Raises
    PartFailedError, also where they do not think alike."""
    named = {side: side.format(ARMS[arm], phase) for side in (OURS, COMPILED, THEIRS)}
    sides = {what: partial(PHASES[phase], arm, side) for side, what in named.items()}
    samples, opinions = common.rates(sides, rounds, warm_ups=3)
    theirs = named.pop(THEIRS)
    for ours in named.values():
        apart = unlike(opinions[ours], opinions[theirs])
        if not apart <= ALIKE:
            raise common.PartFailedError(
                f"the logits of {ours} and {theirs} are {apart:.3g} of their spread apart: speeds do not compare"
            )
    aim = 1 if phase != "prefill" else None
    ratios = {f"{ours} / {theirs}": common.ratio(samples[ours], samples[theirs], aim) for ours in named.values()}
    return {"samples": samples, "ratios": ratios}


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--arms", type=common.several(ARMS), default=list(ARMS), help="separated by commas")
    parser.add_argument("--phases", type=common.several(PHASES), default=list(PHASES), help="separated by commas")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("the official models need a CUDA GPU, which torch does not see here")
    done, failures = common.parts({
        (phase, arm): partial(compared, phase, arm, options.rounds) for phase in options.phases for arm in options.arms
    })  # fmt: skip
    found, ratios = ({name: of for part in done.values() for name, of in part[kind].items()}
                     for kind in ("samples", "ratios"))  # fmt: skip
    settings = {
        "training_batch": BATCH, "training_and_prefill_context": CONTEXT, "decode_prompt": PROMPT, "new_tokens": NEW,
        "vocabulary": preset("mamba-130m").vocabulary, "threads": torch.get_num_threads(), "rounds": options.rounds,
    }  # fmt: skip
    common.publish("official", settings, found, ratios, options.json, DEVICE, failures=failures)
    common.leave(failures)


if __name__ == "__main__":
    main()
