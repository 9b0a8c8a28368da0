"""The command line: each command checks its options and makes one library call."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, NoReturn

import click

from virnuc_dask import __version__
from virnuc_dask.cli.analysis import COMMANDS, chunk_counter
from virnuc_dask.cli.interrupts import SAID, cleaning_up
from virnuc_dask.cli.options import (
    CONFIG_OPTIONS,
    EMBED,
    WHERE,
    GroupedCommand,
    display_options,
    given_settings,
    grouped,
    identity_options,
    setting,
    tls_options,
    work_options,
)
from virnuc_dask.errors import RandomWeightsWarning, UsageError, VirnucError
from virnuc_dask.settings import AUTO, RunConfig, Settings
from virnuc_dask.standard_streams import lost_output
from virnuc_dask.text import counted, duration, printable

if TYPE_CHECKING:
    from virnuc_dask.runtime.summary import RunSummary
    from virnuc_dask.store.status import StoreStatus

_DASK = ("dask", "distributed")
_LISTED = 10
# The commands show progress and the summary themselves.
_AS_COMMAND: dict[str, Any] = {"progress": False, "allow_incomplete": True}
# Seconds between two looks of `status --watch`.
_WATCH_S = 2.0
_SPEAKERS = ("plan", "status", "nearest", "annotate", "doctor")


# Names that other programs use for our commands, and words for their tasks.
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
            # The only result of these commands is their output.
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
    """Embed protein sequences with ESM-2 into a Zarr store. A killed run loses no finished chunk.

    Exit codes: 0 complete; 2 usage or input error; 3 complete with quarantined rows; 4 incomplete
    or damaged; 129, 130 and 143 interrupted. After 4 or an interruption `resume` goes on, and so
    does the same `run`, unless it has --overwrite.
    """
    # Otherwise the final garbage collection of torch's objects takes most of a second.
    atexit.register(gc.freeze)


@main.command(cls=GroupedCommand)
@click.argument("inputs", nargs=-1, required=True)
@click.argument("store")
@identity_options
@grouped(EMBED, "--overwrite", is_flag=True, help="Begin afresh: replace a store that is at STORE.")
@work_options
@display_options
def run(inputs: tuple[str, ...], store: str, **options: Any) -> None:
    """Embed INPUTS (FASTA or FASTQ, plain or compressed; - is stdin) into STORE.

    The same command resumes an unfinished store, unless it has --overwrite.
    """
    shown, config = _display(store, options), _run_config(options)
    settings = _settings(options)
    from virnuc_dask.runtime.run import run as start

    _show_run(
        shown,
        _again(options["cluster"], config),
        lambda listener: start(
            inputs, store, config=config, listener=listener, **_AS_COMMAND, **options, **settings
        ),
    )


@main.command(cls=GroupedCommand)
@click.argument("store")
@grouped(EMBED, "--model", help="Current location of the weights, if they were moved.")
@work_options
@display_options
def resume(store: str, **options: Any) -> None:
    """Compute the missing chunks of STORE. The store holds the sequences and the settings."""
    from virnuc_dask.runtime.run import resume as start

    shown, config = _display(store, options), _run_config(options)
    _show_run(
        shown,
        _again(options["cluster"], config),
        lambda listener: start(store, config=config, listener=listener, **_AS_COMMAND, **options),
    )


@main.command(cls=GroupedCommand)
@click.argument("inputs", nargs=-1, required=True)
@identity_options
@setting(RunConfig, "device", help="Device of the workers, such as cuda. auto: cpu.")
@grouped(
    WHERE,
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Workers in the estimate.  [default: one per core on a CPU, one on another device]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the estimate as JSON.")
def plan(
    inputs: tuple[str, ...], device: str, workers: int | None, as_json: bool, **options: Any
) -> None:
    """Estimate the cost of embedding INPUTS: records, rows, residues, chunks, bytes, time."""
    settings = Settings.of(**_settings(options))
    from virnuc_dask.runtime.plan import plan as estimate

    cost = estimate(inputs, settings, device=device, workers=workers)
    if as_json:
        print(json.dumps(cost.to_json()))
        return
    from virnuc_dask.runtime.display import input_notes

    for note in input_notes(cost.input):
        print(note, file=sys.stderr)
    for name, value in cost.lines():
        print(f"{name:<16} {value}")
    for name in cost.without_row[:_LISTED]:
        print(f"  without frame: {printable(name)}")
    if len(cost.without_row) > _LISTED:
        print(f"  all {len(cost.without_row):,}: --json")


@main.command()
@click.argument("folder", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print each line as a JSON object.")
def doctor(folder: str | None, as_json: bool) -> None:
    """Look at what a run needs here: packages, processor, GPUs, folders, models.

    FOLDER is where stores are to be; default: the current one.

    Each line begins with ok; with -- for what is slower or not possible, and what to do about it;
    or with no for what every run needs. Exit codes: 0; 4 if there is such a line.
    """
    from virnuc_dask.runtime.doctor import examine

    is_well = True
    for finding in examine(folder):
        is_well &= finding.mark != "no"
        if as_json:
            print(json.dumps(finding.to_json()), flush=True)
            continue
        print(f"{finding.mark}  {finding.name:<17} {finding.found}", flush=True)
        if finding.advice:
            print(f"    {'':<17} {finding.advice}", flush=True)
    if not is_well:
        sys.exit(VirnucError.exit_code)


@main.command()
@click.argument("store")
@click.option("--rows", is_flag=True, help="Also count rows by state, and list quarantined rows.")
@click.option("--watch", is_flag=True, help="First show progress until all chunks are present.")
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
def status(store: str, rows: bool, watch: bool, as_json: bool) -> None:
    """Show how many chunks of STORE are present. This also works during a run.

    Exit codes: 0 complete; 4 incomplete; with --rows also 3, complete with quarantined rows.
    """
    from virnuc_dask.store import status
    from virnuc_dask.store.location import location_of

    progress = _watched(store) if watch else status.status(store)
    document = progress.to_json() | {"run_seen": location_of(store).is_in_use}
    code = progress.exit_code
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
        _show_status(progress, document)
    if not lost_output():  # otherwise the exit code reports the lost output
        sys.exit(code)


def _watched(store: str) -> StoreStatus:
    """Show the progress of a store on standard error until it is complete, and return it."""
    from virnuc_dask.store.status import status

    began, progress, shown = time.monotonic(), status(store), -1
    before = progress.rows_done
    while True:
        done = int(progress.present.sum())
        gained = progress.rows_done - before
        left = progress.records - progress.rows_done
        text = f"{done:,} of {progress.chunks:,} chunks, {progress.rows_done:,} rows"
        if gained > 0 and left:
            text += f", ETA {duration(left * (time.monotonic() - began) / gained)}"
        if sys.stderr.isatty():
            print(f"\r{text:<60}", end="" if left else "\n", file=sys.stderr, flush=True)
        elif done != shown:
            print(text, file=sys.stderr, flush=True)
        if not left:
            return progress
        shown = done
        time.sleep(_WATCH_S)
        progress = status(store)


def _show_status(progress: StoreStatus, document: dict[str, Any]) -> None:
    from virnuc_dask.runtime.display import chunk_map
    from virnuc_dask.runtime.summary import state_table, table_lines

    done = int(progress.present.sum())
    print(chunk_map(progress.present, sys.stdout.encoding))
    print(
        f"{done:,} of {progress.chunks:,} chunks, {progress.rows_done:,} of {progress.records:,}"
        f" rows ({progress.rows_done / progress.records:.1%})"
    )
    print(f"model: {printable(progress.model.described(progress.device), 1000)}")
    for line in table_lines(state_table(document.get("states", {}))):
        print(line)
    for row in document.get("quarantined", ()):
        print(f"row {row['row']}\t{printable(row['id'])}\t{row['reason']}")
    if done < progress.chunks:
        how = "a run is filling it; if it ends early" if document["run_seen"] else "finish with"
        print(f"{how}: virnuc-dask resume {progress.path}")


@main.command()
@click.argument("store")
@click.option(
    "--repair", is_flag=True, help="Remove damaged parts, so that resume computes them again."
)
@click.option(
    "--sample", type=click.IntRange(1), help="Also embed this many random rows again, in float32."
)
@click.option("--seed", type=int, help="Random seed of the sample.  [default: different each time]")
@click.option("--model", help="Current location of the weights for the sample, if they were moved.")
@click.option(
    "--cluster",
    help="Cluster that reads: local, an address, or a scheduler.json.  [default: threads of this"
    " process]",
)
@tls_options
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
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
    """Read and decode everything in STORE: chunks, checksums, states, sequences.

    Exit codes: 0 nothing is damaged, or --repair has removed it, and chunks may be missing (see
    status); 4 damaged.
    """
    from virnuc_dask.store.verify import verify as check

    if sample:
        from virnuc_dask.encoder.fair_esm import fair_esm

        fair_esm()  # fails now, not after everything is read
    with ExitStack() as stack:
        client = None
        if cluster:
            from virnuc_dask.runtime.dask_cluster import connect

            stack.enter_context(cleaning_up())
            waiting = partial(print, "waiting for workers:", file=sys.stderr)
            client = stack.enter_context(
                connect(cluster, config=RunConfig(**tls), waiting=waiting, encodes=False)
            )
        progress = None if as_json else chunk_counter("checked", "chunks")
        report = check(store, repair=repair, progress=progress, client=client)
    drift, code = None, report.exit_code
    if sample and not (report.bad or report.sequences):
        from virnuc_dask.runtime.recomputed import compare_recomputed

        drift = compare_recomputed(store, sample, seed=seed, model=model)
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
        print(f"{report.sequences}; run again from the input into another store")
    for file in report.leftovers:
        print(f"not part of the store: {file}")
    if report.results:
        print(
            f"{len(report.results):,} damaged parts of results were removed; repeat the commands"
            " that made them"
            if repair
            else "verify --repair removes damaged results; then repeat the commands that made them"
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
            print("these embeddings do not belong to the sequences; run again into another store")
    elif sample:
        print("no rows were computed again, because the store is damaged")
    sys.exit(code)


for _command in COMMANDS:
    main.add_command(_command)


# --- shared --------------------------------------------------------------------------------------


def _meant(name: str, commands: list[str]) -> str | None:
    """Find the command that the user means by another name; None if it is unclear."""
    from difflib import get_close_matches

    if name.lower() in _MEANT:
        return _MEANT[name.lower()]
    return next(iter(get_close_matches(name.lower(), commands)), None)


def _about_dask_configuration(error: BaseException) -> str | None:
    """Describe an invalid Dask configuration, if it is why Dask could not be imported.

    Dask reads the configuration of the site, the user and the environment when it is imported, and
    raises a traceback if the configuration is invalid.
    """
    # A Dask that is missing or incomplete is another problem.
    if isinstance(error, ImportError) or not any(
        frame.f_code.co_name == "<module>" and frame.f_globals["__name__"].split(".")[0] in _DASK
        for frame, _ in walk_tb(error.__traceback__)
    ):
        return None
    where = ""
    if config := sys.modules.get(
        "dask.config"
    ):  # absent after a syntax error, which names its file
        files = [str(file) for file, _ in config.collect_yaml(config.paths, return_paths=True)]
        variables = [name for name in os.environ if name.startswith("DASK_")]
        where = f" ({', '.join(files + variables)})"
    problem = " ".join(f"{type(error).__name__}: {error}".split())
    return f"Dask rejects its configuration{where}: {problem}"


def _display(store: str, options: dict[str, Any]) -> tuple[str, Path | None]:
    """Return the kind of display, and the telemetry file."""
    from virnuc_dask.files import expanded

    as_json, plain, quiet = (options.pop(name) for name in ("as_json", "no_progress", "quiet"))
    kind = "json" if as_json else "quiet" if quiet else "plain" if plain else "auto"
    given, none = options.pop("telemetry"), options.pop("no_telemetry")
    # No file can lie beside a store in an object store.
    file = given or (None if "://" in store else f"{store.rstrip('/')}.telemetry.jsonl")
    return kind, None if none or file is None else Path(expanded(file))


def _run_config(options: dict[str, Any]) -> RunConfig:
    return RunConfig(**{name: options.pop(name) for name in CONFIG_OPTIONS})


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Settings.of`. No default model is right for everyone."""
    settings = {"model": None} | given_settings(options)
    Settings.of(**settings)
    if not settings["model"]:
        from virnuc_dask.runtime.plan import model_choices

        raise UsageError(model_choices())
    return settings


