"""Hugging Face's models, in and out: `LlamaForCausalLM`, `Phi3ForCausalLM`, `MambaForCausalLM`, `Mamba2ForCausalLM`.

    read_config(folder), load(folder)     a folder in their form as our configuration, as our model
    export(model, folder, tokenizer_json) the inverse
    from_settings, to_settings            their config.json as our configuration, and back
    from_tensors, to_tensors              their parameters by name as ours, and back

Neither side is approximated: what the other cannot do raises ConfigError in one line.
"""

from models.hf.architectures import ARCHITECTURES, counterpart, from_settings, from_tensors, to_settings, to_tensors
from models.hf.folder import TOKENIZER, export, load, read_config

__all__ = [
    "ARCHITECTURES",
    "TOKENIZER",
    "counterpart",
    "export",
    "from_settings",
    "from_tensors",
    "load",
    "read_config",
    "to_settings",
    "to_tensors",
]
