"""What is predicted of a GPU's memory, without one, against what one measured."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import cost
from models.presets import preset

pytestmark = pytest.mark.oracle
RECORD = Path(__file__).parents[2] / "docs" / "results" / "memory-cuda"
ALLOCATOR = 0.025  # which rounds up to its blocks
VOCABULARY, CONTEXTS, BATCH, TRAIN_CONTEXT = 16384, [512, 4096, 32768], 8, 2048


def test_the_record_of_a_gpu_is_what_its_forms_allocate():
    for name in ("mamba_ssm", "causal_conv1d", "triton", "einops", "transformers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: see docs/method.md")
    if torch.version.cuda is None:
        pytest.skip("torch is built without CUDA, whose operators have no shapes then")
    rows = json.loads((RECORD / "result.json").read_text())["rows"]
    measured = {(r["arm"], r["phase"], r["metric"], r["context"]): r["value"] for r in rows if r["seed"] == 0}
    arms = {arm: f"{arm}-30m" for arm in ("transformer", "mamba", "mamba2")}
    asked = {
        "models": list(arms.values()), "vocabulary": VOCABULARY, "contexts": CONTEXTS, "batch": BATCH,
        "train_context": TRAIN_CONTEXT,
    }  # fmt: skip
    helper = Path(__file__).with_name("replay_without_gpu.py")
    done = subprocess.run([sys.executable, helper, json.dumps(asked)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for arm, name in arms.items():
        config = preset(name).with_overrides({"vocabulary": VOCABULARY})
        row = 2 * config.width  # bytes of a token in 16 bits
        for at in CONTEXTS:
            kept = cost.weight_bytes(config, 2) + cost.rotary_bytes(config, at)
            if arm == "transformer":  # measured when a sum in a block was not written over what it is made of
                kept += row * at
            predicted = kept + found[name]["prefill"][str(at)]
            assert measured[arm, "prefill", "peak_bytes", at] == pytest.approx(predicted, rel=ALLOCATOR)
        # measured when the gradient of what the head reads was kept in float32
        activations = measured[arm, "train", "activation_bytes", TRAIN_CONTEXT] - row * BATCH * TRAIN_CONTEXT
        if arm == "mamba":  # measured when both of its products rounded what the norm gave, each for itself
            activations -= config.layers * row * BATCH * TRAIN_CONTEXT
        if arm == "mamba2":  # measured when the convolution's output was kept, and what it was split into
            assert found[name]["activations"] < 0.75 * activations
        else:
            assert activations == pytest.approx(found[name]["activations"], rel=0.002)
