"""A bucket on loopback: the part of Google Cloud Storage's JSON API that gcsfs, tensorstore and orbax use.

It can fail on demand. `python tests/fake_gcs.py PORT` serves alone.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(r"^(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)$")
REWRITE = re.compile(r"^/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)$")


class FakeGCS(ThreadingHTTPServer):
    """`objects` by name, of every bucket: content and generation. Use as a context, which serves from a thread."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self.generations = itertools.count(1)
        self.mutex = threading.RLock()
        self.requests: list[str] = []
        self.refused = 0
        self._fails: Callable[[str], bool] = lambda _: False

    def environment(self) -> dict[str, str]:
        """What makes the libraries come here, without credentials, and ask no other server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # tensorstore's
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks by gRPC what kind of bucket it is
            "GCE_METADATA_HOST": "127.0.0.1:1",
        }

    def fail(self, seconds: float = 0.0, requests: int = 0, match: str = "") -> None:
        """Answer 503 for a while, or to the next requests whose line (`PUT /...`) holds the regular expression."""
        end, left = time.monotonic() + seconds, [requests]

        def fails(line: str) -> bool:
            if not re.search(match, line) or (time.monotonic() >= end and left[0] <= 0):
                return False
            left[0] -= 1
            return True

        self._fails = fails

    def refuses(self, line: str) -> bool:
        with self.mutex:
            self.requests.append(line)
            refused = self._fails(line)
            self.refused += refused
            return refused

    def names(self, prefix: str = "") -> list[str]:
        with self.mutex:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def handle_error(self, *_: object) -> None:
        """Clients hang up on answers that they no longer need."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*_)

    def __enter__(self) -> FakeGCS:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


@functools.cache
def shared_gcs() -> FakeGCS:
    """One for all tests of a process: the libraries remember the first address that they are given."""
    return FakeGCS().__enter__()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the acknowledgement of its headers
    wbufsize = -1
    server: FakeGCS

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def handle_any(self) -> None:
        body = self._body()
        if self.server.refuses(f"{self.command} {unquote(self.path)}"):
            self._json({"error": {"code": 503, "message": "the fake is told to fail"}}, 503)
            return
        with self.server.mutex:
            self._answer(body)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, body: bytes) -> None:
        split = urlsplit(self.path)
        path, query = split.path, {k: v[0] for k, v in parse_qs(split.query, keep_blank_values=True).items()}
        if path.startswith("/batch"):
            self._batch(body)
        elif path.startswith("/upload/"):
            self._upload(path.split("/")[5], query, body)
        elif found := REWRITE.match(path):
            source, target = (f"{unquote(found[i])}/{unquote(found[i + 1])}" for i in (1, 3))
            if source not in self.server.objects:
                self._missing(source)
                return
            self._store(target, self.server.objects[source][0], {})
            self._json({"done": True, "resource": self._resource(target)})
        elif found := OBJECT.match(path):
            self._object(f"{unquote(found[1])}/{unquote(found[2])}", query)
        elif path.endswith("/o"):
            self._list(unquote(path.split("/")[4]), query)
        elif path.startswith("/storage/v1/b/"):
            self._json({"kind": "storage#bucket", "name": path.split("/")[4]})
        else:
            self._missing(path)

    def _object(self, name: str, query: dict[str, str]) -> None:
        if name not in self.server.objects:
            self._missing(name)
            return
        data, generation = self.server.objects[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            self._send(b"", 304)
        elif query.get("ifGenerationMatch", str(generation)) != str(generation):
            self._json({"error": {"code": 412, "message": "the generation is another one"}}, 412)
        elif self.command == "DELETE":
            del self.server.objects[name]
            self._send(b"", 204)
        elif query.get("alt") == "media":
            asked = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", ""))
            headers = {"x-goog-generation": str(generation), "x-goog-stored-content-length": str(len(data))}
            if asked and int(asked[1]) >= len(data):
                self._send(b"", 416, headers)
            elif asked:
                first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                self._send(data[first : last + 1], 206, headers)
            else:
                self._send(data, 200, headers)
        else:
            self._json(self._resource(name))

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for full in self.server.names(f"{bucket}/{prefix}"):
            name = full.removeprefix(f"{bucket}/")
            if not query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff"):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if found:
                prefixes.add(prefix + head + delimiter)
            else:
                items.append(self._resource(full))
        self._json({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        if "upload_id" in query:
            name, conditions, data = self.server.uploads[query["upload_id"]]
            data += body
            if self.headers.get("Content-Range", "").endswith("/*"):
                self._send(b"", 308, {"Range": f"bytes=0-{len(data) - 1}"})
            elif self._store(name, bytes(data), conditions):
                self._json(self._resource(name))
        elif query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            key = str(next(self.server.generations))
            self.server.uploads[key] = (f"{bucket}/{name}", query, bytearray())
            self._json({}, 200, {"Location": f"{self.server.url}/upload/storage/v1/b/{bucket}/o?upload_id={key}"})
        elif query["uploadType"] == "multipart":
            mark = re.search(r"boundary=[\"']?([^\"';]+)", self.headers["Content-Type"])
            assert mark
            _, meta, media = re.split(rb"\r?\n?--" + re.escape(mark[1].encode()) + rb"\r?\n", body, maxsplit=2)
            media = media[: media.rindex(b"--" + mark[1].encode())]
            media = media[:-2] if media.endswith(b"\r\n") else media[:-1]
            meta, media = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (meta, media))
            name = f"{bucket}/{query.get('name') or json.loads(meta)['name']}"
            if self._store(name, media, query):
                self._json(self._resource(name))
        elif self._store(f"{bucket}/{query['name']}", body, query):
            self._json(self._resource(f"{bucket}/{query['name']}"))

    def _batch(self, body: bytes) -> None:
        """Deletions are all that is asked for in batches."""
        parts = []
        for number, found in enumerate(re.finditer(rb"DELETE (\S+) HTTP", body), 1):
            match = OBJECT.match(urlsplit(found[1].decode()).path)
            name = f"{unquote(match[1])}/{unquote(match[2])}" if match else ""
            status = "204 No Content" if self.server.objects.pop(name, None) else "404 Not Found"
            parts.append(
                f"--x\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        self._send(("".join(parts) + "--x--").encode(), 200, {"Content-Type": "multipart/mixed; boundary=x"})

    def _store(self, name: str, data: bytes, conditions: dict[str, str]) -> bool:
        current = self.server.objects.get(name, (b"", 0))[1]
        if conditions.get("ifGenerationMatch", str(current)) != str(current):
            self._json({"error": {"code": 412, "message": "the generation is another one"}}, 412)
            return False
        self.server.objects[name] = (data, next(self.server.generations))
        return True

    def _resource(self, full: str) -> dict[str, Any]:
        data, generation = self.server.objects[full]
        bucket, _, name = full.partition("/")
        crc = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()  # not CRC-32C, but it tells files apart
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()  # noqa: S324 - what the API has
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(data)), "crc32c": crc,
            "md5Hash": md5, "generation": str(generation), "metageneration": "1", "timeCreated": "2026-01-01T00:00:00Z",
            "updated": "2026-01-01T00:00:00Z", "storageClass": "STANDARD", "etag": str(generation),
        }  # fmt: skip

    def _missing(self, name: str) -> None:
        self._json({"error": {"code": 404, "message": f"No such object: {name}"}}, 404)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, data: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status != 304:
            self.wfile.write(data)
        self.wfile.flush()


if __name__ == "__main__":
    os.environ.clear()
    FakeGCS(int(sys.argv[1])).serve_forever()
