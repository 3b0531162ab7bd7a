"""How the sections of a study's report stand and what they add, from findings made by hand."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.report import content, lineage, masking, memory, moe, sparse, speed, tables, vocabulary
from experiments.report.document import Section, Table, Text, Verdict
from experiments.report.record import Row


def row(arm: str, phase: str, metric: str, value: float | None, **rest: Any) -> Row:
    usual = {"seed": None, "unit": "", "n": 1, "ci_low": None, "ci_high": None, "p5": None, "p95": None,
             "direction": "lower", "backend": "reference", "comparable": True, "reason": None, "context": None,
             "batch": None, "mode": None, "dtype": None}  # fmt: skip
    return Row(**({"arm": arm, "phase": phase, "metric": metric, "value": value} | usual | rest))


def record(findings: list[dict] = [], **rest: Any) -> Any:  # noqa: B006
    """As much of a record as the sections read that say what was found."""
    usual = {"findings": findings, "arms": ["a", "b"], "rows": [], "spec": {}, "batch": 1, "measured": True,
             "seeds": [0], "study": "speed", "contexts": lambda phase, metric: [], "incomplete": lambda arm: False,
             "row": lambda *place: None, "over_seeds": lambda *place, **where: [],
             "per_seed": lambda *place: [], "result": {"arms": {}}}  # fmt: skip
    return SimpleNamespace(**(usual | rest))


def standings(section: Section) -> list[tuple[str, str]]:
    return [(block.tone, block.standing) for block in section.blocks if isinstance(block, Verdict)]


def test_loading_against_inference_stands_on_what_was_measured() -> None:
    one = {"kind": "loading-against-inference", "arm": "a", "sentence": "a.", "comparable": True, "lost": {}}
    lost = one | {"lost": {"decode": [8]}}
    blocked = one | {"comparable": False}
    assert standings(memory.verdict(record([one, lost, blocked]))) == [
        ("resolved", "measured"), ("open", "measured in part"), ("blocked", "not comparable"),
    ]  # fmt: skip
    told = memory.verdict(record([one], incomplete=lambda arm: True)).blocks
    assert [block.sentence for block in told if isinstance(block, Verdict)] == [
        "a.", "b has no result to weigh loading against inference.",
    ]  # fmt: skip


def test_growth_stands_open_where_a_length_is_lost_or_nothing_grows() -> None:
    one = {"kind": "growth", "sentence": "s.", "comparable": True, "ci_low": 1.5, "ci_high": 2.0, "lost": {}}
    found = [one, one | {"lost": {"a": [64]}}, one | {"ci_low": 0.9}]
    assert standings(speed.verdict(record(found))) == [
        ("resolved", "measured"), ("open", speed.PARTLY), ("open", speed.UNCLEAR),
    ]  # fmt: skip


@pytest.mark.parametrize(("device", "batch"), [("cpu", 1), ("cpu", 4), ("cuda", 1), ("cuda", 4)])
def test_speeds_say_what_they_are_of(device: str, batch: int) -> None:
    rows = [row("a", "decode", "tokens_per_s", 1.0, batch=batch)]
    intro = speed.inference(record(rows=rows, spec={"device": device})).intro
    assert ("of all sequences of a batch together" in intro) == (batch > 1)
    assert ("of its first calls only that at the shortest length" in intro) == (device == "cpu")


@pytest.mark.parametrize("splits", [["validation"], ["validation", "test"]])
def test_a_page_says_which_text_was_read(splits: list[str]) -> None:
    """By the specification, whatever is left of the cells."""
    one = record(spec={"evaluation": {"splits": splits}})
    (of_windows,), (of_steps,) = sparse.sections(one), lineage.sections(one)
    assert ("of the validation text: this run did not read the test split" in of_windows.intro) == (len(splits) == 1)
    told = " ".join(block.text for block in of_steps.blocks if isinstance(block, Text))
    assert ("judged on the test split, which this run did not read" in told) == (len(splits) == 1)
    assert ("a step takes two trained neighbours" in told) == (len(splits) == 2)


def test_what_a_mixture_bought_stands_by_its_quality() -> None:
    one = {"kind": "bought", "sentence": "s.", "bits_per_byte": 0.1, "resolved": False, "comparable": True}
    found = [one, one | {"bits_per_byte": None}, one | {"bits_per_byte": 0.0, "identical": True}]
    assert standings(moe.sections(record(found))[0]) == [
        ("open", "quality not resolved"), ("note", "quality not known"), ("resolved", "quality the same at every seed"),
    ]  # fmt: skip


def test_a_window_stands_by_its_loss_and_by_its_growth() -> None:
    open_ = {"ci_low": -1.0, "ci_high": 1.0, "resolved": False, "comparable": True}
    sure = open_ | {"ci_low": 0.5, "resolved": True}
    curve = {"difference": [0.0, 0.1], "positions": [1.0, 9.0]}
    one = {"kind": "quality", "arm": "a", "sentence": "s.", "before": open_, "after": open_, "curve": curve}
    blocked = {zone: open_ | {"comparable": False} for zone in ("after", "growth")}
    found = [
        one | {"growth": sure}, one | {"after": sure, "growth": open_}, one | {"growth": open_}, one | blocked,
        one | {"after": None, "growth": None}, one,
    ]  # fmt: skip
    assert standings(sparse.sections(record(found))[0]) == [
        ("resolved", "after the window is full: not resolved; growth of the difference: resolved"),
        ("resolved", "after the window is full: resolved; growth of the difference: not resolved"),
        ("open", "after the window is full: not resolved; growth of the difference: not resolved"),
        ("blocked", "after the window is full: not comparable; growth of the difference: not comparable"),
        ("open", "not resolved"), ("open", "after the window is full: not resolved"),
    ]  # fmt: skip


def test_the_loads_told_are_those_drawn() -> None:
    load = {"kind": "load", "arm": "a", "loads": [[0.5, 0.5], [0.7, 0.3]], "busiest": 9.0, "idlest": 0.01}
    held = {"kind": "bytes", "arm": "a", "loaded_bytes": 1e6, "touched_bytes": {"1": 1e6}}
    assert moe._alt(record([held, load])).endswith(" Load of a's experts over an even share: 0.600 to 1.40.")


def test_sequences_are_told_of_only_where_something_was_measured() -> None:
    assert "take 8 sequences at a time" in tables.together(record(batch=8))
    assert tables.together(record(batch=8, measured=False)) == tables.together(record()) == ""


def test_a_pattern_shows_the_blocks_that_it_names() -> None:
    blocks = {"M": {"kind": "mamba"}, "T": {"kind": "attention"}, "3": {"kind": "mamba3"}}
    config = {"layers": 4, "hybrid": {"pattern": "MMT", "blocks": blocks}}
    assert content._used(config) == {
        "layers": 4, "hybrid": {"pattern": "MMT", "blocks": {"M": {"kind": "mamba"}, "T": {"kind": "attention"}}},
    }  # fmt: skip
    assert content._used({"layers": 2, "hybrid": None}) == {"layers": 2, "hybrid": None}


def of_sizes(rows: list[Row], batch: int = 1) -> Any:
    """A vocabulary study of one arm at two sizes."""

    def over_seeds(phase: str, metric: str, arm: str | None = None, **where: Any) -> list[Row]:
        return [one for one in rows if (one.phase, one.metric) == (phase, metric) and arm in (None, one.arm)]

    arms = {f"a-v{size}": {"config": {"vocabulary": size}} for size in (257, 512)}
    spec = {"vocabulary": {"text_bytes": 100}, "measurement": {}}
    return record(rows=rows, result={"arms": arms}, arms=list(arms), spec=spec, batch=batch, over_seeds=over_seeds,
                  row=lambda arm, phase, metric, at=None: next(iter(over_seeds(phase, metric, arm)), None),
                  absence=lambda *place: "lost")  # fmt: skip


def test_the_state_beside_that_of_a_sequence_is_of_a_sequence() -> None:
    rows = [row("a-v257", "model", "state_bytes_per_byte", 5.0, context=90)]
    rows += [row("a-v257", "decode", metric, 4000.0, batch=4) for metric in ("state_bytes", "state_bytes_analytic")]
    table = next(block for block in vocabulary.memory(of_sizes(rows, 4)).blocks if block.kind == "table")
    first = table.groups[0][1][0]
    assert [cell.text for cell in first[-2:]] == ["1,000", "1,000"]


def test_speeds_have_the_seeds_of_each_phase() -> None:
    rows = [
        row("a-v257", phase, metric, 10.0, n=n)
        for phase, n in (("train", 3), ("decode", 2)) for metric in ("tokens_per_s", "bytes_per_s")
    ]  # fmt: skip
    table = next(block for block in vocabulary.speed(of_sizes(rows)).blocks if block.kind == "table")
    assert table.groups[0][1][0][-1].text == "3 / 2"


def test_decoders_have_the_seeds_of_their_text_beside_those_of_their_training(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = row("a", "quality", "final_training_loss", 1.0, n=3)
    written = replace(trained, metric="judged_nats_per_token", n=2, mode="greedy")
    monkeypatch.setattr(masking, "writers", lambda record: ["a"])
    monkeypatch.setattr(masking, "judge", lambda record: "a")
    one = record(
        arms=["a"], curves={}, row=lambda arm, phase, metric, at=None: trained if metric == trained.metric else None,
        over_seeds=lambda phase, metric, arm=None, mode=None: [written] if mode == "greedy" else [],
        absence=lambda *place: "lost", per_seed=lambda *place: [], objective=lambda arm: "causal",
    )  # fmt: skip
    table = next(block for block in masking.decoders(one).blocks if block.kind == "table")
    assert table.groups[0][1][0][-1].text == "3 / 2"


@pytest.mark.parametrize(("arms", "ordered"), [
    (["lstm", "transformer", "mamba"], True), (["transformer", "mine", "mamba", "hybrid"], True),
    (["mamba", "transformer", "lstm"], False), (["lstm", "mamba3", "mamba2"], False),
])  # fmt: skip
def test_the_order_of_history_is_said_of_no_other_order(arms: list[str], ordered: bool) -> None:
    one = record(arms=arms, result={"arms": {arm: {"model": f"{arm}-tiny"} for arm in arms}})
    (section,) = lineage.sections(one)
    (table,) = [block for block in section.blocks if isinstance(block, Table)]
    assert ("of history" in section.title) == ordered
    assert ("which is not that of history" in section.intro) != ordered
    assert ("which is not that of history" in table.caption) != ordered
    assert [cells[0].text for _, body in table.groups for cells in body] == arms


@pytest.mark.parametrize("phase", ["decode", "prefill", "train", "load"])
def test_what_a_decode_step_computes_explains_no_other_phase(phase: str) -> None:
    one = record(over_seeds=lambda phase, metric, arm: [row(arm, phase, metric, 1.0 if "analytic" in metric else 2.0)])
    table = Table("Memory", [])
    *_, residual = memory._beside_formula(table, one, "a", phase, "peak_bytes")
    ((reason, letter),) = table.notes.items()
    assert (residual.text, residual.marks) == ("+100%", letter)
    assert ("buffers of libraries, what a decode step computes" in reason) == (phase == "decode")
    assert reason.startswith("beyond 5%. Not predicted are what the allocator keeps or rounds up, buffers of libraries")
