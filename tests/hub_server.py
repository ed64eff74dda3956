"""A Hub on this machine, in memory, that the real client talks to, with faults on demand.

It speaks the routes that publishing and loading models need: creating a repository, uploads by LFS,
commits, listings and downloads with ranges. It checks what the Hub checks: the token, the hash of
an upload, the parent of a commit, the head of a README.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_aTokenThatMustNotBeSeenAnywhere"
NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
ERROR_CODES = {404: "RepoNotFound"}


@dataclass
class Fault:
    """Something that goes wrong.

    Attributes:
        where: Regular expression over "METHOD /path".
        status: Answer this instead of doing what was asked.
        cut: Send, or take, half of the body and hang up.
        flip: Turn one bit of the body that is sent.
        after: Do what was asked, and only then answer `status`.
        call: Called before the request is handled.
        times: How often.
        headers: Of the answer.
    """

    where: str
    status: int | None = None
    cut: bool = False
    flip: bool = False
    after: bool = False
    call: Callable[[], None] | None = None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repo:
    """A repository: files of every commit, oldest first."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        parent = self.commits[-1][0] if self.commits else ""
        text = parent + "".join(f"{k}{hashlib.sha1(v).hexdigest()}" for k, v in files.items())
        oid = hashlib.sha1(f"{len(self.commits)}{text}".encode()).hexdigest()
        self.commits.append((oid, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class HubServer:
    """A server in a thread; use as a context."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.connections: set[socket.socket] = set()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Be gone: take no connection, and hang up where one is open."""
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo].commits[-1][1]

    def count(self, where: str) -> int:
        return sum(re.search(where, request) is not None for request in self.requests)


def is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(data: bytes) -> bytes:
    head = "version https://git-lfs.github.com/spec/v1"
    return f"{head}\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()


class _HangUp(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 5

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_one()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_one(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {self.path}"
        self.hub.requests.append(request)
        self.fault = None
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.where, request):
                fault.times -= 1
                self.fault = fault
                break
        with contextlib.suppress(_HangUp, ConnectionError):
            if self.fault is not None and self.fault.call is not None:
                self.fault.call()
            self.body = self.read_body()
            if self.fault is not None and self.fault.status is not None and not self.fault.after:
                self.fail(self.fault.status, self.fault.headers)
                return
            self.route()

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        length = int(self.headers.get("Content-Length", 0))
        if self.fault is not None and self.fault.cut and self.command == "PUT":
            self.rfile.read(length // 2)
            self.close_connection = True
            raise _HangUp
        return self.rfile.read(length)

    def route(self) -> None:
        routes: list[tuple[str, Callable[..., None]]] = [
            (r"GET /api/whoami-v2", self.whoami),
            (r"POST /api/repos/create", self.create),
            (r"POST /api/validate-yaml", self.validate),
            (rf"POST /api/models/{NAME}/preupload/(?P<rev>.+)", self.preupload),
            (rf"POST /api/models/{NAME}/commit/(?P<rev>.+)", self.commit),
            (rf"GET /api/models/{NAME}/tree/(?P<rev>[^/]+)", self.tree),
            (rf"GET /api/models/{NAME}(/revision/(?P<rev>.+))?", self.info),
            (rf"POST /{NAME}\.git/info/lfs/objects/batch", self.batch),
            (rf"POST /{NAME}\.git/info/lfs/verify", self.verify),
            (r"PUT /storage/(?P<oid>\w+)", self.store),
            (rf"(GET|HEAD) /{NAME}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", self.resolve),
        ]
        for pattern, handler in routes:
            match = re.fullmatch(pattern, f"{self.command} {self.path}")
            if match is None:
                continue
            values = match.groupdict()
            writes = self.command in ("POST", "PUT") and "storage" not in self.path
            private = "repo" in values and self.repo(values["repo"]).private
            if (writes or private) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.fail(401)
                return
            if "repo" in values and values["repo"] not in self.hub.repos:
                self.fail(404, {"X-Error-Code": "RepoNotFound"})
                return
            handler(**values)
            return
        self.fail(404)

    def repo(self, name: str) -> Repo:
        return self.hub.repos.get(name, Repo())

    def answer(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        if self.fault is not None and self.fault.after and self.fault.status is not None:
            fault, self.fault = self.fault, None
            self.fail(fault.status, fault.headers)
            return
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.flip:
            place = len(body) // 2
            body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        if self.fault is not None and self.fault.cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.wfile.write(body)

    def fail(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.answer({"error": f"status {status}"}, status, headers)

    def whoami(self) -> None:
        role = {"accessToken": {"displayName": "test", "role": "write"}}
        self.answer({"type": "user", "name": "me", "fullname": "Me", "orgs": [], "auth": role})

    def create(self) -> None:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        where = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            self.answer({**where, "error": "You already created this model repo"}, 409)
            return
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repo = self.hub.repos[name] = Repo(private=bool(private))
        repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(where)

    def validate(self) -> None:
        wanted = json.loads(self.body)
        head = re.match(r"---\n(.*?)\n---\n", wanted["content"], flags=re.DOTALL)
        values = yaml.safe_load(head[1]) if head else {}
        wrong = [key for key in ("license", "model-index") if key not in values]
        errors = [{"message": f"{key} is missing"} for key in wrong]
        self.answer({"errors": errors, "warnings": []}, 400 if wrong else 200)

    def preupload(self, repo: str, rev: str) -> None:
        files = self.repo(repo).at(rev)[1]
        answers = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if is_lfs(file["path"]) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in files:
                data = files[file["path"]]
                answer["oid"] = sha256(data) if mode == "lfs" else blob_id(data)
            answers.append(answer)
        self.answer({"files": answers})

    def batch(self, repo: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.storage:
                upload = {"href": f"{self.hub.url}/storage/{wanted['oid']}", "header": {}}
                check = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify", "header": {}}
                entry["actions"] = {"upload": upload, "verify": check}
            objects.append(entry)
        self.answer(
            {"transfer": "basic", "objects": objects},
            headers={"Content-Type": "application/vnd.git-lfs+json"},
        )

    def store(self, oid: str) -> None:
        assert "Authorization" not in self.headers  # storage is another host's
        if sha256(self.body) != oid:
            self.fail(400)
            return
        self.hub.storage[oid] = self.body
        self.answer(b"")

    def verify(self, repo: str) -> None:
        wanted = json.loads(self.body)
        there = len(self.hub.storage.get(wanted["oid"], b"")) == wanted["size"]
        self.answer({}, 200 if there else 404)

    def commit(self, repo: str, rev: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        current, files = self.repo(repo).at(rev)
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != current:
            self.fail(412)
            return
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.storage[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        oid = self.repo(repo).commit(files)
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def info(self, repo: str, rev: str | None = None) -> None:
        found = self.repo(repo).at(rev or "main")
        if found is None:
            self.fail(404, {"X-Error-Code": "RevisionNotFound"})
            return
        facts = {"_id": "0" * 24, "id": repo, "modelId": repo, "sha": found[0], "tags": []}
        names = [{"rfilename": name} for name in found[1]]
        private = self.repo(repo).private
        self.answer({**facts, "private": private, "downloads": 0, "likes": 0, "siblings": names})

    def tree(self, repo: str, rev: str) -> None:
        entries = []
        for path, data in self.repo(repo).at(rev)[1].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
            entry["oid"] = blob_id(pointer(data) if is_lfs(path) else data)
            if is_lfs(path):
                size = len(pointer(data))
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": size}
            entries.append(entry)
        self.answer(entries)

    def resolve(self, repo: str, rev: str, path: str) -> None:
        found = self.repo(repo).at(rev)
        if found is None:
            self.fail(404, {"X-Error-Code": "RevisionNotFound"})
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path not in files:
            self.fail(404, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        data = files[path]
        tag = sha256(data) if is_lfs(path) else blob_id(data)
        headers["ETag"] = f'"{tag}"'
        if is_lfs(path):
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(data))}
        if self.command == "HEAD":
            self.answer(b"", 200, {**headers, "Content-Length": str(len(data))})
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self.answer(data, 200, headers)
            return
        start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
        place = {"Content-Range": f"bytes {start}-{end}/{len(data)}"}
        self.answer(data[start : end + 1], 206, {**headers, **place})
