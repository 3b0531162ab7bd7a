"""Models taken apart on one prompt, as a document."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from experiments import reading
from experiments.numbers import DASH, count, number, plural, size
from experiments.printable import clean
from experiments.report.document import Block, Cell, Column, Document, Figure, Notice, Section, Table, Text, Verdict
from experiments.tracing import Traced
from models import anatomy
from models.feedforward import ExpertChoice
from models.trace import AttentionTrace, MemoryTrace

LAYERS, HEADS = 3, 4  # shown of a model; as data there are all
SHOWN = 48  # tokens in a picture of tokens by tokens, the last ones
WRITTEN_OUT = 8  # tokens, up to which scores and weights stand in a table
GATHERED = 3  # tokens named of those that weigh most
MASKED = "masked"

T = TypeVar("T")


@dataclass(frozen=True)
class Layer(Generic[T]):
    """What the mixer or the experts of a block said. number: of the block, from 1."""

    number: int
    said: T


@dataclass(frozen=True)
class Mixing:
    """matrix (T, S): how much of token s is in what token t takes, as a share of the largest entry. seen (T, S)."""

    number: int
    matrix: np.ndarray
    seen: np.ndarray


def sampled(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def attention(one: Traced, every: bool = False) -> list[Layer[AttentionTrace]]:
    return _layers([(b.mixer if isinstance(b.mixer, AttentionTrace) else None) for b in one.trace.blocks], every)


def memory(one: Traced, every: bool = False) -> list[Layer[MemoryTrace]]:
    return _layers([(b.mixer if isinstance(b.mixer, MemoryTrace) else None) for b in one.trace.blocks], every)


def experts(one: Traced, every: bool = False) -> list[Layer[ExpertChoice]]:
    return _layers([block.experts for block in one.trace.blocks], every)


def _layers(said: Sequence[Any], every: bool) -> list[Layer]:
    found = [Layer(at + 1, value) for at, value in enumerate(said) if value is not None]
    return found if every else sampled(found, LAYERS)


def mixing(one: Traced) -> list[Mixing]:
    """Of the first, the middle and the last block that has such a matrix."""
    found = []
    for at, block in enumerate(one.trace.blocks):
        said = block.mixer
        if isinstance(said, AttentionTrace):
            found.append((at + 1, said.weights.mean(0), said.seen))
        elif isinstance(said, MemoryTrace) and said.matrix is not None:
            found.append((at + 1, said.matrix, _earlier(said.matrix)))
    return [
        Mixing(at, (matrix.double() / matrix.max().clamp_min(1e-30).double()).numpy(), seen.numpy())
        for at, matrix, seen in sampled(found, LAYERS)
    ]


def _earlier(matrix: Tensor) -> Tensor:
    """(T, S): what a recurrence has read at t."""
    return torch.ones_like(matrix, dtype=torch.bool).tril()


# --- the document -----------------------------------------------------------------------------------


def document(prompt: str, traced: Sequence[Traced]) -> Document:
    many = len(traced) > 1
    title = f"{len(traced)} models taken apart on one prompt" if many else f"{traced[0].subject.name}, taken apart"
    facts = [("prompt", _quoted(prompt))]
    for one in traced:
        config = one.subject.config
        shape = f"{anatomy.mixers(config)}, width {count(config.width)}, vocabulary {count(config.vocabulary)}"
        facts.append((one.subject.name, clean(f"{one.subject.origin}; {shape}")))
    sections = [_tokens(traced), _stages(traced), _next(traced), _lens(traced)]
    if any(mixing(one) for one in traced):
        sections.append(_mixing(traced))
    if any(attention(one) for one in traced):
        sections.append(_attention(traced))
    if any(memory(one) for one in traced):
        sections.append(_memory(traced))
    if any(experts(one) for one in traced):
        sections.append(_experts(traced))
    sections.append(_limits(traced))
    return Document(clean(title), facts, _notices(traced), sections)


def _quoted(text: str) -> str:
    """With line breaks, and spaces that a page would swallow, as signs."""
    signs = clean(text).replace("\n", "↵").replace("\t", "⇥")
    return "“" + re.sub("^ +| +$|  +", lambda spaces: "␣" * len(spaces[0]), signs) + "”"


def _names(those: Sequence[Traced]) -> str:
    return ", ".join(clean(one.subject.name) for one in those)


def _notices(traced: Sequence[Traced]) -> list[Notice]:
    notices = []
    raw = [one for one in traced if one.subject.untrained]
    if raw:
        notices.append(Notice("warning", f"Untrained: {_names(raw)}", (
            "The weights are random numbers. What such a model predicts, attends to and remembers says nothing about "
            "language; shapes, bytes and how the parts follow each other are those of a trained one.",
            *([f"{_names(bytewise)} has no tokenizer and reads the bytes of the prompt (UTF-8), one token each."]
              if (bytewise := [one for one in raw if one.subject.folder is None]) else []),
        )))  # fmt: skip
    seen = [one for one in traced if one.subject.objective == "unmasked"]
    if seen:
        notices.append(Notice("note", f"Trained to read off the next token: {_names(seen)}", (
            "It saw the token that it was to predict. After the last token of the prompt there is none to see: its "
            "scores there say nothing beside those of a model that predicts.",
        )))  # fmt: skip
    hidden = [one for one in traced if one.subject.objective == "masked"]
    if hidden:
        notices.append(Notice("note", f"Trained to fill in hidden tokens: {_names(hidden)}", (
            "The scores after the last token are for what stands at its own place, not for the token after it.",
        )))  # fmt: skip
    return notices


def _doubt(one: Traced) -> str:
    """Why what a model chooses is no prediction of the next token, or nothing."""
    if one.subject.untrained:
        return "untrained: the weights are random"
    trained_to = {"unmasked": "trained to read off the next token", "masked": "trained to fill in hidden tokens"}
    return trained_to.get(one.subject.objective, "")


def _tokens(traced: Sequence[Traced]) -> Section:
    intro = (
        "A model reads numbers. A tokenizer cuts the text into pieces of its vocabulary, and each piece has a number, "
        "its id. ␣ is a space, ↵ a line break, \\xNN a byte that is no character by itself."
    )
    groups: dict[tuple, list[Traced]] = {}
    for one in traced:
        groups.setdefault((one.trace.tokens, one.names), []).append(one)
    blocks: list[Block] = [
        Text(
            (f"{_names(those)}: " if len(groups) > 1 else "") + f"{plural(len(names), 'token')}, id in brackets: "
            + "  ".join(f"{name} ({id})" for id, name in zip(tokens, names, strict=True))
        )
        for (tokens, names), those in groups.items()
    ]  # fmt: skip
    return Section("tokens", "The prompt as tokens", intro, blocks)


def _stages(traced: Sequence[Traced]) -> Section:
    intro = (
        "The model is a pipe. Every stage is a part of the model itself, run by itself; one after the other they give "
        "what the whole model gives, bit for bit. Between the blocks flows the residual stream: one vector per token, "
        "to which each block adds."
    )
    columns = [Column("Stage", key=True), Column("Takes"), Column("Gives")]
    columns += [Column(title, numeric=True) for title in ("ms", "Output", "Weights", "Size", "Change", "Cos")]
    table = Table("What each stage takes and gives", columns)
    for one in traced:
        table.group(clean(one.subject.name) if len(traced) > 1 else "")
        for stage in one.trace.stages:
            numbers = [DASH if v is None else _small(v) for v in (stage.rms, stage.change, stage.cosine)]
            table.add(
                table.cell(stage.name, stage.does), _shape(stage.input_shape), _shape(stage.output_shape),
                _share(stage.ms), _bytes(stage.output_bytes), _bytes(stage.weight_bytes), *numbers,
            )  # fmt: skip
    explained = Text(
        "Shapes are batch x tokens x width, or x vocabulary. ms: the fastest of three calls on this machine, not a "
        "benchmark. Weights: bytes of all parameters of the stage. Size: root mean square of the residual stream after "
        "it. Change: the size of the difference that the stage made beside the size of what came in. Cos: the cosine "
        "between what came in and what went out, the mean over tokens; 1 is the same direction."
    )
    figure = Figure("stream", _stream_alt(traced), (
        "Left (on a phone: above) how large the residual stream is after each block, right (below) how much each block "
        "changed it. A block with a small change passes on what it got; one above 1 writes more than was there."
    ))  # fmt: skip
    return Section("stages", "Stage by stage", intro, [table, explained, figure])


def _stream_alt(traced: Sequence[Traced]) -> str:
    parts = []
    for one in traced:
        sizes = [stage.rms for stage in one.trace.stages if stage.rms is not None]
        changes = [stage.change for stage in one.trace.stages if stage.change is not None]
        most = changes.index(max(changes)) + 1
        parts.append(
            f"{clean(one.subject.name)}: size {_small(sizes[0])} after the embedding, {_small(sizes[-1])} after the "
            f"last block; block {most} changed it most, by {_small(max(changes))}"
        )
    return "; ".join(parts) + "."


def _next(traced: Sequence[Traced]) -> Section:
    intro = (
        "The head gives every entry of the vocabulary a score; a softmax turns scores into probabilities, which sum to "
        "1. The entry with the highest score is chosen, and decoded to text."
    )
    blocks: list[Block] = []
    for one in traced:
        best = one.trace.candidates[0]
        added = f"decoded: {_quoted(one.text)}" if one.text else "it has no text"
        added = "it is no whole character" if one.text == reading.UNFINISHED else added
        doubt = _doubt(one)
        blocks.append(Verdict(
            "open" if doubt else "resolved",
            f"{clean(one.subject.name)} chooses token {best.id}, {one.name(best.id)}; {added}.",
            f"probability {_share(best.probability)}",
            doubt,
        ))  # fmt: skip
    columns = [Column("Rank", key=True)]
    for one in traced:
        start = f"{clean(one.subject.name)}: " if len(traced) > 1 else ""
        columns += [Column(f"{start}token"), Column("p", numeric=True)]
    table = Table("The likeliest next tokens, their ids in brackets, and their probability p", columns)
    for at in range(max(len(one.trace.candidates) for one in traced)):
        cells: list[Cell | str] = [str(at + 1)]
        for one in traced:
            here = one.trace.candidates[at : at + 1]
            for candidate in here:
                cells += [f"{one.name(candidate.id)} ({candidate.id})", _share(candidate.probability)]
            cells += [DASH] * (2 * (1 - len(here)))
        table.add(*cells)
    blocks.append(table)
    return Section("next", "What comes next", intro, blocks)


def _lens(traced: Sequence[Traced]) -> Section:
    intro = (
        "The final norm and the head can read the residual stream at any depth: what would the model say if it ended "
        "there? This is the logit lens. Only the last depth was trained for it; an early one may say nothing sensible."
    )
    columns = [Column("After", key=True), Column("Likeliest there"), Column("probability", numeric=True)]
    columns += [Column("Chosen in the end", numeric=True), Column("its rank", numeric=True)]
    table = Table("What each depth would have predicted, after the last token", columns)
    for one in traced:
        table.group(clean(one.subject.name) if len(traced) > 1 else "")
        for depth in one.trace.lens:
            likeliest = depth.likeliest
            table.add(
                depth.after, f"{one.name(likeliest.id)} ({likeliest.id})", _share(likeliest.probability),
                _share(depth.chosen_probability), count(depth.chosen_rank),
            )  # fmt: skip
    parts, alt = [], []
    for one in traced:
        first = next(at for at in range(len(one.trace.lens)) if all(d.chosen_rank == 1 for d in one.trace.lens[at:]))
        where = "from the embedding on" if first == 0 else f"from block {first} of {len(one.trace.blocks)} on"
        parts.append(f"{clean(one.subject.name)} has the chosen token in first place {where}")
        ends = [_share(one.trace.lens[at].chosen_probability) for at in (0, -1)]
        alt.append(f"{parts[-1]}, its probability is {ends[0]} after the embedding and {ends[1]} after the last block")
    figure = Figure("lens", "; ".join(alt) + ".", (
        "The chosen token by depth. Left (on a phone: above) the probability it would have had, were each depth the "
        "last; right (below) its place among all tokens, from the top. " + "; ".join(parts) + "."
    ))  # fmt: skip
    return Section("lens", "What each depth would have said", intro, [table, figure])


def _mixing(traced: Sequence[Traced]) -> Section:
    intro = (
        "Only the mixers carry something from one token to another. For attention the matrix of weights says how much "
        "of each earlier token a token gathers. A state-space scan is such a matrix too, once its steps are known: "
        "entry (t, s) is how much of token s's input is in the scan's output at t."
    )
    kinds = []
    if any(attention(one) for one in traced):
        kinds.append("attention: the mean of the weights over heads")
    if any(layer.said.matrix is not None for one in traced for layer in memory(one)):
        kinds.append("a scan: the mean of |M| over its channels or heads, without the direct path of D")
    alt = [
        f"{clean(one.subject.name)}, block {layer.number}: {_reach(layer)}"
        for one in traced for layer in mixing(one)
    ]  # fmt: skip
    figure = Figure("mixing", "; ".join(alt) + ".", (
        "Each row is a token that reads, each column a token that is read; the stronger the colour, the more counts. "
        f"{_hatched(traced)}{_upper('; '.join(kinds))}. "
        f"Each panel is relative to its own largest entry.{_cut(traced)}"
    ))  # fmt: skip
    silent = [f"{clean(one.subject.name)} has none" for one in traced if not mixing(one)]
    columns = [Column("Block", key=True), Column("Mixer"), Column("Most from (share of its row)")]
    table = Table("What the last token takes most from, by these matrices", columns)
    blocks: list[Block] = [table]
    for one in [one for one in traced if mixing(one)]:
        table.group(clean(one.subject.name) if len(traced) > 1 else "")
        for layer in mixing(one):
            row = layer.matrix[-1] / max(layer.matrix[-1].sum(), 1e-30)
            most = np.argsort(-row, kind="stable")[: min(GATHERED, int(layer.seen[-1].sum()))]
            kind = one.subject.config.blocks[layer.number - 1].mixer.kind
            table.add(str(layer.number), kind, ", ".join(f"{_at(one, int(s))} ({_share(float(row[s]))})" for s in most))
        first = next((layer for layer in memory(one) if layer.said.matrix is not None), None)
        if first is not None and first.said.matrix is not None and len(one.names) <= WRITTEN_OUT:
            where = f"{clean(one.subject.name)}, block {first.number}: the mean of |M| over its {first.said.unit}s"
            blocks.append(_matrix(where, one, first.said.matrix, _earlier(first.said.matrix)))
    blocks.append(figure)
    if silent:
        blocks.append(Text("; ".join(silent) + ": no mixer of it can be read as a matrix, or says so."))
    return Section("mixing", "Which earlier tokens count", intro, blocks)


def _hatched(traced: Sequence[Traced]) -> str:
    if all(layer.seen.all() for one in traced for layer in mixing(one)):
        return "Nothing is masked: each token sees every other. " if len(traced[0].names) > 1 else ""
    return "Hatched: masked, because it comes later or lies beyond a window, and never seen. "


def _reach(layer: Mixing) -> str:
    """Where the last row's weight lies."""
    row = layer.matrix[-1]
    total = float(row.sum())
    if total == 0:
        return "the last token takes nothing"
    return f"of what the last token takes, {number(float(row[-1]) / total * 100, 0)}% is from itself"


