"""Decode as one recorded step that a GPU repeats without its host: CUDA graphs, the same way for every architecture.

A step of a small model is a hundred launches of a few microseconds each, and the host takes longer to ask for them than
the GPU to do them. A recording repeats the same operations on the same memory, so nothing in it may depend on a number
that the host knows: the position stands on the device (`models.state.Place`), a recurrent state is written back where
it was, and attention reads every slot of its cache, which costs what a full cache costs.
"""

from dataclasses import replace

import torch
from torch import Tensor

from models.errors import ConfigError
from models.language_model import LanguageModel
from models.state import KVCache, ModelState, Place

WARM_UP = 3  # steps before recording, in which kernels are loaded and choose their configurations


class RepeatableStep:
    """A decode step as operations on fixed memory: reads `token` (B,), moves `state` and its place on, writes `logits`
    (B, V). `limit`: the tokens that the sequence may have.

    Raises ConfigError for a model that cannot be repeated so, with the reason.
    """

    def __init__(self, model: LanguageModel, state: ModelState, limit: int) -> None:
        if (reason := not_recordable(model)) is not None:
            raise ConfigError(f"a decode step cannot be recorded: {reason}")
        self.model = model
        self.place = Place(torch.tensor(state.length, device=model.device), limit)
        blocks = tuple(replace(b, place=self.place) if isinstance(b, KVCache) else b for b in state.blocks)
        self.state = ModelState(blocks, self.place)
        batch = next(iter(blocks[0].buffers.values())).shape[0]
        self.token = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self.logits = torch.zeros(batch, model.config.vocabulary, dtype=model.dtype, device=model.device)

    def __call__(self) -> None:
        logits, after = self.model.step(self.token, self.state)
        for kept, new in zip(self.state.blocks, after.blocks, strict=True):
            for name, buffer in kept.buffers.items():
                if new.buffers[name] is not buffer:
                    buffer.copy_(new.buffers[name])
        self.logits.copy_(logits)
        self.place.at.add_(1)

    def load(self, state: ModelState) -> None:
        """Go on from a copy of another state, of the same shapes."""
        for mine, given in zip(self.state.blocks, state.blocks, strict=True):
            for name, buffer in mine.buffers.items():
                buffer.copy_(given.buffers[name])
        self.place.at.fill_(state.length)


class RecordedDecode:
    """`step` as the model's, from `state` on, replayed from a CUDA graph; up to `limit` tokens in all.

    The state's buffers are its own from now on. `load` goes on from a copy of another state of the same shapes;
    `rewind` goes back to the position at which it was made or loaded: a cache is written over beyond it; a recurrent
    state just goes on. Raises ConfigError (see RepeatableStep; and without a GPU).
    """

    def __init__(self, model: LanguageModel, state: ModelState, limit: int) -> None:
        if model.device.type != "cuda":
            raise ConfigError("a decode step is recorded as a CUDA graph, which needs a GPU")
        self.start, self.length, self.limit = state.length, state.length, limit
        self._step = RepeatableStep(model, state, limit)
        self._graph = torch.cuda.CUDAGraph()
        before = state.clone()
        warm = torch.cuda.Stream(model.device)
        warm.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(warm):
            for _ in range(WARM_UP):
                self._step.place.at.fill_(self.start)  # a cache may have no room for more than one
                self._step()
        torch.cuda.current_stream(model.device).wait_stream(warm)
        with torch.cuda.graph(self._graph):
            self._step()
        self.load(before)

    def step(self, token: Tensor) -> Tensor:
        """Read one token (B,): the logits after it (B, V), in memory that the next step writes over. Raises ConfigError
        beyond the limit."""
        if self.length >= self.limit:
            raise ConfigError(f"the recorded step was made for {self.limit} tokens: raise the limit")
        self.length += 1
        self._step.token.copy_(token)
        self._graph.replay()
        return self._step.logits

    def load(self, state: ModelState) -> None:
        self.start = self.length = state.length
        self._step.load(state)

    def rewind(self) -> None:
        self.length = self.start
        self._step.place.at.fill_(self.start)


def not_recordable(model: LanguageModel) -> str | None:
    """Why the model's decode step cannot be repeated without the host; None if it can."""
    for block in model.blocks:
        if block.mixer.backend.name == "numba":
            return "the compiled steps of a CPU run on the host"
        reason = None if block.feedforward is None else block.feedforward.needs_host(model.dtype, model.device)
        if reason is not None:
            return reason
    return None
