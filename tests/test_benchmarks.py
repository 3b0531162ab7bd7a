"""Both sides of a benchmark do the same work."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'transformers>=5'")
from benchmarks import prefill
from models.presets import preset


@pytest.mark.parametrize("side", [prefill.ours, prefill.theirs])
@pytest.mark.parametrize("arm", ["transformer", "mamba", "mamba2"])
def test_a_prompt_is_read_for_one_token(arm: str, side, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is a fifth of a prefill at this size, if it is asked for every token."""
    monkeypatch.setattr(prefill, "PROMPT", 5)
    vocabulary, scored = preset(f"{arm}-4m").vocabulary, 0

    def see(module: nn.Module, inputs: tuple, output: object) -> None:
        nonlocal scored
        if isinstance(output, torch.Tensor) and output.shape[-1] == vocabulary:
            scored += output.numel() // vocabulary

    turn = side(arm)
    hook = nn.modules.module.register_module_forward_hook(see)
    try:
        tokens, named = turn()
    finally:
        hook.remove()
    assert (tokens, scored) == (5, 1)
    assert 0 <= named < vocabulary
