"""Loading a model from a Hugging Face folder, ours against `from_pretrained`, on the CPU: time and peak of memory.

    python -m benchmarks.loading [--json]

About 39M parameters in float32, from a file that the system has in memory; every weight is read once. A load counts as
one, so the rates are loads per second. Memory is the peak over the process before it, in a fresh process.
"""

from experiments.measurement.process import run_fresh
from experiments.threads import quiet_thread_pools

quiet_thread_pools()

import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from benchmarks import common, hugging_face  # noqa: E402
from experiments.measurement.memory import PeakMemory, resident_bytes, settle  # noqa: E402
from models import folders  # noqa: E402
from models.language_model import LanguageModel  # noqa: E402
from models.presets import preset  # noqa: E402

ARMS = {"transformer": "LlamaForCausalLM", "mamba": "MambaForCausalLM"}
AIM = 1.15  # peak of memory over the weights, at most


def write(folder: Path, arm: str) -> int:
    """The model in their form; the bytes of its weights."""
    model = LanguageModel(preset(f"{arm}-30m"), seed=0)
    settings: dict[str, Any] = {"bos_token_id": 0}
    if arm == "transformer":
        settings["max_position_embeddings"] = 2048
    hugging_face.counterpart(model, **settings).save_pretrained(folder / arm)
    return sum(parameter.nbytes for parameter in model.parameters())


def load(side: str, arm: str, folder: Path) -> torch.nn.Module:
    if side == "our loader":
        model: torch.nn.Module = folders.load(folder / arm)
    else:
        model = getattr(hugging_face.transformers, ARMS[arm]).from_pretrained(folder / arm)
    for parameter in model.parameters():
        parameter.sum()
    return model


def turn(side: str, arm: str, folder: Path) -> common.Turn:
    return lambda: (1, sum(parameter.numel() for parameter in load(side, arm, folder).parameters()))


def peak(send: Callable, side: str, arm: str, folder: Path, other: Path) -> int:
    """Bytes over the process that has loaded a small model of the same kind already."""
    load(side, arm, other)
    settle()
    before = resident_bytes()
    with PeakMemory(torch.device("cpu")) as memory:
        model = load(side, arm, folder)
    del model
    return memory.host_bytes - before


def main() -> None:
    options = common.arguments(__doc__ or "").parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    found: dict[str, list[float]] = {}
    ratios: dict[str, Any] = {}
    memory: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, small = Path(scratch) / "large", Path(scratch) / "small"
        for arm in ARMS:
            weights = write(folder, arm)
            tiny = LanguageModel(preset(f"{arm}-tiny"), seed=0)
            settings = {"max_position_embeddings": 64} if arm == "transformer" else {}
            hugging_face.counterpart(tiny, bos_token_id=0, **settings).save_pretrained(small / arm)
            names = {side: f"{side}, {arm}" for side in ("our loader", "from_pretrained")}
            found |= common.rates({n: partial(turn, side, arm, folder) for side, n in names.items()}, options.rounds)[0]
            a, b = names.values()
            ratios[f"{a} / {b}"] = common.ratio(found[a], found[b], None)
            for side, name in names.items():
                most = run_fresh(peak, side, arm, folder, small)
                memory[name] = {"peak_bytes": most, "weight_bytes": weights, "peak_over_weights": most / weights}
    settings = {"parameters": "30m", "threads": torch.get_num_threads(), "memory": memory, "memory_at_most": AIM}
    common.publish("loading", settings, found, ratios, options.json, unit="loads")


if __name__ == "__main__":
    main()
