"""Addresses of media: what they carry, what is fetched from a server here, and what is refused."""

from __future__ import annotations

import base64
import io
import os
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image

from omni.processing.media import MediaError, addresses, fetched, kind_of, read_audio, read_image, read_video


@pytest.fixture(scope="module")
def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)).save(buffer, "PNG")
    return buffer.getvalue()


class Server:
    """An HTTP server on this machine. answers: path → what is sent, or a function of the handler. asked, hosts, logins:
    of each request in turn the path, and what its headers Host and Authorization say."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []
        self.hosts: list[str | None] = []
        self.logins: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                outer.hosts.append(self.headers["Host"])
                outer.logins.append(self.headers["Authorization"])
                answer = outer.answers.get(self.path)
                if callable(answer):
                    answer(self)
                elif answer is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:
                """Clients that go away are what is tested here."""

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running = Server()
    yield running
    running.server.shutdown()
    running.server.server_close()


def redirect(target: str) -> Any:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    return answer


@pytest.mark.parametrize("name", ["a.png", "with space & ü.png", "100% #1?.png"])
def test_a_file_address_is_its_path(tmp_path: Path, picture: bytes, name: str) -> None:
    """Protects: %-escapes are resolved, in any alphabet, and what is not escaped stays."""
    path = tmp_path / name
    path.write_bytes(picture)
    expected = read_image(path)
    for address in (path.as_uri(), f"file://localhost{quote(str(path))}", f"FILE://{quote(str(path))}"):
        assert kind_of(address) == "image" and torch.equal(read_image(address), expected)


def test_bytes_are_a_source(picture: bytes) -> None:
    for data in (picture, bytearray(picture), memoryview(picture)):
        assert kind_of(data) == "image" and read_image(data).shape == (3, 20, 30)
    with pytest.raises(MediaError, match="the data is empty"):
        read_image(b"")
    with pytest.raises(MediaError, match="the data cannot be read"):
        read_video(b"no clip at all" * 100)


def test_data_addresses_of_any_type(picture: bytes) -> None:
    """Protects: the content decides, not the type; both alphabets, line breaks, %-escapes, no padding."""
    packed = base64.b64encode(picture).decode()
    lines = "\n".join(packed[start : start + 76] for start in range(0, len(packed), 76))
    safe = base64.urlsafe_b64encode(picture).decode().rstrip("=")
    for address in (
        f"data:image/png;base64,{packed}",
        f"data:image;base64,{packed}",
        f"data:video/mp4;codecs=avc1;base64,{packed}",
        f"DATA:;BASE64,{lines}",
        f"data:application/octet-stream;base64,{safe}",
        f"data:image/png;base64,{quote(packed, safe='')}",
        f"data:image/png,{quote(picture)}",
    ):
        assert kind_of(address) == "image" and read_image(address).shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("data:image/png;base64," + "!" * 5000, "is not base64"),
        ("data:image/png;base64," + "é" * 5000, "is not base64"),
        ("data:image/png;base64" + "A" * 5000, "no comma"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64," + "AAAA" * 5000, "cannot be read|not a picture"),
        ("data:" + "x" * 5000 + ",AAAA", "cannot be read|not a picture"),
        ("file://elsewhere/a.png", r"write file:///path/to/file"),
        ("file:a.png", r"write file:///path/to/file"),
        ("file://" + "/x" * 3000, "cannot be opened|does not exist"),
        ("file:///gone%20" + "x" * 200 + ".png", "does not exist"),
        ("https://example.org/" + "x" * 5000, r"urls=True \(--urls\) allows"),
        ("HTTP://example.org/" + "x" * 5000, r"urls=True \(--urls\) allows"),
    ],
)
def test_addresses_that_lead_nowhere_are_told_in_brief(address: str, message: str) -> None:
    """Protects: no error repeats more than 80 characters of an address."""
    for read in (kind_of, read_image, read_video, read_audio):
        with pytest.raises(MediaError, match=message) as caught:
            read(address)
        said = str(caught.value)
        longest = max(n for n in range(len(address) + 1) if address[:n] in said)
        assert longest <= 80 and len(said) < 300


def test_what_is_fetched_is_read_and_removed(server: Server, picture: bytes) -> None:
    """Protects: only when it is asked for; streamed into a file that is gone afterwards, also after an error."""
    server.answers["/a%20b.png?x=1"] = picture
    address = f"{server.url}/a%20b.png?x=1"
    with pytest.raises(MediaError, match="urls=True"), fetched(address):
        pass
    assert server.asked == []
    with fetched(address, urls=True) as source:
        path = os.fspath(source)
        assert Path(path).read_bytes() == picture
        assert kind_of(source) == "image" and read_image(source).shape == (3, 20, 30)
        with pytest.raises(MediaError, match=rf"^{address.replace('?', '.')} is a single picture"):
            read_video(source)
    assert not Path(path).parent.exists() and server.asked == ["/a%20b.png?x=1"]
    with pytest.raises(ZeroDivisionError), fetched(address, urls=True) as source:
        path = os.fspath(source)
        raise ZeroDivisionError
    assert not Path(path).exists()
    for other in ("a.png", b"x", 17, None, f"file://{path}"):
        with fetched(other, urls=True) as source:
            assert source is other


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("/клип 1.png", "/%D0%BA%D0%BB%D0%B8%D0%BF%201.png"),
        ("/a.png?q=ü b&x=[1]#t=10", "/a.png?q=%C3%BC%20b&x=[1]"),
        ("/a%20b%2Fc%zz.png?x=%26;y=a+b", "/a%20b%2Fc%zz.png?x=%26;y=a+b"),
        ('/"<a>"\x01.png \n', "/%22%3Ca%3E%22%01.png"),
    ],
)
def test_addresses_are_asked_for_as_browsers_do(server: Server, picture: bytes, written: str, asked: str) -> None:
    """Protects: what an address may not have is escaped, once; what is escaped, or may stand there, stays."""
    server.answers[asked] = picture
    with fetched(server.url + written, urls=True) as source:
        assert Path(source).read_bytes() == picture
    assert server.asked == [asked]


def test_a_redirect_in_any_alphabet(server: Server, picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: servers write UTF-8, or other bytes, into a header whose text is Latin-1: those bytes are asked for."""
    monkeypatch.setattr(addresses, "_require_public", lambda place: None)
    for raw, asked in (("/ü x.png".encode(), "/%C3%BC%20x.png"), ("/ü.png".encode("latin-1"), "/%FC.png")):
        server.answers |= {"/start": redirect(raw.decode("latin-1")), asked: picture}
        with fetched(f"{server.url}/start", urls=True) as source:
            assert Path(source).read_bytes() == picture
        assert server.asked[-1] == asked


