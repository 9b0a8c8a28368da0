"""The letter rules, on text that no file may hold as well."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virnuc_dask.errors import InputError
from virnuc_dask.inputs.records import (
    ALPHABET,
    Block,
    InputDigest,
    InputSummary,
    Record,
    clean,
    clean_sequence,
    decoded_header,
    invalid_rows,
)

# Any character, lone surrogates included, and the letters that rules are about more often.
any_text = st.text(st.characters() | st.sampled_from("ACJjbxu*-. \t\v\f\r\n\x1f\xa0\udce9\ud800"))
residue_text = st.text(ALPHABET + ALPHABET.lower() + "Jj-.* \t", max_size=60)


def cleaned(*texts: str) -> tuple[list[str], InputSummary]:
    summary = InputSummary()
    block = clean([Record(str(n), text, "f", n) for n, text in enumerate(texts)], summary)
    summary.take_rows(block.lengths)
    ends = np.cumsum(block.lengths)
    rows = [
        block.residues[end - length : end].tobytes().decode()
        for end, length in zip(ends, block.lengths, strict=True)
    ]
    return rows, summary


def by_the_rules(text: str) -> tuple[str, Counter[str]]:
    """The rules once more, letter by letter."""
    counts: Counter[str] = Counter()
    letters = [c for c in text if not c.isspace()]
    while letters and letters[-1] in "*-.":
        counts["stops" if letters.pop() == "*" else "gaps"] += 1
    residues = []
    for c in letters:
        upper = c.upper() if c.isascii() else "?"
        if c in "-.":
            counts["gaps"] += 1
        elif upper == "J":
            counts["j"] += 1
            residues.append("X")
        else:
            residues.append(upper)
    return "".join(residues), counts


@given(st.lists(residue_text | any_text, min_size=1, max_size=6))
def test_cleaning_a_batch_is_the_rules_letter_by_letter(texts: list[str]) -> None:
    rows, summary = cleaned(*texts)
    expected = [by_the_rules(text) for text in texts]
    counts = sum((counts for _, counts in expected), Counter[str]())
    assert [row.encode() for row in rows] == [
        residues.encode("ascii", "replace") for residues, _ in expected
    ]
    assert (summary.gaps, summary.terminal_stops, summary.ambiguous_j) == (
        counts["gaps"],
        counts["stops"],
        counts["j"],
    )
    assert summary.records == len(texts)
    assert summary.residues == sum(map(len, rows))
    assert summary.empty == rows.count("")
    assert summary.invalid == sum(not set(row) <= set(ALPHABET) for row in rows)
    assert summary.all_lengths().tolist() == [len(row) for row in rows]


@given(any_text)
def test_any_text_is_a_sequence_or_an_error_that_can_be_printed(text: str) -> None:
    try:
        residues = clean_sequence(text)
    except InputError as error:
        residues, shown = "", str(error)
        shown.encode()
    assert set(residues) <= set(ALPHABET)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("M*K", r"internal stop '\*' at position 2"),
        ("MK1-", "letter '1' at position 3 is not a residue"),
        ("M-?", r"letter '\?' at position 3 is not a residue"),
        ("Mé", "letter 'é' at position 2 is not a residue"),
        ("M\udce9", "letter 'é' at position 2 is not a residue"),
        ("M\ud800", r"letter '\\ud800' at position 2 is not a residue"),
        # Long s: its upper case is S.
        ("M\u017fK", "letter '\u017f' at position 2 is not a residue"),
        ("*M", r"internal stop '\*' at position 1"),
    ],
)
def test_the_error_shows_the_letter_and_its_position(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        clean_sequence(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("space", [" ", "\t", "\v", "\f", "\r\n", "\x1f", "\xa0", "\u3000"])
def test_white_space_of_every_kind_is_dropped_wherever_it_is(space: str) -> None:
    assert clean_sequence(f"{space}M{space}K{space}*{space}-{space}") == "MK"


def test_only_the_first_invalid_record_of_all_batches_is_kept() -> None:
    summary = InputSummary()
    clean([Record("a", "MK", "f", 1), Record("b", "M1", "f", 3)], summary)
    clean([Record("c", "M2", "f", 5)], summary)
    assert summary.invalid == 2
    assert summary.first_invalid is not None
    assert (summary.first_invalid.file, summary.first_invalid.line) == ("f", 3)
    assert summary.first_invalid.record == "b"


def test_invalid_rows_of_empty_rows_and_of_no_rows() -> None:
    letters = np.frombuffer(b"MKM*", np.uint8)
    lengths = np.array([0, 2, 0, 2, 0], np.int32)
    assert invalid_rows(letters, lengths).tolist() == [False, False, False, True, False]
    assert invalid_rows(letters[:0], lengths[:0]).tolist() == []
    assert InputSummary().all_lengths().tolist() == []


@given(st.binary(max_size=20))
def test_headers_lose_no_byte(content: bytes) -> None:
    decoded = decoded_header(content.decode("utf-8", "surrogateescape"))
    assert content in (decoded.encode(), decoded.encode("latin-1", "replace"))


records = st.lists(st.tuples(st.text("ab", max_size=3), st.text("AC", max_size=4)), max_size=6)


def digest(rows: list[tuple[str, str]], cut: int) -> str:
    found = InputDigest()
    for part in (rows[:cut], rows[cut:]):
        text = "".join(sequence for _, sequence in part).encode()
        lengths = np.array([len(sequence) for _, sequence in part], np.int32)
        found.update(Block([name for name, _ in part], lengths, np.frombuffer(text, np.uint8)))
    return found.hexdigest()


@given(records, records, st.integers(0, 6), st.integers(0, 6))
def test_digests_are_equal_just_where_records_are(
    one: list[tuple[str, str]], two: list[tuple[str, str]], cut: int, other: int
) -> None:
    assert digest(one, cut) == digest(one, other)
    assert (digest(one, cut) == digest(two, other)) == (one == two)
