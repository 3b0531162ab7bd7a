"""What a mixer says of itself: the numbers behind its output for one text, by its readable form.

B: batch   T: time, of queries   S: time, of keys or inputs   D: width   H: heads   P: head width   N: state size
U: units, the channels or the heads of a recurrence
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST = 1e9  # tokens; what forgets more slowly is given this half-life, so that every one is a number


@dataclass(frozen=True)
class AttentionExplanation:
    """scores (B, H, T, S): -inf where masked. weights (B, H, T, S): their softmax. mixed (B, T, H, P): the sums of the
    values with these weights. output (B, T, D): the mixer's."""

    scores: Tensor
    weights: Tensor
    mixed: Tensor
    output: Tensor


@dataclass(frozen=True)
class MemoryExplanation:
    """Of a recurrence whose units each decay by themselves.

    unit: "channel" or "head". half_life (B, T, U, N): tokens after which half of what a state holds would be left, were
    every step as step t; N is 1 where a unit has one rate. written (B, T, U): size (Euclidean) of what each token adds
    to the state. left (B, T, U): size of what is left of it after the last token. output (B, T, D): the mixer's.

    Of a recurrence that is linear in its input, else None: inputs (B, T, U, P), P being 1 for channels; matrix
    (B, T, S, U) and skip (U), with matrix . inputs + skip inputs = scanned (B, T, U, P).
    """

    unit: str
    half_life: Tensor
    written: Tensor
    left: Tensor
    output: Tensor
    inputs: Tensor | None = None
    matrix: Tensor | None = None
    skip: Tensor | None = None
    scanned: Tensor | None = None


Explanation = AttentionExplanation | MemoryExplanation


def half_lives(rate: Tensor) -> Tensor:
    """rate = -log |a| >= 0 of a step that scales a state by a -> tokens."""
    return math.log(2) / rate.clamp_min(math.log(2) / LONGEST)


def remaining(rate: Tensor) -> Tensor:
    """rate (B, T, ...) -> the share of what step t wrote that later steps leave, exp(-sum_(r > t) rate_r)."""
    # not the whole sum less rate_t: a step that forgets everything has an infinite rate
    later = torch.cat([rate[:, 1:], torch.zeros_like(rate[:, :1])], 1)
    return (-later.flip(1).cumsum(1).flip(1)).exp()
