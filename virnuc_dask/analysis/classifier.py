"""Files of classifiers: scikit-learn objects, saved by skops without pickle, and metadata."""

from __future__ import annotations

import io
import json
import lzma
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask.analysis.outputs import whole_file
from virnuc_dask.errors import UsageError
from virnuc_dask.files import expanded
from virnuc_dask.text import printable

SUFFIX = ".skops"
FORMAT = 2

# All types that a file may contain. The list in skops has all of scikit-learn and more.
_TRUSTED = {
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "str", "int", "float", "bool")),
    "builtins.NoneType",
    *(f"numpy.{name}" for name in ("ndarray", "float64", "float32", "int64", "int32")),
    "numpy.random.mtrand.RandomState",
    "sklearn.pipeline.Pipeline",
    "sklearn.preprocessing._data.StandardScaler",
    "sklearn.preprocessing._label.LabelBinarizer",
    "sklearn.linear_model._logistic.LogisticRegression",
    "sklearn.neural_network._multilayer_perceptron.MLPClassifier",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
}
# Allowed skops loaders: none of them calls a function that the file names.
_LOADERS = {
    *("DictNode", "ListNode", "TupleNode", "JsonNode", "TypeNode", "CachedNode"),
    *("NdArrayNode", "RandomStateNode", "ObjectNode"),
}
# Most bytes of unpacked arrays: a hundred times a perceptron on 5,120 features.
_MOST_BYTES = 2**32
_SCHEMA = "schema.json"
_LONGEST_MODEL = 300
# Errors of skops, zipfile and NumPy for a file that is damaged or of another kind.
_DAMAGED = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError),
    *(AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError, ImportError),
    *(MemoryError, zlib.error, lzma.LZMAError),
)


