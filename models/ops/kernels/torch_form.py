"""Form `torch`: plain torch on any device; the scan in chunks, the rest as defined."""

from models.ops.attention import rotate
from models.ops.causal_conv1d import reference as causal_conv1d
from models.ops.causal_conv1d import step_reference as causal_conv1d_step
from models.ops.rms_norm import fused as rms_norm
from models.ops.selective_scan import chunked as selective_scan
from models.ops.selective_scan import step_reference as selective_scan_step
from models.ops.swiglu import reference as swiglu

__all__ = [
    "causal_conv1d", "causal_conv1d_step", "rms_norm", "rotate", "selective_scan", "selective_scan_step", "swiglu",
]  # fmt: skip