def test_a_host_in_any_alphabet(server: Server, picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = addresses.socket.getaddrinfo
    names: list[str] = []

    def here(host: str, *rest: Any, **options: Any) -> Any:
        names.append(host)
        return look_up("127.0.0.1", *rest, **options)

    monkeypatch.setattr(addresses.socket, "getaddrinfo", here)
    server.answers["/a.png"] = picture
    port = server.server.server_port
    with fetched(f"http://bücher.example:{port}/a.png", urls=True) as source:
        assert Path(source).read_bytes() == picture
    assert names == ["xn--bcher-kva.example"] and server.hosts == [f"xn--bcher-kva.example:{port}"]


def test_a_password_is_for_its_own_server(server: Server, picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: it is sent as RFC 7617 has it, also after a redirect within the server, and nowhere else: neither after
    a redirect to another, nor after one back."""
    monkeypatch.setattr(addresses, "_require_public", lambda place: None)
    port = server.server.server_port
    server.answers |= {
        "/within": redirect("/a.png"),
        "/same": redirect(f"{server.url}/a.png"),
        "/away": redirect(f"http://localhost:{port}/back"),
        "/back": redirect(f"{server.url}/a.png"),
        "/other": redirect(f"http://you:too@localhost:{port}/a.png"),
        "/a.png": picture,
    }
    mine = f"Basic {base64.b64encode('me:gé heim:@'.encode()).decode()}"
    yours = f"Basic {base64.b64encode(b'you:too').decode()}"
    for path, expected in (
        ("/a.png", [mine]),
        ("/within", [mine, mine]),
        ("/same", [mine, mine]),
        ("/away", [mine, None, None]),
        ("/other", [mine, yours]),
    ):
        server.logins.clear()
        with fetched(f"http://me:g%C3%A9 heim:%40@127.0.0.1:{port}{path}", urls=True) as source:
            assert Path(source).read_bytes() == picture
            assert str(source) == f"http://…@127.0.0.1:{port}{path}"
        assert server.logins == expected


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://me:geheim@127.0.0.1:1/a.png", r"^http://…@127\.0\.0\.1:1/a\.png cannot be fetched: "),
        ("http://me:geheim@host:x/a.png", r"^http://…@host:x/a\.png is not fetched: its server is malformed"),
        ("http://me:ge/heim@host/a.png", r"^http://…@host/a\.png is not fetched: its server is malformed"),
        ("http://me:geheim@[::1/a.png", r"is not fetched: its server is malformed"),
        ("http://me:geheim@ho℀st/a.png", r"is not fetched: its server is malformed"),
        ("http://me:geheim@" + "ü" * 80 + "/a.png", r"is not fetched: its server is malformed"),
    ],
)
def test_no_message_has_a_password(address: str, message: str) -> None:
    """Protects: neither the message nor what it was raised from, whatever is wrong with the address; allowed or not."""
    for urls in (True, False):
        with pytest.raises(MediaError, match=message if urls else "urls=True") as caught, fetched(address, urls=urls):
            pass
        said = "".join(traceback.format_exception(caught.value, limit=0))
        assert not any(part in said for part in ("geheim", "heim@", "'ge'"))
    assert addresses.shown("http://host:80/@me/a@b.png") == "http://host:80/@me/a@b.png"
    assert addresses.shown("http://[::1]:80/@me") == "http://[::1]:80/@me"


def test_answers_without_a_length_and_with_another_status(server: Server, picture: bytes) -> None:
    def chunked(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(picture)

    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(picture) + 1000))
        handler.end_headers()
        handler.wfile.write(picture)

    def broken(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"\x00\x01 what\r\n\r\n")

    server.answers |= {"/chunked": chunked, "/cut": cut, "/broken": broken}
    with fetched(f"{server.url}/chunked", urls=True) as source:
        assert Path(source).read_bytes() == picture
    for path, message in (
        ("/gone", "the server answers 404"),
        ("/cut", rf"the connection ended after {len(picture)} of {len(picture) + 1000} bytes"),
        ("/broken", "cannot be fetched"),
    ):
        with pytest.raises(MediaError, match=message), fetched(server.url + path, urls=True):
            pass
    for address in ("http://127.0.0.1:1/a.png", "http://", "http://[::1", "http://host.invalid/a.png"):
        with pytest.raises(MediaError, match=r"cannot be fetched|is not fetched"), fetched(address, urls=True):
            pass


@pytest.mark.parametrize(
    "target",
    [
        "http://10.1.2.3/a.png",
        "http://192.168.0.1/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://localhost:{port}/a.png",
        "http://[::1]:{port}/a.png",
        "http://[::ffff:127.0.0.1]:{port}/a.png",
        "http://0.0.0.0:{port}/a.png",
        "http://2130706433:{port}/a.png",
        "//127.0.0.1:{port}/a.png",
        "/a.png",
    ],
)
def test_a_redirect_to_a_private_address_is_refused(server: Server, picture: bytes, target: str) -> None:
    """Protects: what a server names is not asked for on the networks behind this machine, under no notation; the
    address that the user names may be one of them, as this server's is."""
    server.answers |= {"/start": redirect(target.format(port=server.server.server_port)), "/a.png": picture}
    refused = pytest.raises(MediaError, match=r"is not fetched: it redirects to a private address")
    with refused, fetched(f"{server.url}/start", urls=True):
        pass
    assert server.asked == ["/start"]


def test_a_name_that_changes_is_refused_before_it_is_asked(
    server: Server, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: a name that is public when it is looked up and private when it is connected to."""
    look_up = addresses.socket.getaddrinfo
    port = server.server.server_port

    def public_at_first(host: str, *rest: Any, **options: Any) -> Any:
        found = look_up("127.0.0.1" if host == "rebound.example" else host, *rest, **options)
        if host == "rebound.example" and "type" in options:
            return [(*entry[:4], ("8.8.8.8", port)) for entry in found]
        return found

    monkeypatch.setattr(addresses.socket, "getaddrinfo", public_at_first)
    server.answers |= {"/start": redirect(f"http://rebound.example:{port}/a.png"), "/a.png": picture}
    refused = pytest.raises(MediaError, match="redirects to a private address")
    with refused, fetched(f"{server.url}/start", urls=True):
        pass
    assert server.asked == ["/start"]


def test_other_redirects(server: Server, picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: no other scheme, no endless chase; a redirect to a public address is followed."""
    server.answers |= {"/a.png": picture, "/loop": redirect("/loop"), "/start": redirect("/a.png")}
    for target in ("file:///etc/passwd", "ftp://example.org/a", "data:text/plain,x", "https://example.org/a.png"):
        server.answers["/other"] = redirect(target)
        refused = pytest.raises(MediaError, match="it redirects from http:// to another scheme")
        with refused, fetched(f"{server.url}/other", urls=True):
            pass
    monkeypatch.setattr(addresses, "_require_public", lambda place: None)
    with fetched(f"{server.url}/start", urls=True) as source:
        assert Path(source).read_bytes() == picture
    with pytest.raises(MediaError, match="redirects more than 5 times"), fetched(f"{server.url}/loop", urls=True):
        pass


def test_size_and_time_are_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: neither a claimed nor a real size, nor an answer that drips, goes beyond what is allowed."""

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(1000):
            handler.wfile.write(bytes(2**16))

    def dripping(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.1)

    def slow_head(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for number in range(100):
            handler.wfile.write(b"X-%d: y\r\n" % number)
            time.sleep(0.1)

    server.answers |= {"/endless": endless, "/drip": dripping, "/head": slow_head, "/large": bytes(2**21)}
    monkeypatch.setattr(addresses, "MAX_BYTES", 2**20)
    for path in ("/endless", "/large"):
        with pytest.raises(MediaError, match=r"it has more than .* GiB"), fetched(server.url + path, urls=True):
            pass
    monkeypatch.setattr(addresses, "MAX_SECONDS", 0.5)
    for path in ("/drip", "/head"):
        begun = time.monotonic()
        with pytest.raises(MediaError, match="it takes more than"), fetched(server.url + path, urls=True):
            pass
        assert time.monotonic() - begun < 8
