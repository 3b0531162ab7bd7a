"""The command line: parse, call one function, print. Results go to stdout, progress and messages to stderr.

Imports that cost time (torch, pandas, the experiments) stand inside the commands, so that `lab --help` is quick.
"""

import errno
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

OK, FAILED, USAGE, LACKING, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 5, 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
UsageError: Any = typer.BadParameter.__base__  # of click, or of the copy of it that newer versions of typer hold


class OneLineUsage(TyperGroup):
    """What the parser refuses, in its words, but on one line like every other mistake."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return self._in_one_line(super().make_context, *args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        return self._in_one_line(super().invoke, *args, **kwargs)

    @staticmethod
    def _in_one_line(parse: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return parse(*args, **kwargs)
        except UsageError as error:
            if type(error).show is not UsageError.show:  # no argument at all: it shows the help
                raise
            help_at = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            fail(error.format_message().rstrip(".") + help_at, USAGE)


app = typer.Typer(
    name="lab",
    cls=OneLineUsage,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"lab {version('sequence-lab')}")
        raise typer.Exit(OK)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """The comparison lab for sequence models: transformers and state-space models, measured alike."""


def named(text: str | Path) -> Path:
    if not str(text):  # which Path would read as the current folder, and a script writes for an unset variable
        raise typer.BadParameter("the name is missing")
    return Path(text)


Out = Annotated[Path, typer.Option("--out", help="The folder of run directories.", parser=named, metavar="PATH")]
RunName = Annotated[
    str | None,
    typer.Argument(help="A run directory or the name of one in --out; 'latest', or nothing, for the latest."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON on stdout.")]


def printable_output() -> None:
    """Reports hold signs that the encoding of a Windows console or of a pipe there may lack: what is not shown to a
    person is written in UTF-8, and elsewhere a sign that is lacking is replaced, rather than all lost."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            told = stream.isatty() or "PYTHONIOENCODING" in os.environ
            stream.reconfigure(encoding=None if told else "utf-8", errors="replace")


def one_line_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """A person's or a machine's mistake becomes one line on stderr and its exit code, never a traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        from experiments.threads import quiet_thread_pools

        quiet_thread_pools()
        printable_output()
        from experiments.errors import CorpusError, EnvironmentLacksError, LabError, SpecError
        from models.errors import BackendUnavailableError, ConfigError

        try:
            return command(*args, **kwargs)
        except (SpecError, CorpusError, ConfigError) as error:
            fail(error, USAGE)
        except (EnvironmentLacksError, BackendUnavailableError) as error:
            fail(error, LACKING)
        except LabError as error:
            fail(error, FAILED)
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)
        except BrokenPipeError:
            sys.stderr.close()  # the reader of stdout went away: nothing left to say
            raise typer.Exit(OK) from None
        except OSError as error:
            if error.errno not in NO_ROOM or error.filename is not None:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it would fail once more
            fail(f"cannot write the output: {error.strerror}", LACKING)

    return wrapped


def fail(error: object, code: int) -> NoReturn:
    """Say why on one line of stderr, and leave with the code."""
    typer.echo(f"lab: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


@app.command()
@one_line_errors
def run(
    experiment: Annotated[str, typer.Argument(help="A built-in experiment (see below) or a TOML file.")],
    profile: Annotated[str | None, typer.Option(help="smoke, cpu or cuda; by default the one for the device.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. training.steps=100. Repeatable."),
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="Only these arms, separated by commas; the first is the baseline.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Use this many seeds.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Out = Path("runs"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved specification and the cells; run nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run an experiment: train, evaluate, measure, report.

    Built in: compare (transformer or Mamba?), learning-rate (which rate, by validation?), memory (loading against
    inference), speed (from which length on is which faster?), masking (what is a causal mask for?), lineage (what did
    each step of history buy?), sparse (what does a sliding window lose?), moe (what do experts buy?), vocabulary (how
    large?).
    The same specification continues an unfinished run in --out. Exit codes: 0 complete, 1 failed, 2 bad usage,
    3 the machine lacks something, 5 some cells failed, 130 interrupted (repeat the command to go on).
    """
    from cli.progress import Progress
    from experiments import capacity, runner
    from experiments.spec import load
    from experiments.studies import STUDIES

    spec = load(
        experiment, profile=profile, assignments=set_ or (), seeds=seeds, device=runner.resolve_device(device),
        arms=names(arms),
    )  # fmt: skip
    if dry_run:
        runner.check(spec)
        capacity.check(spec)
        cells = [cell.name for cell in STUDIES[spec.study].plan(spec)]
        if as_json:
            print_json({"spec": spec.resolved(), "cells": cells})
        else:
            typer.echo(spec.to_toml() + f"\n# {len(cells)} cells: " + ", ".join(cells))
        return
    finish(lambda listener: runner.run(spec, out, command=_command(), listener=listener), Progress(), as_json)


