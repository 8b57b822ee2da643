"""Out of reach, the hub is not asked: one try of a connection, one message, and nothing but the cache is looked at."""

import socket
import threading
import time
from contextlib import contextmanager

import datasets
import huggingface_hub
import pytest

from alpacache import hub
from alpacache.alpamayo.checkpoint import Checkpoint
from alpacache.checks import machine
from alpacache.errors import CheckpointError, SourceError
from alpacache.hub import knock as real_knock
from alpacache.sources import pai
from alpacache.sources.registry import open_source

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (*PROXIES, *map(str.upper, PROXIES), "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://huggingface.co")


@pytest.fixture
def knocks(monkeypatch):
    """Places that were tried; none of them answers."""
    found = []

    def knock(host, port, wait_s, url):
        found.append((host, port, wait_s))
        return "Name or service not known"

    monkeypatch.setattr(hub, "knock", knock)
    return found


@contextmanager
def listening(answer=None):
    """A server on this machine that says `answer` to its first caller, or never a word; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            caller, _ = server.accept()
            with caller:
                if caller.recv(4096):
                    caller.sendall(answer)

        if answer is not None:
            threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def test_a_proxy_that_listens_is_reachable_and_a_closed_port_is_not():
    with listening() as port:
        assert real_knock("127.0.0.1", port, 30.0, "") == ""
    started = time.monotonic()
    assert "refused" in real_knock("127.0.0.1", port, 30.0, "")
    assert time.monotonic() - started < 15  # it was not waited for


@pytest.mark.parametrize(
    ("answer", "scheme", "reachable"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", "http", True),
        (b"HTTP/1.0 503 Busy\r\n\r\n", "http", True),
        (b"SSH-2.0-x\r\n", "http", False),
        (b"", "http", False),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "https", False),
    ],
)
def test_a_hub_is_what_answers_a_request(answer, scheme, reachable):
    with listening(answer) as port:
        failure = real_knock("127.0.0.1", port, 30.0, f"{scheme}://me:secret@127.0.0.1:{port}/hf")
    assert (failure == "") is reachable
    assert reachable or "answers no HTTP request within 30 s" in failure


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_listener_that_never_says_a_word_is_no_hub(scheme, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "knock", real_knock)
    monkeypatch.setattr(hub, "_WAIT_S", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with listening() as port:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"{scheme}://127.0.0.1:{port}")
        message = rf"cannot be reached \(HF_ENDPOINT 127.0.0.1:{port}: answers no HTTP request within 0.2 s"
        with pytest.raises(CheckpointError, match=message):
            hub.check_model("no/such")


def test_a_name_that_is_looked_up_for_ever_is_not_waited_for(monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: held.wait(30) and [])
    assert real_knock("slow.example", 443, 0.05, "https://slow.example") == "no answer within 0.05 s"
    held.set()


def test_an_address_that_swallows_everything_does_not_hide_another(monkeypatch):
    """As where IPv6 is configured and leads nowhere."""
    with listening() as port:
        addresses = [("127.0.0.9", port), ("127.0.0.1", port)]
        monkeypatch.setattr(
            socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 0, 0, "", one) for one in addresses]
        )
        connect = socket.socket.connect

        def swallowing(one, address):
            if address == addresses[0]:
                raise TimeoutError(time.sleep(0.2))
            return connect(one, address)

        class Socket(socket.socket):
            connect = swallowing

        monkeypatch.setattr(socket, "socket", Socket)
        assert real_knock("two.example", port, 30.0, "") == ""


def test_what_does_not_answer_is_named_and_left_alone_for_a_while(knocks, monkeypatch):
    why = "hub huggingface.co:443: Name or service not known"
    assert [hub.why_unreachable() for _ in range(3)] == [why] * 3
    assert knocks == [("huggingface.co", 443, 2.0)]
    monkeypatch.setattr(hub, "_KEPT_S", 0.0)
    monkeypatch.setattr(hub, "knock", lambda *place: knocks.append(place[:3]) or "")
    assert hub.why_unreachable() == hub.why_unreachable() == ""
    assert len(knocks) == 2


@pytest.mark.parametrize(
    ("endpoint", "environment", "place"),
    [
        ("https://hf-mirror.example", {}, ("hf-mirror.example", 443)),
        ("http://mirror.local:8080/hf", {}, ("mirror.local", 8080)),
        ("https://huggingface.co", {"HTTPS_PROXY": "http://me:secret@proxy.local:3128"}, ("proxy.local", 3128)),
        ("https://huggingface.co", {"https_proxy": "proxy.local:3128"}, ("proxy.local", 3128)),
        ("https://huggingface.co", {"ALL_PROXY": "socks5://proxy.local"}, ("proxy.local", 1080)),
        ("https://huggingface.co", {"HTTP_PROXY": "http://proxy.local:3128"}, ("huggingface.co", 443)),
        ("https://hub.local", {"HTTPS_PROXY": "http://proxy.local:3128", "NO_PROXY": ".local"}, ("hub.local", 443)),
    ],
)
def test_a_mirror_or_proxy_is_what_has_to_answer(knocks, monkeypatch, endpoint, environment, place):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert f"{place[0]}:{place[1]}" in (why := hub.why_unreachable())
    assert "secret" not in why
    assert knocks == [(*place, 2.0)]


def test_a_slow_network_may_be_given_more_time(knocks, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "40")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 40)
    hub.why_unreachable()
    assert knocks == [("huggingface.co", 443, 40.0)]


def test_an_address_that_is_none_is_left_to_the_client(knocks, monkeypatch):
    for endpoint in ("https://hub.local:port", "hub.local"):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        assert hub.why_unreachable() == ""
    assert knocks == []


def test_offline_by_choice_nothing_is_tried(knocks, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.why_unreachable() == "HF_HUB_OFFLINE is set"
    assert knocks == []


def test_a_model_is_looked_for_in_the_cache_alone_and_one_message_says_what_to_do(
    knocks, tiny_checkpoint, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = (
        r"config.json of owner/model is not in the local hub cache and the hub cannot be reached \(hub "
        r"huggingface.co:443: Name or service not known\)\. .*`hf download owner/model` .*`hf auth login`.*HF_HOME"
        r".*directory of the checkpoint"
    )
    checkpoint = Checkpoint("owner/model")
    with pytest.raises(CheckpointError, match=message):
        _ = checkpoint.config
    with pytest.raises(CheckpointError, match="hub cannot be reached"):
        checkpoint.file("model.safetensors.index.json")
    snapshot = tmp_path / "models--owner--model/snapshots" / ("0123" * 10)
    snapshot.mkdir(parents=True)
    for file in tiny_checkpoint.iterdir():
        if file.is_file():
            (snapshot / file.name).symlink_to(file)
    (tmp_path / "models--owner--model/refs").mkdir()
    (tmp_path / "models--owner--model/refs/main").write_text(snapshot.name)
    assert Checkpoint("owner/model").config == Checkpoint(str(tiny_checkpoint)).config
    hub.check_model("owner/model")
    for no_id in (str(tiny_checkpoint), "neither", "../owner/model", "n" * 300):
        hub.check_model(no_id)
    with pytest.raises(CheckpointError, match=r"config.json of owner/other is not in the local hub cache"):
        hub.check_model("owner/other")
    assert len(knocks) == 1
    assert caplog.records == []


def test_headers_and_data_sets_are_not_asked_for(knocks, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was asked for")

    monkeypatch.setattr(huggingface_hub.HfApi, "parse_safetensors_file_metadata", never)
    checkpoint = Checkpoint("owner/model")
    vars(checkpoint).update(names={"expert.norm.weight": "model.safetensors"}, revision="0" * 40)
    with pytest.raises(CheckpointError, match=r"the header of model\.safetensors of owner/model is not in the local"):
        checkpoint.shapes("expert.")
    monkeypatch.setattr(datasets, "load_dataset_builder", never)
    message = r"hf:who/what cannot be read: the hub cannot be reached \(.*\)\. Try again online, .*hf download who/what"
    with pytest.raises(SourceError, match=message):
        open_source("hf:who/what")
    monkeypatch.setattr(pai, "_devkit", lambda: never)
    with pytest.raises(SourceError, match=r"the hub cannot be reached \(.*\); try again online, or .*pai:DIR"):
        open_source("pai")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"\(HF_HUB_OFFLINE is set\); unset it, or read a local tree"):
        open_source("pai")
    assert len(knocks) == 1


def test_the_doctor_tells_a_hub_out_of_reach_from_one_that_is_left_alone(knocks, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    found = machine.check_hub()
    assert (found.status, found.found) == (
        "warn",
        "a token, out of reach (hub huggingface.co:443: Name or service not known)",
    )
    assert "HTTPS_PROXY" in found.remedy
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert machine.check_hub().found == "a token, offline"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_known", {("huggingface.co", 443): (time.monotonic(), "")})
    assert (machine.check_hub().status, machine.check_hub().found) == ("ok", "a token, online")
