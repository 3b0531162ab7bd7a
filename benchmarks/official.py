"""Our Mamba and Mamba-2 against `mamba_ssm`'s own `MambaLMHeadModel`, which calls the same kernels, on one GPU.

    python -m benchmarks.official [--phases training,recorded-training,prefill,decode] [--json]

About 130M parameters. A training step of 8 x 2048 tokens: forward, loss, backward, clipping, AdamW under bfloat16
autocast; asked for by the host, which may take longer than the GPU needs, and replayed from a CUDA graph, which it is
not in: that is what the GPU has to do. In bfloat16, prefill of 8 x 8192 tokens, so many that the GPU does not wait for
its host; and single-stream greedy decoding of 256 tokens after 512, the first of which comes of reading the prompt and
is not timed, each side's steps replayed from a CUDA graph. Both sides have the same weights and must give the same
logits in what is timed. Ours comes twice: as it is, and with its blocks compiled (models/compiled.py); theirs as its
users run it, but for the loss, which is one function on both sides: theirs would otherwise hold the logits of all
tokens in float32.
"""

import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, hugging_face
from experiments.training import autocast
from models import hf
from models.compiled import compile_blocks
from models.language_model import LanguageModel
from models.mixers.mamba2 import Mamba2Config
from models.ops.kernels.tuning import keep_choices
from models.presets import preset
from models.recorded import RecordedDecode, Recording

keep_choices()

ARMS = {"mamba": "Mamba", "mamba2": "Mamba-2"}
OURS, COMPILED, THEIRS = "our {}, {}", "our {} compiled, {}", "mamba_ssm's {}, {}"
DEVICE = "cuda"
BATCH, CONTEXT, READ, PROMPT, NEW = 8, 2048, 8192, 512, 256
STEPS = 4  # of training in a turn
LEARNING_RATE = 1e-3
TOLD = 16  # given tokens that decode reads before its logits are compared
ALIKE = 0.2  # what logits may differ by in bfloat16, over their own spread


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
    assert model.backend.name == "cuda", model.backend.fallback  # or the kernels are not the same
    return counterpart(model).to(DEVICE) if side == THEIRS else model


def _opinion(logits: Tensor) -> list[float]:
    """Logits (V,), less their mean: what a model thinks of the next token. Some of them."""
    logits = logits.detach().float()
    return (logits - logits.mean())[::16].tolist()


def training(arm: str, side: str, recorded: bool = False) -> common.Turn:
    """A turn is some steps, each of which ends when the GPU has done it and the loss is known."""
    from models.ops.kernels.cuda_form import linear_cross_entropy

    model = _model(arm, side, torch.float32).train()
    if side == COMPILED:
        compile_blocks(model, "forward")
    parameters = list(model.parameters())
    rate = torch.zeros((), device=DEVICE)  # until the logits are known
    optimizer = hugging_face.optimizer(parameters, rate)
    tokens = _tokens(BATCH, CONTEXT + 1)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def hidden() -> Tensor:
        """(B, T, D), what the head reads."""
        return model.backbone(inputs) if side == THEIRS else model.hidden(inputs).x

    head = (model.lm_head if side == THEIRS else model.head).weight
    loss, last = torch.zeros((), device=DEVICE), torch.zeros_like(head[0])  # last: what the head reads of one token

    def step() -> None:
        with autocast("bfloat16", torch.device(DEVICE)):
            x = hidden()
            mean = linear_cross_entropy(x.flatten(0, 1), head, targets.flatten())
        mean.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.copy_(mean.detach())
        last.copy_(x[0, -1].detach())

    take = Recording(step, torch.device(DEVICE)) if recorded else step
    take()
    opinion = _opinion(last @ head.t())
    rate.fill_(LEARNING_RATE)

    def turn() -> tuple[int, list[float]]:
        for _ in range(STEPS):
            take()
            loss.item()
        return STEPS * inputs.numel(), opinion

    return turn


def prefill(arm: str, side: str) -> common.Turn:
    """A turn names the tokens after prompts, the state kept."""
    model, prompts = _model(arm, side, torch.bfloat16).eval(), _tokens(BATCH, READ)
    if side == COMPILED:
        compile_blocks(model, "forward")
    with torch.inference_mode():
        opinion = _opinion(_read(model, side, prompts)[0])

    @torch.inference_mode()
    def turn() -> tuple[int, list[float]]:
        _read(model, side, prompts).argmax(1).tolist()
        return prompts.numel(), opinion

    return turn


