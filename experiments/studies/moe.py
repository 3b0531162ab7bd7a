"""Experts: a mixture of experts against dense models with as many active, and with as many total parameters.

Arms are trained, evaluated and measured as in a comparison; decode also at several batches, since the more tokens are
decoded at once, the more experts they touch."""

from collections.abc import Iterator
from typing import Any

from experiments import cells
from experiments.numbers import number, size
from experiments.rows import row
from experiments.spec import Experiment
from experiments.store import Cell, RunDirectory
from experiments.studies import comparison, pairing, wording
from experiments.studies.pairing import Question
from experiments.training import DTYPES
from models import cost
from models.config import ModelConfig
from models.feedforward.moe import MoEConfig

MAKES, turns, together = comparison.MAKES, comparison.turns, comparison.together
lengths, work = comparison.lengths, comparison.work

SAME = 0.02  # parameters that differ by less count as equal


def plan(experiment: Experiment) -> list[Cell]:
    """The comparison's cells; then decode at the further batches, arms in turn as there."""
    planned, measured = comparison.plan(experiment), experiment.measurement
    decodes = [cell for cell in planned if cell.kind == "decode" and cell.context == measured.contexts[0]]
    further = [batch for batch in experiment.experts.batches if batch != measured.batch]
    return planned + [Cell(cell.arm, cell.seed, "decode", cell.context, batch) for batch in further for cell in decodes]


def rows(cell: Cell, result: dict[str, Any], experiment: Experiment, run: RunDirectory) -> Iterator[dict]:
    yield from comparison.rows(cell, result, experiment, run)
    if cell.kind == "train":
        config = cells.kept_config(run.folder(cell))
        for batch in experiment.experts.batches:
            touched = cost.touched_bytes(config, batch, _element(experiment))
            yield row(cell, "decode", "touched_bytes_analytic", touched, "bytes", "none", batch=batch)


def verdicts(rows: list[dict], experiment: Experiment) -> list[dict]:
    """Each arm with experts against each without, on the comparison's questions and on decode at every batch."""
    asked = []
    for dense, sparse in _pairs(cells.model_configs(experiment)):
        asked += comparison.questions(experiment, dense, sparse)
        asked += [one for one in _decodes(experiment, dense, sparse) if one not in asked]
    if not asked:
        return comparison.verdicts(rows, experiment)
    return pairing.compared(rows, asked, experiment.device, experiment.seeds)


def findings(rows: list[dict], experiment: Experiment, run: RunDirectory) -> list[dict]:
    """Of each arm what must be loaded and what is touched; of each pair what that bought; of experts their load."""
    configs = cells.model_configs(experiment)
    found = [_bytes(arm, config, experiment) for arm, config in configs.items()]
    told = verdicts(rows, experiment)
    found += [_bought(told, experiment, configs, dense, sparse) for dense, sparse in _pairs(configs)]
    loads = ((arm, config, _loads(experiment, arm, run)) for arm, config in configs.items())
    return found + [_load(arm, config, seeds, experiment) for arm, config, seeds in loads if seeds]


def expected(loads: list[float], top_k: int, tokens: int) -> float:
    """How many experts of a layer `tokens` independent tokens touch on average, each choosing `top_k` of them with the
    frequencies `loads`, which sum to 1."""
    return sum(1 - (1 - min(1.0, top_k * load)) ** tokens for load in loads)


def _experts(config: ModelConfig) -> list[MoEConfig]:
    """Of its layers of experts, in order."""
    return [block.feedforward for block in config.blocks if isinstance(block.feedforward, MoEConfig)]


def _pairs(configs: dict[str, ModelConfig]) -> list[tuple[str, str]]:
    """(dense, with experts)"""
    sparse = [arm for arm, config in configs.items() if _experts(config)]
    return [(dense, one) for one in sparse for dense in configs if dense not in sparse]


def _decodes(experiment: Experiment, dense: str, sparse: str) -> list[Question]:
    at = experiment.measurement.contexts[0]
    return [Question(dense, sparse, "decode", "tokens_per_s", "ratio", at, b) for b in experiment.experts.batches]


def _element(experiment: Experiment) -> int:
    """Bytes of a weight as it is measured."""
    return DTYPES[experiment.measurement.dtype].itemsize


def _bytes(arm: str, config: ModelConfig, experiment: Experiment) -> dict:
    element = _element(experiment)
    loaded = cost.weight_bytes(config, element)
    touched = {batch: cost.touched_bytes(config, batch, element) for batch in experiment.experts.batches}
    told = [
        f"{size(held)} at batch {batch} ({held / loaded:.0%}{_each(held, batch)})" for batch, held in touched.items()
    ]
    even = ", on average where tokens choose their experts evenly" if _experts(config) else ""
    sentence = f"{arm}: {size(loaded)} of weights must be loaded; a decode step touches {', '.join(told)}{even}."
    return {
        "kind": "bytes", "arm": arm, "experts": bool(_experts(config)), "loaded_bytes": loaded,
        "touched_bytes": {str(batch): held for batch, held in touched.items()}, "sentence": sentence,
    }  # fmt: skip


