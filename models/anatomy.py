"""What a model is made of, part by part, from its configuration alone: nothing is allocated, whatever its size."""

from dataclasses import dataclass
from typing import Any

import torch

from models import cost
from models.config import ModelConfig
from models.language_model import LanguageModel


@dataclass(frozen=True)
class Part:
    """One module of the tree, which may stand for a run of equal blocks, or one parameter.

    name: dotted, as in a checkpoint. module: the class, "" for a parameter. shape: of the parameter, () for a module.
    parameters, bytes: of all copies. depth: in the tree, 0 at the top. copies: how many blocks a run has.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    depth: int
    copies: int = 1


def anatomy(config: ModelConfig, dtype: torch.dtype) -> list[Part]:
    """The module tree, depth first; consecutive blocks of one kind are shown once, with their number."""
    model = LanguageModel(config, seed=None, dtype=dtype)  # on the meta device: shapes without memory
    parts: list[Part] = []
    kinds = config.blocks
    first = 0
    for name, child in model.named_children():
        if name != "blocks":
            tied = name == "head" and config.tie_embeddings
            parts += _tied(name, child) if tied else _tree(name, child, 0, 1)
            continue
        while first < len(kinds):
            last = first
            while last + 1 < len(kinds) and kinds[last + 1] == kinds[first]:
                last += 1
            label = f"blocks.{first}" if first == last else f"blocks.{first}-{last}"
            parts += _tree(label, model.blocks[first], 0, last - first + 1)
            first = last + 1
    return parts


def _tree(name: str, module: torch.nn.Module, depth: int, copies: int) -> list[Part]:
    """A module with parameters below it: the module itself, then its parameters and children."""
    own = list(module.parameters())
    if not own:
        return []
    count, size = sum(p.numel() for p in own), sum(p.nbytes for p in own)
    parts = [Part(name, type(module).__name__, (), count * copies, size * copies, depth, copies)]
    for leaf, parameter in module.named_parameters(recurse=False):
        shape = tuple(parameter.shape)
        size = parameter.nbytes * copies
        parts.append(Part(f"{name}.{leaf}", "", shape, parameter.numel() * copies, size, depth + 1))
    for child, part in module.named_children():
        parts += _tree(f"{name}.{child}", part, depth + 1, copies)
    return parts


def _tied(name: str, module: torch.nn.Module) -> list[Part]:
    return [Part(name, f"{type(module).__name__}, the embedding's weight", (), 0, 0, 0)]


def summary(config: ModelConfig, dtype: torch.dtype, context: int, batch: int) -> dict[str, Any]:
    """Totals, JSON-able: parameters, bytes of weights and of the decode state, FLOPs per token at `context` tokens.
    Without a state (bidirectional attention) its bytes are None."""
    count = cost.parameters(config)
    return {
        "parameters": count.total,
        "non_embedding_parameters": count.non_embedding,
        "active_parameters": count.active,
        "weight_bytes": cost.weight_bytes(config, dtype.itemsize),
        "context": context,
        "batch": batch,
        "state_bytes": cost.state_bytes(config, batch, context, dtype.itemsize) if config.causal else None,
        "state_formula": cost.state_formula(config) if config.causal else "no state: it cannot decode",
        "forward_flops_per_token": cost.forward_flops_per_token(config, context),
        "training_flops_per_token": cost.training_flops_per_token(config, context),
    }


def mixers(config: ModelConfig) -> str:
    """The mixers in words, such as 'mamba x6 + attention x1'."""
    kinds = [block.mixer.kind for block in config.blocks]
    return " + ".join(f"{kind} x{kinds.count(kind)}" for kind in dict.fromkeys(kinds))


def feedforwards(config: ModelConfig) -> str:
    kinds = [block.feedforward.kind for block in config.blocks if block.feedforward is not None]
    return " + ".join(dict.fromkeys(kinds)) or "-"
