"""Stores at s3://: a real server, real processes and kills; a proxy that counts its faults."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import cloudpickle
import dask
import faults
import numpy as np
import pytest
from clusters import started_cluster, worker
from conftest import VIRAL_PROTEINS, chunk_bytes, command, tree
from harness import Run, assert_ledger, await_end, finished_chunks
from s3 import BUCKET, Fault, Proxy, Server, client

import virnuc_dask
from virnuc_dask.errors import (
    LocationError,
    NotAStoreError,
    StoreError,
    StoreReplacedError,
    UsageError,
)
from virnuc_dask.runtime import events
from virnuc_dask.runtime.dask_cluster import connect
from virnuc_dask.runtime.embed import embed_chunk
from virnuc_dask.runtime.prepare import prepare
from virnuc_dask.settings import Settings
from virnuc_dask.store import bucket, status, verify
from virnuc_dask.store.chunk_checks import check_sequences
from virnuc_dask.store.create import Ingest
from virnuc_dask.store.location import location_of
from virnuc_dask.store.store import Store

OTHER_PROTEINS = VIRAL_PROTEINS.parent / "esm_some_proteins.fasta"
# Small chunks of every kind, so that a run is under way for long enough to be killed.
IDENTITY = ("--model=demo", "--rows-per-chunk", 8, "--per-residue", "--repr-layer", 1)
SETTINGS = (*IDENTITY, "--workers", 2)
QUICK = {"model": "demo", "rows_per_chunk": 32, "repr_layer": 0}


@pytest.fixture(scope="module", autouse=True)
def here(s3: Server) -> Iterator[None]:
    """This process's environment is that of the server's user too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.env.items():
            patch.setenv(name, value)
        yield
    bucket._client.cache_clear()


@pytest.fixture
def url() -> str:
    """A place that nothing else uses."""
    return f"s3://{BUCKET}/{uuid4().hex}/out.zarr"


