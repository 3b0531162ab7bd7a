"""A language model as stages that a person can run one by one, and what each does to one text.

    embedding -> block 1 -> ... -> block L -> final norm -> head -> arg max

The stages are the modules of the model itself, so that one after the other they give what `forward` gives, bit for bit.

B: batch, here 1   T: time   S: earlier time   D: width   V: vocabulary   H: heads   U: units (channels or heads)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.block import Block
from models.errors import ConfigError
from models.feedforward import ExpertChoice
from models.language_model import LanguageModel
from models.mixers.explanation import AttentionExplanation, Explanation

LONGEST_TEXT = 256  # tokens: a matrix of T x T is kept for each head, and formed for each channel of a scan
CANDIDATES = 10
REPEATS = 3

MIXER_DOES = {
    "attention": "each token gathers from the tokens that it sees, weighted by how well its query fits their keys",
    "mamba": "each channel keeps a fading memory; what is written and how fast it fades depends on the token (Mamba-1)",
    "mamba2": "each head keeps a fading memory; what is written and how fast it fades depends on the token (Mamba-2)",
    "mamba3": "each head keeps a fading memory that also rotates; the token decides what is written (Mamba-3)",
    "lstm": "each cell keeps a fading memory; gates decide what is written, kept and read",
}


@dataclass(frozen=True)
class Stage:
    """One part of a model. does: in one line. run: the part itself. residual: whether what it gives is the residual
    stream (B, T, D), to which every block adds. block: of a block's stage."""

    name: str
    does: str
    run: Callable[[Tensor], Tensor]
    weights: tuple[Tensor, ...]
    residual: bool = False
    block: Block | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x)


def stages(model: LanguageModel) -> list[Stage]:
    """From token ids (B, T) to the ids of the likeliest next tokens (B,); each takes what the one before gave."""
    config = model.config
    placed = "" if model.positions is None else ", plus a vector for its position"
    embedded = [model.embedding.weight] + ([] if model.positions is None else [model.positions.weight])
    found = [Stage("embedding", f"a vector for each token{placed}", model.embed, tuple(embedded), residual=True)]
    for at, (block, kind) in enumerate(zip(model.blocks, config.blocks, strict=True)):
        does = MIXER_DOES.get(kind.mixer.kind, "tokens are mixed over time")
        if kind.feedforward is not None:
            chosen = " of a few chosen experts" if kind.feedforward.kind == "moe" else ""
            does += f"; then a network{chosen} transforms each token by itself"
        found.append(
            Stage(
                f"block {at + 1}: {kind.mixer.kind}", does, lambda x, block=block: block(x).stream,
                tuple(block.parameters()), residual=True, block=block,
            )
        )  # fmt: skip
    if model.norm is not None:
        does = "each token's vector is scaled to one size, so that the head can compare"
        found.append(Stage("final norm", does, model.norm, tuple(model.norm.parameters())))
    tied = " (its matrix is the embedding's)" if config.tie_embeddings else ""
    does = f"a score for each entry of the vocabulary: how well it fits as the next token{tied}"
    found.append(Stage("head", does, model.head, tuple(model.head.parameters())))
    found.append(Stage("arg max", "the entry with the highest score after the last token", _arg_max, ()))
    return found


def _arg_max(logits: Tensor) -> Tensor:
    """(B, T, V) -> (B,)."""
    return logits[:, -1].argmax(-1)


@dataclass(frozen=True)
class StageTrace:
    """What one stage did. ms: the fastest of `REPEATS` calls after one that is not counted: a thread that is woken late
    takes a hundred times as long as a small stage. weight_bytes: of all its parameters. Of the residual stream: rms,
    the root mean square of its entries after the stage; change, the size of what the stage added beside the size of
    what came in; cosine between what came in and what went out, the mean over tokens. None where the stage gives or
    takes something else."""

    name: str
    does: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    ms: float
    output_bytes: int
    weight_bytes: int
    rms: float | None = None
    change: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Candidate:
    id: int
    probability: float


@dataclass(frozen=True)
class Depth:
    """What the final norm and the head make of the last token's vector at one depth: the likeliest token there, and the
    probability and the rank, from 1, of the token that the whole model chose."""

    after: str
    likeliest: Candidate
    chosen_probability: float
    chosen_rank: int


@dataclass(frozen=True)
class AttentionTrace:
    """scores, weights (H, T, S); seen (T, S): whether the token t sees s. mixed (H, T, P): the sums of the values with
    these weights."""

    scores: Tensor
    weights: Tensor
    seen: Tensor
    mixed: Tensor


@dataclass(frozen=True)
class MemoryTrace:
    """half_life (U, 3): the shortest, the median and the longest over the text's steps and the unit's states. written,
    left (T): sizes over all units. matrix (T, S): mean of |M| over units, None where the recurrence has none."""

    unit: str
    half_life: Tensor
    written: Tensor
    left: Tensor
    matrix: Tensor | None


@dataclass(frozen=True)
class BlockTrace:
    """mixer: None where the mixer says nothing of itself. experts: chosen and weight (T, K), probability (T, X)."""

    name: str
    mixer: AttentionTrace | MemoryTrace | None
    experts: ExpertChoice | None


