"""What models.replay predicts for a GPU, in a process without one, where what torch asks it is answered by hand.
Prints, of each model that is named: peaks of prefill by length, and the activations of a training step whose backward
pass, which needs the GPU's streams, is left out."""

import importlib.util
import json
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

for extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
    if importlib.util.find_spec(extension) is None:
        sys.modules[extension] = ModuleType(extension)  # importing the packages takes no more

from models import replay  # noqa: E402
from models.ops import kernels  # noqa: E402
from models.presets import preset  # noqa: E402


def flash(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """Which of its kernels torch takes there."""
    assert attn_mask is None
    assert not enable_gqa
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]


def main(models: list[str], vocabulary: int, contexts: list[int], batch: int, train_context: int) -> None:
    card = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    found = {}
    with (
        mock.patch.object(torch.cuda, "get_device_properties", return_value=card),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch.object(kernels, "_probe_cuda", return_value=None),
        mock.patch.object(F, "scaled_dot_product_attention", flash),
        mock.patch.object(torch.Tensor, "backward", return_value=None),
    ):
        for name in models:
            config = preset(name).with_overrides({"vocabulary": vocabulary})
            found[name] = {
                "prefill": {at: replay.prefill(config, 1, at, torch.bfloat16, "cuda") for at in contexts},
                "activations": replay.training(config, batch, train_context, "cuda", "bfloat16").activations,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
