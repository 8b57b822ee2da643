"""Finds out whether the hub is within reach before its client is asked.

Without a network the client tries every request for half a minute and warns each time. So a connection is opened first,
to the hub or mirror (HF_ENDPOINT), which must answer one HTTP request, or to the proxy that leads there. No time-out of
the client is touched: once anything answers, a slow network has all the time it had.
"""

import os
import re
import socket
import ssl
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from alpacache.errors import CheckpointError

MODEL_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
"""OWNER/NAME of a repository."""
_WAIT_S = 2.0
_KEPT_S = 30.0
"""Seconds for which a hub that did not answer is not tried again; one that did is taken to stay."""
_PORTS = {"http": 80, "https": 443}
_SOCKS_PORT = 1080
_STATUS = b"HTTP/"
_known: dict[tuple[str, int], tuple[float, str]] = {}
"""Host and port to when they were tried, and what came of it."""


def check_model(model: str) -> None:
    """Raise `CheckpointError` for the id of a model that can neither be fetched nor is in the hub's cache.

    Quickly, for whoever would otherwise load libraries for seconds first. What is a directory, or no id, passes.
    """
    if not MODEL_ID.fullmatch(model) or Path(model).is_dir() or Path(model).parent.is_dir():
        return
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(model, "config.json"), str) and why_unreachable():
        raise absent("config.json", model)


def absent(name: str, repo: str, *, revision: str | None = None) -> CheckpointError:
    """The error for a file of a hub's model that is not in the cache and cannot be fetched."""
    fetch = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    why = f" ({reason})" if (reason := why_unreachable()) else ""
    return CheckpointError(
        f"{name} of {repo} is not in the local hub cache and the hub cannot be reached{why}. On a machine with "
        f"network: `{fetch}` (a gated one after `hf auth login`); then copy the cache (HF_HOME) here, or pass the "
        "directory of the checkpoint instead of the id (relative to the current directory, there is none of this name)."
    )


def why_unreachable() -> str:
    """Why the hub cannot be reached, for people; empty if it can.

    An answer is awaited for two seconds, or for HF_HUB_ETAG_TIMEOUT where that is set: the client's own for the first
    answer to a request.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host, port, what = _door(constants.ENDPOINT)
    if not host:
        return ""  # the client says what is wrong with such an address
    tried, failure = _known.get((host, port), (-_KEPT_S, "untried"))
    if failure and time.monotonic() - tried >= _KEPT_S:
        wait_s = float(constants.HF_HUB_ETAG_TIMEOUT) if "HF_HUB_ETAG_TIMEOUT" in os.environ else _WAIT_S
        failure = knock(host, port, wait_s, "" if what == "proxy" else constants.ENDPOINT)
        _known[host, port] = time.monotonic(), failure
    return f"{what} {host}:{port}: {failure}" if failure else ""


def _door(endpoint: str) -> tuple[str, int, str]:
    """Host and port that a request to the hub connects to, and what that is; without a name and password."""
    address = urlsplit(endpoint)
    host, proxies = address.hostname or "", getproxies_environment()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    what = "hub" if host == "huggingface.co" else "HF_ENDPOINT"
    try:
        if proxy and not proxy_bypass(host):
            through = urlsplit(proxy if "//" in proxy else f"//{proxy}")
            port = through.port or (
                _SOCKS_PORT if through.scheme.startswith("socks") else _PORTS.get(through.scheme, 80)
            )
            return through.hostname or "", port, "proxy"
        return host, address.port or _PORTS.get(address.scheme, 443), what
    except ValueError:  # a port that is no number
        return "", 0, ""


def knock(host: str, port: int, wait_s: float, url: str) -> str:
    """Connect to any of the host's addresses, all of them at once; what went wrong, empty if one has answered.

    In threads that nobody waits for longer: looking a name up cannot be given a time-out.

    Args:
        wait_s: seconds for all of it.
        url: what must answer a request over the connection, with whatever status; empty for a proxy, which need not.
    """
    mute = f"answers no HTTP request within {wait_s:g} s; HF_HUB_ETAG_TIMEOUT gives a slow network longer"
    connected = threading.Event()
    told: SimpleQueue[str] = SimpleQueue()
    failures: list[str] = []

    def connect(family: socket.AddressFamily, address: tuple[object, ...]) -> None:
        try:
            with socket.socket(family, socket.SOCK_STREAM) as one:
                one.settimeout(wait_s)
                one.connect(address)
                connected.set()
                if url and not _answers(one, url):
                    failures.append(mute)
                    return
            told.put("")
        except OSError as error:
            failures.append(error.strerror or str(error))

    def resolve() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            told.put(getattr(error, "strerror", None) or str(error))
            return
        tries = [threading.Thread(target=connect, args=(family, address), daemon=True) for family, *_, address in found]
        for thread in tries:
            thread.start()
        for thread in tries:
            thread.join()
        told.put(failures[0] if failures else "")

    threading.Thread(target=resolve, daemon=True).start()
    try:
        return told.get(timeout=wait_s)
    except Empty:
        return mute if connected.is_set() else f"no answer within {wait_s:g} s"


def _answers(connection: socket.socket, url: str) -> bool:
    """Tell whether an HTTP status line comes back. Certificates are left to the client: no secret is sent."""
    address, found = urlsplit(url), b""
    host = address.netloc.rpartition("@")[2]
    request = f"HEAD {address.path or '/'} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    try:
        if address.scheme == "https":
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = context.wrap_socket(connection, server_hostname=address.hostname)
        with connection:
            connection.sendall(request.encode())
            while len(found) < len(_STATUS) and (more := connection.recv(64)):
                found += more
    except (OSError, ValueError):  # or a name that TLS does not take
        return False
    return found.startswith(_STATUS)
