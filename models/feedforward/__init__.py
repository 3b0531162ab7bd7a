"""Feed-forward layers, one file each; what each has to be stands in models/feedforward/base.py."""

from models.feedforward.base import ExpertChoice, FeedForward, FeedForwardConfig, Routing
from models.feedforward.mlp import MLP
from models.feedforward.moe import MoE
from models.feedforward.swiglu import SwiGLU

FEEDFORWARDS: dict[str, type[FeedForward]] = {"swiglu": SwiGLU, "mlp": MLP, "moe": MoE}

__all__ = ["FEEDFORWARDS", "ExpertChoice", "FeedForward", "FeedForwardConfig", "Routing"]
