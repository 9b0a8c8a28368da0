"""Reads FASTA and FASTQ records and cleans their residues, block by block, in bounded memory."""

from __future__ import annotations

import bz2
import gc
import io
import lzma
import string
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib import import_module
from itertools import chain, dropwhile
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from Bio.SeqIO.QualityIO import FastqGeneralIterator
from xopen import xopen

from virnuc_dask.errors import InputError
from virnuc_dask.inputs.records import (
    Block,
    InputDigest,
    InputSummary,
    Record,
    clean,
    decoded_header,
)
from virnuc_dask.inputs.refused_formats import (
    COMMENT_WITHIN,
    GLUED,
    SAM,
    foreign_line,
    foreign_name,
)
from virnuc_dask.inputs.tiles import tile_block
from virnuc_dask.inputs.translation import translate_records
from virnuc_dask.settings import Tiling, Translation

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdError
else:
    from backports.zstd import ZstdError  # as in xopen

BLOCK_RECORDS = 65_536
BLOCK_RESIDUES = 2**24
# Six frames and their cumulative sums take about fifty bytes per letter.
BLOCK_NUCLEOTIDES = 2**22

_COMMENT = ";#"
# The lines of a record are not checked one by one if it has only these characters.
_PLAIN = (string.ascii_letters + "-.*" + string.whitespace).encode()

_CHUNK = 2**16
_MAGIC = {b"\x1f\x8b": "gz", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}
_MAGIC[b"P*M\x18"] = "zst"  # pzstd writes a skippable frame first
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # begin UTF-16 and UTF-32
_DECOMPRESSION_ERRORS: tuple[type[Exception], ...] = (EOFError, OSError, ValueError, zlib.error)
_DECOMPRESSION_ERRORS += (lzma.LZMAError, ZstdError)
for _module in ("isal.isal_zlib", "zlib_ng.zlib_ng"):  # xopen uses them where available
    with suppress(ImportError):
        _DECOMPRESSION_ERRORS += (import_module(_module).error,)


def read_blocks(
    inputs: Sequence[str | Path],
    summary: InputSummary,
    *,
    strict: bool = False,
    translation: Translation | None = None,
    tiling: Tiling | None = None,
) -> Iterator[Block]:
    """Read inputs in order as blocks of cleaned records.

    Parameters
    ----------
    inputs : sequence of path
        FASTA or FASTQ files, plain or compressed (gz, bz2, xz, zst); ``-`` is standard input.
        The content decides the format, never the name.
    summary : InputSummary
        Filled while blocks are read. It is complete, with the digest of the content, when the
        iterator is exhausted.
    strict : bool
        Raise at the first record with a letter outside the alphabet.
    translation : Translation, optional
        If given, records are nucleotides, and the rows of a block are their proteins.
    tiling : Tiling, optional
        If given, the rows of a block are tiles of the proteins.

    Raises
    ------
    InputError
        An input cannot be read, is not FASTA or FASTQ, or is damaged; no input holds a record;
        or, if `strict`, a letter is no residue.
    """
    for number, name in enumerate(map(str, inputs)):
        summary.files.setdefault(name, number)
    digest = InputDigest()
    letters = BLOCK_RESIDUES if translation is None else BLOCK_NUCLEOTIDES
    for records in _batches(_all_records(inputs, summary), letters):
        if translation is not None:
            block = translate_records(records, translation, summary)
        else:
            block = clean(records, summary)
        if strict and summary.first_invalid is not None:
            raise summary.first_invalid
        for part in [block] if tiling is None else tile_block(block, tiling, summary):
            summary.take_rows(part.lengths)
            digest.update(part)
            yield part
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
    """Read one FASTA or FASTQ input lazily. A file without a record yields nothing.

    Raises
    ------
    InputError
        The input is not valid. The error has the file, the line and, if known, the record.
    """
    with _open_text(name) as text, closing(_Lines(text, name)) as lines:
        first = lines.first_content()
        if first.startswith(">"):
            yield from _read_fasta(lines, name)
        elif first.startswith("@") and not first.startswith(SAM):
            yield from _read_fastq(lines, name)
        elif first:
            start = decoded_header(first.rstrip())[:40]
            problem = f"expected a FASTA ('>') or FASTQ ('@') header, found {start!r}"
            raise InputError(lines.foreign or problem, file=name, line=lines.number)


def _read_fasta(lines: _Lines, name: str) -> Iterator[Record]:
    """Read records. Their lines are checked one by one only if a character is no sequence letter.

    Biopython's parser does not keep lines, but the errors here need them.
    """
    identifier, description, header, body = "", "", 0, list[str]()
    for line in chain(lines, [">"]):  # another header ends the last record
        if line[0] != ">":
            body.append(line)
            continue
        if header:
            text = "".join(body)
            if text.encode("ascii", "replace").translate(None, _PLAIN):
                text = _looked_at(body, Record(identifier, "", name, header))
            yield Record(identifier, text, name, header, description)
        identifier, description = _parts(line[1:])
        header, body = lines.number, []
        if foreign := foreign_name(identifier):
            raise InputError(foreign, file=name, line=header, record=identifier)


