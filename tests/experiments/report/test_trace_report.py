"""What a reader of a trace sees: the numbers of the trace, nothing hostile, masked tokens visibly so."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch

from experiments.report import document, drawing, figures, formats, render_trace, trace, trace_figures
from experiments.tracing import Traced, subjects, take_apart
from models.trace import AttentionTrace, MemoryTrace

PROMPT = "a\tb\n</p><script>"


def traced(tmp_path, name: str, prompt: str = PROMPT, **options) -> list[Traced]:
    return take_apart(subjects(name, tmp_path, **options), prompt, "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Traced]:
    """Every kind of figure: scan and attention, experts, a memory without a matrix."""
    nowhere = tmp_path_factory.mktemp("nowhere")
    both = traced(nowhere, "hybrid-tiny", against="moe-tiny")
    return both + traced(nowhere, "lstm-tiny")


def named(page: document.Document, kind: str) -> list:
    return [block for section in page.sections for block in section.blocks if block.kind == kind]


def test_the_document_names_exactly_the_figures_that_are_drawn(models):
    page = trace.document(PROMPT, models)
    names = [figure.name for figure in named(page, "figure")]
    assert sorted(names) == sorted(trace_figures.plots(models))
    assert {name.rstrip("-012") for name in names} == {
        "stream", "lens", "mixing", "attention", "memory", "experts", "half-life",
    }  # fmt: skip


def test_every_figure_has_a_dark_and_a_narrow_form(models):
    for name, plot in trace_figures.plots(models).items():
        light = figures.svg(plot, "narrow")
        assert figures.dark(light) != light, name  # raises for a colour without its counterpart


def test_text_says_what_the_trace_says(models):
    text = render_trace(PROMPT, models, "table")
    for one in models:
        found = one.trace
        assert f"{one.subject.name} chooses token {found.chosen}, " in text
        for stage in found.stages:
            shapes = (" x ".join(map(str, shape)) for shape in (stage.input_shape, stage.output_shape))
            assert re.search(rf"^ *{re.escape(stage.name)} \[\w\] +{' +'.join(shapes)} ", text, re.MULTILINE)
            assert stage.does.split(";")[0] in " ".join(text.split())
    assert "These mixers say nothing" not in text
    assert "Untrained: hybrid-tiny, moe-tiny, lstm-tiny" in text
    assert "\t" not in text
    assert "“a⇥b↵</p><script>”" in text


def test_a_page_shows_a_prompt_as_text(models):
    plots = trace_figures.plots(models)
    drawn = {name: dict.fromkeys(("wide", "narrow", "wide-dark", "narrow-dark"), "<svg/>") for name in plots}
    html = formats.html(trace.document(PROMPT, models), drawn)
    assert "<script" not in html
    assert "a⇥b↵&lt;/p&gt;&lt;script&gt;" in html
    assert len(re.findall("<figcaption>", html)) == len(plots)


def test_masked_entries_are_hatched_and_the_rest_shaded():
    rng = np.random.default_rng(0)
    matrix, seen = rng.uniform(0.05, 1, (5, 5)), rng.uniform(size=(5, 5)) < 0.6
    axes = Figure().add_subplot()
    trace_figures._heat(axes, np.where(seen, matrix, 0), seen, list("abcde"))
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    shaded = [patch for patch in axes.patches if not patch.get_hatch()]
    for row in range(5):
        for column in range(5):
            point = (column, row)
            (under,) = [patch for patch in axes.patches if inside(patch, point)]
            assert (under in hatched) == (not seen[row, column])
            if under in shaded:
                colour = to_rgba(drawing.ARMS[0])
                assert under.get_facecolor()[:3] == pytest.approx(colour[:3])
                assert under.get_facecolor()[3] == pytest.approx(matrix[row, column] ** 0.5, abs=0.05)
    assert [label.get_text() for label in axes.get_xticklabels()] == list("abcde")


def inside(patch: PathPatch, point: tuple[float, float]) -> bool:
    """A patch is of rectangles of five vertices each."""
    corners = np.asarray(patch.get_path().vertices).reshape(-1, 5, 2)
    low, high = corners.min(1), corners.max(1)
    return bool(((low <= point) & (point <= high)).all(1).any())


def test_the_last_token_and_what_it_weighs_most(tmp_path):
    (one,) = traced(tmp_path, "transformer-tiny", "abcd")
    table = next(t for t in named(trace.document("abcd", [one]), "table") if "gathers from" in t.caption)
    said = one.trace.blocks[0].mixer
    assert isinstance(said, AttentionTrace)
    lines = [[cell.text for cell in line] for _, lines in table.groups for line in lines]
    assert [line[1] for line in lines] == ["1", "2"]
    for head, line in enumerate(lines):
        weights = said.weights[head, 3].tolist()
        best = max(range(4), key=lambda s: weights[s])
        assert line[2].startswith(f"{'abcd'[best]} at {best + 1} ({weights[best]:.3f}; ")
        assert line[2].count(" at ") == 3
        assert float(line[3]) == pytest.approx(float(said.mixed[head, 3].norm()), abs=1e-3)


def test_what_is_remembered(tmp_path):
    (one,) = traced(tmp_path, "mamba-tiny", "abcdef")
    page = trace.document("abcdef", [one])
    table = next(t for t in named(page, "table") if "remembers" in t.caption)
    ((_, lines),) = table.groups
    for block, line in zip(one.trace.blocks, lines, strict=True):
        said = block.mixer
        assert isinstance(said, MemoryTrace)
        median = sorted(said.half_life[:, 1].tolist())
        assert float(line[2].text) == pytest.approx(np.median(median), rel=0.01)
        assert float(line[1].text) <= float(line[2].text) <= float(line[3].text)
        wrote = max(range(6), key=lambda t: float(said.written[t]))
        assert line[4].text == f"{'abcdef'[wrote]} at {wrote + 1}"
        share = (said.left / said.written).tolist()[:-1]
        assert (
            line[6].text
            == f"{'abcdef'[share.index(min(share))]} at {share.index(min(share)) + 1}, {min(share):.3f} left"
        )
    (figure,) = [figure for figure in named(page, "figure") if figure.name == "half-life"]
    told = sorted((line[2].text for line in lines), key=float)
    assert f"median half-life between {told[0]} and {told[-1]} tokens" in figure.alt
    (figure,) = [figure for figure in named(page, "figure") if figure.name == "mixing"]
    assert "Hatched: masked" in figure.caption
    matrix = next(t for t in named(page, "table") if "|M|" in t.caption)
    ((_, lines),) = matrix.groups
    first = one.trace.blocks[0].mixer
    assert isinstance(first, MemoryTrace)
    assert first.matrix is not None
    for t, line in enumerate(lines):
        for s, cell in enumerate(line[1:]):
            assert (
                cell.text == "masked"
                if s > t
                else float(cell.text) == pytest.approx(float(first.matrix[t, s]), abs=5e-4)
            )


@pytest.mark.parametrize("prompt", ["a", "ab", "x" * 100])
@pytest.mark.parametrize("name", ["mamba3-tiny", "sliding-tiny", "gpt1"])
def test_short_and_long_prompts(tmp_path, name, prompt):
    """One token has nothing before it; of a long prompt the pictures show the end, and say so."""
    found = traced(tmp_path, name, prompt)
    text = render_trace(prompt, found, "table")
    assert "nan" not in text
    assert len(trace.last(np.zeros((100, 100)))) == trace.SHOWN
    captions = " ".join(figure.caption for figure in named(trace.document(prompt, found), "figure"))
    assert (f"last {trace.SHOWN} tokens are shown" in captions) == (len(prompt) > trace.SHOWN)


def test_a_mixer_that_says_nothing_is_named(tmp_path):
    found = traced(tmp_path, "mamba3-tiny", "ab", settings=["mixer.rank=2"])
    assert "These mixers say nothing of what goes on inside: mamba3-tiny, block 1." in render_trace(
        "ab", found, "table"
    )


def test_a_model_that_fills_in_is_not_said_to_continue(tmp_path):
    (one,) = traced(tmp_path, "transformer-tiny", "ab", settings=["mixer.causal=false"])
    said = one.trace.blocks[0].mixer
    assert isinstance(said, AttentionTrace)
    assert said.seen.all()
    (figure,) = [figure for figure in named(trace.document("ab", [one]), "figure") if figure.name == "mixing"]
    assert "Nothing is masked" in figure.caption
    assert "fill in hidden tokens" not in render_trace("ab", [one], "table")
    for objective, said in (("masked", "fill in hidden tokens"), ("unmasked", "read off the next token")):
        trained = replace(one, subject=replace(one.subject, objective=objective, folder=tmp_path))
        text = render_trace("ab", [trained], "table")
        assert f"Trained to {said}: transformer-tiny" in text
        (verdict,) = [
            block for block in named(trace.document("ab", [trained]), "verdict") if "chooses" in block.sentence
        ]
        assert (verdict.tone, verdict.numbers) == ("open", f"trained to {said}")


def test_few_are_chosen_evenly():
    assert trace.sampled(range(32), 4) == [0, 10, 21, 31]
    assert trace.sampled(range(3), 4) == [0, 1, 2]
    assert trace.sampled(range(7), 3) == [0, 3, 6]


def test_a_decoded_token_that_is_no_text(tmp_path):
    (one,) = traced(tmp_path, "mamba-tiny", "é")  # tied and untrained, it repeats the last byte
    assert one.trace.chosen == 0xA9
    assert one.text == "\N{REPLACEMENT CHARACTER}"
    assert "it is no whole character" in render_trace("é", [one], "table")


def test_expert_names_start_at_one(models):
    moe = models[1]
    choice = moe.trace.blocks[0].experts
    assert choice is not None
    table = next(t for t in named(trace.document(PROMPT, models), "table") if "experts" in t.caption)
    for t, line in enumerate(table.groups[0][1]):
        expected = [f"{int(x) + 1} ({float(w):.3f})" for x, w in zip(choice.chosen[t], choice.weight[t], strict=True)]
        assert line[1].text == ", ".join(expected)
    assert torch.equal(choice.weight.sum(-1).round(decimals=5), torch.ones(len(moe.names)))
