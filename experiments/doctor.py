"""What this machine can do: every form of the heavy operations, run and compared with the reference."""

from typing import Any

import torch

from experiments.data.dataset import default_cache
from experiments.environment import describe
from experiments.kernels.check import absent, check, of_this_gpu
from experiments.kernels.verdict import by_form
from models.ops.kernels import BACKENDS


def examine() -> dict[str, Any]:
    """JSON-able: the environment; for each form and device why it cannot be used, or None; and what was checked, row by
    row."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    forms, rows = [], []
    for device in devices:
        found = of_this_gpu(default_cache(), again=True) if device == "cuda" else _of_this_cpu()
        rows += found["rows"]
        said = by_form(found["rows"])
        for form in BACKENDS:
            failed = any(row["form"] == form and row["problem"] for row in found["rows"])
            wrong = f"do not use it: {said[form]}" if failed else None
            lacking = [why for one, why in found["absent"].items() if one == form or one.startswith(f"{form}, ")]
            problem = found["problem"] or wrong or next(iter(lacking), None)  # an operation that it lacks harms nothing
            forms.append({"form": form, "device": device, "problem": problem})
    return {"environment": describe(devices[-1], 0), "forms": forms, "checks": rows}


def _of_this_cpu() -> dict[str, Any]:
    return {"problem": None, "absent": absent("cpu"), "rows": [outcome.to_dict() for outcome in check("cpu")]}
