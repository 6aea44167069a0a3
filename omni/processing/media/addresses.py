"""Addresses of media: file://, data: and, where asked for, http:// and https://.

An address is a str that begins with one of these schemes; any other str is a path. http:// and https:// are asked for
as browsers do: a host in any alphabet by IDNA (of 2003), whatever else a path or query may not have as %-escapes. The
user:password@ of one stands in no message, and is sent to its own server alone.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import os
import re
import socket
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from omni.processing.frames import MediaError

MAX_BYTES = 4 * 2**30
"""Of what is fetched: an hour at 9 million bits a second."""
MAX_SECONDS = 20 * 60
STALL_SECONDS = 30
MAX_REDIRECTS = 5
SHOWN = 80
"""Characters of an address that a message repeats: a data: address is the whole file."""

_SCHEME = re.compile(r"(file|data|https?):", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=//)([^/?#]*|[^/?#:\[]*:(?![0-9]+[/?#])[^@]*)@")
"""Also with a password that should have been escaped, as no port is."""
_ALLOWED = "%!$&'()*+,;=:@/?[]"
"""Of paths and queries (RFC 3986, 3.3 and 3.4) beside letters, digits and -._~; what is an escape stays one."""


def scheme_of(source: Any) -> str | None:
    """file, data, http or https; None for what is no address."""
    found = _SCHEME.match(source) if isinstance(source, str) else None
    return found[1].lower() if found else None


def shown(source: str) -> str:
    """A path or an address as a message names it: of an address the first characters, never what it carries or
    who asks."""
    scheme = scheme_of(source)
    if scheme is None:
        return source if len(source) <= 300 else f"{source[:299]}…"
    source = source.partition(",")[0] + ",…" if scheme == "data" else _LOGIN.sub("…@", source, count=1)
    return source if len(source) <= SHOWN else f"{source[: SHOWN - 1]}…"


class Fetched(os.PathLike[str]):
    """A temporary file, called by the address that it came from."""

    def __init__(self, path: str, address: str) -> None:
        self.path, self.address = path, address

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return shown(self.address)


@contextmanager
def fetched(source: Any, *, urls: bool = False) -> Iterator[Any]:
    """What `source` is read from, several times if need be, until the end of the block: a http:// or https:// address
    is fetched into a temporary file, any other source is itself.

    urls: whether such addresses may be fetched. At most `MAX_BYTES` in `MAX_SECONDS`. Redirects may lead neither to
    another scheme nor to an address that is not public: those are the caller's to name, not a server's. Raises
    MediaError.
    """
    if scheme_of(source) not in ("http", "https"):
        yield source
        return
    if not urls:
        raise MediaError(refusal(source))
    with tempfile.TemporaryDirectory(prefix="seats-omni-") as folder:
        path = Path(folder) / "fetched"
        try:
            with path.open("wb") as file:
                _fetch(source, file)
        except OSError as error:
            raise MediaError(f"{shown(source)} cannot be kept on disk: {error.strerror or error}.") from error
        yield Fetched(str(path), source)


def refusal(address: str) -> str:
    return f"{shown(address)} is on the network: urls=True (--urls) allows to fetch it, or download it first."


def data_of(address: str) -> bytes:
    """What a data: address carries (RFC 2397), of any media type."""
    head, comma, body = address.partition(",")
    if not comma:
        raise MediaError(f"{shown(address)} is no data: address: it has no comma before its content.")
    content = urllib.parse.unquote_to_bytes(body)
    if not head.lower().rstrip().endswith(";base64"):
        return content
    return decoded(content, shown(address))


def decoded(text: bytes | str, name: str) -> bytes:
    """base64, in either alphabet, with line breaks and without padding as it may be."""
    try:
        packed = text.encode("ascii") if isinstance(text, str) else text
        packed = packed.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise MediaError(f"{name}: its content is not base64.") from error


def path_of(address: str) -> str:
    """The path that a file:// address names, with %-escapes resolved."""
    rest = address[len("file:") :]
    host, slash, path = rest[2:].partition("/") if rest.startswith("//") else ("", "/", rest[1:])
    if host.lower() not in ("", "localhost") or not slash or not rest.startswith("/"):
        raise MediaError(f"{shown(address)} names no file of this machine: write file:///path/to/file.")
    return os.fsdecode(urllib.parse.unquote_to_bytes(slash + path))


_TOO_LARGE = f"it has more than {MAX_BYTES / 2**30:g} GiB"
_TOO_SLOW = f"it takes more than {MAX_SECONDS / 60:g} minutes"


class _RefusedError(Exception):
    """Why an address is not fetched."""


