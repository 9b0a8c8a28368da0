"""Read FASTA and FASTQ records and clean their residues, block by block, in bounded memory."""

from __future__ import annotations

import bz2
import gc
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from Bio.SeqIO.FastaIO import SimpleFastaParser
from Bio.SeqIO.QualityIO import FastqGeneralIterator
from xopen import xopen

from virnuc_dask.config import Translation
from virnuc_dask.errors import InputError
from virnuc_dask.residues import Block, InputDigest, InputSummary, Record, clean, decoded_header
from virnuc_dask.translate import translate_records

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdError
else:
    from backports.zstd import ZstdError  # as xopen does

BLOCK_RECORDS = 65_536
BLOCK_RESIDUES = 2**24
# Six frames and their sums take some fifty bytes a letter.
BLOCK_NUCLEOTIDES = 2**22

_CHUNK = 2**16
_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}
_MAGIC[b"P*M\x18"] = "zst"  # pzstd puts a skippable frame first
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # of UTF-16 and UTF-32
_DECOMPRESSION_ERRORS: tuple[type[Exception], ...] = (EOFError, OSError, ValueError, zlib.error)
_DECOMPRESSION_ERRORS += (lzma.LZMAError, ZstdError)
for _module in ("isal.isal_zlib", "zlib_ng.zlib_ng"):  # xopen's, where the platform has them
    with suppress(ImportError):
        _DECOMPRESSION_ERRORS += (import_module(_module).error,)


def read_blocks(
    inputs: Sequence[str | Path],
    summary: InputSummary,
    *,
    strict: bool = False,
    translation: Translation | None = None,
) -> Iterator[Block]:
    """Read inputs in order as blocks of cleaned records.

    Parameters
    ----------
    inputs : sequence of path
        FASTA or FASTQ files, plain or compressed (gz, bz2, xz, zst); ``-`` is standard input.
        The content decides the format, never the name.
    summary : InputSummary
        Filled in passing; complete, with the content's digest, when the iterator is exhausted.
    strict : bool
        Raise at the first record that has a letter outside the alphabet.
    translation : Translation, optional
        The records are nucleotides; a block's rows are their proteins.

    Raises
    ------
    InputError
        An input that cannot be read, is not FASTA or FASTQ, is damaged; no input holds a record;
        or, if `strict`, a letter that is no residue.
    """
    digest = InputDigest()
    letters = BLOCK_RESIDUES if translation is None else BLOCK_NUCLEOTIDES
    for records in _batches(_all_records(inputs, summary), letters):
        if translation is not None:
            block = translate_records(records, translation, summary)
        else:
            block = clean(records, summary)
        if strict and summary.first_invalid is not None:
            raise summary.first_invalid
        digest.update(block)
        yield block
    if not (summary.records or summary.reads):
        raise InputError("no sequence record in the input", file=", ".join(map(str, inputs)))
    summary.sha256 = digest.hexdigest()


def _all_records(inputs: Sequence[str | Path], summary: InputSummary) -> Iterator[Record]:
    for name in map(str, inputs):
        empty = True
        for record in read_records(name):
            empty = False
            yield record
        if empty:
            summary.empty_files.append(name)


def read_records(name: str) -> Iterator[Record]:
    """Read one FASTA or FASTQ input, lazily; a file without a record yields nothing.

    Raises
    ------
    InputError
        With file, line and, where it is known, record.
    """
    with _open_text(name) as text, closing(_Lines(text, name)) as lines:
        parser: Iterator[tuple[str, ...]]
        first = lines.first_content()
        if first == "":
            return
        if first == ">":
            lines.skip_comments = True
            parser = SimpleFastaParser(cast(TextIO, lines))
        elif first == "@":
            parser = FastqGeneralIterator(cast(TextIO, lines))
        else:
            raise InputError(
                f"expected a FASTA ('>') or FASTQ ('@') header, found {lines.shown()!r}",
                file=name,
                line=lines.number,
            )
        header, count = lines.number, 0
        while True:
            try:
                title, sequence = next(parser)[:2]
            except StopIteration:
                return
            except ValueError as error:
                # Biopython's FASTQ errors name neither the line nor, mostly, the record.
                raise InputError(
                    f"not valid FASTQ: {str(error).rstrip('.')}",
                    file=name,
                    line=header,
                    record=str(count + 1),
                ) from error
            count += 1
            words = title.split(maxsplit=1)
            yield Record(decoded_header(words[0]) if words else "", sequence, name, header)
            # The parsers read one header ahead: that is where the next record starts.
            header = lines.number


