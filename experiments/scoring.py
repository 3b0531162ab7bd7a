"""What trained models make of given text: what others wrote, under a judge; tokens that are hidden one at a time.

B: batch   C: tokens of a continuation   P: tokens of a prompt   T: time   V: vocabulary
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from experiments.cells import PROMPT, Send, prepare_process, spread
from experiments.data.batches import require_length
from experiments.data.dataset import Dataset
from experiments.errors import CorpusError, RunFailedError
from experiments.spec import Experiment
from models import folders
from models.generation import Sampling, generate, generate_by_forward
from models.language_model import LanguageModel

GREEDY, SAMPLED, TRUE = "greedy", "sampled", "true"  # how a continuation came about
AROUND = 24  # tokens of context shown on each side of a blank
GUESSES = 5


@torch.no_grad()
def continuation_losses(model: LanguageModel, prompt: Tensor, continuation: Tensor) -> Tensor:
    """Nats for each token of continuation (B, C) after prompt (B, P), P >= 1, and what stands before it: (B, C),
    float64 on the host."""
    text = torch.cat([prompt, continuation], 1)
    logits = model(text[:, :-1])[:, prompt.shape[1] - 1 :].float()
    return F.cross_entropy(logits.transpose(1, 2), continuation, reduction="none").double().cpu()


@torch.no_grad()
def hidden_one_by_one(model: LanguageModel, text: Tensor, mask: int, *, batch: int) -> Tensor:
    """Log-probabilities (T, V) of what stands at each place of text (T,), that place alone hidden behind `mask`: what
    pseudo-log-likelihood sums over (arXiv 1910.14659). One pass over the whole text for every token of it."""
    T = len(text)
    hidden = text.repeat(T, 1).fill_diagonal_(mask)
    found = []
    for places in torch.arange(T, device=text.device).split(batch):
        logits = model(hidden[places])[torch.arange(len(places), device=text.device), places]
        found.append(logits.float().log_softmax(1))
    return torch.cat(found)


@torch.no_grad()
def from_the_left(model: LanguageModel, text: Tensor) -> Tensor:
    """Log-probabilities (T - 1, V) of what stands at the second and every later place of text (T,), under a causal
    model that has read what is before it."""
    return model(text[None, :-1])[0].float().log_softmax(1)


def judge_cell(
    send: Send, experiment: Experiment, judge: str, seed: int, dataset_folder: Path, folder: Path
) -> dict[str, Any]:
    """What the trained decoder in `folder` writes after prompts from validation text, greedily and sampled, scored by
    arm `judge`'s model of the same seed; of the judge itself also the text that really follows.

    bytes: of the written text in UTF-8, as decoded (a broken character counts as the sign that stands for it).
    Raises CorpusError, RunFailedError."""
    device, settings = prepare_process(experiment), experiment.evaluation
    dataset = Dataset.load(dataset_folder)
    tokens, length = dataset.splits["validation"].tokens, PROMPT + settings.sample_tokens
    if len(tokens) < length:
        raise CorpusError(
            f"the validation split has {len(tokens)} tokens; a prompt of {PROMPT} and evaluation.sample_tokens = "
            f"{settings.sample_tokens} need {length}"
        )
    text = spread(tokens, experiment.masking.prompts, length).to(device)
    prompt, truth = text[:, :PROMPT], text[:, PROMPT:]
    model, judging = _trained(folder, device), _trained(folder.parent.parent / judge / folder.name, device)
    write = generate if model.config.causal else generate_by_forward
    ways = {GREEDY: 0.0} | ({SAMPLED: settings.temperature} if settings.temperature else {})
    written = {
        way: torch.stack(list(write(model, prompt, settings.sample_tokens, Sampling(temperature=heat), seed=seed)), 1)
        for way, heat in ways.items()
    }
    if folder.parent.name == judge:
        written[TRUE] = truth
    prompts = dataset.tokenizer.decode_batch(prompt.tolist())
    scored = {way: _scored(judging, prompt, ids, prompts, dataset.tokenizer) for way, ids in written.items()}
    return {"judge": judge, "temperature": settings.temperature, "written": scored}


def _trained(folder: Path, device: torch.device) -> LanguageModel:
    if not (folder / "checkpoint").is_dir():
        raise RunFailedError(f"needs the trained model of {folder.parent.name}/{folder.name}, which there is not")
    return folders.load(folder / "checkpoint", device)


def _scored(
    judging: LanguageModel, prompt: Tensor, ids: Tensor, prompts: list[str], tokenizer: Tokenizer
) -> dict[str, Any]:
    losses, texts = continuation_losses(judging, prompt, ids), tokenizer.decode_batch(ids.tolist())
    size = sum(len(text.encode()) for text in texts)
    return {
        "nats_per_token": losses.mean().item(), "tokens": losses.numel(), "bytes": size,
        "bits_per_byte": losses.sum().item() / math.log(2) / size if size else None,
        "texts": [
            {"prompt": before, "text": after, "nats_per_token": loss}
            for before, after, loss in zip(prompts, texts, losses.mean(1).tolist(), strict=True)
        ],
    }  # fmt: skip


def blanks_cell(
    send: Send, experiment: Experiment, objective: str, dataset_folder: Path, folder: Path
) -> dict[str, Any]:
    """What the trained model in `folder` makes of tokens of validation text that are hidden one at a time. A masked
    model reads both sides of each, a causal one what is before it: it has nothing to guess the first of a window from.

    pseudo_log_likelihood: nats, summed over all `tokens`; of a masked model alone. guessed: of `asked` tokens, all but
    the first of each window. examples: the token in the middle of each window, with the likeliest guesses.
    Raises CorpusError."""
    device, context = prepare_process(experiment), experiment.training.context
    dataset = Dataset.load(dataset_folder)
    tokens, masked = dataset.splits["validation"].tokens, objective == "masked"
    require_length("validation split", tokens, context)
    model = _trained(folder, device)
    total, guessed, asked, examples = 0.0, 0, 0, []
    for text in spread(tokens, experiment.masking.windows, context).to(device):
        if masked:
            scores = hidden_one_by_one(model, text, dataset.vocabulary, batch=experiment.evaluation.batch)
            total += scores.gather(1, text[:, None]).double().sum().item()
            scores = scores[1:]
        else:
            scores = from_the_left(model, text)
        guessed += int((scores.argmax(1) == text[1:]).sum())
        asked += len(scores)
        examples.append(_example(dataset, text.tolist(), scores[context // 2 - 1], context // 2))
    found = {"guessed": guessed, "asked": asked, "examples": examples}
    if masked:
        found |= {"pseudo_log_likelihood": total, "tokens": asked + experiment.masking.windows}
    return found


def _example(dataset: Dataset, ids: list[int], scores: Tensor, at: int) -> dict[str, Any]:
    decode, best = dataset.tokenizer.decode, scores.exp().topk(min(GUESSES, len(scores)))
    return {
        "left": decode(ids[max(0, at - AROUND) : at]), "token": decode([ids[at]]),
        "right": decode(ids[at + 1 : at + 1 + AROUND]),
        "guesses": [
            {"token": decode([i]) if i < dataset.vocabulary else "[MASK]", "probability": p}
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ],
    }  # fmt: skip
