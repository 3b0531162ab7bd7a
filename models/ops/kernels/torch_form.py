"""Form `torch`: plain torch on any device; scans in chunks, the rest as defined."""

from torch.nn.functional import linear as linear_step

from models.ops.attention import rotary_qkv
from models.ops.causal_conv1d import reference as causal_conv1d
from models.ops.causal_conv1d import step_reference as causal_conv1d_step
from models.ops.cross_entropy import linear_cross_entropy
from models.ops.experts import by_device as experts
from models.ops.lstm import fused as lstm
from models.ops.projections import added_in_place as residual_step
from models.ops.projections import no_branches as suits_step
from models.ops.projections import together as channel_projections
from models.ops.projections import together as projections
from models.ops.rms_norm import fused as rms_norm
from models.ops.rms_norm import gated_fused as gated_rms_norm
from models.ops.rms_norm import no_sums as suits_sum
from models.ops.selective_scan import chunked as selective_scan
from models.ops.selective_scan import step_reference as selective_scan_step
from models.ops.ssd import chunked as ssd
from models.ops.ssd import step_reference as ssd_step
from models.ops.swiglu import reference as swiglu
from models.ops.trapezoid import chunked as trapezoid
from models.ops.trapezoid import step as trapezoid_step

__all__ = [
    "causal_conv1d", "causal_conv1d_step", "channel_projections", "experts", "gated_rms_norm", "linear_cross_entropy",
    "linear_step", "lstm", "projections", "residual_step", "rms_norm", "rotary_qkv", "selective_scan",
    "selective_scan_step", "ssd", "ssd_step", "suits_step", "suits_sum", "swiglu", "trapezoid", "trapezoid_step",
]  # fmt: skip
