"""Rows as a run of a study gives them, made by hand."""

from collections.abc import Sequence
from typing import Any


def per_seed(arm: str, phase: str, metric: str, values: Sequence[float], **rest: Any) -> list[dict]:
    """One row per seed, the seeds counted from 0."""
    usual = {"unit": "", "direction": "lower", "comparable": True, "reason": None, "context": None, "batch": None,
             "mode": None, "dtype": None}  # fmt: skip
    shared = usual | {"arm": arm, "phase": phase, "metric": metric} | rest
    return [shared | {"seed": seed, "value": value} for seed, value in enumerate(values)]


def quality(arm: str, values: Sequence[float]) -> list[dict]:
    return per_seed(arm, "quality", "test_bits_per_byte", values, unit="bits/byte")


def speed(arm: str, phase: str, values: Sequence[float], **rest: Any) -> list[dict]:
    return per_seed(arm, phase, "tokens_per_s", values, unit="tokens/s", direction="higher", **rest)


def held(arm: str, values: Sequence[float], **rest: Any) -> list[dict]:
    return per_seed(arm, "decode", "state_bytes", values, unit="bytes", **rest)
