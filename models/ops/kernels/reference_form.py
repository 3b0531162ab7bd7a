"""Form `reference`: every operation as its definition reads."""

from models.ops.causal_conv1d import reference as causal_conv1d
from models.ops.causal_conv1d import step_reference as causal_conv1d_step
from models.ops.rms_norm import reference as rms_norm
from models.ops.selective_scan import reference as selective_scan
from models.ops.selective_scan import step_reference as selective_scan_step

__all__ = ["causal_conv1d", "causal_conv1d_step", "rms_norm", "selective_scan", "selective_scan_step"]
