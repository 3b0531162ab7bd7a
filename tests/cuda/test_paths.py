"""What the studies measure with, run on a GPU: the cells of memory and of speed, and the execution modes."""

from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from on_gpu import (
    DTYPES,
    GPU,
    ROWS,
    TINY,
    TOKENS,
    allowed,
    config,
    error,
    on_gpu,
    on_the_cpu,
    on_the_gpu,
    one_configuration,  # noqa: F401 (a fixture)
    text,
)

from experiments.measurement import operations
from experiments.measurement.loading import WAYS, load
from experiments.measurement.phases import measure_decode, measure_load, measure_prefill, measure_step
from experiments.measurement.process import all_turns
from experiments.measurement.speed import Subject, measure_speed
from experiments.spec import Measurement, Speed
from experiments.training import token_loss
from models import checkpoint, cost, replay
from models.compiled import compile_blocks
from models.language_model import LanguageModel
from models.ops.attention import forget_tables
from models.ops.kernels import without_data
from models.presets import preset
from models.recorded import WARM_UP, RecordedDecode, Recording, RepeatableStep

pytestmark = on_gpu
ONCE = Measurement(repeats=1, seconds=0, decode_tokens=4)
SPEED = Speed(repeats=6, seconds=0, decode_tokens=8)
BLOCK = 512  # bytes: torch's allocator on a GPU rounds up to it
WORKSPACE = 8 << 20  # bytes: torch keeps at least as many for each stream that multiplies matrices


def written(name: str, folder: Path, dtype: str) -> LanguageModel:
    """The model whose checkpoint `folder` then is."""
    model = LanguageModel(config(name), seed=0, dtype=DTYPES[dtype])
    model.load_state_dict(on_the_cpu(name).state_dict())
    checkpoint.save(model, folder)
    return model


