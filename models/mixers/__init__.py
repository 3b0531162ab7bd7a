"""Sequence mixers. The contract of each:

    Mixer(config, generator-free)         parameters allocated, not yet initialised
    forward(x, state=None) -> (y, state)  x, y (B, T, D); a state continues a sequence; None wants none back
    step(x, state) -> (y, state)          one token, x, y (B, D)
    make_state(batch, max_len, dtype, device) -> state
    reset_parameters(generator)           its own initialisation
    backend                               what was selected, see models.ops.kernels.Selection

and in `models.cost`: its FLOPs per token and its state bytes.
"""

from models.mixers.attention import Attention
from models.mixers.mamba import Mamba

MIXERS = {"attention": Attention, "mamba": Mamba}