def _parts(header: str) -> tuple[str, str]:
    """Identifier and description: first word and rest of a header. Either may be empty."""
    # Each is decoded by itself: a wrong byte in a description does not change the identifier.
    identifier, description = [*header.strip().split(maxsplit=1), "", ""][:2]
    return decoded_header(identifier), decoded_header(description)


def _looked_at(body: list[str], record: Record) -> str:
    """Join the lines of a sequence. Raise InputError at a '>' or a line of another format.

    Comments may precede and follow the sequence. A comment within it is refused, because it may be
    another format's header.
    """
    lines = [entry for entry in enumerate(body, record.line + 1) if not entry[1].isspace()]
    while lines and lines[-1][1][0] in _COMMENT:
        lines.pop()
    lines = list(dropwhile(lambda entry: entry[1][0] in _COMMENT, lines))
    for number, line in lines:
        problem = COMMENT_WITHIN if line[0] in _COMMENT else GLUED if ">" in line else None
        if problem := foreign_line(line) or problem:
            raise InputError(problem, file=record.file, line=number, record=record.id)
    return "".join(line for _, line in lines)


def _read_fastq(lines: _Lines, name: str) -> Iterator[Record]:
    parser, header, count = FastqGeneralIterator(cast(TextIO, lines)), lines.number, 0
    while True:
        count += 1
        try:
            title, sequence = next(parser)[:2]
        except StopIteration:
            return
        except ValueError as error:
            # Biopython's FASTQ errors name no line and, mostly, no record.
            problem = f"not valid FASTQ: {str(error).rstrip('.')}"
            raise InputError(problem, file=name, line=header, record=str(count)) from error
        identifier, description = _parts(title)
        record = Record(identifier, sequence, name, header, description)
        if sequence.encode("ascii", "replace").translate(None, _PLAIN):
            foreign = foreign_line(sequence) or (GLUED if ">" in sequence else None)
            if foreign:
                raise InputError(foreign, file=name, line=header, record=record.id)
        yield record
        # The parser reads one header ahead, so the next record starts there.
        header = lines.number


class _Lines:
    """Counts lines of text and never yields an empty string.

    Biopython's parsers take any iterable of lines.
    """

    def __init__(self, text: TextIO, name: str) -> None:
        self.number = 0
        self.foreign: str | None = None  # name of another format, if known
        self._name = name
        # A generator takes half the time of a method call for each line.
        self._lines: Iterator[str] = self._counted(text)

    def _counted(self, text: TextIO) -> Iterator[str]:
        try:
            for self.number, line in enumerate(text, 1):
                if "\0" in line:
                    raise InputError(
                        "binary data (a NUL byte); expected FASTA or FASTQ text",
                        file=self._name,
                        line=self.number,
                    )
                # From concatenated files: a byte order mark begins one, and in DOS 0x1A ends it.
                if line[0] == "\ufeff" or "\x1a" in line:
                    line = line.strip("\ufeff\x1a\n") + "\n"
                yield line
        except _DECOMPRESSION_ERRORS as error:
            raise _damaged(self._name, self.number, error) from error

    def first_content(self) -> str:
        """The first line that is neither blank nor a comment, or an empty string."""
        for line in self._lines:
            if line.strip(" \t\r\n\v\f"):
                self.foreign = self.foreign or foreign_line(line)
                if line[0] not in _COMMENT:
                    self._lines = chain([line], self._lines)
                    return line
        return ""

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
    """Error for a stream that ends early or does not decompress."""
    return InputError(f"the input is truncated or damaged: {error}", file=name, line=lines + 1)


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a stream. Closing it does not close their source, e.g. standard input."""

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
    """Decompress concatenated bz2 or xz streams, also with zeros as padding.

    Python's own readers take damage in any stream but the first for the end of the file.
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
        raise EOFError("the compressed stream ends early")


@contextmanager
def _open_text(name: str) -> Iterator[TextIO]:
    """Open an input as decompressed text. Bytes that are not UTF-8 become surrogate escapes."""
    if name == "-" and sys.stdin is None:
        raise InputError("cannot open: it is closed", file=name)
    try:
        raw: BinaryIO = sys.stdin.buffer if name == "-" else open(name, "rb")  # noqa: SIM115
        start = raw.read(8)  # `peek` may return fewer bytes from a pipe
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
            # threads=0: without a helper process, damage raises where lines are read.
            stream = xopen(stream, "rb", threads=0, format=kind)
        yield io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape")
    finally:
        if name != "-":
            raw.close()


def _batches(records: Iterable[Record], letters: int) -> Iterator[list[Record]]:
    source = iter(records)
    while batch := _take(source, letters):
        yield batch


def _take(records: Iterator[Record], letters: int) -> list[Record]:
    batch: list[Record] = []
    size = 0
    # A third of the time would go into a useless search for cycles among these tuples.
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
