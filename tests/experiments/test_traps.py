"""Traps into which laboratories of this kind have fallen, each planted here to show that this one is immune or notices.

Every test plants the mistake: in the data, in the clock, in a mixer's configuration, in a kernel's absence.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_store import EXPERIMENT, FACTS, change, row, run  # noqa: F401 (a fixture)
from torch.utils.flop_counter import FlopCounterMode

from experiments import cells
from experiments.data.batches import Batches, StreamHash
from experiments.errors import RunFailedError
from experiments.measurement import timing
from experiments.measurement.phases import measure_decode, measure_prefill
from experiments.measurement.process import run_fresh
from experiments.objectives import Objective
from experiments.result import build_result
from experiments.runner import run_hash
from experiments.spec import Arm, Measurement, Training, load
from experiments.store import RunDirectory
from experiments.studies import STUDIES
from experiments.training import train
from models import checkpoint, cost
from models.language_model import LanguageModel
from models.mixers import MIXERS
from models.mixers.mamba import MambaConfig
from models.ops import kernels
from models.presets import preset

CPU = torch.device("cpu")
TOKENS = np.random.default_rng(0).integers(1, 64, 4000).astype("<u2")


class TestDataDiffersByArchitecture:
    """A model built first draws from the random stream that the data then comes from."""

    def batches(self, arm: str, seed: int = 3):
        model = LanguageModel(preset(arm), seed=seed)  # draws as many numbers as it has parameters
        torch.rand(sum(p.numel() for p in model.parameters()) % 97)
        np.random.rand(len(arm))  # noqa: NPY002 (the stream that everybody shares)
        random.random()
        return [Batches(TOKENS, context=8, batch=2, seed=seed).at(step) for step in range(5)]

    def test_what_was_drawn_before_changes_no_batch(self):
        for (a, b), (c, d) in zip(self.batches("transformer-tiny"), self.batches("mamba-tiny"), strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)

    def test_a_loader_that_shares_the_stream_is_noticed(self, run: RunDirectory, monkeypatch):  # noqa: F811
        def shared(self: Batches, step: int):
            starts = torch.randint(0, len(self.tokens) - self.context, (self.batch,)).numpy()
            window = torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int64))
            return window[:, :-1], window[:, 1:]

        monkeypatch.setattr(Batches, "at", shared)
        torch.manual_seed(0)
        hashes = {}
        for arm in ("transformer-tiny", "mamba-tiny"):
            stream = StreamHash()
            for inputs, targets in self.batches(arm):
                stream.update(inputs, targets)
            hashes[arm.removesuffix("-tiny")] = stream.hexdigest()
        for arm, digest in hashes.items():
            change(run, arm, 0, lambda result, digest=digest: result.update(data_sha256=digest))
        with pytest.raises(RunFailedError, match="the arms of seed 0 were trained on different tokens"):
            build_result(run, EXPERIMENT, FACTS)


class TestStateFormulaThatReturnsNothing:
    """One architecture's state size comes out as nothing, and the arm silently leaves the plot."""

    def test_it_is_an_error(self):
        @dataclass(frozen=True, kw_only=True)
        class Forgetful(MambaConfig):
            def state_bytes(self, width: int, max_len: int, element_size: int):
                return None

        config = replace(preset("mamba-tiny"), mixer=Forgetful())
        with pytest.raises(TypeError):
            cost.state_bytes(config, 1, 8, 4)

    def test_every_mixer_of_the_registry_has_one(self):
        for kind in MIXERS:
            configs = [c for c in map(preset, ("transformer-tiny", "mamba-tiny", "mamba2-tiny", "mamba3-tiny",
                                               "lstm-tiny")) if c.mixer.kind == kind]  # fmt: skip
            assert configs, f"no preset has {kind}"
            for config in configs:
                assert cost.state_bytes(config, 1, 8, 4) > 0
                assert cost.state_formula(config)


class TestCacheKeyedBySomeSettings:
    """A changed width returns the old result."""

    @pytest.mark.parametrize("study", STUDIES)
    def test_a_changed_width_is_another_run(self, study: str):
        name = {"comparison": "compare"}.get(study, study)
        dataset = SimpleNamespace(facts={"files": {}})
        arm = next(iter(load(name, profile="smoke").arms))
        widths = ([], [f"arms.{arm}.overrides.width=96"], [f"arms.{arm}.overrides.norm_eps=0.1"])
        hashes = {run_hash(load(name, profile="smoke", assignments=one), dataset) for one in widths}  # type: ignore[arg-type]
        assert len(hashes) == 3


