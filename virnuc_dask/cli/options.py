"""Command-line options that several commands share. `settings` defines what a setting means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import click
from click.core import ParameterSource

from virnuc_dask.settings import (
    MIN_WINDOW,
    SIX_FRAME,
    TILING_OPTIONS,
    TRANSLATION_OPTIONS,
    Option,
    RunConfig,
    Settings,
    Tiling,
    Translation,
    options_of,
)

EMBED, WHERE, SHOWN, RARE = (
    "What to embed",
    "Where to run",
    "How to show it",
    "Rarely needed",
)


class GroupedOption(click.Option):
    """An option that the help lists under a heading."""

    def __init__(self, *declarations: Any, group: str, **more: Any) -> None:
        super().__init__(*declarations, **more)
        self.group = group


class GroupedCommand(click.Command):
    """A command with a help text that lists options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, group by group."""
        groups: dict[str, list[tuple[str, str]]] = {EMBED: [], WHERE: [], SHOWN: [], RARE: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, click.Option):
                groups[getattr(parameter, "group", SHOWN)].append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def grouped(group: str, *declarations: str, **more: Any) -> Callable[[Any], Any]:
    """Make an option that the help lists under a heading."""
    return click.option(*declarations, cls=GroupedOption, group=group, **more)


def setting(of: type, name: str, flag: str | None = None, **more: Any) -> Callable[[Any], Any]:
    """Make the command-line option of a setting.

    Parameters
    ----------
    of : type
        `Settings`, `RunConfig`, `Translation` or `Tiling`.
    name : str
        Name of the field.
    flag : str, optional
        Default: the name of the field with dashes.
    **more
        Arguments of `click.option` that replace those of the setting.
    """
    option = options_of(of)[name]
    (field,) = (each for each in fields(of) if each.name == name)
    kind = str(field.type)
    default = None if field.default is MISSING else field.default
    group = RARE if option.is_rare else WHERE if of is RunConfig else EMBED
    unset = f"  [default: {option.unset}]" if option.unset else ""
    made = {
        "type": None if kind == "bool" else _type(option, kind),
        "is_flag": kind == "bool",
        "metavar": {"int": "N", "flo": "X"}.get(kind[:3]),
        "default": default,
        "show_default": default is not None and kind != "bool",
        "help": f"{option.help}{unset}",
    }
    return grouped(group, flag or f"--{name.replace('_', '-')}", **made | more)


def _type(option: Option, kind: str) -> click.ParamType[Any]:
    if option.choices:
        return click.Choice(option.choices)
    if kind.startswith("int"):
        return click.INT if option.least is None else click.IntRange(option.least, option.most)
    if kind.startswith("float"):
        return click.FloatRange(option.least, option.most)
    return click.STRING


class _OrNone(click.IntRange):
    """A number, or ``none``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "none":
            return None
        if not str(value).isdecimal():
            self.fail(f"{value!r} is neither a number nor none", param, ctx)
        return super().convert(value, param, ctx)


_FIRST = ("model", "pooling", "repr_layer", "precision", "dtype", "long", "max_residues")
identity_options = _options(
    *(setting(Settings, name) for name in (*_FIRST, "rows_per_chunk", "per_residue")),
    grouped(
        EMBED,
        "--translate",
        type=click.Choice([SIX_FRAME]),
        help="The input is nucleotides: embed the proteins of all six reading frames.",
    ),
    setting(Translation, "frames"),
    setting(Translation, "window", type=_OrNone(MIN_WINDOW), default="none", show_default=True),
    *(setting(Translation, name) for name in ("genetic_code", "min_residues", "max_unknown")),
    setting(Tiling, "size", "--tile"),
    setting(Tiling, "step", "--tile-step"),
    *(setting(Settings, name) for name in ("molecule", "strict")),
)


def given_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Take all settings out of the options, and return those that the command line gives."""
    names = {"translate", *TRANSLATION_OPTIONS, *TILING_OPTIONS, *options_of(Settings)}
    taken = {name: options.pop(name) for name in names & options.keys()}
    context = click.get_current_context()
    return {
        name: value
        for name, value in taken.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


CONFIG_OPTIONS = tuple(name for name, option in options_of(RunConfig).items() if option.help)
tls_options = _options(
    *(setting(RunConfig, name) for name in ("tls_ca_file", "tls_cert", "tls_key"))
)
work_options = _options(
    grouped(
        WHERE,
        "--cluster",
        default="local",
        show_default=True,
        help="local (cores of this machine), local-cuda (its GPUs), auto (GPUs if it has any), a"
        " scheduler's address, or a scheduler.json.",
    ),
    grouped(
        WHERE,
        "--workers",
        type=click.IntRange(1),
        metavar="N",
        help="Local worker processes.  [default: one per core or GPU]",
    ),
    *(setting(RunConfig, name) for name in CONFIG_OPTIONS),
)
display_options = _options(
    grouped(SHOWN, "--json", "as_json", is_flag=True, help="Write JSON lines to stdout."),
    grouped(SHOWN, "--no-progress", is_flag=True, help="Print plain lines instead of a live bar."),
    grouped(SHOWN, "-q", "--quiet", is_flag=True, help="Print only problems and the summary."),
    grouped(
        RARE,
        "--telemetry",
        help="File for the events of the run, as JSON lines.  [default: STORE.telemetry.jsonl]",
    ),
    grouped(RARE, "--no-telemetry", is_flag=True, help="Write no telemetry file."),
)
