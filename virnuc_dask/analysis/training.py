"""Training of a classifier on two stores, and metrics on held-out rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from virnuc_dask import __version__
from virnuc_dask.analysis.chunk_passes import ChunkCounter, Progress, open_pool, thread_count
from virnuc_dask.analysis.classifier import (
    SUFFIX,
    Classifier,
    is_class_name,
    save_classifier,
    shortened,
    versions,
)
from virnuc_dask.analysis.compatibility import (
    check_same_embeddings,
    length_note,
    what_must_agree,
)
from virnuc_dask.analysis.outputs import check_out
from virnuc_dask.analysis.rows import pending_note, pending_rows
from virnuc_dask.analysis.samples import Sample, count_embedded, draw, groups_of
from virnuc_dask.analysis.stored_fits import check_seed
from virnuc_dask.errors import UsageError
from virnuc_dask.settings import CLASSIFIERS, ClassifierKind
from virnuc_dask.store.store import Store

_BINS = 10
_RESAMPLES = 1000
_INTERVAL = (0.025, 0.975)
_FEW = 100
# Fraction of viral rows in an example of a metagenome.
_RARE = 0.01
_HIDDEN_UNITS = 512
# Inverse strength of the penalty, scikit-learn's C.
_INVERSE_PENALTY = 0.1
_MOST_ITERATIONS = 1000
# Early stopping needs a tenth of each class, which fewer rows cannot spare.
_LEAST_FOR_EARLY_STOPPING = 200
_LEAST_OF_A_CLASS = 10
_KINDS = {"logistic": "logistic regression", "mlp": "a perceptron with a hidden layer of 512"}


@dataclass(frozen=True, slots=True)
class Metrics:
    """Quality of probabilities on held-out rows.

    Attributes
    ----------
    auroc : float
        Area under the receiver operating characteristic; 0.5 is chance.
    auroc_low, auroc_high : float
        95 % interval of the AUROC: percentiles of 1,000 bootstrap samples of the held-out sequences
        or reads of each class, each with all its rows. It shows how the AUROC depends on the choice
        of held-out sequences, not on the choice of training sequences. With few sequences it is too
        narrow.
    auprc : float
        Average precision; chance is the fraction of held-out rows in the first class.
    sensitivity, specificity : float
        Fraction of the first class with a score of 0.5 or more, and of the other class with less.
    brier : float
        Mean squared difference between probability and truth; 0 is best.
    calibration_error : float
        Expected calibration error: mean absolute difference between probability and observed
        fraction in ten bins of equal width, weighted by their rows.
    reliability : list of dict
        For each bin: ``above`` and ``to`` (its ends), ``rows``, ``score`` (mean probability) and
        ``observed`` (fraction in the first class); the last two are null for an empty bin.

    References
    ----------
    Naeini, Cooper and Hauskrecht, AAAI 2015 (expected calibration error); Brier, Monthly Weather
    Review 78, 1950; Efron and Tibshirani, An Introduction to the Bootstrap, 1993.
    """

    auroc: float
    auroc_low: float
    auroc_high: float
    auprc: float
    sensitivity: float
    specificity: float
    brier: float
    calibration_error: float
    reliability: list[dict[str, float | int | None]]

    def precision_at(self, prevalence: float) -> float | None:
        """Fraction of the rows with a score of 0.5 or more that are of the first class.

        Parameters
        ----------
        prevalence : float
            Fraction of all rows that are of the first class.
        """
        right = self.sensitivity * prevalence
        called = right + (1 - self.specificity) * (1 - prevalence)
        return right / called if called else None


@dataclass(frozen=True, slots=True)
class ClassReport:
    """Data of one class.

    Attributes
    ----------
    name : str
    input_sha256 : str
        Digest of the store's input.
    translation : str, optional
        How reads were translated.
    rows, embedded, pending, sampled, left_out, training, held_out : int
        Rows of the store; rows with an embedding; rows that are not embedded yet; rows drawn at
        random; drawn rows left out because their sequence is in both classes; training rows;
        held-out rows.
    median_length : float
        Median length of the sampled rows, in residues.
    """

    name: str
    input_sha256: str
    translation: str | None
    rows: int
    embedded: int
    pending: int
    sampled: int
    left_out: int
    training: int
    held_out: int
    median_length: float


@dataclass(frozen=True, slots=True)
class TrainReport:
    """Result of `train`: data, settings and quality of the saved classifier.

    Attributes
    ----------
    out : Path
    kind : {'logistic', 'mlp'}
    model : dict
        Weights, layer, pooling, precision and dimension of the embeddings.
    classes : list of ClassReport
        Scores are probabilities of the first class.
    shared : int
        Sequences in both classes, which were left out.
    test_size : float
    random_state : int
    embeddings, composition : Metrics
        Metrics of the saved classifier, and of one of the same kind on amino-acid composition
        alone, on the same held-out rows.
    notes : list of str
        Reasons for doubt.
    comment : str, optional
        Warning about random weights.
    """

    out: Path
    kind: ClassifierKind
    model: dict[str, Any]
    classes: list[ClassReport]
    shared: int
    test_size: float
    random_state: int
    embeddings: Metrics
    composition: Metrics
    notes: list[str] = field(default_factory=list)
    comment: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
        document = asdict(self) | {"out": str(self.out)}
        return {name: value for name, value in document.items() if value is not None}

    def lines(self) -> list[str]:
        """Data of the classes and a table of the metrics, as lines of text."""
        first = self.classes[0].name
        chance = self.classes[0].held_out / sum(each.held_out for each in self.classes)
        lines = [f"classifier    {_KINDS[self.kind]}, {self.model['dimension']} features"]
        for each in self.classes:
            sampled = "" if each.sampled == each.embedded else f", {each.sampled:,} taken at random"
            lines.append(
                f"{each.name:<13} {each.embedded:,} of {each.rows:,} rows embedded{sampled};"
                f" trained on {each.training:,}, held out {each.held_out:,}"
            )
        if self.shared:
            rows = " and ".join(f"{each.left_out:,}" for each in self.classes)
            lines.append(f"left out      {self.shared:,} sequences in both classes, {rows} rows")
        lines += ["", f"{'held out':<26}embeddings  composition alone"]
        figures = [
            f"{title:<26}{getattr(self.embeddings, name):>10.4f}"
            f"  {getattr(self.composition, name):>17.4f}"
            for name, title in (
                ("auroc", "AUROC (chance 0.50)"),
                ("auprc", f"AUPRC (chance {chance:.2f})"),
                ("sensitivity", "sensitivity at 0.5"),
                ("specificity", "specificity at 0.5"),
                ("brier", "Brier score, 0 is best"),
                ("calibration_error", "calibration error, 0 best"),
            )
        ]
        intervals = [
            f"{each.auroc_low:.3f} to {each.auroc_high:.3f}"
            for each in (self.embeddings, self.composition)
        ]
        lines += [
            figures[0],
            f"{'AUROC, 95 % interval':<22}{intervals[0]:>14}  {intervals[1]:>17}",
            *figures[1:],
        ]
        lines += [
            "",
            *self._rare(first),
            "Similar sequences may be on both sides of the split. For figures that hold for new"
            " families,",
            "cluster the sequences first, for example with MMseqs2, and embed one of each cluster.",
            "",
            f"Calibration of the held-out rows: in each line, the share of {first} should be close"
            " to the mean score;",
            "the calibration error is the mean difference, weighted by rows.",
            "",
            f"score         rows  mean score  share of {first}",
        ]
        for each_bin in self.embeddings.reliability:
            ends = f"{each_bin['above']:.1f} to {each_bin['to']:.1f}"
            means = [
                "" if value is None else f"{value:.3f}"
                for value in (each_bin["score"], each_bin["observed"])
            ]
            lines.append(
                f"{ends:<10} {each_bin['rows']:>7,}  {means[0]:>10}  {means[1]:>9}".rstrip()
            )
        return lines

    def _rare(self, first: str) -> Iterator[str]:
        """What the figures mean where the first class is rare."""
        precision = self.embeddings.precision_at(_RARE)
        if precision is not None:
            yield (
                "Scores are probabilities at the class proportions of the training rows. If"
                f" {_RARE:.0%} of the rows were {first},"
            )
            yield f"{precision:.1%} of the rows with a score of 0.5 or more would be {first}."


def train(
    viral: str | Path,
    other: str | Path,
    out: str | Path,
    *,
    kind: ClassifierKind = "logistic",
    classes: tuple[str, str] = ("viral", "other"),
    test_size: float = 0.25,
    max_rows: int = 100_000,
    random_state: int = 0,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    client: Any = None,
) -> TrainReport:
    """Train a classifier on the embeddings of two stores, test it, and save it.

    By default a quarter of the sequences is held out, and all metrics are from these. The saved
    classifier is the tested one, fitted on the other three quarters. Rows with the same sequence,
    and rows of the same read, stay on the same side of the split. Sequences in both stores are left
    out. Similar sequences may be on both sides; then the metrics are better than for sequences
    without known relatives. If that matters, cluster the sequences first, for example with MMseqs2,
    and give one sequence of each cluster.

    For comparison, a classifier of the same kind uses only the composition: the fractions of the 20
    amino acids and the logarithm of the length. The difference shows the gain from embeddings.

    Features are standardised. ``logistic`` is logistic regression with an L2 penalty (C=0.1; with
    scikit-learn's default of 1, classifiers of a few hundred proteins were overconfident). ``mlp``
    has one hidden layer of 512 units, like VirNucPro. scikit-learn has no dropout and no batch
    normalisation, so training stops when the score on a tenth of the training rows no longer
    improves. With fewer than 200 training rows, or fewer than 10 of a class, it stops when the loss
    no longer improves. Probabilities hold for the class proportions of the training rows.

    Memory: about four times the sampled embeddings in float32; by default 4 GB for D = 1,280.

    Parameters
    ----------
    viral, other : path
        Stores of the two classes, with the same weights, layer, pooling and precision. Runs may
        still fill them; only embedded rows are used.
    out : path
        A new file, ``.skops``.
    kind : {'logistic', 'mlp'}
    classes : tuple of two str
        Names of the classes. Scores are probabilities of the first.
    test_size : float
        Fraction of the sequences, or reads, to hold out.
    max_rows : int
        Most rows per class; of a larger store, a random sample.
    random_state : int
        Seed of the sample, the split, and the initial weights of a perceptron.
    force : bool
        Replace an existing file.
    workers : int, optional
        Threads that read. Default: one per core, at most 16.
    progress : callable, optional
        Called with the number of chunks read so far and their total.
    client : distributed.Client, optional
        Read on the workers of this client. Default: threads of this process.

    Returns
    -------
    TrainReport

    Raises
    ------
    UsageError
        An argument is not valid, `out` exists, the stores are not comparable or have the same
        input, or a class has fewer than two different sequences or reads.
    StoreError
        A chunk is damaged.
    NotAStoreError

    References
    ----------
    VirNucPro: Li et al., https://github.com/Li-Jing-1997/VirNucPro.
    """
    path = check_out(out, (SUFFIX,), force=force)
    _check_settings(kind, classes, test_size, max_rows, random_state)
    threads = thread_count(workers)
    stores = Store(viral), Store(other)
    _check_stores(*stores)
    pending = [pending_rows(store) for store in stores]
    samples = _draw_both(stores, max_rows, random_state, threads, progress, client)
    sampled = [len(sample.sequence) for sample in samples]
    shared = set(samples[0].sequence) & set(samples[1].sequence)
    samples = [sample.without(shared) for sample in samples]
    left_out = [
        before - len(sample.sequence) for before, sample in zip(sampled, samples, strict=True)
    ]
    groups = [groups_of(sample) for sample in samples]
    held_out = [
        _held_out(group, store, name, test_size, [random_state, number, 1])
        for number, (group, store, name) in enumerate(zip(groups, stores, classes, strict=True))
    ]
    is_test = np.concatenate(held_out)
    # The number of a group is its first row; add an offset for the second class.
    group = np.concatenate([groups[0], groups[1] + len(groups[0])])
    is_first = np.repeat([1, 0], [len(each) for each in held_out])
    notes = _notes(samples, classes, sampled, is_test)
    notes += filter(None, map(pending_note, stores, pending))
    if shared:
        notes.append(
            f"{len(shared):,} sequences in both classes were left out: {left_out[0]:,} rows of"
            f" {classes[0]} and {left_out[1]:,} of {classes[1]}"
        )
    model = what_must_agree(stores[0].identity) | {"dimension": stores[0].dimension}
    pipeline, embeddings = _fit(
        kind,
        [sample.embedding for sample in samples],
        is_first,
        is_test,
        random_state,
        notes,
        group,
    )
    _, composition = _fit(
        kind,
        [sample.composition for sample in samples],
        is_first,
        is_test,
        random_state,
        notes,
        group,
    )
    report = TrainReport(
        out=path,
        kind=kind,
        model=model,
        classes=[
            ClassReport(
                name=classes[number],
                input_sha256=store.identity.input_sha256,
                translation=store.identity.translation,
                rows=store.records,
                embedded=sample.embedded,
                pending=pending[number],
                sampled=sampled[number],
                left_out=left_out[number],
                training=int((~held_out[number]).sum()),
                held_out=int(held_out[number].sum()),
                median_length=float(np.median(sample.length)),
            )
            for number, (store, sample) in enumerate(zip(stores, samples, strict=True))
        ],
        shared=len(shared),
        test_size=test_size,
        random_state=random_state,
        embeddings=embeddings,
        composition=composition,
        notes=list(dict.fromkeys(notes)),
        **stores[0].model.comment(),
    )
    lengths = np.concatenate([sample.length for sample in samples])
    about = {
        "kind": kind,
        "classes": list(classes),
        "model": model,
        # Leave out the folders of the weights, because the file may be shared.
        "model_name": stores[0].model.name,
        "median_length": float(np.median(lengths)),
        # Leave out the path of the file, because it may be shared.
        "training": {name: value for name, value in report.to_json().items() if name != "out"},
        "versions": {"virnuc_dask": __version__, **versions()},
        **stores[0].model.comment(),
    }
    sequences = [digest for sample in samples for digest in sample.sequence]
    used = np.unique(shortened(sequences)[~is_test])
    save_classifier(Classifier(pipeline, about, used), check_out(path, (SUFFIX,), force=force))
    return report


def _check_settings(
    kind: str, classes: tuple[str, str], test_size: float, max_rows: int, random_state: int
) -> None:
    if kind not in CLASSIFIERS:
        raise UsageError(f"kind must be one of {', '.join(CLASSIFIERS)}, not {kind!r}")
    if len(classes) != 2 or len(set(classes)) != 2 or not all(map(is_class_name, classes)):
        raise UsageError(f"classes must be two different names, not {classes!r}")
    if not 0 < test_size < 1:
        raise UsageError(f"test_size must be a fraction between 0 and 1, not {test_size}")
    if max_rows < 2:
        raise UsageError(f"max_rows must be at least 2, not {max_rows}")
    check_seed(random_state)


def _check_stores(viral: Store, other: Store) -> None:
    check_same_embeddings(viral, other)
    if viral.identity.input_sha256 == other.identity.input_sha256:
        raise UsageError(f"{viral.path} and {other.path} hold the same sequences; give two classes")


def _draw_both(
    stores: tuple[Store, Store],
    max_rows: int,
    random_state: int,
    threads: int,
    progress: Progress | None,
    client: Any,
) -> list[Sample]:
    counts = []
    for store in stores:
        with open_pool(store, threads, client) as pool:
            counts.append(count_embedded(store, pool))
        if not counts[-1].any():
            raise UsageError(f"{store.path} has no embedded row yet")
    counter = ChunkCounter(progress, sum(int(np.count_nonzero(each)) for each in counts))
    samples = []
    for number, (store, count) in enumerate(zip(stores, counts, strict=True)):
        with open_pool(store, threads, client) as pool:
            samples.append(draw(store, count, max_rows, [random_state, number, 0], pool, counter))
    return samples


def _held_out(
    groups: NDArray[np.int64], store: Store, name: str, test_size: float, seed: list[int]
) -> NDArray[np.bool_]:
    """Whether each row is held out, shape (n,): a fraction of the groups, at least one."""
    different = np.unique(groups)
    if len(different) < 2:
        what = "reads" if store.identity.translation else "sequences"
        raise UsageError(
            f"{store.path}: too few different {what} that are only in the class {name!r}:"
            f" {len(different)}; at least 2 are needed, and several hundred to train well"
        )
    number = min(max(1, round(test_size * len(different))), len(different) - 1)
    held_out = np.random.default_rng(seed).choice(different, number, replace=False)
    return np.isin(groups, held_out)


def _notes(
    samples: list[Sample], classes: tuple[str, str], sampled: list[int], is_test: NDArray[np.bool_]
) -> list[str]:
    notes = []
    medians = [float(np.median(sample.length)) for sample in samples]
    if note := length_note(medians[0], classes[0], medians[1], classes[1]):
        notes.append(f"{note}; a classifier may learn only the length")
    for sample, name, rows in zip(samples, classes, sampled, strict=True):
        if rows < sample.embedded:
            notes.append(
                f"{rows:,} of {sample.embedded:,} rows of {name} were taken at random; a larger"
                " --max-rows takes more"
            )
    held_out = [int(part.sum()) for part in np.split(is_test, [len(samples[0].sequence)])]
    if min(held_out) < _FEW:
        notes.append(
            f"a class has only {min(held_out):,} held-out rows: another --random-state may give"
            " very different figures"
        )
    return notes


def _fit(
    kind: ClassifierKind,
    features: list[NDArray[np.float32]],
    is_first: NDArray[np.int64],
    is_test: NDArray[np.bool_],
    random_state: int,
    notes: list[str],
    groups: NDArray[np.int64],
) -> tuple[Any, Metrics]:
    """Fit a pipeline on the training rows; return it and its metrics on the other rows."""
    from sklearn.exceptions import ConvergenceWarning

    # Split each class separately, which avoids a copy of all rows.
    parts = np.split(is_test, [len(features[0])])
    training = np.concatenate([x[~part] for x, part in zip(features, parts, strict=True)])
    testing = np.concatenate([x[part] for x, part in zip(features, parts, strict=True)])
    fewest = min(int((~part).sum()) for part in parts)
    is_early = len(training) >= _LEAST_FOR_EARLY_STOPPING and fewest >= _LEAST_OF_A_CLASS
    pipeline = new_pipeline(kind, random_state, early_stopping=is_early)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        pipeline.fit(training, is_first[~is_test])
    if any(issubclass(each.category, ConvergenceWarning) for each in caught):
        notes.append(f"a fit did not converge in {_MOST_ITERATIONS:,} iterations")
    scores = pipeline.predict_proba(testing)[:, 1].astype(np.float64)
    return pipeline, measure(
        is_first[is_test], scores, groups=groups[is_test], random_state=random_state
    )


def new_pipeline(kind: ClassifierKind, random_state: int, *, early_stopping: bool) -> Any:
    """Create a pipeline that is not fitted."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = (
        LogisticRegression(C=_INVERSE_PENALTY, max_iter=_MOST_ITERATIONS, random_state=random_state)
        if kind == "logistic"
        else MLPClassifier(
            (_HIDDEN_UNITS,),
            max_iter=_MOST_ITERATIONS,
            early_stopping=early_stopping,
            random_state=random_state,
        )
    )
    return make_pipeline(StandardScaler(), classifier)


