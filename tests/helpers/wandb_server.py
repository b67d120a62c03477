"""A server on this machine that answers Weights & Biases' clients as the real one does."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a" * 40  # a well-formed API key that no account has
# What is answered, by the name of the operation. Whatever else is asked for is not there.
_ARTIFACT = {"id": "A", "state": "COMMITTED", "artifactSequence": {"latestArtifact": {"id": "A"}}}
_PROJECT = {"id": "P", "name": "qvlm", "entity": {"id": "E", "name": "someone"}}
_BUCKET = {"id": "B", "name": "run", "displayName": "run", "project": _PROJECT}
ANSWERS: dict[str, dict[str, Any]] = {
    "UpsertBucket": {"upsertBucket": {"bucket": _BUCKET, "inserted": True}},
    "CreateArtifact": {"createArtifact": {"artifact": _ARTIFACT}},
    "UseArtifact": {"useArtifact": {"artifact": _ARTIFACT}},
    "viewer {": {"viewer": {"id": "V", "entity": "someone", "username": "someone"}},
    "query ArtifactType": {"project": {"artifact": None}},
    "ProjectInternalId": {"project": {"id": "P", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}},
    "GetProjects": {"models": {"edges": [], "pageInfo": {"hasNextPage": False, "endCursor": None}}},
    "upsertModel": {"upsertModel": {"model": _PROJECT, "inserted": True}},
    "upsertView": {"upsertView": {"view": {"id": "VmlldzoxMg==", "name": "v"}, "inserted": True}},
}


def _places(url: str, names: list[str]) -> dict[str, Any]:
    """Where the files of a run are uploaded to."""
    files = [{"name": name, "uploadUrl": f"{url}/upload"} for name in names]
    return {"runID": "B", "uploadHeaders": [], "files": files}


class Server:
    """What was asked of the server.

    Attributes:
        url: Address, for `WANDB_BASE_URL`.
        operations: Bodies of the GraphQL requests, in order.
        streamed: Bodies of what runs stream: history, summary and the exit code, in order.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.operations: list[dict[str, Any]] = []
        self.streamed: list[dict[str, Any]] = []

    def asked(self, name: str) -> list[dict[str, Any]]:
        """The variables of the requests whose query has a name in it."""
        return [body["variables"] for body in self.operations if name in body["query"]]


@contextmanager
def serving() -> Iterator[Server]:
    """Runs the server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            data: dict[str, Any] = {}
            if self.path.endswith("/graphql"):
                content = json.loads(body)
                server.operations.append(content)
                query = content["query"]
                for name, answer in ANSWERS.items():
                    if name in query:
                        data = answer
                if "CreateRunFiles" in query:
                    data = {"createRunFiles": _places(server.url, content["variables"]["files"])}
            elif self.path.endswith("/file_stream"):
                server.streamed.append(json.loads(body))
            answered = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answered)))
            self.end_headers()
            self.wfile.write(answered)

        do_GET = do_PUT = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{listening.server_port}")
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
