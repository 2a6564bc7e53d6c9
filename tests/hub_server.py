"""A stand-in for the hub: a server with the part of its HTTP interface that pushes a model."""

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKENS = {"hf_write": "write", "hf_read": "read", "hf_fine": "fineGrained"}
USER, ORGANIZATION = "user", "lab"


class Hub:
    """What the server holds, and how it answers.

    Attributes:
        repos: the repositories by name: "private" (bool) and "files" (bytes by path).
        refuses: a part of a path; requests to such paths are answered with 403.
        asked: method and path of each request.
    """

    def __init__(self):
        self.repos, self.objects, self.refuses, self.asked, self.url = {}, {}, None, [], ""

    def answer(self, method, path, role, body):
        """Status, content and headers."""
        self.asked.append(f"{method} {path}")
        if self.refuses and self.refuses in path:
            return 403, {"error": "storage quota exceeded"}, {}
        if method == "PUT" and path.startswith("/objects/"):
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}, {}
        if role is None:
            return 401, {"error": "Invalid credentials"}, {}
        content = {} if "ndjson" in path or not body or path.endswith("/commit/main") else json.loads(body)
        if path == "/api/whoami-v2":
            account = {"type": "user", "name": USER, "orgs": [{"type": "org", "name": ORGANIZATION}]}
            return 200, {**account, "auth": {"type": "access_token", "accessToken": {"role": role}}}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            name = f"{content.get('organization') or USER}/{content['name']}"
            if name in self.repos:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}, {}
            private = content.get("visibility") == "private"
            self.repos[name] = {"private": private, "files": {}}
            return 200, {"url": f"{self.url}/{name}", "name": name, "private": private}, {}
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if name not in self.repos:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        repo = self.repos[name]
        if path.endswith("/preupload/main"):
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in content["files"]
            ]
            return 200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]}, {}
        if path.endswith("/info/lfs/objects/batch"):
            actions = [
                {**each, "actions": {"upload": {"href": f"{self.url}/objects/{each['oid']}"}}}
                for each in content["objects"]
            ]
            return 200, {"transfer": "basic", "objects": actions}, {}
        if path.endswith("/commit/main"):
            self.commit(repo["files"], [json.loads(line) for line in body.splitlines()])
            oid = f"{len(repo['files']):040d}"
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}, {}
        return 200, {"id": name, "private": repo["private"], "sha": "0" * 40, "siblings": []}, {}

    def commit(self, files, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "header", line


@contextmanager
def hub_server():
    """A hub that is served on a port of this machine."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            role = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
            status, content, headers = hub.answer(self.command, self.path.partition("?")[0], role, body)
            answer = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - names of the library

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
