"""How much of a GPU the models use: of its arithmetic in training, of its memory in single-stream decoding.

    python -m benchmarks.utilisation [--phases training,decode,decode-serial] [--decode-size 1b|7b] [--json]

Training at about 370M parameters on sequences of 2048 tokens, under bfloat16 autocast, blocks compiled; decoding at
about 1.3B or 6.9B parameters in bfloat16, one sequence after 1024 tokens, the compiled step replayed from a CUDA graph.
A larger model's kernels read for longer, so that starting them counts for less: a share of bandwidth is of a size.
"decode-serial", on request only, starts each kernel of a step when the one before it has ended: what overlap is worth.
Shares are of a large matrix product and of a large copy, measured turn by turn beside the work. A training step counts
three forward passes (nothing is computed twice), and a masked product of attention only what the mask leaves.
"""

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import common
from experiments.environment import describe
from experiments.measurement.process import run_fresh
from experiments.measurement.speed import Subject, measure_speed
from experiments.rows import percentiles
from experiments.spec import Speed
from experiments.studies.speed import speeds_of_turns
from models import compiled, cost
from models.config import ModelConfig
from models.feedforward.swiglu import SwiGLUConfig
from models.language_model import LanguageModel
from models.mixers.attention import AttentionConfig
from models.presets import preset

BATCH, CONTEXT = 8, 2048
READ, DECODED = 1024, 64
ARMS = ("transformer", "mamba", "mamba2")
AIMS = {"training": 0.45, "decode": 0.75}  # the first of the transformer alone
Work = Generator[None, None, dict[str, Any]]


@dataclass(frozen=True)
class Size:
    """layers, heads, hidden: of the transformer and its SwiGLU."""

    width: int
    layers: int
    heads: int
    hidden: int


SIZES = {"1b": Size(2048, 24, 32, 5872), "7b": Size(4096, 32, 32, 11680)}


def large(arm: str, size: str) -> ModelConfig:
    """About 1.3B or 6.9B parameters: the 370m preset made wider and deeper, two Mamba layers for each of the
    transformer, whose hidden width is fitted to Mamba's parameters as the presets' are."""
    config, chosen = preset(f"{arm}-370m"), SIZES[size]
    if arm != "transformer":
        return replace(config, width=chosen.width, layers=2 * chosen.layers)
    return replace(
        config, width=chosen.width, layers=chosen.layers, mixer=AttentionConfig(heads=chosen.heads),
        feedforward=SwiGLUConfig(hidden=chosen.hidden),
    )  # fmt: skip


def training(send: Callable[[Any], None], arm: str, turns: int, size: str) -> Work:
    """Of the same model whatever the size decoded."""
    return _work(preset(f"{arm}-370m"), "step", "compiled", BATCH, CONTEXT, turns)


def decode(send: Callable[[Any], None], arm: str, turns: int, size: str) -> Work:
    return _work(large(arm, size), "decode", "compiled-graph", 1, READ, turns)


def serial_decode(send: Callable[[Any], None], arm: str, turns: int, size: str) -> Work:
    """In a process of its own, which compiles nothing else."""
    compiled.ONE_ROW["triton.enable_pdl"] = False
    return decode(send, arm, turns, size)


def _work(config: ModelConfig, phase: str, mode: str, batch: int, context: int, turns: int) -> Work:
    dtype = torch.float32 if phase == "step" else torch.bfloat16
    model = LanguageModel(config, seed=0, device="cuda", dtype=dtype).eval()
    settings = Speed(repeats=turns, seconds=0, decode_tokens=DECODED)
    tokens = torch.randint(0, config.vocabulary, (batch, context + 1), generator=torch.Generator().manual_seed(0))
    return measure_speed(Subject(model, settings, mode, "bfloat16"), phase, tokens)


def share(phase: str, arm: str, size: str, result: dict[str, Any]) -> dict[str, Any]:
    """Of a result of `measure_speed`: what was done per second, and its share of the ceiling, turn by turn."""
    if phase == "training":
        config, ceiling, mode = preset(f"{arm}-370m"), "flops_per_s", "compiled"
        per_token = cost.training_flops_per_token(config, CONTEXT)
    else:
        config, ceiling, mode = large(arm, size), "bytes_per_s", "compiled-graph"
        per_token = cost.decode_bytes(config, 1, READ, 2)
    speeds, best = speeds_of_turns(result), np.array([one[ceiling] for one in result["ceilings"]])
    return {
        "parameters": cost.parameters(config).total, "backend": result["backend"], "mode": mode,
        "tokens_per_s": percentiles(speeds.tolist()), f"ceiling_{ceiling}": percentiles(best.tolist()),
        "share": percentiles((per_token * speeds / best).tolist()), "first_call_ms": result["first_call_ms"],
    }  # fmt: skip


PHASES = {"training": training, "decode": decode, "decode-serial": serial_decode}


def share_of(phase: str, arm: str, size: str, turns: int) -> dict[str, Any]:
    """Measured in a process of its own. Raises CellFailedError."""
    return share(phase, arm, size, run_fresh(PHASES[phase], arm, turns, size))


def main() -> None:
    parser = common.arguments(__doc__ or "")
    parser.add_argument("--arms", type=common.several(ARMS), default=list(ARMS), help="separated by commas")
    parser.add_argument("--phases", type=common.several(PHASES), default=list(AIMS), help="separated by commas")
    parser.add_argument("--decode-size", choices=list(SIZES), help="parameters of what decodes, about; 1b by itself")
    options = parser.parse_args()
    if options.decode_size is not None and options.phases == ["training"]:
        parser.error("--decode-size is of what decodes, which --phases leaves out")
    if not torch.cuda.is_available():
        raise SystemExit("this measures a CUDA GPU, which torch does not see here")
    size = options.decode_size or next(iter(SIZES))
    done, failures = common.parts({
        (phase, arm): partial(share_of, phase, arm, size, options.rounds)
        for phase in options.phases for arm in options.arms
    })  # fmt: skip
    found = {phase: {arm: done[phase, arm] for arm in options.arms if (phase, arm) in done} for phase in options.phases}
    settings = {
        "training_batch": BATCH, "training_context": CONTEXT, "decode_size": size, "decode_after": READ,
        "rounds": options.rounds,
    }  # fmt: skip
    if options.json:
        print(json.dumps({
            "benchmark": "utilisation", "settings": settings, "aims": AIMS, "found": found, "failures": failures,
            "environment": describe("cuda", torch.get_num_threads()),
        }, indent=1))  # fmt: skip
        common.leave(failures)
    print("| phase | arm | parameters | tokens/s | ceiling | share of it | 5th to 95th percentile | aimed at |")
    print("|---|---|---|---|---|---|---|---|")
    for phase, arms in found.items():
        for arm, one in arms.items():
            (ceiling,) = (one[key]["value"] for key in one if key.startswith("ceiling_"))
            unit = "TFLOP/s" if phase == "training" else "TB/s"
            aimed = phase == "decode" or (phase, arm) == ("training", "transformer")
            part, aim = one["share"], f"{AIMS[phase]:.0%}" if aimed else "-"
            print(f"| {phase} | {arm} | {one['parameters'] / 1e6:,.0f}M | {one['tokens_per_s']['value']:,.0f} | "
                  f"{ceiling / 1e12:.3g} {unit} | {part['value']:.1%} | {part['p5']:.1%} to {part['p95']:.1%} | "
                  f"{aim} |")  # fmt: skip
    common.leave(failures)


if __name__ == "__main__":
    main()
