"""What a run is made of: the settings that change row values, and those that do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import Any, Literal, get_args

from virnuc_dask.errors import UsageError

Pooling = Literal["mean", "bos", "max"]
LongPolicy = Literal["truncate", "window", "skip"]
Precision = Literal["float32", "bfloat16", "float16"]
StoredDtype = Literal["float32", "float16"]

FrameRule = Literal["open", "orf", "virnucpro"]
Molecule = Literal["auto", "protein", "nucleotide"]
Metric = Literal["cosine", "euclidean"]
ClassifierKind = Literal["logistic", "mlp"]
Consensus = Literal["max", "mean", "virnucpro"]

POOLINGS: tuple[str, ...] = get_args(Pooling)
LONG_POLICIES: tuple[str, ...] = get_args(LongPolicy)
PRECISIONS: tuple[str, ...] = get_args(Precision)
FRAME_RULES: tuple[str, ...] = get_args(FrameRule)
MOLECULES: tuple[str, ...] = get_args(Molecule)
METRICS: tuple[str, ...] = get_args(Metric)
CLASSIFIERS: tuple[str, ...] = get_args(ClassifierKind)
CONSENSUS: tuple[str, ...] = get_args(Consensus)
MIN_WINDOW = 30
# A record of so many nucleotides has hardly a frame without a stop, unless it is within a gene.
CONTIG_NUCLEOTIDES = 1_000
AUTO: Literal["auto"] = "auto"
STORED_DTYPES: tuple[str, ...] = get_args(StoredDtype)

FORMAT = 1


class Status(IntEnum):
    """State of a row. Every row ends in exactly one; from 16 on it is quarantined.

    A quarantined row has an embedding of NaN; the name is the reason.
    """

    PENDING = 0
    EMBEDDED = 1
    TRUNCATED = 2
    WINDOWED = 3
    INVALID_RESIDUES = 16
    EMPTY = 17
    TOO_LONG = 18
    OUT_OF_MEMORY = 19
    NON_FINITE = 20
    CRASHED_WORKER = 21
    ENCODER_ERROR = 22
    TIMED_OUT = 23

    @property
    def quarantined(self) -> bool:
        """Whether a row in this state has no embedding and never will."""
        return self >= Status.INVALID_RESIDUES

    @property
    def meaning(self) -> str:
        """Name as in the store's ``flag_meanings``."""
        return self.name.lower()


