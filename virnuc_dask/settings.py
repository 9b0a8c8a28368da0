"""Settings of a run: those that change row values, and those that do not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import IntEnum
from pathlib import Path
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
# A longer record outside a gene rarely has a frame without a stop codon.
CONTIG_NUCLEOTIDES = 1_000
AUTO: Literal["auto"] = "auto"
STORED_DTYPES: tuple[str, ...] = get_args(StoredDtype)

FORMAT = 1


class Status(IntEnum):
    """Status of a row. Each row ends with exactly one; codes from 16 on mean quarantined.

    The embedding of a quarantined row is NaN; the name of the status is the reason.
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
        """Whether a row with this status has no embedding."""
        return self >= Status.INVALID_RESIDUES

    @property
    def meaning(self) -> str:
        """Name of the status in the store's ``flag_meanings``."""
        return self.name.lower()


# A model with random weights. It needs no download and is for trying the pipeline, never science.
DEMO = "demo"
RANDOM_WEIGHTS = "random weights: these embeddings mean nothing"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model, its layer and its pooling: all that a worker needs to compute embeddings.

    Attributes
    ----------
    reference : str
        ``demo``, a fair-esm name such as ``esm2_t6_8M_UR50D``, or the path of weights.
    weights_sha256 : str
        Digest of the weights; workers refuse weights with another digest.
    dimension : int
        Features per embedding, D.
    repr_layer : int
        Layer to pool, counted from 1; 0 is the token embedding.
    pooling : {'mean', 'bos', 'max'}
        Mean or maximum over residues (BOS and EOS excluded), or the BOS token.
    precision : {'float32', 'bfloat16', 'float16'}
        Precision of the encoder's matrix products; on a CPU everything else is float32.
    """

    reference: str
    weights_sha256: str
    dimension: int
    repr_layer: int
    pooling: Pooling = "mean"
    precision: Precision = "float32"

    @property
    def name(self) -> str:
        """Last part of `reference`, which names no folder of the machine that computed."""
        return Path(self.reference).name or self.reference

    @property
    def has_random_weights(self) -> bool:
        """Whether this is the demo model, whose embeddings mean nothing."""
        return self.reference == DEMO

    def comment(self) -> dict[str, str]:
        """Warning about random weights, as a JSON field; empty for other weights."""
        return {"comment": RANDOM_WEIGHTS} if self.has_random_weights else {}

    def described(self, device: str) -> str:
        """Describe the model in one line for people.

        Parameters
        ----------
        device : str
            Device that computes; empty if it is not known.
        """
        weights = (
            f"weights {self.weights_sha256[:12]}"
            if self.weights_sha256
            else "weights not yet downloaded"
        )
        random = f" ({RANDOM_WEIGHTS})" if self.has_random_weights else ""
        parts = [self.reference + random, weights, f"layer {self.repr_layer}"]
        parts.append(f"{self.pooling} pooling")
        parts.append(f"{self.precision} on {device}" if device else self.precision)
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that changes row values. A store has one identity; a run must have the same."""

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
        # Stores from before translation hold proteins; stores from before tiling hold whole ones.
        if {"translation", "tiling", *document} != names:
            unexpected = sorted(set(document) ^ names)
            raise UsageError(f"the store's identity has unknown or missing fields: {unexpected}")
        return cls(**document)

    def to_json(self) -> dict[str, Any]:
        """The identity as plain JSON values."""
        return asdict(self)

    def differences(self, other: Identity) -> list[tuple[str, object, object]]:
        """Fields that differ from `other`, as (field, this value, other's value)."""
        mine, theirs = asdict(self), asdict(other)
        return [(name, mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True, slots=True)
class Option:
    """What a setting means and what it may be: checks and command-line options are made from it.

    Attributes
    ----------
    help : str
        One sentence for the command line; empty: only Python can change the setting.
    choices : tuple of str
        Allowed values; empty: any.
    least, most : int, optional
        Bounds of a number, inclusive.
    unset : str, optional
        What the default None stands for.
    is_rare : bool
        Whether few people need it; the help lists it last.
    """

    help: str = ""
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None
    unset: str | None = None
    is_rare: bool = False


def _option(help_text: str = "", default: Any = MISSING, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(help_text, **more)})