def _read(model: Any, side: str, prompts: Tensor) -> Tensor:
    """The logits (B, V) after prompts (B, T), into a state that is made for them and one token more."""
    rows, length = prompts.shape
    if side != THEIRS:
        return model.prefill(prompts, model.make_state(rows, length + 1))[0]
    from mamba_ssm.utils.generation import InferenceParams  # pyright: ignore[reportMissingImports]

    kept = InferenceParams(max_seqlen=length + 1, max_batch_size=rows)
    return model(prompts, inference_params=kept, num_last_tokens=1).logits[:, -1]


def decode(arm: str, side: str) -> common.Turn:
    """A turn reads a prompt, then reads it again and writes NEW tokens: the difference counts."""
    model, text = _model(arm, side, torch.bfloat16).eval(), _tokens(1, PROMPT + TOLD)
    prompt, told = text[:, :PROMPT], text[:, PROMPT:]
    if side == COMPILED:
        compile_blocks(model, "step")
    with torch.inference_mode():
        recorded = None if side == THEIRS else RecordedDecode(model, model.make_state(1, PROMPT + NEW), PROMPT + NEW)

        def write(tokens: int) -> None:
            if recorded is None:
                model.generate(prompt, PROMPT + tokens, top_k=1, cg=True)
            else:
                logits, state = model.prefill(prompt, model.make_state(1, PROMPT + NEW))
                recorded.load(state)
                written = [logits.argmax(1)]
                for step in range(tokens - 1):
                    recorded.step(written[0] if step == 0 else None)
                    written.append(recorded.token.clone())
                torch.cat(written)
            torch.cuda.synchronize()

        if recorded is None:
            logits = _read(model, side, text)
        else:
            write(1)
            for token in told.unbind(1):
                logits = recorded.step(token)
        opinion = _opinion(logits[0])

    @torch.inference_mode()
    def turn() -> tuple[int, list[float], float]:
        start = time.perf_counter()
        write(1)
        aside = time.perf_counter() - start
        write(NEW)
        return NEW - 1, opinion, 2 * aside

    return turn


PHASES = {
    "training": training, "recorded-training": partial(training, recorded=True), "prefill": prefill, "decode": decode,
}  # fmt: skip


def unlike(ours: list[float], theirs: list[float]) -> float:
    """Root mean square of the difference over theirs; about 1.4 of models that have nothing in common."""
    return math.dist(ours, theirs) / math.hypot(*theirs)


def compared(phase: str, arm: str, rounds: int) -> dict[str, Any]:
    """The samples of every side, ours over theirs, and why a side of ours has none: it failed, or does not think as
    theirs does. Raises PartFailedError where nothing is left to compare."""
    named = {side: side.format(ARMS[arm], phase) for side in (OURS, COMPILED, THEIRS)}
    sides = {what: partial(PHASES[phase], arm, side) for side, what in named.items()}
    failures: dict[str, str] = {}
    samples, opinions = common.rates(sides, rounds, warm_ups=3, failures=failures)
    theirs = named.pop(THEIRS)
    for ours in [side for side in samples if side != theirs] if theirs in samples else ():
        apart = unlike(opinions[ours], opinions[theirs])
        if not apart <= ALIKE:
            failures[ours] = f"its logits are {apart:.3g} of their spread from those of {theirs}: speeds do not compare"
            del samples[ours]
    left = [ours for ours in named.values() if ours in samples]
    if theirs not in samples or not left:
        raise common.PartFailedError("; ".join(f"{side}: {reason}" for side, reason in failures.items()))
    aim = 1 if phase != "prefill" else None
    ratios = {f"{ours} / {theirs}": common.ratio(samples[ours], samples[theirs], aim) for ours in left}
    return {"samples": samples, "ratios": ratios, "failures": failures}


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
    found, ratios, sides = ({name: of for part in done.values() for name, of in part[kind].items()}
                            for kind in ("samples", "ratios", "failures"))  # fmt: skip
    failures |= sides
    settings = {
        "training_and_prefill_batch": BATCH, "training_context": CONTEXT, "training_steps_a_turn": STEPS,
        "prefill_context": READ, "decode_prompt": PROMPT, "new_tokens": NEW,
        "vocabulary": preset("mamba-130m").vocabulary, "threads": torch.get_num_threads(), "rounds": options.rounds,
    }  # fmt: skip
    common.publish("official", settings, found, ratios, options.json, DEVICE, failures=failures)
    common.leave(failures)


if __name__ == "__main__":
    main()
