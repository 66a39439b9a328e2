"""An object store in this process that speaks as much of S3 as pyarrow asks for: objects, listings, uploads in parts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

BUCKET = "bucket"


class ObjectStore(ThreadingHTTPServer):
    """`objects` are the bucket's, by key; requests without the right key id are refused."""

    daemon_threads = True

    def __init__(self, key_id: str) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.key_id = key_id
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.refused = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Request(BaseHTTPRequestHandler):
    server: ObjectStore
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.close_connection = False

    def _asked(self) -> tuple[str, dict[str, str], bytes] | None:
        """Key, query and body; None if the request was refused."""
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        body = self._body()
        if f"Credential={self.server.key_id}/" not in self.headers.get("Authorization", ""):
            self.server.refused += 1
            self._answer(403, b"<Error><Code>InvalidAccessKeyId</Code><Message>no such key</Message></Error>")
            return None
        if bucket != BUCKET:
            self._answer(404, b"<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>")
            return None
        return key, {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}, body

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            sent = b"".join(self._chunks())
        else:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return sent
        found, rest = b"", sent
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size.partition(b";")[0] or b"0", 16)
            if not length:
                break
            found, rest = found + rest[:length], rest[length + 2 :]
        return found

    def _chunks(self) -> Iterator[bytes]:
        while length := int(self.rfile.readline().partition(b";")[0], 16):
            yield self.rfile.read(length)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        if (asked := self._asked()) is None:
            return
        if not asked[0]:
            return self._answer(200)
        found = self.server.objects.get(asked[0])
        if found is None:
            return self._answer(404)
        return self._answer(200, length=len(found), ETag='"0"', Last_Modified=formatdate(usegmt=True))

    def do_GET(self) -> None:
        if (asked := self._asked()) is None:
            return
        key, query, _ = asked
        if not key:
            return self._answer(200, self._listing(query), Content_Type="application/xml")
        found = self.server.objects.get(key)
        if found is None:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>")
        span = self.headers.get("Range")
        if span is None:
            return self._answer(200, found, ETag='"0"', Last_Modified=formatdate(usegmt=True))
        first, _, last = span.removeprefix("bytes=").partition("-")
        part = found[int(first) : int(last or len(found)) + 1]
        return self._answer(206, part, ETag='"0"', Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(found)}")

    def _listing(self, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        contents, folders = [], set()
        with self.server.lock:
            for key, value in sorted(self.server.objects.items()):
                rest = key.removeprefix(prefix)
                if not key.startswith(prefix):
                    continue
                if delimiter and delimiter in rest:
                    folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                else:
                    contents.append((key, len(value)))
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><LastModified>2026-11-24T00:00:00.000Z</LastModified>"
            f'<ETag>"0"</ETag></Contents>'
            for key, size in contents
        )
        items += "".join(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>" for folder in sorted(folders))
        count = f"<KeyCount>{len(contents) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult><Name>{BUCKET}</Name>{count}{items}</ListBucketResult>".encode()

    def do_PUT(self) -> None:
        if (asked := self._asked()) is None:
            return
        key, query, body = asked
        with self.server.lock:
            if "partNumber" in query:
                self.server.uploads[query["uploadId"]][int(query["partNumber"])] = body
            elif key:
                self.server.objects[key] = body
        self._answer(200, ETag='"0"')

    def do_POST(self) -> None:
        if (asked := self._asked()) is None:
            return
        key, query, body = asked
        with self.server.lock:
            if "uploads" in query:
                name = str(len(self.server.uploads))
                self.server.uploads[name] = {}
                answer = f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
            elif "uploadId" in query:
                parts = self.server.uploads[query["uploadId"]]
                self.server.objects[key] = b"".join(parts[number] for number in sorted(parts))
                answer = '<CompleteMultipartUploadResult><ETag>"0"</ETag></CompleteMultipartUploadResult>'
            else:
                for item in ElementTree.fromstring(body).iter():
                    if item.tag.endswith("Key"):
                        self.server.objects.pop(str(item.text), None)
                answer = "<DeleteResult></DeleteResult>"
        self._answer(200, answer.encode(), Content_Type="application/xml")

    def do_DELETE(self) -> None:
        if (asked := self._asked()) is None:
            return
        with self.server.lock:
            self.server.objects.pop(asked[0], None)
        self._answer(204)


@contextmanager
def object_store(key_id: str) -> Iterator[ObjectStore]:
    """A store that answers until the end of the block."""
    store = ObjectStore(key_id)
    thread = threading.Thread(target=store.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
        thread.join()
