"""The command line: each command checks its options and makes one library call."""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from itertools import islice
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, NoReturn

import click

from virnuc_dask import __version__
from virnuc_dask.cli.analysis import COMMANDS, chunk_counter
from virnuc_dask.cli.interrupts import SAID, cleaning_up
from virnuc_dask.cli.options import (
    EMBED,
    WHERE,
    GroupedCommand,
    display_options,
    grouped,
    identity_options,
    setting,
    settings_of,
    tls_options,
    work_options,
)
from virnuc_dask.errors import RandomWeightsWarning, UsageError, VirnucError
from virnuc_dask.settings import RunConfig, Settings
from virnuc_dask.streams import lost_output
from virnuc_dask.text import counted, printable

if TYPE_CHECKING:
    from virnuc_dask.runtime.events import RunSummary
    from virnuc_dask.store.status import StoreStatus

_DASK = ("dask", "distributed")
_LISTED = 10
_SPEAKERS = ("plan", "status", "nearest", "annotate")


# What other programs, or we ourselves elsewhere, call what a command does.
_MEANT = {
    "neighbours": "nearest",
    "neighbors": "nearest",
    "search": "nearest",
    "label": "annotate",
    "embed": "run",
    "info": "status",
    "check": "verify",
    "classify": "predict",
    "score": "predict",
    "kmeans": "cluster",
    "pca": "map",
    "umap": "map",
    "plot": "map",
}


class _Group(click.Group):
    """Turns the package's errors into a message and an exit code."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        is_known = ctx.resilient_parsing or self.get_command(ctx, name) is not None
        if not is_known and (meant := _meant(name, self.list_commands(ctx))):
            ctx.fail(f"No such command {name!r}. Did you mean {meant}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            # All that these do is to say something.
            if ctx.invoked_subcommand in _SPEAKERS and lost_output():
                ctx.exit(VirnucError.exit_code)
            return result
        except VirnucError as error:
            print(f"error: {error}", file=sys.stderr)
            ctx.exit(error.exit_code)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            ctx.exit(VirnucError.exit_code)
        except KeyboardInterrupt:
            print(SAID, file=sys.stderr)
            ctx.exit(130)
        except Exception as error:
            if (problem := _about_dask_configuration(error)) is None:
                raise
            print(f"error: {problem}", file=sys.stderr)
            ctx.exit(UsageError.exit_code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Embed protein sequences with ESM-2 into a Zarr store, and lose nothing.

    Exit codes: 0 complete; 2 usage or input error; 3 complete, with quarantined rows; 4 incomplete
    or damaged, the same command resumes; 130 and 143 interrupted, the same command resumes.
    """
    # Or Python's end would take most of a second to look through all that torch has loaded.
    atexit.register(gc.freeze)


@main.command(cls=GroupedCommand)
@click.argument("inputs", nargs=-1, required=True)
@click.argument("store")
@identity_options
@work_options
@display_options
def run(inputs: tuple[str, ...], store: str, **options: Any) -> None:
    """Embed INPUTS (FASTA or FASTQ, plain or compressed; - is stdin) into STORE.

    The same command again goes on where the first was stopped.
    """
    shown, config = _display(store, options), _run_config(options)
    settings = _settings(options)
    from virnuc_dask.runtime.run import run as start

    _show_run(
        shown,
        lambda listener: start(inputs, store, config=config, listener=listener, **settings),
    )


@main.command(cls=GroupedCommand)
@click.argument("store")
@grouped(EMBED, "--model", help="Where the weights are now, if they were moved.")
@work_options
@display_options
def resume(store: str, **options: Any) -> None:
    """Compute what STORE lacks. Needs no input: the store holds sequences and settings."""
    from virnuc_dask.runtime.run import resume as start

    shown, config = _display(store, options), _run_config(options)
    _show_run(shown, lambda listener: start(store, config=config, listener=listener, **options))


@main.command(cls=GroupedCommand)
@click.argument("inputs", nargs=-1, required=True)
@identity_options
@setting(RunConfig, "device", help="Device that will compute, such as cuda. auto: cpu.")
@grouped(
    WHERE,
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="For the estimate.  [default: one a core, or one for another device]",
)
@click.option("--json", "as_json", is_flag=True)
def plan(
    inputs: tuple[str, ...], device: str, workers: int | None, as_json: bool, **options: Any
) -> None:
    """Say what embedding INPUTS would take: records, rows, residues, chunks, bytes, time."""
    settings = Settings(**_settings(options))
    from virnuc_dask.runtime.plan import plan as make

    made = make(inputs, settings, device=device, workers=workers)
    if as_json:
        print(json.dumps(made.to_json()))
        return
    from virnuc_dask.runtime.display import input_notes

    for note in input_notes(made.input):
        print(note, file=sys.stderr)
    for name, value in made.lines():
        print(f"{name:<16} {value}")
    for name in made.without_row[:_LISTED]:
        print(f"  without frame: {printable(name)}")
    if len(made.without_row) > _LISTED:
        print(f"  all {len(made.without_row):,}: --json")


