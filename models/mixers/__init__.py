"""Sequence mixers. The contract of each:

    Mixer(config, device)                 parameters allocated, not yet initialised
    forward(x, state=None) -> (y, state)  x, y (B, T, D); a state continues a sequence; None wants none back
    step(x, state) -> (y, state)          one token, x, y (B, D)
    make_state(batch, max_len, dtype, device) -> state
    reset_parameters(generator)           its own initialisation
    backend                               what was selected, see models.ops.kernels.Selection

and in `models.cost`: its FLOPs per token and its state bytes.
"""

from typing import Any

from models.mixers.attention import Attention
from models.mixers.mamba import Mamba

Mixer = Any  # one of the classes below; each block's state is of its mixer's own type

MIXERS = {"attention": Attention, "mamba": Mamba}
