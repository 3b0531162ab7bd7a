"""Work that is recorded once and that a GPU repeats without its host: CUDA graphs, the same way for every architecture.

A decode step of a small model is a hundred launches of a few microseconds each, and the host takes longer to ask for
them than the GPU to do them. A recording repeats the same operations on the same memory, so nothing in it may depend on
a number that the host knows. In decode therefore the position stands on the device (`models.state.Place`), a recurrent
state is written back where it was, and attention learns on the device how many slots of its cache are filled
(`models.ops.attention.of_slots`).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from models.block import Block
from models.errors import ConfigError
from models.language_model import LanguageModel
from models.ops.attention import kept_tables
from models.state import KVCache, ModelState, Place, RecurrentState, State

WARM_UP = 3  # runs before recording, in which kernels are loaded and choose their configurations


class Recording:
    """Repeats `operation` from a CUDA graph when called, on the tensors that it read and wrote while it was recorded.
    To the graph they are addresses: so this holds the operation, and the operation has to hold them, but for the tables
    of rotary angles, whose place a longer one would take; those this holds too.

    Before it is recorded, which computes nothing, the operation runs WARM_UP times, each time after `before`. pool: a
    `torch.cuda.graph_pool_handle()` of which all recordings take what they make in between; none may need what is left
    there by itself, while another runs in its place. Raises ConfigError without a GPU.
    """

    def __init__(
        self, operation: Callable[[], object], device: torch.device, *, before: Callable[[], object] = lambda: None,
        pool: Any = None,
    ) -> None:  # fmt: skip
        if device.type != "cuda":
            raise ConfigError("a CUDA graph is recorded, which needs a GPU")
        index = torch.cuda.current_device() if device.index is None else device.index
        graph, aside = torch.cuda.CUDAGraph(), _stream(index)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                before()
                operation()
        torch.cuda.current_stream(device).wait_stream(aside)
        with torch.cuda.graph(graph, pool=pool, stream=aside):
            operation()
        self.operation, self.tables, self.replay = operation, kept_tables(), graph.replay

    def __call__(self) -> None:
        self.replay()


class RepeatableStep:
    """Decoding whose every step is the same operations on fixed memory: from `state` on, up to `limit` tokens in all,
    with the weights as they are now.

    `step` as the model's; it also chooses the next token greedily, within the same operations, so that who writes
    greedily does nothing else. The state's buffers are its own from now on. `load` goes on from a copy of another state
    of the same shapes; `rewind` goes back to the position at which it was made or loaded: a cache is written over from
    there; a recurrent state just goes on. Raises ConfigError for a model that cannot be repeated so, with the reason.
    """

    def __init__(self, model: LanguageModel, state: ModelState, limit: int) -> None:
        if (reason := not_recordable(model)) is not None:
            raise ConfigError(f"a decode step cannot be recorded: {reason}")
        self.model = model
        self.start, self.length, self.limit = state.length, state.length, limit
        tables = {key: table for block in model.blocks for key, table in block.mixer.rotary_tables(limit).items()}
        self.place = Place(torch.tensor(state.length, device=model.device), limit, tables)
        # no number of the host's in them, or `torch.compile` would trace a step anew for every length it starts from
        blocks: tuple[State, ...] = tuple(replace(b, length=0) for b in state.blocks)  # pyright: ignore[reportArgumentType]
        self.state = ModelState(tuple(map(self._fixed, blocks, model.blocks)), self.place)
        batch = next(iter(blocks[0].buffers.values())).shape[0]
        self.token = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self.logits = torch.zeros(batch, model.config.vocabulary, dtype=model.dtype, device=model.device)

    def _fixed(self, state: State, block: Block) -> State:
        """With all that its step would otherwise ask the host for, or make anew every time."""
        if isinstance(state, KVCache):
            return replace(state, place=self.place)
        return replace(state, constants=block.mixer.constants()) if isinstance(state, RecurrentState) else state

    def step(self, token: Tensor | None = None) -> Tensor:
        """Read one token (B,), or without one the likeliest after the last step, which stands in `token`: the logits
        after it (B, V), in memory that the next step writes over. Raises ConfigError beyond the limit."""
        if self.length >= self.limit:
            raise ConfigError(f"the repeated step was made for {self.limit} tokens: raise the limit")
        self.length += 1
        if token is not None:
            self.token.copy_(token)
        self.repeat()
        return self.logits

    def repeat(self) -> None:
        """Read `token`, move the state and its place on, write `logits` and the likeliest next `token`."""
        logits, after = self.model.step(self.token, self.state)
        for kept, new in zip(self.state.blocks, after.blocks, strict=True):
            for name, buffer in kept.buffers.items():
                if new.buffers[name] is not buffer:
                    buffer.copy_(new.buffers[name])
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(1))
        self.place.at.add_(1)

    def load(self, state: ModelState) -> None:
        for mine, given in zip(self.state.blocks, state.blocks, strict=True):
            for name, buffer in mine.buffers.items():
                buffer.copy_(given.buffers[name])
        self.start = state.length
        self.rewind()

    def rewind(self) -> None:
        self.length = self.start
        self.place.at.fill_(self.start)


class RecordedDecode(RepeatableStep):
    """The same, replayed from a CUDA graph. Raises ConfigError also without a GPU."""

    def __init__(self, model: LanguageModel, state: ModelState, limit: int) -> None:
        super().__init__(model, state, limit)
        before = state.clone()
        # a cache may have room for no more than one; the recording would hold this, which holds its tensors itself
        self.repeat = Recording(self.repeat, model.device, before=self.rewind).replay
        self.load(before)


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """What every recording on a GPU warms up and is made on. Torch keeps a workspace for matrix products, tens of
    megabytes, for each stream that has seen one: another stream for every recording would cost another each time."""
    return torch.cuda.Stream(device)


def not_recordable(model: LanguageModel) -> str | None:
    """Why the model's decode step cannot be repeated without the host; None if it can."""
    for block in model.blocks:
        if block.mixer.backend.name == "numba":
            return "the compiled steps of a CPU run on the host"
        reason = None if block.feedforward is None else block.feedforward.needs_host(model.dtype, model.device)
        if reason is not None:
            return reason
    return None
