"""What a causal mask is for: a decoder with it, the same one without it, and an encoder that hides tokens instead.

Arms are trained and evaluated as in a comparison. Then the causal model of each seed judges what each decoder writes,
and tokens of validation text are hidden one at a time, for an encoder to guess from both sides and for the causal model
to guess from the left."""

from collections.abc import Callable, Iterator
from typing import Any

from experiments import cells, scoring
from experiments.evaluation import perplexity
from experiments.numbers import number, plural
from experiments.objectives import SELECTED
from experiments.rows import OTHER_LOSS, row
from experiments.scoring import GREEDY, SAMPLED, TRUE
from experiments.spec import Experiment
from experiments.statistics import RESOLVED, Comparison, holm, paired_difference
from experiments.store import Cell, RunDirectory
from experiments.studies import comparison, pairing

MAKES, turns, together = comparison.MAKES, comparison.turns, comparison.together

COLLAPSED = 0.5  # of the causal loss: below it a training loss counts as far below
TEXTS, BLANKS = 2, 4  # how many prompts with what followed, and how many hidden tokens, the result keeps
PSEUDO = "each token is guessed from both its sides, which gives no likelihood of a text, so no perplexity"
Seeds = dict[int, float]
Pairs = list[tuple[float, ...]]


def judge(experiment: Experiment) -> str:
    """The arm whose models judge: the first causal one."""
    return next(name for name, arm in experiment.arms.items() if arm.objective == "causal")


def plan(experiment: Experiment) -> list[Cell]:
    """The comparison's cells; then, of each decoder, what it writes, and of encoders and the judge, the blanks."""
    arms, judging = experiment.arms, judge(experiment)
    planned = comparison.plan(experiment)
    planned += [Cell(a, seed, "judge") for seed in experiment.seeds for a in arms if arms[a].objective != "masked"]
    return planned + [
        Cell(a, seed, "blanks") for seed in experiment.seeds for a in arms
        if arms[a].objective == "masked" or a == judging
    ]  # fmt: skip


def lengths(experiment: Experiment, causal: bool) -> dict[str, int]:
    written = {cells.AFTER_A_PROMPT: cells.PROMPT + experiment.evaluation.sample_tokens}
    return comparison.lengths(experiment, causal) | written


def work(cell: Cell, experiment: Experiment) -> tuple[Callable[..., Any], tuple]:
    if cell.kind == "judge":
        return scoring.judge_cell, (judge(experiment), cell.seed)
    if cell.kind == "blanks":
        return scoring.blanks_cell, (experiment.arms[cell.arm].objective,)
    return comparison.work(cell, experiment)


def rows(cell: Cell, result: dict[str, Any], experiment: Experiment, run: RunDirectory) -> Iterator[dict]:
    if cell.kind == "judge":
        yield from _judged_rows(cell, result)
    elif cell.kind == "blanks":
        yield from _blank_rows(cell, result)
    else:
        yield from comparison.rows(cell, result, experiment, run)
        if cell.kind == "train":
            reason = OTHER_LOSS.get(experiment.arms[cell.arm].objective)
            loss, steps = _final_loss(run, cell)
            yield row(cell, "quality", "final_training_loss", loss, "nats/token", "lower",
                      n=steps, comparable=reason is None, reason=reason)  # fmt: skip


def _final_loss(run: RunDirectory, cell: Cell) -> tuple[float, int]:
    """Mean over the last tenth of the steps, and how many those are."""
    losses = run.losses(cell)
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last), len(last)


def _judged_rows(cell: Cell, result: dict[str, Any]) -> Iterator[dict]:
    for way, found in result["written"].items():
        common = {"mode": way, "n": found["tokens"]}
        nats, bits = found["nats_per_token"], found["bits_per_byte"]
        reason = "nothing but ends of documents was written" if bits is None else None
        yield row(cell, "quality", "judged_nats_per_token", nats, "nats/token", "none", **common)
        yield row(cell, "quality", "judged_bits_per_byte", bits, "bits/byte", "none", reason=reason, **common)