def _each(held: float, batch: int) -> str:
    return f"; {size(held / batch)} a token" if batch > 1 else ""


def _bought(told: list[dict], experiment: Experiment, configs: dict[str, ModelConfig], dense: str, sparse: str) -> dict:
    """What the mixture has over one dense arm: bytes, quality, speed."""
    a, b = configs[dense], configs[sparse]
    batch = experiment.experts.batches[0]
    element = _element(experiment)
    loaded = cost.weight_bytes(b, element) / cost.weight_bytes(a, element)
    touched = cost.touched_bytes(b, batch, element) / cost.touched_bytes(a, batch, element)
    parts = [f"it loads {number(loaded)} times the bytes and touches {number(touched)} times as many at batch {batch}"]
    of_pair = {
        (one["phase"], one["metric"], one["context"], one["batch"]): one for one in told
        if (one["a"], one["b"]) == (dense, sparse)
    }  # fmt: skip
    quality = of_pair.get(("quality", "test_bits_per_byte", None, None))
    parts += [wording.predicts(quality)] if quality else []
    train = of_pair.get(("train", "tokens_per_s", None, None))
    parts += [f"{sparse} trains {wording.faster(train)}"] if train else []
    for asked in _decodes(experiment, dense, sparse):
        one = of_pair.get((asked.phase, asked.metric, asked.context, asked.batch))
        after = f"after {asked.context:,} tokens at batch {asked.batch}"
        parts += [f"{sparse} decodes {after} {wording.faster(one)}"] if one else []
    return {
        "kind": "bought", "arm": sparse, "against": dense, "loaded_ratio": loaded, "touched_ratio": touched,
        "bits_per_byte": quality["estimate"] if quality else None, "resolved": bool(quality and quality["resolved"]),
        "comparable": quality is None or quality["comparable"],
        "identical": bool(quality and wording.identical(quality)),
        "sentence": f"{sparse} against {dense} ({_match(a, b)}): {'; '.join(parts)}."
                    + (wording.without(quality) if quality else ""),
    }  # fmt: skip


def _match(dense: ModelConfig, sparse: ModelConfig) -> str:
    """In what the two are equal beside their embeddings, or how far they are not."""
    a, b = cost.parameters(dense), cost.parameters(sparse)
    held, active, total = a.non_embedding, b.non_embedding - (b.total - b.active), b.non_embedding
    for parameters, what in ((active, "active"), (total, "in total")):
        if abs(held / parameters - 1) < SAME:
            return f"equal parameters, {what}"
    return f"{number(active / held)} times the parameters, active"


def _loads(experiment: Experiment, arm: str, run: RunDirectory) -> list[list[list[float]]]:
    """seed, layer, expert -> share of the assignments; only of seeds that have them."""
    results = (run.result(Cell(arm, seed, MAKES)) for seed in experiment.seeds)
    return [result["expert_load"] for result in results if result and result.get("expert_load")]


def _load(arm: str, config: ModelConfig, seeds: list[list[list[float]]], experiment: Experiment) -> dict:
    """Experts of different seeds have nothing to do with each other, so that a layer's loads are ordered first."""
    layers = _experts(config)
    ranked = [[sorted(loads, reverse=True) for loads in seed] for seed in seeds]
    mean = [
        [sum(values) / len(seeds) for values in zip(*(seed[at] for seed in ranked), strict=True)]
        for at in range(len(layers))
    ]
    shares = [[[share * layer.experts for share in loads] for loads, layer in zip(seed, layers, strict=True)]
              for seed in ranked]  # fmt: skip
    high = sum(max(layer[0] for layer in seed) for seed in shares) / len(seeds)
    low = sum(min(layer[-1] for layer in seed) for seed in shares) / len(seeds)
    over = f"on average over {len(seeds)} seeds " if len(seeds) > 1 else ""
    text = (
        f"{arm}: {over}the busiest expert of any layer gets {number(high)} times an even share, the idlest "
        f"{number(low)} times (by chance alone these are a little above and below 1)"
    )
    batch = experiment.experts.batches[-1]
    counts = [expected(loads, layer.top_k, batch) for seed in seeds for loads, layer in zip(seed, layers, strict=True)]
    even = [expected([1 / layer.experts] * layer.experts, layer.top_k, batch) for layer in layers]
    met, evenly = sum(counts) / len(counts), sum(even) / len(even)
    text += (
        f"; with this load {batch} independent tokens touch {number(met)} of a layer's {layers[0].experts} experts on "
        f"average, with an even one {number(evenly)}"
    )
    return {"kind": "load", "arm": arm, "loads": mean, "busiest": high, "idlest": low, "touched_experts": met,
            "sentence": f"{text}."}  # fmt: skip
