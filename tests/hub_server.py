"""A stand-in of the Hugging Face Hub on loopback: repositories in memory, as the Hub's client asks for them.

What it knows of the HTTP API: create a repository or a branch, its info, pre-upload, LFS batch and upload, a
commit or pull request, and `resolve` with the real one's headers (ETag, X-Repo-Commit, a redirect for LFS).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN, USER = "hf_standin", "user"


@dataclass
class Repo:
    """A repository: its branches, and the files of each commit by name."""

    private: bool
    refs: dict[str, str] = field(default_factory=dict)  # branch: commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        before = self.commits.get(self.refs.get(branch, ""), {})
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid], self.refs[branch] = before | files, oid
        return oid


class Hub(ThreadingHTTPServer):
    """The server with all it holds; `asked` are the requests so far."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # LFS by SHA-256
        self.asked: list[tuple[str, str]] = []
        self.broken = 0  # status of every answer, 0: none is broken

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def elsewhere(self) -> str:
        """The same server by another name, as the Hub's files lie on another host."""
        return f"http://localhost:{self.server_address[1]}"

    def tamper(self, repo: str, file: str, content: bytes, branch: str = "main") -> None:
        """Let a file have another content, as a commit of its own."""
        self.repos[repo].commit(branch, {file: content})


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        headers = {"X_Error_Code": code} if code else {}
        headers |= {"X_Error_Message": message} if message else {}
        self._answer(status, {"error": message or code}, **headers)

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        chunked = "chunked" in (self.headers.get("Transfer-Encoding") or "")
        body = self._chunks() if chunked else self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        if self.server.broken:
            return self._refuse(self.server.broken)
        for (method, pattern), name in ROADS.items():
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split("|"):
                return getattr(self, name)(body, *found.groups())
        return self._refuse(404, message=f"the stand-in knows no {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def _who(self) -> str:
        return USER if self.headers.get("Authorization") == f"Bearer {TOKEN}" else ""

    def _repo(self, name: str, write: bool = False) -> Repo | None:
        """Return a repository, or refuse as the Hub does."""
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self._who):
            self._refuse(401 if not self._who else 404, "RepoNotFound", "Repository not found")
        elif repo.gated and not write:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        elif write and not (self._who and name.startswith(f"{USER}/")):
            self._refuse(403 if self._who else 401, message="You may not write here")
        else:
            return repo
        return None

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or USER
        if not self._who:
            return self._refuse(401, message="Invalid username or password.")
        if owner != USER:
            return self._refuse(403, message=f"You may not create a model for {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.server.repos:
            return self._answer(
                409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
            )
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.repos[name] = Repo(private)
        self.server.repos[name].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._answer(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def yaml(self, body: bytes) -> None:
        import yaml

        content = json.loads(body)["content"]
        try:
            _, header, _ = content.split("---\n", 2)
            assert isinstance(yaml.safe_load(header), dict)
        except Exception as error:
            return self._answer(400, {"errors": [{"message": f"no YAML: {error}"}], "warnings": []})
        return self._answer(200, {"errors": [], "warnings": []})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        if repo := self._repo(name, write=True):
            if branch in repo.refs:
                return self._refuse(409, message="Reference already exists")
            repo.refs[branch] = repo.refs["main"]
            self._answer(200, {})

    def info(self, body: bytes, name: str) -> None:
        if repo := self._repo(name):
            files = repo.commits[repo.refs["main"]]
            siblings = [{"rfilename": file} for file in files]
            told = {"id": name, "modelId": name, "sha": repo.refs["main"], "private": repo.private}
            self._answer(200, told | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self._repo(name, write=True):
            asked = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            files = [
                {
                    "path": f["path"],
                    "uploadMode": modes[f["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for f in asked
            ]
            self._answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        if self._repo(name, write=True):
            objects = []
            for each in json.loads(body)["objects"]:
                known = each["oid"] in self.server.stored
                action = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}", "header": {}}}
                objects.append(each | ({} if known else {"actions": action}))
            self._answer(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._refuse(400, message="another checksum")
        self.server.stored[oid] = body
        return self._answer(200)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if repo := self._repo(name, write=True):
            if revision not in repo.refs:
                return self._refuse(404, "RevisionNotFound")
            files = {}
            for line in body.splitlines():
                each = json.loads(line)
                value = each["value"]
                if each["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif each["key"] == "lfsFile":
                    files[value["path"]] = self.server.stored[value["oid"]]
            request = "create_pr=1" in urlsplit(self.path).query
            if request:
                repo.refs["refs/pr/1"] = repo.refs[revision]
            oid = repo.commit("refs/pr/1" if request else revision, files)
            url = f"{self.server.url}/{name}"
            told = {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "hookOutput": "", "success": True}
            self._answer(200, told | ({"pullRequestUrl": f"{url}/discussions/1"} if request else {}))

    def resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        if repo := self._repo(name):
            oid = repo.refs.get(revision, revision)
            if oid not in repo.commits:
                return self._refuse(404, "RevisionNotFound")
            content = repo.commits[oid].get(file)
            if content is None:
                return self._answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            headers = {"X_Repo_Commit": oid, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            if file.endswith(".safetensors"):
                sha = hashlib.sha256(content).hexdigest()
                self.server.stored.setdefault(sha, content)
                linked = {"X_Linked_ETag": f'"{sha}"', "X_Linked_Size": str(len(content))}
                return self._answer(
                    302, b"", Location=f"{self.server.elsewhere}/cdn/{sha}", **headers, **linked
                )
            return self._answer(200, content, **headers)
        return None

    def cdn(self, body: bytes, oid: str) -> None:
        if self.headers.get("Range"):
            return self._refuse(416)
        return self._answer(200, self.server.stored[oid])


NAME = r"([^/]+/[^/]+?)"
ROADS = {
    ("POST", r"/api/repos/create"): "create",
    ("POST", r"/api/validate-yaml"): "yaml",
    ("POST", rf"/api/models/{NAME}/branch/(.+)"): "branch",
    ("GET", rf"/api/models/{NAME}(?:/revision/[^/]+)?"): "info",
    ("POST", rf"/api/models/{NAME}/preupload/(.+)"): "preupload",
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch"): "batch",
    ("PUT", r"/lfs/(\w+)"): "store",
    ("POST", rf"/api/models/{NAME}/commit/(.+)"): "commit",
    ("GET|HEAD", rf"/{NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)"): "resolve",
    ("GET|HEAD", r"/cdn/(\w+)"): "cdn",
}


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a stand-in."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