def _again(cluster: str, config: RunConfig) -> str:
    """Options of a `resume` that does the rest of a run, where the run did it."""
    given = {
        "--cluster": cluster if cluster != "local" else None,
        "--device": config.device if config.device != AUTO else None,
        # An array job's share is known only to its task; without it all is computed.
        "--shard": config.shard if config.shard != "slurm" else None,
        "--tls-ca-file": config.tls_ca_file,
        "--tls-cert": config.tls_cert,
        "--tls-key": config.tls_key,
    }
    return "".join(f" {name} {shlex.quote(value)}" for name, value in given.items() if value)


def _show_run(
    shown: tuple[str, Path | None], again: str, work: Callable[[Any], RunSummary]
) -> NoReturn:
    import logging

    from virnuc_dask.runtime.display import display
    from virnuc_dask.runtime.telemetry import recorded

    kind, telemetry = shown
    warnings.simplefilter("ignore", RandomWeightsWarning)  # the first line of output says it
    # Events and errors report a lost worker or scheduler. These loggers would add a traceback about
    # the message that was lost. The second logger has its own level.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with cleaning_up(), display(kind) as listener, recorded(listener, telemetry) as listener:
        summary = work(listener)
    if kind != "json":
        _show_summary(summary, again)
    sys.exit(summary.exit_code)


def _show_summary(summary: RunSummary, again: str) -> None:
    from virnuc_dask.runtime.summary import table_lines
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
        print(f"resume with: virnuc-dask resume {shlex.quote(summary.store)}{again}")
    elif summary.elsewhere:
        print(f"this shard is done; other shards still lack {counted(summary.elsewhere, 'chunk')}")
    else:
        print(f'open with: virnuc_dask.open_store("{summary.store}")')
        print(f"look at it: virnuc-dask report {summary.store} report.html")


def _missing_lines(missing: dict[int, str]) -> Iterator[str]:
    """List the first chunks that failed, and count the others and the chunks not computed."""
    from virnuc_dask.runtime.summary import NOT_COMPUTED

    failed = {chunk: error for chunk, error in missing.items() if error != NOT_COMPUTED}
    for chunk, error in islice(failed.items(), _LISTED):
        yield f"chunk {chunk} is missing: {error}"
    if len(failed) > _LISTED:
        yield f"{counted(len(failed) - _LISTED, 'more chunk')} failed"
    if rest := len(missing) - len(failed):
        yield f"{counted(rest, 'chunk')} not computed yet"
