"""What an option means, its default and its bounds are written once, in the settings."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import click
import pytest
from click.testing import CliRunner

from virnuc_dask.cli.main import main
from virnuc_dask.cli.options import EMBED, RARE, SHOWN, WHERE
from virnuc_dask.errors import UsageError
from virnuc_dask.settings import RunConfig, Settings, Tiling, Translation, options_of

FLAGS = {"size": "tile", "step": "tile_step"}
EVERY = [(of, name) for of in (Settings, RunConfig, Translation, Tiling) for name in options_of(of)]
ONLY_IN_PYTHON = {"suspect_after", "deadline_factor", "in_flight"}


def of_run(name: str) -> click.Option:
    options = {option.name: option for option in main.commands["run"].params}
    found = options[FLAGS.get(name, name)]
    assert isinstance(found, click.Option)
    return found


@pytest.mark.parametrize(
    ("of", "name"),
    [each for each in EVERY if each[1] not in ONLY_IN_PYTHON],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_run_has_each_setting_with_its_default_and_bounds(of: Any, name: str) -> None:
    option, made = options_of(of)[name], of_run(name)
    (field,) = (each for each in fields(of) if each.name == name)
    default = None if field.default is MISSING else field.default
    assert made.default == ("none" if name == "window" else default)
    assert option.help
    assert option.help in str(made.help)
    if option.choices:
        assert isinstance(made.type, click.Choice)
        assert tuple(made.type.choices) == option.choices
    if option.least is not None and name != "window":  # which may be "none"
        assert isinstance(made.type, click.IntRange | click.FloatRange)
        assert (made.type.min, made.type.max) == (option.least, option.most)


def test_every_option_of_every_command_says_what_it_does() -> None:
    silent = [
        f"{name} {option.opts[0]}"
        for name, command in main.commands.items()
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]
    assert silent == []


def test_the_defaults_that_people_rely_on() -> None:
    """Written once more on purpose: a change of one of them is a change for everybody."""
    expected = {
        "pooling": "mean",
        "precision": "auto",
        "dtype": "float32",
        "long": "truncate",
        "max_residues": 1022,
        "rows_per_chunk": None,
        "per_residue": False,
        "frames": "open",
        "genetic_code": 1,
        "min_residues": 20,
        "max_unknown": 0.1,
        "cluster": "local",
        "attempts": 3,
        "backoff": 1.0,
        "deadline_floor": 60.0,
        "deadline_first": None,
        "grace": 30.0,
        "device": "auto",
    }
    found = {option.name: option.default for option in main.commands["run"].params}
    assert expected.items() <= found.items()
    assert (RunConfig().suspect_after, RunConfig().deadline_factor) == (2, 20.0)
    assert (of_run("rows_per_chunk").type.min, of_run("rows_per_chunk").type.max) == (1, 10_000)


def test_every_field_of_a_run_is_an_option_or_only_for_python() -> None:
    assert options_of(RunConfig).keys() == {field.name for field in fields(RunConfig)}
    assert ONLY_IN_PYTHON.isdisjoint(option.name for option in main.commands["run"].params)
    nested = {"translation", "tiling"}
    assert options_of(Settings).keys() == {field.name for field in fields(Settings)} - nested


@pytest.mark.parametrize(("of", "name"), EVERY, ids=lambda value: getattr(value, "__name__", value))
def test_a_value_out_of_bounds_is_refused_in_python_too(of: Any, name: str) -> None:
    option = options_of(of)[name]
    others = {"model": "demo"} if of is Settings else {"size": 4} if of is Tiling else {}
    bad: list[Any] = []
    bad += ["nothing of the kind"] * bool(option.choices)
    bad += [] if option.least is None else [option.least - 1, float("nan")]
    bad += [] if option.most is None else [option.most + 1]
    for value in bad:
        with pytest.raises(UsageError, match="must"):
            of(**others | {name: value})


def test_the_help_has_four_headings() -> None:
    shown = CliRunner().invoke(main, ["run", "--help"]).output
    places = [shown.index(f"{heading}:") for heading in (EMBED, WHERE, SHOWN, RARE)]
    assert places == sorted(places)
    assert places[0] < shown.index("--model") < places[1] < shown.index("--cluster") < places[2]
    assert shown[: places[3]].count("\n  -") <= 22


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attempts", 0),
        ("backoff", -0.1),
        ("suspect_after", 0),
        ("deadline_factor", 0.5),
        ("deadline_floor", -1),
        ("deadline_first", float("nan")),
        ("grace", -1),
        ("in_flight", 0),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} must be at least"):
        RunConfig(**{name: value})
