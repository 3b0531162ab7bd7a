"""The types that products run in."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products in the types of their inputs, also under autocast, which the meta device does not have."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def autocast_type(device: torch.device) -> torch.dtype | None:
    """What autocast has products of this device run in; None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None
