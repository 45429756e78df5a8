"""Local S3 servers: one keeps objects in memory, the other serves a folder and counts requests."""

import logging
import os
import threading
import time
import urllib.request
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR, socket
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

BUCKET = "bucket"


def environment(url: str) -> dict[str, str]:
    """Environment variables that point the clients of S3 to a local server."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }


class S3Server:
    """A whole S3, in memory, with one bucket."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # otherwise every request is a line on standard error
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)

    def __enter__(self) -> Self:
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT")):
            pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop()

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.url)

    def place(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"


class Request(NamedTuple):
    """A request to a `RangeServer`."""

    method: str
    key: str
    """The object's name, or the prefix of a listing."""
    range: str | None = None
    """The `Range` header."""
    is_listing: bool = False


class RangeServer:
    """Serves the files below a folder as the objects of a bucket, whatever the bucket's name.

    It understands GET (whole, by range and by suffix range), HEAD, PUT (also create-if-absent) and the listings of S3,
    which are also those of Google's stores. Use it as a context manager, or `start` and `stop` it.
    """

    def __init__(self, folder: Path, latency_s: float = 0.0, page_size: int = 1000):
        """
        Args:
            latency_s: time from a request's arrival to its answer.
            page_size: number of entries on a page of a listing.
        """
        self.folder, self.latency_s, self.page_size = folder, latency_s, page_size
        self.requests: list[Request] = []
        self.num_failing = 0
        """Number of the next requests that the server carries out, but answers with an error."""
        self.lock = threading.Lock()
        self._server: _Server | None = None

    def start(self) -> Self:
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), name="range-server", daemon=True).start()
        return self

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.url)

    @property
    def place(self) -> str:
        """The folder, as a place in a bucket."""
        return f"s3://{BUCKET}"

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    def take_requests(self) -> list[Request]:
        """The requests since the last call."""
        with self.lock:
            taken, self.requests = self.requests, []
        return taken

    def list_entries(self, prefix: str, delimiter: str) -> list[str]:
        """The keys below a prefix; with a delimiter, the keys and prefixes up to the next slash."""
        folder = self.folder / prefix.rpartition("/")[0]
        if not folder.is_dir():
            return []
        paths = folder.iterdir() if delimiter else folder.rglob("*")
        names = [path.relative_to(self.folder).as_posix() + "/" * path.is_dir() for path in paths]
        return sorted(name for name in names if name.startswith(prefix) and (delimiter or not name.endswith("/")))


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = False  # so that closing waits for all of them

    def __init__(self, owner: RangeServer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner = owner
        self._connections: set[socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.owner.lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.owner.lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def stop(self) -> None:
        self.shutdown()
        with self.owner.lock:
            for connection in self._connections:
                connection.shutdown(SHUT_RDWR)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride] - no other server has this handler

    def do_GET(self) -> None:
        owner, url = self.server.owner, urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        key = unquote(url.path).lstrip("/").partition("/")[2]
        content = None
        if self.command == "PUT":
            content = self.rfile.read(int(self.headers["Content-Length"]))
        with owner.lock:
            listing = "list-type" in query
            prefix = query.get("prefix", "")
            owner.requests.append(Request(self.command, prefix if listing else key, self.headers["Range"], listing))
            failing = owner.num_failing > 0
            owner.num_failing -= failing
        time.sleep(owner.latency_s)
        path = owner.folder / key
        if content is not None:
            found = self._put(path, content)
        elif listing:
            found = _Answer(200, body=self._list(prefix, query))
        elif not path.is_file():
            found = _Answer(404, body=b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            found = self._get(path)
        self._send(_Answer(500, body=b"<Error><Code>InternalError</Code></Error>") if failing else found)

    do_HEAD = do_PUT = do_GET

    def _put(self, path: Path, content: bytes) -> "_Answer":
        with self.server.owner.lock:
            if self.headers["If-None-Match"] == "*" and path.exists():
                return _Answer(412, body=b"<Error><Code>PreconditionFailed</Code></Error>")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return _Answer(200, {"ETag": f'"{path.stat().st_mtime_ns}"'})

    def _get(self, path: Path) -> "_Answer":
        found = path.stat()
        headers = {
            "ETag": f'"{found.st_mtime_ns}"',
            "Last-Modified": formatdate(found.st_mtime, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        if self.headers["Range"] is None:
            return _Answer(200, headers, path=path, end=found.st_size)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, found.st_size - int(last))
        end = min(int(last) + 1, found.st_size) if first and last else found.st_size
        if start >= found.st_size:
            return _Answer(416, body=b"<Error><Code>InvalidRange</Code></Error>")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{found.st_size}"
        return _Answer(206, headers, path=path, start=start, end=end)

    def _list(self, prefix: str, query: dict[str, str]) -> bytes:
        owner = self.server.owner
        names = owner.list_entries(prefix, query.get("delimiter", ""))
        begin = int(query.get("continuation-token", 0))
        end = min(begin + owner.page_size, len(names))
        lines = [f"<Prefix>{escape(prefix)}</Prefix>", f"<IsTruncated>{str(end < len(names)).lower()}</IsTruncated>"]
        if end < len(names):
            lines.append(f"<NextContinuationToken>{end}</NextContinuationToken>")
        for name in names[begin:end]:
            if name.endswith("/"):
                lines.append(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>")
                continue
            found = os.stat(owner.folder / name)
            when = datetime.fromtimestamp(found.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            lines.append(
                f"<Contents><Key>{escape(name)}</Key><LastModified>{when}</LastModified><Size>{found.st_size}</Size>"
                f'<ETag>"{found.st_mtime_ns}"</ETag></Contents>'
            )
        return f"<ListBucketResult>{''.join(lines)}</ListBucketResult>".encode()

    def _send(self, answer: "_Answer") -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body) if answer.path is None else answer.end - answer.start))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(answer.body)
        if answer.path is not None and answer.end > answer.start:
            with open(answer.path, "rb") as file:
                self.connection.sendfile(file, answer.start, answer.end - answer.start)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged."""


class _Answer(NamedTuple):
    status: int
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed
    body: bytes = b""
    path: Path | None = None
    """The file whose bytes from `start` to `end` are the body."""
    start: int = 0
    end: int = 0
