"""Whether embeddings from two stores are comparable: by model and by sequence lengths."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from virnuc_dask.errors import UsageError
from virnuc_dask.settings import Identity
from virnuc_dask.store.store import SEQUENCES_PER_CHUNK, Store
from virnuc_dask.text import printable

_FIELDS = ("weights_sha256", "repr_layer", "pooling", "precision")
_LENGTH_FACTOR = 3
_LONGEST_MODEL = 300
_CHUNKS_OF_LENGTHS = 8


def what_must_agree(identity: Identity) -> dict[str, object]:
    """Fields of a store's identity that comparable embeddings must share."""
    return {name: getattr(identity, name) for name in _FIELDS}


def check_comparable(
    here: Mapping[str, object],
    there: Mapping[str, object],
    problem: str,
    models: tuple[str, str] = ("", ""),
) -> None:
    """Refuse embeddings of another model, layer, pooling or precision.

    Parameters
    ----------
    here, there : mapping
        From `what_must_agree`.
    problem : str
        First line of the error; each difference follows on its own line.
    models : tuple of str
        Descriptions of both, as from `named_model`, for two more lines; empty if not known.

    Raises
    ------
    UsageError
        They differ.
    """
    differences = [
        f"  {name}: {here.get(name)!r} and {there.get(name)!r}"
        for name in _FIELDS
        if here.get(name) != there.get(name)
    ]
    if differences:
        named = [f"  {model}" for model in models if model]
        raise UsageError("\n".join([f"{problem}:", *differences, *named]))


def check_same_embeddings(here: Store, there: Store) -> None:
    """Refuse two stores if their rows are not comparable.

    Raises
    ------
    UsageError
        The rows are not comparable; the message names both models.
    """
    check_comparable(
        what_must_agree(here.identity),
        what_must_agree(there.identity),
        f"rows of {here.path} and {there.path} are not comparable",
        (named_model(here), named_model(there)),
    )


def named_model(store: Store) -> str:
    """A store and its model in one line: name, digest, layer, pooling, precision."""
    return f"{store.path}: {printable(store.model.described(''), _LONGEST_MODEL)}"


def length_note(here: float, name: str, there: float, other: str) -> str | None:
    """Warning if median lengths differ by more than a factor of three; else None.

    Parameters
    ----------
    here, there : float
        Median lengths, in residues.
    name, other : str
        Names of the two, for the warning.
    """
    here, there = max(1.0, here), max(1.0, there)
    if max(here, there) <= _LENGTH_FACTOR * min(here, there):
        return None
    return (
        f"median lengths are {here:,.0f} residues in {name} and {there:,.0f} in {other}; this"
        " difference is too large to compare their embeddings; embed the longer sequences again in"
        f" tiles of the shorter length with `run --tile {min(here, there):.0f}`"
    )


def median_length(store: Store) -> float:
    """Median length in residues of a store's rows; of large stores, of several 100,000 rows."""
    firsts = np.arange(0, store.records, SEQUENCES_PER_CHUNK)
    some = firsts[:: -(-len(firsts) // _CHUNKS_OF_LENGTHS)].tolist()
    with store.reading("`length`"):
        parts = [store.array("length")[first : first + SEQUENCES_PER_CHUNK] for first in some]
    return float(np.median(np.concatenate(parts)))


def note_on_lengths(searched: Store, source: Store) -> str | None:
    """Reason to doubt the results if the lengths in two stores differ too much."""
    if source.id == searched.id:
        return None
    return length_note(
        median_length(searched), str(searched.path), median_length(source), str(source.path)
    )