class _Lines:
    """Text lines, counted, for Biopython's parsers, which take any iterable of lines."""

    def __init__(self, text: TextIO, name: str) -> None:
        self.number = 0
        self.skip_comments = False
        self._name = name
        self._ahead = ""
        # A generator takes half the time of a method that is called for each line.
        self._lines: Iterator[str] = self._counted(text)

    def _counted(self, text: TextIO) -> Iterator[str]:
        try:
            for line in text:
                self.number += 1
                if "\0" in line:
                    raise InputError(
                        "binary data (a NUL byte); expected FASTA or FASTQ text",
                        file=self._name,
                        line=self.number,
                    )
                if not (self.skip_comments and line[0] in ";#"):
                    yield line
        except _DECOMPRESSION_ERRORS as error:
            raise _damaged(self._name, self.number, error) from error

    def first_content(self) -> str:
        """First character of the first line that is neither blank nor a comment, or ''."""
        for line in self._lines:
            if line.strip(" \t\r\n\v\f") and line[0] not in "#;":
                self._ahead = line
                self._lines = chain([line], self._lines)
                return line[0]
        return ""

    def shown(self) -> str:
        """The line read ahead, short enough for a message."""
        return decoded_header(self._ahead.rstrip())[:40]

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def read(self, size: int) -> str:
        """Biopython's check for a text stream reads zero characters."""
        if size != 0:
            raise io.UnsupportedOperation("lines only")
        return ""

    def readline(self) -> str:
        return next(self._lines, "")

    def close(self) -> None:
        self._lines = iter(())


def _damaged(name: str, lines: int, error: Exception) -> InputError:
    """The error for a stream that breaks off or does not decompress."""
    return InputError(
        f"cannot read on, the file is truncated or damaged: {error}", file=name, line=lines + 1
    )


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a stream. Closing it closes nothing else, such as standard input."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._left = filter(None, chunks), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or next(self._chunks, b"")
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _decompressed(chunks: Iterable[bytes], new: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress bz2 or xz streams laid end to end, or padded with zeros.

    Python's own readers take a damaged stream, unless it is the first, for the end of the file.
    """
    stream = None
    for chunk in chunks:
        while chunk := chunk if stream else chunk.lstrip(b"\0"):
            stream = stream or new()
            yield stream.decompress(chunk, _CHUNK)
            while not (stream.needs_input or stream.eof):
                yield stream.decompress(b"", _CHUNK)
            chunk, stream = stream.unused_data, None if stream.eof else stream
    if stream:
        raise EOFError("the compressed stream breaks off")


@contextmanager
def _open_text(name: str) -> Iterator[TextIO]:
    """Open an input as text, decompressed by content; bytes that are not UTF-8 become escapes."""
    if name == "-" and sys.stdin is None:
        raise InputError("cannot open: it is closed", file=name)
    try:
        raw: BinaryIO = sys.stdin.buffer if name == "-" else open(name, "rb")  # noqa: SIM115
        start = raw.read(8)  # `peek` may show fewer, if a pipe has not yet more
    except (OSError, ValueError) as error:  # ValueError: NUL in a name
        problem = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot open: {problem}", file=name) from error
    try:
        if start.startswith(_WIDE_MARKS):
            problem = "UTF-16 or UTF-32 text; convert it to UTF-8 first (iconv -t UTF-8)"
            raise InputError(problem, file=name, line=1)
        kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
        chunks: Iterator[bytes] = chain([start], iter(partial(raw.read, _CHUNK), b""))
        if kind in ("bz2", "xz"):
            new = bz2.BZ2Decompressor if kind == "bz2" else lzma.LZMADecompressor
            chunks = _decompressed(chunks, new)
        stream: BinaryIO = io.BufferedReader(_Chunks(chunks), _CHUNK)
        if kind in ("gz", "zst"):
            # threads=0: no helper process, so damage raises where lines are read.
            stream = xopen(stream, "rb", threads=0, format=kind)
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
    finally:
        if name != "-":
            raw.close()


def _batches(records: Iterable[Record], letters: int) -> Iterator[list[Record]]:
    source = iter(records)
    while batch := _take(source, letters):
        yield batch


def _take(records: Iterator[Record], letters: int) -> list[Record]:
    """Records for one block."""
    batch: list[Record] = []
    size = 0
    # Looking for cycles among these tuples, in vain, would take a third of the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for record in records:
            batch.append(record)
            size += len(record.sequence)
            if len(batch) == BLOCK_RECORDS or size >= letters:
                break
    finally:
        if was_enabled:
            gc.enable()
    return batch