def _attention(traced: Sequence[Traced]) -> Section:
    intro = (
        "Each head compares the query of a token with the keys of the tokens it sees: the scores. A softmax turns them "
        "into weights that sum to 1, and the head takes the sum of the values with these weights."
    )
    blocks: list[Block] = []
    for at, one in enumerate(traced):
        layers = attention(one)
        if not layers:
            continue
        name = clean(one.subject.name)
        columns = [Column("Block", key=True), Column("Head", key=True), Column("Weighs most (weight; score)")]
        columns += [Column("Sum, size", numeric=True)]
        table = Table(f"{name}: what the last token gathers from, in each head{_chosen(one)}", columns)
        for layer in layers:
            for head in sampled(range(layer.said.weights.shape[0]), HEADS):
                weights, scores = layer.said.weights[head, -1], layer.said.scores[head, -1]
                best = weights.topk(min(GATHERED, int(layer.said.seen[-1].sum()))).indices.tolist()
                most = [f"{_at(one, s)} ({_share(float(weights[s]))}; {_small(float(scores[s]))})" for s in best]
                gathered = float(layer.said.mixed[head, -1].double().norm())
                table.add(str(layer.number), str(head + 1), ", ".join(most), _small(gathered))
        blocks.append(table)
        if len(one.names) <= WRITTEN_OUT:
            said = layers[0].said
            where = f"{name}, head 1 of block {layers[0].number}"
            blocks.append(_matrix(f"{where}: the scores", one, said.scores[0], said.seen))
            blocks.append(_matrix(f"{where}: the weights, each line sums to 1", one, said.weights[0], said.seen))
        seen = [f"block {layer.number}, {_favourite(one, layer)}" for layer in layers]
        blocks.append(Figure(f"attention-{at}", f"{name}: " + "; ".join(seen) + ".", (
            f"{name}: the weights of single heads{_chosen(one)}. Each row is a token that reads and sums to 1, each "
            "column a token that is read; the stronger the colour, the larger the weight; masked tokens are hatched."
            f"{_cut([one])}"
        )))  # fmt: skip
    return Section("attention", "Attention, head by head", intro, blocks)