@app.command()
@one_line_errors
def resume(name: RunName = None, out: Out = Path("runs"), as_json: AsJson = False) -> None:
    """Finish an interrupted run; cells that failed are tried again, and models that lost a file are made again."""
    from cli.progress import Progress
    from experiments import runner, store

    directory = store.find(name, out)
    spec = directory.experiment()

    def start(listener: Any) -> Any:
        return runner.run(spec, directory.path.parent, command=_command(), listener=listener, into=directory)

    finish(start, Progress(), as_json)


def finish(start: Callable[[Any], Any], progress: Any, as_json: bool) -> None:
    """Run, then print the result and leave with the code that says how it went. start: given a listener, runs."""
    from experiments import report, store
    from experiments.runner import InterruptedRunError

    try:
        with progress:
            directory = start(progress)
    except InterruptedRunError as error:
        missing = ", ".join(error.missing[:4]) + (", ..." if len(error.missing) > 4 else "")
        fail(f"interrupted; kept in {error.run.path}; missing: {missing}; the same command goes on", INTERRUPTED)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on", INTERRUPTED)
    result = store.read_json(directory.path / "result.json")
    if as_json:
        print_json(result)
    else:
        typer.echo(report.render(directory.path, "table"), nl=False)
        typer.echo(f"\n{directory.path}/report.html", err=True)
    if result["failures"]:
        count, first = len(result["failures"]), result["failures"][0]
        cells = f"{count} cell{'s' if count > 1 else ''}"
        fail(f"{cells} failed, first {first['cell']}: {first['message']}", SOME_FAILED)


@app.command()
@one_line_errors
def report(
    name: RunName = None,
    format: Annotated[str, typer.Option(help="table, md, html, csv or json.")] = "table",
    open_: Annotated[bool, typer.Option("--open", help="Open report.html in a browser.")] = False,
    out: Out = Path("runs"),
) -> None:
    """Read a result, the latest by default."""
    from experiments import store
    from experiments.errors import SpecError
    from experiments.report import FORMATS, render
    from models.errors import nearest

    if format not in FORMATS:
        raise SpecError(f"unknown format '{format}': {nearest(format, FORMATS)}")
    directory = store.find(name, out)
    typer.echo(render(directory.path, format), nl=False)  # type: ignore[arg-type]
    if open_:
        typer.launch(str(directory.path / "report.html"))


@app.command()
@one_line_errors
def runs(out: Out = Path("runs"), as_json: AsJson = False) -> None:
    """List runs, oldest first."""
    from experiments import store

    listed = [store.summary(directory) for directory in store.runs(out)]
    for one in listed:
        if one["problem"] is not None:
            typer.echo(f"note: {one['run']} is damaged: {' '.join(one['problem'].split())}", err=True)
    if as_json:
        print_json(listed)
        return
    if not listed:
        typer.echo(f"no runs in '{out}'; make one with: lab run compare", err=True)
        return
    width = max(len(one["run"]) for one in listed)
    typer.echo(f"{'run':<{width}}  {'status':<10}  profile  arms")
    for one in listed:
        arms = ", ".join(one["arms"]) or "-"
        typer.echo(f"{one['run']:<{width}}  {one['status']:<10}  {one['profile'] or '-':<7}  {arms}")