@dataclass(frozen=True, slots=True)
class Classifier:
    """A classifier of embeddings into two classes, with its metadata.

    Attributes
    ----------
    pipeline : sklearn.pipeline.Pipeline
        Standardises the features, then classifies; class 1 is the first of `classes`.
    about : dict
        JSON values: ``kind``, ``classes``, ``model`` (weights, layer, pooling, precision and
        dimension of its embeddings), ``model_name`` (for display only; older files lack it),
        ``median_length`` (residues of the training rows), ``versions``, and ``training`` (a
        report).
    training_sequences : ndarray, uint64, shape (n,)
        Sorted digests of the sequences of the training rows; see `shortened`.
    """

    pipeline: Any
    about: dict[str, Any]
    training_sequences: NDArray[np.uint64]

    def __call__(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probability of the first class, float32, shape (n,), for embeddings of shape (n, D)."""
        return np.asarray(self.pipeline.predict_proba(embedding)[:, 1], np.float32)

    @property
    def classes(self) -> tuple[str, str]:
        """Names of the classes; scores are probabilities of the first."""
        first, second = self.about["classes"]
        return first, second

    @property
    def held_out_auroc(self) -> float | None:
        """AUROC on the held-out rows; None if the file does not say."""
        training = self.about.get("training")
        embeddings = training.get("embeddings") if isinstance(training, dict) else None
        found = embeddings.get("auroc") if isinstance(embeddings, dict) else None
        return found if isinstance(found, float) and 0 <= found <= 1 else None

    def was_trained_on(self, digests: list[bytes]) -> NDArray[np.bool_]:
        """Whether training rows had the sequences with these digests, shape (n,)."""
        numbers, known = shortened(digests), self.training_sequences
        at = np.minimum(np.searchsorted(known, numbers), len(known) - 1)
        return np.asarray(known[at] == numbers) if len(known) else np.zeros(len(numbers), np.bool_)

    def described_model(self) -> str:
        """The model of its embeddings in one line, like `ModelSpec.described`.

        The text comes from the file and is not trusted, so it is made printable.
        """
        model = self.about["model"]
        parts = [
            str(self.about.get("model_name", "a model without a name")),
            f"weights {str(model.get('weights_sha256'))[:12]}",
            f"layer {model.get('repr_layer')}",
            f"{model.get('pooling')} pooling",
            str(model.get("precision")),
        ]
        return printable(", ".join(parts), _LONGEST_MODEL)

    def digest(self) -> str:
        """SHA-256 of everything that changes scores, hexadecimal.

        This is not the digest of the file, because skops names parts by their memory addresses.
        """
        found = sha256(json.dumps([self.about[name] for name in _DECISIVE]).encode())
        for _, step in self.pipeline.steps:
            for name, value in sorted(vars(step).items()):
                # Parameters, as from `get_params`, and learned values. By scikit-learn's
                # convention, names of other attributes begin with _; they do not change scores.
                if not name.startswith("_"):
                    found.update(name.encode())
                    for part in value if isinstance(value, list) else [value]:
                        is_array = isinstance(part, np.ndarray | np.generic)
                        found.update(part.tobytes() if is_array else repr(part).encode())
        return found.hexdigest()


_DECISIVE = ("kind", "classes", "model")


def save_classifier(classifier: Classifier, path: Path) -> None:
    """Save a classifier in one step, so that no partial file remains; replace an existing file.

    Raises
    ------
    OSError
    """
    from skops.io import dumps

    about = json.dumps({"format": FORMAT, **classifier.about})
    content = dumps(
        {
            "classifier": classifier.pipeline,
            "about": about,
            "training_sequences": classifier.training_sequences,
        }
    )
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


def load_classifier(path: str | Path) -> Classifier:
    """Load a classifier without running any code from the file.

    The list of objects is checked first. The file is refused if the list names a type or a loader
    that a classifier does not need, or if an array declares more values than it has.

    Raises
    ------
    UsageError
        The file does not exist, is not a classifier, or contains types that are not trusted.
    """
    # It imports all of scikit-learn. Errors of an import are not the file's.
    from skops.io import loads

    try:
        # Read the file once, so that the checked bytes are the loaded bytes.
        content = Path(expanded(path)).read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > _MOST_BYTES:
                raise UsageError(f"{path}: {size:,} unpacked bytes are too many for a classifier")
            untrusted = sorted(set(_untrusted(json.loads(archive.read(_SCHEMA)))))
            if untrusted:
                raise UsageError(
                    f"{path}: contains types that are not trusted, and was not loaded:"
                    f" {', '.join(name[:80] for name in untrusted[:5])!r}"
                )
            _check_arrays(archive)
        return _checked(content, loads)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _DAMAGED as error:
        raise UsageError(
            f"{path}: not a classifier that `virnuc-dask train` saved ({type(error).__name__}:"
            f" {str(error)[:200]!r})"
        ) from error


def _untrusted(node: Any) -> Iterator[str]:
    """Types and loaders in the skops list of objects that are not trusted."""
    if isinstance(node, list):
        for each in node:
            yield from _untrusted(each)
    elif isinstance(node, dict):
        if "__loader__" in node:
            loader, name = node["__loader__"], f"{node['__module__']}.{node['__class__']}"
            # A CachedNode refers to an object that was checked before.
            if loader not in _LOADERS or (loader != "CachedNode" and name not in _TRUSTED):
                yield f"{name} ({loader})"
        for each in node.values():
            yield from _untrusted(each)


def _check_arrays(archive: zipfile.ZipFile) -> None:
    """Check that all other entries are arrays of numbers, and that their sizes are true.

    NumPy allocates memory from the header of an array before it reads a value.

    Raises
    ------
    ValueError
        An entry is not such an array. zipfile and NumPy raise their own errors for damage.
    """
    for entry in archive.infolist():
        if entry.filename == _SCHEMA:
            continue
        with archive.open(entry) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("an array has another format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            size = file.tell() + math.prod(shape) * dtype.itemsize
        if dtype.kind not in "fiub" or min(shape, default=0) < 0 or size != entry.file_size:
            raise ValueError(
                f"an array is not of its declared type {str(dtype)[:20]} or shape {str(shape)[:80]}"
            )


def _checked(content: bytes, loads: Callable[..., Any]) -> Classifier:
    with warnings.catch_warnings():
        # `version_note` reports another version of scikit-learn.
        warnings.simplefilter("ignore")
        found = loads(content, trusted=sorted(_TRUSTED))
    about = json.loads(found["about"])
    if about.pop("format") != FORMAT:
        raise ValueError("it comes from another version of this program")
    sequences = found["training_sequences"]
    if sequences.dtype != np.uint64 or sequences.ndim != 1:
        raise ValueError("the digests of its training sequences are of another kind")
    classifier = Classifier(found["classifier"], about, np.unique(sequences))
    names = [type(step).__name__ for _, step in classifier.pipeline.steps]
    if names[0] != "StandardScaler" or names[1:] not in (["LogisticRegression"], ["MLPClassifier"]):
        raise ValueError(f"steps {names}")
    # Check that it returns probabilities.
    score = classifier(np.zeros((1, int(about["model"]["dimension"])), np.float32))
    if score.shape != (1,) or not 0 <= score[0] <= 1:
        raise ValueError("it returns no probabilities")
    if not all(is_class_name(name) for name in classifier.classes):
        raise ValueError("the classes have no names")
    # Check the other values that are used later.
    float(about["median_length"]), about["versions"].get("scikit-learn"), classifier.digest()
    return classifier


def is_class_name(name: object) -> bool:
    """Whether it is printable text that is not empty; it may come from a file."""
    return isinstance(name, str) and bool(name) and printable(name) == name


def versions() -> dict[str, str]:
    """Versions of the packages that train, save and run a classifier."""
    return {name: version(name) for name in ("scikit-learn", "skops", "numpy")}


def shortened(digests: list[bytes]) -> NDArray[np.uint64]:
    """First eight bytes of digests as numbers, uint64, shape (n,)."""
    return np.frombuffer(b"".join(digest[:8] for digest in digests), "<u8").astype(np.uint64)


def version_note(classifier: Classifier) -> str | None:
    """Warning if another version of scikit-learn trained it; else None."""
    there = printable(str(classifier.about["versions"].get("scikit-learn")), 20)
    here = version("scikit-learn")
    if there.split(".")[:2] == here.split(".")[:2]:
        return None
    return (
        f"the classifier was trained with scikit-learn {there}, but this is {here}: scores may"
        " differ"
    )