def make(url: str, inputs: Path = VIRAL_PROTEINS, *, embed: bool = True, **settings: Any) -> Store:
    """A store, made and filled in this process."""
    store, model = prepare(inputs, url, Settings(**(QUICK | settings)), lambda _event: None)
    for chunk in range(store.chunk_count if embed else 0):
        embed_chunk(url, chunk, store.identity, model)
    return store


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The same input and settings, in a directory, left in peace."""
    path = tmp_path_factory.mktemp("reference") / "out.zarr"
    return make(str(path), rows_per_chunk=8, per_residue=True, repr_layer=1)


def put(url: str, key: str, content: bytes) -> None:
    client(dict(os.environ), url).put(key, content)


# --- the main job ---


@pytest.mark.slow
def test_coordinator_then_worker_killed_and_nothing_is_lost(
    url: str, reference: Store, s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", VIRAL_PROTEINS, url, *SETTINGS)
    motif = faults.motif_of(VIRAL_PROTEINS)
    said = open(tmp_path / "stderr", "a+")  # noqa: SIM115  # read at the end
    with faults.holding(monkeypatch, tmp_path / "first.json", motif):
        first = Run(*arguments, stderr=said)
    workers: set[int] = set()
    for event in first:
        if event["event"] == "chunk_done":
            workers.add(event["pid"])
        if len(first.computed()) == 5:
            # Held on the way. Opened lazily meanwhile, it shows what is done.
            os.killpg(first.process.pid, signal.SIGSTOP)
            opened = virnuc_dask.open_store(url)
            data = opened.embedding.values
            there = np.isfinite(data).all(axis=1)
            assert 5 * 8 <= there.sum() < reference.records
            expected = virnuc_dask.open_store(reference.path)
            assert np.array_equal(data[there], expected.embedding.values[there])
            assert np.array_equal(opened.embedded, there)
            assert opened.embedding[opened.embedded].shape == (there.sum(), data.shape[1])
            assert opened.description.values.tolist() == expected.description.values.tolist()
            query = str(opened.sequence_id[np.flatnonzero(there)[0]].values)
            found = virnuc_dask.nearest(url, query, k=3)
            assert there[found.row.values].all()
            break
    first.process.send_signal(signal.SIGKILL)
    os.killpg(first.process.pid, signal.SIGCONT)
    assert first.finish() == -signal.SIGKILL
    await_end(workers)
    store = Store(url)
    present = np.flatnonzero(store.present())
    assert 0 < len(present) < store.chunk_count
    before = finished_chunks(store)

    # The same command goes on, and loses a worker.
    table = tmp_path / "second.json"
    with faults.holding(monkeypatch, table, motif):
        second = Run(*arguments, stderr=said)
    victim = None
    for event in second:
        if event["event"] == "chunk_done" and victim is None:
            victim = event["pid"]
            os.kill(victim, signal.SIGKILL)
        if event["event"] == "worker_lost":
            faults.release(table)
    assert second.process.wait(timeout=120) == 0
    assert len(second.of("worker_lost")) == 1
    assert second.of("run_started")[0]["present_chunks"] == len(present)
    done = [event["chunk"] for event in second.of("chunk_done")]
    assert sorted([*present, *done]) == list(range(store.chunk_count))
    after = tree(url)
    assert {name: after[name] for name in before} == before  # not even written again
    assert_ledger(store, reference)
    assert status.row_states(url) == status.row_states(reference.path)
    assert virnuc_dask.open_residues(url, 7).equals(virnuc_dask.open_residues(reference.path, 7))

    # Whatever was written or said, the secret is not in it.
    said.seek(0)
    everything = [str(first.events), str(second.events), said.read(), str(sorted(after))]
    assert not any(s3.secret in text for text in everything)
    assert not any(s3.secret.encode() in content for _, _, content in after.values())

    # A store is the same wherever it is, but for when and by what it was made.
    local = tree(reference.path)
    assert set(local) == set(after)
    assert {n for n in local if local[n][2] != after[n][2]} <= {"zarr.json"}


@pytest.mark.slow
def test_tasks_of_anybodys_graph_fill_a_bucket_and_hold_no_secret(url: str, s3: Server) -> None:
    virnuc_dask.create_store(VIRAL_PROTEINS, url, **QUICK)
    tasks = virnuc_dask.tasks(url)
    assert not any(s3.secret.encode() in cloudpickle.dumps(dict(task.dask)) for task in tasks)
    reports = dask.compute(*tasks, scheduler="threads")
    assert [report.computed for report in reports] == [True] * 10
    assert virnuc_dask.tasks(url) == []
    report = virnuc_dask.verify(url)
    assert (report.checked, report.bad) == (10, {})


@pytest.mark.slow
def test_maps_and_clusters_are_kept_in_a_bucket(url: str, tmp_path: Path) -> None:
    here = make(str(tmp_path / "here.zarr"))
    there = make(url)
    for path in (here.path, url):
        assert virnuc_dask.make_map(path).computed_chunks == 10
        assert virnuc_dask.make_clusters(path, n_clusters=3).computed_chunks == 10
    ours, theirs = virnuc_dask.open_store(here.path), virnuc_dask.open_store(url)
    for name in ("map_pca", "cluster_kmeans"):
        assert np.array_equal(ours[name].values, theirs[name].values)
    before = tree(url)
    assert virnuc_dask.make_map(url).computed_chunks == 0
    assert tree(url) == before
    assert virnuc_dask.draw_map(url, out=tmp_path / "map.png", colour="cluster_kmeans") == 300
    assert there.records == 300


@pytest.mark.slow
def test_a_task_has_the_url_and_no_secret(url: str, s3: Server) -> None:
    from virnuc_dask.runtime.dask_cluster import connect

    store, tasks, logs = make(url, embed=False), [], []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.ChunkDone):
            tasks.extend(connected.run_on_scheduler(_tasks))
            logs.append(str((connected.get_worker_logs(), connected.get_scheduler_logs())))

    with connect("local", workers=1) as connected:
        summary = virnuc_dask.resume(url, client=connected, listener=listen)
        assert summary.exit_code == 0
        # A lazily opened store may be sent to workers, which open it for themselves.
        data = virnuc_dask.open_store(url).embedding
        mean = float(connected.compute(data.mean()).result())
    assert mean == pytest.approx(float(data.mean()))
    tasks += [pickle.dumps(data), pickle.dumps(store.location.arrays())]
    assert any(url.encode() in task for task in tasks[:-2])
    assert not any(s3.secret.encode() in task for task in tasks)
    assert not any(s3.secret in log for log in logs)


def _tasks(dask_scheduler: Any) -> list[bytes]:
    return [pickle.dumps(task.run_spec) for task in dask_scheduler.tasks.values()]


# --- ingest ---


@pytest.mark.slow
def test_an_upload_that_was_killed_leaves_no_store_and_the_same_command_ends_it(
    url: str, s3: Server, tmp_path: Path
) -> None:
    options = ("--model=demo", "--repr-layer", 0, "--workers", 1, "-q")
    arguments = ("run", VIRAL_PROTEINS, url, *options)
    with Proxy(s3, [Fault("hold", "PUT", "/residues/", 9)]) as proxy:
        env = proxy.env(TMPDIR=str(tmp_path))
        run = subprocess.Popen(command(*arguments), env=env)
        assert proxy.held.wait(60)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert proxy.fired["hold"] >= 1
        assert [name for name in os.listdir(tmp_path) if name.endswith(".ingest")]
        left = set(tree(url))
    assert "unfinished" in left
    assert "zarr.json" not in left
    with pytest.raises(NotAStoreError, match="no store there"):
        Store(url)
    with pytest.raises(NotAStoreError, match="or with other settings, is unfinished there"):
        make(url, OTHER_PROTEINS)
    assert set(tree(url)) >= left
    done = subprocess.run(command(*arguments), env={**s3.env, "TMPDIR": str(tmp_path)}, check=False)
    assert done.returncode == 0
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".ingest")]
    report = virnuc_dask.verify(url)
    assert (report.exit_code, report.missing, report.leftovers) == (0, 0, [])


@pytest.mark.slow
def test_a_store_in_a_bucket_is_replaced_and_a_killed_removal_goes_on(
    url: str, s3: Server, tmp_path: Path
) -> None:
    old = make(url, rows_per_chunk=4)
    options = ("--model=demo", "--repr-layer", 0, "--rows-per-chunk", 32, "--workers", 1, "-q")
    arguments = ("run", VIRAL_PROTEINS, url, *options)
    refused = subprocess.run(command(*arguments), env=s3.env, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "rows_per_chunk: the store has 4, this run asks for 32" in refused.stderr
    # The root is removed first, by a request of its own.
    rest = Fault("hold", "POST", r"\?delete", 9)
    with Proxy(s3, [Fault("pass", "POST", r"\?delete", 1, then=[rest])]) as proxy:
        run = subprocess.Popen(command(*arguments, "--overwrite"), env=proxy.env())
        assert proxy.held.wait(60)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert proxy.fired["hold"] >= 1
    left = set(tree(url))
    assert "unfinished" in left
    assert "zarr.json" not in left
    assert any(key.startswith("embedding/c.") for key in left)
    refused = subprocess.run(command(*arguments), env=s3.env, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "a run with --overwrite was ended while it removed a store there" in refused.stderr
    assert set(tree(url)) == left
    done = subprocess.run(command(*arguments, "--overwrite"), env=s3.env, check=False)
    assert done.returncode == 0
    assert_ledger(Store(url), make(str(tmp_path / "reference.zarr")))
    with pytest.raises(StoreReplacedError):
        old.check_location()


@pytest.mark.slow
def test_nothing_else_in_a_bucket_is_replaced(url: str) -> None:
    put(url, "thesis.tex", b"mine")
    before = tree(url)
    with pytest.raises(NotAStoreError, match="not a store of this program"):
        virnuc_dask.run(VIRAL_PROTEINS, url, overwrite=True, workers=1, **QUICK)
    assert tree(url) == before


@pytest.mark.parametrize("conditional", ["etag", "disabled"])
@pytest.mark.slow
def test_ingests_that_start_together_end_with_one_store(
    conditional: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", conditional)
    bucket._client.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: make(url, embed=False), range(4)))
    assert len({str(store.provenance) for store in stores}) <= 2  # seconds are in it
    report = verify.verify(url)
    assert (report.sequences, report.leftovers) == (None, [])
    bucket._client.cache_clear()


@pytest.mark.slow
def test_workers_that_see_nothing_of_the_coordinators_disk_fill_the_store(
    url: str, reference: Store, blinded: tuple[str, ...], tmp_path: Path
) -> None:
    """They have the URL and credentials; input and temporary files they cannot see."""
    hidden = tmp_path / "hidden"
    shutil.copy(VIRAL_PROTEINS, hidden / "input.faa.gz")
    with started_cluster(tmp_path, prefix=blinded) as file, worker(file, prefix=blinded):
        with connect(str(file)) as client:
            client.wait_for_workers(2)
            seen = client.run(os.listdir, str(hidden))
            assert list(seen.values()) == [[], []]
        arguments = ("run", "input.faa.gz", url, *IDENTITY, "--cluster", file)
        run = Run(*arguments, cwd=hidden, env=os.environ | {"TMPDIR": str(hidden)})
        assert run.finish() == 0
    assert len({event["pid"] for event in run.of("chunk_done")}) == 2
    assert_ledger(Store(url), reference)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two different stores, put together and not yet in their place."""
    folder = tmp_path_factory.mktemp("staged")
    one = make(str(folder / "one"), embed=False)
    other = make(str(folder / "other"), OTHER_PROTEINS, embed=False, per_residue=True)
    return [one.path, other.path]


