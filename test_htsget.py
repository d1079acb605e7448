# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The htsget.py developers
"""Tests of htsget.py against a real HTTP server on loopback, and that server.

    python3 test_htsget.py demo [FILE]     serve a file and fetch it, no pytest needed
    python3 test_htsget.py serve [FILE]    keep the server running
    python3 -m pytest test_htsget.py       run the tests

The server misbehaves where a test asks it to: see `File` and `damage`.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import gc
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))

# A key and a certificate for localhost, made for these tests and good for nothing else.
TLS_KEY = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIE3ppzsBZpTpLQqEPgQQ2kPI/5Nzslv7atrYlwm0VZeDoAoGCCqGSM49
AwEHoUQDQgAElrEmii2tfrdz+I2WoxNB1IqzZQRu3s267t/Pl4AebsGTwnEy+hQv
bfidS4xSj28jxW3PE6anmhJlk995SaOUSw==
-----END EC PRIVATE KEY-----
"""
TLS_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBuDCCAV2gAwIBAgIUO4PrjV3I0qZX051M0LdrnKYcITkwCgYIKoZIzj0EAwIw
GjEYMBYGA1UEAwwPaHRzZ2V0LnB5IHRlc3RzMCAXDTI2MTEyMzA0MDMxN1oYDzIx
MjYxMDMwMDQwMzE3WjAaMRgwFgYDVQQDDA9odHNnZXQucHkgdGVzdHMwWTATBgcq
hkjOPQIBBggqhkjOPQMBBwNCAASWsSaKLa1+t3P4jZajE0HUirNlBG7ezbru38+X
gB5uwZPCcTL6FC9t+J1LjFKPbyPFbc8TpqeaEmWT33lJo5RLo38wfTAdBgNVHQ4E
FgQU55xswCQQaFzdSvYFRxWzPPWMC3IwHwYDVR0jBBgwFoAU55xswCQQaFzdSvYF
RxWzPPWMC3IwGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMA8GA1UdEwEB/wQF
MAMBAf8wDgYDVR0PAQH/BAQDAgKEMAoGCCqGSM49BAMCA0kAMEYCIQDCuYUAbuam
/Ojwu7p+3g8qzqhQNHLd6I+CX4hPZDEbgAIhAMLQXuLDtmwgJu98evFFelZBnRW9
7R0y/ASiRs6LGb6C
-----END CERTIFICATE-----
"""

BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


# ---- data


def bgzf(content, block=16384):
    """Compress into BGZF blocks, with the EOF block at the end."""
    blocks = []
    for start in range(0, len(content), block):
        piece = content[start : start + block]
        deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
        body = deflate.compress(piece) + deflate.flush()
        header = struct.pack("<4BI2BH2B2H", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, 0)
        blocks.append(
            header[:-2]
            + struct.pack("<H", len(body) + 25)
            + body
            + struct.pack("<2I", zlib.crc32(piece), len(piece))
        )
    return b"".join(blocks) + BGZF_EOF


def make_bam(reads=4000):
    """A small valid BAM file: unmapped reads of 100 bases."""
    text = b"@HD\tVN:1.6\tSO:unsorted\n@SQ\tSN:chr1\tLN:248956422\n"
    content = [b"BAM\1", struct.pack("<I", len(text)), text, struct.pack("<I", 1)]
    content.append(struct.pack("<I5sI", 5, b"chr1\0", 248956422))
    for number in range(reads):
        name = b"read%06d\0" % number
        bases = hashlib.sha512(name).digest()[:50]
        bases = bytes((1 << (b & 3)) << 4 | 1 << (b >> 2 & 3) for b in bases)
        core = struct.pack(
            "<iiBBHHHiiii", -1, -1, len(name), 0, 4680, 0, 4, 100, -1, -1, 0
        )
        record = core + name + bases + b"\x1e" * 100
        content.append(struct.pack("<I", len(record)) + record)
    return bgzf(b"".join(content))


def pattern(size, seed=0):
    """Bytes without a period that a shifted or repeated slice could hide in."""
    pieces = (
        hashlib.sha512(b"%d %d" % (seed, number)).digest() * 16
        for number in range(size // 1024 + 1)
    )
    return b"".join(pieces)[:size]


# ---- the server


Request = collections.namedtuple("Request", "method path headers body connection")


class Server(socketserver.ThreadingTCPServer):
    """HTTP on a free port of loopback; records what it is asked and what it sends."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, tls=False, handler=None, port=0):
        super().__init__(("127.0.0.1", port), handler or Handler)
        self.routes = {}
        self.requests = []
        self.connections = 0
        self.sent = 0
        # Seconds that every answer but a ticket's takes; answers under way, and most.
        self.delay = 0
        self.active = self.most_active = 0
        self.lock = threading.Lock()
        self.tls = None
        if tls:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            with tempfile.NamedTemporaryFile("w", suffix=".pem", delete=False) as pem:
                pem.write(TLS_KEY + TLS_CERTIFICATE)
            self.tls.load_cert_chain(pem.name)
            os.remove(pem.name)
        self.port = self.server_address[1]
        scheme, host = ("https", "localhost") if tls else ("http", "127.0.0.1")
        self.url = "%s://%s:%d" % (scheme, host, self.port)

    def start(self):
        thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        thread.daemon = True
        thread.start()
        return self

    def stop(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass

    def at(self, path, route):
        """Serve `route` (bytes, or a function of the handler) at `path`."""
        self.routes[path] = route
        return self.url + path

    def ticket(self, blocks, path="/reads/x", **more):
        """Serve a ticket of blocks: URLs, or pairs of a URL and headers."""
        urls = [
            {"url": block}
            if isinstance(block, str)
            else {"url": block[0], "headers": block[1]}
            for block in blocks
        ]
        document = {"htsget": dict({"urls": urls}, **more)}
        return self.at(path, json.dumps(document).encode())

    def asked(self, path):
        """The requests that were made for `path`."""
        return [r for r in self.requests if urllib.parse.urlsplit(r.path).path == path]


class Handler(http.server.BaseHTTPRequestHandler):
    """Hands each request to the route for its path."""

    protocol_version = "HTTP/1.1"
    timeout = 20
    disable_nagle_algorithm = True

    def setup(self):
        with self.server.lock:
            self.server.connections += 1
            self.number = self.server.connections
        if self.server.tls:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def log_message(self, *args):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, self.path, self.headers, body, self.number)
        with self.server.lock:
            self.server.requests.append(request)
        route = self.server.routes.get(urllib.parse.urlsplit(self.path).path)
        if route is None:
            error = {"htsget": {"error": "NotFound", "message": "no such thing here"}}
            self.reply(404, json.dumps(error).encode())
        elif isinstance(route, bytes):
            self.reply(200, route)
        else:
            with self.server.lock:
                self.server.active += 1
                self.server.most_active = max(
                    self.server.active, self.server.most_active
                )
            try:
                time.sleep(self.server.delay)
                route(self)
            finally:
                with self.server.lock:
                    self.server.active -= 1

    do_POST = do_GET

    def head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def reply(self, status, body=b"", headers=None):
        """A complete answer."""
        self.head(status, dict({"Content-Length": str(len(body))}, **(headers or {})))
        self.send(body)

    def send(self, data):
        for start in range(0, len(data), 65536):
            piece = data[start : start + 65536]
            self.wfile.write(piece)
            with self.server.lock:
                self.server.sent += len(piece)

    def send_chunked(self, data, size=10000):
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            self.wfile.write(b"%x\r\n" % len(piece))
            self.send(piece)
            self.wfile.write(b"\r\n")

    def cut(self):
        """End the connection here."""
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def reset(self):
        """End the connection with a TCP reset."""
        self.connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self.close_connection = True
        self.rfile.close()
        self.wfile.close()
        self.connection.close()


class File:
    """A route that serves bytes, by ranges or not, and is damaged at first.

    `damages`: one for each request, in order: None, or a function that is called with
    the handler and the answer (status, headers, body) and returns True when it has
    answered itself.
    """

    def __init__(self, data, ranges=True, etag=None, framing="length", damages=()):
        self.data = data
        self.ranges = ranges
        self.etag = etag
        self.framing = framing
        self.damages = list(damages)
        self.lock = threading.Lock()

    def __call__(self, handler):
        status, headers, body = self.answer(handler.headers)
        with self.lock:
            damage = self.damages.pop(0) if self.damages else None
        if damage is None or not damage(handler, status, headers, body):
            self.send(handler, status, headers, body)

    def answer(self, headers):
        common = {"ETag": self.etag} if self.etag else {}
        wanted = re.match(r"bytes=(\d+)-(\d*)$", headers.get("Range", ""))
        condition = headers.get("If-Range")
        if not wanted or not self.ranges or condition not in (None, self.etag):
            return 200, common, self.data
        size, first = len(self.data), int(wanted.group(1))
        last = min(int(wanted.group(2) or size - 1), size - 1)
        if first >= size:
            return 416, dict(common, **{"Content-Range": "bytes */%d" % size}), b""
        content_range = "bytes %d-%d/%d" % (first, last, size)
        return (
            206,
            dict(common, **{"Content-Range": content_range}),
            self.data[first : last + 1],
        )

    def send(self, handler, status, headers, body):
        if self.framing == "length":
            handler.reply(status, body, headers)
        elif self.framing == "chunked":
            handler.head(status, dict(headers, **{"Transfer-Encoding": "chunked"}))
            handler.send_chunked(body)
            handler.wfile.write(b"0\r\n\r\n")
        else:
            handler.head(status, dict(headers, Connection="close"))
            handler.send(body)
            handler.cut()


class damage:
    """What can befall an answer; each makes a function for `File.damages`."""

    @staticmethod
    def cut(count, how="cut"):
        """The connection ends after `count` bytes of the body."""

        def act(handler, status, headers, body):
            if count >= len(body):
                return False
            handler.head(status, dict(headers, **{"Content-Length": str(len(body))}))
            handler.send(body[:count])
            getattr(handler, how)()
            return True

        return act

    @staticmethod
    def chunked_cut(count):
        """A chunked body ends in the middle of a chunk."""

        def act(handler, status, headers, body):
            handler.head(status, dict(headers, **{"Transfer-Encoding": "chunked"}))
            handler.send_chunked(body[:count])
            handler.wfile.write(b"%x\r\n" % 5000)
            handler.cut()
            return True

        return act

    @staticmethod
    def stall(count, seconds):
        """Nothing more comes after `count` bytes of the body."""

        def act(handler, status, headers, body):
            handler.head(status, dict(headers, **{"Content-Length": str(len(body))}))
            handler.send(body[:count])
            time.sleep(seconds)
            handler.cut()
            return True

        return act

    @staticmethod
    def status(code, **headers):
        """Another status instead of the data."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}

        def act(handler, status, headers, body):
            handler.reply(code, b"", named)
            return True

        return act

    @staticmethod
    def raw(data):
        """These bytes instead of an answer."""

        def act(handler, status, headers, body):
            handler.wfile.write(data)
            handler.cut()
            return True

        return act

    @staticmethod
    def headers(**changed):
        """Other headers than the right ones."""
        named = {name.replace("_", "-"): value for name, value in changed.items()}

        def act(handler, status, headers, body):
            handler.reply(status, body, dict(headers, **named))
            return True

        return act

    @staticmethod
    def ignore_range(whole):
        """The whole file with status 200."""

        def act(handler, status, headers, body):
            handler.reply(200, whole)
            return True

        return act


def data_uri(content):
    return "data:;base64," + base64.b64encode(content).decode()


def sliced(server, data, count=4, path="/file", **options):
    """Serve `data` as a file and return the blocks of a ticket for it."""
    url = server.at(path, File(data, **options))
    edges = [len(data) * number // count for number in range(count + 1)]
    return [
        (url, {"Range": "bytes=%d-%d" % (first, stop - 1)})
        for first, stop in zip(edges, edges[1:])
    ]


# ---- demo


def format_of(data):
    """Format name, endpoint and file suffix for the first bytes of a file."""
    if data[:4] == b"CRAM":
        return "CRAM", "reads", ".cram"
    if data[:2] == b"\x1f\x8b":
        head = zlib.decompressobj(31).decompress(data, 4)
        if head[:4] == b"BAM\1":
            return "BAM", "reads", ".bam"
        if head[:3] == b"BCF":
            return "BCF", "variants", ".bcf"
        return "VCF", "variants", ".vcf.gz"
    return "VCF", "variants", ".vcf"


def demo_server(data, port=0):
    """A server with a ticket of several blocks for `data`; returns it, URL, name."""
    data_format, endpoint, suffix = format_of(data)
    server = Server(port=port)
    head = min(400, len(data) // 2)
    blocks = [data_uri(data[:head])]
    server.at("/file", File(data, etag='"demo"'))
    edges = [head + (len(data) - head) * number // 4 for number in range(5)]
    for first, stop in zip(edges, edges[1:]):
        if first < stop:
            wanted = {"Range": "bytes=%d-%d" % (first, stop - 1)}
            blocks.append((server.url + "/file", wanted))
    url = server.ticket(
        blocks,
        "/%s/demo" % endpoint,
        format=data_format,
        md5=hashlib.md5(data).hexdigest(),
    )
    return server, url, "demo" + suffix


def main(argv):
    """The demo, and the server by itself."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("demo", "serve"))
    parser.add_argument(
        "file", nargs="?", help="BAM, CRAM, VCF or BCF; made if not given"
    )
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args(argv)
    data = make_bam()
    if args.file:
        with open(args.file, "rb") as file:
            data = file.read()
    server, url, name = demo_server(data, args.port)
    if args.what == "serve":
        print("serving %s until Ctrl-C" % url, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 130
    server.start()
    command = [
        "python3",
        os.path.relpath(os.path.join(HERE, "htsget.py")),
        url,
        "-O",
        name,
    ]
    print("$ " + " ".join(command), flush=True)
    status = subprocess.call([sys.executable] + command[1:])
    server.stop()
    if status:
        return status
    with open(name, "rb") as file:
        arrived = file.read()
    for request in server.requests:
        print(
            "  %s %s %s"
            % (request.method, request.path, request.headers.get("Range", ""))
        )
    same = arrived == data
    print(
        "%s: %d bytes, MD5 %s, %s"
        % (
            name,
            len(arrived),
            hashlib.md5(arrived).hexdigest(),
            "identical to what was served" if same else "NOT what was served",
        )
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))


# ---- tests

import pytest  # noqa: E402

import htsget  # noqa: E402


@pytest.fixture
def server():
    with Server() as started:
        started.start()
        yield started
        started.shutdown()


@pytest.fixture
def tls_server():
    with Server(tls=True) as started:
        started.start()
        yield started
        started.shutdown()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No proxy, token or certificate setting of the machine's gets in the way."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(
            ("HTS_", "SSL_CERT", "NETRC")
        ):
            monkeypatch.delenv(name)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)


@pytest.fixture
def trusting():
    """An SSL context that trusts the tests' certificate."""
    return ssl.create_default_context(cadata=TLS_CERTIFICATE)


QUICK = {"retry_wait": 0.01, "timeout": 5, "verify": False}


def fetch(url, **options):
    output = io.BytesIO()
    htsget.get(url, output, **dict(QUICK, **options))
    return output.getvalue()


def htsget_command(*args, **more):
    """Run the command line as a user does."""
    command = [sys.executable, os.path.join(HERE, "htsget.py")] + list(args)
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30, **more
    )


class Unseekable(io.RawIOBase):
    """An output like a pipe."""

    def __init__(self):
        self.data = b""

    def writable(self):
        return True

    def write(self, data):
        self.data += bytes(data)
        return len(data)

    def getvalue(self):
        """As io.BytesIO has it."""
        return self.data


# -- the ticket request


@pytest.mark.parametrize(
    "options, query",
    [
        ({}, ""),
        ({"data_format": "bam"}, "format=BAM"),
        ({"fields": "QNAME,flag"}, "fields=QNAME,FLAG"),
        ({"fields": ["SEQ", "QUAL"]}, "fields=SEQ,QUAL"),
        ({"tags": "NM,MD"}, "tags=NM,MD"),
        ({"tags": []}, "tags="),
        ({"tags": ""}, "tags="),
        ({"tags": iter(["NM"]), "notags": ("OQ",)}, "tags=NM&notags=OQ"),
        ({"notags": ""}, ""),
        ({"reference_name": "chr1"}, "referenceName=chr1"),
        ({"reference_name": "*"}, "referenceName=*"),
        ({"reference_name": "a b&c=d"}, "referenceName=a%20b%26c%3Dd"),
        (
            {"reference_name": "1", "start": 0, "end": 4294967295},
            "referenceName=1&start=0&end=4294967295",
        ),
        (
            {"reference_md5": "0123456789abcdef0123456789ABCDEF", "start": 5},
            "referenceMD5=0123456789abcdef0123456789ABCDEF&start=5",
        ),
        ({"data_class": "header", "data_format": "VCF"}, "format=VCF&class=header"),
    ],
)
def test_options_reach_the_wire(server, options, query):
    url = server.ticket([data_uri(b"x")])
    htsget.get_ticket(url, **options)
    assert server.requests[0].method == "GET"
    assert server.requests[0].path.partition("?")[2] == query