def _fetch(address: str, file: BinaryIO) -> None:
    deadline = time.monotonic() + MAX_SECONDS
    try:
        here, login = _asked(address)
        for hop in range(MAX_REDIRECTS + 1):
            with _answer(here, login, deadline, redirected=hop > 0) as answer:
                target = answer.headers.get("Location") if 300 <= answer.status < 400 else None
                if target is None:
                    _copy(answer, file, deadline)
                    return
            # http.client reads headers as Latin-1, where servers write UTF-8.
            target = target.encode("latin-1").decode(errors="surrogateescape")
            before, (here, its) = here, _asked(urllib.parse.urljoin(here, target))
            if scheme_of(here) != scheme_of(before):
                raise _RefusedError(f"it redirects from {scheme_of(before)}:// to another scheme")
            login = its or (login if _server(here) == _server(before) else None)
        raise _RefusedError(f"it redirects more than {MAX_REDIRECTS} times")
    except _RefusedError as error:
        raise MediaError(f"{shown(address)} is not fetched: {error}.") from None
    # What the libraries raise of broken answers, names and addresses; a connection that is shut ends in any of them.
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
        why = f"{getattr(error, 'reason', None) or error}" or type(error).__name__
        if time.monotonic() >= deadline:
            why = _TOO_SLOW
        raise MediaError(f"{shown(address)} cannot be fetched: {why:.160}.") from error


def _asked(address: str) -> tuple[str, str | None]:
    """An address as a server is asked for it, and the Authorization (RFC 7617) of the user:password@ that it had."""
    try:
        parts = urllib.parse.urlsplit(address.strip())
        user, password = (urllib.parse.unquote(each or "") for each in (parts.username, parts.password))
        server, port = parts.netloc.rpartition("@")[2], parts.port
        if not server.isascii():
            server = (parts.hostname or "").encode("idna").decode() + ("" if port is None else f":{port}")
    except ValueError:  # which may repeat the password
        raise _RefusedError(
            "its server is malformed (in a user's name or password @ : / ? # % are %40 %3A %2F %3F %23 %25)"
        ) from None
    path, query = (
        urllib.parse.quote(each, safe=_ALLOWED, errors="surrogateescape") for each in (parts.path, parts.query)
    )
    login = base64.b64encode(f"{user}:{password}".encode()).decode() if user or password else None
    return urllib.parse.urlunsplit((parts.scheme, server, path, query, "")), login and f"Basic {login}"


def _server(address: str) -> str:
    """Host and port."""
    return urllib.parse.urlsplit(address).netloc.lower()


@contextmanager
def _answer(address: str, login: str | None, deadline: float, *, redirected: bool) -> Iterator[Any]:
    """The answer of one server; a redirect is one, too. No answer, however slowly it drips, outlasts the deadline."""
    parts = urllib.parse.urlsplit(address)
    if not parts.hostname:
        raise _RefusedError("it names no server")
    proxied = parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(parts.hostname)
    guarded = redirected and not proxied  # a proxy looks names up by itself
    if guarded:
        for *_, place in socket.getaddrinfo(parts.hostname, parts.port or parts.scheme, type=socket.SOCK_STREAM):
            _require_public(str(place[0]))
    timers: list[threading.Timer] = []

    def connected(connection: socket.socket) -> None:
        # What a name stands for may have changed since it was looked up: before anything is asked, the peer is known.
        if guarded:
            _require_public(connection.getpeername()[0])
        timers.append(threading.Timer(max(0.0, deadline - time.monotonic()), _shut, [connection]))
        timers[-1].daemon = True
        timers[-1].start()

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            connected(self.sock)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            connected(self.sock)

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, request: Any) -> Any:
            return self.do_open(Plain, request)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, request: Any) -> Any:
            return self.do_open(Secure, request)

    opener = urllib.request.OpenerDirector()  # with no handler of files, FTP or redirects
    for handler in (urllib.request.ProxyHandler(), PlainHandler(), SecureHandler(), urllib.request.UnknownHandler()):
        opener.add_handler(handler)
    headers = {"User-Agent": "seats-omni", "Accept": "*/*"} | ({"Authorization": login} if login else {})
    request = urllib.request.Request(address, headers=headers)
    try:
        with opener.open(request, timeout=STALL_SECONDS) as answer:
            yield answer
    finally:
        for timer in timers:
            timer.cancel()


def _copy(answer: Any, file: BinaryIO, deadline: float) -> None:
    if answer.status != 200:
        raise _RefusedError(f"the server answers {answer.status} {answer.reason:.60}".rstrip())
    stated = answer.headers.get("Content-Length", "")
    promised = int(stated) if re.fullmatch(r"[0-9]{1,15}", stated) else None
    size = 0
    if promised is not None and promised > MAX_BYTES:
        raise _RefusedError(_TOO_LARGE)
    while block := answer.read(2**20):
        size += len(block)
        if size > MAX_BYTES:
            raise _RefusedError(_TOO_LARGE)
        if time.monotonic() >= deadline:
            raise _RefusedError(_TOO_SLOW)
        file.write(block)
    if time.monotonic() >= deadline:  # where the connection was shut
        raise _RefusedError(_TOO_SLOW)
    if promised is not None and size < promised:
        raise _RefusedError(f"the connection ended after {size} of {promised} bytes")


def _require_public(place: str) -> None:
    number = ipaddress.ip_address(place.partition("%")[0])
    mapped = getattr(number, "ipv4_mapped", None) or number
    if not mapped.is_global or mapped.is_multicast:
        raise _RefusedError("it redirects to a private address")


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
