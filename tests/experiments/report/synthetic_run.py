"""Synthetic run directories with everything that a real one has, and the ways in which one can be odd."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiments.spec import Arm, Data, Evaluation, Experiment, Measurement, Training

CONTEXT = 256
VOCABULARY = 2048
TEST_BYTES = 412_000
REFUSED = "auto fell back to the reference scan: numba is missing"
HOSTILE = "<script>alert(1)</script> \x1b[31m | ``` & \ud800 </pre> [x](javascript:1)"


UNLISTED = "NVML does not list this process"


@dataclass
class Options:
    arms: tuple[str, ...] = ("transformer", "mamba")
    seeds: tuple[int, ...] = (0, 1, 2)
    contexts: tuple[int, ...] = (128, 512, 2048)
    measured: bool = True
    rates: tuple[float, ...] = ()
    best_rate: float = 2e-3
    steps: int = 120
    lost: tuple[str, ...] = ()  # cells that failed: "mamba/seed2/train" or "mamba/seed2/decode-512"
    incomparable: str = ""  # an arm whose speeds and memory count for nothing
    hostile: bool = False
    gpu: bool = False  # what the process holds on a card: known of decode alone


def experiment(options: Options) -> Experiment:
    return Experiment(
        name="compare",
        title="Transformer against Mamba, matched parameters",
        profile="cpu",
        seeds=options.seeds,
        arms={arm: Arm(model=f"{arm}-4m", learning_rate=2e-3) for arm in options.arms},
        learning_rates=options.rates,
        data=Data(vocabulary=VOCABULARY),
        training=Training(context=CONTEXT, steps=options.steps, validate_every=20),
        evaluation=Evaluation(splits=("validation",) if options.rates else ("validation", "test")),
        measurement=Measurement(enabled=options.measured, contexts=options.contexts),
    )


class Builder:
    """Writes one run directory; every number is a smooth function of (arm, seed, phase, context)."""

    def __init__(self, folder: Path, options: Options):
        self.folder, self.options = folder, options
        self.spec = experiment(options)
        self.rows: list[dict[str, Any]] = []
        self.arms = self.spec.cells()

    def quality(self, arm: str, seed: int) -> float:
        base = next(at for at, name in enumerate(self.options.arms) if arm.startswith(name))
        jitter = np.random.default_rng([base, seed]).normal(0, 0.004)
        distance = abs(np.log2(self.arms[arm].learning_rate / self.options.best_rate))
        return 2.031 - 0.043 * base + 0.01 * seed + 0.05 * distance**2 + jitter

    def lost(self, arm: str, seed: int, phase: str = "", context: int | None = None) -> bool:
        cells = {f"{arm}/seed{seed}/train", f"{arm}/seed{seed}/{phase}"}
        return bool({*cells, f"{arm}/seed{seed}/{phase}-{context}"} & set(self.options.lost))

    def add(
        self, phase: str, metric: str, unit: str, direction: str, value: Callable[[str, int], float | None],
        context: int | None = None, timed: bool = False, reason: str | None = None,
    ) -> None:  # fmt: skip
        measured = phase != "quality"
        if phase == "train":
            context = CONTEXT
        extra = {"context": context, "batch": 1 if measured else None, "mode": "eager" if measured else None,
                 "dtype": "float32" if measured else None}  # fmt: skip
        for arm in self.arms:
            comparable = not (arm == self.options.incomparable and phase != "quality")
            shared = {
                "arm": arm, "phase": phase, "metric": metric, "unit": unit, "direction": direction,
                "backend": "numba" if "mamba" in arm else "reference", "comparable": comparable,
                "reason": reason if comparable else REFUSED,
                **extra,
            }  # fmt: skip
            values = {}
            for seed in self.options.seeds:
                if self.lost(arm, seed, phase, context):
                    continue
                one = value(arm, seed)
                values[seed] = one
                spread = (one * 0.96, one * 1.05) if timed and one is not None else (None, None)
                self.rows.append(
                    shared | {"seed": seed, "value": one, "n": 14 if timed else 1, "ci_low": None,
                              "ci_high": None, "p5": spread[0], "p95": spread[1]}
                )  # fmt: skip
            if values:
                self.rows.append(shared | summary(list(values.values())))

    def build(self) -> Path:
        options = self.options
        self.folder.mkdir(parents=True)
        (self.folder / "spec.toml").write_text(self.spec.to_toml(), encoding="utf-8")
        for arm in self.arms:
            for seed in options.seeds:
                if not self.lost(arm, seed):
                    self.cell(arm, seed)
        index = {arm: next(i for i, n in enumerate(options.arms) if arm.startswith(n)) for arm in self.arms}
        noise = {
            (arm, seed): 1 + 0.01 * np.sin(3 * index[arm] + 2 * seed) for arm in self.arms for seed in options.seeds
        }
        q = self.quality
        if not options.rates:
            self.add("quality", "initial_test_bits_per_byte", "bits/byte", "none", lambda a, s: 3.94 + 0.001 * s)
            self.add("quality", "test_bits_per_byte", "bits/byte", "lower", q)
            self.add(
                "quality",
                "test_token_perplexity",
                "perplexity",
                "lower",
                lambda a, s: float(np.exp(1.9 * q(a, s))),
            )
            for position in (1 << k for k in range(9)):
                self.add("quality", "test_loss_at_position", "nats/token", "lower",
                         lambda a, s, p=position: position_loss(q(a, s), p), context=position)  # fmt: skip
        self.add("quality", "validation_bits_per_byte", "bits/byte", "lower", lambda a, s: q(a, s) + 0.02)
        speed = {arm: 5200.0 / (1 + 0.35 * index[arm]) for arm in self.arms}
        self.add("train", "tokens_per_s", "tokens/s", "higher", lambda a, s: speed[a] * noise[a, s], timed=True)
        self.add("train", "step_ms", "ms", "lower", lambda a, s: 2048e3 / speed[a] / noise[a, s], timed=True)
        self.add("train", "peak_bytes", "bytes", "lower", lambda a, s: 6.1e8 * noise[a, s] * (1 + 0.1 * index[a]))
        self.add("train", "flops_per_token", "FLOP/token", "none", lambda a, s: 2.71e7 * (1 + 0.02 * index[a]))
        if options.measured and not options.rates:
            self.measure(index, noise)
        result = self.result()
        (self.folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        (self.folder / "environment.json").write_text(json.dumps(self.environment()), encoding="utf-8")
        events = [{"time": "2025-01-02T03:04:06Z", "kind": "progress", "cell": None, "message": "planned"}]
        events.append({"time": "2025-01-02T03:09:00Z", "kind": "warning", "cell": "transformer/seed0",
                       "message": "decode-512: p95 is 1.31 times p5, the machine was noisy"})  # fmt: skip
        if options.hostile:
            events.append({"time": "", "kind": "warning", "cell": HOSTILE, "message": HOSTILE})
        text = "".join(json.dumps(event) + "\n" for event in events)
        (self.folder / "events.jsonl").write_text(text, encoding="utf-8")
        return self.folder

    def measure(self, index: dict[str, int], noise: dict[tuple[str, int], float]) -> None:
        self.add("load", "file_bytes", "bytes", "lower", lambda a, s: 18_123_456 + 9000 * index[a])
        self.add("load", "host_peak_bytes", "bytes", "lower", lambda a, s: 41e6 * noise[a, s])
        self.add("load", "device_peak_bytes", "bytes", "lower", lambda a, s: None, reason="the run used no GPU")
        self.add("load", "resident_bytes", "bytes", "lower", lambda a, s: 18.4e6 * noise[a, s])
        self.add("load", "resident_bytes_analytic", "bytes", "none", lambda a, s: 18.1e6)
        self.add("load", "load_ms", "ms", "lower", lambda a, s: 23.1 * noise[a, s], timed=True)
        for t in self.options.contexts:
            self.at_context(t, index, noise)
        if self.options.gpu:
            places: list[tuple[str, int | None]] = [("load", None), ("train", None)]
            for phase, t in places + [(phase, t) for phase in ("prefill", "decode") for t in self.options.contexts]:
                known = 9.5e8 if phase == "decode" else None
                self.add(phase, "reserved_peak_bytes", "bytes", "lower", lambda a, s: 4.2e8 + index[a] * 2e6, t)
                self.add(phase, "process_bytes", "bytes", "lower", lambda a, s, known=known: known, t,
                         reason=None if known else UNLISTED)  # fmt: skip

    def at_context(self, t: int, index: dict[str, int], noise: dict[tuple[str, int], float]) -> None:
        rate = {a: (9000.0 if i else 14000 / (1 + t / 900)) for a, i in index.items()}
        state = {a: (131_072.0 + 4096 * i if i else 4096.0 * t) for a, i in index.items()}

        def speed(phase: str, divisor: float, latency: str) -> None:
            up, down = (phase, "tokens_per_s", "tokens/s", "higher"), (phase, latency, "ms", "lower")
            self.add(*up, lambda a, s: rate[a] / divisor * noise[a, s], t, timed=True)
            self.add(*down, lambda a, s: 1e3 * divisor / rate[a] / noise[a, s], t, timed=True)

        def size(phase: str, metric: str, direction: str, of: Callable[[str, int], float]) -> None:
            self.add(phase, metric, "bytes", direction, of, t)

        speed("prefill", 1, "time_to_first_token_ms")
        speed("decode", 20, "ms_per_token")
        size("prefill", "peak_bytes", "lower", lambda a, s: (6e7 + 9e3 * t) * noise[a, s])
        size("prefill", "working_bytes", "lower", lambda a, s: (2e7 + 9e3 * t) * noise[a, s])
        size("decode", "peak_bytes", "lower", lambda a, s: (5e7 + state[a]) * noise[a, s])
        size("decode", "working_bytes", "lower", lambda a, s: (1e6 + state[a]) * noise[a, s])
        size("decode", "state_bytes", "lower", lambda a, s: state[a] * (1.08 if t == 128 else 1))
        size("decode", "state_bytes_analytic", "none", lambda a, s: state[a])

    def cell(self, arm: str, seed: int) -> None:
        folder = self.folder / "cells" / arm / f"seed{seed}"
        folder.mkdir(parents=True)
        final = self.quality(arm, seed) * 1.9
        rng = np.random.default_rng(seed)
        lines = [{"step": 0, "validation_loss": 7.63}]
        for step in range(1, self.options.steps + 1):
            loss = final + (7.63 - final) * float(np.exp(-step / 25))
            lines.append({"step": step, "tokens": step * 2048, "loss": loss + rng.normal(0, 0.08),
                          "learning_rate": 2e-3, "gradient_norm": 1.0, "step_ms": 390.0})  # fmt: skip
            if step % 20 == 0:
                lines.append({"step": step, "validation_loss": loss + 0.03})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        bits = self.quality(arm, seed)
        curve = [position_loss(bits, t) for t in range(1, CONTEXT + 1)]
        names = ["validation"] if self.options.rates else ["validation", "test"]
        splits = {
            name: {"bits_per_byte": bits, "nats_per_token": final, "token_perplexity": float(np.exp(final)),
                   "tokens": 120_000, "bytes": TEST_BYTES, "loss_at_position": curve} for name in names
        }  # fmt: skip
        text = HOSTILE if self.options.hostile else "def load(path):\n    with open(path) as file:\n        return"
        evaluation = {
            "initial": {
                "expected_loss": float(np.log(VOCABULARY)),
                "test_bits_per_byte": 3.94,
            },
            "splits": splits,
            "samples": [{"prompt": "import ", "text": text, "temperature": 0.8}],
        }
        (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")

    def result(self) -> dict[str, Any]:
        options = self.options
        digest = {str(seed): f"{seed:064x}" for seed in options.seeds}
        failures = [{"cell": cell, "message": "killed: out of memory"} for cell in options.lost]
        missing = ["mamba/seed2/load"] if "mamba/seed2/train" in options.lost else []
        warnings = ["3 seeds give wide intervals"]
        if options.hostile:
            failures.append({"cell": "mamba/seed0", "message": HOSTILE})
            warnings.append(HOSTILE)
        return {
            "schema_version": 1, "run_id": "20250102T030405-compare-0a1b2c3d", "experiment": "compare",
            "title": HOSTILE if options.hostile else self.spec.title, "profile": "cpu",
            "created": "2025-01-02T03:04:05Z", "finished": "2025-01-02T03:31:00Z",
            "status": "partial" if options.lost else "complete", "missing": missing,
            "failures": failures, "warnings": warnings,
            "baselines": {"unigram_bits_per_byte": 3.412, "lzma_bits_per_byte": 1.914, "bytes": TEST_BYTES},
            "arms": {
                arm: {"model": settings.model, "learning_rate": settings.learning_rate,
                      "config": {"width": 256, "layers": 6, "mixer": {"kind": "attention"}},
                      "parameters": 4_521_984, "non_embedding_parameters": 3_997_696,
                      "active_parameters": 4_521_984, "data_sha256": digest,
                      "backends": {"mixer": "numba" if "mamba" in arm else "reference"},
                      "state_bytes_formula": "2 layers x 2 x 256 elements per token"}
                for arm, settings in self.arms.items()
            },
            "verdicts": self.verdicts(), "rows": self.rows,
        }  # fmt: skip

    def verdicts(self) -> list[dict[str, Any]]:
        arms = list(self.arms)
        if self.options.rates or len(arms) < 2:
            return []
        verdicts = [self.verdict("quality", "test_bits_per_byte", None, "difference", b) for b in arms[1:]]
        for b in arms[1:]:
            verdicts.append(self.verdict("train", "tokens_per_s", None, "ratio", b))
            if self.options.measured:
                for t in self.options.contexts:
                    verdicts.append(self.verdict("prefill", "tokens_per_s", t, "ratio", b))
                    verdicts.append(self.verdict("decode", "tokens_per_s", t, "ratio", b))
                    verdicts.append(self.verdict("decode", "peak_bytes", t, "ratio", b))
        return verdicts

    def verdict(self, phase: str, metric: str, context: int | None, kind: str, b: str) -> dict[str, Any]:
        a = next(iter(self.arms))
        values: dict[str, dict[int, float]] = {a: {}, b: {}}
        direction, comparable = "lower", True
        for row in self.rows:
            if (row["phase"], row["metric"]) != (phase, metric) or context not in (None, row["context"]):
                continue
            if row["arm"] in values and row["seed"] is not None:
                values[row["arm"]][row["seed"]] = row["value"]
                direction, comparable = row["direction"], comparable and row["comparable"]
        seeds = sorted(values[a].keys() & values[b].keys())
        pairs = [(values[a][seed], values[b][seed]) for seed in seeds]
        paired = summary([y - x if kind == "difference" else y / x for x, y in pairs])
        neutral = 0.0 if kind == "difference" else 1.0
        resolved = paired["ci_low"] is not None and not paired["ci_low"] <= neutral <= paired["ci_high"]
        lower_wins = b if paired["value"] is not None and paired["value"] < neutral else a
        better = lower_wins if direction == "lower" else (b if lower_wins == a else a)
        usable = resolved and comparable
        reason = None if comparable else REFUSED
        return {
            "id": f"{phase}-{metric}-{context}-{b}", "phase": phase, "metric": metric, "context": context,
            "a": a, "b": b, "kind": kind, "estimate": paired["value"], "ci_low": paired["ci_low"],
            "ci_high": paired["ci_high"], "n": len(seeds), "p": 0.011 if len(seeds) > 1 else None,
            "p_holm": 0.044 if len(seeds) > 1 else None, "resolved": usable,
            "unit": "bits/byte" if kind == "difference" else "x", "better": better if usable else None,
            "more_seeds": None if usable or len(seeds) < 2 else 4, "comparable": comparable, "reason": reason,
            "sentence": f"{metric} of {b} against {a}: {'settled' if usable else 'open'}.",
        }  # fmt: skip

    def environment(self) -> dict[str, Any]:
        return {
            "created": "2025-01-02T03:04:05Z", "command": "lab run compare --profile cpu",
            "repeat": "lab run runs/20250102T030405-compare-0a1b2c3d/spec.toml", "lab_version": "0.1.0",
            "source_sha256": "ab" * 32, "git_commit": None, "git_dirty": None, "python": "3.11.9",
            "platform": "Linux-6.1-x86_64", "cpu": "Example CPU 3.0 GHz", "cores": 2, "threads": 2,
            "memory_bytes": 16_700_000_000, "gpu": None, "cuda": None,
            "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
            "backends": {arm: {"name": "numba", "fallback": None} for arm in self.arms},
            "data": {"corpus": "stdlib", "documents": {"train": 1200, "validation": 20, "test": 21},
                     "bytes": {"train": 19_000_000, "validation": 400_000, "test": TEST_BYTES},
                     "corpus_sha256": "cd" * 32, "tokenizer_sha256": "ef" * 32, "duplicates_dropped": 7},
        }  # fmt: skip


def summary(values: list[float | None]) -> dict[str, Any]:
    """The row over seeds: mean, n and the 95% t interval."""
    known = [value for value in values if value is not None]
    row: dict[str, Any] = dict.fromkeys(("seed", "value", "ci_low", "ci_high", "p5", "p95")) | {"n": len(values)}
    if known:
        row["value"] = float(np.mean(known))
    if len(known) > 1:
        half = float(stats.t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) / np.sqrt(len(known)))
        row |= {"ci_low": row["value"] - half, "ci_high": row["value"] + half}
    return row


def position_loss(bits: float, position: int) -> float:
    return bits * 1.9 - 0.3 + 3.6 * position**-0.6


VARIANTS = {
    "complete": Options(),
    "one-seed": Options(seeds=(0,)),
    "one-arm": Options(arms=("mamba",), contexts=(512,)),
    "eight-arms": Options(arms=("transformer", *(f"mamba-{size}" for size in "abcdefg")), seeds=(0, 1)),
    "partial": Options(lost=("mamba/seed2/train", "transformer/seed0/decode-2048")),
    "arm-lost": Options(lost=tuple(f"mamba/seed{k}/train" for k in range(3))),
    "incomparable": Options(incomparable="mamba"),
    "unmeasured": Options(measured=False),
    "sweep": Options(rates=(5e-4, 1e-3, 2e-3, 4e-3)),
    "sweep-edge": Options(rates=(5e-4, 1e-3, 2e-3), seeds=(0,), best_rate=2.1e-3),
    "hostile": Options(hostile=True),
}
