"""A trained model of a run in a form that others read."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.data.tokenizer import end_of_text_id
from experiments.errors import EnvironmentLacksError, SpecError
from experiments.inference import check_trains, read_tokenizer, trained
from experiments.store import RunDirectory
from models import checkpoint, hf
from models.errors import nearest

FORMATS = ("hf",)


@dataclass(frozen=True)
class Exported:
    run: str
    arm: str
    architecture: str
    folder: str
    files: dict[str, int]  # bytes of each

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(
    directory: RunDirectory, form: str, folder: Path, *, arm: str | None = None, trained_seed: int | None = None
) -> Exported:
    """Write the model of an arm, with its tokenizer, to `folder`. form: hf, which `transformers` loads. arm: may be
    left out where the run has one. Raises SpecError; ConfigError where the model has no counterpart, before anything
    is written."""
    if form not in FORMATS:
        raise SpecError(f"unknown format '{form}': {nearest(form, FORMATS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SpecError(f"'{folder}' exists and is not an empty folder; name a new one")
    check_trains(directory)
    experiment = directory.experiment()
    if arm is None:
        arm, *others = experiment.cells()
        if others:
            raise SpecError(f"{directory.path.name} has several arms, choose one: {', '.join((arm, *others))}")
    model = checkpoint.load(trained(directory, [arm], trained_seed)[arm])
    if experiment.cells()[arm].objective == "masked":
        raise SpecError(f"arm '{arm}' fills in hidden tokens; the format holds models that predict the next one")
    own = directory.tokenizer_file(arm)
    end = end_of_text_id(read_tokenizer(own))
    settings = {
        "max_position_embeddings": directory.seen_by(arm).training.context,
        "bos_token_id": end,
        "eos_token_id": end,
    }
    try:
        architecture = hf.export(model, folder, own, settings=settings)
    except OSError as error:
        raise EnvironmentLacksError(f"cannot write '{folder}': {error.strerror or error}") from None
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return Exported(directory.path.name, arm, architecture, str(folder), files)
