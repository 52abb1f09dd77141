"""A small hub on the loopback: a real HTTP server in a process of its own, for tests of pushes.

It answers the routes that huggingface_hub calls to make a repository, to send files and to fetch
them: accounts and rights, private repositories, branches, small files in the commit, large ones by
their SHA-256 (git LFS), and commits that name their parent. It checks what it is sent: a large file
whose hash is another is refused, and so is a commit of a file that it does not have.

    python tests/hub_server.py      # prints its address, and serves until its input ends

`Hub` starts one, and asks it what it has (`/_state`) or makes it fail (`/_set`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer0123456789abcdefghijkl", "hf_reader0123456789abcdefghijkl"
USER = "me"
_LARGE = (".safetensors", ".bin", ".gguf", ".png", ".model")


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Repository:
    """Commits by hash, each a mapping of names to contents, and branches."""

    def __init__(self, *, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        parent = self.branches.get(branch, "")
        listed = json.dumps([parent, message, sorted((n, git_hash(c)) for n, c in files.items())])
        name = hashlib.sha1(listed.encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        self.messages.append(message)
        return name

    def at(self, revision: str) -> str | None:
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None


class State:
    """All that the hub has. One lock is enough: tests have one client at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.received: list[str] = []  # hashes of large files, each time one came whole
        self.stalled: list[str] = []
        self.set: dict[str, Any] = {}

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "received": self.received,
            "stalled": self.stalled,
            "repositories": {
                name: {
                    "private": each.private,
                    "messages": each.messages,
                    "branches": {
                        branch: {
                            file: hashlib.sha256(content).hexdigest()
                            for file, content in each.commits[commit].items()
                        }
                        for branch, commit in each.branches.items()
                    },
                }
                for name, each in self.repositories.items()
            },
        }


STATE = State()


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.code = status, code
        super().__init__(message)


