"""Sequence mixers, one file each; what each has to be stands in models/mixers/base.py."""

from models.mixers.attention import Attention
from models.mixers.base import Mixer, MixerConfig
from models.mixers.lstm import LSTM
from models.mixers.mamba import Mamba
from models.mixers.mamba2 import Mamba2
from models.mixers.mamba3 import Mamba3

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "lstm": LSTM,
}

__all__ = ["MIXERS", "Mixer", "MixerConfig"]