@dataclass(frozen=True)
class Trace:
    """stages: in order. blocks: what is inside each block. lens: the embedding, then after each block. candidates: the
    likeliest next tokens, by falling probability. logits (V,): after the last token. chosen: the arg max. Tensors are
    on the CPU, in float32 at least, whatever the model's."""

    tokens: tuple[int, ...]
    stages: tuple[StageTrace, ...]
    blocks: tuple[BlockTrace, ...]
    lens: tuple[Depth, ...]
    candidates: tuple[Candidate, ...]
    logits: Tensor
    chosen: int


@torch.no_grad()
def trace(model: LanguageModel, tokens: list[int]) -> Trace:
    """Run `model` on one text, stage by stage. Raises ConfigError: no tokens, more than `LONGEST_TEXT` or than the
    model has positions for, or one outside the vocabulary."""
    check(model, tokens)
    x = torch.tensor([tokens], device=model.device)
    done, blocks, depths = [], [], []
    for stage in stages(model):
        y, seen = _measured(stage, x)
        done.append(seen)
        if stage.block is not None:
            blocks.append(_inside(stage, x))
        if stage.residual:
            depths.append((stage.name, y[0, -1]))
        logits, x = x, y
    logits, chosen = logits[0, -1], int(x)
    scores = [_scores(model, vector) for _, vector in depths[:-1]] + [logits]
    lens = tuple(_depth(name, one, chosen) for (name, _), one in zip(depths, scores, strict=True))
    p = _probabilities(logits)
    best = logits.sort(descending=True, stable=True).indices[:CANDIDATES]  # of equal ones the first, as in arg max
    candidates = tuple(Candidate(int(i), float(p[i])) for i in best)
    return Trace(tuple(tokens), tuple(done), tuple(blocks), lens, candidates, _kept(logits), chosen)


def check(model: LanguageModel, tokens: list[int]) -> None:
    """Whether `trace` can run. Raises ConfigError."""
    if not tokens:
        raise ConfigError("the text has no tokens; give at least one")
    if len(tokens) > LONGEST_TEXT:
        raise ConfigError(
            f"the text has {len(tokens)} tokens; a trace keeps matrices of tokens by tokens and takes at most "
            f"{LONGEST_TEXT}: use fewer"
        )
    outside = [token for token in tokens if not 0 <= token < model.config.vocabulary]
    if outside:
        raise ConfigError(f"token {outside[0]} is not in the model's vocabulary of {model.config.vocabulary}")


def _measured(stage: Stage, x: Tensor) -> tuple[Tensor, StageTrace]:
    y = stage(x)
    times = []
    for _ in range(REPEATS):
        _wait(x)
        start = time.perf_counter()
        stage(x)
        _wait(x)
        times.append(1000 * (time.perf_counter() - start))
    rms = change = cosine = None
    if stage.residual:
        wide = y.double()
        rms = float(wide.square().mean().sqrt())
        if stage.block is not None:
            before = x.double()
            change = float((wide - before).norm() / before.norm().clamp_min(1e-30))
            cosine = float(torch.cosine_similarity(before, wide, -1).mean())
    return y, StageTrace(
        stage.name, stage.does, tuple(x.shape), tuple(y.shape), min(times), y.nbytes,
        sum(weight.nbytes for weight in stage.weights), rms, change, cosine,
    )  # fmt: skip


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _inside(stage: Stage, x: Tensor) -> BlockTrace:
    assert stage.block is not None
    said, experts = stage.block.explain(x)
    if experts is not None:
        experts = ExpertChoice(experts.chosen[0].cpu(), _kept(experts.weight[0]), _kept(experts.probability[0]))
    return BlockTrace(stage.name, _reduced(said), experts)


def _reduced(said: Explanation | None) -> AttentionTrace | MemoryTrace | None:
    if said is None:
        return None
    if isinstance(said, AttentionExplanation):
        scores, weights, mixed = (_kept(x[0]) for x in (said.scores, said.weights, said.mixed))
        return AttentionTrace(scores, weights, scores[0] > float("-inf"), mixed.transpose(0, 1))
    lives = said.half_life[0].transpose(0, 1).flatten(1)  # (U, T N)
    middle = (lives.median(1).values - (-lives).median(1).values) / 2  # torch's is the lower one of an even number
    half_life = torch.stack([lives.amin(1), middle, lives.amax(1)], 1)
    written, left = (_kept(size[0]).norm(dim=-1) for size in (said.written, said.left))
    matrix = None if said.matrix is None else _kept(said.matrix[0].abs().mean(-1))
    return MemoryTrace(said.unit, _kept(half_life), written, left, matrix)


def _kept(x: Tensor) -> Tensor:
    return x.to("cpu", torch.promote_types(x.dtype, torch.float32))


def _scores(model: LanguageModel, vector: Tensor) -> Tensor:
    """vector (D,): with a norm after each branch, the head reads the blocks' outputs as they are."""
    return model.head(vector if model.norm is None else model.norm(vector))


def _depth(name: str, logits: Tensor, chosen: int) -> Depth:
    p = _probabilities(logits)
    best = int(logits.argmax())
    rank = 1 + int((logits > logits[chosen]).sum())
    return Depth(name, Candidate(best, float(p[best])), float(p[chosen]), rank)


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