def test_query_and_escapes_of_the_url_are_kept_as_given(server):
    server.ticket([], path="/reads/a%2Fb%20c")
    url = server.url + "/reads/a%2Fb%20c?a=1&a=2&blank=&c=%2f#fragment"
    htsget.get_ticket(url, data_format="BAM")
    assert server.requests[0].path == "/reads/a%2Fb%20c?a=1&a=2&blank=&c=%2f&format=BAM"


def test_a_url_with_spaces_and_umlauts_is_escaped(server):
    server.ticket([], path="/reads/m%20%C3%BC")
    htsget.get_ticket(server.url + "/reads/m \xfc")
    assert server.requests[0].path == "/reads/m%20%C3%BC"


def test_regions_are_posted_as_json(server):
    url = server.ticket([data_uri(b"x")])
    regions = [htsget.Region("chr1", 0, 10), ("chr2",), ("chr3", 5), ("*", None, None)]
    ticket = htsget.get_ticket(
        url + "?a=b",
        data_format="bam",
        fields="QNAME",
        tags=[],
        notags="OQ",
        regions=iter(regions),
    )
    request = server.requests[0]
    assert (request.method, request.path) == ("POST", "/reads/x?a=b")
    assert request.headers["Content-Type"] == "application/json"
    assert json.loads(request.body.decode()) == {
        "format": "BAM",
        "fields": ["QNAME"],
        "tags": [],
        "notags": ["OQ"],
        "regions": [
            {"referenceName": "chr1", "start": 0, "end": 10},
            {"referenceName": "chr2"},
            {"referenceName": "chr3", "start": 5},
            {"referenceName": "*"},
        ],
    }
    assert len(ticket.blocks) == 1


def test_headers_and_token_go_to_the_ticket_server_only(server):
    url = server.ticket([server.at("/block", b"data")])
    headers = {"X-Api-Key": "k"}
    assert fetch(url, headers=headers, bearer_token="secret") == b"data"
    ticket, block = server.requests
    assert ticket.headers["Authorization"] == "Bearer secret"
    assert ticket.headers["X-Api-Key"] == "k"
    assert ticket.headers["Accept"] == "application/vnd.ga4gh.htsget.v1.3.0+json"
    assert ticket.headers["Accept-Encoding"] == "identity"
    assert ticket.headers["User-Agent"] == "htsget.py/" + htsget.__version__
    assert block.headers["Authorization"] is None
    assert block.headers["X-Api-Key"] is None
    assert headers == {"X-Api-Key": "k"}


def test_the_token_wins_over_an_authorization_header(server, caplog):
    url = server.ticket([])
    htsget.get_ticket(url, headers={"authorization": "Basic xyz"}, bearer_token="t")
    assert server.requests[0].headers.get_all("Authorization") == ["Bearer t"]
    assert "replaces the Authorization header" in caplog.text


def test_user_info_in_the_url_becomes_basic_authorization(server):
    url = server.ticket([]).replace("//", "//me:p%40ss@")
    htsget.get_ticket(url)
    sent = server.requests[0].headers["Authorization"]
    assert sent == "Basic " + base64.b64encode(b"me:p@ss").decode()


@pytest.mark.parametrize(
    "options",
    [
        {"start": 1},
        {"end": 1},
        {"reference_name": "*", "start": 1},
        {"reference_name": "1", "start": -1},
        {"reference_name": "1", "start": 2, "end": 1},
        {"reference_name": "1", "end": 1 << 32},
        {"reference_name": "1", "start": 1.5},
        {"reference_md5": "xyz"},
        {"fields": "QNAME,WRONG"},
        {"fields": []},
        {"tags": "NM", "notags": ["NM"]},
        {"data_class": "header"},
        {"data_class": "body", "data_format": "BAM"},
        {"regions": []},
        {"regions": [("*", 1, 2)]},
        {"regions": [("1", 2, 1)]},
        {"regions": ["1:1-100"]},
        {"regions": ["1"]},
        {"regions": [1]},
        {"regions": [("1", 1, 2, 3)]},
        {"regions": [("1",)], "reference_name": "1"},
        {"regions": [("1",)], "start": 1},
        {"bearer_token": "a\r\nX: y"},
        {"headers": {"X": "a\nb"}},
        {"headers": {"X y": "a"}},
        {"headers": {"X": "\u20ac"}},
        {"headers": {"X": 1}},
        {"timeout": 0},
        {"connections": 0},
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(server, options):
    with pytest.raises(htsget.RequestError) as caught:
        htsget.get_ticket(server.ticket([]), **options)
    assert isinstance(caught.value, ValueError)
    assert server.connections == 0


def test_service_info_checks_its_arguments_too(server):
    with pytest.raises(htsget.RequestError):
        htsget.service_info(server.url + "/reads", timeout=0)
    assert server.connections == 0


@pytest.mark.parametrize(
    "url",
    [
        "",
        "reads/x",
        "ftp://h/x",
        "file:///etc/passwd",
        "http://",
        "http://h:x/",
        "http://h/a\nb",
        None,
    ],
)
def test_a_wrong_url_is_refused(url):
    with pytest.raises(htsget.RequestError):
        htsget.get(url, io.BytesIO())


def test_the_signature_of_get_is_that_of_0_2_6():
    code = htsget.get.__code__
    assert code.co_varnames[: code.co_argcount] == (
        "url", "output", "reference_name", "reference_md5", "start", "end", "fields",
        "tags", "notags", "data_format", "max_retries", "retry_wait", "timeout",
        "bearer_token", "headers",
    )  # fmt: skip
    assert htsget.get.__defaults__ == (None,) * 8 + (5, 5, 120, None, None)


# -- the ticket


def test_a_ticket_is_parsed(server):
    url = server.ticket(
        [data_uri(b"abc"), ("http://h/p", {"Range": "bytes=0-1"})],
        format="bam",
        md5="0" * 32,
        unknown=[1],
    )
    assert htsget.get_ticket(url) == htsget.Ticket(
        "BAM",
        [
            htsget.DataBlock(data_uri(b"abc"), {}, None),
            htsget.DataBlock("http://h/p", {"Range": "bytes=0-1"}, None),
        ],
        "0" * 32,
    )


def test_both_names_of_the_class_are_read(server):
    document = {
        "other": 1,
        "htsget": {
            "urls": [
                {"url": "data:,a", "class": "header", "headers": None},
                {"url": "data:,b", "urlClass": "body", "x": {}},
            ]
        },
        "more": None,
    }
    url = server.at("/t", b"\xef\xbb\xbf \n" + json.dumps(document).encode())
    ticket = htsget.get_ticket(url)
    assert [block.data_class for block in ticket.blocks] == ["header", "body"]
    assert ticket.format is None and ticket.md5 is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "[]",
        "{",
        "{} x",
        '{"htsget": 1}',
        '{"htsget": {}}',
        '{"htsget": {"urls": {}}}',
        '{"htsget": {"urls": [1]}}',
        '{"htsget": {"urls": [{}]}}',
        '{"htsget": {"urls": [{"url": 1}]}}',
        '{"htsget": {"urls": [{"url": "data:,", "headers": []}]}}',
        '{"htsget": {"urls": [{"url": "data:,", "class": 1}]}}',
        '{"htsget": {"urls": [{"url": "http://h/", "headers": {"A": 1}}]}}',
        '{"htsget": {"urls": [{"url": "http://h/", "headers": {"A": "x\\r\\nB: y"}}]}}',
        '{"htsget": {"urls": [{"url": "http://h/", "headers": {"A b": "x"}}]}}',
        '{"htsget": {"urls": [{"url": "http://h/", "headers": {"A": "\\u20ac"}}]}}',
        '{"htsget": {"urls": [], "format": 1}}',
        '{"htsget": {"urls": [], "md5": "xyz"}}',
        '{"htsget": {"urls": [], "x": NaN}}',
        '{"htsget": {"urls": [{"url": "file:///etc/passwd"}]}}',
        '{"htsget": {"urls": [{"url": "/etc/passwd"}]}}',
        '{"htsget": {"urls": [{"url": "http:///x"}]}}',
        '{"htsget": {"urls": [{"url": "http://h/a b"}]}}',
        '{"htsget": {"urls": [{"url": "http://h/\\u0001"}]}}',
        '{"htsget": {"urls": [{"url": "http://h:99999/"}]}}',
        '{"htsget": {"urls": [{"url": "http://h:x/"}]}}',
        '{"htsget": {"urls": [{"url": "http://h%0d%0aX-Evil:%20yes/"}]}}',
        '{"htsget": {"urls": [{"url": "http://[::1/"}]}}',
        '{"htsget": {"urls": [{"url": "data:;base64"}]}}',
        '{"htsget": {"urls": [{"url": "data:;base64,a$b="}]}}',
        '{"htsget": {"urls": [{"url": "data:;base64,YQ"}]}}',
        '{"htsget": {"urls": [{"url": "http://h",'
        ' "headers": {"Range": "bytes=5-4"}}]}}',
        '{"htsget": {"error": "NotFound", "message": "gone"}}',
        "[" * 200000,
        '{"a":' * 200000,
        '{"htsget": {"urls": [], "x": "' + "\\ud800" + '", "y": ' + "9" * 100000 + "}",
    ],
)
def test_a_broken_ticket_is_one_short_protocol_error(server, text):
    with pytest.raises(htsget.ProtocolError) as caught:
        fetch(server.at("/t", text.encode()))
    assert len(str(caught.value)) < 500
    assert len(server.requests) == 1


def test_a_ticket_that_is_not_utf_8_is_a_protocol_error(server):
    with pytest.raises(htsget.ProtocolError):
        fetch(server.at("/t", b'{"htsget": "\xff"}'))


def test_a_file_instead_of_a_ticket_is_given_up_early(server):
    url = server.at("/t", make_bam() + bytes(50 << 20))
    with pytest.raises(htsget.ProtocolError):
        fetch(url)
    assert server.sent < 20 << 20


def test_endless_json_is_cut_off_at_the_bound(server, monkeypatch):
    monkeypatch.setattr(htsget, "_TICKET_LIMIT", 1 << 20)

    def endless(handler):
        handler.head(200, {"Connection": "close"})
        handler.send(b'{"x": "')
        while True:
            handler.send(b"x" * 65536)

    with pytest.raises(htsget.ProtocolError, match="too large"):
        fetch(server.at("/t", endless))
    assert server.sent < 20 << 20


def test_a_token_that_cannot_be_sent_is_not_shown():
    for options in ({"bearer_token": "hush\n"}, {"headers": {"X-A": "hush\r"}}):
        with pytest.raises(htsget.RequestError) as caught:
            fetch("https://localhost/", **options)
        assert "hush" not in repr(caught.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 451, 501])
def test_a_refusal_is_a_client_error_with_type_and_message(server, status):
    body = {"htsget": {"error": "SomeType", "message": "some text"}}
    url = server.at("/t", lambda h: h.reply(status, json.dumps(body).encode()))
    with pytest.raises(htsget.ClientError) as caught:
        fetch(url)
    error = caught.value
    assert (error.status, error.error, error.message) == (
        status,
        "SomeType",
        "some text",
    )
    for part in (str(status), "SomeType", "some text"):
        assert part in str(error)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body, shown",
    [
        (b"plain text", "plain text"),
        (b'{"message": "of another kind"}', "of another kind"),
        (b"<html>\r\n" + b"x" * 100000, "<html> xxx"),
        (b"", "HTTP 404"),
        (b"[1, 2]", "[1, 2]"),
        (b'{"htsget": [1]}', "HTTP 404"),
        (b'{"htsget": {"urls": [{"url": "http://h/?sig', "HTTP 404"),
        (b"\xff\x00\x1b[31m", "HTTP 404"),
    ],
)
def test_an_error_body_of_any_kind_is_shown_shortened(server, body, shown):
    url = server.at("/t", lambda h: h.reply(404, body))
    with pytest.raises(htsget.ClientError) as caught:
        fetch(url)
    assert shown in str(caught.value)
    assert "sig" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_a_ticket_is_taken_in_place_of_a_url(server):
    ticket = htsget.Ticket("BAM", [htsget.DataBlock(server.at("/b", b"abc"))], None)
    assert fetch(ticket) == b"abc"


def test_a_ticket_shows_no_secrets():
    block = htsget.DataBlock("http://u:p@h/x?sig=secret1", {"Authorization": "secret2"})
    text = repr(htsget.Ticket("BAM", [block]))
    assert "http://h/x" in text and "Authorization" in text
    assert "secret" not in text and "u:p" not in text


# -- data blocks


@pytest.mark.parametrize(
    "uri, content",
    [
        ("data:;base64,YWJj", b"abc"),
        ("data:application/octet-stream;base64,YWI=", b"ab"),
        ("data:base64,YWJj", b"abc"),
        ("DATA:;BASE64,YWJj", b"abc"),
        ("data:;base64,%2B%2F8%3D", b"\xfb\xff"),
        ("data:;base64,+/8=", b"\xfb\xff"),
        ("data:,a%20b%FF,c", b"a b\xff,c"),
        ("data:text/plain;charset=utf-8,x", b"x"),
        ("data:,", b""),
        ("data:;base64,", b""),
        ("data:;base64,YW%0AJj", b"abc"),
    ],
)
def test_data_uris(server, uri, content):
    headers = {"Authorization": "as the EGA sends"}
    assert fetch(server.ticket([(uri, headers), data_uri(b"end")])) == content + b"end"


def test_blocks_are_joined_in_order_with_their_headers(server):
    data = pattern(100000)
    blocks = sliced(server, data)
    blocks[0][1]["X-One"] = "1"
    url = server.ticket([data_uri(b"head")] + blocks + [server.at("/tail", b"tail")])
    assert fetch(url) == b"head" + data + b"tail"
    assert [r.headers["X-One"] for r in server.asked("/file")] == [
        "1",
        None,
        None,
        None,
    ]


def test_an_empty_ticket_is_an_empty_file(server):
    assert fetch(server.ticket([])) == b""


def test_one_connection_serves_all_requests(server):
    data = pattern(1000 * 100)
    url = server.ticket(sliced(server, data, count=1000))
    assert fetch(url, connections=1) == data
    assert len(server.requests) == 1001
    assert server.connections == 1


def test_one_tls_connection_serves_all_requests(tls_server, trusting):
    data = pattern(100000)
    url = tls_server.ticket(sliced(tls_server, data, count=20))
    assert fetch(url, connections=1, ssl_context=trusting) == data
    assert tls_server.connections == 1


def test_a_connection_that_died_while_idle_costs_no_retry(server):
    def last_words(handler):
        handler.reply(200, b"abc")
        handler.close_connection = True  # without saying so

    blocks = [server.at("/%d" % number, last_words) for number in range(5)]
    assert fetch(server.ticket(blocks), max_retries=0) == b"abc" * 5


def test_what_comes_on_an_idle_connection_belongs_to_no_block(server):
    def twice(handler):
        handler.reply(200, b"abc")
        handler.reply(200, b"xyz")
        time.sleep(0.05)

    blocks = [server.at("/1", twice), server.at("/2", twice)]
    server.delay = 0.05
    assert fetch(server.ticket(blocks), max_retries=0) == b"abcabc"


def test_a_tls_connection_that_ends_without_an_answer_costs_no_retry(
    tls_server, trusting
):
    file = File(b"abc", damages=[None, lambda handler, *answer: handler.cut() or True])
    ticket = tls_server.ticket([tls_server.at("/b", file)] * 2)
    assert fetch(ticket, ssl_context=trusting, max_retries=0) == b"abcabc"


def test_no_host_smuggles_headers_to_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    block = htsget.DataBlock("http://example.org%0d%0aX-Evil%3a%20yes/b")
    with pytest.raises(htsget.ProtocolError):
        fetch(htsget.Ticket(None, [block]), max_retries=0)
    assert server.requests == []


def test_what_tls_has_decrypted_ahead_belongs_to_no_block(tls_server, trusting):
    def twice(handler):
        handler.head(200, {"Content-Length": "3"})
        handler.wfile.write(b"abcHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nxyz")

    ticket = tls_server.ticket([tls_server.at("/1", twice), tls_server.at("/2", twice)])
    assert fetch(ticket, ssl_context=trusting, max_retries=0) == b"abcabc"


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nX-Folded: a\r\n b\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 200\r\nTransfer-Encoding: identity\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\nContent-Length: 3\n\n",
    ],
)
@pytest.mark.parametrize("bytewise", [False, True])
def test_odd_heads_that_are_legal(server, head, bytewise):
    def route(handler):
        for byte in head if bytewise else ():
            handler.wfile.write(bytes([byte]))
        handler.wfile.write(b"abc" if bytewise else head + b"abc")

    blocks = [server.at("/1", route), server.at("/2", route)]
    assert fetch(server.ticket(blocks), max_retries=0) == b"abcabc"
    assert server.connections == 1