@pytest.mark.parametrize("name", TINY)
def test_memory_of_the_phases(name: str, tmp_path: Path) -> None:
    """In bfloat16, as in the study's profile for a GPU."""
    model = written(name, tmp_path, "bfloat16")
    tensors = list(model.parameters())
    weights = sum(p.nbytes for p in tensors)
    rounded = sum(-(-p.nbytes // BLOCK) * BLOCK for p in tensors)
    for way in WAYS:
        loaded = measure_load(tmp_path, ONCE, GPU, way)
        assert loaded["resident_bytes_analytic"] == weights
        assert weights <= loaded["resident_bytes"] <= max(rounded, 1.05 * weights), way
        assert loaded["device_peak_bytes"] >= loaded["resident_bytes"], way
        assert loaded["host_peak_bytes"] >= 0  # so small a model may fit between what the process has already
    read = all_turns(measure_prefill(tmp_path, ONCE, TOKENS, text(), GPU))
    assert read["working_bytes"] > 0
    assert read["peak_bytes"] > weights
    decoded = all_turns(measure_decode(tmp_path, ONCE, TOKENS, text(), GPU))
    expected = cost.state_bytes(model.config, ROWS, TOKENS + ONCE.decode_tokens, 2)
    assert decoded["state_bytes"] == decoded["state_bytes_analytic"] == expected
    assert decoded["peak_bytes"] - decoded["working_bytes"] >= weights + expected  # what stands before the first step
    assert {read["memory_method"], decoded["memory_method"]} == {"torch.cuda allocator"}
    again = ONCE.model_copy(update={"decode_mode": "graph"})
    recorded = all_turns(measure_decode(tmp_path, again, TOKENS, text(), GPU))
    assert recorded["working_bytes"] is None
    assert recorded["peak_bytes"] < decoded["peak_bytes"] + WORKSPACE  # of the stream that records


@pytest.mark.parametrize("name", TINY)
def test_memory_of_a_training_step(name: str, tmp_path: Path) -> None:
    model = written(name, tmp_path, "bfloat16")
    forget_tables()  # a cell has a process of its own, in which nobody has made them before
    step = measure_step(tmp_path, text(ROWS, TOKENS + 1), GPU, "bfloat16")
    weights = 4 * cost.parameters(model.config).total
    assert step["weight_bytes"] == step["gradient_bytes"] == weights
    assert 2 * weights <= step["optimizer_bytes"] <= 2 * weights + 8 * len(list(model.parameters()))  # and its steps
    # activations go as gradients come, so that not all four need be there at once
    assert step["activation_bytes"] > 0
    assert step["weight_bytes"] + step["optimizer_bytes"] + step["activation_bytes"] <= step["peak_bytes"]
    assert step["weight_bytes"] + step["optimizer_bytes"] + step["gradient_bytes"] <= step["peak_bytes"]


@pytest.mark.parametrize("name", ["transformer-30m", "sliding-30m", "mamba-30m", "mamba2-30m", "mamba3-30m"])
def test_memory_is_what_shapes_say(name: str, tmp_path: Path) -> None:
    """At a size where blocks of the allocator count for little; `lab run memory` has the whole of it."""
    model = LanguageModel(preset(name).with_overrides({"vocabulary": 4096}), seed=0, device=GPU, dtype=torch.bfloat16)
    checkpoint.save(model, tmp_path)
    tokens = torch.randint(0, 4096, (2, 1025), generator=torch.Generator().manual_seed(0))
    read = all_turns(measure_prefill(tmp_path, ONCE, 1024, tokens[:, :-1].contiguous(), GPU))
    kept = cost.weight_bytes(model.config, 2) + cost.rotary_bytes(model.config, 1024)
    predicted = replay.prefill(model.config, 2, 1024, torch.bfloat16, "cuda")
    assert read["peak_bytes"] == pytest.approx(kept + predicted, rel=0.05)
    step = measure_step(tmp_path, tokens, GPU, "bfloat16")
    trained = replay.training(model.config, 2, 1024, "cuda", "bfloat16")
    assert step["activation_bytes"] == pytest.approx(trained.activations, rel=0.01)
    kept = 3 * cost.weight_bytes(model.config, 4) + cost.rotary_bytes(model.config, 1024)
    assert step["peak_bytes"] == pytest.approx(kept + trained.peak, rel=0.05)


def test_the_scan_without_data_makes_what_the_kernels_make() -> None:
    import selective_scan_cuda  # pyright: ignore[reportMissingImports]

    u, delta, z = (torch.randn(2, 16, 2050, device=GPU, dtype=torch.bfloat16) for _ in range(3))
    A, D = -torch.rand(16, 8, device=GPU), torch.ones(16, device=GPU)
    B, C = (torch.randn(2, 1, 8, 2050, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    made = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, D, True)
    shapes = without_data.scan(u, delta, A, B, C, D, z, D, True)
    out, states, _ = made
    inputs = (u, delta, A, B, C, D, z, D, out, states, out, None, True, False)
    made += selective_scan_cuda.bwd(*inputs)
    shapes += without_data.scan_backward(*inputs)
    assert [(x.shape, x.dtype, x.stride()) for x in made] == [(x.shape, x.dtype, x.stride()) for x in shapes]


@pytest.mark.parametrize("name", ["transformer-tiny", "mamba-tiny", "mamba2-whole"])
def test_speed_of_the_phases(name: str, tmp_path: Path) -> None:
    written(name, tmp_path, "bfloat16")
    cells = {}
    whole = ("decode", "prefill", "step")  # training last: it makes the weights float32
    for mode, phases in {"eager": ("forward", "backward", *whole), "graph": whole}.items():
        subject = Subject(load(tmp_path, GPU, "direct"), SPEED, mode, "bfloat16")
        for phase in phases:
            cells[mode, phase] = all_turns(measure_speed(subject, phase, text(ROWS, TOKENS + 1)))
    for (_, phase), cell in cells.items():
        tokens = ROWS * (SPEED.decode_tokens if phase == "decode" else TOKENS)
        assert cell["tokens_per_sample"] == tokens
        assert len(cell["samples"]["ms"]) == sum(cell["turns"])
        assert len(cell["turns"]) == len(cell["ceilings"]) == SPEED.repeats
        assert min(cell["samples"]["ms"]) > 0
        assert cell["first_call_ms"] > 0
        for ceiling in cell["ceilings"]:  # of the smallest card that runs the kernels, by far
            assert ceiling["flops_per_s"] > 1e12
            assert ceiling["bytes_per_s"] > 1e11
    for phase in whole:
        eager, recorded = (median(cells[mode, phase]["samples"]["ms"]) for mode in ("eager", "graph"))
        assert recorded < eager, phase


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", TINY)
def test_a_recorded_training_step_trains_the_same(name: str, precision: str) -> None:
    """As many steps of one batch either way: those before a recording count, the recording itself does not."""
    if (name, precision) == ("moe-tiny", "float32"):
        pytest.skip("experts in float32 need the host")
    tokens, weights = text(ROWS, TOKENS + 1).to(GPU), on_the_cpu(name)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    found = {}
    for to_record in (False, True):
        model = on_the_gpu(name, weights).train()
        update, optimizer = operations.training_step(model, inputs, targets, precision, to_record=to_record)

        def step(update: Any = update, optimizer: Any = optimizer) -> None:
            update()
            optimizer.zero_grad()

        take = Recording(step, GPU) if to_record else step
        for _ in range(3 if to_record else 3 + WARM_UP):
            take()
        found[to_record] = {key: p.detach() - weights.state_dict()[key].to(GPU) for key, p in model.named_parameters()}
    assert optimizer.state[next(model.parameters())]["step"] == 3 + WARM_UP
    # a step of AdamW is of the same size however small the gradient, whose rounding may turn its sign
    for key, moved in found[False].items():
        assert (found[True][key] - moved).abs().mean() <= 0.1 * moved.abs().mean(), key


@pytest.mark.parametrize("name", TINY)
def test_a_recorded_prefill_names_the_same_token(name: str, tmp_path: Path) -> None:
    written(name, tmp_path, "bfloat16")
    model, prompt = load(tmp_path, GPU, "direct"), text().to(GPU)
    read, named = operations.prefill(model, prompt), []
    repeat = Recording(lambda: named.append(read()), GPU)
    expected = read()
    for given in (prompt.clone(), prompt.roll(1, 0)):
        prompt.copy_(given)
        repeat()
        assert torch.equal(named[-1], read())
    assert expected.shape == (ROWS,)


@pytest.mark.parametrize("name", ["transformer-tiny", "mamba-tiny"])
def test_a_recorded_decode_writes_the_same_tokens(name: str, tmp_path: Path) -> None:
    """A cache is written over from the prompt on, as often as it is repeated; a recurrent state goes on."""
    written(name, tmp_path, "float32")
    model = load(tmp_path, GPU, "direct")
    prompt = text().to(GPU)
    ordinary, recorded = (operations.decode(model, prompt, 8, mode)[0] for mode in ("eager", "graph"))
    for _ in range(3):
        assert torch.equal(recorded(), ordinary())


@pytest.mark.parametrize("name", ["transformer-tiny", "mamba-tiny", "mamba2-tiny", "mamba2-whole", "mamba3-tiny"])
def test_compiled_numbers_are_the_eager_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a loss and its gradients, under autocast too, of prefill, and of steps that are repeated, also from a
    recording; of one sequence, whose products of a step are sums. In the configurations that the compiler begins with:
    to look for faster ones takes it a minute."""
    start = lambda tuner, time, first, first_time: first  # noqa: E731
    monkeypatch.setattr("torch._inductor.runtime.coordinate_descent_tuner.CoordescTuner.autotune", start)
    tokens, weights = text(1).to(GPU), on_the_cpu(name)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    found: dict[str, dict[str, Any]] = {}
    for mode in ("eager", "compiled", "compiled-graph"):
        model = on_the_gpu(name, weights).eval()
        if mode == "compiled":
            compile_blocks(model, "forward")
        with torch.inference_mode():
            logits, state = model.prefill(tokens[:, :32], model.make_state(1, TOKENS))
            if mode != "eager":
                compile_blocks(model, "step")
            made = RecordedDecode if mode == "compiled-graph" else RepeatableStep
            repeated = made(model, state, TOKENS)
            steps = [logits, *(repeated.step(token).clone() for token in tokens[:, 32:48].unbind(1))]
        found[mode] = {"float32 steps": torch.stack(steps)}
        for precision in DTYPES:
            model.train().zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                loss, _ = token_loss(model, inputs, targets)
            loss.backward()
            gradients = {f"{precision} {key}": p.grad for key, p in model.named_parameters() if p.grad is not None}
            found[mode] |= {f"{precision} loss": loss, **gradients}
    eager = found.pop("eager")
    limits = {key: allowed(model, key.split()[0]) for key in eager}
    for other in found.values():
        assert eager.keys() == other.keys()
        assert {key: e for key in eager if not (e := error(other[key], eager[key])) <= limits[key]} == {}