def options_of(settings: Any) -> dict[str, Option]:
    """Options of a settings class or object, by field, in their order."""
    return {
        each.name: each.metadata["option"] for each in fields(settings) if "option" in each.metadata
    }


def _check(settings: Any) -> None:
    """Check each value against its option.

    Raises
    ------
    UsageError
    """
    for name, option in options_of(settings).items():
        value = getattr(settings, name)
        if option.choices and value not in option.choices:
            allowed = ", ".join(option.choices)
            raise UsageError(f"{name} must be one of {allowed}, not {value!r}")
        if value is None or option.least is None:
            continue
        most = math.inf if option.most is None else option.most
        if not option.least <= value <= most:  # also NaN
            is_open = option.most is None
            bounds = f"at least {option.least:,}" if is_open else f"{option.least:,} to {most:,}"
            raise UsageError(f"{name} must be {bounds}, not {value}")


@dataclass(frozen=True, slots=True)
class Translation:
    """How nucleotide sequences are translated into proteins.

    Attributes
    ----------
    frames : {'open', 'orf', 'virnucpro'}
        ``open``: frames whose only stop codon, if any, is the last codon. ``orf``: each stretch
        between stop codons. ``virnucpro``: the same bytes as the program VirNucPro.
    window : int, optional
        Nucleotides per window; None: whole records.
    genetic_code : int
        Number of the NCBI translation table.
    min_residues : int
        Shorter proteins are left out; no effect with ``virnucpro``.
    max_unknown : float
        Proteins with a larger fraction of X are left out; no effect with ``virnucpro``.
    """

    frames: FrameRule = _option(
        "open: frames without a stop before their end; orf: every stretch between stops;"
        " virnucpro: as VirNucPro does.",
        "open",
        choices=FRAME_RULES,
    )
    window: int | None = _option(
        "Nucleotides at once, such as VirNucPro's 300 or 500, or none: whole records.",
        None,
        least=MIN_WINDOW,
    )
    genetic_code: int = _option("Number of the NCBI translation table.", 1, is_rare=True)
    min_residues: int = _option(
        "Leave out shorter proteins; not with virnucpro.", 20, least=1, is_rare=True
    )
    max_unknown: float = _option(
        "Leave out proteins with a larger fraction of X; not with virnucpro.",
        0.1,
        least=0,
        most=1,
        is_rare=True,
    )

    def __post_init__(self) -> None:
        _check(self)
        if self.frames == "virnucpro" and self.window is None:
            raise UsageError("frames virnucpro needs a window; VirNucPro uses 300 or 500")
        if self.frames == "orf" and self.window is not None:
            # Two windows would contain the same stretch, and a third would cut it.
            raise UsageError("frames orf needs whole records; leave out the window")
        if self.frames == "virnucpro" and self.genetic_code != 1:
            raise UsageError(f"frames virnucpro needs genetic code 1, not {self.genetic_code}")

    def __str__(self) -> str:
        """All values that change rows, as text for a store's identity."""
        if self.frames == "virnucpro":
            return f"six-frame; virnucpro; window {self.window}"
        return (
            f"six-frame; {self.frames}; window {self.window or 'none'}; code {self.genetic_code};"
            f" at least {self.min_residues} residues; at most {self.max_unknown:g} unknown"
        )


