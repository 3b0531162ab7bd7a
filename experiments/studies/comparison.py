"""The comparison: arms are trained and evaluated, paired by seed, and the trained models measured."""

from collections.abc import Callable, Iterator
from typing import Any

from experiments import cells
from experiments.objectives import SELECTED
from experiments.rows import SEES, bytes_row, load_rows, on_card, per_step, percentiles, rate, row, turn_ms
from experiments.spec import Experiment
from experiments.store import Cell, RunDirectory
from experiments.studies.pairing import Question, compared
from models import cost

MAKES = "train"
TIMED = ("train", "prefill", "decode")  # the kinds of cells whose speeds are compared


def plan(experiment: Experiment) -> list[Cell]:
    """Every cell in the order in which it runs. Arms alternate, and swap places from seed to seed, so that a
    machine that slows down in time does not slow down one arm."""
    arms = list(experiment.cells())
    ordered = [(seed, arms if i % 2 == 0 else arms[::-1]) for i, seed in enumerate(experiment.seeds)]
    planned = [Cell(arm, seed, "train") for seed, order in ordered for arm in order]
    if not experiment.measurement.enabled:
        return planned
    phases: list[tuple[str, int | None]] = [("load", None)]
    phases += [(kind, context) for kind in ("prefill", "decode") for context in experiment.measurement.contexts]
    configs = cells.model_configs(experiment)
    planned += [
        Cell(arm, seed, kind, context)
        for seed, order in ordered for kind, context in phases for arm in order
        if kind == "load" or configs[arm].causal
    ]  # fmt: skip
    return planned


def turns(cell: Cell, experiment: Experiment) -> tuple | None:
    """Where speed is measured on a CPU, which other programs use too, the arms of a seed take turns, so that one that
    grows slower in between grows slower for all of them. A GPU is each arm's alone, with all its memory."""
    if experiment.device == "cuda" or not experiment.measurement.enabled or cell.kind not in TIMED:
        return None
    return (cell.seed, cell.kind, cell.context, cell.batch)


def together(cell: Cell, experiment: Experiment) -> None:
    """Each has a process of its own."""


def lengths(experiment: Experiment, causal: bool) -> dict[str, int]:
    """The longest sequences that the run makes, by the settings that say so."""
    measured, sampled = experiment.measurement, experiment.evaluation
    needs = {"training.context": experiment.training.context}
    if measured.enabled and causal:
        needs["measurement.contexts and decode_tokens"] = measured.contexts[-1] + measured.decode_tokens
    if sampled.samples and causal:
        needs[cells.AFTER_A_PROMPT] = cells.PROMPT + sampled.sample_tokens
    return needs


def work(cell: Cell, experiment: Experiment) -> tuple[Callable[..., Any], tuple]:
    """The function that does it in a fresh process, and its arguments after the experiment."""
    if cell.kind == "train":
        return cells.train_cell, (cell.arm, experiment.cells()[cell.arm], cell.seed)
    return cells.measure_cell, (cell.kind, cell.context, cell.batch)


def rows(cell: Cell, result: dict[str, Any], experiment: Experiment, run: RunDirectory) -> Iterator[dict]:
    if cell.kind == "train":
        yield from _quality_rows(cell, result, experiment.cells()[cell.arm].objective)
        yield from _training_rows(cell, result, experiment, run)
    elif cell.kind == "load":
        yield from load_rows(cell, result, batch=None, mode="eager", dtype=experiment.measurement.dtype)
    else:
        yield from _phase_rows(cell, result, experiment)


def _quality_rows(cell: Cell, result: dict[str, Any], objective: str) -> Iterator[dict]:
    common = {"backend": result["backend"]["name"]}
    if objective == "unmasked":
        common |= {"comparable": False, "reason": SEES}
    for split, quality in result["splits"].items():
        if "masked_token_loss" in quality:
            common["n"] = quality["tokens"]
            loss, accuracy = quality["masked_token_loss"], quality["masked_accuracy"]
            yield row(cell, "quality", f"{split}_masked_token_loss", loss, "nats/token", "lower", **common)
            yield row(cell, "quality", f"{split}_masked_accuracy", accuracy, "share", "higher", **common)
            reason = "a masked model gives no likelihood of a text"
            yield row(cell, "quality", f"{split}_bits_per_byte", None, "bits/byte", "lower", reason=reason, **common)
    if not any("bits_per_byte" in quality for quality in result["splits"].values()):
        return
    initial = result["initial"]["test_bits_per_byte"]
    if initial is not None:
        common["n"] = result["splits"]["test"]["tokens"]
        yield row(cell, "quality", "initial_test_bits_per_byte", initial, "bits/byte", "none", **common)
    for split, quality in result["splits"].items():
        common["n"] = quality["tokens"]
        bits = quality["bits_per_byte"]
        yield row(cell, "quality", f"{split}_bits_per_byte", bits, "bits/byte", "lower", **common)
        if split == "test":
            perplexity = quality["token_perplexity"]
            reason = {"reason": common.get("reason") or "too large for a number"} if perplexity is None else {}
            yield row(cell, "quality", "test_token_perplexity", perplexity, "perplexity", "lower", **common | reason)
            losses = quality["loss_at_position"]
            positions = sorted(
                {2**i for i in range(len(losses).bit_length())} & {*range(1, len(losses) + 1)} | {len(losses)}
            )
            for position in positions:
                at = {"context": position, "n": quality["windows"]}
                if position == len(losses):
                    at |= {"comparable": True, "reason": None}  # what follows a window no model sees
                yield row(
                    cell, "quality", "test_loss_at_position", losses[position - 1], "nats/token", "lower",
                    **common | at,
                )  # fmt: skip