class TestAttentionChargedToTheScan:
    """The quadratic term in the FLOPs of an arm that has no attention."""

    @pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny", "mamba3-tiny", "lstm-tiny"])
    def test_no_term_grows_with_length(self, name: str):
        config = preset(name)
        assert cost.forward_flops_per_token(config, 4096) == cost.forward_flops_per_token(config, 65536)

    def test_the_counter_would_notice_it(self):
        @dataclass(frozen=True, kw_only=True)
        class Charged(MambaConfig):
            def flops_per_token(self, width: int, context: int) -> float:
                return super().flops_per_token(width, context) + 4 * width * (context + 1) / 2

        config = preset("mamba-tiny").with_backend("numba")
        tokens = torch.zeros(1, 512, dtype=torch.int64, device="meta")
        with FlopCounterMode(display=False) as counter:
            LanguageModel(config, seed=None)(tokens)
        counted = counter.get_total_flops() / 512
        assert cost.forward_flops_per_token(config, 512) == pytest.approx(counted, rel=0.02)
        charged = replace(config, mixer=Charged())
        assert cost.forward_flops_per_token(charged, 512) > 1.3 * counted


class TestTimeSinceTheEpoch:
    """Tokens divided by a time stamp instead of by the time that passed."""

    def test_a_clock_that_starts_in_1970_changes_nothing(self, monkeypatch):
        now = [1.7e9]

        def clock() -> float:
            now[0] += 0.01
            return now[0]

        for module in ("experiments.training", "experiments.measurement.timing"):
            monkeypatch.setattr(f"{module}.time", SimpleNamespace(perf_counter=clock))
        model = LanguageModel(preset("mamba-tiny").with_overrides({"vocabulary": 64}), seed=0)
        batches = Batches(TOKENS, context=12, batch=3, seed=0)
        settings = Training(context=12, batch=3, steps=3, warmup_steps=1)
        for step in train(model, batches, settings, 1e-3, StreamHash(), Objective("causal", 64)):
            assert step.step_ms == pytest.approx(10, rel=1e-3)
        samples = timing.timed(lambda: None, repeats=4, seconds=0, device=CPU)
        assert samples.ms == pytest.approx([10] * 4, rel=1e-3)

    def test_a_rate_is_tokens_over_what_passed(self, run: RunDirectory):  # noqa: F811
        result = build_result(run, EXPERIMENT, FACTS)
        step = row(result, "mamba", 0, "train", "step_ms")["value"]
        assert row(result, "mamba", 0, "train", "tokens_per_s")["value"] == pytest.approx(512e3 / step)


def _both(send, folder: Path, tokens: torch.Tensor):
    settings = Measurement(repeats=2, seconds=0, decode_tokens=3)
    context = tokens.shape[1]
    return measure_decode(folder, settings, context, tokens, CPU)


def _prefill(send, folder: Path, tokens: torch.Tensor):
    return measure_prefill(folder, Measurement(repeats=2, seconds=0), tokens.shape[1], tokens, CPU)


class TestDecodeThatIsWholeGeneration:
    """Samples a second from a count of tokens, and a decode peak with the prefill in it."""

    def test_decode_memory_is_not_prefills(self, tmp_path: Path):
        checkpoint.save(LanguageModel(preset("transformer-4m"), seed=0), tmp_path)
        tokens = torch.zeros(1, 1024, dtype=torch.int64)
        decode, prefill = run_fresh(_both, tmp_path, tokens), run_fresh(_prefill, tmp_path, tokens)
        assert decode["working_bytes"] < prefill["working_bytes"] / 4
        assert decode["tokens_per_sample"] == 3

    def test_tokens_a_second_count_batch_and_steps(self, run: RunDirectory):  # noqa: F811
        result = build_result(run, EXPERIMENT, FACTS)
        rate = row(result, "mamba", 0, "decode", "tokens_per_s")["value"]
        latency = row(result, "mamba", 0, "decode", "ms_per_token")["value"]
        assert rate == pytest.approx(EXPERIMENT.measurement.batch * 1e3 / latency)


