"""Recognises other formats that look like FASTA, at its beginning or within it, and names them."""

from __future__ import annotations

import re

GLUED = "a '>' within a line of sequence; is a newline missing before it?"
COMMENT_WITHIN = (
    "a comment within a sequence, or another format's header; begin a record with '>', or remove"
    " the line"
)

_CONVERT = "convert it to FASTA first"
# The first pattern that matches the beginning of a line names its format.
_LINES = {
    r"\d+\t\d+(?:aa|nt), >": (
        "a CD-HIT list of clusters (.clstr); give the FASTA file of representatives beside it"
    ),
    r"\s*<[!?/a-z]": "HTML or XML, perhaps an error page of a failed download; download it again",
    r"<{7}\s": "an unresolved conflict between two versions of a file; resolve it first",
    r"diff -|@@ -|\+>": "a diff; apply it first (patch)",
    r"[@+]": "FASTQ; give each format in a file of its own",
    r"=": "a line of '=', as in XMFA; give the unaligned sequences",
    r"//": f"the end of an entry, as in GenBank, EMBL, UniProt or Stockholm files; {_CONVERT}",
    r"LOCUS {2}": f"GenBank; {_CONVERT}",
    r"ID {3}": f"EMBL or UniProt format; {_CONVERT}",
    r"(?:CLUSTALW?|MUSCLE|PROBCONS) ": f"a Clustal alignment; {_CONVERT}",
    r"#\s*STOCKHOLM\b": f"Stockholm; {_CONVERT}",
    r"#NEXUS\b": f"NEXUS; {_CONVERT}",
    r"#MEGA\b": f"MEGA; {_CONVERT}",
    r"##MAF\b|track .*\bmaf": f"MAF; {_CONVERT}",
    r"##GFF": "GFF; give the part after the line ##FASTA, if there is one",
    r"!!|.*\bMSF:": f"MSF; {_CONVERT}",
    r"[CR];": f"PIR; {_CONVERT}",
    r";": (
        "IntelliGenetics or old FASTA, with headers that begin with ';'; begin them with '>', or"
        " remove the line if it is a comment"
    ),
    r"(?:\s*[-+]?[\d.]*\d(?:E[-+]?\d+)?(?!\S))+\s*$": (
        "a line of numbers, as in quality files (.qual), PHYLIP and matrices; give sequences"
    ),
    r"[ACGT](?=.*\d)[0-3.]{4,}\s*$": f"colour space (csfasta, csfastq); {_CONVERT}",
    r"(?=\S*[\[({<])[\]\[(){}<>.,:_~&|-]+(?!\S)": (
        "an RNA structure in dot-bracket notation; give only sequences"
    ),
    r"\s*(?:Length|Score|initn|Query)(?::|\s*=|\s+\d)": (
        "an alignment printed by BLAST or FASTA; give the unaligned sequences"
    ),
    r"[^\t]+\t(?:[^\t]*\t){2}": f"a line of a table, as in GFF, SAM or BLAST; {_CONVERT}",
}
_MEANINGS = tuple(_LINES.values())
_LINE = re.compile("|".join(f"({pattern})" for pattern in _LINES), re.IGNORECASE)

_PIR = frozenset(["P1;", "F1;", "N1;", "D1;", "DL;", "DC;", "RL;", "RC;", "N3;", "XX;"])
# Record names in HH-suite's alignments. The suffixes are those of PDB's ss.txt and ss_dis.txt.
_STRUCTURES = frozenset(("ss_pred", "ss_conf", "ss_dssp", "sa_dssp"))
_STRUCTURE_ENDS = (":secstr", ":disorder")
SAM = ("@HD\t", "@SQ\t", "@RG\t", "@PG\t", "@CO\t")


def foreign_name(name: str) -> str | None:
    """Name a record's format, if the first word of its header shows that it is not FASTA."""
    if name[:3] in _PIR:
        meaning = f"PIR, with a description as the second line; {_CONVERT}"
    elif name[:1] == ">":
        meaning = (
            "a '>' before another '>': quoted mail, an alignment by fasta36, or a conflict between"
            " two versions; give only FASTA"
        )
    elif name in _STRUCTURES or (":" in name and name.endswith(_STRUCTURE_ENDS)):
        meaning = "a structure, written in letters that are also residues; remove such records"
    else:
        return None
    return f"not FASTA but {meaning}"


def foreign_line(line: str) -> str | None:
    """Name a line's format, if the line is known to be neither a header nor a sequence."""
    if line.startswith(SAM):
        return f"not FASTA but SAM; {_CONVERT} (samtools fasta)"
    match = _LINE.match(line)
    return match and f"not FASTA but {_MEANINGS[(match.lastindex or 1) - 1]}"
