"""The specification is strict, resolves in layers, and survives being written down."""

import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.cells import model_config
from experiments.data import corpora
from experiments.errors import SpecError
from experiments.spec import PROFILES, Arm, Data, Evaluation, Experiment, catalog, load

# what a file can hold: TOML forbids lone surrogates
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ARMS = {"a": Arm(model="mamba-tiny", learning_rate=1e-3)}
VALIDATION = Evaluation(splits=("validation",))


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spec") / "spec.toml"


@given(
    title=TEXT,
    path=TEXT,
    override=TEXT,
    rate=st.floats(1e-30, 1e30),
    seeds=st.sets(st.integers(0, 2**32 - 1), min_size=1),
)
def test_round_trip(scratch: Path, title: str, path: str, override: str, rate: float, seeds: set[int]) -> None:
    arm = Arm(model="x", learning_rate=rate, overrides={"mixer": {"backend": override}, "a.b": [1, 2.5, True]})
    experiment = Experiment(
        name="x", title=title, seeds=tuple(sorted(seeds)), arms={"one": arm, "Two_2": arm}, data=Data(path=path)
    )
    scratch.write_text(experiment.to_toml(), encoding="utf-8", newline="")
    found = load(str(scratch))
    assert found.data.path == (os.path.abspath(path) if path.strip() and path[0] != "~" else path)
    kept = found.model_copy(update={"data": found.data.model_copy(update={"path": path})})
    assert kept == experiment
    scratch.write_text(found.to_toml(), encoding="utf-8", newline="")
    assert load(str(scratch)) == found


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", list(catalog()))
def test_catalog_resolves(scratch: Path, name: str, profile: str) -> None:
    experiment = load(name, profile=profile)
    assert experiment.profile == profile
    for arm in experiment.cells().values():
        masks = arm.objective == "masked"  # and needs an entry for [MASK]
        assert model_config(arm, experiment.data.vocabulary).vocabulary == experiment.data.vocabulary + masks
    scratch.write_text(experiment.to_toml(), encoding="utf-8")
    assert load(str(scratch)) == experiment


def test_resolved_text_names_every_field() -> None:
    written = tomllib.loads(load("compare", profile="smoke").to_toml())
    assert set(written) == set(Experiment.model_fields) - {"memory", "speed", "masking", "experts", "vocabulary"}
    for table in ("data", "training", "evaluation", "measurement"):
        assert set(written[table]) == set(Experiment.model_fields[table].annotation.model_fields)  # type: ignore[union-attr]


def test_layers() -> None:
    plain, smoke = load("compare"), load("compare", profile="smoke")
    assert plain.profile == "cpu"
    assert smoke.arms["mamba"].model == "mamba-tiny"
    assert smoke.arms["mamba"].learning_rate == plain.arms["mamba"].learning_rate  # not in the profile
    changed = load("compare", profile="smoke", assignments=["training.steps=7"])
    assert changed.training.steps == 7
    assert changed == smoke.model_copy(update={"training": smoke.training.model_copy(update={"steps": 7})})
    assert load("compare", device="cuda").profile == "cuda"
    assert load("compare", device="cuda").device == "cuda"


@pytest.mark.parametrize(
    ("assignment", "get", "expected"),
    [
        ("training.steps=77", lambda e: e.training.steps, 77),
        ("training.weight_decay = 1e-3", lambda e: e.training.weight_decay, 1e-3),
        ("training.precision=bfloat16", lambda e: e.training.precision, "bfloat16"),
        ('training.precision="bfloat16"', lambda e: e.training.precision, "bfloat16"),
        ("measurement.enabled=false", lambda e: e.measurement.enabled, False),
        ("measurement.contexts=[8, 16]", lambda e: e.measurement.contexts, (8, 16)),
        ("title=a = b", lambda e: e.title, "a = b"),
        ("seeds=[5]", lambda e: e.seeds, (5,)),
        ("data.path=/some/where", lambda e: e.data.path, "/some/where"),
        ("arms.mamba.learning_rate=0.5", lambda e: e.arms["mamba"].learning_rate, 0.5),
        ("arms.mamba.overrides.mixer.state=8", lambda e: e.arms["mamba"].overrides, {"mixer": {"state": 8}}),
        ("evaluation.splits=[]", lambda e: e.evaluation.splits, ()),
    ],
)
def test_assignments(assignment: str, get: Any, expected: Any) -> None:
    value = get(load("compare", profile="smoke", assignments=[assignment]))
    assert value == expected
    assert type(value) is type(expected)


