"""What a model is, as frozen values. Unknown keys are errors; the resolved configuration goes into the record.

The settings of a mixer or a feed-forward layer stand in its own file, as `Config` of its class.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

from models.errors import ConfigError, nearest
from models.feedforward import FEEDFORWARDS, FeedForwardConfig
from models.mixers import MIXERS, MixerConfig
from models.norm import NORMS
from models.settings import build, flags, numbers, one_of, part, positive, positive_or_none


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One residual block: a mixer and, after it, a feed-forward layer where there is one."""

    mixer: MixerConfig
    feedforward: FeedForwardConfig | None = None


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """Blocks of several kinds. pattern: one letter of `blocks` for each block, repeated to fill the layers."""

    pattern: str
    blocks: Mapping[str, BlockConfig]

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise ConfigError(f"hybrid.pattern must name blocks by their letters, got {self.pattern!r}")
        for letter in self.blocks:
            if len(letter) != 1:
                raise ConfigError(f"hybrid.blocks are named by one letter each, got '{letter}'")
        unknown = [letter for letter in self.pattern if letter not in self.blocks]
        if unknown:
            known = ", ".join(sorted(self.blocks))
            raise ConfigError(f"unknown letter '{unknown[0]}' in hybrid.pattern '{self.pattern}': known: {known}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A stack of `layers` residual blocks between an embedding and a head.

    Either all blocks are alike (`mixer`, `feedforward`) or `hybrid` says which stands where.
    norm: rmsnorm or layernorm. post_norm: norm(x + branch(x)) as in the first transformers, without a norm before the
    head; else x + branch(norm(x)). positions: learned position embeddings for so many tokens; None, no such embedding.
    dropout: of the embedding and of each branch, in training. padding_index: a token whose embedding is zero and stays
    so. head_bias: of an untied head.
    """

    vocabulary: int
    width: int
    layers: int
    mixer: MixerConfig | None = None
    feedforward: FeedForwardConfig | None = None
    hybrid: HybridConfig | None = None
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    post_norm: bool = False
    positions: int | None = None
    dropout: float = 0.0
    tie_embeddings: bool = True
    head_bias: bool = False
    padding_index: int | None = None

    kind = "model"

    def __post_init__(self) -> None:
        positive(self, "vocabulary", "width", "layers")
        positive_or_none(self, "positions")
        numbers(self, "norm_eps", "dropout")
        flags(self, "post_norm", "tie_embeddings", "head_bias")
        one_of(self, "norm", tuple(NORMS))
        if not self.norm_eps > 0:
            raise ConfigError(f"model.norm_eps must be above 0, got {self.norm_eps!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout must be at least 0 and below 1, got {self.dropout!r}")
        if self.head_bias and self.tie_embeddings:
            raise ConfigError("model.head_bias needs a head of its own: set tie_embeddings = false")
        if self.padding_index is not None and self.padding_index not in range(self.vocabulary):
            raise ConfigError(f"model.padding_index = {self.padding_index} is not in a vocabulary of {self.vocabulary}")
        if (
            self.padding_index is not None and self.tie_embeddings
        ):  # a tied head would move the row that is to stay zero
            raise ConfigError("model.padding_index needs a head of its own: set tie_embeddings = false")
        if (self.mixer is None) == (self.hybrid is None):
            raise ConfigError("a model has either a mixer or a hybrid, a table of blocks with a pattern")
        if self.hybrid is not None and self.feedforward is not None:
            raise ConfigError("the feed-forward layers of a hybrid stand in its blocks")
        if self.hybrid is not None and self.layers < len(self.hybrid.pattern):
            raise ConfigError(
                f"model.layers = {self.layers} is less than one round of hybrid.pattern '{self.hybrid.pattern}': "
                f"some of its blocks would not occur"
            )
        for block in self.kinds:
            block.mixer.check(self.width)

    @property
    def kinds(self) -> tuple[BlockConfig, ...]:
        """The kinds of block that occur, in the order of their first place."""
        if self.hybrid is None:
            assert self.mixer is not None
            return (BlockConfig(mixer=self.mixer, feedforward=self.feedforward),)
        return tuple(self.hybrid.blocks[letter] for letter in dict.fromkeys(self.hybrid.pattern[: self.layers]))

    @property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """Of every layer, from the first to the last."""
        if self.hybrid is None:
            return self.kinds * self.layers
        pattern = self.hybrid.pattern
        return tuple(self.hybrid.blocks[pattern[i % len(pattern)]] for i in range(self.layers))

    @property
    def causal(self) -> bool:
        """Whether no token sees what comes after it."""
        return all(block.mixer.causal for block in self.kinds)

    def with_backend(self, backend: str) -> "ModelConfig":
        """A copy in which every mixer asks for this form."""
        if self.hybrid is None:
            return replace(self, mixer=replace(self.mixer, backend=backend))  # type: ignore[type-var]
        blocks = {
            letter: replace(block, mixer=replace(block.mixer, backend=backend))  # type: ignore[type-var]
            for letter, block in self.hybrid.blocks.items()
        }
        return replace(self, hybrid=replace(self.hybrid, blocks=blocks))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises ConfigError on unknown keys, with the nearest valid one."""
        values = _block(dict(values))
        hybrid = values.get("hybrid")
        if hybrid is not None:
            if not isinstance(hybrid, Mapping) or not isinstance(hybrid.get("blocks"), Mapping):
                raise ConfigError(f"hybrid must be a table with a pattern and blocks, got {hybrid!r}")
            for letter, block in hybrid["blocks"].items():
                if not isinstance(block, Mapping):
                    raise ConfigError(f"hybrid.blocks.{letter} must be a table, got {block!r}")
            blocks = {
                letter: build(BlockConfig, _block(dict(block)), f"hybrid.blocks.{letter}")
                for letter, block in hybrid["blocks"].items()
            }
            values["hybrid"] = build(HybridConfig, {**hybrid, "blocks": blocks}, "hybrid")
        return build(cls, values, "model")

    def with_overrides(self, overrides: Mapping[str, Any]) -> "ModelConfig":
        """A copy with dotted or nested settings changed, e.g. {"mixer.state": 32} or {"mixer": {"state": 32}}; all at
        once, so that settings may depend on each other."""
        flat = _flat(overrides)
        config = _changed(self, "", _nested(flat))
        for key in flat:
            parts = key.split(".")
            if config.hybrid and parts[:2] == ["hybrid", "blocks"] and parts[2] not in config.hybrid.pattern:
                raise ConfigError(f"'{key}' does nothing: the pattern '{config.hybrid.pattern}' has no '{parts[2]}'")
        return config


def _block(values: dict[str, Any]) -> dict[str, Any]:
    """With its mixer and its feed-forward layer built; a model in which neither is given stays as it is."""
    if values.get("mixer") is not None or ("mixer" in values and not values.get("hybrid")):
        values["mixer"] = part(values["mixer"], MIXERS, "mixer")
    if values.get("feedforward") is not None:
        values["feedforward"] = part(values["feedforward"], FEEDFORWARDS, "feedforward")
    return values


def _changed(config: Any, path: str, changes: Mapping[str, Any]) -> Any:
    """`config`, which stands at `path`, with all `changes` made at once."""
    table = isinstance(config, Mapping)
    known = list(config) if table else [field.name for field in fields(config)]
    changed = {}
    for name, value in changes.items():
        key = next(iter(_flat({name: value}, path)))  # as the person wrote it
        if name not in known:
            raise ConfigError(f"unknown model setting '{key}': {nearest(name, known)}")
        if name == "kind":
            raise ConfigError(f"'{key}' is what the table is, not a setting of it: take a preset of the other kind")
        now: Any = config[name] if table else getattr(config, name)
        replaced = value is None or is_dataclass(value)
        inside = (table or name in ("mixer", "feedforward", "hybrid", "blocks")) and not replaced
        if now is None and (inside or isinstance(value, Mapping)):
            raise ConfigError(f"this model has no {name}, so '{key}' means nothing")
        if isinstance(value, Mapping):
            if not is_dataclass(now) and not isinstance(now, Mapping):
                raise ConfigError(f"unknown model setting '{key}': '{name}' is one value, not a table")
            value = _changed(now, f"{path}{name}.", value)
        elif inside:
            parts = list(now) if isinstance(now, Mapping) else [field.name for field in fields(now)]  # type: ignore[arg-type]
            raise ConfigError(f"'{key}' is a table; set one of its keys: {', '.join(f'{key}.{k}' for k in parts)}")
        changed[name] = value
    return {**config, **changed} if table else replace(config, **changed)


def _flat(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        table = nested
        for step in path:
            table = table.setdefault(step, {})
            if not isinstance(table, dict):
                raise ConfigError(f"'{key}' is part of what another setting replaces: give only one of them")
        if last in table:
            raise ConfigError(f"'{key}' replaces what another setting is part of: give only one of them")
        table[last] = value
    return nested
