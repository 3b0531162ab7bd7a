"""The parts of a measured speed: ceilings at exact rates, and a phase that does all that it is said to do."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.measurement import ceilings, operations, speed, timing
from experiments.measurement.ceilings import Ceilings, CeilingsMeter
from experiments.measurement.process import all_turns
from experiments.measurement.speed import Subject, measure_speed
from experiments.measurement.timing import Samples
from experiments.spec import Speed
from experiments.training import DTYPES, token_loss
from models.language_model import LanguageModel
from models.presets import preset

CPU = torch.device("cpu")
SETTINGS = Speed(repeats=6, seconds=0, decode_tokens=4)


class Meter:
    """Ceilings that take no time."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def measure(self) -> Ceilings:
        return Ceilings(1.0, 1.0)


def model(name: str = "transformer-tiny", **overrides: Any) -> LanguageModel:
    return LanguageModel(preset(name).with_overrides({"vocabulary": 64, **overrides}), seed=0)


def text(B: int, T: int) -> Tensor:
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ceilings_are_work_over_the_median_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "SIDE", {"cpu": 10})
    monkeypatch.setattr(ceilings, "COPIED", {"cpu": 4000})

    def timed(operation: Any, **how: Any) -> Samples:
        assert how == {"repeats": 3, "seconds": 0, "device": CPU, "warm_up": 0}
        operation()
        return Samples([1.0, 2.0, 6.0])

    monkeypatch.setattr(ceilings, "timed", timed)
    meter = CeilingsMeter(CPU, dtype)
    # 10^3 multiply-adds, two operations each, and 4000 bytes read and written, in 2 ms
    assert meter.measure() == Ceilings(flops_per_s=1e6, bytes_per_s=4e6)
    assert meter._a.dtype == meter._b.dtype == dtype
    assert torch.equal(meter._c, meter._a @ meter._b)
    assert torch.equal(meter._to, torch.ones(1000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_timed_in_the_type_of_what_they_stand_beside(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CeilingsMeter", Meter)
    subject = Subject(model(), SETTINGS, "eager", dtype)
    assert subject.model.dtype == subject.meter.dtype == DTYPES[dtype]


@pytest.mark.parametrize("precision", DTYPES)
def test_a_measured_step_is_a_training_step(precision: str) -> None:
    """Against one by hand, of a mixture of experts whose balance weighs so much that its gradients are clipped."""
    tokens, (ours, hand) = text(2, 9), (model("moe-tiny", **{"feedforward.balance": 10.0}) for _ in range(2))
    step, _ = operations.training_step(ours, tokens[:, :-1], tokens[:, 1:], precision)
    step()
    optimizer = torch.optim.AdamW(hand.parameter_groups(0.1), lr=1e-4, fused=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        loss, balance = token_loss(hand, tokens[:, :-1], tokens[:, 1:])
    (loss + balance).backward()
    assert torch.nn.utils.clip_grad_norm_(hand.parameters(), 1.0) > 1.1
    optimizer.step()
    for a, b in zip(ours.parameters(), hand.parameters(), strict=True):
        assert torch.equal(a, b)
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters() if p.grad is not None)


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformer-tiny", "mamba-tiny"])
def test_decoding_goes_on_from_the_token_and_the_state_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, prompt, read = model(name).eval(), text(2, 5), []
    with torch.no_grad():
        made.norm.weight *= 20
    step = LanguageModel.step

    def seen(self: LanguageModel, token: Tensor, state: Any) -> Any:
        read.append((state.length, token))
        return step(self, token, state)

    write, _ = operations.decode(made, prompt, 4)
    monkeypatch.setattr(LanguageModel, "step", seen)
    last = write()
    assert [length for length, _ in read] == [5, 6, 7, 8]
    whole = prompt
    for token in [*(token for _, token in read), last]:
        assert torch.equal(token, made(whole)[:, -1].argmax(1))
        whole = torch.cat([whole, token[:, None]], 1)


def test_a_repeatable_step_decodes_as_many_tokens_from_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a mode that no CPU is timed in; what it repeats on a GPU is this."""
    made, prompt, places = LanguageModel(model().config.with_backend("sdpa"), seed=0).eval(), text(2, 9), []
    step = made.step
    monkeypatch.setattr(made, "step", lambda token, state: places.append(int(state.place.at)) or step(token, state))
    write, _ = operations.decode(made, prompt, 5, "compiled")
    write()
    write()
    assert places == [9, 10, 11, 12, 13] * 2


def test_a_training_step_keeps_wide_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CeilingsMeter", Meter)
    subject = Subject(model(), SETTINGS, "eager", "bfloat16")
    speed._step(subject, text(2, 9))
    assert {parameter.dtype for parameter in subject.model.parameters()} == {torch.float32}


def test_ceilings_are_measured_in_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Meter):
        calls = 0

        def measure(self) -> Ceilings:
            Counting.calls += 1
            return Ceilings(Counting.calls, 1.0)

    monkeypatch.setattr(speed, "CeilingsMeter", Counting)
    found = all_turns(measure_speed(Subject(model(), SETTINGS, "eager", "float32"), "prefill", text(1, 8)))
    assert [one["flops_per_s"] for one in found["ceilings"]] == list(range(1, len(found["turns"]) + 1))


def test_a_timed_step_leaves_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CeilingsMeter", Meter)
    subject = Subject(model(), SETTINGS, "eager", "float32")
    before = torch.nn.utils.parameters_to_vector(subject.model.parameters()).detach().clone()
    step, tokens = speed._step(subject, text(2, 9))
    step()
    assert tokens == 2 * 8
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    assert not torch.equal(before, torch.nn.utils.parameters_to_vector(subject.model.parameters()))


@pytest.mark.parametrize("mode", ["eager", "compiled", "graph", "compiled-graph"])
def test_training_and_prefill_are_recorded_where_the_mode_says_so(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one pool, since each leaves nothing; a decode step records itself."""
    recorded: list[tuple[Any, torch.device, Any]] = []

    def record(operation: Any, device: torch.device, pool: Any) -> Any:
        recorded.append((operation, device, pool))
        return lambda: "replayed"

    monkeypatch.setattr(speed, "CeilingsMeter", Meter)
    monkeypatch.setattr(speed, "Recording", record)
    subject = Subject(model(), SETTINGS, mode, "float32")
    subject.pool = (7, 0)
    operations_ = [speed._step(subject, text(2, 9))[0], speed._prefill(subject, text(2, 9))[0]]
    if mode in ("eager", "compiled"):
        assert not recorded
    else:
        assert [one() for one in operations_] == ["replayed"] * 2
        assert [rest for _, *rest in recorded] == [[CPU, (7, 0)]] * 2


@pytest.mark.parametrize("name", ["transformer-tiny", "mamba2-tiny"])
def test_a_step_that_is_to_be_recorded_is_the_same_step(name: str) -> None:
    ours, plain = model(name), model(name)
    for made, to_record in ((ours, True), (plain, False)):
        step, optimizer = operations.training_step(made, text(2, 8), text(2, 8), "float32", to_record=to_record)
        assert optimizer.param_groups[0]["capturable"] == to_record
        for _ in range(3):
            step()
            optimizer.zero_grad()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours.norm.weight, model(name).norm.weight)


def test_the_first_call_is_timed_by_itself_and_in_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def operation() -> None:
        nonlocal now, calls
        now, calls = now + (3.0 if calls == 0 else 0.25), calls + 1

    monkeypatch.setattr(speed, "CeilingsMeter", Meter)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setitem(speed.OPERATIONS, "prefill", lambda subject, tokens: (operation, 7))
    found = all_turns(measure_speed(Subject(model(), SETTINGS, "eager", "float32"), "prefill", text(1, 8)))
    assert found["first_call_ms"] == 3000
    assert found["samples"]["ms"] == [250.0] * 6
    assert found["ceilings"] == [{"flops_per_s": 1.0, "bytes_per_s": 1.0}] * 6
    assert (found["tokens_per_sample"], found["turns"]) == (7, [1] * 6)


@pytest.mark.parametrize(("causal", "window"), [(True, 3), (True, None), (False, None)])
def test_attention_by_itself_is_masked_as_in_its_mixer(
    causal: bool, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "CeilingsMeter", Meter)
    made = model("sliding-tiny", **{"mixer.causal": causal, "mixer.window": window})
    operate, (q, k, v) = speed._operator(made, text(2, 10))
    y = operate(q, k, v)
    (_, H, T, P), K = q.shape, k.shape[1]
    assert T == 9
    for t in range(T):
        first = 0 if window is None else max(0, t - window + 1)
        keys = slice(first, t + 1 if causal else T)
        for h in range(H):
            scores = (k[:, h * K // H, keys] @ q[:, h, t, :, None])[..., 0] / math.sqrt(P)
            expected = (scores.softmax(1)[:, None] @ v[:, h * K // H, keys])[:, 0]
            torch.testing.assert_close(y[:, h, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["eager", "compiled", "graph", "compiled-graph"])
@pytest.mark.parametrize("phase", speed.OPERATIONS)
def test_what_a_phase_repeats_is_compiled_once(phase: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "CeilingsMeter", Meter)
    compiled: list[tuple[LanguageModel, str]] = []
    monkeypatch.setattr(speed, "compile_blocks", lambda model, method: compiled.append((model, method)))
    subject = Subject(model(), SETTINGS, mode, "float32")
    subject.prepare(phase)
    subject.prepare(phase)
    method = "step" if phase == "decode" else "forward"
    assert compiled == ([(subject.model, method)] if mode.startswith("compiled") else [])