def test_paths_are_those_of_this_folder_wherever_the_run_is_read(tmp_path: Path, monkeypatch) -> None:
    """A model that is a folder too; one that is a preset is none, though a folder have its name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "mamba-tiny"):
        Path(folder).mkdir()
    assignments = ["data.corpus=text", "data.path=texts/*.md", "data.tokenizer=../there", "arms.mamba.model=mine"]
    one = load("compare", profile="smoke", assignments=[*assignments, "arms.transformer.model=mamba-tiny"])
    assert (one.data.path, one.data.tokenizer) == (f"{tmp_path}/texts/*.md", str(tmp_path.parent / "there"))
    assert (one.arms["mamba"].model, one.arms["transformer"].model) == (str(tmp_path / "mine"), "mamba-tiny")
    home = load("compare", profile="smoke", assignments=["data.corpus=text", "data.path=~/notes.txt"])
    assert home.data.path == "~/notes.txt"


def test_a_mark_at_the_beginning_of_a_file_is_no_text(scratch: Path) -> None:
    one = load("compare", profile="smoke")
    scratch.write_text(one.to_toml(), encoding="utf-8-sig")
    assert load(str(scratch)) == one


def test_an_arm_that_is_not_in_the_run_is_named_by_arms() -> None:
    said = "arm 'mamba2' is not among those of this run, transformer, mamba: name it in --arms"
    with pytest.raises(SpecError, match=said):
        load("compare", assignments=["arms.mamba2.learning_rate=1"])
    chosen = load("compare", arms=["mamba2"], assignments=["arms.mamba2.learning_rate=1"])
    assert chosen.arms["mamba2"].learning_rate == 1


def test_the_title_is_of_the_arms() -> None:
    assert load("compare", arms=["mamba", "transformer"]).title == load("compare").title == "Transformer or Mamba?"
    assert load("compare", arms=["lstm", "mamba2", "moe"]).title == "lstm, mamba2 or moe?"
    assert load("compare", arms=["lstm"]).title == "lstm, by itself"
    assert load("compare", arms=["lstm"], assignments=['title="Mine"']).title == "Mine"
    assert load("lineage", arms=["lstm", "mamba"]).title == load("lineage").title
    assert load("learning-rate", arms=["lstm"]).title == load("learning-rate").title


def test_a_folder_whose_name_looks_like_a_pattern_is_none(tmp_path: Path, monkeypatch) -> None:
    here = tmp_path / "run [1]*"
    here.mkdir()
    monkeypatch.chdir(here)
    Path("a.txt").write_text("one\n\ntwo\n")
    for path in ("*.txt", "a.txt"):
        one = load("compare", profile="smoke", assignments=["data.corpus=text", f"data.path={path}"])
        monkeypatch.chdir(tmp_path)
        assert [document.text for document in corpora.read(one.data)] == ["one", "two"]
        monkeypatch.chdir(here)


def test_the_last_assignment_wins() -> None:
    assert load("compare", assignments=["training.steps=150", "training.steps=160"]).training.steps == 160


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("measurement.contexts=[]", "measurement.contexts"),
        ("measurement.contexts=[4, 2]", "ascending"),
        ("seeds=[1, 1]", "each may appear once"),
        ("seeds=[-1]", "must not be negative"),
        ("seeds=[0, 4294967296]", "a seed must be at most 4294967295"),  # on a CPU it would be the stream of 0 again
        ("learning_rates=[-1e-3]", "must not be negative"),
        ("learning_rates=[1e-3, 0.0]", "a rate of 0 learns nothing"),
        ('evaluation.splits=["test", "test"]', "each may appear once"),
        ("training.steps=2.5", "training.steps"),
        ("training.beta1=1", "training.beta1"),
        ("data.vocabulary=256", "data.vocabulary"),
        ("device=gpu", "device"),
        ("name=a/b", "name"),
        ("=3", "KEY=VALUE"),
        ("arms.mamba=3", "an arm is a table"),
        ("evaluation=3", "'evaluation' is a table"),
        ("arms.mamba.overrides=3", "arms.mamba.overrides"),
        ("arms.mamba.model.x=3", "arms.mamba.model"),
        ("title.x=3", "'title' is a value"),
        ("training.steps=nan", "training.steps"),
        ("arms.mamba.learning_rate=inf", "arms.mamba.learning_rate"),
        ("arms.mamba.learning_rate=nan", "arms.mamba.learning_rate"),
    ],
)
def test_strict(assignment: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        load("compare", profile="smoke", assignments=[assignment])
    assert said in str(caught.value)


def test_seeds_and_arms() -> None:
    experiment = load("compare", profile="smoke", seeds=4, arms=["mamba", "transformer"])
    assert experiment.seeds == (0, 1, 2, 3)
    assert list(experiment.arms) == ["mamba", "transformer"]
    assert list(load("compare", arms=["mamba"]).arms) == ["mamba"]


def test_a_sweep_trains_every_arm_at_every_rate() -> None:
    arms, rates = ARMS | {"b": ARMS["a"]}, (1e-3, 2e-3)
    sweep = Experiment(name="x", title="x", arms=arms, learning_rates=rates, evaluation=VALIDATION)
    trained = {name: arm.learning_rate for name, arm in sweep.cells().items()}
    assert trained == {"a-lr0.001": 1e-3, "a-lr0.002": 2e-3, "b-lr0.001": 1e-3, "b-lr0.002": 2e-3}


def test_rates_that_would_share_a_folder_are_refused_or_told_apart() -> None:
    try:
        rates = (0.1234567, 0.1234568)
        sweep = Experiment(name="x", title="x", arms=ARMS, learning_rates=rates, evaluation=VALIDATION)
    except ValueError:
        return
    assert len(sweep.cells()) == 2


def test_a_resolved_file_takes_no_profile(scratch: Path) -> None:
    scratch.write_text(load("compare", profile="smoke").to_toml(), encoding="utf-8")
    with pytest.raises(SpecError, match=rf"^{scratch} has no profiles; leave --profile away$"):
        load(str(scratch), profile="cpu")
