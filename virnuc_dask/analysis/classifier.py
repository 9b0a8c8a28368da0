"""A classifier's file: scikit-learn's objects, saved by skops without pickle, and what they are."""

from __future__ import annotations

import io
import json
import lzma
import math
import warnings
import zipfile
import zlib
from collections.abc import Iterator
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
FORMAT = 1

# All that may be in a file. skops has a list of its own, of all of scikit-learn and more.
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
# How they may be built: none of these calls a function that the file names.
_LOADERS = {
    *("DictNode", "ListNode", "TupleNode", "JsonNode", "TypeNode", "CachedNode"),
    *("NdArrayNode", "RandomStateNode", "ObjectNode"),
}
# Of arrays, unpacked: a hundred times a perceptron on embeddings of 5,120 features.
_MOST_BYTES = 2**32
_SCHEMA = "schema.json"
_LONGEST_MODEL = 300
# What skops, zipfile and NumPy raise of a file that is damaged, or something else.
_DAMAGED = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError),
    *(AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError, ImportError),
    *(MemoryError, zlib.error, lzma.LZMAError),
)


@dataclass(frozen=True, slots=True)
class Classifier:
    """A classifier of embeddings into two classes, with what it was made of.

    Attributes
    ----------
    pipeline : sklearn.pipeline.Pipeline
        Standardises, then classifies; class 1 is the first of `classes`.
    about : dict
        JSON values: ``kind``, ``classes``, ``model`` (weights, layer, pooling, precision and
        dimension of the embeddings that it takes), ``model_name`` (of files since there is one; it
        decides nothing), ``median_length`` (residues of the rows it was
        trained on), ``versions``, and ``training``, a report.
    """

    pipeline: Any
    about: dict[str, Any]

    def __call__(self, embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probability of the first class, float32, shape (n,), of embeddings, shape (n, D)."""
        return np.asarray(self.pipeline.predict_proba(embedding)[:, 1], np.float32)

    @property
    def classes(self) -> tuple[str, str]:
        """Names of the classes; scores are probabilities of the first."""
        first, second = self.about["classes"]
        return first, second

    def described_model(self) -> str:
        """The model whose embeddings it takes, in a line, as `ModelSpec.described`.

        What it says is the file's: it may be anything, and is made printable.
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
        """SHA-256 of all that scores depend on, hexadecimal.

        Not of the file, in which skops names parts by where they were in memory.
        """
        found = sha256(json.dumps([self.about[name] for name in _DECISIVE]).encode())
        for _, step in self.pipeline.steps:
            for name, value in sorted(vars(step).items()):
                # Parameters, as of `get_params`, and what was learned. By scikit-learn's
                # convention all others, which are of no matter for scores, begin with _.
                if not name.startswith("_"):
                    found.update(name.encode())
                    for part in value if isinstance(value, list) else [value]:
                        is_array = isinstance(part, np.ndarray | np.generic)
                        found.update(part.tobytes() if is_array else repr(part).encode())
        return found.hexdigest()


_DECISIVE = ("kind", "classes", "model")


def save_classifier(classifier: Classifier, path: Path) -> None:
    """Write a classifier into a file, whole or not at all; one that is there is replaced.

    Raises
    ------
    OSError
    """
    from skops.io import dumps

    about = json.dumps({"format": FORMAT, **classifier.about})
    content = dumps({"classifier": classifier.pipeline, "about": about})
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


def load_classifier(path: str | Path) -> Classifier:
    """Read a classifier. Nothing that the file holds is run.

    Its list of objects is read first, and refused if it names any type, or way of building one,
    that a classifier does not need; so is an array that says it has more values than are there.

    Raises
    ------
    UsageError
        There is no such file, it holds something else, or types that are not trusted.
    """
    try:
        # Once: what is loaded is what was checked, whatever becomes of the file.
        content = Path(expanded(path)).read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > _MOST_BYTES:
                raise UsageError(f"{path}: {size:,} bytes unpacked are too many for a classifier")
            strange = sorted(set(_strangers(json.loads(archive.read(_SCHEMA)))))
            if strange:
                raise UsageError(
                    f"{path}: has types that are not trusted, and was not loaded:"
                    f" {', '.join(name[:80] for name in strange[:5])!r}"
                )
            _check_arrays(archive)
        return _checked(content)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _DAMAGED as error:
        raise UsageError(
            f"{path}: not a classifier that `virnuc-dask train` saved ({type(error).__name__}:"
            f" {str(error)[:200]!r})"
        ) from error


def _strangers(node: Any) -> Iterator[str]:
    """Types and loaders in skops' list of objects that are not trusted."""
    if isinstance(node, list):
        for each in node:
            yield from _strangers(each)
    elif isinstance(node, dict):
        if "__loader__" in node:
            loader, name = node["__loader__"], f"{node['__module__']}.{node['__class__']}"
            # Of what was met before, the type is no matter.
            if loader not in _LOADERS or (loader != "CachedNode" and name not in _TRUSTED):
                yield f"{name} ({loader})"
        for each in node.values():
            yield from _strangers(each)


def _check_arrays(archive: zipfile.ZipFile) -> None:
    """Make sure that all else in a file is arrays of numbers, each as large as it says it is.

    NumPy takes memory by an array's header, before it reads a value.

    Raises
    ------
    ValueError
        And what zipfile and NumPy raise of what is damaged.
    """
    for entry in archive.infolist():
        if entry.filename == _SCHEMA:
            continue
        with archive.open(entry) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("an array of another format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            size = file.tell() + math.prod(shape) * dtype.itemsize
        if dtype.kind not in "fiub" or min(shape, default=0) < 0 or size != entry.file_size:
            raise ValueError(f"an array of {str(dtype)[:20]}, {str(shape)[:80]}, that it has not")


def _checked(content: bytes) -> Classifier:
    from skops.io import loads

    with warnings.catch_warnings():
        # Another version of scikit-learn: `version_note` says so.
        warnings.simplefilter("ignore")
        found = loads(content, trusted=sorted(_TRUSTED))
    about = json.loads(found["about"])
    if about.pop("format") != FORMAT:
        raise ValueError("of another version of this program")
    classifier = Classifier(found["classifier"], about)
    names = [type(step).__name__ for _, step in classifier.pipeline.steps]
    if names[0] != "StandardScaler" or names[1:] not in (["LogisticRegression"], ["MLPClassifier"]):
        raise ValueError(f"steps {names}")
    # Whether it does what a classifier does.
    score = classifier(np.zeros((1, int(about["model"]["dimension"])), np.float32))
    if score.shape != (1,) or not 0 <= score[0] <= 1:
        raise ValueError("it gives no probabilities")
    if not all(is_class_name(name) for name in classifier.classes):
        raise ValueError("the classes have no names")
    # All else that is used of it.
    float(about["median_length"]), about["versions"].get("scikit-learn"), classifier.digest()
    return classifier


def is_class_name(name: object) -> bool:
    """Whether it is a text that can be shown as it is: it may come from a file."""
    return isinstance(name, str) and bool(name) and printable(name) == name


def versions() -> dict[str, str]:
    """Versions of what trains a classifier, saves it and computes with it."""
    return {name: version(name) for name in ("scikit-learn", "skops", "numpy")}


def version_note(classifier: Classifier) -> str | None:
    """A warning if it was trained by another version of scikit-learn; else None."""
    there = printable(str(classifier.about["versions"].get("scikit-learn")), 20)
    here = version("scikit-learn")
    if there.split(".")[:2] == here.split(".")[:2]:
        return None
    return f"the classifier is of scikit-learn {there}, this is {here}: scores may differ"
