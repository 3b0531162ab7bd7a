"""What a model is, as frozen values. Unknown keys are errors; the resolved configuration goes into the record."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from models.errors import ConfigError, nearest


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{config.kind}.{name} must be a positive whole number, got {value!r}")


def _numbers(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{config.kind}.{name} must be a number, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal self-attention with rotary positions (arXiv 2104.09864), optionally grouped queries (2305.13245)."""

    kind: Literal["attention"] = "attention"
    heads: int
    kv_heads: int | None = None  # None: as many as heads
    rotary_base: float = 10000.0
    backend: str = "auto"  # auto, reference, sdpa, numba

    def __post_init__(self) -> None:
        _positive(self, "heads")
        if self.kv_heads is not None:
            _positive(self, "kv_heads")
            if self.heads % self.kv_heads:
                raise ConfigError(f"attention.heads = {self.heads} is not a multiple of kv_heads = {self.kv_heads}")
        _numbers(self, "rotary_base")
        if not self.rotary_base > 1:
            raise ConfigError(f"attention.rotary_base must be above 1, got {self.rotary_base!r}")


@dataclass(frozen=True, kw_only=True)
class MambaConfig:
    """Mamba-1 (arXiv 2312.00752), shapes and initialisation as `mamba_ssm.Mamba`."""

    kind: Literal["mamba"] = "mamba"
    expand: int = 2
    state: int = 16
    conv_width: int = 4
    dt_rank: int | None = None  # None: ceil(width / 16)
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    backend: str = "auto"  # auto, reference, torch, numba, cuda

    def __post_init__(self) -> None:
        _positive(self, "expand", "state", "conv_width")
        if self.dt_rank is not None:
            _positive(self, "dt_rank")
        _numbers(self, "dt_min", "dt_max", "dt_floor")
        if not 0 < self.dt_min <= self.dt_max:
            raise ConfigError(f"mamba needs 0 < dt_min <= dt_max, got {self.dt_min!r} and {self.dt_max!r}")
        if not self.dt_floor > 0:
            raise ConfigError(f"mamba.dt_floor must be above 0, got {self.dt_floor!r}")


@dataclass(frozen=True, kw_only=True)
class SwiGLUConfig:
    """The gated feed-forward layer of arXiv 2002.05202."""

    kind: Literal["swiglu"] = "swiglu"
    hidden: int | None = None  # None: 8/3 of the width, rounded to a multiple of 64

    def __post_init__(self) -> None:
        if self.hidden is not None:
            _positive(self, "hidden")


MIXER_CONFIGS = {"attention": AttentionConfig, "mamba": MambaConfig}
FEEDFORWARD_CONFIGS = {"swiglu": SwiGLUConfig}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A stack of `layers` residual blocks of one kind between an embedding and a head."""

    vocabulary: int
    width: int
    layers: int
    mixer: AttentionConfig | MambaConfig
    feedforward: SwiGLUConfig | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True

    kind = "model"

    def __post_init__(self) -> None:
        _positive(self, "vocabulary", "width", "layers")
        _numbers(self, "norm_eps")
        if not self.norm_eps > 0:
            raise ConfigError(f"model.norm_eps must be above 0, got {self.norm_eps!r}")
        if isinstance(self.mixer, AttentionConfig):
            if self.width % self.mixer.heads:
                raise ConfigError(f"model.width = {self.width} is not a multiple of heads = {self.mixer.heads}")
            if self.width // self.mixer.heads % 2:
                raise ConfigError(f"rotary positions need an even head width, got {self.width // self.mixer.heads}")

    @property
    def feedforward_hidden(self) -> int | None:
        """Width inside the feed-forward layer, None where there is none."""
        if self.feedforward is None:
            return None
        return self.feedforward.hidden or max(64, round(8 * self.width / 3 / 64) * 64)

    @property
    def dt_rank(self) -> int:
        assert isinstance(self.mixer, MambaConfig)
        return self.mixer.dt_rank or -(-self.width // 16)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises ConfigError on unknown keys, with the nearest valid one."""
        values = dict(values)
        values["mixer"] = _part(values.get("mixer"), MIXER_CONFIGS, "mixer")
        if values.get("feedforward") is not None:
            values["feedforward"] = _part(values["feedforward"], FEEDFORWARD_CONFIGS, "feedforward")
        return _build(cls, values, "model")

    def with_overrides(self, overrides: Mapping[str, Any]) -> "ModelConfig":
        """A copy with dotted or nested settings changed, e.g. {"mixer.state": 32} or {"mixer": {"state": 32}}."""
        config = self
        for key, value in _flat(overrides).items():
            name, _, rest = key.partition(".")
            known = [field.name for field in fields(config)]
            if name not in known:
                raise ConfigError(f"unknown model setting '{key}': {nearest(name, known)}")
            part: Any = getattr(config, name)
            whole = value is None or hasattr(value, "__dataclass_fields__")
            if name not in ("mixer", "feedforward"):
                if rest:
                    raise ConfigError(f"unknown model setting '{key}': '{name}' is one value, not a table")
            elif rest or not whole:
                if part is None:
                    raise ConfigError(f"this model has no {name}, so '{key}' means nothing")
                inner = [field.name for field in fields(part)]
                if not rest:
                    keys = ", ".join(f"{key}.{setting}" for setting in inner)
                    raise ConfigError(f"'{key}' is a table; set one of its keys: {keys}")
                if rest not in inner:
                    raise ConfigError(f"unknown model setting '{key}': {nearest(rest, inner)}")
                value = replace(part, **{rest: value})
            config = replace(config, **{name: value})
        return config


def _flat(overrides: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _part(values: Any, kinds: Mapping[str, type], role: str) -> Any:
    if not isinstance(values, Mapping) or "kind" not in values:
        raise ConfigError(f"{role} must be a table with a 'kind' ({', '.join(kinds)}), got {values!r}")
    if values["kind"] not in kinds:
        raise ConfigError(f"unknown {role} '{values['kind']}': {nearest(str(values['kind']), kinds)}")
    return _build(kinds[values["kind"]], values, role)


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    known = {field.name for field in fields(cls)}
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown {where} setting '{key}': {nearest(key, known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix(cls.__name__ + '.__init__() ')}") from None