@pytest.mark.slow
def test_uploads_of_different_stores_that_race_never_mix(staged: list[Path]) -> None:
    def publish(url: str, start: threading.Barrier, number: int) -> str:
        start.wait()
        try:
            return f"made {number % 2}" if location_of(url).publish(staged[number % 2]) else "found"
        except NotAStoreError:
            return "refused"

    outcomes: set[str] = set()
    for _ in range(6):
        url, start = f"s3://{BUCKET}/{uuid4().hex}", threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            found = set(pool.map(partial(publish, url, start), range(4)))
        (made,) = found - {"found", "refused"}
        assert Store(url).identity == Store(staged[int(made[-1])]).identity
        assert set(tree(url)) == set(tree(staged[int(made[-1])]))
        assert check_sequences(Store(url)) is None
        outcomes |= found
    assert "refused" in outcomes  # they did race


def test_a_claim_after_the_store_is_there_changes_nothing(url: str, staged: list[Path]) -> None:
    with Ingest(url) as late:  # the place was free when it began
        make(url)
        before = tree(url)
        assert not late.location.publish(staged[1])
    assert tree(url) == before


def test_what_is_not_a_store_is_never_touched(url: str) -> None:
    put(url, "thesis.docx", b"four years")
    before = tree(url)
    for use in (make, Store):
        with pytest.raises(NotAStoreError, match="nothing was changed"):
            use(url)
    assert tree(url) == before


