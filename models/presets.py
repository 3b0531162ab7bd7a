"""Named configurations.

Families at the sizes of `SIZES`: all of a size have the same width and, within 1%, the same non-embedding parameters
(for experts the active ones; for Mamba-2 within 2%: its state size moves in steps that kernels like). Two Mamba or
Mamba-2 blocks stand for each transformer layer; Mamba-3 and the LSTM, like attention, alternate with SwiGLU layers.
`gpt1-*` is a transformer as GPT-1 had it: norms after the branches, LayerNorm, biases, a GELU layer, learned positions.

The shapes of Mamba are those of `mamba_ssm`; what is fitted is a width that nothing else hangs on: the hidden width of
the SwiGLU, of the GELU layer or of an expert, or Mamba-2's state size. (The usual 8/3 of the width would leave the
transformer 3 to 7% smaller than Mamba.)

`gpt1` and `phi3-mini` have the published shapes.
"""

from dataclasses import dataclass, replace
from typing import Any

from models.config import BlockConfig, HybridConfig, ModelConfig
from models.errors import ConfigError, nearest
from models.feedforward.mlp import MLPConfig
from models.feedforward.moe import MoEConfig
from models.feedforward.swiglu import SwiGLUConfig
from models.mixers.attention import AttentionConfig
from models.mixers.lstm import LSTMConfig
from models.mixers.mamba import MambaConfig
from models.mixers.mamba2 import Mamba2Config
from models.mixers.mamba3 import Mamba3Config


@dataclass(frozen=True, kw_only=True)
class Size:
    """layers, hidden: of the transformer and its SwiGLU. state2, state3: of Mamba-2 and Mamba-3, head: of their heads'
    width. hidden_gpt1, hidden3, hidden_lstm, expert: of GPT-1's GELU layer, of the SwiGLU beside Mamba-3, beside the
    LSTM, and of one expert. hybrid: its pattern, where two M stand for one layer."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    hidden_gpt1: int
    head: int
    state2: int
    state3: int
    hidden3: int
    hidden_lstm: int
    expert: int
    window: int
    hybrid: str


SIZES = {
    "tiny": Size(vocabulary=512, width=64, layers=1, heads=2, hidden=256, head=32, state2=48, state3=32,
                 hidden_gpt1=380, hidden3=184, hidden_lstm=148, expert=128, window=32, hybrid="MT"),
    "1m": Size(vocabulary=2048, width=128, layers=4, heads=4, hidden=440, head=64, state2=64, state3=64,
               hidden_gpt1=656, hidden3=304, hidden_lstm=224, expert=220, window=64, hybrid="MMMMMMA"),
    "4m": Size(vocabulary=4096, width=256, layers=4, heads=4, hidden=800, head=64, state2=64, state3=64,
               hidden_gpt1=1196, hidden3=568, hidden_lstm=368, expert=400, window=64, hybrid="MMMMMMA"),
    "30m": Size(vocabulary=16384, width=512, layers=9, heads=8, hidden=1528, head=64, state2=128, state3=128,
                hidden_gpt1=2288, hidden3=1072, hidden_lstm=672, expert=768, window=256, hybrid="MMMMA" * 3),
    "130m": Size(vocabulary=50280, width=768, layers=12, heads=12, hidden=2248, head=64, state2=128, state3=128,
                 hidden_gpt1=3368, hidden3=1616, hidden_lstm=968, expert=1128, window=512, hybrid="MMMMMMA" * 3),
    "370m": Size(vocabulary=50280, width=1024, layers=24, heads=16, hidden=2976, head=64, state2=128, state3=128,
                 hidden_gpt1=4460, hidden3=2160, hidden_lstm=1264, expert=1488, window=1024, hybrid="MMMMMMA" * 6),
}  # fmt: skip
LISTS = "lab models lists them"
POSITIONS = 2048  # of the gpt1 family; GPT-1 had 512


def _family(name: str, s: Size) -> dict[str, ModelConfig]:
    attention, swiglu = AttentionConfig(heads=s.heads), SwiGLUConfig(hidden=s.hidden)
    sliding = replace(attention, window=s.window)
    mamba2 = Mamba2Config(state=s.state2, head_width=s.head)
    mamba3 = Mamba3Config(state=s.state3, head_width=s.head)
    letters = {
        "M": BlockConfig(mixer=MambaConfig()),
        "2": BlockConfig(mixer=mamba2),
        "3": BlockConfig(mixer=mamba3, feedforward=SwiGLUConfig(hidden=s.hidden3)),
        "A": BlockConfig(mixer=attention, feedforward=swiglu),
        "S": BlockConfig(mixer=sliding, feedforward=swiglu),
        "T": BlockConfig(mixer=attention, feedforward=SwiGLUConfig(hidden=84)),  # half a layer, for the tiny hybrid
        "L": BlockConfig(mixer=LSTMConfig(), feedforward=SwiGLUConfig(hidden=s.hidden_lstm)),
    }
    if name != "tiny":
        del letters["T"]

    def model(layers: int, mixer: Any, feedforward: Any = None, hybrid: HybridConfig | None = None) -> ModelConfig:
        return ModelConfig(
            vocabulary=s.vocabulary, width=s.width, layers=layers, mixer=mixer, feedforward=feedforward, hybrid=hybrid
        )

    gpt1 = ModelConfig(
        vocabulary=s.vocabulary, width=s.width, layers=s.layers, norm="layernorm", post_norm=True, positions=POSITIONS,
        mixer=AttentionConfig(heads=s.heads, rotary=False, bias=True), feedforward=MLPConfig(hidden=s.hidden_gpt1),
    )  # fmt: skip
    return {
        f"transformer-{name}": model(s.layers, attention, swiglu),
        f"gpt1-{name}": gpt1,
        f"sliding-{name}": model(s.layers, sliding, swiglu),
        f"moe-{name}": model(s.layers, attention, MoEConfig(experts=8, top_k=2, hidden=s.expert)),
        f"mamba-{name}": model(2 * s.layers, MambaConfig()),
        f"mamba2-{name}": model(2 * s.layers, mamba2),
        f"mamba3-{name}": model(s.layers, mamba3, SwiGLUConfig(hidden=s.hidden3)),
        f"hybrid-{name}": model(len(s.hybrid), None, hybrid=HybridConfig(pattern=s.hybrid, blocks=letters)),
        f"lstm-{name}": model(s.layers, LSTMConfig(), SwiGLUConfig(hidden=s.hidden_lstm)),
    }


PRESETS: dict[str, ModelConfig] = {}
for _name, _size in SIZES.items():
    PRESETS |= _family(_name, _size)
PRESETS["gpt1"] = ModelConfig(
    vocabulary=1000, width=256, layers=6, mixer=AttentionConfig(heads=8, rotary=False, bias=True),
    feedforward=MLPConfig(hidden=1024, activation="relu"), norm="layernorm", post_norm=True, positions=100,
    dropout=0.1, tie_embeddings=False, head_bias=True,
)  # fmt: skip
PRESETS["phi3-mini"] = ModelConfig(
    vocabulary=32064, width=3072, layers=32, mixer=AttentionConfig(heads=32), feedforward=SwiGLUConfig(hidden=8192),
    tie_embeddings=False, padding_index=32000,
)  # fmt: skip


def preset(name: str) -> ModelConfig:
    """Raises ConfigError with the nearest name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model '{name}': {nearest(name, PRESETS, LISTS)}")
    return PRESETS[name]
