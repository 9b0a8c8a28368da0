"""Formats that begin like FASTA, or stand in its midst, and are not: each with what it is."""

from __future__ import annotations

import re

GLUED = "a '>' within a line of sequence; is a newline missing before it?"
COMMENT_WITHIN = (
    "a comment within a sequence, or another format's header; begin a record with '>', or remove"
    " the line"
)

_CONVERT = "convert it to FASTA first"
# The first pattern that fits the beginning of a line says what it is.
_LINES = {
    r"\d+\t\d+(?:aa|nt), >": (
        "a list of CD-HIT's clusters (.clstr); give the FASTA file of representatives beside it"
    ),
    r"\s*<[!?/a-z]": "HTML or XML, perhaps an error instead of a download; fetch it again",
    r"<{7}\s": "a conflict of two versions of a file; resolve it first",
    r"diff -|@@ -|\+>": "a diff; apply it first (patch)",
    r"[@+]": "FASTQ; give files of different formats one by one",
    r"=": "a line of '=', as in XMFA; give the sequences that were aligned",
    r"//": f"the end of an entry, as in GenBank, EMBL, UniProt's format, Stockholm; {_CONVERT}",
    r"LOCUS {2}": f"GenBank; {_CONVERT}",
    r"ID {3}": f"EMBL or UniProt's format; {_CONVERT}",
    r"(?:CLUSTALW?|MUSCLE|PROBCONS) ": f"an alignment of Clustal; {_CONVERT}",
    r"#\s*STOCKHOLM\b": f"Stockholm; {_CONVERT}",
    r"#NEXUS\b": f"NEXUS; {_CONVERT}",
    r"#MEGA\b": f"MEGA; {_CONVERT}",
    r"##MAF\b|track .*\bmaf": f"MAF; {_CONVERT}",
    r"##GFF": "GFF; give what follows its line ##FASTA, if it has one",
    r"!!|.*\bMSF:": f"MSF; {_CONVERT}",
    r"[CR];": f"PIR; {_CONVERT}",
    r";": (
        "IntelliGenetics, or FASTA of old, whose headers begin with ';'; begin them with '>', or"
        " remove the line if it is a comment"
    ),
    r"(?:\s*[-+]?[\d.]*\d(?:E[-+]?\d+)?(?!\S))+\s*$": (
        "a line of numbers, as in files of qualities (.qual), PHYLIP and matrices; give sequences"
    ),
    r"[ACGT](?=.*\d)[0-3.]{4,}\s*$": f"colour space (csfasta, csfastq); {_CONVERT}",
    r"(?=\S*[\[({<])[\]\[(){}<>.,:_~&|-]+(?!\S)": (
        "an RNA's structure in dot-bracket notation; give sequences alone"
    ),
    r"\s*(?:Length|Score|initn|Query)(?::|\s*=|\s+\d)": (
        "an alignment, as BLAST and FASTA print it; give the sequences that were aligned"
    ),
    r"[^\t]+\t(?:[^\t]*\t){2}": f"a line of a table, as in GFF, SAM or BLAST's; {_CONVERT}",
}
_MEANINGS = tuple(_LINES.values())
_LINE = re.compile("|".join(f"({pattern})" for pattern in _LINES), re.IGNORECASE)

_PIR = frozenset(["P1;", "F1;", "N1;", "D1;", "DL;", "DC;", "RL;", "RC;", "N3;", "XX;"])
# Of HH-suite's alignments; the ends are of PDB's ss.txt and ss_dis.txt.
_STRUCTURES = frozenset(("ss_pred", "ss_conf", "ss_dssp", "sa_dssp"))
_STRUCTURE_ENDS = (":secstr", ":disorder")
SAM = ("@HD\t", "@SQ\t", "@RG\t", "@PG\t", "@CO\t")


def foreign_name(name: str) -> str | None:
    """What a record is, by the first word of its header, if it holds no sequence."""
    if name[:3] in _PIR:
        meaning = f"PIR, whose second line is a description; {_CONVERT}"
    elif name[:1] == ">":
        meaning = (
            "a '>' before another: quoted mail, an alignment by fasta36, or a conflict of two"
            " versions; give FASTA alone"
        )
    elif name in _STRUCTURES or (":" in name and name.endswith(_STRUCTURE_ENDS)):
        meaning = "a structure, in letters that are residues too; remove such records"
    else:
        return None
    return f"not FASTA but {meaning}"


def foreign_line(line: str) -> str | None:
    """What a line without a header is, if it is known to be no sequence."""
    if line.startswith(SAM):
        return f"not FASTA but SAM; {_CONVERT} (samtools fasta)"
    match = _LINE.match(line)
    return match and f"not FASTA but {_MEANINGS[(match.lastindex or 1) - 1]}"