def test_a_chunked_body_is_complete_with_its_last_chunk(server):
    def route(handler):
        handler.head(200, {"Transfer-Encoding": "chunked"})
        handler.wfile.write(b"3\r\nabc\r\n0\r\n")
        time.sleep(0.1)
        handler.reset()

    assert fetch(server.ticket([server.at("/b", route)]), max_retries=0) == b"abc"


def test_an_address_of_a_family_that_the_system_lacks(server, monkeypatch):
    def getaddrinfo(*args, **options):
        return [(99, socket.SOCK_STREAM, 6, "", ("::1", server.port, 0, 0))] + known

    known = socket.getaddrinfo("127.0.0.1", server.port, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert fetch(server.ticket([data_uri(b"abc")]), max_retries=0) == b"abc"


def test_a_default_timeout_of_the_program_changes_nothing(server):
    socket.setdefaulttimeout(0.5)
    try:
        assert fetch(server.ticket([server.at("/b", b"abc")] * 3)) == b"abc" * 3
    finally:
        socket.setdefaulttimeout(None)
    assert server.connections == 1


@pytest.mark.parametrize("timeout", [None, sys.maxsize])
def test_no_timeout_is_too_long(server, timeout):
    url = server.ticket([server.at("/b", b"abc")])
    assert fetch(url, timeout=timeout) == b"abc"


def test_a_url_without_a_path(server):
    server.ticket([], path="/")
    assert fetch(server.url) == b""
    server.at("/away", lambda h: h.reply(302, b"", {"Location": server.url}))
    assert fetch(server.url + "/away") == b""


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server, status):
    def to(path):
        return lambda h: h.reply(status, b"moved", {"Location": path})

    server.at("/old", to("/new"))
    data = pattern(1000)
    server.at("/new", File(data))
    server.at(
        "/reads/old", to(server.ticket([(server.url + "/old", {"Range": "bytes=0-9"})]))
    )
    assert fetch(server.url + "/reads/old") == data[:10]
    assert server.asked("/new")[0].headers["Range"] == "bytes=0-9"
    assert server.connections == 1


@pytest.mark.parametrize(
    "status, method",
    [(301, "POST"), (302, "POST"), (303, "GET"), (307, "POST"), (308, "POST")],
)
def test_a_redirected_post_keeps_its_regions(server, status, method):
    server.ticket([data_uri(b"x")])
    url = server.at("/old", lambda h: h.reply(status, b"", {"Location": "/reads/x"}))
    assert fetch(url, regions=[("1", 0, 1)]) == b"x"
    assert [request.method for request in server.requests] == ["POST", method]
    assert server.requests[1].body == (
        server.requests[0].body if method == "POST" else b""
    )


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("ranges", [True, False])
def test_every_framing_of_a_block(server, framing, ranges):
    data = pattern(300000)
    blocks = sliced(server, data, framing=framing, ranges=ranges)
    blocks.append(server.at("/plain", File(data, framing=framing)))
    assert fetch(server.ticket(blocks)) == data * 2


def test_http_1_0_without_a_length(server, caplog):
    raw = b"HTTP/1.0 200 OK\r\n\r\n" + pattern(5000)
    url = server.at("/b", File(b"", damages=[damage.raw(raw)]))
    assert fetch(server.ticket([url])) == pattern(5000)
    assert "does not say how long" in caplog.text


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_200_with_the_slice_for_a_range(server, framing):
    data = pattern(5000)

    def slice_with_200(handler):
        status, headers, body = File(data).answer(handler.headers)
        File(b"", framing=framing).send(handler, 200, {}, body)

    url = server.at("/b", slice_with_200)
    blocks = [(url, {"Range": "bytes=%d-%d" % r}) for r in ((100, 1999), (2000, 2999))]
    assert fetch(server.ticket(blocks)) == data[100:3000]


def test_206_for_a_plain_request_is_the_body(server):
    headers = {"Content-Range": "bytes 100-109/5000"}
    url = server.at("/b", lambda h: h.reply(206, b"0123456789", headers))
    assert fetch(server.ticket([url])) == b"0123456789"


def test_the_total_of_a_content_range_is_not_checked(server):
    headers = {"Content-Range": "bytes 100-109/10"}
    url = server.at("/b", lambda h: h.reply(206, b"0123456789", headers))
    assert fetch(server.ticket([(url, {"Range": "bytes=100-109"})])) == b"0123456789"


def test_206_without_content_range(server):
    url = server.at("/b", lambda h: h.reply(206, b"0123456789"))
    assert fetch(server.ticket([(url, {"Range": "bytes=100-109"})])) == b"0123456789"


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_range_beyond_the_end_of_the_file(server, framing, ranges):
    data = pattern(1000)
    url = server.at("/b", File(data, framing=framing, ranges=ranges))
    first = 0 if framing != "length" and not ranges else 100
    wanted = {"Range": "bytes=%d-99999" % first}
    options = {"max_retries": 0}
    if framing == "close" and not ranges:
        # Nothing tells such an end from a cut connection.
        with pytest.raises(htsget.ContentLengthMismatch):
            fetch(server.ticket([(url, wanted)]), **options)
    else:
        assert fetch(server.ticket([(url, wanted)]), **options) == data[first:]


def test_an_open_range(server):
    data = pattern(1000)
    blocks = [(server.at("/b", File(data)), {"Range": "bytes=100-"})]
    assert fetch(server.ticket(blocks)) == data[100:]


def test_a_server_that_gives_ranges_in_pieces(server):
    data = pattern(5000)

    def pieces(handler):
        first, last = map(int, handler.headers["Range"][6:].split("-"))
        last = min(last, first + 999)
        said = {"Content-Range": "bytes %d-%d/5000" % (first, last)}
        handler.reply(206, data[first : last + 1], said)

    wanted = {"Range": "bytes=500-4499"}
    assert (
        fetch(server.ticket([(server.at("/b", pieces), wanted)]), max_retries=0)
        == data[500:4500]
    )


@pytest.mark.parametrize(
    "status, headers, length",
    [
        (206, {"Content-Range": "bytes 101-110/5000"}, 10),
        (206, {"Content-Range": "bytes 100-110/5000"}, 11),
        (206, {"Content-Range": "bytes 100-99/5000"}, 0),
        (206, {"Content-Range": "nonsense"}, 10),
        (206, {"Content-Range": "bytes 100-109/5000"}, 9),
        (206, {"Content-Type": "multipart/byteranges; boundary=x"}, 10),
        (206, {}, 11),
        (200, {"Content-Type": "text/html"}, 10),
        (200, {}, 99),
    ],
)
def test_an_answer_with_other_bytes_is_a_protocol_error(
    server, status, headers, length
):
    url = server.at("/b", lambda h: h.reply(status, bytes(length), headers))
    output = io.BytesIO()
    with pytest.raises(htsget.ProtocolError):
        htsget.get(
            server.ticket([(url, {"Range": "bytes=100-109"})]),
            output,
            retry_wait=0,
            max_retries=1,
        )
    assert output.getvalue() == b""


def test_a_content_encoding_of_a_block_is_ignored(server):
    url = server.at("/b", lambda h: h.reply(200, b"raw", {"Content-Encoding": "gzip"}))
    assert fetch(server.ticket([url])) == b"raw"


# -- retries


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504, 522])
def test_passing_failures_are_retried(server, code):
    data = pattern(1000)
    url = server.at("/b", File(data, damages=[damage.status(code)] * 2))
    assert fetch(server.ticket([url])) == data
    assert len(server.asked("/b")) == 3


@pytest.mark.parametrize("code", [400, 401, 403, 404, 405, 410, 413, 416, 501])
def test_refusals_are_not_retried(server, code):
    url = server.at("/b", lambda h: h.reply(code))
    with pytest.raises(htsget.ClientError) as caught:
        fetch(htsget.Ticket(None, [htsget.DataBlock(url)]))
    assert caught.value.status == code
    assert len(server.asked("/b")) == 1


def test_the_ticket_request_is_retried(server):
    server.ticket([data_uri(b"x")])
    ticket = server.routes["/reads/x"]
    damages = [damage.status(503), damage.cut(5), damage.raw(b"garbage\r\n\r\n")]
    url = server.at("/t", File(ticket, damages=damages))
    assert fetch(url) == b"x"


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_retries_end(server, limit):
    url = server.at("/b", lambda h: h.reply(503, b"busy"))
    with pytest.raises(htsget.RetryableIOError) as caught:
        fetch(server.ticket([url]), max_retries=limit)
    assert len(server.asked("/b")) == limit + 1
    assert "503" in str(caught.value) and "busy" in str(caught.value)


@pytest.mark.parametrize("limit", [-1, sys.maxsize])
def test_retries_without_limit(server, limit):
    url = server.at("/b", File(b"abc", damages=[damage.status(500)] * 40))
    assert fetch(server.ticket([url]), max_retries=limit, retry_wait=0) == b"abc"


def test_a_refused_connection_is_a_retryable_error_with_its_cause():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = "http://127.0.0.1:%d/" % unused.getsockname()[1]
        with pytest.raises(htsget.RetryableIOError) as caught:
            fetch(url, max_retries=1)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


def test_a_stalled_connection_times_out_and_is_retried(server):
    data = pattern(50000)
    url = server.at("/b", File(data, damages=[damage.stall(20000, 2)]))
    assert fetch(server.ticket([url]), timeout=0.3) == data


def test_retry_after_is_obeyed(server):
    url = server.at("/b", File(b"x", damages=[damage.status(503, Retry_After="1")]))
    before = time.monotonic()
    assert fetch(server.ticket([url])) == b"x"
    assert 1 <= time.monotonic() - before < 3


@pytest.mark.parametrize(
    "value, seconds",
    [
        ("7", 7.0),
        (" 7 ", 7.0),
        ("0", 0.0),
        ("-1", 0.0),
        ("garbage", 0.0),
        ("", 0.0),
        (None, 0.0),
        ("Thu, 01 Jan 1970 00:16:45 GMT", 5.0),
        ("Thu, 01 Jan 1970 00:16:35 GMT", 0.0),
        ("999999999", 3600.0),
        ("Thu, 99 Jan 1970 00:16:35 GMT", 0.0),
    ],
)
def test_retry_after_values(value, seconds):
    assert htsget._retry_after(value, 1000.0) == seconds


def test_waits_double_up_to_a_minute():
    retry = htsget._Retry(-1, 5)
    error = htsget.RetryableIOError("x")
    waits = [retry.pause(error) for _ in range(7)]
    for wait, expected in zip(waits, [5, 10, 20, 40, 60, 60, 60]):
        assert expected <= wait <= expected * 1.2
    retry.progress(1 << 16)
    assert 5 <= retry.pause(error) <= 6
    assert 100 <= htsget._Retry(-1, 100).pause(error) <= 120


def test_a_wait_that_is_less_than_retry_after_is_lengthened():
    error = htsget.RetryableIOError("x")
    error._retry_after = 50.0
    assert htsget._Retry(1, 1).pause(error) == 50.0


# -- going on from the last byte


def test_a_cut_transfer_goes_on_from_the_last_byte(server):
    data = pattern(32 << 20)
    damages = [damage.cut(5 << 20)] * 100
    url = server.ticket(sliced(server, data, count=1, damages=damages))
    assert fetch(url, max_retries=3) == data
    assert server.sent < 1.05 * len(data)


@pytest.mark.parametrize("how", ["cut", "reset"])
@pytest.mark.parametrize(
    "etag, condition", [('"a"', '"a"'), ('W/"a"', None), (None, None)]
)
def test_ranges_are_closed_and_conditional(server, how, etag, condition):
    data = pattern(500000)
    file = File(data, etag=etag, damages=[damage.cut(200000, how)])
    blocks = [(server.at("/b", file), {"Range": "bytes=1000-400999"})]
    plain = File(data, etag=etag, damages=[damage.cut(200000)])
    blocks.append(server.at("/plain", plain))
    assert fetch(server.ticket(blocks)) == data[1000:401000] + data
    first, second = server.asked("/b")
    assert first.headers["Range"] == "bytes=1000-400999"
    assert first.headers["If-Range"] is None
    assert re.match(r"bytes=\d+-400999$", second.headers["Range"])
    assert second.headers["If-Range"] == condition
    first, second = server.asked("/plain")
    assert first.headers["Range"] is None
    assert second.headers["Range"] == "bytes=200000-499999"


def test_a_chunked_body_goes_on_with_an_open_range(server):
    data = pattern(100000)
    file = File(data, framing="chunked", damages=[damage.chunked_cut(50000)])
    assert fetch(server.ticket([server.at("/b", file)])) == data
    assert server.asked("/b")[1].headers["Range"] == "bytes=50000-"


def test_a_range_is_retried_until_its_content_range_is_right(server):
    data = pattern(1000)
    wrong = damage.headers(Content_Range="bytes 0-899/1000")
    blocks = sliced(server, data, count=1, damages=[damage.cut(100), wrong])
    assert fetch(server.ticket(blocks)) == data


def changing(before, after, damages):
    """A file that becomes another one after its first answers."""

    def route(handler):
        (before if before.damages else after)(handler)

    before.damages = damages
    return route


@pytest.mark.parametrize("ranges", [True, False])
def test_an_object_that_changed_is_fetched_anew(server, ranges):
    old, new = pattern(300000, 1), pattern(200000, 2)
    route = changing(
        File(old, etag='"1"', ranges=ranges),
        File(new, etag='"2"', ranges=ranges),
        [damage.cut(150000)],
    )
    assert fetch(server.ticket([server.at("/b", route)])) == new


def test_an_object_that_changed_between_two_blocks_starts_the_transfer_over(server):
    old, new = pattern(300000, 1), pattern(300000, 2)
    route = changing(File(old, etag='"1"'), File(new, etag='"2"'), [None])
    url = server.at("/b", route)
    ranges = ("bytes=0-99999", "bytes=100000-299999")
    ticket = server.ticket([(url, {"Range": wanted}) for wanted in ranges])
    assert fetch(ticket, connections=1) == new
    assert len(server.asked("/reads/x")) == 2


def test_an_object_that_changed_is_never_mixed_into_a_pipe(server):
    old, new = pattern(300000, 1), pattern(300000, 2)
    route = changing(File(old, etag='"1"'), File(new, etag='"2"'), [damage.cut(150000)])
    output = Unseekable()
    with pytest.raises(htsget.HtsgetException):
        htsget.get(server.ticket([server.at("/b", route)]), output, **QUICK)
    assert old.startswith(output.data)


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_pipe_gets_every_byte_once(server, framing, ranges):
    data = pattern(300000)
    cut = damage.chunked_cut if framing == "chunked" else damage.cut
    damages = [cut(100000), damage.status(503), cut(200000)]
    file = File(data, framing=framing, ranges=ranges, damages=damages)
    output = Unseekable()
    htsget.get(server.ticket([server.at("/b", file)]), output, **QUICK)
    assert output.data == data


def test_a_pipe_never_gets_other_bytes_in_a_second_attempt(server):
    old, new = pattern(300000, 1), pattern(300000, 2)
    route = changing(
        File(old, ranges=False), File(new, ranges=False), [damage.cut(150000)]
    )
    output = Unseekable()
    with pytest.raises(htsget.ProtocolError, match="differs from what was already"):
        htsget.get(server.ticket([server.at("/b", route)]), output, **QUICK)
    assert output.data == old[:150000]


def scripted(*routes):
    """A route that answers as the given ones do, in turn; the last one goes on."""
    left = list(routes)

    def route(handler):
        (left.pop(0) if len(left) > 1 else left[0])(handler)

    return route


def announce(status, body, length=None, **headers):
    """An answer with a Content-Length of its own, cut where the body ends."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def route(handler):
        size = len(body) if length is None else length
        handler.head(status, dict(named, **{"Content-Length": str(size)}))
        handler.send(body)
        handler.cut()

    return route


def chunked(status, body, complete=True, **headers):
    """A chunked answer, cut at its end unless complete."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def route(handler):
        handler.head(status, dict(named, **{"Transfer-Encoding": "chunked"}))
        handler.send_chunked(body)
        if complete:
            handler.wfile.write(b"0\r\n\r\n")
        handler.cut()

    return route


OLD, NEW = pattern(300000, 3), pattern(300000, 4)
CLOSED = {"Range": "bytes=1000-200999"}
TICKETS = "bytes 1000-200999/300000"