# A model of random weights that needs no download, for trying the pipeline. Never for science.
DEMO = "demo"
RANDOM_WEIGHTS = "random weights: these embeddings mean nothing"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which embedding a model gives: all that a worker needs to load it and use it.

    Attributes
    ----------
    reference : str
        ``demo``, a fair-esm name such as ``esm2_t6_8M_UR50D``, or the path of weights.
    weights_sha256 : str
        Digest of the weights; a worker that finds others refuses them.
    dimension : int
        Features per embedding, D.
    repr_layer : int
        Layer whose representation is pooled, counted from 1; 0 is the token embedding.
    pooling : {'mean', 'bos', 'max'}
        Mean or maximum over residues (BOS and EOS excluded), or the BOS token.
    precision : {'float32', 'bfloat16', 'float16'}
        Arithmetic of the encoder's matrix products; all else on a CPU is float32.
    """

    reference: str
    weights_sha256: str
    dimension: int
    repr_layer: int
    pooling: Pooling = "mean"
    precision: Precision = "float32"

    @property
    def has_random_weights(self) -> bool:
        """Whether this is the demo model, whose embeddings mean nothing."""
        return self.reference == DEMO

    def comment(self) -> dict[str, str]:
        """A word of warning about random weights, for JSON; none about any other weights."""
        return {"comment": RANDOM_WEIGHTS} if self.has_random_weights else {}

    def described(self, device: str) -> str:
        """All that a person should know of it, in a line.

        Parameters
        ----------
        device : str
            On which it computes; empty if that is not known.
        """
        weights = (
            f"weights {self.weights_sha256[:12]}" if self.weights_sha256 else "weights not here yet"
        )
        random = f" ({RANDOM_WEIGHTS})" if self.has_random_weights else ""
        parts = [self.reference + random, weights, f"layer {self.repr_layer}"]
        parts.append(f"{self.pooling} pooling")
        parts.append(f"{self.precision} on {device}" if device else self.precision)
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that changes the value of a row. A store has one; a run must agree with it."""

    format: int
    input_sha256: str
    records: int
    weights_sha256: str
    repr_layer: int
    pooling: Pooling
    precision: Precision
    dtype: StoredDtype
    alphabet: str
    max_residues: int
    long: LongPolicy
    rows_per_chunk: int
    per_residue: bool
    translation: str | None = None
    tiling: str | None = None

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Identity:
        """Rebuild an identity from a store's attributes; unknown or missing fields are an error."""
        names = {field.name for field in fields(cls)}
        # Stores from before there was translation are of proteins, and older ones than tiles whole.
        if {"translation", "tiling", *document} != names:
            odd = sorted(set(document) ^ names)
            raise UsageError(f"the store's identity has unknown or missing fields: {odd}")
        return cls(**document)

    def to_json(self) -> dict[str, Any]:
        """The identity as plain JSON values."""
        return asdict(self)

    def differences(self, other: Identity) -> list[tuple[str, object, object]]:
        """Fields in which `other` differs, as (field, this value, other's value)."""
        mine, theirs = asdict(self), asdict(other)
        return [(name, mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True, slots=True)
class Translation:
    """How nucleotides become proteins.

    Attributes
    ----------
    rule : {'open', 'orf', 'virnucpro'}
        ``open``: frames without a stop but at the end. ``orf``: every stretch between stops.
        ``virnucpro``: as that program does, to the byte.
    window : int, optional
        Nucleotides at once; None: whole records.
    genetic_code : int
        NCBI's number of the table.
    min_residues : int
        Shorter proteins are left out; not with ``virnucpro``.
    max_unknown : float
        Proteins with a larger share of X are left out; not with ``virnucpro``.
    """

    rule: FrameRule = "open"
    window: int | None = None
    genetic_code: int = 1
    min_residues: int = 20
    max_unknown: float = 0.1

    def __post_init__(self) -> None:
        if self.rule not in FRAME_RULES:
            raise UsageError(f"frames must be one of {', '.join(FRAME_RULES)}, not {self.rule!r}")
        if self.window is not None and self.window < MIN_WINDOW:
            raise UsageError(f"window must be at least {MIN_WINDOW} nucleotides, not {self.window}")
        if self.rule == "virnucpro" and self.window is None:
            raise UsageError("frames virnucpro needs a window, of 300 or 500 there")
        if self.rule == "orf" and self.window is not None:
            # The same stretch would be found in two windows, and cut by a third.
            raise UsageError("frames orf takes whole records; leave out the window")
        if self.rule == "virnucpro" and self.genetic_code != 1:
            raise UsageError(f"frames virnucpro has genetic code 1, not {self.genetic_code}")
        if self.min_residues < 1:
            raise UsageError(f"min_residues must be at least 1, not {self.min_residues}")
        if not 0 <= self.max_unknown <= 1:
            raise UsageError(f"max_unknown must be a share from 0 to 1, not {self.max_unknown}")

    def __str__(self) -> str:
        """All that decides rows, for a store's identity."""
        if self.rule == "virnucpro":
            return f"six-frame; virnucpro; window {self.window}"
        return (
            f"six-frame; {self.rule}; window {self.window or 'none'}; code {self.genetic_code};"
            f" at least {self.min_residues} residues; at most {self.max_unknown:g} unknown"
        )


@dataclass(frozen=True, slots=True)
class Tiling:
    """How proteins, or the proteins of frames, are cut into tiles, each of which is a row.

    Attributes
    ----------
    size : int
        Residues of a tile; a shorter protein is one tile.
    step : int, optional
        Residues from the start of one tile to that of the next; the last tile begins where it ends
        with the protein. Default: half of `size`. Then any fragment of `size` residues has three
        quarters of them in common with some tile.
    """

    size: int
    step: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"tiles must have at least 1 residue, not {self.size}")
        if not 1 <= self.stride <= self.size:
            raise UsageError(
                f"the step from tile to tile must be 1 to {self.size} residues, so that none is"
                f" left out, not {self.stride}"
            )

    @property
    def stride(self) -> int:
        """The step, given or not."""
        return max(1, self.size // 2) if self.step is None else self.step

    def __str__(self) -> str:
        """All that decides rows, for a store's identity."""
        return f"{self.size} residues, step {self.stride}"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user chooses that changes row values, or where one chunk ends and the next begins.

    Attributes
    ----------
    model : str
        A fair-esm name, the path of weights, or ``demo`` (random weights). There is no default.
    pooling : {'mean', 'bos', 'max'}
    repr_layer : int, optional
        Layer to pool; 0 is the token embedding. Default: the last.
    precision : {'auto', 'float32', 'bfloat16', 'float16'}
        Arithmetic of the matrix products; ``auto`` is what the store has, and for a new one
        float32 on a CPU and float16 on a GPU.
    dtype : {'float32', 'float16'}
        Of the stored embeddings.
    max_residues : int
        Residues of a sequence that are encoded at once.
    long : {'truncate', 'window', 'skip'}
        What becomes of longer sequences.
    rows_per_chunk : int, optional
        Rows that are computed and saved together. Default: what the store has; for a new one see
        `models.Estimate.rows_per_chunk`.
    per_residue : bool
        Store the representation of each residue too, as float16.
    translation : Translation, optional
        The input is of nucleotides, and this is how they become proteins.
    tiling : Tiling, optional
        How the proteins are cut into tiles; default: each is one row.
    molecule : {'auto', 'protein', 'nucleotide'}
        What the input is; ``auto`` refuses what does not look like what it should be.
    strict : bool
        Refuse an input that has a letter which is no residue.
    """

    model: str
    pooling: Pooling = "mean"
    repr_layer: int | None = None
    precision: Precision | Literal["auto"] = AUTO
    dtype: StoredDtype = "float32"
    max_residues: int = 1022
    long: LongPolicy = "truncate"
    rows_per_chunk: int | None = None
    per_residue: bool = False
    translation: Translation | None = None
    tiling: Tiling | None = None
    molecule: Molecule = AUTO
    strict: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("pooling", POOLINGS),
            ("precision", (AUTO, *PRECISIONS)),
            ("dtype", STORED_DTYPES),
            ("long", LONG_POLICIES),
            ("molecule", MOLECULES),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        if self.strict and self.translation:
            raise UsageError("strict is for proteins; letters of nucleotides are never refused")
        if self.tiling and self.translation and self.translation.rule == "virnucpro":
            # Codons that it leaves out would leave a tile without a place in its record.
            raise UsageError("tiles are for frames open and orf, not for virnucpro's")
        if self.max_residues < 1:
            raise UsageError(f"max_residues must be at least 1, not {self.max_residues}")
        if self.rows_per_chunk is not None and not 1 <= self.rows_per_chunk <= 10_000:
            raise UsageError(f"rows_per_chunk must be 1 to 10,000, not {self.rows_per_chunk}")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Operational settings. None of them changes a row, so none is part of the identity.

    Attributes
    ----------
    attempts : int
        How often a chunk is tried that meets a transient error, such as of I/O, before it is left
        missing. Any other error is tried twice.
    backoff : float
        Seconds before the second attempt, about; doubled before each further one.
    suspect_after : int
        At how many deaths of workers a chunk that they were computing is computed in a process of
        its own, to find out whether one of its rows kills.
    deadline_factor : float
        How many times as long as usual an attempt may take before the chunk is taken elsewhere and
        the worker replaced. Usual is the running median, per residue.
    deadline_floor : float
        Seconds that any attempt may take.
    deadline_first : float, optional
        Seconds that an attempt may take while too few chunks are done to know what is usual, and
        that a worker may take to load the model. Default: by the model's size and the device.
    grace : float
        Seconds that running chunks get to finish after SIGINT or SIGTERM.
    in_flight : int, optional
        Chunks handed to the scheduler at once; default: one for each worker thread. Tasks that
        only wait on a worker die with it, so a longer queue buys nothing.
    verify : bool
        Decode every chunk that is already present before trusting it.
    device : str
        Torch device that the workers compute on; ``auto``: a GPU with ``local-cuda``, else a CPU.
    shard : str, optional
        ``i/n``: of the store's chunks only every n-th, beginning with the i-th, counted from 1, so
        that n runs share the work of one store with no contact. ``slurm``: i and n are those of
        the SLURM array job that this process is a task of.
    performance_report : str, optional
        HTML file for Dask's own report of the run.
    tls_ca_file, tls_cert, tls_key : str, optional
        For a scheduler at ``tls://``: PEM files of the authority to trust, and of this client's
        certificate and key. Default: what Dask's own configuration says.
    """

    attempts: int = 3
    backoff: float = 1.0
    suspect_after: int = 2
    deadline_factor: float = 20.0
    deadline_floor: float = 60.0
    deadline_first: float | None = None
    grace: float = 30.0
    in_flight: int | None = None
    verify: bool = False
    device: str = AUTO
    shard: str | None = None
    performance_report: str | None = None
    tls_ca_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    def __post_init__(self) -> None:
        least = {"attempts": 1, "suspect_after": 1, "in_flight": 1, "deadline_factor": 1}
        for name in (
            "attempts",
            "backoff",
            "suspect_after",
            "deadline_factor",
            "deadline_floor",
            "deadline_first",
            "grace",
            "in_flight",
        ):
            value, bound = getattr(self, name), least.get(name, 0)
            if value is not None and not value >= bound:
                raise UsageError(f"{name} must be at least {bound}, not {value}")


@dataclass(frozen=True, slots=True)
class Shard:
    """A share of a store's chunks: every `count`-th, from the `index`-th on, counted from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str | None, environment: Mapping[str, str]) -> Shard:
        """Read ``3/16``, or ``slurm`` with the environment of an array job's task.

        Raises
        ------
        UsageError
            Neither, or an index outside its range.
        """
        if text is None:
            return cls()
        try:
            if text == "slurm":
                names = ("TASK_ID", "TASK_MIN", "TASK_STEP", "TASK_COUNT")
                task, first, step, count = (int(environment[f"SLURM_ARRAY_{n}"]) for n in names)
                index = (task - first) // step + 1
            else:
                index, count = map(int, text.split("/"))
        except KeyError as error:
            raise UsageError(f"shard slurm: this is no task of an array job: no {error}") from error
        except ValueError as error:
            raise UsageError(f"shard {text!r}: neither such as 3/16 nor slurm") from error
        if not 1 <= index <= count:
            raise UsageError(f"shard {index}/{count}: the first must be 1 to {count}")
        return cls(index, count)

    def holds(self, chunk: int) -> bool:
        """Whether a chunk is of this share."""
        return chunk % self.count == self.index - 1


def precision_on(device: str, precision: Precision | Literal["auto"]) -> Precision:
    """A precision that a device has; ``auto`` is the fastest that kept every cosine above 0.999.

    That was measured with real weights of an 8M model. On a GPU it is float16, in which ESM-2 was
    trained (facebookresearch/esm, issue 259); bfloat16 fell to 0.998. Rows that float16 cannot hold
    are computed in float32.

    Raises
    ------
    UsageError
        The device does not have it.
    """
    on_cpu = device.partition(":")[0] == "cpu"
    if precision == "auto":
        return "float32" if on_cpu else "float16"
    if precision == "float16" and on_cpu:
        raise UsageError("precision float16 is for GPUs; a CPU has float32 and bfloat16")
    return precision
