"""Options of the command line that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from virnuc_dask.settings import (
    AUTO,
    FRAME_RULES,
    LONG_POLICIES,
    MOLECULES,
    POOLINGS,
    PRECISIONS,
    STORED_DTYPES,
    RunConfig,
    Tiling,
    Translation,
)


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_defaults = RunConfig()
_translation = Translation()


def _setting(name: str, kind: click.ParamType[Any], text: str) -> Callable[[Any], Any]:
    """An option for a number of `RunConfig`, with its default."""
    flag, default = f"--{name.replace('_', '-')}", getattr(_defaults, name)
    return click.option(flag, type=kind, default=default, show_default=True, help=text)


identity_options = _options(
    click.option(
        "--model",
        help="A fair-esm name such as esm2_t33_650M_UR50D, a .pt file, a Hugging Face directory, or"
        " demo (random weights, for trying the pipeline).  [required]",
    ),
    click.option("--pooling", type=click.Choice(POOLINGS), default="mean", show_default=True),
    click.option("--repr-layer", type=int, help="Layer to pool, from 1.  [default: the last]"),
    click.option(
        "--precision",
        type=click.Choice([AUTO, *PRECISIONS]),
        default=AUTO,
        show_default=True,
        help="Of the matrix products. auto: the store's; else float32 on a CPU, float16 on a GPU.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(STORED_DTYPES),
        default="float32",
        show_default=True,
        help="Of the stored embeddings.",
    ),
    click.option(
        "--max-residues",
        type=click.IntRange(1),
        default=1022,
        show_default=True,
        help="Residues of a sequence that are encoded at once.",
    ),
    click.option(
        "--long",
        type=click.Choice(LONG_POLICIES),
        default="truncate",
        show_default=True,
        help="Longer sequences: cut off, covered by overlapping windows, or quarantined.",
    ),
    click.option(
        "--rows-per-chunk",
        type=click.IntRange(1, 10_000),
        help="Rows that are computed and saved together.  [default: what takes up to 40 s]",
    ),
    click.option("--per-residue", is_flag=True, help="Store each residue's too, as float16."),
    click.option(
        "--translate",
        type=click.Choice(["six-frame"]),
        help="The input is nucleotides: embed the proteins of all six reading frames.",
    ),
    click.option(
        "--frames",
        "frames",
        type=click.Choice(FRAME_RULES),
        default=_translation.rule,
        show_default=True,
        help="Frames without a stop but at the end; every stretch between stops; or as VirNucPro.",
    ),
    click.option(
        "--window",
        default="none",
        show_default=True,
        help="Nucleotides at once, such as VirNucPro's 300 or 500, or none: whole records.",
    ),
    click.option(
        "--genetic-code",
        type=int,
        default=_translation.genetic_code,
        show_default=True,
        help="NCBI's number of the table.",
    ),
    click.option(
        "--min-residues",
        type=click.IntRange(1),
        default=_translation.min_residues,
        show_default=True,
        help="Shorter proteins are left out; not with virnucpro.",
    ),
    click.option(
        "--max-unknown",
        type=click.FloatRange(0, 1),
        default=_translation.max_unknown,
        show_default=True,
        help="Proteins with a larger share of X are left out; not with virnucpro.",
    ),
    click.option(
        "--tile",
        type=click.IntRange(1),
        help="Residues: cut proteins, or frames, into tiles of so many, each a row.",
    ),
    click.option(
        "--tile-step",
        type=click.IntRange(1),
        help="Residues from one tile's start to the next one's.  [default: half a tile]",
    ),
    click.option(
        "--molecule",
        type=click.Choice(MOLECULES),
        default=AUTO,
        show_default=True,
        help="What the input is, if it does not look like it.",
    ),
)


def settings_of(options: dict[str, Any]) -> dict[str, Any]:
    """Options as fields of `Settings`: those of translation in one, and of tiling, or none."""
    tile, step = options.pop("tile"), options.pop("tile_step")
    if step is not None and tile is None:
        raise click.UsageError("--tile-step is for --tile")
    options = options | {"tiling": tile and Tiling(tile, step)}
    names = ("translate", "frames", "window", "genetic_code", "min_residues", "max_unknown")
    given = {name: options.pop(name) for name in names}
    wanted, rule, window, code, residues, unknown = given.values()
    if wanted is None:
        context = click.get_current_context()
        for name in names:
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name.replace('_', '-')} is for --translate six-frame")
        return options
    if window != "none" and not window.isdecimal():
        raise click.BadParameter(f"{window!r}: neither a number nor none", param_hint="--window")
    size = None if window == "none" else int(window)
    return options | {"translation": Translation(rule, size, code, residues, unknown)}


tls_options = _options(
    click.option("--tls-ca-file", help="For tls:// addresses: the authority to trust, PEM."),
    click.option("--tls-cert", help="This client's certificate, PEM."),
    click.option("--tls-key", help="Its key, PEM."),
)

work_options = _options(
    click.option(
        "--cluster",
        default="local",
        show_default=True,
        help="local (this machine's cores), local-cuda (its GPUs), auto (GPUs if there are any), a"
        " scheduler's address, or a scheduler.json.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(1),
        help="Local worker processes.  [default: one a core, or a GPU]",
    ),
    click.option(
        "--device",
        default=_defaults.device,
        show_default=True,
        help="Torch device of the workers. auto: cuda with local-cuda, else cpu.",
    ),
    click.option(
        "--shard",
        help="i/n: compute every n-th chunk, from the i-th on; other runs on the same store do the"
        " rest. slurm: as the array job says.",
    ),
    _setting(
        "attempts",
        click.IntRange(1),
        "Tries for a chunk that meets a transient error, of I/O for example.",
    ),
    _setting(
        "backoff",
        click.FloatRange(0),
        "Seconds before the second try; doubled before each further one.",
    ),
    _setting(
        "suspect_after",
        click.IntRange(1),
        "Workers' deaths after which a chunk is computed in a process of its own.",
    ),
    _setting(
        "deadline_factor",
        click.FloatRange(1),
        "Times the running median, per residue, that a chunk may take before it counts as hanging.",
    ),
    _setting(
        "deadline_floor",
        click.FloatRange(0),
        "Seconds that any chunk may take.",
    ),
    click.option(
        "--deadline-first",
        type=click.FloatRange(0),
        help="Seconds that a chunk may take before a median is known, and a worker to load the"
        " model.  [default: by the model's size and the device]",
    ),
    _setting(
        "grace",
        click.FloatRange(0),
        "Seconds from SIGINT or SIGTERM to the end.",
    ),
    click.option("--in-flight", type=click.IntRange(1), help="Chunks at once.  [default: threads]"),
    click.option("--verify", is_flag=True, help="Decode present chunks before trusting them."),
    click.option(
        "--performance-report", help="HTML file for Dask's own report of the run; needs bokeh."
    ),
    tls_options,
)
display_options = _options(
    click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout."),
    click.option("--no-progress", is_flag=True, help="Plain lines instead of a live bar."),
    click.option("-q", "--quiet", is_flag=True, help="Trouble and the summary only."),
    click.option(
        "--telemetry",
        help="File for what each chunk took, as JSON lines.  [default: STORE.telemetry.jsonl]",
    ),
    click.option("--no-telemetry", is_flag=True, help="Write no such file."),
)
