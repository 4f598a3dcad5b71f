"""A hub for tests: the routes of huggingface.co that its client uses, over HTTP on this machine, with a log.

Large files are git-lfs objects, which a redirect to another host leads to, as on the hub. ``faults`` answers requests
with an error or cuts a download.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".planes")
Files = dict[str, bytes]


@dataclass
class Request:
    """A request and what was sent for it. offset: where its range begins. sent: bytes of the body."""

    method: str
    path: str
    offset: int = 0
    status: int = 0
    sent: int = 0


@dataclass
class FakeHub:
    """commits: repository -> commit -> its files. newest: repository -> commit. token: what may write; None: anyone.

    faults: called with each request; a status (and headers), or the number of bytes after which the answer is cut.
    """

    url: str = ""
    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    newest: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    token: str | None = None
    log: list[Request] = field(default_factory=list)
    faults: Callable[[Request], tuple[int, dict[str, str]] | int | None] = lambda request: None

    def commit(self, repo: str, files: Files) -> str:
        """Make ``files`` the newest commit of a repository; return its hash."""
        content = repr(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items()))
        commit = hashlib.sha1(f"{content}{len(self.commits.get(repo, {}))}".encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.newest[repo] = commit
        return commit

    def files(self, repo: str) -> Files:
        return self.commits[repo][self.newest[repo]]

    def received(self) -> int:
        """Bytes of files that were sent, headers and JSON of the interface aside."""
        return sum(request.sent for request in self.log if "/resolve/" in request.path or "/cdn/" in request.path)

    def fetched(self) -> list[str]:
        """Paths in the repository that were downloaded, also in part."""
        names = {f"/cdn/{hashlib.sha256(data).hexdigest()}": name for name, data in self.newest_files().items()}
        sent = [request.path for request in self.log if request.method == "GET" and request.sent]
        found = [names.get(path) or re.sub(r".*/resolve/\w+/", "", path) for path in sent]
        return [name for name in found if not name.startswith("/api/")]

    def newest_files(self) -> Files:
        """Files of the newest commits of all repositories, by path."""
        return {name: data for repo in self.commits for name, data in self.files(repo).items()}


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A running hub."""
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.handle_one()

    do_GET = do_POST = do_PUT = do_HEAD

    def handle_one(self) -> None:
        hub, path = self.state, unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        self.request_log = Request(self.command, path, offset=int(span[1]) if span else 0)
        hub.log.append(self.request_log)
        fault = hub.faults(self.request_log)
        self.cut = fault if isinstance(fault, int) else None
        if isinstance(fault, tuple):
            return self.answer(b"{}", status=fault[0], **fault[1])
        if self.command == "POST" and hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(b"{}", status=401, **{"X-Error-Message": "Invalid credentials in Authorization header"})
        for pattern, route in ROUTES:
            if match := re.fullmatch(pattern, path):
                return route(self, *match.groups())
        return self.answer(b"{}", status=404)

    def answer(self, data: bytes, *, status: int = 200, **headers: str) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            part = data if self.cut is None else data[: self.cut]
            self.request_log.sent = len(part)  # before the client has it, who may look at once
            self.wfile.write(part)
            if len(part) < len(data):
                self.close_connection = True

    def json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.answer(json.dumps(value).encode(), status=status, **headers)

    def missing(self, code: str) -> None:
        self.json({}, status=404, **{"X-Error-Code": code})

    def find(self, repo: str, revision: str | None) -> tuple[str, Files] | None:
        """The commit and files of a revision; None after an answer that there are none."""
        commits = self.state.commits.get(repo)
        if commits is None:
            return self.missing("RepoNotFound")
        commit = self.state.newest[repo] if revision in (None, "main") else revision
        if commit not in commits:
            return self.missing("RevisionNotFound")
        return str(commit), commits[str(commit)]

    # -------------------------------------------------------------------------------------------------------- reading

    def model(self, repo: str, revision: str | None = None) -> None:
        if found := self.find(repo, revision):
            self.json({"id": repo, "sha": found[0], "siblings": [{"rfilename": name} for name in found[1]]})

    def resolve(self, repo: str, revision: str, name: str) -> None:
        found = self.find(repo, revision)
        if not found:
            return None
        if name not in found[1]:
            return self.missing("EntryNotFound")
        data = found[1][name]
        etag = hashlib.sha256(data).hexdigest() if name.endswith(LFS) else hashlib.sha1(data).hexdigest()
        headers = {"X-Repo-Commit": found[0], "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if not name.endswith(LFS):
            return self.content(data, headers)
        self.state.objects[etag] = data
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{etag}"'}
        return self.answer(
            b"",
            status=302,
            Location=f"{self.state.url}/cdn/{etag}".replace("127.0.0.1", "localhost"),
            **headers,
            **linked,
        )

    def cdn(self, oid: str) -> None:
        self.content(self.state.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def content(self, data: bytes, headers: dict[str, str]) -> None:
        start = self.request_log.offset
        if start and self.command == "GET":
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.answer(data[start:], status=206, **headers)
        return self.answer(data, **headers)

    # -------------------------------------------------------------------------------------------------------- writing

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if repo in self.state.commits:
            return self.json({"error": "exists", "url": f"{self.state.url}/{repo}"}, status=409)
        self.state.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.json({"url": f"{self.state.url}/{repo}", "name": repo})

    def validate(self) -> None:
        self.json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self.body)["files"]
        modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular"} for f in files]
        self.json({"files": [mode | {"shouldIgnore": False} for mode in modes]})

    def batch(self, repo: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            found = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.state.objects:
                found["actions"] = {"upload": {"href": f"{self.state.url}/put/{wanted['oid']}"}}
            objects.append(found)
        self.json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.state.objects[oid] = self.body
        self.answer(b"")

    def make_commit(self, repo: str, revision: str) -> None:
        files = dict(self.state.files(repo))
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.state.commit(repo, files)
        self.json({"commitUrl": f"{self.state.url}/{repo}/commit/{commit}", "commitOid": commit})


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (rf"/api/models/{REPO}", _Handler.model),
    (rf"/api/models/{REPO}/revision/(.+)", _Handler.model),
    (rf"/{REPO}/resolve/(\w+)/(.+)", _Handler.resolve),
    (r"/cdn/(\w+)", _Handler.cdn),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{REPO}/preupload/(.+)", _Handler.preupload),
    (rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/put/(\w+)", _Handler.put),
    (rf"/api/models/{REPO}/commit/(.+)", _Handler.make_commit),
]