@app.command()
@one_line_errors
def models(as_json: AsJson = False) -> None:
    """List the presets: parameters, mixers, feed-forward, bytes of decode state."""
    from experiments.numbers import size
    from models import anatomy, cost
    from models.presets import PRESETS

    listed = []
    for name, config in PRESETS.items():
        count = cost.parameters(config)
        state = {
            str(T): None if config.positions and config.positions < T else cost.state_bytes(config, 1, T, 2)
            for T in (1024, 16384)
        }
        listed.append({
            "model": name, "mixer": anatomy.mixers(config), "feedforward": anatomy.feedforwards(config),
            "layers": config.layers, "width": config.width, "parameters": count.total,
            "non_embedding": count.non_embedding, "active": count.active, "state_bytes_16bit": state,
        })  # fmt: skip
    if as_json:
        print_json(listed)
        return
    typer.echo(f"{'model':<18}{'mixer':<26}{'feed-forward':<14}{'width':>6}{'parameters':>15}{'active':>15}"
               f"{'state at 1k':>13}{'at 16k':>12}   (16-bit state, MB = 10^6)")  # fmt: skip
    for one in listed:
        short, long = ("-" if held is None else size(held) for held in one["state_bytes_16bit"].values())
        typer.echo(f"{one['model']:<18}{one['mixer']:<26}{one['feedforward']:<14}{one['width']:>6}"
                   f"{one['parameters']:>15,}{one['active']:>15,}{short:>13}{long:>12}")  # fmt: skip


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@app.command()
@one_line_errors
def inspect(
    model: Annotated[str, typer.Argument(help="A preset (see lab models) or a model folder.")],
    dtype: Annotated[str, typer.Option(help="Of the weights and the state: bf16, fp16 or fp32.")] = "bf16",
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens, for the bytes of the state and the FLOPs; 4096, or fewer where it has fewer positions."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences, for the bytes of the state.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Take a model's shape apart: module tree, parameters and bytes per part, state bytes, FLOPs. Allocates nothing."""
    import torch

    from experiments.errors import SpecError
    from models import anatomy
    from models.errors import nearest
    from models.folders import configuration

    if dtype not in DTYPES:
        raise SpecError(f"unknown dtype '{dtype}': {nearest(dtype, DTYPES)}")
    kind = getattr(torch, DTYPES[dtype])
    config = configuration(model)
    context = context or min(4096, config.positions or 4096)
    if context > (config.positions or context):
        raise SpecError(f"'{model}' has {config.positions} positions: --context {context} is beyond them")
    parts, totals = anatomy.anatomy(config, kind), anatomy.summary(config, kind, context, batch)
    if as_json:
        print_json({"model": model, "dtype": dtype, **totals, "parts": [asdict(part) for part in parts]})
        return
    typer.echo(f"{'part':<46}{'shape':>16}{'parameters':>16}{'bytes':>12}")
    for part in parts:
        name = f"{'  ' * part.depth}{part.name.rpartition('.')[2] if part.depth else part.name}"
        copies = f" x{part.copies}" if part.copies > 1 and part.depth == 0 else ""
        module = f" ({part.module}{copies})" if part.module else ""
        shape = " x ".join(map(str, part.shape))
        typer.echo(f"{name + module:<46}{shape:>16}{part.parameters:>16,}{in_bytes(part.bytes):>12}")
    if any(part.copies > 1 for part in parts):
        typer.echo("\nOf blocks that are alike (x) a shape is of one, a number of all.")
    active = totals["active_parameters"]
    typer.echo(f"\nparameters         {totals['parameters']:,}" + (
        f" ({active:,} active per token)" if active != totals["parameters"] else ""))  # fmt: skip
    typer.echo(f"without embeddings {totals['non_embedding_parameters']:,}")
    typer.echo(f"weights in {dtype:<7} {in_bytes(totals['weight_bytes'])}")
    if totals["state_bytes"] is not None:
        typer.echo(f"state at {context} tokens, batch {batch}, {dtype}: {in_bytes(totals['state_bytes'])} "
                   f"({totals['state_formula']})")  # fmt: skip
    typer.echo(f"FLOPs per token at {context} tokens: {totals['forward_flops_per_token']:.4g} forward, "
               f"{totals['training_flops_per_token']:.4g} in training")  # fmt: skip


def in_bytes(count: float) -> str:
    """Decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # what rounds to a thousand is one of the next unit
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


@app.command()
@one_line_errors
def trace(
    model: Annotated[
        str,
        typer.Argument(
            help="A preset (see lab models), untrained; a folder with a model and its tokenizer.json; or a run "
            "directory or the name of one in --out, 'latest' for the latest."
        ),
    ],
    prompt: Annotated[str, typer.Argument(help="The text that the model reads.")],
    against: Annotated[str | None, typer.Option(help="A second model, as MODEL, on the same prompt.")] = None,
    arms: Annotated[str | None, typer.Option(help="Of a run: only these arms, separated by commas.")] = None,
    trained_seed: Annotated[
        int | None, typer.Option(help="Of a run: which trained seed; the first by default.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of a preset: change one setting, e.g. layers=2. Repeatable."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Of the weights of a preset; 0 by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    html: Annotated[
        Path | None,
        typer.Option(help="Also write one self-contained page with pictures here.", parser=named, metavar="PATH"),
    ] = None,
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Take a model apart on a prompt: every stage, its shape and size, what it predicts, attends to and remembers."""
    from experiments import report, runner
    from experiments.tracing import subjects, take_apart

    chosen = subjects(
        model, out, against=against, arms=names(arms), trained_seed=trained_seed, settings=set_ or (), seed=seed
    )  # fmt: skip
    traced = take_apart(chosen, prompt, runner.resolve_device(device))
    if html is not None:
        report.write_text(html, report.render_trace(prompt, traced, "html"))
    if as_json:
        print_json({"prompt": prompt, "models": [one.to_dict() for one in traced]})
    else:
        typer.echo(report.render_trace(prompt, traced, "table"), nl=False)
    if html is not None:
        typer.echo(f"\n{html}", err=True)


@app.command()
@one_line_errors
def generate(
    name: Annotated[
        str,
        typer.Argument(
            help="A run directory or the name of one in --out, 'latest' for the latest; or a folder with a model's "
            "config.json, model.safetensors and tokenizer.json, Hugging Face's or a checkpoint of ours."
        ),
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    arms: Annotated[
        str | None, typer.Option(help="Only these arms, separated by commas; every arm by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Of the sampling; 0 by default.")] = None,
    trained_seed: Annotated[int | None, typer.Option(help="Which trained seed; the first by default.")] = None,
    tokens: Annotated[int, typer.Option(min=1, max=1 << 20, help="How many tokens to add.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the highest score; above 0 tokens are drawn, the higher the wilder.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the fewest that reach this probability.")] = None,
    show_probabilities: Annotated[
        bool, typer.Option("--show-probabilities", help="Of every token, and what else was likely.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with the trained arms of a run, one after the other, or with the model in a folder.

    The text appears as it is made; at the end come the speeds, of prefill the fastest of up to ten readings of the
    prompt and of decode those of this text alone, and the bytes of each state.
    """
    from experiments import inference, runner
    from experiments.errors import SpecError
    from models.generation import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if sampling.greedy and seed is not None:
        raise SpecError("--seed changes nothing at temperature 0, which draws no token: set a temperature above 0")
    on = runner.resolve_device(device)
    chosen = inference.writers(
        inference.source(name, out), prompt, tokens, trained_seed=trained_seed, arms=names(arms)
    )  # fmt: skip
    made, interrupted = [], False
    try:
        for writer in chosen:
            heard = typed(f"[{writer.arm}] ") if not as_json else lambda piece: None
            made.append(inference.write(
                writer, tokens, sampling, seed=seed or 0, device=on, heard=heard,
                choices=show_probabilities))  # fmt: skip
            if not as_json:
                typer.echo()
                print_choices(made[-1].choices, inference.described(sampling))
    except inference.InterruptedWritingError as error:
        made.append(error.made)
        interrupted = True
        if not as_json:
            typer.echo()
    except KeyboardInterrupt:
        interrupted = True
    if made and not as_json:
        print_speeds(made)
    if interrupted:
        fail("interrupted", INTERRUPTED)
    if as_json:
        print_json([{"sampling": inference.described(sampling), **one.to_dict()} for one in made])


def print_speeds(made: list[Any]) -> None:
    """A line for each arm that wrote: tokens, speeds, bytes of its state."""
    from experiments.numbers import number

    lines = [("arm", "prompt", "prefill", "new", "decode", "state")]
    for one in made:
        prefill, decode = (
            "-" if speed is None else f"{number(speed)} tokens/s"
            for speed in (one.prefill_tokens_per_s, one.decode_tokens_per_s)
        )
        new, state = f"{len(one.token_ids):,}", f"{one.state_bytes:,} bytes"
        lines.append((one.arm, f"{one.prompt_tokens:,}", prefill, new, decode, state))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for arm, *cells in lines:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        typer.echo("  ".join([arm.ljust(widths[0]), *right]), err=True)


def names(listed: str | None) -> list[str]:
    """Of "a, b" the names; of None, no option given, none."""
    return [] if listed is None else [name.strip() for name in listed.split(",")]


def typed(start: str) -> Callable[[str], None]:
    """Prints pieces of text as they come, `start` before the first of them."""
    from experiments.printable import clean

    def heard(piece: str) -> None:
        nonlocal start
        typer.echo(start + clean(piece), nl=False)
        start = ""

    return heard


def print_choices(choices: Any, rule: str) -> None:
    """A line for each token: itself, its probability, and what else was likely. Nothing where none were asked for."""
    if choices is None:
        return
    typer.echo(f"\n{rule}\n{'token':<18}{'probability':>12}   likeliest others")
    for choice in choices:
        others = "  ".join(f"{one.text} {one.probability:.3f}" for one in choice.others)
        typer.echo(f"{choice.chosen.text:<18}{choice.chosen.probability:>12.3f}   {others}".rstrip())
    typer.echo()


@app.command()
@one_line_errors
def export(
    name: Annotated[str, typer.Argument(help="A run directory or the name of one in --out; 'latest' for the latest.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write; new, or empty.", parser=named)],
    to: Annotated[str, typer.Option(help="The form: hf, a folder that Hugging Face's transformers loads.")] = "hf",
    arm: Annotated[str | None, typer.Option(help="Which arm; may be left out where there is one.")] = None,
    trained_seed: Annotated[int | None, typer.Option(help="Which trained seed; the first by default.")] = None,
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Write a trained model and its tokenizer in a form that others load."""
    from experiments import store
    from experiments.export import export

    directory = store.find(name, out)
    written = export(directory, to, folder, arm=arm, trained_seed=trained_seed)
    if as_json:
        print_json(written.to_dict())
        return
    typer.echo(f"{written.arm} of {written.run} as {written.architecture}:")
    for file, size in written.files.items():
        typer.echo(f"{size:>14,} bytes  {written.folder}/{file}")


@app.command()
@one_line_errors
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has: CPU, GPU, versions, which form of each heavy operation would run, and whether it
    agrees with the reference here."""
    from experiments.doctor import examine

    findings = examine()
    if as_json:
        print_json(findings)
        return
    for name, value in findings["environment"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {version}" for key, version in value.items())
        typer.echo(f"{name:<18} {'-' if value is None else value}")
    typer.echo()
    for form in findings["forms"]:
        typer.echo(f"{form['form']:<10} on {form['device']:<5} {form['problem'] or 'runs, agrees with the reference'}")
    typer.echo("case by case: lab kernels check")


kernels = typer.Typer(help="The CUDA kernels: build and install them, check their numbers.", no_args_is_help=True)
app.add_typer(kernels, name="kernels")


@kernels.command("install")
@one_line_errors
def kernels_install(
    arch: Annotated[
        str | None,
        typer.Option(help="Compute capabilities to build for, such as 9.0 or 8.0,9.0; this GPU's by default."),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="A folder of source archives or wheels, to use without a network.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Compilations at a time; by default what cores and memory allow.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and what stands in the way.")
    ] = False,
) -> None:
    """Build mamba-ssm and causal-conv1d for this GPU alone, install them, and check them.

    Says first what stands in the way and what it will do. Wheels are kept in the cache for later environments; torch is
    left as it is.
    """
    from experiments.data.dataset import default_cache
    from experiments.kernels import build, recipe

    plan = recipe.plan(default_cache(), architectures=arch, source=source, jobs=jobs)
    problems = recipe.problems(plan)
    for problem in problems:
        typer.echo(f"lab: {problem}", err=True)
    for sentence in plan.sentences():
        typer.echo(sentence)
    if problems:
        raise typer.Exit(LACKING)
    if dry_run:
        return
    try:
        checked = build.install(plan, default_cache(), lambda line: typer.echo(line, err=True), check_table())
    except KeyboardInterrupt:
        fail("interrupted; finished wheels are kept, the same command goes on", INTERRUPTED)
    if checked is None:
        typer.echo("installed, not checked: no GPU is visible here; on the GPU run: lab kernels check")
    else:
        finish_check(checked)


@kernels.command("check")
@one_line_errors
def kernels_check(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto", as_json: AsJson = False
) -> None:
    """Run every form of the kernels, forward and backward, and compare with the float64 reference.

    On a GPU over float32 and bfloat16, and a pass is kept for the runs that follow; exit code 1 where a case fails,
    3 where mamba-ssm's kernels are not there.
    """
    from experiments.data.dataset import default_cache
    from experiments.kernels.check import absent, check, of_this_gpu
    from experiments.runner import resolve_device

    show = (lambda row: None) if as_json else check_table()
    if resolve_device(device) == "cuda":
        checked = of_this_gpu(default_cache(), again=True, on_row=show)
    else:
        rows = [outcome.to_dict() for outcome in check("cpu", on_outcome=lambda outcome: show(outcome.to_dict()))]
        checked = {"problem": None, "absent": absent("cpu"), "rows": rows}
    if as_json:
        print_json(checked)
    finish_check(checked, as_json)


def check_table() -> Callable[[dict[str, Any]], None]:
    """Prints a line of the table of the check, the first with the heading."""

    def line(operation: str, form: str, dtype: str, shape: str, *said: str) -> None:
        outputs, gradients, allowed, came_out = said
        typer.echo(
            f"{operation:<23} {form:<10}{dtype:<9} {shape:<36}{outputs:>8}{gradients:>11}{allowed:>9}  {came_out}"
        )

    begun = False

    def show(row: dict[str, Any]) -> None:
        nonlocal begun
        if not begun:
            line("operation", "form", "type", "shape", "outputs", "gradients", "allowed", "result")
        begun = True
        errors = (
            "-" if not row[kind] else f"{max((math.inf if e is None else e) for e in row[kind].values()):.1e}"
            for kind in ("outputs", "gradients")
        )
        named = (row[name] for name in ("operation", "form", "dtype", "shape"))
        line(*named, *errors, f"{row['tolerance']:.1e}", row["problem"] or "ok")

    return show


def finish_check(checked: dict[str, Any], as_json: bool = False) -> None:
    """Say how the check came out, and leave with the code for it."""
    from experiments.kernels.verdict import by_form

    if checked["problem"]:
        fail(f"the kernels could not be checked: {checked['problem']}", FAILED)
    if not as_json:
        typer.echo("errors: largest of the outputs, of the gradients, and what is allowed, over the largest entry")
        for form, said in by_form(checked["rows"]).items():
            typer.echo(f"{form}: {said}")
        for form, reason in checked["absent"].items():
            typer.echo(f"{form}: not here, {reason}")
    wrong = sum(row["problem"] is not None for row in checked["rows"])
    if wrong:
        fail(f"{wrong} of {len(checked['rows'])} cases failed: numbers of these forms are not to be trusted", FAILED)
    missing = {name: reason for name, reason in checked["absent"].items() if name.startswith("cuda")}
    if missing and any(row["device"] == "cuda" for row in checked["rows"]):
        fail(f"not checked: {'; '.join(f'{name}: {reason}' for name, reason in missing.items())}", LACKING)


def _command() -> str:
    return shlex.join(["lab", *sys.argv[1:]])


if __name__ == "__main__":
    app()