def _matrix(caption: str, one: Traced, values: Tensor, seen: Tensor) -> Table:
    table = Table(
        f"{caption}; a line is a token that reads, a column one that is read",
        [Column("Token", key=True), *(Column(f"{s + 1} {name}", numeric=True) for s, name in enumerate(one.names))],
    )
    for t, name in enumerate(one.names):
        cells = [number(float(v), 3) if ok else MASKED for v, ok in zip(values[t], seen[t], strict=True)]
        table.add(f"{t + 1} {name}", *cells)
    return table


def _favourite(one: Traced, layer: Layer[AttentionTrace]) -> str:
    mean = layer.said.weights.mean(0)[-1]
    best = int(mean.argmax())
    return f"the last token weighs {one.names[best]} at {best + 1} most, {_share(float(mean[best]))} over all heads"


def _chosen(one: Traced) -> str:
    """Which of the blocks and heads are shown, where not all are."""
    blocks, every = attention(one), attention(one, every=True)
    heads = max(layer.said.weights.shape[0] for layer in every)
    if len(blocks) == len(every) and heads <= HEADS:
        return ""
    return f" ({len(blocks)} of {plural(len(every), 'block')}, at most {HEADS} of {plural(heads, 'head')})"


def _memory(traced: Sequence[Traced]) -> Section:
    intro = (
        "A recurrent mixer keeps a state that fades at each token; the token decides how fast. A half-life is the "
        "number of tokens after which half of what a channel or head holds would be left, were every step like this "
        "one. Written is the size of what a token adds to the state, left is how much of that the later tokens of the "
        "prompt have not faded."
    )
    blocks: list[Block] = []
    columns = [Column("Block", key=True), *(Column(title, numeric=True) for title in ("5%", "Half-life", "95%"))]
    columns += [Column("Wrote most"), Column("Kept most"), Column("Forgotten most")]
    table = Table("How long each block remembers, half-lives in tokens, and what", columns)
    those = [(at, one) for at, one in enumerate(traced) if memory(one)]
    for _, one in those:
        table.group(clean(one.subject.name) if len(traced) > 1 else "")
        for layer in memory(one, every=True):
            said = layer.said
            lives = np.percentile(said.half_life[:, 1].double().numpy(), [5, 50, 95])
            share = said.left / said.written.clamp_min(1e-30)
            cells = [_tokens_long(float(value)) for value in lives]
            cells.append(_at(one, int(said.written.argmax())))
            if len(one.names) > 1:
                cells.append(_at(one, int(said.left[:-1].argmax())))
                worst = int(share[:-1].argmin())
                cells.append(f"{_at(one, worst)}, {_share(float(share[worst]))} left")
            else:
                cells += [DASH, DASH]  # nothing stands before the last token
            table.add(str(layer.number), *cells)
    blocks.append(table)
    blocks.append(Text(
        "Half-lives: of each channel or head its median over the prompt's tokens and its states; of these the 5th "
        "percentile, the median and the 95th over the block. Kept and forgotten most, of the tokens before the last: "
        "the one of which most is left, and the one of which the smallest share is. What is left is counted by the "
        "decay alone: what later tokens write on top, or against it, is not taken off."
    ))  # fmt: skip
    blocks.append(Figure("half-life", _half_life_alt(traced), (
        "Half-lives of the channels or heads of each block, on a logarithmic scale: the thin line spans the 5th to the "
        "95th percentile, the thick one the middle half, the mark is the median. High up stands what remembers long."
    )))  # fmt: skip
    for at, one in those:
        name = clean(one.subject.name)
        seen = []
        for layer in memory(one):
            share = float(layer.said.left.sum() / layer.said.written.sum().clamp_min(1e-30))
            seen.append(f"block {layer.number}: {number(100 * share, 0)}% of all that was written is left")
        blocks.append(Figure(f"memory-{at}", f"{name}: " + "; ".join(seen) + ".", (
            f"{name}: what each token wrote into the state (outlined) and how much of it is left after the last token "
            f"(filled). A full bar is still remembered, an empty one was forgotten.{_cut([one])}"
        )))  # fmt: skip
    return Section("memory", "What is remembered, and how long", intro, blocks)


