"""What this machine can do: every form of the heavy operations, run and compared with the reference."""

from typing import Any

import torch

from experiments.environment import describe
from models.ops import causal_conv1d, selective_scan
from models.ops.kernels import BACKENDS, load, unavailable

TOLERANCE = 1e-4  # relative to the largest entry, float32


def examine() -> dict[str, Any]:
    """JSON-able: the environment, and for each form and device why it cannot be used, or None."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    forms = [
        {"form": form, "device": device, "problem": unavailable(form, device) or _disagreement(form, device)}
        for device in devices
        for form in BACKENDS
    ]
    return {"environment": describe(devices[-1], 0), "forms": forms}


def _disagreement(form: str, device: str) -> str | None:
    """Forward and gradients against the reference in float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, T, E, N, W = 2, 40, 24, 8, 4
    scan = [
        draw(B, T, E),
        draw(B, T, E) - 2,
        -draw(E, N).exp(),
        draw(B, T, N),
        draw(B, T, N),
        draw(E),
        draw(B, T, E),
        draw(E),
    ]
    conv = [draw(B, T, E), draw(E, W), draw(E)]
    module = load(form)
    pairs = (
        (
            "selective scan",
            scan,
            lambda *x: module.selective_scan(*x)[0],
            lambda *x: selective_scan.reference(*x)[0],
        ),
        ("convolution", conv, lambda *x: module.causal_conv1d(*x), causal_conv1d.reference),
    )
    for name, inputs, fast, reference in pairs:
        theirs = [x.to(device, torch.float32).requires_grad_() for x in inputs]
        ours = [x.clone().requires_grad_() for x in inputs]
        y, expected = fast(*theirs), reference(*ours)
        ours_all = [expected, *torch.autograd.grad(expected.sum(), ours)]
        theirs_all = [y, *torch.autograd.grad(y.sum(), theirs)]
        gradients = zip(theirs_all, ours_all, strict=True)
        worst = max(_relative(a.detach().cpu().double(), b.detach()) for a, b in gradients)
        if not worst < TOLERANCE:
            return f"{name} is off by {worst:.2g} relative to the reference: do not use it"
    return None


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest entry of b."""
    return ((a - b).abs().max() / b.abs().max()).item()