# --- damage ---


@pytest.mark.parametrize("damage", ["flipped", "stunted"])
@pytest.mark.slow
def test_a_damaged_object_is_found_and_mended(damage: str, url: str) -> None:
    store = make(url, per_residue=True)
    whole = chunk_bytes(url)
    for key in (store.keys(3)[1], store.keys(9)[-1]):  # chunk 9 is shorter
        content = bytearray(whole[key])
        content[len(content) // 2] ^= 4
        put(url, key, bytes(content) if damage == "flipped" else b"short")
    put(url, "embedding/c.0.0.bak", b"mine")
    put(url, "notes/today.txt", b"mine")
    missing = np.flatnonzero(~store.present()).tolist()
    assert missing == ([] if damage == "flipped" else [3, 9])
    report = virnuc_dask.verify(url, repair=True)
    assert list(report.bad) == [3, 9]
    assert report.leftovers == [f"{url}/embedding/c.0.0.bak", f"{url}/notes"]
    assert np.flatnonzero(~store.touched()).tolist() == [3, 9]
    make(url, per_residue=True)
    assert chunk_bytes(url) == whole
    assert "notes/today.txt" in tree(url)


@pytest.mark.parametrize("lost", ["zarr.json", "status/zarr.json"])
@pytest.mark.slow
def test_lost_metadata_is_damage_and_no_free_place(lost: str, url: str) -> None:
    make(url)
    location_of(url).remove(lost)
    before = tree(url)
    for use in (Store, make):
        with pytest.raises(StoreError, match=r"zarr\.json"):
            use(url)
    assert tree(url) == before


# --- faults of the server and of the way there ---


@pytest.mark.slow
def test_a_server_that_fails_now_and_then_costs_time_and_nothing_else(
    url: str, reference: Store, s3: Server
) -> None:
    faults = [
        Fault("503", "PUT", "/length/", 2),
        Fault("lose", "PUT", "/out.zarr/zarr.json", 1),
        Fault("503", "GET", "list-type", 2),
        Fault("drop", "GET", "/residues/", 2),
        Fault("503", "HEAD", "/status/c", 3),
        Fault("drop", "PUT", "/status/c.5", 2),
        Fault("lose", "PUT", "/embedding/c.7.0", 2),
        Fault("hold", "PUT", "/embedding/c.3.0", 1),
        # Longer than obstore itself tries: the chunk fails, waits and comes again.
        Fault("503", "PUT", "/embedding/c.9.0", 6),
    ]
    with Proxy(s3, faults) as proxy:
        environment = proxy.env(AWS_TIMEOUT="12 s")  # obstore's own is half a minute
        run = Run("run", VIRAL_PROTEINS, url, *SETTINGS, "--backoff", 0.1, env=environment)
        assert run.finish() == 0
        assert not proxy.release.is_set()  # it never had an answer
    assert [fault for fault in proxy.faults if fault.times] == []
    assert proxy.fired == {"503": 13, "drop": 4, "lose": 3, "hold": 1}
    (failed,) = run.of("chunk_failed")
    assert (failed["chunk"], failed["final"]) == (9, False)
    assert re.fullmatch(
        rf"LocationError: {url}/embedding/c\.9\.0: the server says 503 Service Unavailable",
        failed["error"],
    )
    assert_ledger(Store(url), reference)


@pytest.mark.slow
def test_a_server_that_goes_away_ends_the_run_and_the_next_one_goes_on(
    url: str, s3: Server
) -> None:
    make(url, embed=False, rows_per_chunk=150)
    gone = [Fault("drop", how, "", 10**9) for how in ("GET", "HEAD", "PUT")]
    with Proxy(s3, [Fault("503", "PUT", "/embedding/", 1, then=gone)]) as proxy:
        arguments = ("resume", url, "--workers", 1, "--attempts", 1)
        run = Run(*arguments, env=proxy.env(), stderr=subprocess.PIPE)
        assert run.finish() == 4
    assert proxy.fired["drop"] > 10
    assert run.process.stderr is not None
    message = run.process.stderr.read()
    assert re.fullmatch(rf"error: {url}[^ ]*: .* does not answer: .* `resume` goes on\n", message)
    assert Run("resume", url, env=s3.env).finish() == 0


def check_refusal(env: dict[str, str], cause: str, url: str, *arguments: object) -> None:
    began = time.monotonic()
    done = subprocess.run(
        command(*arguments, url), env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(rf"error: {url}[^ ]*: {cause}\n", done.stderr)
    assert time.monotonic() - began < 120


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, r".* 403 Forbidden \(SignatureDoesNotMatch: .*"),
        ({"AWS_ACCESS_KEY_ID": "who"}, r".* 403 Forbidden \(InvalidAccessKeyId: .*"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, ".*127.0.0.1:1 does not .*: Connection ref.*"),
        ({"AWS_ALLOW_HTTP": "false"}, ".* not encrypted; set AWS_ALLOW_HTTP=true to permit that"),
    ],
)
def test_what_the_environment_lacks_is_one_line(
    change: dict[str, str], cause: str, url: str, s3: Server
) -> None:
    check_refusal(s3.env | change, cause, url, "status")


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_line(s3: Server) -> None:
    there, run = "s3://nowhere/out.zarr", ("run", "--model=demo", VIRAL_PROTEINS)
    check_refusal(s3.env, r".* 404 Not Found \(NoSuchBucket: .*\)", there, *run)


