"""A server on loopback that speaks as much of the Hub's HTTP protocol as an upload needs.

Repositories live in memory: commits on branches, LFS objects by hash, pull requests, settings,
collections. `fail` makes the next matching requests answer with an error, or cuts the line. `wire`
holds every request as it came: first line, headers, body.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test_token"
_CUT = -1


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0


class Hub:
    """The state of the server, and what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.collections: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self.wire: list[bytes] = []
        self.failures: list[tuple[str, int]] = []
        self.corrupt = ""
        self.identity: dict[str, Any] = {"name": "me", "type": "user", "orgs": [], "auth": {}}
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fail(self, pattern: str, status: int = _CUT, times: int = 1) -> None:
        """Answer the next `times` requests that match with `status`, or drop the connection."""
        self.failures += [(pattern, status)] * times

    def failure(self, request: str) -> int | None:
        with self.lock:
            for place, (pattern, status) in enumerate(self.failures):
                if re.search(pattern, request):
                    del self.failures[place]
                    return status
        return None

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> str:
        repo = self.repos[name]
        files = dict(repo.branches.setdefault(branch, dict(repo.branches["main"])))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        oid = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repo.branches[branch], repo.commits[oid], repo.heads[branch] = files, files, oid
        return oid

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self.repos[name]
        if revision in repo.commits:
            return revision, repo.commits[revision]
        if revision in repo.branches:
            return repo.heads.get(revision, "0" * 40), repo.branches[revision]
        return None

    def close(self) -> None:
        self.server.shutdown()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Tests read `hub.requests`."""

        def do_GET(self) -> None:
            self.route()

        def do_HEAD(self) -> None:
            self.route()

        def do_POST(self) -> None:
            self.route()

        def do_PUT(self) -> None:
            self.route()

        def route(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            request = f"{self.command} {path}"
            hub.requests.append(request)
            hub.wire.append(f"{unquote(self.requestline)}\n{self.headers}\n".encode() + body)
            status = hub.failure(request)
            if status == _CUT:
                self.close_connection = True
                self.connection.close()
                return
            if status is not None:
                self.answer({"error": "made to fail"}, status)
                return
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs/" not in path:
                self.answer({"error": "no token"}, 401)
                return
            for pattern, method in ROUTES:
                match = re.fullmatch(pattern, request)
                if match:
                    method(self, body, *match.groups())
                    return
            self.answer({"error": f"unknown: {request}"}, 404)

        def answer(self, data: Any, status: int = 200, headers: dict[str, str] = {}) -> None:  # noqa: B006
            content = data if isinstance(data, bytes) else json.dumps(data).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        # ---------------------------------------------------------- what the client asks

        def whoami(self, _: bytes) -> None:
            self.answer(hub.identity)

        def create(self, body: bytes) -> None:
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in hub.repos:
                self.answer({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
                return
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            hub.repos[name] = Repo(private)
            self.answer({"url": f"{hub.url}/{name}", "name": name, "id": name})

        def auth_check(self, _: bytes, name: str) -> None:
            self.answer(
                {} if name in hub.repos else {"error": "no"}, 200 if name in hub.repos else 404
            )

        def model(self, _: bytes, name: str) -> None:
            if name in hub.repos:
                self.answer({"id": name, "sha": "0" * 40, "siblings": [], "private": True})
            else:
                self.answer({"error": "no"}, 404, {"X-Error-Code": "RepoNotFound"})

        def validate(self, _: bytes) -> None:
            self.answer({"errors": [], "warnings": []})

        def preupload(self, body: bytes, name: str, branch: str) -> None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs"
                    if file["path"].endswith(("safetensors", "gguf"))
                    else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})

        def batch(self, body: bytes, name: str) -> None:
            answers = []
            for item in json.loads(body)["objects"]:
                entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
                if item["oid"] not in hub.objects:
                    entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}
                answers.append(entry)
            self.answer({"transfer": "basic", "objects": answers})

        def put_object(self, body: bytes, oid: str) -> None:
            if hashlib.sha256(body).hexdigest() != oid:
                self.answer({"error": "wrong hash"}, 400)
                return
            hub.objects[oid] = body
            self.answer({})

        def commit(self, body: bytes, name: str, branch: str) -> None:
            oid = hub.commit(name, branch, [json.loads(line) for line in body.splitlines()])
            self.answer(
                {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}
            )

        def info(self, _: bytes, name: str, revision: str) -> None:
            found = hub.files(name, revision)
            if found is None:
                self.answer({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [{"rfilename": path} for path in found[1]]
            self.answer({"id": name, "sha": found[0], "siblings": siblings, "private": True})

        def tree(self, _: bytes, name: str, revision: str) -> None:
            found = hub.files(name, revision)
            files = found[1] if found else {}
            self.answer(
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ]
            )

        def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
            found = hub.files(name, revision)
            if found is None or path not in found[1]:
                self.answer({"error": "no file"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            content = found[1][path]
            etag = hashlib.sha256(content).hexdigest()
            if path == hub.corrupt:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.answer(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": found[0]})

        def settings(self, body: bytes, name: str) -> None:
            hub.repos[name].private = json.loads(body)["visibility"] == "private"
            self.answer({})

        def pull_request(self, _: bytes, name: str) -> None:
            repo = hub.repos[name]
            repo.pull_requests += 1
            repo.branches[f"refs/pr/{repo.pull_requests}"] = dict(repo.branches["main"])
            self.answer({"num": repo.pull_requests})

        def discussion(self, _: bytes, name: str, number: str) -> None:
            self.answer(
                {
                    "title": "Compressed model",
                    "status": "open",
                    "num": int(number),
                    "isPullRequest": True,
                    "createdAt": "2026-11-21T00:00:00.000Z",
                    "author": {"name": "me"},
                    "events": [],
                    "filesWithConflicts": [],
                    "diff": "",
                    "repo": {"name": name, "type": "model"},
                    "changes": {"base": "refs/heads/main"},
                }
            )

        def collection(self, body: bytes) -> None:
            wanted = json.loads(body)
            slug = f"{wanted['namespace']}/{wanted['title'].lower()}-0123456789abcdef01234567"
            hub.collections.setdefault(slug, [])
            self.answer(self.shown(slug, wanted["title"]))

        def item(self, body: bytes, slug: str) -> None:
            hub.collections[slug].append(json.loads(body)["item"]["id"])
            self.answer(self.shown(slug, "t"))

        def shown(self, slug: str, title: str) -> dict[str, Any]:
            return {
                "slug": slug,
                "title": title,
                "owner": {"name": "me"},
                "items": [],
                "lastUpdated": "2026-11-21T00:00:00.000Z",
                "position": 0,
                "private": True,
                "theme": "blue",
                "upvotes": 0,
            }

    name = r"([^/]+/[^/]+)"
    ROUTES = (
        (r"GET /api/whoami-v2", Handler.whoami),
        (r"POST /api/repos/create", Handler.create),
        (rf"GET /api/models/{name}/auth-check/write", Handler.auth_check),
        (rf"GET /api/models/{name}", Handler.model),
        (r"POST /api/validate-yaml", Handler.validate),
        (rf"POST /api/models/{name}/preupload/(.+)", Handler.preupload),
        (rf"POST /{name}\.git/info/lfs/objects/batch", Handler.batch),
        (r"PUT /lfs/(\w+)", Handler.put_object),
        (rf"POST /api/models/{name}/commit/(.+)", Handler.commit),
        (rf"GET /api/models/{name}/revision/(.+)", Handler.info),
        (rf"GET /api/models/{name}/tree/(.+)", Handler.tree),
        (rf"(?:GET|HEAD) /{name}/resolve/(refs/pr/\d+|[^/]+)/(.+)", Handler.resolve),
        (rf"PUT /api/models/{name}/settings", Handler.settings),
        (rf"POST /api/models/{name}/discussions", Handler.pull_request),
        (rf"GET /api/models/{name}/discussions/(\d+)", Handler.discussion),
        (r"POST /api/collections", Handler.collection),
        (r"POST /api/collections/(.+)/items", Handler.item),
    )
    return Handler
