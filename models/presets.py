"""Named configurations. Matched pairs: `transformer-X` and `mamba-X` have the same width and non-embedding parameters
within 1%, with two Mamba blocks for each transformer layer.

Mamba's shape is that of `mamba_ssm`; the pair is matched by the hidden width of the transformer's SwiGLU, since that
is the one width that nothing else hangs on. (The usual 8/3 of the width would leave the transformer 3 to 7% smaller.)
"""

from models.config import AttentionConfig, MambaConfig, ModelConfig, SwiGLUConfig
from models.errors import ConfigError, nearest


def _pair(size: str, vocabulary: int, width: int, layers: int, heads: int, hidden: int) -> dict[str, ModelConfig]:
    return {
        f"transformer-{size}": ModelConfig(
            vocabulary=vocabulary, width=width, layers=layers,
            mixer=AttentionConfig(heads=heads), feedforward=SwiGLUConfig(hidden=hidden),
        ),
        f"mamba-{size}": ModelConfig(vocabulary=vocabulary, width=width, layers=2 * layers, mixer=MambaConfig()),
    }  # fmt: skip


PRESETS: dict[str, ModelConfig] = {
    **_pair("tiny", vocabulary=512, width=64, layers=1, heads=2, hidden=256),
    **_pair("1m", vocabulary=2048, width=128, layers=4, heads=4, hidden=440),
    **_pair("4m", vocabulary=4096, width=256, layers=4, heads=4, hidden=800),
    **_pair("30m", vocabulary=16384, width=512, layers=9, heads=8, hidden=1528),
    **_pair("130m", vocabulary=50280, width=768, layers=12, heads=12, hidden=2248),
    **_pair("370m", vocabulary=50280, width=1024, layers=24, heads=16, hidden=2976),
}


def preset(name: str) -> ModelConfig:
    """Raises ConfigError with the nearest name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model '{name}': {nearest(name, PRESETS)}")
    return PRESETS[name]