@pytest.mark.slow
def test_who_may_only_read_stops_the_run_at_once(url: str, s3: Server) -> None:
    store = make(url)
    location_of(url).probe()
    for chunk in range(9):
        store.remove_chunk(chunk)
    before = tree(url)
    run = Run("resume", url, "--workers", 1, env=s3.reader)
    assert run.finish() == 4
    (summary,) = run.of("run_summary")
    assert re.fullmatch(
        rf"{url}/status/c\.\d: the server says 403 Forbidden \(AccessDenied: .*\)",
        summary["stopped"],
    )
    assert len(run.of("chunk_failed")) <= 2  # one for each thread
    assert tree(url) == before


def test_a_probe_says_what_does_not_work(url: str, s3: Server, tmp_path: Path) -> None:
    location_of(url).probe()
    location_of(tmp_path).probe()
    with pytest.raises(FileNotFoundError, match="nothing"):
        location_of(str(tmp_path / "nothing")).probe()
    with pytest.raises(UsageError, match="directory"):
        location_of("ftp://somewhere/out.zarr").probe()
    assert tree(url) == {}
    code = f"""
from virnuc_dask.errors import LocationError
from virnuc_dask.store.location import location_of
try:
    location_of({url!r}).probe()
except LocationError as error:
    print(error)
"""
    found = subprocess.check_output([sys.executable, "-c", code], env=s3.reader, text=True)
    assert "403 Forbidden (AccessDenied" in found