@main.command()
@click.argument("store")
@click.option("--rows", is_flag=True, help="Also count rows by state, and name quarantined ones.")
@click.option("--json", "as_json", is_flag=True)
def status(store: str, rows: bool, as_json: bool) -> None:
    """Show how far STORE is, from chunk presence alone; also while a run is going.

    Exit codes: 0 complete; 4 incomplete; with --rows also 3, complete with quarantined rows.
    """
    from virnuc_dask.store import status
    from virnuc_dask.store.location import location_of

    found = status.status(store)
    document = found.to_json() | {"run_seen": location_of(store).is_in_use}
    code = 0 if found.present.all() else VirnucError.exit_code
    if rows:
        document["states"] = status.row_states(store)
        document["quarantined"] = [
            {"row": row, "id": name, "reason": reason}
            for row, name, reason in status.quarantined(store)
        ]
        code = code or (3 if document["quarantined"] else 0)
    if as_json:
        print(json.dumps(document | {"exit_code": code}))
    else:
        _show_status(found, document)
    if not lost_output():  # else that is what the exit code tells of
        sys.exit(code)


def _show_status(found: StoreStatus, document: dict[str, Any]) -> None:
    from virnuc_dask.runtime.display import chunk_map, table_lines
    from virnuc_dask.runtime.events import state_table

    done = int(found.present.sum())
    print(chunk_map(found.present, sys.stdout.encoding))
    print(
        f"{done:,} of {found.chunks:,} chunks, {found.rows_done:,} of {found.records:,} rows"
        f" ({found.rows_done / found.records:.1%})"
    )
    print(f"model: {printable(found.model.described(found.device), 1000)}")
    for line in table_lines(state_table(document.get("states", {}))):
        print(line)
    for row in document.get("quarantined", ()):
        print(f"row {row['row']}\t{printable(row['id'])}\t{row['reason']}")
    if done < found.chunks:
        how = (
            "a run is filling it; should that end early" if document["run_seen"] else "finish with"
        )
        print(f"{how}: virnuc-dask resume {found.path}")


@main.command()
@click.argument("store")
@click.option("--repair", is_flag=True, help="Remove what is damaged, so that resume redoes it.")
@click.option(
    "--sample", type=click.IntRange(1), help="Also embed so many random rows again, in float32."
)
@click.option("--seed", type=int, help="Of the sample.  [default: another each time]")
@click.option("--model", help="For the sample: where the weights are now, if they were moved.")
@click.option(
    "--cluster",
    help="Whose workers read: local, an address, a scheduler.json.  [default: threads here]",
)
@tls_options
@click.option("--json", "as_json", is_flag=True)
def verify(
    store: str,
    repair: bool,
    sample: int | None,
    seed: int | None,
    model: str | None,
    cluster: str | None,
    as_json: bool,
    **tls: Any,
) -> NoReturn:
    """Read and decode everything in STORE: chunks, checksums, states, sequences."""
    from virnuc_dask.store.verify import verify as check

    if sample:
        from virnuc_dask.encoder.upstream import fair_esm

        fair_esm()  # or it would be missed only after everything is read
    with ExitStack() as stack:
        client = None
        if cluster:
            from virnuc_dask.runtime.clusters import connect, fork_workers

            fork_workers()
            stack.enter_context(cleaning_up())
            client = stack.enter_context(connect(cluster, config=RunConfig(**tls)))
        progress = None if as_json else chunk_counter("checked", "chunks")
        report = check(store, repair=repair, progress=progress, client=client)
    drift, code = None, report.exit_code
    if sample and not (report.bad or report.sequences):
        from virnuc_dask.runtime.drift import sample_drift

        drift = sample_drift(store, sample, seed=seed, model=model)
        code = code if drift.good else 4
    if as_json:
        document = report.to_json() | {"drift": drift and drift.to_json(), "exit_code": code}
        print(json.dumps(document))
        sys.exit(code)
    for chunk, problem in report.bad.items():
        print(f"chunk {chunk}: {problem}")
    for name, problem in report.results.items():
        print(f"{name}: {problem}")
    if report.sequences:
        print(f"{report.sequences}; run again from the input, into another store")
    for file in report.leftovers:
        print(f"not part of the store: {file}")
    if report.results:
        print(
            f"{len(report.results):,} parts of results were removed; the commands that made them"
            " compute them again"
            if repair
            else "verify --repair removes damaged results; the commands that made them compute them"
            " again"
        )
    print(
        f"{report.checked - len(report.bad):,} chunks good, {len(report.bad):,} damaged,"
        f" {report.missing:,} not computed yet"
    )
    if report.bad:
        removed = "damaged chunks were removed; " if repair else "verify --repair, then "
        print(f"{removed}virnuc-dask resume {store} computes them again")
    if drift:
        print(
            f"{drift.rows:,} rows computed again in float32: stored in {drift.precision}, lowest"
            f" cosine {drift.cosine:.6f} (row {drift.worst_row}, {printable(drift.worst_id)}),"
            f" largest difference {drift.largest:.2g}"
        )
        if not drift.good:
            print("that is not what these sequences give; run again, into another store")
    elif sample:
        print("no rows were computed again: what is damaged comes first")
    sys.exit(code)


