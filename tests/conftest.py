"""Shared by all tests: no process outlives its run, and an S3 server (moto's) with faults on demand in front of it."""

import http.client
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ACCESS_KEY, SECRET_KEY = "AKIATESTTESTTESTTEST", "secret/of+the/tests"

# No test is timed: the first example may import a library, and the machine may be busy.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")

sys.path.append(str(Path(__file__).parent / "browser"))

REAPER: pytest.StashKey[subprocess.Popen[bytes]] = pytest.StashKey()

_REFUSALS = {"500": "500 Internal Server Error", "503": "503 Slow Down", "429": "429 Too Many Requests"}
_REFUSALS["404"] = "404 Not Found"


def pytest_configure(config: pytest.Config) -> None:
    """Mark every process of this run, xdist's workers included, for the reaper that ends them when pytest is gone."""
    if hasattr(config, "workerinput") or not Path("/proc/self/environ").exists():
        return
    mark = f"ALPACACHE_TEST_RUN={uuid.uuid4()}"
    reaper = subprocess.Popen([sys.executable, Path(__file__).with_name("reaper.py"), mark], stdin=subprocess.PIPE)
    os.environ.update([mark.split("=")])
    config.stash[REAPER] = reaper


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests an hour: on a busy machine the longest need many times what they need alone."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3600))


def pytest_unconfigure(config: pytest.Config) -> None:
    reaper = config.stash.get(REAPER, None)
    if reaper is not None:
        reaper.communicate()


def _usual_priority() -> None:
    if hasattr(os, "sched_setscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(autouse=True)
def usual_priority() -> Iterator[None]:
    """As root, SVT-AV1 gives the thread that encodes real-time priority, and every later process would inherit it."""
    _usual_priority()
    yield
    _usual_priority()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is read again as often as ever, but at once."""
    from cache_store import rereading
    from cache_store.upkeep import verification

    monkeypatch.setattr(rereading, "WAITS_S", (0.0,) * len(rereading.WAITS_S))
    for name in ("ROUNDS_S", "REPAIR_ROUNDS_S"):
        monkeypatch.setattr(verification, name, (0.0,) * len(getattr(verification, name)))


@dataclass
class Fault:
    """What happens to the next `times` requests of a method on a path that contains `part`.

    `500`, `503`, `429`, `404`: refused, nothing is done. `lost`: done, but answered with 500. `late`: done, but
    answered after the client has given up. `hang`: not done, and answered as late. `cut`: the answer's body ends in
    the middle.
    """

    kind: str
    method: str
    part: str
    times: int = 1
    seen: int = 0


@dataclass
class FaultyServer:
    """A WSGI application around moto's. Conditional puts are served one at a time: moto checks, and then stores."""

    app: Callable[..., Any]
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    late_s: float = 0.0
    ignore_conditions: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    one_put: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        with self.lock:
            self.requests.append((method, path))
            fault = next((f for f in self.faults if f.method == method and f.part in path and f.seen < f.times), None)
            if fault is not None:
                fault.seen += 1
        kind = "" if fault is None else fault.kind
        if kind in (*_REFUSALS, "hang"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            if kind == "hang":
                time.sleep(self.late_s)
            start_response(_REFUSALS.get(kind, _REFUSALS["500"]), [("Content-Length", "0")])
            return [b""]
        if self.ignore_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if "HTTP_IF_NONE_MATCH" in environ:
            with self.one_put:
                answer = self._serve(environ)
        else:
            answer = self._serve(environ)
        if kind == "late":
            time.sleep(self.late_s)
        if kind == "lost":
            answer = (_REFUSALS["500"], [("Content-Length", "0")], b"")
        status, headers, body = answer
        start_response(status, headers)
        return [body[: len(body) // 2] if kind == "cut" else body]

    def _serve(self, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        got: list[Any] = []
        body = self.app(environ, lambda status, headers, *rest: got.append((status, headers)))
        try:
            data = b"".join(body)
        finally:
            if hasattr(body, "close"):
                body.close()
        return *got[0], data

    def count(self, method: str, part: str) -> int:
        return sum(method == found and part in path for found, path in self.requests)


class S3:
    """A fresh bucket on the server; the environment has its address and keys."""

    access_key, secret_key = ACCESS_KEY, SECRET_KEY

    def __init__(self, server: FaultyServer, port: int, bucket: str) -> None:
        self.server, self.port, self.bucket = server, port, bucket
        self.endpoint = f"http://127.0.0.1:{port}"

    def uri(self, name: str = "store") -> str:
        return f"s3://{self.bucket}/{name}"

    def fail(self, kind: str, method: str, part: str, times: int = 1) -> Fault:
        self.server.faults.append(Fault(kind, method, part, times))
        return self.server.faults[-1]

    def make_bucket(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("PUT", f"/{self.bucket}")
        assert connection.getresponse().status == 200
        connection.close()

    def put(self, name: str, data: bytes) -> None:
        """An object past the code under test; the name begins with the store's."""
        import obstore

        obstore.put(self._client(), name, data)

    def put_raw(self, key: str, data: bytes) -> None:
        """An object whose key no careful client would make."""
        import boto3

        client = boto3.client("s3", endpoint_url=self.endpoint)
        client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def delete(self, name: str) -> None:
        import obstore

        obstore.delete(self._client(), name)

    def objects(self, name: str = "store") -> dict[str, bytes]:
        """All objects of a store, by their names in it."""
        import obstore

        paths = [item["path"] for page in obstore.list(self._client(), name) for item in page]
        return {path.removeprefix(f"{name}/"): bytes(obstore.get(self._client(), path).bytes()) for path in paths}

    def _client(self) -> Any:
        from obstore.store import S3Store

        return S3Store(self.bucket)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[FaultyServer, int]]:
    pytest.importorskip("obstore", reason="object storage needs obstore (the extra s3)")
    pytest.importorskip("moto", reason="the S3 server of the tests is moto")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = FaultyServer(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield app, server.port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def s3(s3_server: tuple[FaultyServer, int], monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> Iterator[S3]:
    from cache_store.storage import s3_access

    server, port = s3_server
    server.faults, server.requests, server.ignore_conditions, server.late_s = [], [], False, 3.0
    home = tmp_path_factory.mktemp("home")
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "credentials"),
        "AWS_CONFIG_FILE": str(home / "config"),
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(s3_access, "FIRST_WAIT", timedelta(milliseconds=5))
    monkeypatch.setattr(s3_access, "MAX_RETRIES", 3)
    found = S3(server, port, f"bucket-{time.monotonic_ns()}")
    found.make_bucket()
    yield found
    server.faults = []


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium; without one on the path the test is skipped."""
    import headless

    executable = headless.chromium()
    if executable is None:
        pytest.skip("no chromium on the path; Debian's package `chromium` provides it")
    opened = headless.Browser(executable, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