def is_large(name: str) -> bool:
    return name.endswith(_LARGE)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    routes: tuple[tuple[str, str, str], ...] = (
        ("GET", r"/_state", "state"),
        ("POST", r"/_set", "set"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models/([^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/_lfs/([0-9a-f]{64})", "store"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read(self) -> bytes:
        """The body of the request, the first time that it is asked for; then nothing."""
        if self.is_read:
            return b""
        self.is_read = True
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_one(self) -> None:
        self.is_read = False
        path = unquote(urlsplit(self.path).path)
        if not path.startswith("/_s"):
            STATE.requests.append(f"{self.command} {path}")
        for method, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if match is not None and method == self.command:
                try:
                    self.fail_as_asked(name)
                    getattr(self, f"do_{name}")(*match.groups())
                except Refused as refused:
                    self.close_connection = True
                    headers = {"X_Error_Code": refused.code} if refused.code else {}
                    self.answer(
                        {"error": str(refused)}, refused.status,
                        X_Error_Message=str(refused), **headers,
                    )  # fmt: skip
                return
        self.close_connection = True
        self.answer({"error": f"no route {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_one

    def fail_as_asked(self, name: str) -> None:
        fault = STATE.set.get("fail", {}).get(name)
        if fault is not None:
            self.read()
            raise Refused(*fault)

    # ------------------------------------------------------------ accounts

    def token(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given not in ("", WRITER, READER):
            raise Refused(401, "Invalid credentials in Authorization header")
        return given or None

    def check_may_write(self, repository: str) -> None:
        if self.token() != WRITER or not repository.startswith(f"{USER}/"):
            self.read()
            raise Refused(403, f"You don't have the rights to write to {repository}")

    def repository(self, name: str) -> Repository:
        token, found = self.token(), STATE.repositories.get(name)
        if found is None or (found.private and token is None):
            raise Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        return found

    def commit_of(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.repository(name)
        commit = repository.at(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    # ------------------------------------------------------------ routes

    def do_state(self) -> None:
        self.answer(STATE.as_json())

    def do_set(self) -> None:
        STATE.set = json.loads(self.read())
        self.answer({})

    def do_whoami(self) -> None:
        if self.token() is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        self.answer({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def do_create(self) -> None:
        asked = json.loads(self.read())
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        self.check_may_write(name)
        if name in STATE.repositories:
            raise Refused(409, "You already created this model repo")
        STATE.repositories[name] = Repository(private=asked.get("visibility") == "private")
        self.answer({"url": f"{self.origin()}/{name}", "name": name})

    def origin(self) -> str:
        return f"http://{self.headers['Host']}"

    def do_validate(self) -> None:
        content = json.loads(self.read())["content"]
        errors = [] if content.startswith("---") else [{"message": "no metadata"}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def do_info(self, name: str, revision: str = "main") -> None:
        commit, files = self.commit_of(name, revision)
        listed = [{"rfilename": each} for each in files]
        private = STATE.repositories[name].private
        self.answer({"id": name, "sha": commit, "private": private, "siblings": listed, "tags": []})

    def do_tree(self, name: str, revision: str) -> None:
        _, files = self.commit_of(name, revision)
        listed = []
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if is_large(path):
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
            listed.append(entry)
        self.answer(listed)

    def do_branch(self, name: str, branch: str) -> None:
        self.read()
        self.check_may_write(name)
        repository = self.repository(name)
        if branch in repository.branches:
            raise Refused(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self.answer({})

    def do_preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self.read())
        _, files = self.commit_of(name, revision)
        modes = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if is_large(each["path"]) else "regular",
                "shouldIgnore": False,
                **({"oid": git_hash(files[each["path"]])} if each["path"] in files else {}),
            }
            for each in asked["files"]
        ]
        self.answer({"files": modes})

    def do_batch(self, name: str) -> None:
        asked = json.loads(self.read())
        self.check_may_write(name)
        self.repository(name)
        objects = []
        for each in asked["objects"]:
            found = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in STATE.objects:
                found["actions"] = {"upload": {"href": f"{self.origin()}/_lfs/{each['oid']}"}}
            objects.append(found)
        self.answer({"transfer": "basic", "objects": objects})

    def do_store(self, oid: str) -> None:
        size = int(self.headers["Content-Length"])
        if STATE.set.get("stall_over") is not None and size > STATE.set["stall_over"]:
            # Half of the file, and then nothing until the client is gone.
            self.rfile.read(size // 2)
            STATE.stalled.append(oid)
            while STATE.set.get("stall_over") is not None:
                time.sleep(0.05)
            self.close_connection = True
            return
        content = self.rfile.read(size)
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the content has another hash")
        with STATE.lock:
            STATE.objects[oid] = content
            STATE.received.append(oid)
        self.answer({})

    def do_commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.read().splitlines() if line]
        self.check_may_write(name)
        parent, before = self.commit_of(name, revision)
        (header,) = (line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent):
            raise Refused(412, "A commit has happened since")
        files = dict(before)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in STATE.objects:
                    raise Refused(400, f"no object {value['oid']}")
                files[value["path"]] = STATE.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        damaged = STATE.set.get("damage")
        if damaged in files:
            files[damaged] = b"\0" + files[damaged][1:]
        commit = STATE.repositories[name].commit(revision, files, header["summary"])
        url = f"{self.origin()}/{name}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url})

    def do_resolve(self, name: str, revision: str, path: str) -> None:
        commit, files = self.commit_of(name, revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = files[path]
        sha = hashlib.sha256(content).hexdigest()
        tag = sha if is_large(path) else git_hash(content)
        self.answer(
            content, ETag=f'"{tag}"', X_Repo_Commit=commit, X_Linked_Etag=f'"{tag}"',
            X_Linked_Size=str(len(content)), Accept_Ranges="bytes",
        )  # fmt: skip


def serve() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"http://127.0.0.1:{server.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)


# ---------------------------------------------------------------- for tests


class Hub:
    """A hub in a process of its own, and commands that use it.

    Args:
        home: a folder for the caches of the commands.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()

    def state(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.address}/_state") as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def set(self, **asked: Any) -> None:
        data = json.dumps(asked).encode()
        urllib.request.urlopen(f"{self.address}/_set", data=data).close()

    def files(self, repository: str, branch: str = "main") -> dict[str, str]:
        """The SHA-256 of each file of a branch, without the file that the hub makes itself."""
        found = dict(self.state()["repositories"][repository]["branches"][branch])
        found.pop(".gitattributes", None)
        return found

    def environment(self, token: str | None = WRITER) -> Mapping[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {
            **kept,
            **({} if token is None else {"HF_TOKEN": token}),
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(self.home / "hf"),
            # The loopback speaks git LFS; Xet needs a store of its own.
            "HF_HUB_DISABLE_XET": "1",
        }

    def start(self, *arguments: str, token: str | None = WRITER) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "qlora_kit", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.home,
            env={**self.environment(token)},
        )  # fmt: skip

    def run(self, *arguments: str, token: str | None = WRITER) -> tuple[int, str, str]:
        """Run a command; return its exit code, output and errors."""
        process = self.start(*arguments, token=token)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


if __name__ == "__main__":
    serve()