for _command in COMMANDS:
    main.add_command(_command)


# --- shared --------------------------------------------------------------------------------------


def _meant(name: str, commands: list[str]) -> str | None:
    """The command that somebody means by another name; None if there is no telling."""
    from difflib import get_close_matches

    if name.lower() in _MEANT:
        return _MEANT[name.lower()]
    return next(iter(get_close_matches(name.lower(), commands)), None)


def _about_dask_configuration(error: BaseException) -> str | None:
    """Say what is wrong with Dask's configuration, if that has kept Dask from being imported.

    Dask reads what a site, a user and variables say of it when it is imported, and it is a
    traceback if that makes no sense.
    """
    # A dask that is not there, or lacks something, is another matter.
    if isinstance(error, ImportError) or not any(
        frame.f_code.co_name == "<module>" and frame.f_globals["__name__"].split(".")[0] in _DASK
        for frame, _ in walk_tb(error.__traceback__)
    ):
        return None
    where = ""
    if config := sys.modules.get("dask.config"):  # else it is a file's syntax, and that is named
        files = [str(file) for file, _ in config.collect_yaml(config.paths, return_paths=True)]
        variables = [name for name in os.environ if name.startswith("DASK_")]
        where = f" ({', '.join(files + variables)})"
    problem = " ".join(f"{type(error).__name__}: {error}".split())
    return f"Dask does not take its configuration{where}: {problem}"


def _display(store: str, options: dict[str, Any]) -> tuple[str, Path | None]:
    """How a run is shown, and the file that it is recorded in."""
    from virnuc_dask.files import expanded

    as_json, plain, quiet = (options.pop(name) for name in ("as_json", "no_progress", "quiet"))
    kind = "json" if as_json else "quiet" if quiet else "plain" if plain else "auto"
    given, none = options.pop("telemetry"), options.pop("no_telemetry")
    # A store in an object store has nothing beside it.
    file = given or (None if "://" in store else f"{store.rstrip('/')}.telemetry.jsonl")
    return kind, None if none or file is None else Path(expanded(file))


def _run_config(options: dict[str, Any]) -> RunConfig:
    return RunConfig(**{field.name: options.pop(field.name) for field in fields(RunConfig)})


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """Options as fields of `Settings`. There is no model that is right for everyone."""
    settings = settings_of(options)
    if not settings["model"]:
        from virnuc_dask.runtime.plan import model_choices

        raise UsageError(model_choices())
    return settings


def _show_run(shown: tuple[str, Path | None], work: Callable[[Any], RunSummary]) -> NoReturn:
    import logging

    from virnuc_dask.runtime.clusters import fork_workers
    from virnuc_dask.runtime.display import display, recorded

    kind, telemetry = shown
    warnings.simplefilter("ignore", RandomWeightsWarning)  # the first line says it
    # What the user should know of a lost worker or scheduler comes as an event or an error; these
    # would add a traceback of whatever message was on its way. The second has a level of its own.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    fork_workers()
    with cleaning_up(), display(kind) as listener, recorded(listener, telemetry) as listener:
        summary = work(listener)
    if kind != "json":
        _show_summary(summary)
    sys.exit(summary.exit_code)


def _show_summary(summary: RunSummary) -> None:
    from virnuc_dask.runtime.display import table_lines
    from virnuc_dask.store.status import quarantined

    for line in table_lines(summary.table()):
        print(line)
    if summary.quarantined:
        for row, name, reason in islice(quarantined(summary.store), _LISTED):
            print(f"  row {row}  {printable(name)}  {reason}")
        if summary.quarantined > _LISTED:
            print(f"  all {summary.quarantined:,}: virnuc-dask status --rows {summary.store}")
    if summary.stopped:
        print(f"stopped: {summary.stopped}")
    if summary.missing:
        for line in _missing_lines(summary.missing):
            print(f"  {line}")
        print(f"go on with: virnuc-dask resume {summary.store}")
    elif summary.elsewhere:
        print(f"this shard is done; {summary.elsewhere:,} chunks of others are not yet")
    else:
        print(f'open with: virnuc_dask.open_store("{summary.store}")')


def _missing_lines(missing: dict[int, str]) -> Iterator[str]:
    """Chunks that failed, the first of them by name, and how many were merely not computed."""
    from virnuc_dask.runtime.events import NOT_COMPUTED

    failed = {chunk: error for chunk, error in missing.items() if error != NOT_COMPUTED}
    for chunk, error in islice(failed.items(), _LISTED):
        yield f"chunk {chunk} is missing: {error}"
    if len(failed) > _LISTED:
        yield f"{counted(len(failed) - _LISTED, 'more chunk')} failed"
    if rest := len(missing) - len(failed):
        yield f"{counted(rest, 'chunk')} not computed yet"
