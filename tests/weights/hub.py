"""A stand-in for the Hugging Face hub on this machine, speaking as much HTTP as the real client library asks for."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from tests.processes import ROOT, python

COMMIT = "c0ffee" + "0" * 34
CODE = """if True:
    import json, sys, weights
    for source, revision in json.loads(sys.argv[1]):
        try:
            answer = str(weights.locate(source, revision=revision))
        except weights.CheckpointError as error:
            answer = f"CheckpointError: {error}"
        print(json.dumps(answer))
"""


def ask(
    cache: Path, endpoint: str, *requests: tuple[str, str | None], within: tuple[str, ...] = (), **environment: str
) -> list[str]:
    """`locate` in a process of its own, where the real hub library reads its environment: folders, or error texts.

    within: what the process is started by.
    """
    done = run(cache, endpoint, "-c", CODE, json.dumps(requests), within=within, **environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def run(
    cache: Path, endpoint: str, *words: str, within: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python *words` that finds the stand-in and nothing else of a hub in its environment."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    home = str(cache.with_name(f"{cache.name}-home"))
    hub = {"HF_HUB_CACHE": str(cache), "HF_HOME": home, "HF_ENDPOINT": endpoint}
    proxies = {"NO_PROXY": "*", "no_proxy": "*"}
    env = {**kept, **hub, **proxies, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    if not within:
        return python(*words, env=env)
    command = (*within, sys.executable, *words)
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


class Hub:
    """repositories: hub id → file name → content. `served` collects (hub id, file) of every content sent, `sent` its
    bytes by file.

    `gated` repositories list their files and refuse them. Every repository has the revisions main and v1.
    The connection breaks in the middle of a file named in `cut`, and whenever more of it is asked for.
    """

    def __init__(
        self,
        repositories: dict[str, dict[str, bytes]],
        gated: frozenset[str] = frozenset(),
        cut: frozenset[str] = frozenset(),
    ) -> None:
        self.repositories, self.gated, self.cut = repositories, gated, cut
        self.served: list[tuple[str, str]] = []
        self.sent: Counter[tuple[str, str]] = Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *_args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = unquote(urlparse(request.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, what, revision, *path = parts[2:] if api else parts
        repo_id, file = f"{owner}/{name}", "/".join(path)
        files = self.repositories.get(repo_id)
        if files is None:
            return self.refuse(request, 404, "RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self.refuse(request, 404, "RevisionNotFound")
        if api and what == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self.send_json(request, {"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": siblings})
        if api and what == "tree":
            return self.send_json(
                request,
                [
                    {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in files.items()
                ],
            )
        if repo_id in self.gated:
            return self.refuse(request, 403, "GatedRepo")
        if file not in files:
            return self.refuse(request, 404, "EntryNotFound")
        if request.command == "GET":
            self.served.append((repo_id, file))
        headers = {"ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"', "X-Repo-Commit": COMMIT}
        first, _, last = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), int(last or len(files[file])) + 1
        if start or last:
            headers["Content-Range"] = f"bytes {start}-{min(end, len(files[file])) - 1}/{len(files[file])}"
        body = files[file][start:end]
        if request.command == "GET" and file in self.cut:
            headers["Content-Length"] = str(len(body))
            body = b"" if start else body[: len(body) // 2]
            request.close_connection = True
        if request.command == "GET":
            self.sent[repo_id, file] += len(body)
        return self.send(request, 206 if start or last else 200, body, headers)

    def send_json(self, request: BaseHTTPRequestHandler, value: Any) -> None:
        self.send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        self.send(request, status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
        request.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