class TestOneArmInAnotherType:
    """One arm is loaded in 16 bits, the other in 32."""

    def test_given_weights_in_16_bits_train_in_32_like_every_arm(self, tmp_path: Path):
        config = preset("transformer-tiny")
        checkpoint.save(LanguageModel(config, seed=0, dtype=torch.bfloat16), tmp_path)
        given = cells.first_model(Arm(model=str(tmp_path), start="weights", learning_rate=1e-3), config, 0, CPU)
        scratch = cells.first_model(Arm(model="mamba-tiny", learning_rate=1e-3), preset("mamba-tiny"), 0, CPU)
        assert {p.dtype for model in (given, scratch) for p in model.parameters()} == {torch.float32}

    def test_a_type_belongs_to_the_study_and_not_to_an_arm(self):
        assert "dtype" not in Arm.model_fields
        experiment, study = load("memory", profile="smoke", assignments=["memory.dtype=bfloat16"]), STUDIES["memory"]
        makes = [study.work(cell, experiment) for cell in study.plan(experiment)]
        assert {details[2] for function, details in makes if function is cells.build_cell} == {"bfloat16"}

    def test_several_types_are_each_for_every_arm(self):
        experiment = load("speed", profile="smoke", assignments=['speed.dtypes=["bfloat16", "float32"]'])
        plan = [cell for cell in STUDIES["speed"].plan(experiment) if cell.kind != "build"]
        by_arm = [{replace(cell, arm="") for cell in plan if cell.arm == arm} for arm in experiment.arms]
        assert by_arm[1:] == by_arm[:-1]
        assert {cell.dtype for cell in by_arm[0]} == {"bfloat16", "float32"}
        turns = {STUDIES["speed"].turns(cell, experiment): cell.dtype for cell in plan}
        assert all(turns[STUDIES["speed"].turns(cell, experiment)] == cell.dtype for cell in plan)

    def test_what_a_comparison_measures_is_of_one_type(self, tmp_path: Path):
        experiment = load("compare", profile="smoke", assignments=["measurement.dtype=bfloat16"])
        assert cells.measured_folder(experiment, tmp_path) == tmp_path / "checkpoint-bfloat16"
        assert cells.measured_folder(load("compare", profile="smoke"), tmp_path) == tmp_path / "checkpoint"


class TestMissingKernelTimedAsTheArchitecture:
    """The fast kernel is absent, and its slow substitute is timed as if it were the architecture."""

    def test_the_substitute_is_named_and_decides_nothing(self, run: RunDirectory, monkeypatch):  # noqa: F811
        monkeypatch.setattr(kernels, "unavailable", lambda name, *of: "no numba here" if name == "numba" else None)
        chosen = kernels.select("auto", CPU)
        assert (chosen.name, chosen.fallback) == ("torch", "numba: no numba here")
        for seed in EXPERIMENT.seeds:
            change(run, "mamba", seed, lambda result: result["backend"].update(fallback=chosen.fallback))
        result = build_result(run, EXPERIMENT, FACTS)
        for phase, metric in (("train", "tokens_per_s"), ("decode", "tokens_per_s"), ("train", "peak_bytes")):
            found = row(result, "mamba", 0, phase, metric)
            assert not found["comparable"]
            assert "no numba here" in found["reason"]
        slow = [one for one in result["verdicts"] if one["metric"] in ("tokens_per_s", "peak_bytes")]
        assert slow
        assert not any(one["resolved"] or one["better"] for one in slow)


class TestFlopCounterThatCountsNothing:
    """`torch.utils.flop_counter` is silent about operations that it does not know."""

    def test_unknown_operations_are_counted_as_nothing_by_torch_and_by_formula_here(self):
        model = LanguageModel(preset("transformer-tiny").with_backend("sdpa"), seed=0)
        tokens = torch.zeros(1, 256, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens)
        seen = sum(f for op, f in counter.get_flop_counts()["Global"].items() if "attention" in str(op))
        assert seen == 0  # the trap: attention on a CPU costs nothing, says the counter
        config = model.config
        one, many = (cost.forward_flops_per_token(config, context) for context in (1, 256))
        # a token at position t meets t + 1 keys, (T + 1) / 2 on average; two products of the width each
        assert many - one == pytest.approx(config.layers * 2 * 2 * config.width * (256 + 1 - 2) / 2)