# --- what a user may write ---


@pytest.mark.parametrize(
    "bad",
    [
        "s3://AKIA:sesame@bucket/out.zarr",
        "s3://sesame@bucket/out.zarr",
        "s3://AKIA:se/same@bucket/out.zarr",
        "az://container/out.zarr?sig=sesame",
        "s3://bucket/out.zarr#sesame",
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(bad: str) -> None:
    with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID") as refused:
        location_of(bad)
    assert not re.search("ses?ame|AKIA|same", str(refused.value))


@pytest.mark.parametrize(
    "bad",
    [
        "https://host/out.zarr",
        "memory://out.zarr",
        "s3://",
        "s3:///out.zarr",
        "s3://bucket/a//b",
        "s3://bucket/../b",
        "file://host/tmp/out.zarr",
        Path("s3://bucket/out.zarr"),
        "s3:/bucket/out.zarr",
    ],
)
def test_a_url_that_means_nothing_is_refused(bad: str | Path) -> None:
    with pytest.raises(UsageError, match=r"out\.zarr|write s3://bucket/prefix"):
        location_of(bad)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    assert location_of(f"file://{tmp_path}/a%20b").path == tmp_path / "a b"
    assert location_of("s3://bucket/a/b/").path == "s3://bucket/a/b"


def test_without_obstore_the_error_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from virnuc_dask.cli.main import main; main(['status', 's3://bucket/out.zarr'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*pip install obstore\n", done.stderr)


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (
            "Error performing PUT http://169.254.169.254/latest/api/token in 1s",
            "the environment has no credentials",
        ),
        ("Error performing GET https://a.net/c/x?sig=sesame - odd", "https://a.net does not answ"),
        ("Generic Azure error: ?sig=sesame is odd\nand more", "Generic Azure error:  is odd"),
        ("GET http://me:sesame@a.net/c - odd", "http://a.net does not answer"),
        ("kind: Timeout, uri: http://a.net/x", "http://a.net does not answer: timed out"),
    ],
)
def test_causes_are_short_and_without_secrets(said: str, cause: str) -> None:
    _, found = bucket._explained(said)
    assert found.startswith(cause)
    assert "sesame" not in found


def test_expired_credentials_and_full_servers_are_not_waited_out() -> None:
    from virnuc_dask.runtime import failures

    def error(said: str) -> LocationError:
        return LocationError(*bucket._explained(said), "s3://bucket/out.zarr")

    hopeless: Callable[[str], bool] = lambda said: failures.is_hopeless(error(said))  # noqa: E731
    assert hopeless("status code: 400 Bad Request: <Error><Code>ExpiredToken</Code></Error>")
    assert hopeless("status code: 507 Insufficient Storage: ")
    assert hopeless("status code: 401 Unauthorized: ")
    assert not hopeless("status code: 503 Slow Down: ")
    assert failures.is_transient(error("status code: 500 Internal Server Error: "))