def _blank_rows(cell: Cell, result: dict[str, Any]) -> Iterator[dict]:
    share = result["guessed"] / result["asked"]
    yield row(cell, "quality", "blanks_guessed", share, "share", "higher", n=result["asked"])
    if "pseudo_log_likelihood" in result:
        nats = -result["pseudo_log_likelihood"] / result["tokens"]
        common = {"n": result["tokens"], "comparable": False, "reason": PSEUDO}
        yield row(cell, "quality", "pseudo_nats_per_token", nats, "nats/token", "lower", **common)
        yield row(cell, "quality", "pseudo_perplexity", perplexity(nats), "perplexity", "lower", **common)


def verdicts(rows: list[dict], experiment: Experiment) -> list[dict]:
    """The comparison's, of quality alone where speed and memory were not measured: how long a training step of another
    objective takes is no question of this study."""
    asked = rows if experiment.measurement.enabled else [row for row in rows if row["phase"] == "quality"]
    return comparison.verdicts(asked, experiment)


def findings(rows: list[dict], experiment: Experiment, run: RunDirectory) -> list[dict]:
    """Of each arm without a mask its training loss and what it writes, of each encoder its blanks; beside the judge's.
    Holm's correction covers all of these comparisons that may be made."""
    judging, context = judge(experiment), experiment.training.context
    drafts: list[tuple[dict, Comparison]] = []
    for arm in _having(experiment, "unmasked"):
        drafts += _collapse(rows, arm, judging) + _last_place(rows, arm, judging, context)
        drafts += [one for way in (GREEDY, SAMPLED) for one in _written(rows, arm, judging, way)]
    for arm in _having(experiment, "masked"):
        drafts += _blanks(rows, arm, judging)
    standings = [_standing(rows, finding["arm"], judging) for finding, _ in drafts]
    corrected = holm([
        compared.p if standing["comparable"] else None
        for (_, compared), standing in zip(drafts, standings, strict=True)
    ])  # fmt: skip
    found = []
    for (finding, compared), standing, p in zip(drafts, standings, corrected, strict=True):
        decided = compared.exact or (p is not None and p < RESOLVED)
        found.append(finding | standing | {
            "against": judging, "difference": compared.interval.estimate, "ci_low": compared.interval.low,
            "ci_high": compared.interval.high, "n": compared.interval.n, "p_holm": p,
            "resolved": decided and standing["comparable"],
        })  # fmt: skip
        if (n := compared.interval.n) < len(experiment.seeds):
            found[-1]["sentence"] += f" That is of {n} of the run's {len(experiment.seeds)} seeds; the others lack it."
        if not standing["comparable"]:
            found[-1]["sentence"] += f" Nothing follows from that: {standing['reason']}."
    found += [one for arm in _having(experiment, "masked") for one in _pseudo(rows, arm)]
    return found + _texts(experiment, run) + _examples(experiment, run)


def _standing(rows: list[dict], *arms: str) -> dict[str, Any]:
    """Whether what the arms' models did may be compared. That an objective sees more than another is what the study is
    about, and no reason against it."""
    own = {PSEUDO, *OTHER_LOSS.values()}
    asked = [row for row in rows if row["arm"] in arms and row["phase"] == "quality" and row["reason"] not in own]
    return pairing.comparability(asked)


def _having(experiment: Experiment, objective: str) -> list[str]:
    return [name for name, arm in experiment.arms.items() if arm.objective == objective]


def _values(rows: list[dict], arm: str, metric: str, mode: str | None = None, context: int | None = None) -> Seeds:
    wanted = (arm, metric, mode, context)
    return {
        r["seed"]: r["value"] for r in rows
        if (r["arm"], r["metric"], r["mode"], r["context"]) == wanted and None not in (r["seed"], r["value"])
    }  # fmt: skip


def _paired(*sides: Seeds) -> Pairs:
    return [tuple(side[seed] for side in sides) for seed in sides[0] if all(seed in side for side in sides)]


def _means(pairs: Pairs) -> list[float]:
    return [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]


