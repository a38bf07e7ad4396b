"""A stand-in for the Hub on this machine: repositories in memory, the client's own protocol, and faults on demand."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "user"
TOKEN = "hf_" + "x" * 34


class Repository:
    """Files by branch, and the messages of the commits."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.branches: dict[str, dict[str, bytes]] = {"main": {}}
        self.messages: list[str] = []


class Hub:
    """`with Hub() as hub`: serves at hub.url; hub.repositories is what has arrived.

    hub.fault(part, answer, times) answers so the next requests whose method and path contain `part`; an answer is a
    status, (status, headers), or "cut", which closes the connection when the request has been half read.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.requests: list[str] = []
        self._faults: list[tuple[str, Any]] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(self, part: str, answer: Any, times: int = 1) -> None:
        self._faults += [(part, answer)] * times

    def take_fault(self, request: str) -> Any:
        with self._lock:
            self.requests.append(request)
            for index, (part, answer) in enumerate(self._faults):
                if part in request:
                    del self._faults[index]
                    return answer
        return None

    def add(self, repo_id: str, folder: Path) -> None:
        """A repository with the files of a folder."""
        self.repositories[repo_id] = repository = Repository(private=False)
        for path in folder.rglob("*"):
            if path.is_file():
                repository.branches["main"][path.relative_to(folder).as_posix()] = path.read_bytes()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Those of a branch; the only commits that are handed out are of main."""
        branches = self.repositories[repo_id].branches
        return branches.get(revision, branches["main"])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.take_fault(f"{self.command} {path}")
        if fault == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length) if length else self.read_chunks()
        if fault is not None:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self.answer(status, {"error": "asked for by the test"}, headers)
            return
        for method, route, action in ROUTES:
            if self.command == method and (found := match(route, path)) is not None:
                action(self, body, *found)
                return
        self.answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_chunks(self) -> bytes:
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return body

    def answer(self, status: int, document: Any = None, headers: Any = None, content: bytes | None = None) -> None:
        data = content if content is not None else json.dumps(document or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- What the client asks for ----------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repositories:
            self.answer(409, {"error": "exists", "url": url})
            return
        self.hub.repositories[repo_id] = Repository(wanted.get("visibility") == "private")
        self.answer(200, {"url": url})

    def who(self, body: bytes) -> None:
        self.answer(200, {"name": USER, "type": "user", "orgs": []})

    def valid(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def branch(self, body: bytes, repo_id: str, name: str) -> None:
        branches = self.hub.repositories[repo_id].branches
        created = name not in branches
        branches.setdefault(name, dict(branches["main"]))
        self.answer(200 if created else 409)

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if repo_id not in self.hub.repositories or revision not in self.hub.repositories[repo_id].branches:
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            return
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if is_large(f["path"]) else "regular", "shouldIgnore": False}
            for f in json.loads(body)["files"]
        ]
        self.answer(200, {"files": modes})

    def batch(self, body: bytes, repo_id: str) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.answer(200)

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repository = self.hub.repositories[repo_id]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                repository.branches[revision][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.branches[revision][value["path"]] = self.hub.large[value["oid"]]
        oid = f"{len(repository.messages):040x}"
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        if repo_id not in self.hub.repositories:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
            return
        files = [{"rfilename": name} for name in self.hub.files(repo_id, revision)]
        self.answer(200, {"id": repo_id, "sha": "0" * 40, "siblings": files, "tags": [], "private": False})

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        files = self.hub.files(repo_id, revision) if repo_id in self.hub.repositories else {}
        entries = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
        self.answer(200, content=json.dumps(entries).encode())

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        known = repo_id in self.hub.repositories
        data = self.hub.files(repo_id, revision).get(name) if known else None
        if data is None:
            code = "EntryNotFound" if known else "RepoNotFound"
            self.answer(404, headers={"X-Error-Code": code, "X-Repo-Commit": "0" * 40})
            return
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.answer(200, headers={"ETag": etag, "X-Repo-Commit": "0" * 40}, content=data)


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png", ".pt"))


def match(route: str, path: str) -> list[str] | None:
    """The parts of `path` for the words in braces: {repo} is NAME/NAME, {rest} all that is left, others one part."""
    pattern = re.sub(r"\{(\w+)\}", lambda m: {"repo": r"([^/]+/[^/]+?)", "rest": "(.+)"}.get(m[1], "([^/]+)"), route)
    found = re.fullmatch(pattern, path)
    return list(found.groups()) if found else None


ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", "/api/whoami-v2", _Handler.who),
    ("POST", "/api/validate-yaml", _Handler.valid),
    ("POST", "/api/models/{repo}/branch/{name}", _Handler.branch),
    ("POST", "/api/models/{repo}/preupload/{revision}", _Handler.preupload),
    ("POST", "/{repo}.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/{oid}", _Handler.upload),
    ("POST", "/api/models/{repo}/commit/{revision}", _Handler.commit),
    ("GET", "/api/models/{repo}", _Handler.info),
    ("GET", "/api/models/{repo}/revision/{revision}", _Handler.info),
    ("GET", "/api/models/{repo}/tree/{revision}", _Handler.tree),
    ("GET", "/{repo}/resolve/{revision}/{rest}", _Handler.resolve),
    ("HEAD", "/{repo}/resolve/{revision}/{rest}", _Handler.resolve),
]