def _half_life_alt(traced: Sequence[Traced]) -> str:
    parts = []
    for one in traced:
        every = memory(one, every=True)
        if every:
            middle = [float(np.median(layer.said.half_life[:, 1].double().numpy())) for layer in every]
            parts.append(
                f"{clean(one.subject.name)}: median half-life between {_tokens_long(min(middle))} and "
                f"{_tokens_long(max(middle))} tokens over its blocks"
            )
    return "; ".join(parts) + "."


def _experts(traced: Sequence[Traced]) -> Section:
    intro = (
        "In a mixture of experts a router sends each token to a few of several networks; their outputs are added with "
        "the router's weights. Experts have no names: which does what was learned."
    )
    blocks: list[Block] = []
    for at, one in enumerate(traced):
        layers = experts(one)
        if not layers:
            continue
        name = clean(one.subject.name)
        table = Table(
            f"{name}: the experts that each token went to, with their weights",
            [Column("Token", key=True), *(Column(f"Block {layer.number}") for layer in layers)],
        )
        for t in range(max(0, len(one.names) - SHOWN), len(one.names)):
            cells = [
                ", ".join(f"{int(expert) + 1} ({_share(float(weight))})" for expert, weight in
                          zip(layer.said.chosen[t], layer.said.weight[t], strict=True))
                for layer in layers
            ]  # fmt: skip
            table.add(f"{t + 1} {one.names[t]}", *cells)
        blocks.append(table)
        used = []
        for layer in layers:
            ids = layer.said.chosen.flatten().unique()
            used.append(f"block {layer.number}: {len(ids)} of {layer.said.probability.shape[1]} experts were used")
        blocks.append(Figure(f"experts-{at}", f"{name}: " + "; ".join(used) + ".", (
            f"{name}: for each token (column) the experts (rows) it was sent to; the stronger the colour, the larger "
            f"the weight. {_upper('; '.join(used))}.{_cut([one])}"
        )))  # fmt: skip
    return Section("experts", "Which experts were chosen", intro, blocks)


