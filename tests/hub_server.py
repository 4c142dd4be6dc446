"""A server on this machine that speaks what huggingface_hub asks when it fetches one file."""

import contextlib
import dataclasses
import hashlib
import http.server
import threading
from collections.abc import Iterator

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class HubServer:
    """Files by `/<repo>/resolve/<revision>/<path>`, and how it goes wrong.

    Attributes:
        files: content by path on the server.
        announced: another content, whose hash is announced in place of the true one.
        broken_transfers: how many times still a transfer stops halfway.
        requests: what was asked: (method, path, range).
        refuses_by: the code by which everything is refused.
    """

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    announced: bytes | None = None
    broken_transfers: int = 0
    requests: list[tuple[str, str, str | None]] = dataclasses.field(default_factory=list)
    refuses_by: int | None = None
    url: str = ""


@contextlib.contextmanager
def serve() -> Iterator[HubServer]:
    state = HubServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            asked_range = self.headers.get("Range")
            state.requests.append((self.command, self.path, asked_range))
            content = state.files.get(self.path)
            if state.refuses_by is not None:
                self.send_response(state.refuses_by)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Error-Message", "Entry not found")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(asked_range.removeprefix("bytes=").split("-")[0]) if asked_range else 0
            body = content[start:]
            announced = content if state.announced is None else state.announced
            self.send_response(206 if asked_range else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(announced).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            if asked_range:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            self.end_headers()
            if self.command == "GET":
                if state.broken_transfers:
                    state.broken_transfers -= 1
                    body = body[: len(body) // 2]
                    self.close_connection = True
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