def measure(
    is_first: NDArray[np.int64],
    score: NDArray[np.float64],
    *,
    groups: NDArray[np.int64] | None = None,
    random_state: int = 0,
) -> Metrics:
    """Metrics of probabilities.

    Parameters
    ----------
    is_first : ndarray, int64, shape (n,)
        1 for rows of the first class, else 0; both must occur.
    score : ndarray, float64, shape (n,)
        Probability of the first class.
    groups : ndarray, int64, shape (n,), optional
        Group of each row. The bootstrap of the interval draws whole groups; a group has one class.
        Default: each row is its own group.
    random_state : int
        Seed of the interval.
    """
    from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

    number = np.minimum((score * _BINS).astype(np.int64), _BINS - 1)
    rows = np.bincount(number, minlength=_BINS)
    scores = np.bincount(number, score, minlength=_BINS)
    observed = np.bincount(number, is_first, minlength=_BINS)
    groups = np.arange(len(score)) if groups is None else groups
    low, high = _auroc_interval(is_first, score, groups, random_state)
    return Metrics(
        auroc_low=low,
        auroc_high=high,
        auroc=float(roc_auc_score(is_first, score)),
        auprc=float(average_precision_score(is_first, score)),
        sensitivity=float((score[is_first == 1] >= 0.5).mean()),
        specificity=float((score[is_first == 0] < 0.5).mean()),
        brier=float(brier_score_loss(is_first, score)),
        calibration_error=float(np.abs(scores - observed).sum() / len(score)),
        reliability=[
            {
                "above": each / _BINS,
                "to": (each + 1) / _BINS,
                "rows": int(rows[each]),
                "score": float(scores[each] / rows[each]) if rows[each] else None,
                "observed": float(observed[each] / rows[each]) if rows[each] else None,
            }
            for each in range(_BINS)
        ],
    )