@dataclass(frozen=True, slots=True)
class Tiling:
    """How proteins, or proteins translated from frames, are cut into tiles. Each tile is a row.

    Attributes
    ----------
    size : int
        Residues per tile; a shorter protein is one tile.
    step : int, optional
        Residues from the start of one tile to the start of the next. The last tile ends at the end
        of the protein. Default: half of `size`; then any fragment of `size` residues shares three
        quarters of its residues with some tile.
    """

    size: int = _option("Cut proteins, or frames, into tiles of this many residues.", least=1)
    step: int | None = _option(
        "Residues from the start of one tile to the start of the next.",
        None,
        least=1,
        unset="half a tile",
        is_rare=True,
    )

    def __post_init__(self) -> None:
        _check(self)
        if not 1 <= self.stride <= self.size:
            raise UsageError(
                f"the tile step must be 1 to {self.size} residues, not {self.stride}; a larger"
                " step would leave out residues"
            )

    @property
    def stride(self) -> int:
        """The step, or its default."""
        return max(1, self.size // 2) if self.step is None else self.step

    def __str__(self) -> str:
        """All values that change rows, as text for a store's identity."""
        return f"{self.size} residues, step {self.stride}"


SIX_FRAME = "six-frame"
# Options that make a `Translation`, and those that make a `Tiling`, with its fields.
TRANSLATION_OPTIONS = ("frames", "window", "genetic_code", "min_residues", "max_unknown")
TILING_OPTIONS = {"tile": "size", "tile_step": "step"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings that change row values or the division of rows into chunks.

    Attributes
    ----------
    model : str
        A fair-esm name, the path of weights, or ``demo`` (random weights). There is no default.
    pooling : {'mean', 'bos', 'max'}
        Mean or maximum over residues, or the BOS token.
    repr_layer : int, optional
        Layer to pool; 0 is the token embedding. Default: the last layer.
    precision : {'auto', 'float32', 'bfloat16', 'float16'}
        Precision of the matrix products. ``auto``: the store's precision; for a new store,
        float32 on a CPU and float16 on a GPU.
    dtype : {'float32', 'float16'}
        Data type of the stored embeddings.
    max_residues : int
        Most residues that the encoder takes at once.
    long : {'truncate', 'window', 'skip'}
        How longer sequences are handled.
    rows_per_chunk : int, optional
        Rows that are computed and saved together. Default: the store's number; for a new store,
        see `models.Estimate.rows_per_chunk`.
    per_residue : bool
        Also store the representation of each residue, as float16.
    translation : Translation, optional
        How the nucleotides of the input are translated. Default: the input is proteins.
    tiling : Tiling, optional
        How the proteins are cut into tiles. Default: each protein is one row.
    molecule : {'auto', 'protein', 'nucleotide'}
        Type of the input; ``auto`` refuses input that does not look like the expected type.
    strict : bool
        Refuse input that contains a letter that is not a residue.
    """

    model: str = _option(
        "A fair-esm name such as esm2_t33_650M_UR50D, a .pt file, a Hugging Face directory, or demo"
        " (random weights, for trying the pipeline).  [required]"
    )
    pooling: Pooling = _option(
        "Mean or maximum over residues, or the BOS token.", "mean", choices=POOLINGS
    )
    repr_layer: int | None = _option("Layer to pool, from 1.", None, unset="the last")
    precision: Precision | Literal["auto"] = _option(
        "Precision of the matrix products. auto: the store's; else float32 on a CPU, float16 on a"
        " GPU.",
        AUTO,
        choices=(AUTO, *PRECISIONS),
    )
    dtype: StoredDtype = _option(
        "Data type of the stored embeddings.", "float32", choices=STORED_DTYPES
    )
    max_residues: int = _option(
        "Most residues that the encoder takes at once.", 1022, least=1, is_rare=True
    )
    long: LongPolicy = _option(
        "Longer sequences: truncate, cover by overlapping windows, or quarantine.",
        "truncate",
        choices=LONG_POLICIES,
    )
    rows_per_chunk: int | None = _option(
        "Rows that are computed and saved together.",
        None,
        least=1,
        most=10_000,
        unset="what takes up to 40 s",
    )
    per_residue: bool = _option("Also store each residue's embedding, as float16.", False)
    translation: Translation | None = None
    tiling: Tiling | None = None
    molecule: Molecule = _option(
        "What the input is, if it does not look like it.", AUTO, choices=MOLECULES, is_rare=True
    )
    strict: bool = _option(
        "Refuse input that contains letters that are not residues.", False, is_rare=True
    )

    def __post_init__(self) -> None:
        _check(self)
        if self.strict and self.translation:
            raise UsageError("strict is for proteins; nucleotide letters are never refused")
        if self.tiling and self.translation and self.translation.frames == "virnucpro":
            # This rule leaves out codons, so a tile would have no exact position in its record.
            raise UsageError("tiles work with frames open and orf, not with frames virnucpro")

    @classmethod
    def of(cls, **options: Any) -> Settings:
        """Make settings from fields, or from options named as on the command line.

        Parameters
        ----------
        **options
            Fields of this class. Instead of `translation`: ``translate="six-frame"``, with
            ``frames``, ``window``, ``genetic_code``, ``min_residues`` and ``max_unknown``, if they
            are not to have their defaults. Instead of `tiling`: ``tile``, with ``tile_step``. None
            of these, or None, means the default.

        Raises
        ------
        UsageError
            An option does not exist, lacks the one that it belongs to, or has a wrong value.
        """
        translate = options.pop("translate", None)
        names = (*TRANSLATION_OPTIONS, *TILING_OPTIONS)
        given = {n: v for n in names if (v := options.pop(n, None)) is not None}
        for_translation = {n: given[n] for n in TRANSLATION_OPTIONS if n in given}
        for_tiling = {n: given[n] for n in TILING_OPTIONS if n in given}
        if unknown := sorted(options.keys() - {each.name for each in fields(cls)}):
            raise UsageError(f"there is no setting {', '.join(unknown)}")
        if translate not in (None, SIX_FRAME):
            raise UsageError(f"translate must be {SIX_FRAME}, not {translate!r}")
        if for_translation and not translate:
            raise UsageError(f"{next(iter(for_translation))} requires translate {SIX_FRAME}")
        if "tile_step" in for_tiling and "tile" not in for_tiling:
            raise UsageError("tile_step requires tile")
        for name, flat in (("translation", translate), ("tiling", for_tiling)):
            if flat and options.get(name):
                raise UsageError(f"give {name}, or the options that make one, not both")
        if translate:
            options["translation"] = Translation(**for_translation)
        if for_tiling:
            options["tiling"] = Tiling(**{TILING_OPTIONS[n]: v for n, v in for_tiling.items()})
        return cls(**options)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Operational settings. They do not change rows, so they are not part of the identity.

    `suspect_after`, `deadline_factor` and `in_flight` are not options of the command line.

    Attributes
    ----------
    attempts : int
        Most attempts at a chunk after transient errors, such as I/O errors; then the chunk stays
        missing. After any other error a chunk has at most two attempts.
    backoff : float
        Approximate seconds before the second attempt; doubled before each further attempt.
    suspect_after : int
        Worker deaths after which the chunk that they were computing is computed in a separate
        process, to find out whether one of its rows kills the worker.
    deadline_factor : float
        An attempt may take this many times the usual time, the running median per residue. Then
        the chunk goes to another worker and the hanging worker is replaced.
    deadline_floor : float
        Seconds that any attempt may take.
    deadline_first : float, optional
        Seconds that an attempt may take while too few chunks are done to know the usual time.
        A worker may also take this long to load the model. Default: depends on the model's size
        and the device.
    grace : float
        Seconds that running chunks have to finish after SIGINT or SIGTERM.
    in_flight : int, optional
        Chunks submitted to the scheduler at once; default: one per worker thread. A longer queue
        gains nothing, because tasks that wait on a worker are lost when it dies.
    verify : bool
        Decode each chunk that is already present before trusting it.
    device : str
        Torch device of the workers; ``auto``: a GPU with ``local-cuda``, otherwise a CPU.
    shard : str, optional
        ``i/n``: compute only every n-th chunk, starting with the i-th, counted from 1. So n runs
        share the work of one store without communication. ``slurm``: take i and n from the SLURM
        array job of this process.
    performance_report : str, optional
        HTML file for Dask's performance report of the run.
    tls_ca_file, tls_cert, tls_key : str, optional
        PEM files for a ``tls://`` scheduler: the certificate authority to trust, and this
        client's certificate and key. Default: from Dask's configuration.
    """

    device: str = _option(
        "Torch device of the workers. auto: cuda with local-cuda, else cpu.", AUTO
    )
    shard: str | None = _option(
        "i/n: compute every n-th chunk, from the i-th on; other runs on the same store do the rest."
        " slurm: as the array job says.",
        None,
    )
    attempts: int = _option(
        "Attempts at a chunk after transient errors, such as I/O errors.", 3, least=1, is_rare=True
    )
    backoff: float = _option(
        "Seconds before the second attempt; doubled before each further one.",
        1.0,
        least=0,
        is_rare=True,
    )
    suspect_after: int = _option(default=2, least=1)
    deadline_factor: float = _option(default=20.0, least=1)
    deadline_floor: float = _option("Seconds that any chunk may take.", 60.0, least=0, is_rare=True)
    deadline_first: float | None = _option(
        "Seconds that a chunk may take before a median is known, and a worker to load the model.",
        None,
        least=0,
        unset="by the model's size and the device",
        is_rare=True,
    )
    grace: float = _option(
        "Seconds from SIGINT or SIGTERM to the end.", 30.0, least=0, is_rare=True
    )
    in_flight: int | None = _option(default=None, least=1)
    verify: bool = _option("Decode present chunks before trusting them.", False, is_rare=True)
    performance_report: str | None = _option(
        "HTML file for Dask's own report of the run.", None, is_rare=True
    )
    tls_ca_file: str | None = _option(
        "For tls:// addresses: the authority to trust, PEM.", None, is_rare=True
    )
    tls_cert: str | None = _option("This client's certificate, PEM.", None, is_rare=True)
    tls_key: str | None = _option("The key of --tls-cert, PEM.", None, is_rare=True)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class Shard:
    """A share of a store's chunks: every `count`-th, starting with the `index`-th, from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str | None, environment: Mapping[str, str]) -> Shard:
        """Read a share such as ``3/16``; ``slurm`` takes it from the environment of an array task.

        Raises
        ------
        UsageError
            The text is neither, or the index is out of range.
        """
        if text is None:
            return cls()
        try:
            if text == "slurm":
                names = ("TASK_ID", "TASK_MIN", "TASK_STEP", "TASK_COUNT")
                task, first, step, count = (int(environment[f"SLURM_ARRAY_{n}"]) for n in names)
                index, rest = divmod(task - first, step)
                index += 1
                if rest or index > count:
                    raise UsageError(
                        f"shard slurm: task {task} is of an array with gaps, so its share is not"
                        " known; give --array a range or a stride, such as 1-16 or 0-30:2"
                    )
            else:
                index, count = map(int, text.split("/"))
        except KeyError as error:
            raise UsageError(
                f"shard slurm: this process is not a task of an array job: {error} is not set"
            ) from error
        except ValueError as error:
            where = " (SLURM_ARRAY_TASK_…)" if text == "slurm" else ""
            problem = f"shard {text!r}: not numbers{where}; give a share such as 3/16, or slurm"
            raise UsageError(problem) from error
        if not 1 <= index <= count:
            raise UsageError(f"shard {index}/{count}: the first number must be 1 to {count}")
        return cls(index, count)

    def holds(self, chunk: int) -> bool:
        """Whether a chunk belongs to this share."""
        return chunk % self.count == self.index - 1


def precision_on(device: str, precision: Precision | Literal["auto"]) -> Precision:
    """Resolve and check a precision; ``auto`` is the fastest that kept all cosines above 0.999.

    The cosines were measured with the real weights of the 8M model. On a GPU ``auto`` is float16,
    the precision that ESM-2 was trained in (facebookresearch/esm, issue 259); bfloat16 fell to
    0.998. Rows that overflow float16 are computed in float32.

    Raises
    ------
    UsageError
        The device does not support the precision.
    """
    on_cpu = device.partition(":")[0] == "cpu"
    if precision == "auto":
        return "float32" if on_cpu else "float16"
    if precision == "float16" and on_cpu:
        raise UsageError("precision float16 needs a GPU; on a CPU use float32 or bfloat16")
    return precision