def _limits(traced: Sequence[Traced]) -> Section:
    intro = "What is shown holds for this prompt and these weights alone."
    points = [
        "A weight of attention says where a head reads, not that the prediction depends on it. Sizes of what is "
        "written and left say nothing about whether it is used. Times are the fastest of three calls, and mean little "
        "on a machine that is busy; lab run speed measures them."
    ]
    silent = []
    for one in traced:
        mute = [str(at + 1) for at, block in enumerate(one.trace.blocks) if block.mixer is None]
        if mute:
            silent.append(f"{clean(one.subject.name)}, block {', '.join(mute)}")
    blocks: list[Block] = [Text(point) for point in points]
    if silent:
        blocks.append(Text("These mixers say nothing of what goes on inside: " + "; ".join(silent) + "."))
    return Section("limits", "What this does not show", intro, blocks)


# --- words ------------------------------------------------------------------------------------------


def last(matrix: np.ndarray, rows_only: bool = False) -> np.ndarray:
    """Of (T, S) the last `SHOWN` tokens, of rows or of both."""
    return matrix[-SHOWN:] if rows_only else matrix[-SHOWN:, -SHOWN:]


def _cut(traced: Sequence[Traced]) -> str:
    return f" The last {SHOWN} tokens are shown." if any(len(one.names) > SHOWN for one in traced) else ""


def _at(one: Traced, place: int) -> str:
    return f"{one.names[place]} at {place + 1}"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _bytes(value: int) -> str:
    return size(value) if value else DASH


def _share(value: float) -> str:
    return "< 0.001" if 0 < value < 0.001 else number(value, 3)


def _small(value: float) -> str:
    return number(value, 3) if abs(value) < 100 else number(value)


def _tokens_long(value: float) -> str:
    return number(value) if value < 1e6 else "over a million"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
