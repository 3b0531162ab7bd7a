"""Feed-forward layers: (B, T, D) -> (B, T, D), each position by itself."""

from models.feedforward.swiglu import SwiGLU

FEEDFORWARDS = {"swiglu": SwiGLU}
