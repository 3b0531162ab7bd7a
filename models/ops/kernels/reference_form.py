"""Form `reference`: every operation as its definition reads."""

from torch.nn.functional import linear as linear_step

from models.ops.attention import rotary_qkv
from models.ops.causal_conv1d import reference as causal_conv1d
from models.ops.causal_conv1d import step_reference as causal_conv1d_step
from models.ops.cross_entropy import reference as linear_cross_entropy
from models.ops.experts import reference as experts
from models.ops.lstm import reference as lstm
from models.ops.mamba2_inner import reference as mamba2_inner
from models.ops.projections import added as residual_step
from models.ops.projections import no_branches as suits_step
from models.ops.projections import together as channel_projections
from models.ops.projections import together as projections
from models.ops.rms_norm import gated as gated_rms_norm
from models.ops.rms_norm import no_sums as suits_sum
from models.ops.rms_norm import reference as rms_norm
from models.ops.selective_scan import reference as selective_scan
from models.ops.selective_scan import step_reference as selective_scan_step
from models.ops.ssd import reference as ssd
from models.ops.ssd import step_reference as ssd_step
from models.ops.swiglu import reference as swiglu
from models.ops.trapezoid import reference as trapezoid
from models.ops.trapezoid import step as trapezoid_step

__all__ = [
    "causal_conv1d", "causal_conv1d_step", "channel_projections", "experts", "gated_rms_norm", "linear_cross_entropy",
    "linear_step", "lstm", "mamba2_inner", "projections", "residual_step", "rms_norm", "rotary_qkv", "selective_scan",
    "selective_scan_step", "ssd", "ssd_step", "suits_step", "suits_sum", "swiglu", "trapezoid", "trapezoid_step",
]  # fmt: skip