def _auroc_interval(
    is_first: NDArray[np.int64],
    score: NDArray[np.float64],
    groups: NDArray[np.int64],
    random_state: int,
) -> tuple[float, float]:
    """95 % interval of the AUROC over bootstrap samples of the groups of each class.

    A group that is drawn twice gets weight two. So one sort of the scores serves all samples.
    """
    known, group = np.unique(groups, return_inverse=True)
    is_first_group = np.zeros(len(known), np.bool_)
    is_first_group[group] = is_first == 1
    of_class = [np.flatnonzero(is_first_group), np.flatnonzero(~is_first_group)]
    values, rank = np.unique(score, return_inverse=True)
    is_row_first = is_first == 1
    random = np.random.default_rng(random_state)
    aurocs = np.empty(_RESAMPLES)
    for number in range(_RESAMPLES):
        drawn = np.concatenate([random.choice(part, len(part)) for part in of_class])
        times = np.bincount(drawn, minlength=len(known))[group].astype(np.float64)
        first = np.bincount(rank[is_row_first], times[is_row_first], len(values))
        other = np.bincount(rank[~is_row_first], times[~is_row_first], len(values))
        # Pairs in the right order, plus half of the ties.
        won = first @ (np.cumsum(other) - other / 2)
        aurocs[number] = won / (first.sum() * other.sum())
    low, high = np.quantile(aurocs, _INTERVAL)
    return float(low), float(high)