def _against(pairs: Pairs, resolution: float = 0.0) -> Comparison:
    """The first of each against the second."""
    return paired_difference([pair[1] for pair in pairs], [pair[0] for pair in pairs], resolution=resolution)


def _at(hits: list[bool]) -> str:
    if len(hits) == 1:
        return "at the one seed" if hits[0] else "at no seed"
    return {len(hits): "at every seed", 0: "at no seed"}.get(sum(hits), f"at {sum(hits)} of {len(hits)} seeds")


def _collapse(rows: list[dict], arm: str, judging: str) -> list[tuple[dict, Comparison]]:
    pairs = _paired(*(_values(rows, name, "final_training_loss") for name in (arm, judging)))
    if not pairs:
        return []
    mine, causal = _means(pairs)
    below = [a < b for a, b in pairs]
    told = (f"Over the last tenth of the steps {arm}'s training loss is {number(mine)} nats/token, {judging}'s "
            f"{number(causal)}")  # fmt: skip
    if all(a < COLLAPSED * b for a, b in pairs):
        outcome = "far below"
        told += f": less than half of it {_at(below)}. {arm} reads the next token instead of predicting it."
    elif all(below):
        outcome = "below"
        told += (
            f": below it {_at(below)}, if not by half at each. So looks an arm that begins to read the next token off "
            f"its input, and by chance one that does not."
        )
    else:
        outcome, told = "not below", f"{told}: below it {_at(below)}. This run shows no collapse."
    finding = {"kind": "training-loss", "arm": arm, "loss": mine, "causal_loss": causal, "outcome": outcome}
    return [(finding | {"sentence": told}, _against(pairs))]


def _last_place(rows: list[dict], arm: str, judging: str, context: int) -> list[tuple[dict, Comparison]]:
    metric = "test_loss_at_position"
    pairs = _paired(*(_values(rows, name, metric, context=context) for name in (arm, judging)))
    if not pairs:
        return []
    mine, causal = _means(pairs)
    worse = [a > b for a, b in pairs]
    told = (f"Only after the last token of a window is there nothing to read off. There {arm}'s loss on test text is "
            f"{number(mine)} nats/token, {judging}'s {number(causal)}")  # fmt: skip
    if all(worse):
        outcome = "worse"
        told += f": where it has to predict, {arm} is worse {_at(worse)}."
    else:
        outcome = "not worse"
        told += (
            f": where it has to predict, {arm} is worse {_at(worse)}, so this run does not show that it predicts worse."
        )
    finding = {"kind": "last-place", "arm": arm, "loss": mine, "causal_loss": causal, "outcome": outcome}
    return [(finding | {"sentence": told}, _against(pairs))]


def _written(rows: list[dict], arm: str, judging: str, way: str) -> list[tuple[dict, Comparison]]:
    metric = "judged_nats_per_token"
    pairs = _paired(_values(rows, arm, metric, way), _values(rows, judging, metric, way),
                    _values(rows, judging, metric, TRUE))  # fmt: skip
    if not pairs:
        return []
    mine, own, truth = _means(pairs)
    worse, than_true = [a > b for a, b, _ in pairs], [a > c for a, _, c in pairs]
    told = (f"Under {judging}'s model, what {arm} writes ({way}) costs {number(mine)} nats/token, what {judging} "
            f"writes {number(own)}, and the text that really follows {number(truth)}")  # fmt: skip
    if all(worse):
        outcome = "worse than both" if all(than_true) else "worse than the judge's"
        times = _times(mine - own)
        told += (f": {arm}'s costs more than {judging}'s {_at(worse)}, a token being {times} times less likely on "
                 f"(geometric) average, and more than the true text {_at(than_true)}.")  # fmt: skip
    else:
        outcome = "not worse"
        told += f": {arm}'s costs more than {judging}'s {_at(worse)}, so this run does not show that it writes worse."
    finding = {"kind": "written", "arm": arm, "way": way, "nats_per_token": mine, "judges_own": own, "true_text": truth}
    return [(finding | {"outcome": outcome, "sentence": told}, _against(pairs))]