@pytest.mark.parametrize(
    "headers, routes",
    [
        # A 206 that ignores the Range it was asked for, and does not say so.
        (None, [announce(200, OLD[:99999], 300000), chunked(206, OLD)]),
        (CLOSED, [announce(206, OLD[1000:9999], 200000),
                  chunked(206, OLD[1000:201000])]),
        # The tail of an open range, and nothing that says so.
        (None, [chunked(200, OLD[:99999], False), chunked(206, OLD[99999:]),
                File(OLD)]),
        ({"Range": "bytes=0-"}, [chunked(206, OLD[:99999], False),
                                 chunked(206, OLD[99999:]), File(OLD)]),
        # A Content-Range that promises more than comes.
        (None, [chunked(200, OLD[:9], False),
                chunked(206, OLD[9:99], Content_Range="bytes 9-299999/300000"),
                File(OLD)]),
        # The whole file for an open range, without a length.
        ({"Range": "bytes=0-"}, [chunked(200, OLD[:99999], False), chunked(200, OLD)]),
        ({"Range": "bytes=1000-"}, [chunked(200, OLD)]),
        # The whole file is taken for the slice, and cut before it shows.
        (CLOSED, [chunked(200, OLD[:99999], False), File(OLD)]),
        (CLOSED, [chunked(200, OLD)]),
        # The server always gives the ticket's slice.
        (CLOSED, [announce(206, OLD[1000:9999], 200000, Content_Range=TICKETS),
                  announce(206, OLD[1000:201000], Content_Range=TICKETS)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("output", [io.BytesIO, Unseekable])
def test_nothing_is_spliced_that_may_not_belong_together(
    server, headers, routes, output
):
    url = server.at("/b", scripted(*routes))
    block = htsget.DataBlock(url, headers or {})
    first, last = (
        int(n or 299999) for n in re.findall(r"\d+|$", (headers or CLOSED)["Range"])[:2]
    )
    expected = OLD if headers is None else OLD[first : last + 1]
    output = output()
    try:
        htsget.get(htsget.Ticket(None, [block]), output, **QUICK)
    except htsget.HtsgetException:
        assert isinstance(output, Unseekable)
        return
    assert output.getvalue() == expected


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("output", [io.BytesIO, Unseekable])
def test_a_server_that_sends_the_slice_whatever_is_asked(server, framing, output):
    body = File(OLD[1000:201000], ranges=False, framing=framing)
    cut = damage.cut if framing == "length" else damage.chunked_cut
    body.damages = [cut(100000)]
    output = output()
    ticket = server.ticket([(server.at("/b", body), CLOSED)])
    htsget.get(ticket, output, **QUICK)
    assert output.getvalue() == OLD[1000:201000]


def test_what_one_url_does_says_nothing_of_another(server):
    whole = server.at("/whole", File(OLD, ranges=False, framing="chunked"))
    piece = server.at("/slice", File(OLD[1000:201000], ranges=False, framing="chunked"))
    data = fetch(server.ticket([(whole, CLOSED), (piece, CLOSED)]))
    assert data == OLD[1000:201000] * 2


def test_a_pipe_never_gets_the_tail_of_another_version(server):
    routes = [
        announce(200, OLD[:100000], 300000, ETag='"1"'),
        announce(200, NEW[:20000], 300000, ETag='"2"'),
        File(NEW, etag='"2"'),
    ]
    output = Unseekable()
    with pytest.raises(htsget.ProtocolError, match="differs"):
        htsget.get(server.ticket([server.at("/b", scripted(*routes))]), output, **QUICK)
    assert output.data == OLD[:100000]


@pytest.mark.parametrize("output", [io.BytesIO, Unseekable])
def test_a_shorter_second_answer_is_not_the_end(server, output):
    routes = [announce(200, OLD[:100000], 300000), announce(200, NEW[:30000])]
    output = output()
    url = server.ticket([server.at("/b", scripted(*routes))])
    if isinstance(output, Unseekable):
        with pytest.raises(htsget.ProtocolError):
            htsget.get(url, output, **QUICK)
    else:
        htsget.get(url, output, **QUICK)
        assert output.getvalue() == NEW[:30000]


def test_pieces_that_never_end_are_an_error(server):
    def route(handler):
        handler.reply(206, b"x" * 50, {"Content-Range": "bytes 0-49/1000"})

    url = server.at("/b", route) + "?X-Amz-SignedHeaders=range"
    with pytest.raises(htsget.RetryableError):
        fetch(server.ticket([(url, {"Range": "bytes=0-99"})]), max_retries=2)
    assert len(server.asked("/b")) == 3


def signed(data, refusal, allowed, damages):
    """A file of which only the signed range can be had."""
    file = File(data, damages=damages)

    def route(handler):
        if handler.headers["Range"] != allowed:
            handler.reply(refusal, b"<Error>SignatureDoesNotMatch</Error>")
        else:
            file(handler)

    return route


@pytest.mark.parametrize("output", [io.BytesIO, Unseekable])
@pytest.mark.parametrize("refusal", [400, 403, 416])
@pytest.mark.parametrize(
    "query", ["", "?X-Amz-SignedHeaders=host%3Brange&X-Amz-Signature=x"]
)
def test_a_range_that_must_not_be_changed(server, output, refusal, query):
    data = pattern(300000)
    allowed = "bytes=1000-250999"
    damages = [damage.cut(100000), damage.cut(150000)]
    url = server.at("/b", signed(data, refusal, allowed, damages)) + query
    output = output()
    htsget.get(server.ticket([(url, {"Range": allowed})]), output, **QUICK)
    assert getattr(output, "data", None) or output.getvalue() == data[1000:251000]
    changed = [r for r in server.asked("/b") if r.headers["Range"] != allowed]
    assert len(changed) == (0 if query else 1)


def expiring(server, data, lifetime, blocks=4):
    """A ticket whose URLs are refused after `lifetime` requests."""
    edges = [len(data) * number // blocks for number in range(blocks + 1)]
    issued = []

    def ticket(handler):
        number = len(issued)
        issued.append(0)
        server.at("/file%d" % number, block(number))
        urls = [
            {
                "url": "%s/file%d?sig=secret%d" % (server.url, number, number),
                "headers": {"Range": "bytes=%d-%d" % (a, b - 1)},
            }
            for a, b in zip(edges, edges[1:])
        ]
        handler.reply(200, json.dumps({"htsget": {"urls": urls}}).encode())

    def block(number):
        file = File(data)

        def route(handler):
            issued[number] += 1
            if issued[number] > lifetime:
                handler.reply(403, b"expired")
            elif issued[number] == lifetime:
                damage.cut(1000)(handler, *file.answer(handler.headers))
            else:
                file(handler)

        return route

    return server.at("/reads/x", ticket)


def test_expired_urls_are_renewed(server):
    data = pattern(400000)
    tokens = iter(["one", "two", "three", "four", "five"])
    assert fetch(expiring(server, data, 2), bearer_token=lambda: next(tokens)) == data
    tickets = server.asked("/reads/x")
    assert len(tickets) > 1
    sent = [request.headers["Authorization"] for request in tickets]
    assert sent[:2] == ["Bearer one", "Bearer two"]
    assert server.sent < 1.05 * len(data) + 20000


def test_a_block_that_stays_refused_is_a_client_error(server):
    def refuse(handler):
        handler.reply(403, b"no")

    url = server.ticket(
        [data_uri(b"x"), (server.at("/b", refuse), {"Range": "bytes=0-9"})]
    )
    with pytest.raises(htsget.ClientError) as caught:
        fetch(url)
    assert caught.value.status == 403
    assert len(server.requests) <= 6


def test_a_renewed_ticket_with_other_blocks_fails(server):
    first = server.ticket([(server.url + "/gone", {"Range": "bytes=0-9"})])
    texts = [server.routes["/reads/x"]]
    server.ticket([(server.at("/b", b"0123456789"), {"Range": "bytes=0-8"})])
    texts.append(server.routes["/reads/x"])
    server.at("/reads/x", lambda handler: handler.reply(200, texts.pop(0)))
    with pytest.raises(htsget.RetryableError, match="other data blocks"):
        fetch(first)


# -- damaged answers of all kinds


def random_damage(rng, file):
    """One damage, and whether it needs a file that is sent with its length."""
    size = len(file.data)
    count = rng.randrange(size)
    choices = [
        damage.cut(count),
        damage.cut(count, "reset"),
        damage.cut(0),
        damage.stall(count, 0.4),
        damage.status(rng.choice([500, 502, 503, 504, 408, 429])),
        damage.raw(rng.choice([b"", b"garbage\r\n\r\n", b"HTTP/1.1 2", b"\0" * 999])),
        damage.chunked_cut(count),
    ]
    if file.ranges:
        wrong = "bytes %d-%d/%d" % (count, count + rng.randrange(size), size)
        choices += [
            damage.headers(Content_Range=wrong),
            damage.ignore_range(file.data),
        ]
    return rng.choice(choices)


def random_ticket(rng, server):
    """A ticket of mixed blocks, and the data it stands for."""
    blocks, parts = [], []
    for number in range(rng.randrange(1, 6)):
        data = pattern(rng.choice([1, 500, 70000, 200000]), rng.randrange(999))
        kind = rng.choice(["data", "ranged", "ranged", "plain", "unrangeable"])
        if kind == "data":
            blocks.append(data_uri(data[:500]))
            parts.append(data[:500])
            continue
        file = File(
            data,
            ranges=kind != "unrangeable",
            etag=rng.choice([None, '"e%d"' % number, 'W/"e"']),
            framing=rng.choice(["length", "length", "chunked"]),
        )
        file.damages = [
            random_damage(rng, file) for _ in range(rng.choice([0, 0, 1, 3]))
        ]
        url = server.at("/%d" % number, file)
        if kind == "ranged":
            first = rng.randrange(len(data))
            stop = rng.randrange(first, len(data)) + 1
            blocks.append((url, {"Range": "bytes=%d-%d" % (first, stop - 1)}))
            parts.append(data[first:stop])
        else:
            blocks.append(url)
            parts.append(data)
    return blocks, b"".join(parts)


def run_scenario(seed):
    """Fetch a random ticket from a server that damages its answers; whether it
    arrived, which it must have done unharmed."""
    rng = random.Random(seed)
    with Server() as server:
        server.start()
        server.delay = rng.choice([0, 0, 0.03])
        blocks, expected = random_ticket(rng, server)
        output = rng.choice([io.BytesIO, Unseekable])()
        try:
            htsget.get(
                server.ticket(blocks),
                output,
                max_retries=8,
                retry_wait=0,
                timeout=0.3,
                connections=rng.choice([1, 4]),
            )
        except htsget.HtsgetException:
            return False
        finally:
            server.shutdown()
    assert output.getvalue() == expected, seed
    return True


@pytest.mark.parametrize("restless", [False, True])
def test_damaged_answers_never_give_wrong_bytes(monkeypatch, restless):
    if restless:
        # Small pieces, and one connection and several in turn, all the time.
        for name, value in (
            ("_WINDOW_EACH", 20000),
            ("_CHUNK", 3000),
            ("_LOOK", 0.001),
            ("_IDLE", 1),
            ("_BUSY_LOOKS", 1),
        ):
            monkeypatch.setattr(htsget, name, value)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        arrived = list(
            pool.map(run_scenario, range(120 * restless, 120 + 120 * restless))
        )
    assert sum(arrived) >= 0.97 * len(arrived)


# -- several connections


@pytest.mark.parametrize("connections", [1, 4])
def test_the_next_block_is_asked_for_while_one_is_written(server, connections):
    data, written = pattern(8000), []

    class Output:
        def write(self, piece):
            written.append(piece)
            deadline = time.monotonic() + 2
            while len(server.asked("/file")) < min(len(written) + 1, 8):
                assert time.monotonic() < deadline
                time.sleep(0.0001)
            return len(piece)

    url = server.ticket(sliced(server, data, count=8))
    htsget.get(url, Output(), connections=connections, **QUICK)
    assert b"".join(written) == data
    assert (len(server.asked("/file")), server.connections) == (8, 1)


def test_an_answer_that_was_asked_for_ahead_belongs_to_no_other_request(server):
    urls = [server.at("/%d" % number, File(b"%d" % number)) for number in range(3)]
    server.delay = 0.03
    transport = htsget._Transport(5, None)

    def get(url):
        return b"".join(transport.request(url, {}).chunks())

    try:
        transport.ask_ahead(urls[1], {})
        assert server.requests == []  # There was no connection.
        assert get(urls[0]) == b"0"
        transport.ask_ahead(urls[1], {})
        transport.ask_ahead(urls[1], {})
        assert get(urls[1]) == b"1"
        assert (len(server.requests), server.connections) == (2, 1)
        transport.ask_ahead(urls[1], {})
        assert get(urls[2]) == b"2"
        assert get(urls[2]) == b"2"
        assert server.connections == 2
    finally:
        transport.abort()


def test_an_answer_that_was_asked_for_long_ago_is_not_relied_on(server, monkeypatch):
    monkeypatch.setattr(htsget, "_AHEAD_LASTS", 0)
    data = pattern(4000)
    assert fetch(server.ticket(sliced(server, data)), max_retries=0) == data
    assert server.connections == 4


def test_free_connections_are_taken_before_those_that_were_asked_ahead(server):
    urls = [server.at("/%d" % number, File(b"%d" % number)) for number in range(3)]
    transport = htsget._Transport(5, None)
    try:
        for answer in [transport.request(url, {}) for url in urls[:2]]:
            assert b"".join(answer.chunks()) in (b"0", b"1")
        transport.ask_ahead(urls[2], {})
        for url in (urls[0], urls[2], urls[1]):
            assert b"".join(transport.request(url, {}).chunks()) == url[-1:].encode()
        assert (len(server.requests), server.connections) == (5, 2)
    finally:
        transport.abort()


def test_what_a_helper_adds_at_last_is_delivered():
    class Slot(htsget._Slot):
        """One that is finished at the moment when it is looked at."""

        def __init__(self, part):
            super().__init__(part, own=False)

        @property
        def done(self):
            if not self.finished:
                self.finished = True
                self.chunks.append(self.part.chunk(0, b"abc"))
            return True

        @done.setter
        def done(self, value):
            self.finished = value

    ticket = htsget.Ticket(None, [htsget.DataBlock(data_uri(b"abc"))])
    with htsget._Session(ticket, htsget._Options()) as session:
        session.begin()
        slot = Slot(htsget._Part(session.blocks[0], True))
        delivered = list(htsget._Window(session, True)._fetched(slot))
    assert [chunk.data for chunk in delivered] == [b"abc"]


def test_a_chunk_that_is_lost_is_an_error(server, monkeypatch):
    fetched = htsget._Window._fetched

    def lossy(window, slot):
        chunks = list(fetched(window, slot))
        return chunks[: -1 if slot.part.block.index == 20 else None]

    monkeypatch.setattr(htsget._Window, "_fetched", lossy)
    server.delay = 0.03
    with pytest.raises(htsget.HtsgetException, match="out of order"):
        fetch(server.ticket(sliced(server, pattern(40000), count=40)))


def test_waiting_is_overlapped_up_to_the_limit(server):
    data = pattern(100 * 1000)
    server.delay = 0.05
    url = server.ticket(sliced(server, data, count=100))
    before = time.monotonic()
    assert fetch(url) == data
    assert time.monotonic() - before < 100 * 0.05 / 2
    assert server.most_active == 4
    assert server.connections <= 5


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_connections_is_the_most_at_once(server, limit):
    data = pattern(30 * 1000)
    server.delay = 0.03
    url = server.ticket(sliced(server, data, count=30))
    assert fetch(url, connections=limit) == data
    assert server.most_active == limit


def throttle(file, rate):
    """A route that sends a file's bytes at a rate, in bytes a second."""

    def route(handler):
        status, headers, body = file.answer(handler.headers)
        handler.head(status, dict(headers, **{"Content-Length": str(len(body))}))
        for start in range(0, len(body), 65536):
            handler.send(body[start : start + 65536])
            time.sleep(65536 / rate)

    return route


@pytest.mark.parametrize("output", [io.BytesIO, Unseekable])
def test_a_big_block_is_cut_where_waiting_pays(server, output):
    data = pattern(12 << 20)
    url = server.at("/b", throttle(File(data, etag='"x"'), 8 << 20))
    ticket = server.ticket([(url, {"Range": "bytes=5-%d" % (len(data) - 6)})])
    output = output()
    htsget.get(ticket, output, **QUICK)
    assert output.getvalue() == data[5:-5]
    # The server notices a little later that the first connection was given up.
    assert server.most_active in (4, 5)
    asked = server.asked("/b")
    assert asked[0].headers["Range"] == "bytes=5-%d" % (len(data) - 6)
    assert all(r.headers["If-Range"] == '"x"' for r in asked[1:])
    assert server.sent < 1.2 * len(data)


def test_one_connection_is_used_again_when_the_processor_is_busy(server, monkeypatch):
    data = pattern(50 * 1000)
    server.delay = 0.03
    url = server.ticket(sliced(server, data, count=50))

    def process_time():
        return 0 if len(server.requests) < 20 else 2 * time.monotonic()

    monkeypatch.setattr(htsget, "_BUSY_LOOKS", 2)
    monkeypatch.setattr(time, "process_time", process_time)
    assert fetch(url) == data
    assert server.most_active == 4
    assert len({request.connection for request in server.requests[10:20]}) == 4
    assert len({request.connection for request in server.requests[-10:]}) == 1


@pytest.mark.parametrize("rewindable", [False, True])
def test_parts_that_come_out_of_order_are_an_error(server, monkeypatch, rewindable):
    data = pattern(30000)
    output = io.BytesIO() if rewindable else Unseekable()
    claim = htsget._Window._claim

    def claim_twice(window, *args, **options):
        cursor = window._cursor
        slot = claim(window, *args, **options)
        if cursor == (2, 0) and not claimed:
            claimed.append(cursor)
            window._cursor = cursor
        return slot

    claimed = []
    monkeypatch.setattr(htsget._Window, "_claim", claim_twice)
    with pytest.raises(htsget.HtsgetException, match="out of order"):
        htsget.get(server.ticket(sliced(server, data, count=4)), output, **QUICK)
    assert data.startswith(output.getvalue())


@pytest.mark.parametrize("output", [io.BytesIO, Unseekable])
def test_a_piece_takes_nothing_for_its_slice_before_its_end(
    server, monkeypatch, output
):
    monkeypatch.setattr(htsget, "_WINDOW_EACH", 200000)
    data = pattern(600000)
    file = File(data)
    whole = File(data, ranges=False, framing="chunked")

    def route(handler):
        # The second server ignores the Range.
        first = len(server.asked("/b")) == 1
        throttle(file, 500000)(handler) if first else whole(handler)

    block = (server.at("/b", route), {"Range": "bytes=1000-599999"})
    output = output()
    try:
        htsget.get(server.ticket([block]), output, **QUICK)
    except htsget.HtsgetException:
        assert isinstance(output, Unseekable)
        return
    assert output.getvalue() == data[1000:]


def test_the_end_of_one_piece_is_not_that_of_another(server, monkeypatch):
    monkeypatch.setattr(htsget, "_WINDOW_EACH", 200000)
    data = pattern(500000)

    def route(handler):
        # Ranges in pieces, of a file whose length is never said.
        first, last = map(int, handler.headers["Range"][6:].split("-"))
        if first >= len(data):
            handler.reply(416)
            return
        last = min(last, len(data) - 1, first + 65535)
        content_range = "bytes %d-%d/*" % (first, last)
        handler.reply(206, data[first : last + 1], {"Content-Range": content_range})

    server.delay = 0.03
    block = (server.at("/b", route), {"Range": "bytes=0-9999999"})
    assert fetch(server.ticket([block]), connections=1) == data
    with contextlib.suppress(htsget.ContentLengthMismatch):
        assert fetch(server.ticket([block]), max_retries=1) == data


def test_many_small_chunks_fill_the_window_too(server, monkeypatch):
    monkeypatch.setattr(htsget, "_WINDOW_EACH", 20000)
    slots, slow = [], threading.Event()

    class Slot(htsget._Slot):
        def __init__(self, *args):
            super().__init__(*args)
            slots.append(self)

    def stalled(handler):
        slow.wait(10)
        handler.reply(200, b"first")

    def small(handler):
        handler.head(200, {"Transfer-Encoding": "chunked"})
        handler.send_chunked(b"x" * 5000, 10)
        handler.wfile.write(b"0\r\n\r\n")

    monkeypatch.setattr(htsget, "_Slot", Slot)
    blocks = [server.at("/1", stalled), server.at("/2", small)]
    with htsget.open(server.ticket(blocks), verify=False) as stream:
        reader = threading.Thread(target=stream.read, args=(1,))
        reader.start()
        time.sleep(0.4)
        held = [len(slot.chunks) for slot in slots if slot.chunks]
        slow.set()
        reader.join()
        assert held and max(held) <= 10000 // 250 + 1
        assert len(stream.read()) == 5004


def test_a_block_is_not_cut_when_what_follows_is_under_way(server, monkeypatch):
    data = pattern(6 << 20)
    url = server.at("/b", throttle(File(data), 8 << 20))
    blocks = [(url, {"Range": "bytes=0-%d" % (len(data) - 1)})]
    blocks += [server.at("/%d" % number, b"%d" % number) for number in range(9)]
    server.delay = 0.1
    begun = time.monotonic()

    def process_time():
        # Idle until the first answer comes, busy for a moment, then idle.
        return 2 * min(max(time.monotonic() - begun, 0.1), 0.3)

    monkeypatch.setattr(htsget, "_BUSY_LOOKS", 1)
    monkeypatch.setattr(time, "process_time", process_time)
    assert fetch(server.ticket(blocks)) == data + b"012345678"


@pytest.mark.parametrize("output", [io.BytesIO, Unseekable])
def test_a_piece_that_begins_anew_leaves_the_others_alone(server, output):
    data = pattern(8 << 20)
    file = File(data)
    stuck = []

    def route(handler):
        first, last = map(int, handler.headers["Range"][6:].split("-"))
        if not stuck and 0 < first and last < len(data) - 1:
            # It breaks off, and is then served as a part of the whole range only.
            stuck.append(first)
            damage.cut(100000)(handler, *file.answer(handler.headers))
        elif stuck and first == stuck[0] + 100000:
            handler.reply(403)
        else:
            throttle(file, 16 << 20)(handler)

    block = (server.at("/b", route), {"Range": "bytes=0-%d" % (len(data) - 1)})
    rewound = []

    class Output(output):
        def seek(self, position, *whence):
            rewound.append(position)
            return super().seek(position, *whence)

    output, seen = Output(), []

    def progress(so_far, total):
        seen.append(so_far)

    htsget.get(server.ticket([block]), output, progress=progress, **QUICK)
    assert output.getvalue() == data
    assert seen[-1] == len(data)
    assert rewound in ([], stuck)


@pytest.mark.parametrize("output", [io.BytesIO, Unseekable])
def test_a_cut_block_that_became_shorter_is_an_error(server, output):
    data = pattern(8 << 20)

    def route(handler):
        first = int(handler.headers["Range"][6:].split("-")[0])
        shorter = data[:-1000] if first > 0 else data
        throttle(File(shorter), 8 << 20)(handler)

    block = (server.at("/b", route), {"Range": "bytes=0-%d" % (len(data) - 1)})
    with pytest.raises(htsget.RetryableError, match="changed"):
        htsget.get(server.ticket([block]), output(), **dict(QUICK, max_retries=1))


@pytest.mark.parametrize("kind", ["signed", "unrangeable", "plain"])
def test_other_blocks_are_never_cut(server, kind):
    data = pattern(6 << 20)
    file = File(data, ranges=kind != "unrangeable")
    url = server.at("/b", throttle(file, 8 << 20))
    block = (url, {"Range": "bytes=0-%d" % (len(data) - 1)})
    if kind == "signed":
        block = (url + "?X-Amz-SignedHeaders=host%3brange", block[1])
    elif kind == "plain":
        block = url
    assert fetch(server.ticket([block, data_uri(b"tail")])) == data + b"tail"
    assert len(server.asked("/b")) == 1


def test_a_changed_object_is_never_mixed_by_several_connections(server):
    old, new = pattern(12 << 20, 1), pattern(12 << 20, 2)
    files = [File(old, etag='"1"'), File(new, etag='"2"')]

    def route(handler):
        number = len(server.asked("/b"))
        throttle(files[number > 3], 8 << 20)(handler)

    ticket = server.ticket(
        [(server.at("/b", route), {"Range": "bytes=0-%d" % (len(old) - 1)})]
    )
    assert fetch(ticket) == new
    del server.requests[:]
    output = Unseekable()
    with pytest.raises(htsget.RetryableError, match="changed"):
        htsget.get(ticket, output, **QUICK)
    assert old.startswith(output.data)


def test_an_error_in_one_part_ends_all_connections(server):
    data = pattern(1000)
    slow = threading.Event()

    def stall(handler):
        slow.wait(10)

    blocks = sliced(server, data, count=2)
    blocks += [server.at("/stall", stall), server.at("/gone", lambda h: h.reply(404))]
    ticket = htsget.Ticket(
        None, [htsget.DataBlock(*[b] if isinstance(b, str) else b) for b in blocks]
    )
    before = time.monotonic()
    with pytest.raises(htsget.ClientError):
        fetch(ticket)
    assert time.monotonic() - before < 1
    assert [t for t in threading.enumerate() if t.name == "htsget"] == []
    slow.set()


def test_no_thread_outlives_a_transfer(server):
    server.delay = 0.03
    data = pattern(20000)
    assert fetch(server.ticket(sliced(server, data, count=20))) == data
    assert [t for t in threading.enumerate() if t.name == "htsget"] == []


def test_retry_after_holds_for_all_connections(server):
    data = pattern(40000)
    server.delay = 0.03
    times = []
    file = File(data)

    def route(handler):
        times.append(time.monotonic())
        if len(times) == 10:
            handler.reply(503, b"", {"Retry-After": "1"})
        else:
            file(handler)

    blocks = sliced(server, data, count=40)
    server.at("/file", route)
    assert fetch(server.ticket(blocks)) == data
    gap = [t for t in times[10:] if 0.15 < t - times[9] < 0.99]
    assert gap == []


def test_a_server_that_handles_one_connection_at_a_time(monkeypatch):
    monkeypatch.setattr(htsget, "_STARVED", 0.2)

    class Sequential(Server):
        process_request = socketserver.TCPServer.process_request

    with Sequential() as server:
        server.start()
        server.delay = 0.02
        data = pattern(100000)
        url = server.ticket(sliced(server, data, count=30))
        before = time.monotonic()
        assert fetch(url, timeout=20) == data
        assert time.monotonic() - before < 10
        server.shutdown()


class Workers(Server):
    """A server with a thread for each of only so many connections."""

    workers = 2

    def process_request(self, request, client_address):
        self.slots = getattr(self, "slots", None) or threading.Semaphore(self.workers)
        self.slots.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()


def test_a_server_with_fewer_workers_than_connections(monkeypatch):
    monkeypatch.setattr(htsget, "_LET_GO", 0.7)
    with Workers() as server:
        server.start()
        data = [pattern(5 << 20, number) for number in range(6)]
        blocks = [
            server.at("/%d" % number, throttle(File(one), 20 << 20))
            for number, one in enumerate(data)
        ]
        server.delay = 0.05
        assert fetch(server.ticket(blocks), timeout=20, connections=8) == b"".join(data)
        server.shutdown()


def test_inline_data_is_delivered_once_while_a_server_is_slow(server, monkeypatch):
    monkeypatch.setattr(htsget, "_WINDOW_EACH", 10000)
    monkeypatch.setattr(htsget, "_LET_GO", 0.1)
    first, second, inline, last = (pattern(9000, number) for number in range(4))

    def slow(handler):
        time.sleep(0.6)
        handler.reply(200, second)

    server.delay = 0.1
    blocks = [server.at("/1", first), server.at("/2", slow), data_uri(inline)]
    url = server.ticket(blocks + [server.at("/4", last)])
    with htsget.open(url, verify=False) as stream:
        assert stream.read() == first + second + inline + last


def test_a_system_without_more_threads(server, monkeypatch):
    server.delay = 0.03
    data = pattern(20000)
    url = server.ticket(sliced(server, data, count=10))
    start = threading.Thread.start
    helpers = []

    def start_one(thread):
        if thread.name != "htsget":
            start(thread)
        elif helpers:
            raise RuntimeError("can't start new thread")
        else:
            helpers.append(thread)
            start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    assert fetch(url) == data
    assert fetch(url) == data


def test_many_small_blocks_of_several_kinds(server):
    server.delay = 0.005
    blocks, expected = [], []
    for number in range(100):
        data = pattern(number * 37 % 5000 + 1, number)
        if number % 3 == 0:
            blocks.append(data_uri(data))
        elif number % 3 == 1:
            damages = [damage.cut(0)] if number % 2 else []
            blocks.append(server.at("/%d" % number, File(data, damages=damages)))
        else:
            file = File(data, framing="chunked", ranges=False)
            blocks.append(
                (
                    server.at("/%d" % number, file),
                    {"Range": "bytes=0-%d" % (len(data) - 1)},
                )
            )
        expected.append(data)
    for connections in (1, 3, 16):
        output = Unseekable()
        htsget.get(server.ticket(blocks), output, connections=connections, **QUICK)
        assert output.data == b"".join(expected)


# -- secrets


def leaks(error, secrets):
    """The secrets that an exception, or what led to it, shows."""
    shown = []
    while error is not None:
        shown += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    return [secret for secret in secrets if secret in "\n".join(shown)]


@pytest.mark.parametrize("status", [301, 307])
def test_secrets_stay_at_the_origin_of_the_ticket(server, status):
    with Server() as other:
        other.start()
        other.ticket([data_uri(b"x")])

        def to(url):
            return lambda h: h.reply(status, b"", {"Location": url})

        server.at("/away", to(other.url + "/reads/x"))
        url = server.at("/near", to("/away"))
        headers = {"X-Api-Key": "k", "Cookie": "c"}
        assert fetch(url, headers=headers, bearer_token="t") == b"x"
        for request in server.requests:
            assert request.headers["Authorization"] == "Bearer t"
            assert request.headers["X-Api-Key"] == "k"
            assert request.headers["Cookie"] == "c"
        for name in ("Authorization", "X-Api-Key", "Cookie"):
            assert other.requests[0].headers[name] is None
        assert other.requests[0].headers["Accept"].startswith("application/vnd.ga4gh")
        other.shutdown()


def test_block_headers_follow_redirects_but_not_to_plain_http(
    server, tls_server, trusting
):
    server.at("/b", b"abc")
    tls_server.at("/near", b"abc")
    headers = {"Authorization": "Bearer of-the-block"}

    def to(url):
        return lambda h: h.reply(302, b"", {"Location": url})

    near = tls_server.at("/x", to("/near"))
    assert fetch(server.ticket([(near, headers)]), ssl_context=trusting) == b"abc"
    assert (
        tls_server.asked("/near")[0].headers["Authorization"] == "Bearer of-the-block"
    )
    away = tls_server.at("/y", to(server.url + "/b"))
    with pytest.raises(htsget.ProtocolError, match="plain http"):
        fetch(server.ticket([(away, headers)]), ssl_context=trusting)
    assert server.asked("/b") == []
    assert fetch(server.ticket([away]), ssl_context=trusting) == b"abc"


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "data:,x",
        "jar:x",
        "http://",
        "http://h%0d%0aX-Evil%3a%20yes/",
        "http://h:x/",
        "",
    ],
)
def test_redirects_lead_to_http_only(server, target):
    def route(handler):
        handler.reply(302, b"", {"Location": target})

    with pytest.raises(htsget.HtsgetException):
        fetch(server.at("/t", route), max_retries=0)
    with pytest.raises(htsget.HtsgetException):
        fetch(server.ticket([server.at("/b", route)]), max_retries=0)


def test_endless_redirects_end(server):
    url = server.at("/t", lambda h: h.reply(302, b"", {"Location": "/t"}))
    with pytest.raises(htsget.ProtocolError, match="too many redirects"):
        fetch(url)


def test_a_token_is_not_sent_over_plain_http(monkeypatch):
    url = "http://htsget.invalid/reads/x?key=query-secret"
    with pytest.raises(htsget.RequestError, match="plain http") as caught:
        fetch(url, bearer_token="hush")
    assert leaks(caught.value, ["hush", "query-secret"]) == []
    name = "HTS_ALLOW_UNENCRYPTED_AUTHORIZATION_HEADER"
    monkeypatch.setenv(name, "I understand the risks")
    with pytest.raises(htsget.RetryableError):
        fetch(url, bearer_token="hush", max_retries=0)


@pytest.mark.parametrize(
    "route",
    [
        lambda h: h.reply(404, b"no"),
        lambda h: h.reply(503, b"busy"),
        lambda h: h.reply(200, b"{", {"Content-Type": "text/html"}),
        lambda h: h.reply(
            302, b"", {"Location": "http://u:user-secret@h:x/?sig-secret"}
        ),
        lambda h: h.cut(),
        lambda h: h.wfile.write(b"garbage\r\n\r\n"),
    ],
)
def test_nothing_secret_is_shown(server, route, caplog, monkeypatch):
    caplog.set_level(0, "htsget")
    monkeypatch.setenv("no_proxy", "*")
    secrets = [
        "user-secret",
        "query-secret",
        "sig-secret",
        "token-secret",
        "header-secret",
    ]
    block = (server.at("/b", route) + "?sig-secret", {"X-A": "header-secret"})
    server.ticket([block])
    for path in ("/reads/x", "/b"):
        url = server.url.replace("//", "//u:user-secret@") + path + "?query-secret"
        with pytest.raises(htsget.HtsgetException) as caught:
            fetch(
                url,
                max_retries=1,
                bearer_token="token-secret",
                headers={"X-Key": "header-secret"},
            )
        assert leaks(caught.value, secrets) == []
    assert not any(secret in caplog.text for secret in secrets)


@pytest.mark.parametrize(
    "raw", [b'{"u": "hush-1\xff"}', b'{"u": "hush-1', b'["hush-1"]']
)
def test_a_broken_ticket_is_not_shown(server, raw):
    with pytest.raises(htsget.ProtocolError) as caught:
        fetch(server.at("/t", raw))
    assert leaks(caught.value, ["hush-1"]) == []


def test_netrc_is_used_when_there_is_no_token(server, monkeypatch, tmp_path, caplog):
    path = tmp_path / "netrc"
    path.write_text("machine 127.0.0.1 login me password pw\n")
    monkeypatch.setenv("NETRC", str(path))
    url = server.ticket([data_uri(b"x")])
    htsget.get_ticket(url)
    htsget.get_ticket(url, bearer_token="t")
    htsget.get_ticket(url, headers={"Authorization": "own"})
    sent = [request.headers["Authorization"] for request in server.requests]
    basic = "Basic " + base64.b64encode(b"me:pw").decode()
    assert sent == [basic, "Bearer t", "own"]
    path.write_text("nonsense here\n")
    htsget.get_ticket(url)
    assert "cannot use" in caplog.text


# -- proxies and TLS


class Proxy(Server):
    """A proxy for http and, with CONNECT, https; wants a login when `login` is set."""

    login = None

    def __init__(self):
        super().__init__(handler=ProxyHandler)


class ProxyHandler(Handler):
    def do_GET(self):
        request = Request(self.command, self.path, self.headers, b"", self.number)
        self.server.requests.append(request)
        login = self.server.login
        if login and self.headers["Proxy-Authorization"] != login:
            self.reply(407, b"who are you?")
        elif self.command == "CONNECT":
            host, port = self.path.split(":")
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            self.relay(socket.create_connection((host, int(port))))
        else:
            self.reply(200, b'{"htsget": {"urls": [{"url": "data:,via%20proxy"}]}}')

    do_CONNECT = do_GET

    def relay(self, upstream):
        def pump(source, target):
            try:
                for data in iter(lambda: source.recv(65536), b""):
                    target.sendall(data)
            except OSError:
                pass
            finally:
                target.close()

        thread = threading.Thread(target=pump, args=(upstream, self.connection))
        thread.daemon = True
        thread.start()
        pump(self.connection, upstream)
        self.close_connection = True


@pytest.fixture
def proxy():
    with Proxy() as started:
        started.start()
        yield started
        started.shutdown()


def test_http_goes_through_a_proxy(proxy, monkeypatch):
    proxy.login = "Basic " + base64.b64encode(b"me:pw").decode()
    monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:pw@"))
    assert fetch("http://localhost:1/reads/x") == b"via proxy"
    assert proxy.requests[0].path == "http://localhost:1/reads/x"


def test_https_goes_through_a_tunnel(proxy, tls_server, trusting, monkeypatch):
    proxy.login = "Basic " + base64.b64encode(b"me:pw").decode()
    monkeypatch.setenv("https_proxy", proxy.url.replace("//", "//me:pw@"))
    url = tls_server.ticket([tls_server.at("/b", b"abc")])
    assert fetch(url, ssl_context=trusting, bearer_token="t") == b"abc"
    assert [request.method for request in proxy.requests] == ["CONNECT"]
    assert proxy.requests[0].headers["Authorization"] is None
    for request in tls_server.requests:
        assert request.headers["Proxy-Authorization"] is None


def test_no_proxy_is_honoured(proxy, server, monkeypatch):
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert fetch(server.ticket([data_uri(b"x")])) == b"x"
    assert proxy.requests == []


def test_a_proxy_that_wants_a_login(proxy, tls_server, trusting, monkeypatch):
    proxy.login = "something"
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("https_proxy", proxy.url)
    for url in ("http://localhost:1/", tls_server.url + "/"):
        with pytest.raises(htsget.ClientError) as caught:
            fetch(url, ssl_context=trusting)
        assert caught.value.status == 407


def test_an_untrusted_certificate_is_not_retried(tls_server):
    with pytest.raises(htsget.ProtocolError, match="--cacert or SSL_CERT_FILE"):
        fetch(tls_server.ticket([data_uri(b"x")]))
    assert tls_server.connections == 1


@pytest.mark.parametrize(
    "how", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "--cacert"]
)
def test_certificates_of_a_private_authority(tls_server, tmp_path, how):
    path = tmp_path / "ca.pem"
    path.write_text(TLS_CERTIFICATE)
    url = tls_server.ticket([tls_server.at("/b", b"abc")])
    environ = dict(os.environ)
    args = [url, "-O", "-"]
    if how.startswith("-"):
        args += [how, str(path)]
    else:
        environ[how] = str(path)
    done = htsget_command(*args, env=environ)
    assert (done.returncode, done.stdout) == (0, b"abc"), done.stderr


def test_old_tls_is_refused():
    context = htsget._ssl_context(None)
    if hasattr(context, "minimum_version"):
        assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    else:
        assert context.options & ssl.OP_NO_TLSv1_1
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname


# -- broken servers


BROKEN_HEADS = [
    b"",
    b"garbage\r\n\r\n",
    b"HTTP/1.1 2",
    b"HTTP/1.1 200",
    b"HTTP/1.1 abc OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nno colon\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100000 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1000000 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Le",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 1000,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nabc\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n00",
    b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
]


@pytest.mark.parametrize("raw", BROKEN_HEADS, ids=lambda raw: repr(raw[17:60]))
def test_broken_answers_are_errors(server, raw):
    def route(handler):
        damage.raw(raw)(handler, 0, {}, b"")

    url = server.at("/b", route)
    for asked in (
        url,
        server.ticket([url]),
        server.ticket([(url, {"Range": "bytes=0-2"})]),
    ):
        with pytest.raises(htsget.HtsgetException) as caught:
            fetch(asked, max_retries=1, retry_wait=0, timeout=2)
        assert len(str(caught.value)) < 500


def mutated(rng, data, alphabet):
    """Data with a few random changes."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data[at:at] = rng.choice(alphabet)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 20)]
        elif kind == 2 and data:
            data[at % len(data)] = rng.randrange(256)
        else:
            data[at : at + rng.randrange(9)] = rng.choice(alphabet)
    return bytes(data)


def test_mutated_tickets_are_tickets_or_protocol_errors():
    rng = random.Random(1)
    blocks = [
        {"url": "data:;base64,YWJj", "class": "header"},
        {"url": "http://127.0.0.1/x?a=b", "headers": {"Range": "bytes=0-9", "A": "b"}},
    ]
    document = {"htsget": {"format": "BAM", "urls": blocks, "md5": "0" * 32}}
    ticket = json.dumps(document).encode()
    alphabet = [
        b"null",
        b"{}",
        b"[]",
        b'"',
        b"1e999",
        b"-1",
        b"NaN",
        b"\xff",
        b"\\ud800",
    ]
    alphabet += [
        b"\\u0000",
        b"data:",
        b"http://",
        b"[" * 50,
        b"}",
        b",",
        b"\xef\xbb\xbf",
    ]
    good = 0
    for _ in range(3000):
        try:
            parsed = htsget._parse_ticket(mutated(rng, ticket, alphabet))
            with htsget._Session(parsed, htsget._Options()) as session:
                session.begin()
            good += 1
        except htsget.ProtocolError as error:
            assert len(str(error)) < 500
    assert 0 < good < 3000


@pytest.mark.parametrize("kind", ["ticket", "block"])
def test_mutated_answers_are_results_or_errors(server, kind):
    rng = random.Random(2)
    body = (
        b'{"htsget": {"urls": [{"url": "data:,abc"}]}}' if kind == "ticket" else b"abc"
    )
    heads = [
        b'HTTP/1.1 200 OK\r\nContent-Length: %d\r\nETag: "a"\r\n\r\n' % len(body)
        + body,
        b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-2/9\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body)
        + body
        + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: /b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 503 Busy\r\nRetry-After: 0\r\nContent-Length: 2\r\n\r\nxx",
    ]
    alphabet = [
        b"\r\n",
        b"\r\n\r\n",
        b"-1",
        b"99999999999999999999",
        b":",
        b"\0",
        b"chunked",
    ]
    alphabet += [
        b"Content-Length: 1\r\n",
        b"Connection: close\r\n",
        b"HTTP/1.1 100 X\r\n\r\n",
    ]

    def route(handler):
        raw = mutated(rng, rng.choice(heads), alphabet)
        damage.raw(raw)(handler, 0, {}, b"")

    url = server.at("/b", route)
    block = htsget.DataBlock(url, {"Range": "bytes=0-2"})
    for number in range(1400):
        asked = url if kind == "ticket" else htsget.Ticket(None, [block])
        try:
            fetch(asked, max_retries=0, retry_wait=0, timeout=1, connections=1)
        except htsget.HtsgetException as error:
            assert len(str(error)) < 600, number


# -- streams


def test_open_gives_a_stream(server):
    data = make_bam(3000)
    url = server.ticket(sliced(server, data), format="BAM")
    with htsget.open(url) as stream:
        assert stream.readable()
        assert stream.read(100) == data[:100]
        buffer = bytearray(1000)
        assert stream.readinto(buffer) == 1000
        assert bytes(buffer) == data[100:1100]
        assert stream.read() == data[1100:]
        assert stream.read() == b""


def test_a_vcf_is_read_line_by_line_while_it_comes(server):
    # More than what gzip reads at once, however well it is compressed.
    digests = (hashlib.sha256(b"%d" % n).hexdigest() for n in range(20000))
    data = bgzf("\n".join(["##fileformat=VCFv4.3"] + list(digests)).encode())
    slow = Slow(File(data), len(data) // 2)
    url = server.ticket([server.at("/file", slow)], format="VCF")
    with gzip.open(htsget.open(url, timeout=5, max_retries=0), "rt") as text:
        assert next(text) == "##fileformat=VCFv4.3\n"
        slow.go_on.set()
        assert len(list(text)) == 20000


def test_a_stream_is_verified_at_its_end(server):
    data = make_bam(100)[:-28]
    url = server.ticket([server.at("/b", data)], format="BAM")
    with htsget.open(url) as stream:
        assert stream.read(len(data)) == data
        for _ in range(2):
            with pytest.raises(htsget.IntegrityError):
                stream.read(1)
    with htsget.open(url, verify=False) as stream:
        assert stream.read() == data


def test_an_error_in_a_stream_is_never_its_end(server):
    url = server.ticket(
        [server.at("/a", b"abc"), server.at("/b", lambda h: h.reply(404))]
    )
    with htsget.open(url, connections=1) as stream:
        for _ in range(3):
            with pytest.raises(htsget.ClientError):
                stream.read()


def test_a_stream_that_cannot_begin_leaves_nothing_behind(server, monkeypatch):
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append, raising=False)
    with pytest.raises(htsget.ClientError):
        htsget.open(server.url + "/nothing")
    gc.collect()
    assert ignored == []


def test_closing_a_stream_ends_the_transfer_at_once(server):
    server.delay = 0.03
    slow = Slow(File(pattern(100)), 0)
    blocks = sliced(server, pattern(40000), count=40) + [server.at("/slow", slow)]
    stream = htsget.open(server.ticket(blocks))
    stream.read(30000)
    before = time.monotonic()
    stream.close()
    slow.go_on.set()
    assert time.monotonic() - before < 1
    assert [t for t in threading.enumerate() if t.name == "htsget"] == []


# -- regions


@pytest.mark.parametrize(
    "text, region",
    [
        ("chr1", ("chr1", None, None)),
        ("*", ("*", None, None)),
        ("chr1:100", ("chr1", 99, None)),
        ("chr1:100-", ("chr1", 99, None)),
        ("chr1:-200", ("chr1", None, 200)),
        ("chr1:1,000-2,000", ("chr1", 999, 2000)),
        ("chr1:5-5", ("chr1", 4, 5)),
        ("{HLA:A*01:01}:1-5", ("HLA:A*01:01", 0, 5)),
        ("{HLA:A*01:01}", ("HLA:A*01:01", None, None)),
        ("HLA:A*01", ("HLA:A*01", None, None)),
        ("HLA:A*01:01:7-8", ("HLA:A*01:01", 6, 8)),
    ],
)
def test_regions_are_read_as_samtools_does(text, region):
    assert htsget.parse_region(text) == htsget.Region(*region)


@pytest.mark.parametrize("text", ["", "chr1:0-5", "chr1:5-4", "{a}:x", "{a}:1-2-3"])
def test_wrong_regions_are_refused(text):
    with pytest.raises(htsget.RequestError):
        htsget.parse_region(text)


def test_one_region_is_a_get_and_several_a_post(server, tmp_path):
    url = server.ticket([data_uri(b"x")])
    assert htsget_command(url, "--region", "chr1:1-10", "-O", "-").returncode == 0
    assert server.requests[0].method == "GET"
    assert server.requests[0].path.endswith("?referenceName=chr1&start=0&end=10")
    bed = tmp_path / "regions.bed"
    text = "# comment\ntrack name=x\nbrowser x\n\nchr2\t5\t9\tname\t0\nchr3 1 2\n"
    for content in (text.encode(), gzip.compress(text.encode())):
        bed.write_bytes(content)
        done = htsget_command(url, "--region", "chr1:1-10", "-L", str(bed), "-O", "-")
        assert done.returncode == 0, done.stderr
        assert json.loads(server.requests[-1].body.decode())["regions"] == [
            {"referenceName": "chr1", "start": 0, "end": 10},
            {"referenceName": "chr2", "start": 5, "end": 9},
            {"referenceName": "chr3", "start": 1, "end": 2},
        ]


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_that_takes_no_post(server, status):
    url = server.at("/t", lambda h: h.reply(status))
    with pytest.raises(htsget.ClientError, match="several regions"):
        fetch(url, regions=[("1",), ("2",)])


# -- service-info, dry run, ticket files, tokens


INFO = {"id": "x", "htsget": {"datatype": "reads", "formats": ["BAM", "CRAM"]}, "n": 1}


@pytest.mark.parametrize(
    "path",
    ["/reads", "/reads/", "/reads/NA12878", "/reads/service-info", "/reads/a/b?x=y"],
)
def test_service_info(server, path):
    server.at("/reads/service-info", json.dumps(INFO).encode())
    assert htsget.service_info(server.url + path) == INFO
    done = htsget_command("--service-info", server.url + path)
    assert json.loads(done.stdout.decode()) == INFO


def test_dry_run_downloads_nothing_and_shows_no_secrets(server):
    headers = {"Range": "bytes=0-99", "X": "hush"}
    url = server.ticket(
        [data_uri(b"12345"), (server.url + "/b?hush", headers)], format="BAM"
    )
    done = htsget_command("--dry-run", url)
    text = done.stdout.decode()
    assert done.returncode == 0
    for expected in ("BAM", "2 (1 inline)", "105 bytes", "127.0.0.1"):
        assert expected in text
    assert "hush" not in text
    assert len(server.requests) == 1


def test_a_ticket_from_a_file_or_standard_input(server, tmp_path):
    server.ticket([data_uri(b"abc")])
    path = tmp_path / "ticket.json"
    path.write_bytes(server.routes["/reads/x"])
    assert htsget_command(str(path), "-O", "-").stdout == b"abc"
    done = htsget_command("-", "-O", "-", input=path.read_bytes())
    assert done.stdout == b"abc"
    done = htsget_command(str(tmp_path / "missing"))
    assert done.returncode == 2 and b"no URL" in done.stderr


@pytest.mark.parametrize("text", ["secret\n", '{"access_token": "secret", "x": 1}'])
@pytest.mark.parametrize("how", ["option", "environment"])
def test_tokens_from_files(server, tmp_path, text, how):
    path = tmp_path / "token"
    path.write_text(text)
    url = server.ticket([data_uri(b"x")])
    environ, args = dict(os.environ), [url, "-O", "-"]
    if how == "option":
        args += ["--bearer-token-file", str(path)]
        environ["HTS_AUTH_LOCATION"] = "/nonexistent"
    else:
        environ["HTS_AUTH_LOCATION"] = str(path)
    assert htsget_command(*args, env=environ).stdout == b"x"
    assert server.requests[0].headers["Authorization"] == "Bearer secret"
    assert htsget_command("-b", "own", *args, env=environ).returncode == 0
    assert server.requests[1].headers["Authorization"] == "Bearer own"
    path.unlink()
    done = htsget_command(*args, env=environ)
    assert done.returncode == 2 and b"Traceback" not in done.stderr


# -- messages and the terminal


@pytest.mark.parametrize(
    "status, body, words",
    [
        (401, b"", "--bearer-token-file"),
        (404, b"", "check the id"),
        (
            400,
            b'{"htsget": {"error": "UnsupportedFormat", "message": "no"}}',
            "BAM, CRAM",
        ),
    ],
)
def test_errors_come_with_a_hint(server, status, body, words):
    server.at("/reads/service-info", json.dumps(INFO).encode())
    done = htsget_command(server.at("/reads/x", lambda h: h.reply(status, body)))
    assert done.returncode == 1
    assert words in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


def test_messages_by_verbosity(server, tmp_path):
    data = make_bam(1000)
    path = str(tmp_path / "out.bam")

    def run(*args):
        file = File(data, damages=[damage.status(503)])
        url = server.ticket([server.at("/b", file)], format="BAM")
        return htsget_command(url, "-O", path, "-W", "0.01", *args).stderr.decode()

    assert run("-q") == ""
    (line,) = run().splitlines()
    assert "503" in line and "trying again in 0.0 s" in line
    last = run("-v").splitlines()[-1]
    expected = r"htsget: out\.bam: [\d.]+ KiB, 1 blocks, [\d.]+ s, .*/s, BGZF complete$"
    assert re.match(expected, last)
    assert "GET http://127.0.0.1" in run("-vv")


def on_a_terminal(*args, columns=80):
    """Run the command line on a pseudo-terminal; its status and what was shown."""
    terminal, inside = os.openpty()
    process = subprocess.Popen(
        [sys.executable, os.path.join(HERE, "htsget.py")] + list(args),
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env=dict(os.environ, COLUMNS=str(columns)),
    )
    os.close(inside)
    shown = b""
    try:
        for data in iter(lambda: os.read(terminal, 65536), b""):
            shown += data
    except OSError:
        pass
    os.close(terminal)
    return process.wait(), shown.decode()


def test_progress_on_a_terminal(server, tmp_path):
    data = pattern(2 << 20)
    file = throttle(File(data, damages=[]), 3 << 20)
    url = server.ticket(
        [
            data_uri(b"x"),
            (server.at("/b", file), {"Range": "bytes=0-%d" % (len(data) - 1)}),
        ]
    )
    status, shown = on_a_terminal(url, "-O", str(tmp_path / "out.bin"), "-c", "1", "-v")
    assert status == 0
    lines = [line for line in shown.split("\r") if "iB of 2.0 MiB" in line]
    assert 2 <= len(lines) <= 6
    pattern_of_line = (
        r"out\.bin: [\d.]+ [MK]iB of 2\.0 MiB, \d+ %, [\d.]+ MiB/s, 0:0\d left,"
        r" block 2 of 2"
    )
    assert re.match(pattern_of_line, lines[-1])
    assert all(len(line.rstrip("\n")) < 80 for line in lines)
    last = shown.replace("\r\n", "\n").splitlines()[-1]
    assert last.split("\r")[-1].startswith("htsget: out.bin: 2.0 MiB, 2 blocks")
    status, shown = on_a_terminal(url, "-O", str(tmp_path / "out.bin"), "--no-progress")
    assert (status, shown) == (0, "")


@pytest.mark.parametrize("output", [[], ["-O", "-"]])
def test_progress_calls_standard_output_by_its_name(output):
    args = htsget._parser().parse_args(["u", "--progress"] + output)
    meter = htsget._meter(args)
    meter._past.append((0, 0))
    assert meter.line(1, 2, 3).startswith("standard output: ")


def test_no_progress_elsewhere_unless_forced(server, tmp_path):
    url = server.ticket([data_uri(b"x")])
    assert htsget_command(url, "-O", str(tmp_path / "o")).stderr == b""
    shown = io.StringIO()
    meter = htsget._Meter(shown, "a/b.bam", False)
    meter._next = 0
    meter.blocks = 3
    meter(1 << 20, 4 << 20)
    meter(2 << 20, 4 << 20)
    (line,) = shown.getvalue().splitlines()
    assert line.startswith("b.bam: 1.0 MiB of 4.0 MiB, 25 %")


def test_binary_data_is_not_sprayed_on_a_terminal(server):
    status, shown = on_a_terminal(server.ticket([data_uri(b"\x1b[2J")]))
    assert status == 2
    assert "-O -" in shown and "\x1b[2J" not in shown
    status, shown = on_a_terminal(server.ticket([data_uri(b"abc")]), "-O", "-")
    assert (status, shown) == (0, "abc")


def test_a_broken_pipe_ends_quietly(server):
    url = server.ticket(sliced(server, pattern(8 << 20)))
    command = "%s %s/htsget.py %s -O - | head -c 10 >/dev/null; echo ${PIPESTATUS[0]}"
    done = subprocess.run(
        ["bash", "-c", command % (sys.executable, HERE, url)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert (done.stdout, done.stderr) == (b"141\n", b"")


def test_the_progress_function_is_called(server):
    data = pattern(100000)
    calls = []
    url = server.ticket(sliced(server, data))
    fetch(url, progress=lambda so_far, total: calls.append((so_far, total)))
    assert calls[-1] == (100000, 100000)
    assert calls == sorted(calls)
    del calls[:]
    fetch(
        server.ticket([server.url + "/file"]), progress=lambda *call: calls.append(call)
    )
    assert calls[-1] == (100000, 100000)


def test_help_and_manual():
    text = htsget_command("--help").stdout.decode()
    for words in ("request:", "transfer:", "connection:", "output:", "examples:"):
        assert words in text
    done = subprocess.run(
        [sys.executable, "-m", "pydoc", "htsget"], cwd=HERE, stdout=subprocess.PIPE
    )
    assert b"Raises RequestError" in done.stdout


# -- the output


def test_an_output_that_begins_in_the_middle_of_a_file(server, tmp_path):
    data = pattern(200000)
    server.at("/b", File(data, ranges=False, damages=[damage.cut(150000)]))
    path = tmp_path / "out"
    path.write_bytes(b"0123456789" * 100000)
    with io.open(str(path), "r+b") as output:
        output.seek(10)
        htsget.get(server.ticket([server.url + "/b"]), output, **QUICK)
        assert output.tell() == 10 + len(data)
    assert path.read_bytes()[: 10 + len(data)] == b"0123456789" + data


def test_a_shorter_second_attempt_leaves_no_tail_of_the_first(server):
    data = pattern(50000)
    longer = File(data + bytes(100000), ranges=False, damages=[damage.cut(140000)])
    shorter = File(data, ranges=False)

    def route(handler):
        (longer if longer.damages else shorter)(handler)

    assert fetch(server.ticket([server.at("/b", route)])) == data


def test_short_writes_of_a_raw_output_are_completed(server):
    class Short(io.RawIOBase):
        data = b""

        def writable(self):
            return True

        def write(self, data):
            self.data += bytes(data[:7])
            return min(len(data), 7)

    output = Short()
    htsget.get(server.ticket([data_uri(pattern(1000))]), output, **QUICK)
    assert output.data == pattern(1000)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left"), BrokenPipeError(), TimeoutError()]
)
def test_errors_of_the_output_are_raised_at_once(server, error):
    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            raise error

    url = server.at("/b", b"abc")
    with pytest.raises(type(error)) as caught:
        htsget.get(server.ticket([url]), Full(), **QUICK)
    assert caught.value is error
    assert len(server.asked("/b")) == 1


def test_a_path_is_written(server, tmp_path):
    path = tmp_path / "out.bam"
    url = server.ticket([data_uri(b"abc")])
    htsget.get(url, path, verify=False)
    assert path.read_bytes() == b"abc"
    htsget.get(url, str(path), verify=False)
    assert os.listdir(str(tmp_path)) == ["out.bam"]


def test_callers_of_0_2_6_change_nothing(server, tmp_path):
    from htsget import (  # noqa: F401
        ClientError,
        ContentLengthMismatch,
        HtsgetException,
        ProtocolError,
        RetryableError,
        RetryableIOError,
        get,
    )

    data = make_bam(100)
    url = server.ticket(sliced(server, data), format="BAM")
    path = str(tmp_path / "slice.bam")
    htsget.get(
        url,
        open(path, "wb"),
        reference_name="chr1",
        reference_md5=None,
        start=0,
        end=1000,
        data_format="BAM",
        max_retries=sys.maxsize,
        retry_wait=5,
        bearer_token="token",
    )
    with open(path, "rb") as file:
        assert file.read() == data


# -- a path as output


def test_the_file_appears_only_when_it_is_complete(server, tmp_path):
    path = tmp_path / "out"
    seen = []

    def look(handler):
        seen.append((sorted(os.listdir(str(tmp_path))), path.read_bytes()))
        handler.reply(200, b"tail")

    path.write_bytes(b"old")
    url = server.ticket([server.at("/a", pattern(5000)), server.at("/b", look)])
    htsget.get(url, path, connections=1)
    assert seen == [(["out", "out.part", "out.part.json"], b"old")] or seen == [
        (["out", "out.part"], b"old")
    ]
    assert path.read_bytes() == pattern(5000) + b"tail"
    assert os.listdir(str(tmp_path)) == ["out"]


def test_permissions_follow_the_umask(server, tmp_path):
    before = os.umask(0o027)
    try:
        htsget.get(server.ticket([data_uri(b"x")]), tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


def test_a_symlink_is_followed(server, tmp_path):
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link"
    link.symlink_to(os.path.join("folder", "target"))
    htsget.get(server.ticket([data_uri(b"x")]), link)
    assert link.is_symlink()
    assert (tmp_path / "folder" / "target").read_bytes() == b"x"
    assert os.listdir(str(tmp_path / "folder")) == ["target"]


def test_a_fifo_is_written_directly(server, tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    data = pattern(300000)
    url = server.ticket(sliced(server, data, damages=[damage.cut(1000)]))
    received = []

    def read():
        with open(fifo, "rb") as pipe:
            received.append(pipe.read())

    reader = threading.Thread(target=read)
    reader.start()
    htsget.get(url, fifo, **QUICK)
    reader.join()
    assert received == [data]
    assert os.listdir(str(tmp_path)) == ["fifo"]


def test_a_device_is_never_replaced(server):
    data = pattern(300000)
    file = File(data, ranges=False, damages=[damage.cut(200000)])
    htsget.get(server.ticket([server.at("/b", file)]), os.devnull, **QUICK)
    assert not os.path.isfile(os.devnull)
    assert not os.path.exists(os.devnull + ".part")


@pytest.mark.parametrize("path", ["missing/out", ".", "file/out"])
def test_an_impossible_path_is_found_out_before_anything_is_fetched(
    server, tmp_path, path
):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError):
        htsget.get(server.ticket([data_uri(b"x")]), tmp_path / path)
    assert server.requests == []


def test_two_processes_never_write_the_same_file(server, tmp_path):
    path = str(tmp_path / "out")
    arrived, go_on = threading.Event(), threading.Event()

    def wait(handler):
        arrived.set()
        go_on.wait(10)
        handler.reply(200, b"first")

    url = server.ticket([server.at("/b", wait)])
    first = threading.Thread(target=htsget.get, args=(url, path))
    first.start()
    arrived.wait(10)
    second = htsget_command(url, "-O", path)
    go_on.set()
    first.join()
    assert second.returncode == 1
    assert b"another process is writing" in second.stderr
    with open(path, "rb") as file:
        assert file.read() == b"first"
    assert os.listdir(str(tmp_path)) == ["out"]


# -- the death of the process


class Slow:
    """A file that sends its second part only after `go_on` is set."""

    def __init__(self, file, pause):
        self.file = file
        self.pause = pause
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self.sent = 0

    def __call__(self, handler):
        status, headers, body = self.file.answer(handler.headers)
        wanted = re.match(r"bytes=(\d+)", handler.headers.get("Range", ""))
        first = int(wanted.group(1)) if wanted and status == 206 else 0
        handler.head(status, dict(headers, **{"Content-Length": str(len(body))}))
        for start in range(0, len(body), 65536):
            if first + start >= self.pause:
                self.reached.set()
                if not self.go_on.wait(20):
                    return
            piece = body[start : start + 65536]
            handler.send(piece)
            self.sent += len(piece)


def interrupted(tmp_path, url, slow, end, before=0):
    """Start the command line, `end` it when the server pauses, and return it.

    `before`: bytes of other blocks that come first.
    """
    command = [sys.executable, os.path.join(HERE, "htsget.py"), url]
    command += ["-O", str(tmp_path / "out"), "-W", "0.01"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert slow.reached.wait(10)
    part = str(tmp_path / "out.part")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not (
        os.path.exists(part)
        and os.path.getsize(part) >= before + slow.pause - (1 << 20)
    ):
        time.sleep(0.01)
    before = time.monotonic()
    process.send_signal(end)
    process.errors = process.communicate()[1].decode()
    process.took = time.monotonic() - before
    slow.go_on.set()
    slow.sent = 0
    return process


@pytest.mark.parametrize(
    "end, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
@pytest.mark.parametrize("pause", [0, 3 << 20, 9 << 20])
def test_the_same_command_goes_on_after_a_death(server, tmp_path, end, status, pause):
    data = pattern(12 << 20)
    slow = Slow(File(data, etag='"x"'), pause)
    slow_url = server.at("/file", slow)
    half = len(data) // 2
    blocks = [
        (slow_url, {"Range": "bytes=0-%d" % (half - 1)}),
        (slow_url, {"Range": "bytes=%d-%d" % (half, len(data) - 1)}),
    ]
    url = server.ticket([data_uri(b"head")] + blocks)
    process = interrupted(tmp_path, url, slow, end)
    assert process.returncode == status
    assert process.took < 1
    if status > 0:
        assert len(process.errors.splitlines()) == 1, process.errors
    else:
        assert process.errors == ""
    assert not (tmp_path / "out").exists()
    done = htsget_command(url, "-O", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes() == b"head" + data
    assert os.listdir(str(tmp_path)) == ["out"]
    assert slow.sent <= len(data) - pause + (4 << 20)


def test_an_unrangeable_block_costs_itself_only(server, tmp_path):
    data = pattern(4 << 20)
    slow = Slow(File(data, ranges=False), 3 << 20)
    url = server.ticket([server.at("/a", data), server.at("/file", slow)])
    interrupted(tmp_path, url, slow, signal.SIGKILL, len(data))
    assert htsget_command(url, "-O", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out").read_bytes() == data * 2
    assert len(server.asked("/a")) == 1


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_never_answers_does_not_delay_an_interrupt(tmp_path, end):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        url = "http://127.0.0.1:%d/" % listener.getsockname()[1]
        command = [sys.executable, os.path.join(HERE, "htsget.py"), url]
        process = subprocess.Popen(
            command + ["-O", str(tmp_path / "out")], stderr=subprocess.PIPE
        )
        accepted = listener.accept()[0]
        time.sleep(0.1)
        before = time.monotonic()
        process.send_signal(end)
        errors = process.communicate()[1]
        accepted.close()
    assert time.monotonic() - before < 1
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[end]
    assert len(errors.splitlines()) == 1
    assert os.listdir(str(tmp_path)) == []


def leave_part(server, tmp_path, **options):
    """Fetch half of a file, so that a part file and its journal are left."""
    data = pattern(6 << 20)
    file = File(data, etag='"1"', damages=[damage.cut(3 << 20)])
    url = server.ticket(
        [(server.at("/file", file), {"Range": "bytes=0-%d" % (len(data) - 1)})]
    )
    with pytest.raises(htsget.RetryableError):
        htsget.get(url, tmp_path / "out", max_retries=0, **options)
    assert sorted(os.listdir(str(tmp_path))) == ["out.part", "out.part.json"]
    del server.requests[:]
    return url, data, file


def test_the_end_of_retries_keeps_what_was_fetched(server, tmp_path):
    url, data, _ = leave_part(server, tmp_path)
    htsget.get(url, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
    wanted = "bytes=%d-%d" % (3 << 20, len(data) - 1)
    assert [r.headers["Range"] for r in server.asked("/file")] == [wanted]


def test_a_full_disk_keeps_what_was_fetched(server, tmp_path):
    data = pattern(6 << 20)
    url = server.ticket(sliced(server, data))
    limited = (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1]);"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20));"
        "import htsget; sys.exit(htsget.main(sys.argv[2:]))"
    )
    path = str(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", limited, HERE, url, "-O", path], stderr=subprocess.PIPE
    )
    assert done.returncode == 1
    assert b"File too large" in done.stderr and b"Traceback" not in done.stderr
    before = len(server.asked("/file"))
    htsget.get(url, path)
    with open(path, "rb") as file:
        assert file.read() == data
    first = server.asked("/file")[before].headers["Range"]
    assert int(re.match(r"bytes=(\d+)", first).group(1)) >= (4 << 20) - (1 << 17)


def test_a_death_while_a_block_begins_anew_ahead(server, tmp_path):
    old, new = pattern(2000000, 1), pattern(2000000, 2)
    first, changed = pattern(300000), threading.Event()

    def slow(handler):
        handler.head(200, {"Content-Length": str(len(first))})
        handler.send(first[:100000])
        changed.wait(10)
        time.sleep(0.2)
        handler.send(first[100000:])

    def second(handler):
        if len(server.asked("/2")) == 1:
            damage.cut(1500000)(handler, 200, {"ETag": '"1"'}, old)
        else:
            File(new, etag='"2"')(handler)
            changed.set()

    class Death(Exception):
        pass

    def progress(so_far, total):
        if so_far > 1400000:
            raise Death

    url = server.ticket([server.at("/1", slow), server.at("/2", second)])
    with pytest.raises(Death):
        htsget.get(url, tmp_path / "out", progress=progress, **QUICK)
    htsget.get(url, tmp_path / "out", **QUICK)
    assert (tmp_path / "out").read_bytes() == first + new


def test_an_earlier_run_without_data_is_not_gone_on_with(server, tmp_path, caplog):
    data = pattern(3 << 20)
    file = File(data, damages=[damage.cut(1000)])
    url = server.ticket([server.at("/file", file)])
    part = tmp_path / "out.part"
    with pytest.raises(htsget.RetryableError):
        htsget.get(url, tmp_path / "out", max_retries=0, verify=False)
    journal = tmp_path / "out.part.json"
    entry = json.loads(journal.read_text())
    del entry["check"]
    entry["position"] = 0
    journal.write_text(json.dumps(dict(entry, check=htsget._digest(entry))))
    assert part.stat().st_size == 1000
    with caplog.at_level("INFO", "htsget"):
        htsget.get(url, tmp_path / "out", verify=False)
    assert "going on" not in caplog.text
    assert (tmp_path / "out").read_bytes() == data


def test_no_resume_starts_over(server, tmp_path, caplog):
    url, data, _ = leave_part(server, tmp_path)
    with caplog.at_level("INFO", "htsget"):
        htsget.get(url, tmp_path / "out", resume=False)
    assert "going on" not in caplog.text
    assert (tmp_path / "out").read_bytes() == data
    assert server.asked("/file")[0].headers["Range"].startswith("bytes=0-")


@pytest.mark.parametrize(
    "change", ["request", "etag", "blocks", "md5", "journal", "part", "short"]
)
def test_anything_doubtful_starts_over(server, tmp_path, change, caplog):
    url, data, file = leave_part(server, tmp_path)
    path = tmp_path / "out"
    part, journal = tmp_path / "out.part", tmp_path / "out.part.json"
    expected = data
    if change == "request":
        url += "?other=1"
    elif change == "etag":
        file.data = expected = pattern(6 << 20, 1)
        file.etag = '"2"'
    elif change == "blocks":
        wanted = {"Range": "bytes=0-%d" % (len(data) - 2)}
        url = server.ticket([(server.url + "/file", wanted)])
        expected = data[:-1]
    elif change == "md5":
        wanted = {"Range": "bytes=0-%d" % (len(data) - 1)}
        md5 = hashlib.md5(data).hexdigest()
        url = server.ticket([(server.url + "/file", wanted)], md5=md5)
    elif change == "journal":
        journal.write_bytes(b"{")
    elif change == "part":
        journal.unlink()
    elif change == "short":
        part.write_bytes(data[:1000])
    htsget.get(url, path, retry_wait=0)
    assert path.read_bytes() == expected
    assert server.asked("/file")[-1].headers["Range"].startswith("bytes=0-")
    assert os.listdir(str(tmp_path)) == ["out"]
    assert "cannot go on" in caplog.text or "changed" in caplog.text


def test_kept_bytes_are_verified_again(server, tmp_path, caplog):
    data = make_bam(20000)
    file = File(data, damages=[damage.cut(500000)])
    url = server.ticket([server.at("/b", file)], format="BAM")
    path = tmp_path / "out"
    with pytest.raises(htsget.RetryableError):
        htsget.get(url, path, max_retries=0)
    kept = (tmp_path / "out.part").read_bytes()
    (tmp_path / "out.part").write_bytes(kept[:1000] + bytes(30000) + kept[31000:])
    htsget.get(url, path)
    assert path.read_bytes() == data
    assert "what was kept is wrong" in caplog.text


def test_the_journal_holds_no_secret(server, tmp_path):
    data = pattern(6 << 20)
    file = File(data, damages=[damage.cut(3 << 20)])
    block = (server.at("/b", file) + "?sig=hush1", {"X-Auth": "hush2"})
    url = server.ticket([block]) + "?key=hush3"
    with pytest.raises(htsget.RetryableError):
        htsget.get(
            url,
            tmp_path / "out",
            max_retries=0,
            bearer_token="hush4",
            headers={"X-Key": "hush5"},
        )
    assert b"hush" not in (tmp_path / "out.part.json").read_bytes()


# -- the verifier


def verify(data, data_format=None, md5=None, header_only=False, step=None):
    """Run data through the verifier, in pieces of `step` bytes."""
    verifier = htsget._Verifier(htsget.Ticket(data_format, [], md5), header_only, True)
    for start in range(0, len(data), step or len(data) or 1):
        verifier.feed(data[start : start + (step or len(data))])
    verifier.finish()


CRAM_2 = bytes.fromhex(
    "0b000000ffffffff0fe0454f46000000000100000100060601000100 0100".replace(" ", "")
)
CRAM_3 = bytes.fromhex(
    "0f000000ffffffff0fe0454f4600000000010005bdd94f0001000606010001000100ee63014b"
)


@pytest.mark.parametrize("step", [None, 1, 7, 1000])
@pytest.mark.parametrize(
    "data_format, data",
    [
        ("BAM", make_bam(50)),
        ("BCF", bgzf(b"BCF\2\2x")),
        ("VCF", bgzf(b"##fileformat=VCFv4.3\n")),
        ("VCF", b"##fileformat=VCFv4.3\n"),
        ("VCF", b"\x1f\x8b\x08\x00plain gzip"),
        ("BAM", b"BAM\1 uncompressed"),
        ("BAM", bgzf(b"BAM\1") + bgzf(b"BAM\1")),
        ("CRAM", b"CRAM\3\0" + bytes(100) + CRAM_3),
        ("CRAM", b"CRAM\3\1" + bytes(100) + CRAM_3),
        ("CRAM", b"CRAM\2\1" + bytes(100) + CRAM_2),
        ("CRAM", b"CRAM\2\0" + bytes(100)),
        (None, b"anything"),
        (None, b""),
        ("OTHER", b"anything"),
    ],
)
def test_right_data_passes(data_format, data, step):
    verify(data, data_format, hashlib.md5(data).hexdigest().upper(), step=step)
    verify(data, data_format, step=step)


BAM = make_bam(200)


@pytest.mark.parametrize("step", [None, 1, 7, 1000])
@pytest.mark.parametrize(
    "data_format, data, words",
    [
        ("BAM", b"", "byte 0: BAM"),
        ("BAM", b"<html>", "byte 0: BAM"),
        ("BAM", b"\x1f\x8b\x08\0" + bytes(50), "byte 0: BAM"),
        ("CRAM", BAM, "byte 0: CRAM"),
        ("VCF", b"{}", "byte 0: VCF"),
        ("BAM", BAM[:-28], "BGZF EOF marker"),
        ("BAM", BAM[:-29], "inside a BGZF block"),
        ("BAM", BAM[:-10], "inside a BGZF block"),
        ("BAM", BAM[:1000], "byte 1000: the data ends inside"),
        (None, BAM[:1000], "byte 1000: the data ends inside"),
        ("BAM", BAM[:1000] + BAM[1001:], "next BGZF block was expected"),
        ("BAM", BAM[:1000] + b"x" + BAM[1000:], "next BGZF block was expected"),
        ("BAM", BAM + b"x" * 20, "byte %d: the next BGZF" % len(BAM)),
        ("CRAM", b"CRAM\3\0" + bytes(100), "CRAM EOF container"),
        ("CRAM", b"CRAM\3\0" + bytes(100) + CRAM_3[:-1], "CRAM EOF container"),
        ("CRAM", b"CRAM\2\1" + bytes(100) + CRAM_3, "CRAM EOF container"),
    ],
)
def test_wrong_data_is_found(data_format, data, words, step):
    with pytest.raises(htsget.IntegrityError) as caught:
        verify(data, data_format, step=step)
    assert words in str(caught.value)


def test_headers_need_no_eof_marker():
    verify(BAM[:-28], "BAM", header_only=True)
    verify(b"CRAM\3\0" + bytes(100), "CRAM", header_only=True)
    block = htsget.DataBlock("data:,", {}, "header")
    verifier = htsget._Verifier(htsget.Ticket("BAM", [block]), False, True)
    verifier.feed(BAM[:-28])
    verifier.finish()


def test_a_bgzf_header_with_further_subfields():
    first = bgzf(b"##x", 16)[:-28]
    extra = b"XY\2\0ab"
    (size,) = struct.unpack_from("<H", first, 16)
    longer = (
        first[:10]
        + struct.pack("<H", 12)
        + extra
        + first[12:16]
        + struct.pack("<H", size + 6)
        + first[18:]
    )
    for step in (None, 1, 13):
        verify(first + longer + BGZF_EOF, "VCF", step=step)


@pytest.mark.skipif(sys.version_info < (3, 7), reason="needs monkeypatched hashlib")
def test_without_md5_a_warning_is_given(monkeypatch, caplog):
    def forbidden(*args, **options):
        raise ValueError("disabled for FIPS")

    monkeypatch.setattr(htsget.hashlib, "md5", forbidden)
    verify(b"data", None, "0" * 32)
    assert "MD5 is not available" in caplog.text


def test_a_wrong_md5_is_an_integrity_error_that_keeps_the_data(server, tmp_path):
    url = server.ticket([data_uri(b"data")], md5="0" * 32)
    done = htsget_command(url, "-O", str(tmp_path / "out"))
    assert done.returncode == 1
    text = done.stderr.decode()
    assert hashlib.md5(b"data").hexdigest() in text and "0" * 32 in text
    assert str(tmp_path / "out.part") in text
    assert (tmp_path / "out.part").read_bytes() == b"data"
    assert not (tmp_path / "out").exists()


def test_data_without_an_eof_marker_is_kept_for_no_verify(server, tmp_path):
    data = make_bam(5000)[:-28]
    blocks = sliced(server, data)
    url = server.ticket(blocks, format="BAM")
    path = str(tmp_path / "out")
    for _ in range(2):
        done = htsget_command(url, "-O", path)
        assert done.returncode == 1
        assert b"byte %d: the BGZF EOF marker" % (len(data) - 28) in done.stderr
        assert b"--no-verify" in done.stderr
    asked = len(server.asked("/file"))
    done = htsget_command(url, "-O", path, "--no-verify")
    assert done.returncode == 0
    with open(path, "rb") as file:
        assert file.read() == data
    assert len(server.asked("/file")) == asked


# -- the command line


def test_the_command_line_fetches_a_file(server, tmp_path):
    data = make_bam(200)
    url = server.ticket(sliced(server, data), format="BAM")
    path = tmp_path / "out.bam"
    done = htsget_command(
        url, "-O", str(path), "-f", "bam", "-r", "chr1", "-s", "5", "-e", "10",
        "--fields", "QNAME,SEQ", "--tags", "", "--notags", "OQ", "-m", "0" * 32,
        "-M", "2", "-W", "0.1", "-T", "5", "-b", "token",
        "-H", '{"X-A": "1"}', "-c", "1",
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert path.read_bytes() == data
    request = server.requests[0]
    assert urllib.parse.parse_qs(request.path.partition("?")[2], True) == {
        "format": ["BAM"],
        "referenceName": ["chr1"],
        "referenceMD5": ["0" * 32],
        "start": ["5"],
        "end": ["10"],
        "fields": ["QNAME,SEQ"],
        "tags": [""],
        "notags": ["OQ"],
    }
    assert request.headers["Authorization"] == "Bearer token"
    assert request.headers["X-A"] == "1"
    assert server.connections == 1


def test_long_options_are_those_of_0_2_6(server, tmp_path):
    url = server.ticket([data_uri(b"x")])
    done = htsget_command(
        url, "--output", str(tmp_path / "o"), "--format", "VCF",
        "--reference-name", "1",
        "--start", "0", "--end", "1", "--max-retries", "0", "--retry-wait", "1",
        "--timeout", "9", "--bearer-token", "t", "--headers", "X-A: b", "--headers",
        "X-C:d", "--class", "header", "--verbose", "--reference-md5", "0" * 32,
        "--no-verify",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert server.requests[0].headers["X-A"] == "b"
    assert server.requests[0].headers["X-C"] == "d"
    assert "class=header" in server.requests[0].path


@pytest.mark.parametrize("output", [[], ["-O", "-"], ["-O", "/dev/stdout"]])
def test_standard_output_gets_the_data_and_nothing_else(server, output):
    data = pattern(300000)
    url = server.ticket(sliced(server, data))
    done = htsget_command(url, "-vv", *output)
    assert done.returncode == 0
    assert done.stdout == data


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_messages_are_never_mixed_into_the_data(server):
    program = [sys.executable, os.path.join(HERE, "htsget.py")]
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" "$@" 2>&-'] + program + [server.url + "/nothing"],
        stdout=subprocess.PIPE,
    )
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.parametrize(
    "status, route",
    [
        (1, lambda h: h.reply(404)),
        (1, lambda h: h.reply(200, b"no ticket")),
        (75, lambda h: h.reply(503)),
        (75, lambda h: h.cut()),
    ],
)
def test_an_existing_file_survives_a_failure(server, tmp_path, status, route):
    path = tmp_path / "out"
    path.write_bytes(b"precious")
    done = htsget_command(server.at("/t", route), "-O", str(path), "-M", "1", "-W", "0")
    assert done.returncode == status
    assert path.read_bytes() == b"precious"
    assert os.listdir(str(tmp_path)) == ["out"]
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("htsget: error: ")
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["-s", "5"],
        ["-H", "{"],
        ["-H", "nonsense"],
        ["-H", "[1]"],
        ["-c", "0"],
        ["--wrong"],
    ],
)
def test_usage_errors(server, args):
    done = htsget_command(server.ticket([]), *args)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert server.connections == 0


def test_version_and_help():
    assert htsget_command("--version").stdout.decode().split() == [
        "htsget",
        htsget.__version__,
    ]
    assert b"--reference-name" in htsget_command("--help").stdout
    done = subprocess.run(
        [sys.executable, "-m", "htsget", "-V"], cwd=HERE, stdout=subprocess.PIPE
    )
    assert htsget.__version__.encode() in done.stdout


def test_only_the_standard_library_is_imported():
    code = (
        "import sys; before = set(sys.modules); import htsget;"
        "print([m for m in set(sys.modules) - before"
        " if 'site-packages' in (getattr(sys.modules[m], '__file__', '') or '')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE
    )
    assert done.stdout.strip() == b"[]"


# -- the README


def readme_blocks():
    """The literal blocks of the README."""
    with io.open(os.path.join(HERE, "README.rst"), encoding="utf-8") as file:
        text = file.read()
    found = re.findall(r"::\n\n((?:    .*\n|\n)+)", text)
    return [re.sub("(?m)^    ", "", block).strip("\n") for block in found]


def is_python(block):
    return block.startswith("import ")


def is_shell(block):
    return re.match(r"htsget |#!/bin/bash", block) is not None


@pytest.fixture
def public_server(server):
    """A stand-in for the public server of the README."""
    data = make_bam(200)
    server.ticket(sliced(server, data), path="/reads/giab.NA12878", format="BAM")
    vcf = bgzf(b"##fileformat=VCFv4.3\n#CHROM\nchr1\t1\t.\tA\tC\n")
    server.ticket([data_uri(vcf)], path="/variants/1000g", format="VCF")
    server.at("/reads/service-info", json.dumps(INFO).encode())
    return server


def missing_tools(block):
    modules = re.findall(r"^(?:import|from) (pysam|dask)", block, re.M)
    programs = [name for name in ("samtools", "bash") if name + " " in block + " bash "]
    gone = [name for name in modules if importlib.util.find_spec(name) is None]
    return gone + [name for name in programs if shutil.which(name) is None]


@pytest.mark.parametrize(
    "block", [b for b in readme_blocks() if is_python(b) or is_shell(b)]
)
def test_what_the_readme_shows_works(public_server, tmp_path, block):
    if missing_tools(block):
        pytest.skip("needs " + ", ".join(missing_tools(block)))
    block = block.replace("https://htsget.ga4gh.org", public_server.url)
    environ = dict(os.environ, PYTHONPATH=HERE, SLURM_ARRAY_TASK_ID="1")
    if is_python(block):
        command = [sys.executable, "-c", block]
    else:
        program = 'htsget() { %s %s/htsget.py "$@"; }; set -o pipefail\n'
        command = ["bash", "-c", program % (sys.executable, HERE) + block]
        (tmp_path / "regions.txt").write_text("chr1:1-10\nchr2:1-10\n")
    done = subprocess.run(
        command,
        cwd=str(tmp_path),
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    assert public_server.requests


def test_the_readme_names_every_option_and_its_two_commands():
    with io.open(os.path.join(HERE, "README.rst"), encoding="utf-8") as file:
        text = file.read()
    shown = htsget_command("--help").stdout.decode()
    for option in set(re.findall(r"--[a-z][a-z-]+", shown)) - {"--help", "--version"}:
        assert option in text, option
    commands = [block for block in readme_blocks() if "test_htsget.py" in block]
    assert len(commands) == 2
    assert commands[0] == "python3 test_htsget.py demo"