def _training_rows(cell: Cell, result: dict[str, Any], experiment: Experiment, run: RunDirectory) -> Iterator[dict]:
    train, settings = result["train"], experiment.training
    common = {
        "backend": result["backend"]["name"], "context": settings.context,
        "batch": settings.batch * settings.accumulate, "mode": "eager", "dtype": settings.precision,
    }  # fmt: skip
    times = percentiles(train["step_ms"])
    yield row(cell, "train", "step_ms", unit="ms", direction="lower", **times, **common)
    yield row(
        cell, "train", "tokens_per_s", unit="tokens/s", direction="higher",
        **rate(times, train["tokens_per_step"]), **common,
    )  # fmt: skip
    yield bytes_row(cell, "train", "peak_bytes", train["peak_bytes"], **common)
    yield from on_card(cell, "train", train, **common)
    predicted = SELECTED if experiment.cells()[cell.arm].objective == "masked" else 1.0
    flops = cost.training_flops_per_token(cells.kept_config(run.folder(cell)), settings.context, predicted)
    yield row(cell, "train", "flops_per_token", flops, "FLOP/token", "none", **common)
    loads = result.get("expert_load")
    if loads:
        busiest = max(max(load) * len(load) for load in loads)
        yield row(cell, "train", "busiest_expert_load", busiest, "x", "lower", **common)


def _phase_rows(cell: Cell, result: dict[str, Any], experiment: Experiment) -> Iterator[dict]:
    common = {
        "batch": result["batch"], "mode": result.get("mode", "eager"), "dtype": experiment.measurement.dtype,
        "backend": result["backend"],
    }  # fmt: skip
    times = percentiles(turn_ms(result).tolist())
    if cell.kind == "prefill":
        tokens, steps, latency = result["context"], 1, "time_to_first_token_ms"
    else:
        tokens = steps = result["tokens_per_sample"]
        latency = "ms_per_token"
    speed = rate(times, result["batch"] * tokens)
    yield row(cell, cell.kind, "tokens_per_s", unit="tokens/s", direction="higher", **speed, **common)
    yield row(cell, cell.kind, latency, unit="ms", direction="lower", **per_step(times, steps), **common)
    metrics = ["peak_bytes", "working_bytes"]
    if cell.kind == "decode":
        metrics += ["state_bytes", "state_bytes_analytic"]
    for metric in metrics:
        reason = UNCOUNTED if result[metric] is None else None
        yield bytes_row(cell, cell.kind, metric, result[metric], reason=reason, **common)
    yield from on_card(cell, cell.kind, result, **common)


# what the verdict speaks about: phase, metric, kind, and at which context where there are several
_QUESTIONS = (
    ("quality", "test_bits_per_byte", "difference", None),
    ("quality", "test_masked_token_loss", "difference", None),
    ("train", "tokens_per_s", "ratio", None),
    ("prefill", "tokens_per_s", "ratio", "longest"),
    ("decode", "tokens_per_s", "ratio", "longest"),
    ("load", "resident_bytes", "ratio", None),
    ("decode", "peak_bytes", "ratio", "longest"),
    ("decode", "state_bytes", "ratio", "longest"),
)

UNCOUNTED = "the steps of a recording work in memory that it has set aside, which no count of allocations shows"


def questions(experiment: Experiment, a: str, b: str) -> list[Question]:
    """All that the comparison asks of b against a."""
    measured = experiment.measurement
    longest = (measured.contexts[-1], measured.batch)
    return [
        Question(a, b, phase, metric, kind, *(longest if where else (None, None)))
        for phase, metric, kind, where in _QUESTIONS
    ]


def verdicts(rows: list[dict], experiment: Experiment) -> list[dict]:
    """Every arm against the first, on every question; Holm's correction over all of them. A sweep has none."""
    if experiment.learning_rates:
        return []
    first, *others = experiment.arms
    asked = [one for other in others for one in questions(experiment, first, other)]
    return compared(rows, asked, experiment.device, experiment.seeds)


def findings(rows: list[dict], experiment: Experiment, run: RunDirectory) -> list[dict]:
    """None: the verdicts say it all."""
    return []