def _blanks(rows: list[dict], arm: str, judging: str) -> list[tuple[dict, Comparison]]:
    pairs = _paired(*(_values(rows, name, "blanks_guessed") for name in (arm, judging)))
    if not pairs:
        return []
    mine, left = _means(pairs)
    more = [a > b for a, b in pairs]
    told = (f"Of single hidden tokens {arm} guesses {100 * mine:.1f}% from both sides; {judging} guesses "
            f"{100 * left:.1f}% of the same tokens from the left alone: {arm} guesses more {_at(more)}")  # fmt: skip
    learns = f"{arm} learns from {SELECTED:.0%} of the tokens of a batch, {judging} from all"
    if all(more):
        outcome, told = "more", f"{told}, although {learns}."
    elif not any(more):
        outcome, told = "not more", f"{told}. It reads both sides, but {learns}."
    else:
        outcome, told = "mixed", f"{told}."
    finding = {"kind": "blanks", "arm": arm, "share": mine, "left_share": left, "outcome": outcome}
    asked = min(r["n"] for r in rows if r["metric"] == "blanks_guessed" and r["seed"] is not None)
    return [(finding | {"sentence": told}, _against(pairs, resolution=1 / asked))]


def _pseudo(rows: list[dict], arm: str) -> list[dict]:
    values = list(_values(rows, arm, "pseudo_nats_per_token").values())
    if not values:
        return []
    each = [one for nats in values if (one := perplexity(nats)) is not None]
    mean = sum(each) / len(each) if len(each) == len(values) else None
    told = f"above e^{min(values):.0f}" if mean is None else number(mean)
    over = "one seed" if len(values) == 1 else f"mean over {plural(len(values), 'seed')}"
    return [{
        "kind": "pseudo-perplexity", "arm": arm, "pseudo_perplexity": mean, "n": len(values),
        "sentence": f"{arm}'s pseudo-perplexity is {told} ({over}). It is no perplexity and does not "
                    f"compare with one: {PSEUDO}.",
    }]  # fmt: skip


def _times(nats: float) -> str:
    """A factor of likelihoods in words."""
    factor = perplexity(nats)
    return f"e^{nats:.0f}" if factor is None else number(factor)


def _texts(experiment: Experiment, run: RunDirectory) -> list[dict]:
    """What was written after the first prompts, of the first seed whose judge has written; the judge first."""
    judging = judge(experiment)
    writers = dict.fromkeys([judging, *(arm for arm in experiment.arms if arm not in _having(experiment, "masked"))])
    for seed in experiment.seeds:
        if run.result(Cell(judging, seed, "judge")) is None:
            continue
        written = {arm: found["written"] for arm in writers if (found := run.result(Cell(arm, seed, "judge")))}
        ways = [(judging, TRUE), *((arm, way) for arm in written for way in (GREEDY, SAMPLED) if way in written[arm])]
        return [{
            "kind": "texts", "arm": judging, "seed": seed,
            "texts": [
                [{"arm": arm, "way": way} | written[arm][way]["texts"][at] for arm, way in ways]
                for at in range(min(TEXTS, experiment.masking.prompts))
            ],
            "sentence": f"What the decoders of seed {seed} wrote after the first prompts is kept as they wrote it.",
        }]  # fmt: skip
    return []


def _examples(experiment: Experiment, run: RunDirectory) -> list[dict]:
    """The first hidden tokens with the guesses of each encoder and of the judge, of the first seed that has both."""
    judging, found = judge(experiment), []
    for arm in _having(experiment, "masked"):
        for seed in experiment.seeds:
            both, left = (run.result(Cell(name, seed, "blanks")) for name in (arm, judging))
            if both and left:
                guesses = [
                    one | {"left_guesses": other["guesses"]}
                    for one, other in zip(both["examples"], left["examples"], strict=True)
                ][:BLANKS]
                told = f"What {arm} and {judging} of seed {seed} guessed for the first hidden tokens is kept."
                found.append({"kind": "examples", "arm": arm, "against": judging, "seed": seed, "examples": guesses,
                              "sentence": told})  # fmt: skip
                break
    return found
