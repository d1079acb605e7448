# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The htsget.py developers
"""Tests of htsget.py against a real HTTP server on loopback, and that server.

    python3 test_htsget.py demo                    a transfer, a kill, a resume, a check
    python3 test_htsget.py serve                   a server to try every command on
    python3 test_htsget.py model [SECONDS [SEED]]  the random test, for longer
    python3 -m pytest test_htsget.py               run the tests
    python3 -m pytest test_htsget.py -k transport  run one section's tests

The tests are in the order of the sections of htsget.py. `serve` and `demo` need no
pytest. The server misbehaves where a test asks it to: see `File` and `Fault`.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import copy
import email.utils
import errno
import faulthandler
import functools
import gc
import gzip
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import logging
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.parse
import warnings
import zipapp
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
PYPY = sys.implementation.name == "pypy"
MIB = 1 << 20

# A key and a certificate for loopback, valid from 2020 to 2150; for these tests only.
TLS_KEY = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIE3ppzsBZpTpLQqEPgQQ2kPI/5Nzslv7atrYlwm0VZeDoAoGCCqGSM49
AwEHoUQDQgAElrEmii2tfrdz+I2WoxNB1IqzZQRu3s267t/Pl4AebsGTwnEy+hQv
bfidS4xSj28jxW3PE6anmhJlk995SaOUSw==
-----END EC PRIVATE KEY-----
"""
TLS_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBuzCCAWGgAwIBAgIEO9zwmzAKBggqhkjOPQQDAjAaMRgwFgYDVQQDDA9odHNn
ZXQucHkgdGVzdHMwIBcNMjAwMTAxMDAwMDAwWhgPMjE1MDAxMDEwMDAwMDBaMBox
GDAWBgNVBAMMD2h0c2dldC5weSB0ZXN0czBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABJaxJootrX63c/iNlqMTQdSKs2UEbt7Nuu7fz5eAHm7Bk8JxMvoUL234nUuM
Uo9vI8VtzxOmp5oSZZPfeUmjlEujgZIwgY8wHQYDVR0OBBYEFOecbMAkEGhc3Ur2
BUcVszz1jAtyMB8GA1UdIwQYMBaAFOecbMAkEGhc3Ur2BUcVszz1jAtyMCwGA1Ud
EQQlMCOCCWxvY2FsaG9zdIcEfwAAAYcQAAAAAAAAAAAAAAAAAAAAATAPBgNVHRMB
Af8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAKBggqhkjOPQQDAgNIADBFAiBLAlHG
r44pQa1dCL444i0fj4VAGw2qxPgyyXgStsoCrgIhAJq056R5C7A8z7a/M82xmEr1
qoblEy2vzx5Tp7pN1yM0
-----END CERTIFICATE-----
"""

# ---- data

BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
CRAM_EOF = bytes.fromhex(
    "0f000000ffffffff0fe0454f4600000000010005bdd94f0001000606010001000100ee63014b"
)
SAM_HEADER = b"@HD\tVN:1.6\tSO:coordinate\n@SQ\tSN:chr1\tLN:248956422\n"
BAM_HEADER = b"BAM\1" + struct.pack("<I", len(SAM_HEADER)) + SAM_HEADER
BAM_HEADER += struct.pack("<II5sI", 1, 5, b"chr1\0", 248956422)
VCF_HEADER = b"##fileformat=VCFv4.3\n##contig=<ID=chr1>\n"
VCF_HEADER += b"#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


def bgzf(content, block=16384, eof=True, level=1):
    """Compress into BGZF blocks, with the EOF block at the end."""
    blocks = []
    for start in range(0, len(content), block):
        chunk = content[start : start + block]
        deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
        body = deflate.compress(chunk) + deflate.flush()
        blocks.append(BGZF_EOF[:16] + struct.pack("<H", len(body) + 25) + body)
        blocks.append(struct.pack("<2I", zlib.crc32(chunk), len(chunk)))
    return b"".join(blocks) + (BGZF_EOF if eof else b"")


def one_read(start):
    """A read of 100 bases as BAM has it."""
    name = b"read%09d\0" % start
    bases = hashlib.sha512(name).digest()[:50]
    bases = bytes((1 << (b & 3)) << 4 | 1 << (b >> 2 & 3) for b in bases)
    core = (0, start, len(name), 60, 4681 + (start >> 14), 1, 0, 100, -1, -1, 0)
    record = struct.pack("<iiBBHHHiiii", *core) + name + struct.pack("<I", 1600)
    record += bases + b"\x1e" * 100
    return struct.pack("<I", len(record)) + record


def one_variant(start):
    return b"chr1\t%d\t.\tA\tC\t.\t.\t.\n" % (start + 1)


@functools.lru_cache(maxsize=None)
def make_vcf(records=4000):
    """A VCF file as plain text, some 20 bytes a record."""
    return VCF_HEADER + b"".join(map(one_variant, range(records)))


@functools.lru_cache(maxsize=None)
def make_bam(reads=4000):
    """A small valid BAM file, some 140 bytes a read."""
    return bgzf(BAM_HEADER + b"".join(map(one_read, range(reads))))


@functools.lru_cache(maxsize=None)
def make_bcf(records=4000):
    text = VCF_HEADER + b"\0"
    content = [b"BCF\2\2", struct.pack("<I", len(text)), text]
    for number in range(records):
        shared = struct.pack("<iiifHHI", 0, number, 1, 1.0, 0, 2, 0)
        shared += b"\x07\x17A\x17C\x00"
        content.append(struct.pack("<II", len(shared), 0) + shared)
    return bgzf(b"".join(content))


@functools.lru_cache(maxsize=None)
def make_cram(size=100000):
    """What passes for a CRAM 3.0 file: its definition, noise, the EOF container."""
    return b"CRAM\3\0" + bytes(20) + pattern(size, 77) + CRAM_EOF


MAKERS = {"BAM": make_bam, "CRAM": make_cram, "VCF": make_vcf, "BCF": make_bcf}


@functools.lru_cache(maxsize=8)
def pattern(size, seed=0):
    """Bytes without a period that a shifted or repeated slice could hide in."""
    numbers = range(size // 1024 + 1)
    chunks = (hashlib.sha512(b"%d %d" % (seed, n)).digest() * 16 for n in numbers)
    return b"".join(chunks)[:size]


def data_uri(content, media_type=""):
    return "data:%s;base64,%s" % (media_type, base64.b64encode(content).decode())


# ---- the server


def in_background(function, *args):
    """Run a function in a thread of the tests', which no run waits for at its end."""
    thread = threading.Thread(target=function, args=args, name="test", daemon=True)
    thread.start()
    return thread


class Request(collections.namedtuple("Request", "method path headers body connection")):
    """A request as it came: `path` with the query, `connection` a serial number."""

    @property
    def range(self):
        return self.headers.get("Range")

    @property
    def query(self):
        return urllib.parse.urlsplit(self.path).query


class Server(socketserver.ThreadingTCPServer):
    """HTTP on a free port of loopback; records what is requested and what is sent."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128
    # A test that makes so many requests does not end by itself.
    most_requests = None

    def __init__(self, tls=False, handler=None, port=0):
        super().__init__(("127.0.0.1", port), handler or Handler)
        self.routes, self.requests = {}, []
        # Connections so far, those open now, the most that were open at the same time.
        self.connections, self.open, self.most_open = 0, set(), 0
        # Bytes of bodies; responses of files being sent now, and the most.
        self.sent = self.active = self.most_active = 0
        # Seconds before each response but a ticket's.
        self.latency = 0
        self.changed, self.ended = threading.Condition(), threading.Event()
        self.tls = tls_context() if tls else None
        self.port = self.server_address[1]
        self.url = "%s://127.0.0.1:%d" % ("https" if tls else "http", self.port)

    def __enter__(self):
        in_background(self.serve_forever, 0.002)
        return self

    def __exit__(self, *args):
        self.ended.set()
        self.shutdown()
        self.server_close()

    def process_request(self, request, client_address):
        in_background(self.process_request_thread, request, client_address)

    def handle_error(self, request, client_address):
        pass

    def at(self, path, route):
        """Serve bytes, a File, a Fault or a function of the handler; its URL."""
        self.routes[path] = route
        return self.url + path

    def ticket(self, blocks, path="/reads/x", faults=(), **more):
        """Serve a ticket; its URL. The blocks: URLs, pairs of a URL and headers, or
        objects as in a ticket; or a function of the number of times that the ticket was
        served (0 first) that returns such a list, or the whole "htsget" object."""
        numbers = itertools.count()

        def document():
            entries = blocks(next(numbers)) if callable(blocks) else blocks
            return ticket_json(entries, **more)

        label = {"Content-Type": "application/vnd.ga4gh.htsget.v1.3.0+json"}
        options = {"ranges": False, "headers": label, "is_counted": False}
        return self.at(path, File(document, faults=faults, **options))

    def asked(self, path=None):
        """The requests so far, all or those for a path."""
        requests = list(self.requests)
        return [r for r in requests if path in (None, r.path.partition("?")[0])]

    def ranges(self, path):
        """The Range of each request for a path, None where there was none."""
        return [request.range for request in self.asked(path)]

    def wait_until(self, condition):
        """Wait until a function of this server is true; for the watchdog otherwise."""
        with self.changed:
            while not condition(self) and not self.ended.is_set():
                self.changed.wait(0.5)

    def count(self, **more):
        with self.changed:
            for name, value in more.items():
                setattr(self, name, getattr(self, name) + value)
            self.most_active = max(self.active, self.most_active)
            self.changed.notify_all()


def tls_context():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile("w", suffix=".pem", delete=False) as pem:
        pem.write(TLS_KEY + TLS_CERTIFICATE)
    context.load_cert_chain(pem.name)
    os.remove(pem.name)
    return context


def is_connected(connection):
    """Whether the client has not closed its end of a connection yet."""
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except (BlockingIOError, InterruptedError):
        return True
    except OSError:
        return False


class Handler(http.server.BaseHTTPRequestHandler):
    """Hands each request to the route for its path."""

    protocol_version = "HTTP/1.1"
    timeout = 30
    disable_nagle_algorithm = True

    def setup(self):
        self.request.settimeout(self.timeout)
        # For other threads, which must not wait: the system's flag is set by both.
        self.raw = socket.socket(fileno=os.dup(self.request.fileno()))
        self.raw.setblocking(False)
        with self.server.changed:
            self.server.connections += 1
            self.number = self.server.connections
            # A client may have closed a connection that is not yet gone here.
            self.server.open = {c for c in self.server.open if is_connected(c)}
            self.server.open.add(self.raw)
            self.server.most_open = max(self.server.most_open, len(self.server.open))
        try:
            if self.server.tls:
                wrap = self.server.tls.wrap_socket
                self.request = wrap(self.request, server_side=True)
        except OSError:
            self.leave()
            self.raw.close()
            raise
        super().setup()

    def finish(self):
        try:
            super().finish()
        finally:
            self.leave()
            self.connection.close()
            self.raw.close()

    def leave(self):
        """This connection is not open any more."""
        with self.server.changed:
            self.server.open.discard(self.raw)
            self.server.changed.notify_all()

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        words = self.command, self.path, self.headers, self.body, self.number
        self.asked = Request(*words)
        with self.server.changed:
            self.server.requests.append(self.asked)
            if len(self.server.requests) == self.server.most_requests:
                os.kill(os.getpid(), signal.SIGALRM)
            self.server.changed.notify_all()
        route = self.server.routes.get(urllib.parse.urlsplit(self.path).path)
        if route is None:
            self.refuse(404, "NotFound", "no such thing here")
        elif isinstance(route, bytes):
            self.reply(200, route)
        elif not getattr(route, "is_counted", True):
            route(self)
        else:
            self.server.count(active=1)
            try:
                self.server.ended.wait(self.server.latency)
                route(self)
            finally:
                self.server.count(active=-1)

    do_POST = do_GET

    def start(self, status, headers):
        """Send a status line and headers."""
        self.send_response_only(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def reply(self, status, body=b"", headers=None):
        """A complete response."""
        self.start(status, dict({"Content-Length": str(len(body))}, **(headers or {})))
        self.send(body)

    def refuse(self, status, error, message):
        """An error as htsget has it."""
        document = {"htsget": {"error": error, "message": message}}
        self.reply(status, json.dumps(document).encode())

    def send(self, data, rate=None):
        """Send bytes of a body, at most `rate` of them a second."""
        step = 16384 if rate else 65536
        for start in range(0, len(data), step):
            chunk = data[start : start + step]
            if rate:
                self.server.ended.wait(len(chunk) / rate)
            self.wfile.write(chunk)
            self.server.count(sent=len(chunk))

    def cut(self):
        """End the connection here (over TLS: without close_notify)."""
        self.close_connection = True
        self.leave()
        with contextlib.suppress(OSError):
            self.raw.shutdown(socket.SHUT_RDWR)

    def reset(self):
        """End the connection with a TCP reset."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.leave()
        for each in (self.rfile, self.wfile, self.raw, self.connection):
            each.close()


class Fault:
    """What is different in one response; alone, it is a route that always sends it.

    status, headers, body   instead of the right ones (a header of None is left out);
                            with an error status the body is empty if not given
    data, etag              another object, for this response
    ranges=False            the Range is ignored: 200 and the whole object
    framing                 see File
    cut=N, reset=True       the connection ends after N bytes of the body; by a reset
    stall=EVENT             after `cut` bytes, nothing until the event (True: for ever)
    wait=EVENT              nothing at all until the event (True: for ever)
    raw=BYTES               these bytes instead of HTTP, then the end
    then=(DATA, ETAG)       the object is replaced after this response was begun
    run=FUNCTION            called with the handler first
    match                   only for requests with this string in path, query or
                            Range, or for which this function of the Request is true
    times=N                 so many responses (None: all)
    """

    NAMES = "headers body data etag ranges framing cut reset stall wait raw then run"

    def __init__(self, status=None, match=None, times=1, **changes):
        assert set(changes) <= set(self.NAMES.split()), changes
        self.status, self.match, self.times = status, match, times
        self.changes, self.get = changes, changes.get

    def fits(self, request):
        if callable(self.match):
            return self.match(request)
        return (self.match or "") in request.path + " " + (request.range or "")

    def __call__(self, handler):
        File(self.get("data", b""), ranges=False).respond(handler, self)


OK = Fault()


class File:
    """A route that serves an object; see `Fault` for how responses are spoiled.

    data      bytes, or a function that makes them for each response
    ranges    whether Range headers are heeded
    only      the Ranges that are allowed (None: a request without), others are
              refused with `refusal`, a Fault
    uses      each query string is refused after so many requests: URLs that expire
    total     in Content-Range: "size", "slice" (as the EGA has it) or "*"
    framing   "length", "chunked", "close" (HTTP/1.1 without a length) or "HTTP/1.0"
    rate      bytes a second
    headers   further headers of each response with data
    faults    a list of Faults, one for each response in order (None: a good one)
    """

    ranges, framing, total, headers = True, "length", "size", {}
    only = uses = rate = None
    refusal, is_counted = Fault(403, body=b"not this range"), True

    def __init__(self, data, etag=None, faults=(), **options):
        assert all(hasattr(File, name) for name in options), options
        vars(self).update(options, data=data, etag=etag)
        self.faults = [fault or OK for fault in faults]
        self.left = [fault.times for fault in self.faults]
        self.used, self.lock = collections.Counter(), threading.Lock()

    def __call__(self, handler):
        fault = self.next_fault(handler.asked)
        if fault is None:
            fault = self.refusal if self.is_refused(handler.asked) else OK
        self.respond(handler, fault)

    def next_fault(self, request):
        """The first fault that is left and fits the request."""
        with self.lock:
            for number, fault in enumerate(self.faults):
                if self.left[number] != 0 and fault.fits(request):
                    if self.left[number] is not None:
                        self.left[number] -= 1
                    return None if not fault.changes and not fault.status else fault
        return None

    def is_refused(self, request):
        with self.lock:
            self.used[request.query] += 1
            if self.uses is not None and self.used[request.query] > self.uses:
                return True
        return self.only is not None and request.range not in self.only

    def respond(self, handler, fault):
        if fault.get("run"):
            fault.get("run")(handler)
        if fault.get("wait"):
            wait_for(handler, fault.get("wait"))
        if fault.get("raw") is not None:
            handler.wfile.write(fault.get("raw"))
            handler.cut()
            return
        data = fault.get("data", self.data() if callable(self.data) else self.data)
        etag, ranges = fault.get("etag", self.etag), fault.get("ranges", self.ranges)
        if fault.get("then"):
            self.data, self.etag = fault.get("then")
        status, headers, body = self.right(handler.headers, data, etag, ranges)
        if fault.status is not None:
            status = fault.status
            headers, body = (headers, body) if status < 300 else ({}, b"")
        headers.update(fault.get("headers", {}))
        self.send(handler, fault, status, headers, fault.get("body", body))

    def right(self, headers, data, etag, ranges):
        """The right response: status, headers, body."""
        common = dict(self.headers, **({"ETag": etag} if etag else {}))
        match = re.match(r"bytes=(\d+)-(\d*)$", headers.get("Range", ""))
        if not match or not ranges or headers.get("If-Range") not in (None, etag):
            return 200, common, data
        size, first = len(data), int(match.group(1))
        stop = min(int(match.group(2) or size), size - 1) + 1
        if first >= size:
            return 416, {"Content-Range": "bytes */%d" % size}, b""
        total = {"size": size, "slice": stop - first, "*": "*"}[self.total]
        common["Content-Range"] = "bytes %d-%d/%s" % (first, stop - 1, total)
        return 206, common, data[first:stop]

    def send(self, handler, fault, status, headers, body):
        framing = fault.get("framing", self.framing)
        handler.protocol_version = "HTTP/1.0" if framing == "HTTP/1.0" else "HTTP/1.1"
        if framing == "length":
            headers = dict({"Content-Length": str(len(body))}, **headers)
        elif framing == "chunked":
            headers = dict(headers, **{"Transfer-Encoding": "chunked"})
        else:
            headers = dict(headers, Connection="close")
        handler.start(status, headers)
        stall, reset, length = fault.get("stall"), fault.get("reset"), len(body)
        if fault.get("cut") is not None or stall or reset:
            cut = fault.get("cut") or 0
            self.send_body(handler, framing, body[:cut])
            if not stall or not wait_for(handler, stall):
                (handler.reset if reset else handler.cut)()
                return
            body = body[cut:]
        self.send_body(handler, framing, body)
        if framing == "chunked":
            handler.wfile.write(b"0\r\n\r\n")
        elif framing != "length" or headers.get("Content-Length") != str(length):
            handler.cut()

    def send_body(self, handler, framing, body):
        if framing != "chunked":
            handler.send(body, self.rate)
            return
        for start in range(0, len(body), 10000):
            chunk = body[start : start + 10000]
            handler.wfile.write(b"%x\r\n" % len(chunk))
            handler.send(chunk, self.rate)
            handler.wfile.write(b"\r\n")


def wait_for(handler, event):
    """Wait for an event (True: none) or the server's end; whether the event came."""
    while not handler.server.ended.wait(0.002 if event is not True else 1):
        if event is not True and event.is_set():
            return True
    return False


def ticket_json(entries, **more):
    """A ticket's JSON; see Server.ticket."""
    if isinstance(entries, dict):
        return json.dumps({"htsget": entries}).encode()
    urls = []
    for entry in entries:
        pair = (entry,) if isinstance(entry, str) else entry
        is_whole = isinstance(entry, dict)
        urls.append(entry if is_whole else dict(zip(("url", "headers"), pair)))
    return json.dumps({"htsget": dict({"urls": urls}, **more)}).encode()


def closed(url, first, stop):
    """A block of the bytes from `first` to before `stop`."""
    return (url, {"Range": "bytes=%d-%d" % (first, stop - 1)})


def opened(url, first):
    """A block of the bytes from `first` to the end."""
    return (url, {"Range": "bytes=%d-" % first})


def signed(url, first, stop, signature="x"):
    """A block whose URL signs its Range, as S3 does it."""
    query = "?X-Amz-SignedHeaders=host%%3Brange&X-Amz-Signature=%s" % signature
    return closed(url + query, first, stop)


def sliced(url, size, count=4, make=closed):
    """Blocks of equal sizes that make up one object."""
    edges = [size * number // count for number in range(count + 1)]
    return [make(url, first, stop) for first, stop in zip(edges, edges[1:])]


# ---- serve and demo

# `data` is a whole file, of which `chunks` (first and last position on chr1, first
# byte, end) follow the first `header` bytes.
Archive = collections.namedtuple("Archive", "format header chunks data")


def make_archive(data_format, count):
    """A file of `count` records, sorted by position, at most one each 1,000 bases."""
    is_bam = data_format == "BAM"
    parts, chunks = [bgzf(BAM_HEADER if is_bam else VCF_HEADER, eof=False)], []
    size, step = len(parts[0]), min(1000, 240000000 // count)
    for first in range(0, count, count // 12):
        starts = [step * n for n in range(first, min(first + count // 12, count))]
        records = b"".join(map(one_read if is_bam else one_variant, starts))
        parts.append(bgzf(records, 60000, eof=False))
        chunks.append((starts[0], starts[-1] + 100, size, size + len(parts[-1])))
        size += len(parts[-1])
    return Archive(data_format, len(parts[0]), chunks, b"".join(parts) + BGZF_EOF)


class Refusal(Exception):
    """An error as htsget has it: status, type, message."""


class DemoServer(Server):
    """An htsget server for every everyday command, and some oddities of real ones:
    URLs that sign their Range and expire (s3), a file for each region (several), a
    login that may see one region only (restricted)."""

    def __init__(self, args):
        super().__init__(port=args.port)
        self.token, self.fail, self.archives = args.token, args.fail, {}
        self.issued, self.used = itertools.count(1), collections.Counter()
        for endpoint, data_format in [("reads", "BAM"), ("variants", "VCF")]:
            archive = make_archive(data_format, max(400, int(args.size * 24000)))
            self.archives[endpoint] = archive
            info = {"datatype": endpoint, "formats": [data_format]}
            info.update(fieldsParameterEffective=False, tagsParametersEffective=False)
            info = {"id": "demo", "name": "demo", "htsget": info}
            self.at("/%s/service-info" % endpoint, json.dumps(info).encode())
            # The demo is slow enough to be killed in the middle.
            rate = len(archive.data) // 3 if args.what == "demo" else None
            file = File(archive.data, '"demo"', rate=args.rate or rate)
            self.at("/data/" + endpoint, functools.partial(self.send_data, file))
            for name in ("demo", "s3", "several", "restricted"):
                self.at("/%s/%s" % (endpoint, name), self.send_ticket)

    def send_data(self, file, handler):
        """Bytes of a file; each nth response is cut, signed URLs expire."""
        query = urllib.parse.urlsplit(handler.path).query
        signature = dict(urllib.parse.parse_qsl(query)).get("X-Amz-Signature", "")
        number, _, span = signature.partition("-")
        with self.changed:
            self.used.update([number, "all"])
            is_cut = self.fail and self.used["all"] % self.fail == 0
        is_other = "bytes=" + span != handler.headers["Range"]
        if number and (is_other or self.used[number] > 6):
            handler.reply(403, b"<Error><Code>AccessDenied</Code></Error>")
        else:
            file.respond(handler, Fault(cut=100000) if is_cut else OK)

    def send_ticket(self, handler):
        try:
            handler.reply(200, ticket_json(self.make_ticket(handler)))
        except Refusal as refusal:
            handler.refuse(*refusal.args)

    def make_ticket(self, handler):
        """The ticket for a GET or a POST, or a Refusal."""
        sent = handler.headers.get("Authorization")
        if self.token and not sent:
            raise Refusal(401, "InvalidAuthentication", "this archive needs a token")
        if self.token and sent != "Bearer " + self.token:
            raise Refusal(403, "PermissionDenied", "this token may not read it")
        url = urllib.parse.urlsplit(handler.path)
        _, endpoint, name = url.path.split("/")
        archive, asked = self.archives[endpoint], urllib.parse.parse_qsl(url.query)
        is_post = handler.command == "POST"
        asked = json.loads(handler.body.decode() or "{}") if is_post else dict(asked)
        if asked.get("format", archive.format) != archive.format:
            raise Refusal(400, "UnsupportedFormat", "only %s here" % archive.format)
        ticket, header = {"format": archive.format}, (0, archive.header)
        end = (len(archive.data) - len(BGZF_EOF), len(archive.data))
        found = [self.find(archive, r) for r in asked.get("regions") or [asked]]
        if name == "restricted":
            found = [self.find(archive, {"end": 500000})]
            ticket["allowed"] = [{"name": "chr1", "start": 0, "end": 500000}]
        if asked.get("class"):
            spans = [header]
        elif name == "several":
            spans = [span for part in found for span in [header, *part, end]]
        else:
            # Blocks of records, each once, in file order.
            spans = [header, *sorted({span for part in found for span in part}), end]
        number, ticket["urls"] = next(self.issued), []
        for first, stop in spans:
            entry = closed("%s/data/%s" % (self.url, endpoint), first, stop)
            if name == "s3":
                signature = "%d-%d-%d" % (number, first, stop - 1)
                entry = signed(entry[0], first, stop, signature)
            words = *entry, "body" if first else "header"
            ticket["urls"].append(dict(zip(("url", "headers", "class"), words)))
        return ticket

    def find(self, archive, region):
        """The byte ranges of all blocks that overlap a region."""
        start, end = int(region.get("start", 0)), int(region.get("end", 1 << 32))
        if start > end:
            raise Refusal(400, "InvalidRange", "start is greater than end")
        if region.get("referenceName", "chr1") not in ("chr1", "*"):
            raise Refusal(404, "NotFound", "this file has chr1 only")
        if region.get("referenceName") == "*":
            return []
        return [c[2:] for c in archive.chunks if c[0] < end and start < c[1]]


def show(*words):
    """Print a command; htsget.py need not be imported."""
    path = os.path.relpath(importlib.util.find_spec("htsget").origin)
    words = ["python3", path, *words]
    print("  $ " + " ".join(map(shlex.quote, words)), flush=True)
    return words[1:]


def serve(server, token):
    """Serve until Ctrl-C; what to try is printed."""
    print("serving until Ctrl-C at %s; in another terminal:\n" % server.url)
    for endpoint, archive in server.archives.items():
        for words in [
            "demo -O demo.{0}",
            "demo -O header.{0} -f {1} --class header",
            "demo -O part.{0} -r chr1 -s 0 -e 300000",
            "demo -O two.{0} --region chr1:1-9 --region chr1:900000-",
            "demo --service-info",
            "s3 -O signed.{0} -v",
            "several -O no.{0} --region chr1:1-9 --region chr1:900000-",
            "restricted -O some.{0}",
        ]:
            name, *more = words.format(archive.format.lower(), archive.format).split()
            more += ["-b", token] if token else []
            show("/".join((server.url, endpoint, name)), *more)
    server.serve_forever()


def demo(server):
    """A transfer, a kill, a resume and a check, in a folder that is removed."""
    data = server.archives["reads"].data
    with tempfile.TemporaryDirectory(prefix="htsget-demo-") as folder, server:
        out = os.path.join(folder, "demo.bam")
        env = dict(os.environ, no_proxy="127.0.0.1", NO_PROXY="127.0.0.1")
        print("A server on this machine has a file of %d bytes." % len(data))
        print("The files of this demo are in %s.\n" % folder)
        words = [sys.executable, *show(server.url + "/reads/demo", "-O", out, "-v")]
        with subprocess.Popen(words, env=env) as process:
            while process.poll() is None and server.sent < len(data) // 2:
                time.sleep(0.01)
            process.kill()
        size = sum(map(os.path.getsize, filter(os.path.exists, [out + ".part"])))
        print("\nkilled (as by kill -9) with %d bytes in %s.part" % (size, out))
        del server.requests[:]
        print("\nThe same command again resumes:\n")
        show(*words[2:])
        status = subprocess.call(words, env=env)
        print("\nexit status %d; the server was asked for:" % status)
        for request in server.requests:
            print("    %s %s %s" % (request.method, request.path, request.range or ""))
        with open(out, "rb") as file:
            is_right = file.read() == data
    print("The file was %s what was served." % ("identical to" if is_right else "NOT"))
    print("\nNext, a server to try every command on:\n")
    print("  $ python3 %s serve" % os.path.relpath(__file__))
    return 0 if is_right and status == 0 else 1


def main(argv):
    """`demo` and `serve`; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("demo", "serve"))
    parser.add_argument("--port", type=int, default=0, help="(a free one)")
    parser.add_argument("--size", type=float, default=3, help="MB of reads (3)")
    parser.add_argument("--token", help="wanted from every client")
    parser.add_argument("--rate", type=int, help="bytes a second of one connection")
    parser.add_argument("--fail", type=int, default=0, help="cut each Nth response")
    args = parser.parse_args(argv)
    try:
        server = DemoServer(args)
    except (OSError, OverflowError) as error:
        print("cannot serve: %s" % error, file=sys.stderr)
        return 2
    try:
        return demo(server) if args.what == "demo" else serve(server, args.token)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__" and sys.argv[1:2] != ["model"]:
    sys.exit(main(sys.argv[1:]))
# ---- what the tests share

import pytest  # noqa: E402

import htsget  # noqa: E402

PROGRAM = os.path.abspath(htsget.__file__)

# Seconds after which a test fails instead of hanging.
PATIENCE = 30

# The kinds of output that `fetch` knows; a test that takes `kind` is run for each.
KINDS = ("seekable", "pipe", "path")

# How tests fetch, where they do not say otherwise.
QUICK = {"retry_wait": 0, "timeout": 5}

# Started by nohup or in a shell's background, this process ignores signals, and so
# would its children; a handler is not inherited.
for number in (signal.SIGINT, getattr(signal, "SIGHUP", 1), signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *args: None)


@pytest.fixture(autouse=True)
def watchdog(monkeypatch):
    """No setting of the machine's gets in a test's way. A test that hangs fails, again
    and again until it ends; if nothing helps, the run ends."""

    def bark(*args):
        faulthandler.dump_traceback()
        pytest.fail("still running after %d s, or too many requests" % PATIENCE)

    for name in filter(is_disturbing, list(os.environ)):
        monkeypatch.delenv(name)
    faulthandler.dump_traceback_later(4 * PATIENCE, exit=True)
    if hasattr(signal, "setitimer"):
        monkeypatch.setattr(Server, "most_requests", 2000)
        signal.signal(signal.SIGALRM, bark)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE, 5)
    yield
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()


def is_disturbing(name):
    """Whether it is a proxy, token or certificate setting."""
    return name.lower().endswith("_proxy") or name.startswith(
        ("HTS_", "SSL_CERT", "SSLKEYLOG", "NETRC", "REQUESTS_CA", "CURL_CA", "PYTHON")
    )


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def server():
    with Server() as started:
        yield started


@pytest.fixture
def tls_server():
    with Server(tls=True) as started:
        yield started


@pytest.fixture
def bundle(tmp_path):
    """A file with the tests' certificate."""
    path = tmp_path / "ca.pem"
    path.write_text(TLS_CERTIFICATE)
    return str(path)


@pytest.fixture
def lookups(monkeypatch):
    """Every host name is loopback; a list of those looked up. What is put into
    `errors` of it is raised first."""
    real, names = socket.getaddrinfo, type("Lookups", (list,), {"errors": ()})()

    def lookup(host, *args, **options):
        names.append(host)
        if names.errors:
            raise names.errors.pop(0)
        return real("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return names


@pytest.fixture
def trusting():
    """An SSL context that trusts the tests' certificate."""
    return ssl.create_default_context(cadata=TLS_CERTIFICATE)


class Death(Exception):
    """Raised by a progress function: the transfer ends here."""


def dying_at(position, before=lambda: None):
    """A progress function that ends the transfer; `before` is called just before."""

    def progress(so_far, total):
        if so_far >= position:
            before()
            raise Death

    return progress


class Pipe(io.RawIOBase):
    """An output that cannot be sought; `on_write` is called with it after a write."""

    def __init__(self, on_write=lambda pipe: None):
        self.data, self.on_write = bytearray(), on_write

    def writable(self):
        return True

    def write(self, data):
        self.data += data
        self.on_write(self)
        return len(data)

    def getvalue(self):
        """As io.BytesIO has it."""
        return bytes(self.data)


def fetch(source, kind="seekable", **options):
    """What `htsget.get` delivers to an output of some kind. After an error no file is
    there, after success nothing else."""
    options = dict(QUICK, **options)
    if kind != "path":
        output = Pipe() if kind == "pipe" else io.BytesIO()
        htsget.get(source, output, **options)
        return output.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "out")
        try:
            htsget.get(source, path, **options)
        except BaseException:
            assert not os.path.exists(path), "a file after an error"
            raise
        assert os.listdir(folder) == ["out"]
        return contents(path)


def check(expected, source, kind="seekable", **options):
    """Fetch, and compare: `expected` is bytes, or the class of an exception (with a
    regular expression for its words, if a pair); the exception is returned."""
    if isinstance(expected, bytes):
        # Not in the assertion: pytest would explain the difference for minutes.
        is_right = fetch(source, kind, **options) == expected
        assert is_right, "wrong bytes"
        return None
    expected, words = expected if isinstance(expected, tuple) else (expected, None)
    with pytest.raises(expected, match=words) as caught:
        fetch(source, kind, **options)
    return caught.value


def spoiled(server, place, faults, data=b"abc"):
    """A source of some data; faults have the responses to its ticket or to its block,
    which is requested on a connection of its own."""
    if place == "ticket":
        return server.ticket([data_uri(data)], faults=faults)
    url = server.at("/b", File(data, faults=faults))
    return htsget.Ticket(None, [htsget.DataBlock(url, {})])


def contents(path):
    with open(str(path), "rb") as file:
        return file.read()


def kept(path):
    """The part file and the journal of a path."""
    return [str(path) + ".part", str(path) + ".part.json"]


Result = collections.namedtuple("Result", "status stdout stderr")


def command(args, code=None):
    """The words that run the command line, or Python code that can import htsget."""
    words = [sys.executable, PROGRAM]
    if code is not None:
        code = "import sys; sys.path.insert(0, sys.argv.pop(1))\n" + code
        words = [sys.executable, "-c", code, os.path.dirname(PROGRAM)]
    return words + [str(arg) for arg in args]


def child_env(env=None):
    """An environment in which nothing disturbs; variables of None are left out."""
    result = {k: v for k, v in os.environ.items() if not is_disturbing(k)}
    result.update({"HOME": "/nonexistent", "LC_ALL": "C.UTF-8"}, **(env or {}))
    return {k: v for k, v in result.items() if v is not None}


@contextlib.contextmanager
def running(*args, code=None, env=None, **options):
    """The command line (or code) as a child process that does not outlive the test;
    its standard streams are pipes unless given."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    options = dict(streams, env=child_env(env), **options)
    with subprocess.Popen(command(args, code), **options) as process:
        try:
            yield process
        finally:
            process.kill()


def end_by(process, name):
    """End a child by a signal; what it said. A signal that arrives just before a system
    call blocks interrupts nothing in Python, so it may take another one."""
    for _ in range(5):
        process.send_signal(getattr(signal, "SIG" + name))
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=4)[1].decode()
    raise AssertionError("a signal does not end the process")


def run(*args, stdin=b"", timeout=25, **options):
    """Run the command line (or code) to its end: its status, standard output (bytes)
    and standard error (a string). `stdin`: bytes, or as Popen has it."""
    if not isinstance(stdin, bytes):
        stdin, options["stdin"] = None, stdin
    with running(*args, **options) as process:
        out, err = process.communicate(stdin, timeout)
    return Result(process.returncode, out, (err or b"").decode("utf-8", "replace"))


def call(*args):
    """`htsget.main` in this process, which is faster; a result like that of `run`."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
        out, err = (io.open(f.fileno(), "w", closefd=False) for f in files)
        with out, err, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = htsget.main([str(arg) for arg in args])
        for file in files:
            file.seek(0)
        return Result(status, files[0].read(), files[1].read().decode())


def launch(words, **options):
    """Run a command to its end."""
    streams = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    options = dict(streams, stdin=subprocess.DEVNULL, **options)
    done = subprocess.run(words, **dict({"env": child_env()}, **options))
    return Result(done.returncode, done.stdout, done.stderr.decode())


def at_once(test, rows):
    """Call a test with each row, several at the same time, each with a server of its
    own: these wait more than they work."""

    def start(row):
        with Server() as server:
            test(server, row)

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        list(pool.map(start, rows))


@contextlib.contextmanager
def demo_site(**options):
    """What `serve` serves, but small."""
    args = argparse.Namespace(what="serve", port=0, token=None, rate=None, fail=0)
    vars(args).update({"size": 0.02}, **options)
    with DemoServer(args) as site:
        yield site


# ---- the ticket request

MD5 = "0123456789abcdef0123456789ABCDEF"
ONE = {"reference_name": "1"}

BAM_TOO = {"data_format": "BAM"}
MANY = {"data_format": "bam", "fields": "qname", "tags": [], "notags": "OQ"}
MANY["regions"] = iter([htsget.Region("1", 0, 1e1), ("2", "5"), ("*", None)])
SENT_FROM_MANY = {"format": "BAM", "fields": ["QNAME"], "tags": [], "notags": ["OQ"]}
SENT_FROM_MANY["regions"] = [
    {"referenceName": "1", "start": 0, "end": 10},
    {"referenceName": "2", "start": 5}, {"referenceName": "*"},
]  # fmt: skip

# Options, and the query that they become.
SENT = [
    ({}, ""), ({"fields": "QNAME,flag"}, "fields=QNAME,FLAG"),
    ({"fields": ["SEQ", "QUAL"]}, "fields=SEQ,QUAL"), ({"tags": "NM,MD"}, "tags=NM,MD"),
    ({"tags": []}, "tags="),
    ({"tags": iter(["NM"]), "notags": ("OQ",)}, "tags=NM&notags=OQ"),
    ({"reference_name": "*"}, "referenceName=*"),
    ({"reference_name": "a b&c=d#1"}, "referenceName=a%20b%26c%3Dd%231"),
    (dict(ONE, start=0, end=4294967295), "referenceName=1&start=0&end=4294967295"),
    (dict(ONE, start="100", end=2e2), "referenceName=1&start=100&end=200"),
    ({"reference_md5": MD5, "start": 5}, "referenceMD5=%s&start=5" % MD5.lower()),
    ({"data_class": "header", "data_format": "VcF"}, "format=VCF&class=header"),
]  # fmt: skip


# A URL, options, and what is requested.
@pytest.mark.parametrize("given, options, sent", [
    *(("/reads/x", options, "/reads/x?" + query) for options, query in SENT),
    ("/reads/a%2Fb%20c?a=1&a=2&e=&c=%2f", {}, "/reads/a%2Fb%20c?a=1&a=2&e=&c=%2f"),
    ("/reads/m \xfc", {}, "/reads/m%20%C3%BC"),
    ("/reads/x ", {}, "/reads/x"),
    ("/reads/\udcff\udce4", {}, "/reads/%FF%E4"),
    ("/reads/5178_6#1", BAM_TOO, "/reads/5178_6%231?format=BAM"),
    ("/reads/x#1?a=b#c", BAM_TOO, "/reads/x%231?a=b%23c&format=BAM"),
    ("/x?a=%2F&%66ormat=A&format=B&b=", BAM_TOO, "/x?a=%2F&b=&format=BAM"),
    ("/x?tags=NM&notags=OQ", {"tags": ""}, "/x?notags=OQ&tags="),
    ("/x?referenceName=2&class=body", ONE, "/x?class=body&referenceName=1"),
    ("/x?a=b&format=A", MANY, "/x?a=b"),
])  # fmt: skip
def test_options_become_a_query_or_a_body(server, given, options, sent):
    path, _, query = sent.partition("?")
    url = (server.ticket([], path) + given).replace(path, "", 1)
    htsget.get_ticket(url, **options)
    (request,) = server.requests
    assert request.path.partition("?")[0] == path
    assert sorted(request.query.split("&")) == sorted(query.split("&"))
    assert request.method == ("GET" if options is not MANY else "POST")
    if options is MANY:
        assert request.headers["Content-Type"] == "application/json"
        assert json.loads(request.body.decode()) == SENT_FROM_MANY
    else:
        assert request.body == b""


WRONG_STARTS = "", "x", "1.5", 1.5, -1, float("inf"), float("nan"), "9" * 5000, [1]


# Options, and what the RequestError names.
@pytest.mark.parametrize("options, words", [
    ({"start": 1}, "reference_name"), ({"reference_name": "*", "start": 1}, r"\*"),
    ({"reference_name": ""}, "reference_name"),
    ({"reference_name": os.fsdecode(b"chr\xff")}, "reference_name"),
    (dict(ONE, start=2, end=1), "start.* end"), (dict(ONE, end=1 << 32), "end"),
    ({"reference_md5": "xyz"}, "reference_md5"), ({"fields": "QNAME,WRONG"}, "fields"),
    ({"tags": [1]}, "tags"), ({"tags": "NM", "notags": ["NM"]}, "tags.*NM"),
    ({"data_class": "header"}, "data_format"),
    ({"data_class": "body", "data_format": "BAM"}, "data_class"),
    ({"regions": []}, "regions"), ({"regions": [("*", 1, 2)]}, r"\*"),
    ({"regions": [(os.fsdecode(b"\xff"),)]}, "region"),
    ({"regions": [("1",)], "reference_name": "1"}, "regions"),
    ({"regions": [("1",)], "start": 1}, "regions|start"),
    ({"bearer_token": ""}, "bearer_token"),
    ({"bearer_token": lambda: " "}, "bearer_token"),
    ({"bearer_token": "hush\r\nX: y"}, "bearer_token"),
    ({"headers": {"X": "hush\nb"}}, "headers"), ({"headers": {"X y": "a"}}, "headers"),
    ({"timeout": 0}, "timeout"), ({"connections": 0}, "connections"),
    ({"max_retries": "x"}, "max_retries"), ({"url": ""}, ""), ({"url": None}, ""),
    ({"url": "localhost:1/reads/x"}, "https://"), ({"url": "http://"}, "host"),
    ({"url": "http://h:x/reads/x"}, "port"), ({"url": "http://h/a\nb"}, "control"),
    ({"url": "http://h%0d%0aX-Evil:%20y/reads/x"}, "host"),
    *((dict(ONE, start=start), "start") for start in WRONG_STARTS),
])  # fmt: skip
def test_a_wrong_option_is_refused_before_anything_is_sent(server, options, words):
    url = server.ticket([])
    with pytest.raises(htsget.RequestError, match="(?i)" + words) as caught:
        htsget.get_ticket(**dict({"url": url, "max_retries": 0}, **options))
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 500 and "hush" not in repr(caught.value)
    assert server.connections == 0


@pytest.mark.parametrize("name", ["get_ticket", "open", "service_info"])
def test_a_mistyped_option_is_a_type_error_that_names_it(server, name):
    with pytest.raises(TypeError, match="conections"):
        getattr(htsget, name)(server.url, conections=1)
    with pytest.raises(htsget.RequestError, match="timeout"):
        getattr(htsget, name)(server.url + "/reads/x", timeout=0)
    assert server.connections == 0


def test_request_options_do_not_go_with_a_ticket():
    ticket = htsget.Ticket(None, [htsget.DataBlock("data:,x")])
    check(b"x", ticket)
    wrong = dict(ONE, start=0, fields="SEQ", tags=[], notags="OQ", regions=[("1",)])
    wrong.update(BAM_TOO, reference_md5=MD5, data_class="header", bearer_token="t")
    for name, value in dict(wrong, headers={"X-A": "1"}).items():
        for call in (fetch, htsget.open):
            with pytest.raises(htsget.RequestError, match=name + ".*ticket"):
                call(ticket, **{name: value})


# samtools' notation, and the region or what the error says.
@pytest.mark.parametrize("text, expected", [
    ("chr1", ("chr1", None, None)), ("*", ("*", None, None)),
    ("chr1:100", ("chr1", 99, None)), ("chr1:-200", ("chr1", None, 200)),
    ("chr1:1,000-2,000", ("chr1", 999, 2000)), ("chr1:5-5", ("chr1", 4, 5)),
    ("{HLA:A*01:01}:1-5", ("HLA:A*01:01", 0, 5)),
    ("{HLA:A*01:01}", ("HLA:A*01:01", None, None)),
    ("HLA:A*01:01:7-8", ("HLA:A*01:01", 6, 8)),
    ("HLA-A*01:01:01:01", ("HLA-A*01:01:01", 0, None)), ("", "region"),
    ("chr1:0-5", "chr1"), ("chr1:5-4", "chr1"), ("chr1\t100\t200", "chr1"),
    ("chr1:%s-2" % ("9" * 5000), "chr1"),
])  # fmt: skip
def test_regions_are_read_as_samtools_does(caplog, text, expected):
    if isinstance(expected, tuple):
        assert htsget.parse_region(text) == htsget.Region(*expected)
        # What is in doubt is read aloud.
        is_said = expected[0] in caplog.text and "{" in caplog.text
        assert is_said == bool(caplog.text) == text.startswith("HLA")
    else:
        with pytest.raises(htsget.RequestError, match=expected) as caught:
            htsget.parse_region(text)
        assert len(str(caught.value)) < 500


def test_headers_stay_at_the_origin_of_the_ticket(server):
    with Server() as other:
        block = server.at("/block", b"data")
        there = {"Location": other.ticket([block])}
        server.at("/away", Fault(307, headers=there))
        url = server.at("/near", Fault(301, headers={"Location": "/away"}))
        headers = {"x-API-key": "k", "Cookie": "c=1", "X-None": None}
        given = dict(headers)
        check(b"data", url, headers=given, bearer_token="secret")
        assert given == headers
        sent = dict(headers, Authorization="Bearer secret")
        media = "application/vnd.ga4gh.htsget.v1.3.0+json, */*;q=0.8"
        near, away, block, (ticket,) = *server.requests, other.requests
        for request in (near, away):
            found = dict(request.headers.items(), **{"X-None": None})
            assert dict(found, **sent) == found
        for request in (block, ticket):
            assert not set(sent) & set(request.headers)
        for request in (near, away, ticket):
            assert request.headers["Accept"] == media
            assert request.headers["Accept-Encoding"] == "identity"


@pytest.fixture
def netrc(tmp_path, monkeypatch):
    path = tmp_path / "netrc"
    text = "machine 127.0.0.1 login me password pw\n"
    path.write_text(text + "machine localhost login a password b\n")
    monkeypatch.setenv("NETRC", str(path))
    return path


# User-info, options, and the Authorization that is sent: .netrc is consulted last.
@pytest.mark.parametrize("userinfo, options, sent", [
    ("", {}, "Basic bWU6cHc="), ("me:p%40ss@", {}, "Basic bWU6cEBzcw=="),
    ("me:p@", {"bearer_token": "t"}, "Bearer t"),
    ("", {"bearer_token": "Bearer t"}, "Bearer t"),
    ("", {"bearer_token": lambda: " bEARER t\n"}, "Bearer t"),
    ("", {"headers": {"aUTHORIZATION": "own"}}, "own"),
    ("", {"headers": {"authorization": "own"}, "bearer_token": "t"}, "Bearer t"),
])  # fmt: skip
def test_one_authorization_is_sent(server, netrc, caplog, userinfo, options, sent):
    url = server.ticket([]).replace("//", "//" + userinfo)
    htsget.get_ticket(url, **options)
    assert server.requests[0].headers.get_all("Authorization") == [sent]
    # Of two that were given, one is not sent.
    is_replaced = "bearer_token" in options and options.get("headers")
    assert ("Authorization" in caplog.text) == bool(is_replaced or userinfo == "me:p@")


def test_a_token_function_is_called_for_each_ticket_request(server):
    tokens = iter(["one", "two", "three"])
    file = server.at("/b", File(pattern(3000), uses=1))
    entries = [sliced("%s?%d" % (file, number), 3000, 2) for number in range(9)]
    url = server.ticket(lambda number: entries[number], faults=[Fault(503)])
    check(pattern(3000), url, bearer_token=lambda: next(tokens), connections=1)
    sent = [r.headers["Authorization"] for r in server.asked("/reads/x")]
    assert sent == ["Bearer one", "Bearer two", "Bearer three"]


@pytest.mark.parametrize("content", [b"nonsense here\n", b"\xff\xfe\x00", None])
def test_a_netrc_that_cannot_be_used_is_one_warning(server, netrc, caplog, content):
    if content is None:
        netrc.unlink()
        netrc.mkdir()
    else:
        netrc.write_bytes(content)
    check(b"x", server.ticket([data_uri(b"x")], faults=[Fault(503), Fault(503)]))
    assert caplog.text.count(str(netrc)) == 1
    assert [r.headers["Authorization"] for r in server.requests] == [None] * 3


ALLOW = "HTS_ALLOW_UNENCRYPTED_AUTHORIZATION_HEADER"
IN_CLEAR = "plain http|proxy"
BEARERS = [{"bearer_token": "hush"}, {"headers": {"aUTHORIZATION": "bEaReR  hush"}}]


@pytest.mark.parametrize("host", ["htsget.invalid", "127.0.0.1:1", "[::1]"])
@pytest.mark.parametrize("options", BEARERS)
def test_no_token_is_sent_in_clear(server, monkeypatch, host, options):
    # A proxy is where all of these would go.
    near = server.ticket([data_uri(b"x")])
    monkeypatch.setenv("http_proxy", server.url)
    url, refused = "http://%s/reads/x?hush" % host, (htsget.RequestError, IN_CLEAR)
    assert "hush" not in str(check(refused, url, **options))
    monkeypatch.setenv(ALLOW, "yes")
    check(refused, url, **options)
    assert server.connections == 0
    monkeypatch.setenv(ALLOW, "I understand the risks")
    check(b"x", url, **options)
    assert "hush" in server.requests[0].headers["Authorization"]
    # Loopback without a proxy is no network.
    monkeypatch.delenv(ALLOW)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.0/8")
    check(b"x", near, **options)


@pytest.mark.parametrize("is_redirected", [False, True])
def test_no_token_of_a_ticket_is_sent_in_clear(server, monkeypatch, is_redirected):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.at("/b", b"abc")
    away = "http://data.invalid/b"
    near = server.at("/near", Fault(302, headers={"Location": away}))
    url = server.ticket([(near if is_redirected else away, BEARERS[1]["headers"])])
    error = check((htsget.HtsgetException, IN_CLEAR), url, max_retries=0)
    assert not isinstance(error, htsget.RetryableError)
    assert server.asked("/b") == []
    monkeypatch.setenv(ALLOW, "I understand the risks")
    check(b"abc", url)


# ---- the ticket

BLOCK = htsget.DataBlock
MD5_OF_X = hashlib.md5(b"x").hexdigest()
URLS_1 = [{"url": "http://h/p?q", "headers": {"Range": "bytes=0-1"}}]
URLS_2 = [{"url": "data:,a", "class": "header", "headers": None}]
URLS_2 += [{"url": "data:,b", "urlClass": "body", "x": {}}]
BLOCKS_1 = [BLOCK("http://h/p?q", {"Range": "bytes=0-1"}, None)]
BLOCKS_2 = [BLOCK("data:,a", {}, "header"), BLOCK("data:,b", {}, "body")]


# A ticket's "htsget" object, and the Ticket.
@pytest.mark.parametrize("document, expected", [
    ({"urls": []}, (None, [], None)),
    ({"format": "bam", "md5": MD5_OF_X, "urls": URLS_1}, ("BAM", BLOCKS_1, MD5_OF_X)),
    ({"format": None, "x": [1], "urls": URLS_2}, (None, BLOCKS_2, None)),
])  # fmt: skip
def test_a_ticket_is_read(server, document, expected):
    for text in ('{"htsget": %s}', '\ufeff \n{"a": 1, "htsget": %s, "b": []}'):
        url = server.at("/t", (text % json.dumps(document)).encode())
        assert list(htsget.get_ticket(url)) == list(htsget.Ticket(*expected))


def entry(url="http://h/", **more):
    return {"htsget": {"urls": [dict({"url": url}, **more)]}}


# What is no ticket: JSON, or a document that becomes JSON.
BROKEN_TICKETS = [
    "", "[]", "{", '{"u": "hush-1', '["hush-1"]',
    '{"htsget": {"urls": [], "x": "\\ud800", "y": ' + "9" * 100000 + "}",
    b'{"u": "hush-1\xff"}', "[" * 200000, '{"a":' * 200000, {"htsget": 1},
    {"htsget": {}}, {"htsget": {"urls": [], "format": 1}},
    {"htsget": {"urls": [], "md5": "xyz"}},
    {"htsget": {"error": "NotFound", "message": "gone"}}, entry(1),
    entry("data:,", **{"class": 1}), entry(headers={"A": 1}),
    entry(headers={"A": "hush-1\r\nB: y"}), entry(headers={"A b": "hush-1"}),
    entry(headers={"A": "hush-1\u20ac"}), entry(headers={"Range": "bytes=5-4"}),
    entry(headers={"Range": "bytes=-5"}), entry(headers={"Range": "bytes=0-1,4-5"}),
    entry("file:///etc/passwd"), entry("/etc/passwd"), entry("http://h/a b?hush-1"),
    entry("http://u:hush-1@h/\u0001"), entry("http://h%0d%0aX-Evil:%20yes/"),
    entry("http://[::1/"), entry("data:;base64"), entry("data:;base64,a$b="),
    entry("data:;base64,hush-1"), entry("data:,\ud800"), entry("http://h%5b/"),
]  # fmt: skip


# What came instead of a ticket, and what the error says.
@pytest.mark.parametrize("body, words", [
    (make_bam(10), "BAM file.*curl"), (b"BAM\1" + bytes(50), "BAM file.*curl"),
    (make_cram(100), "CRAM file.*curl"), (make_bcf(10), "BCF file.*curl"),
    (make_vcf(9), "VCF file.*curl"), (bgzf(make_vcf(9)), "VCF file.*curl"),
    (gzip.compress(make_vcf(9)), "VCF file.*curl"),
    (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "web page"),
    (b"\xef\xbb\xbf\r\n <HTML lang=en>\n<body>hello</body>", "web page"),
    (b'<?xml version="1.0"?>\n<Error><Code>Denied</Code></Error>', "Denied"),
    *((broken, "") for broken in BROKEN_TICKETS),
], ids=itertools.count())  # fmt: skip
def test_a_broken_ticket_is_one_short_protocol_error(server, body, words):
    if not isinstance(body, bytes):
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
    error = check((htsget.ProtocolError, words or None), server.at("/t", body))
    while error is not None:
        assert len(str(error)) < 500 and "hush" not in repr(error)
        error = error.__cause__ or error.__context__
    assert len(server.requests) == 1


# The beginning of an endless body; MiB that are sent at least (but a chunk), at most.
ENDLESS_BODIES = [(make_bam(10), 0, 20), (b'{"x": "', 63, 100)]


@pytest.mark.parametrize("start, least, most", ENDLESS_BODIES, ids=["BAM", "JSON"])
def test_an_endless_body_is_given_up(server, start, least, most):
    def endless(handler):
        handler.start(200, {"Connection": "close"})
        handler.send(start)
        while server.sent < 200 * MIB:
            handler.send(b"x" * 65536)

    words = "BAM|too (large|long|big)|limit|more than|64 MiB"
    check((htsget.ProtocolError, words), server.at("/t", endless))
    assert least * MIB <= server.sent < most * MIB


# A data URI, and its content (None: a ProtocolError).
@pytest.mark.parametrize("uri, content", [
    ("data:,abc", b"abc"), ("data:,a%20%FFb", b"a \xffb"),
    ("data:text/plain;charset=utf-8,a+b", b"a+b"), ("data:;base64,YWJj", b"abc"),
    ("DATA:application/octet-stream;BASE64,YWJj", b"abc"), ("data:base64,YWJj", b"abc"),
    ("data:,", b""), ("data:;base64,_-8=", None), ("data:;base64,YWJ", None),
])  # fmt: skip
def test_inline_data(server, uri, content):
    url = server.ticket([uri, data_uri(b"|")])
    check(htsget.ProtocolError if content is None else content + b"|", url)


def test_a_ticket_shows_no_secrets():
    block = BLOCK("http://u:hush@h/x?sig=hush", {"Authorization": "hush"})
    for text in (repr(htsget.Ticket("BAM", [block])), repr(block)):
        assert "http://h/x" in text and "Authorization" in text
        assert "hush" not in text


def test_a_ticket_of_the_callers_is_checked_too(server):
    good = BLOCK(server.at("/b", b"x") + "?a#fragment")
    wrong = [BLOCK("file:///etc/passwd"), BLOCK("data:;base64,?")]
    wrong += [BLOCK("http://h/", h) for h in ({"A": "x\r\ny"}, {"Range": "bytes=-5"})]
    for block in wrong:
        check(htsget.HtsgetException, htsget.Ticket(None, [good, block], None))
    assert server.requests == []
    check(b"x", htsget.Ticket(None, [good], None))
    assert server.requests[0].path == "/b?a"


@pytest.mark.parametrize("status", [400, 404, 451, 501])
def test_a_refusal_is_a_client_error_with_type_and_message(server, status):
    url = server.at("/t", lambda h: h.refuse(status, "SomeType", "some text"))
    error = check(htsget.ClientError, url)
    expected = (status, "SomeType", "some text")
    assert (error.status, error.error, error.message) == expected
    assert all(str(value) in str(error) for value in (*expected, url))
    assert "some text" in error.body and str(status) in error.exception_str
    assert len(server.requests) == 1 and error.body not in repr(error)


ERROR_PAGE = b"<html><head>%s</head><body>\r\n<center><h1>403 Stop</h1></center></body>"


# The body of an error, and what of it is shown.
@pytest.mark.parametrize("body, shown", [
    (b"plain text", "plain text"),
    (b'{"message": "of another kind"}', "of another kind"),
    (b'{"detail": "no such sample"}', "no such sample"),
    (b'{"header": {"userMessage": "a private one"}}', "a private one"),
    (b'{"error": {"code": 7, "message": "nested text"}}', "nested text"),
    (ERROR_PAGE % b"", "403 Stop"),
    (ERROR_PAGE % b"<title>Not\n now</title>", "Not now"),
    (b"<!DOCTYPE html><HTML><TITLE lang=en>Gone</TITLE><p>and so on", "Gone and so on"),
    (b"<html>\r\n" + b"x " * 50000, "x x"),
    (b"<Error><Code>Denied</Code><Message>Too late</Message></Error>", "Too late"),
    (b'{"htsget": [1]}', "HTTP"),
    (b'{"htsget": {"urls": [{"url": "http://h/?hush', "HTTP"),
    (b"\xff\x00\x1b[31m", "HTTP"), (b"", "HTTP"),
], ids=itertools.count())  # fmt: skip
def test_the_words_of_an_error_body_are_shown(server, body, shown):
    for status in (404, 503):
        url = server.at("/t", Fault(status, body=body))
        text = str(check(htsget.HtsgetException, url, max_retries=0))
        assert shown in text and str(status) in text
        assert len(text) < 500 and text.isprintable()
        assert not re.search("[<>{}]|hush", text)


HEADER_BLOCK = {"url": data_uri(b"x"), "class": "header"}
BODY_BLOCK = dict(HEADER_BLOCK, **{"class": "body"})
LIST = [{"name": "chr1", "start": 10, "end": 20}, {"name": "2"}]
SEEN = {"referenceName": "1", "format": "BAM", "start": 10, "end": 20}
RULES = [{"location": {}, "rules": [SEEN, dict(SEEN, end=None)]}]


# Blocks, options, what this login may see, and the words of a warning.
@pytest.mark.parametrize("blocks, options, allowed, words", [
    ([HEADER_BLOCK] * 2, {}, [], "header"),
    ([HEADER_BLOCK], {"reference_name": "1"}, [], "header"),
    ([HEADER_BLOCK], {"data_class": "header", "data_format": "BAM"}, [], ""),
    ([HEADER_BLOCK, BODY_BLOCK], {}, [], ""), ([data_uri(b"x")], {}, [], ""),
    ([data_uri(b"x")], {}, LIST, "see only chr1:11-20, 2"),
    ([data_uri(b"x")], {}, RULES, "see only 1:11-20, 1:11-"),
    ([data_uri(b"x")], {}, {"a": ["\n\x1b"]}, 'see only {"a":["\\n\\u001b"]}'),
    ([data_uri(b"x")], {}, ["x" * 1000], 'see only ["x'),
    ([data_uri(b"x")], {}, [dict(LIST[0], start=1e999)], 'see only [{"name":"chr1"'),
])  # fmt: skip
def test_what_is_left_out_is_a_warning(server, caplog, blocks, options, allowed, words):
    url = server.ticket(blocks, allowed=allowed)
    check(b"x" * len(blocks), url, verify=False, **options)
    messages = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [words in message for message in messages] == [True] * bool(words)
    assert all(len(m) < 400 and m.isprintable() for m in messages)


def test_a_mutated_ticket_is_a_ticket_or_a_protocol_error(server):
    inline = {"url": data_uri(b"abc"), "class": "header", "headers": {"A": "b"}}
    blocks = [closed("http://h:80/p?q=1", 10, 20), inline]
    right, rng = ticket_json(blocks, format="BAM", md5=MD5_OF_X), random.Random(5)
    for _ in range(200):
        raw = bytearray(right)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(raw))
            stop = start + rng.choice((1, 3, 20))
            odd = bytes(rng.choice(b'"{}[]:,\\0a\xff\x00 ') for _ in "ab")
            raw[start:stop] = rng.choice((odd, b"", bytes(raw[start:stop]) * 9))
        try:
            repr(htsget.get_ticket(server.at("/t", bytes(raw)), timeout=5))
        except htsget.ProtocolError as error:
            assert len(str(error)) < 1000 and str(error).isprintable(), raw


# ---- retry policy


TRANSIENT = [408, 429, 500, 502, 503, 504, 520, 522, 524, 529]


@pytest.mark.parametrize("place", ["ticket", "block"])
@pytest.mark.parametrize("status", [*TRANSIENT, 402, 405, 406, 451, 501, 505, 519, 530])
def test_statuses_that_pass_are_retried(server, status, place):
    is_retried = status in TRANSIENT
    expected = htsget.RetryableIOError if is_retried else htsget.ClientError
    source = spoiled(server, place, [Fault(status, times=None)])
    error = check(expected, source, "path", max_retries=2)
    assert len(server.requests) == (3 if is_retried else 1)
    refusal = error.__cause__ if is_retried else error
    assert (type(refusal), refusal.status) == (htsget.ClientError, status)


@pytest.mark.parametrize("fault, error", [
    (Fault(cut=5), htsget.ContentLengthMismatch),
    (Fault(reset=True), htsget.RetryableIOError),
    (Fault(raw=b""), htsget.RetryableIOError),
    (Fault(raw=b"no http\r\n\r\n"), htsget.RetryableError),
    (Fault(stall=True), htsget.RetryableIOError),
    (Fault(wait=True), htsget.RetryableIOError), (Fault(503), htsget.RetryableIOError),
], ids=["cut", "reset", "closed", "garbage", "stalled", "silent", "503"])  # fmt: skip
def test_a_failure_that_passes(fault, error):
    """It costs a retry, and with none left it is raised."""
    timeout = 0.15 if fault.get("stall") or fault.get("wait") else 5

    def one(place, times, retries, expected):
        with Server() as server:
            source = spoiled(server, place, [fault] * times, b"abcdefg")
            check(expected, source, max_retries=retries, timeout=timeout)

    places = ["ticket", "block"] * 2
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        # At the same time, as some cases wait.
        rows = (1, 1, 2, 2), (3, 3, 1, 1), (b"abcdefg", b"abcdefg", error, error)
        list(pool.map(one, places, *rows))


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("size, is_progress", [(65536, True), (30000, False)])
def test_64_kib_of_new_bytes_are_progress(server, size, is_progress, framing):
    data = pattern(10 * size)
    file = File(data, framing=framing, faults=[Fault(cut=size, times=9)])
    url = server.ticket([closed(server.at("/b", file), 0, len(data))])
    expected = data if is_progress else htsget.RetryableError
    check(expected, url, max_retries=1, connections=1)


def test_the_end_of_a_block_is_progress(server):
    file = File(b"abc", faults=[Fault(503), None] * 9)
    url = server.ticket([server.at("/b", file)] * 9)
    check(b"abc" * 9, url, max_retries=1, connections=1)


def test_bytes_that_are_read_again_are_no_progress(server):
    data = pattern(200000)
    file = File(data, ranges=False, faults=[Fault(cut=100000, times=None)])
    url = server.ticket([server.at("/b", file)])
    check(htsget.RetryableError, url, max_retries=3)
    assert len(server.asked("/b")) <= 6


@pytest.mark.parametrize("retries", [-1, sys.maxsize, 1 << 80])
def test_without_a_limit(server, retries):
    source = spoiled(server, "block", [Fault(500, times=40)])
    check(b"abc", source, max_retries=retries)


def test_waits_are_doubled_and_bounded(server, caplog):
    times = []
    fault = Fault(503, times=3, run=lambda handler: times.append(time.monotonic()))
    last = Fault(200, run=fault.get("run"))
    check(b"abc", spoiled(server, "ticket", [fault, last]), retry_wait=0.05)
    waits = [float(text) for text in re.findall(r"in ([\d.]+) s", caplog.text)]
    passed = [after - before for before, after in zip(times, times[1:])]
    assert len(waits) == len(passed) == 3
    for number in range(3):
        # The messages have one digit after the point.
        assert waits[number] <= 0.06 * 2**number + 0.05
        assert passed[number] >= 0.049 * 2**number


EPOCH, LATER = (email.utils.formatdate(t, usegmt=True) for t in (1e9, 1e9 + 50))


@pytest.mark.parametrize("value, date, seconds", [
    ("40", None, 40), ("0", None, 0), ("-5", None, 0), ("nonsense", None, 0),
    ("", None, 0), ("1.5", None, 0), (EPOCH, EPOCH, 0), ("Garbage, 99", EPOCH, 0),
    # By the server's clock: it may be wrong, and so may be this machine's.
    (LATER, EPOCH, 50),
])  # fmt: skip
def test_retry_after_is_waited_for(server, caplog, value, date, seconds):
    """A wait ends when the stream is closed."""
    fault = Fault(503, headers={"Retry-After": value, "Date": date})
    stream = htsget.open(spoiled(server, "block", [fault]), **QUICK)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, stream:
        result = pool.submit(stream.read)
        while "trying again" not in caplog.text:
            time.sleep(0.002)
        assert "in %d.0 s" % seconds in caplog.text
        if seconds == 0:
            assert result.result() == b"abc"
            return
        time.sleep(0.05)
        assert len(server.requests) == 1
    assert result.exception()


# ---- transport


BODY = pattern(30000, 9)
INLINE = ticket_json([data_uri(b"abc")])


def redirect_to(url, status=302, **headers):
    """A response that redirects; the Location goes out as UTF-8."""
    headers["Location"] = url.encode().decode("latin-1")
    return Fault(status, body=b"moved", headers=headers)


@pytest.fixture
def other_server():
    with Server() as started:
        yield started


# -- connections


def close_silently(handler):
    handler.close_connection = True


@pytest.mark.parametrize("options, count", [
    ({}, 1), ({"framing": "close"}, 6), ({"framing": "HTTP/1.0"}, 6),
    ({"faults": [Fault(run=close_silently, times=None)]}, 6),
])  # fmt: skip
def test_a_connection_is_used_as_long_as_it_lives(server, options, count):
    """And replaced for free where it does not, whether or not the server says so."""
    ticket = server.ticket(sliced(server.at("/b", File(BODY, **options)), len(BODY), 6))
    check(BODY, ticket, connections=1, max_retries=0)
    assert server.connections == count


def test_a_connection_that_dies_under_a_request_is_replaced_for_free(server):
    def die(handler):
        if sum(r.connection == handler.number for r in server.requests) > 1:
            handler.reset()
        else:
            handler.reply(200, b"abc")

    blocks = [server.at("/%d" % number, die) for number in range(4)]
    check(b"abc" * 4, server.ticket(blocks), connections=1, max_retries=0)


@pytest.mark.parametrize("when", ["with", "later"])
def test_bytes_on_an_idle_connection_belong_to_no_block(server, when):
    more, written = in_raw("200 OK\nContent-Length: 3\n\nxyz"), threading.Event()

    def twice(handler):
        handler.start(200, {"Content-Length": "3"})
        for data in [b"abc", more] if when == "later" else [b"abc" + more]:
            handler.wfile.write(data)
        written.set()

    blocks = [server.at("/1", twice), server.at("/2", twice)]
    output = Pipe(lambda pipe: written.wait(5))
    htsget.get(server.ticket(blocks), output, **dict(QUICK, connections=1))
    assert output.getvalue() == b"abcabc"


def test_no_socket_is_left_open(server):
    """After success and after an error; Python warns of those that are."""
    url = server.ticket([server.at("/b", b"abc"), data_uri(b"d")])
    code = """
import contextlib, gc, htsget, io, warnings
warnings.simplefilter("always")
gc.collect()
for url in sys.argv[1:]:
    with contextlib.suppress(htsget.ClientError):
        htsget.get(url, io.BytesIO())
    gc.collect()
"""
    assert run(url, server.url + "/none", code=code) == (0, b"", "")


def test_a_timeout_is_retried_on_a_new_connection(server):
    file = File(BODY, faults=[Fault(wait=True), Fault(cut=9, stall=True)])
    check(BODY, server.ticket([server.at("/b", file)]), timeout=0.15, connections=1)
    connections = [request.connection for request in server.asked("/b")]
    assert len(set(connections)) == len(connections) >= 3


def test_a_host_that_does_not_exist_is_not_retried(server, lookups):
    """Unless it has responded: a resolver that is down must not end a transfer."""
    gone = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    lookups.errors = [gone]
    check((htsget.ProtocolError, "host"), "http://none.invalid/reads/x")
    assert len(lookups) == 1

    def go_down(handler):
        lookups.errors = [gone, gone]

    server.at("/b", File(BODY, faults=[Fault(cut=9, run=go_down)]))
    url = server.url.replace("127.0.0.1", "name.invalid")
    server.ticket([url + "/b"])
    check(BODY, url + "/reads/x", connections=1)
    assert len(lookups) > 4


# -- responses that are broken


def in_raw(text):
    """A response as bytes, with CRLF; its version may be left out."""
    text = "HTTP/1.1 " + text if text[:1].isdigit() else text
    return text.replace("\n", "\r\n").encode()


LENGTH, CHUNKED = "200 OK\nContent-Length: ", "200 OK\nTransfer-Encoding: chunked\n"


@pytest.mark.parametrize("text", [
    "", "garbage\n\n", "200", "2", "abc OK\n\n", "100 Continue\n\n" * 1000,
    LENGTH + "x\n\nabc", LENGTH + "-5\n\nabc", LENGTH + "3, 4\n\nabc",
    LENGTH + "3\nContent-Length: 4\n\nabc", LENGTH + "9" * 5000 + "\n\nabc",
    LENGTH + "3\n", LENGTH[:-8], "200 OK\nno colon\n\nabc",
    "200 OK\nno colon" + CHUNKED[6:] + "\n3\nabc\n0\n\n",
    "200 OK\n" + "X: y\n" * 100000 + "\n", "200 OK\nX: " + "y" * 1000000 + "\n\n",
    "200 OK\nTransfer-Encoding: gzip\n\n",
    CHUNKED + "Content-Length: 3\n\n3\nabc\n0\n\n", CHUNKED + "\nxyz\nabc\n",
    CHUNKED + "\n-5\nabc\n", CHUNKED + "\n-%s\nabc\n" % ("f" * 20),
    CHUNKED + "\n3\nabc\n",
    LENGTH + "3\nContent-Type: multipart/mixed; boundary*=a; boundary*0=b\n\nabc",
    "302 Found\nContent-Length: 0\n\n", "304 Not Modified\n\n",
    "205 Reset Content\nContent-Length: 0\n\n", "204 No Content\n\n",
], ids=lambda text: repr(text[:60]))  # fmt: skip
@pytest.mark.parametrize("place", ["ticket", "block"])
def test_a_broken_response_is_an_error(server, text, place):
    url = spoiled(server, place, [Fault(raw=in_raw(text), times=None)])
    assert len(str(check(htsget.HtsgetException, url, "path", max_retries=1))) < 500


@pytest.mark.parametrize("text", [
    "100 Continue\n\nHTTP/1.1 " + LENGTH + "3\n\nabc",
    "103 Early Hints\nLink: </x>\n\nHTTP/1.1 102 P\n\nHTTP/1.1 " + LENGTH + "3\n\nabc",
    LENGTH + "3\nContent-Length: 3\n\nabc", "HTTP/1.0 " + LENGTH + "3\n\nabc",
    "200\nContent-Length: 3\n\nabc", CHUNKED + "\n3\nabc\n0\n",
    b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc",
    CHUNKED + "\n3;ext=1\nabc\n0\nTrailer: x\n\n",
], ids=repr)  # fmt: skip
def test_an_odd_response_is_right_all_the_same(server, text):
    raw = text if isinstance(text, bytes) else in_raw(text)
    check(b"abc", server.ticket([server.at("/b", Fault(raw=raw))]), max_retries=0)


@pytest.mark.parametrize("framing, reset, is_tls", [
    ("length", False, False), ("length", False, True), ("length", True, False),
    ("length", True, True), ("chunked", False, False), ("chunked", False, True),
    ("chunked", True, False), ("chunked", True, True),
    # TLS without close_notify is no end.
    ("close", False, True),
])  # fmt: skip
def test_a_body_that_is_cut_short(server, tls_server, trusting, framing, reset, is_tls):
    errors = (htsget.ContentLengthMismatch, htsget.RetryableError)
    at = tls_server if is_tls else server
    for cut in (0, 100, len(BODY) - 1):
        fault = Fault(cut=cut, reset=reset, times=None)
        url = at.ticket([at.at("/b", File(BODY, framing=framing, faults=[fault]))])
        check(errors[reset or is_tls], url, "path", max_retries=0, ssl_context=trusting)


# -- what is no data

PAGE = b"<!DOCTYPE html><html><head><title>Maintenance</title></head></html>"


@pytest.mark.parametrize("label, body, words", [
    # Label, body, words of the error if it is an error document.
    ("text/html", PAGE, "page|document"),
    ("text/html; charset=utf-8", b"\n <HTML><p>Sign in</HTML>", "page|document"),
    ("application/octet-stream", PAGE, "page|document"),
    (None, PAGE, "page|document"),
    (None, b"\xef\xbb\xbf<html>", "page|document"),
    ("application/json", b'{"message": "archive closed"}', "archive closed"),
    ("application/problem+json", b'[{"error": "gone"}]', "document|data"),
    ("application/xml", b"<?xml version='1.0'?><Error>x</Error>", "document|data"),
    ("text/xml", b"<Error><Code>AccessDenied</Code></Error>", "document|data"),
    ("application/octet-stream", b'{"error": "data for all we know"}', None),
    ("text/html", make_vcf(10), None),
    ("application/json", make_bam(10), None),
    ("application/json", b'{"a": "\x01\x02"}', None),
    ("text/xml", b"<1", None),
    (None, b"<Error>", None),
])  # fmt: skip
def test_an_error_document_is_no_data(server, label, body, words):
    for framing in ("length", "chunked"):
        file = File(body, framing=framing, headers={"Content-Type": label})
        url = server.at("/" + framing, file)
        ticket = server.ticket([data_uri(b"x"), url, data_uri(b"y")])
        expected = (htsget.ProtocolError, words) if words else b"x" + body + b"y"
        check(expected, ticket, "path")
        assert len(server.asked("/" + framing)) == 1
    # A range of an object may begin with anything.
    check(body, server.ticket([closed(url, 0, len(body))]), verify=False)


@pytest.mark.parametrize("place", ["ticket", "block"])
@pytest.mark.parametrize("fault, count, expected", [
    (Fault(202), 1, htsget.HtsgetException), (Fault(204), 1, htsget.HtsgetException),
    (Fault(205), 1, htsget.HtsgetException),
    (Fault(202, headers={"Retry-After": "0"}, times=2), 3, b"abc"),
])  # fmt: skip
def test_a_success_without_data(server, place, fault, count, expected):
    """It is an error; "not yet" is retried where it says when."""
    check(expected, spoiled(server, place, [fault]), "path")
    assert len(server.requests) == count


# -- the ticket request


@pytest.mark.parametrize("options", [{}, {"regions": [("1",)]}])
def test_a_server_of_htsget_1_0_finds_the_request_acceptable(server, options):
    """As the EGA's does, which knows its own media type only."""

    def route(handler):
        accepted = re.split(r"\s*,\s*", handler.headers["Accept"])
        assert accepted[0] == "application/vnd.ga4gh.htsget.v1.3.0+json"
        is_acceptable = "*/*" in [media.partition(";")[0] for media in accepted]
        handler.reply(200 if is_acceptable else 406, INLINE)

    check(b"abc", server.at("/t", route), **options)


def bomb():
    """Some 300 MiB that begin like a ticket, compressed."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, 31)
    body = deflate.compress(b'{"x": "') + deflate.flush(zlib.Z_FULL_FLUSH)
    # After a full flush the same input gives the same output.
    again = deflate.compress(b"x" * MIB) + deflate.flush(zlib.Z_FULL_FLUSH)
    return body + 300 * again


@pytest.mark.parametrize("coding, framing, make, expected", [
    ("gzip", "length", lambda: gzip.compress(INLINE), b"abc"),
    ("x-gzip", "chunked", lambda: gzip.compress(INLINE), b"abc"),
    ("GZIP", "close", lambda: gzip.compress(INLINE), b"abc"),
    (None, "length", lambda: gzip.compress(INLINE), b"abc"),
    ("gzip", "length", lambda: gzip.compress(INLINE)[:-12], htsget.HtsgetException),
    ("gzip", "length", lambda: b"\x1f\x8b" + BODY[:50], htsget.HtsgetException),
    ("gzip", "length", bomb, (htsget.ProtocolError, "too (large|long|big)|limit")),
])  # fmt: skip
def test_a_ticket_compressed_unasked(server, coding, framing, make, expected):
    file = File(make(), framing=framing, headers={"Content-Encoding": coding})
    check(expected, server.at("/t", file), max_retries=1)
    assert server.requests[0].headers["Accept-Encoding"] == "identity"
    assert len(server.requests) <= (1 if expected == b"abc" else 2)


@pytest.mark.parametrize("framing", ["length", "chunked", "close", "HTTP/1.0"])
def test_a_ticket_that_is_cut_short_is_requested_again(server, framing):
    for count, cut in enumerate([5, 40], 1):
        file = File(INLINE, framing=framing, faults=[Fault(cut=cut)])
        check(b"abc", server.at("/t", file), max_retries=1)
        assert len(server.requests) == 2 * count


# -- redirects


@pytest.mark.parametrize("regions", [None, [("1", 5, 6)]])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirected_ticket_request(server, other_server, status, regions):
    method = "POST" if regions and status != 303 else "GET"
    for at in (server, other_server):
        url = server.at("/reads/x", redirect_to(at.at("/t", INLINE), status))
        check(b"abc", url, regions=regions, headers={"X-Y": "z"})
        request = at.asked("/t")[0]
        assert (request.method, request.body != b"") == (method, method == "POST")
        assert request.headers["X-Y"] == ("z" if at is server else None)


@pytest.mark.parametrize("location, path", [
    ("/t", "/t"), ("t", "/reads/t"), ("//127.0.0.1:{port}/t", "/t"), ("/t#part", "/t"),
    ("?a=1", "/reads/x"), ("/a b\u00e9%20", "/a%20b%C3%A9%20"), ("x:y", None),
    ("file:///etc/passwd", None), ("ftp://127.0.0.1/x", None), ("data:,x", None),
])  # fmt: skip
def test_where_a_location_leads(server, location, path):
    first = redirect_to(location.replace("{port}", str(server.port)))
    url = server.at("/reads/x", File(INLINE, faults=[first]))
    if path is None:
        check(htsget.HtsgetException, url, "path", max_retries=0)
        assert len(server.requests) == 1
    else:
        server.at(path, server.routes.get(path, INLINE))
        check(b"abc", url)
        assert server.requests[1].path.partition("?")[0] == path


def test_redirects_are_bounded_and_their_absence_is_shown(server):
    server.at("/b", lambda h: redirect_to("/b?%d" % len(server.requests))(h))
    check(htsget.HtsgetException, server.ticket([server.url + "/b"]))
    assert 10 <= len(server.asked("/b")) <= 12
    server.at("/c", Fault(302, body=b"the archive has moved"))
    expected = (htsget.ClientError, "the archive has moved")
    check(expected, server.ticket([server.url + "/c"]))


def test_a_blocks_headers_follow_its_redirects(server, other_server):
    other_server.at("/b", File(BODY))
    server.at("/b", redirect_to(other_server.url + "/b"))
    headers = {"Range": "bytes=5-9", "Authorization": "Bearer b", "X-Block": "1"}
    url = server.ticket([(server.url + "/b", headers)])
    check(BODY[5:10], url, bearer_token="t", headers={"X-Caller": "2"})
    for request in server.asked("/b") + other_server.asked("/b"):
        assert {name: request.headers[name] for name in headers} == headers
        assert request.headers["X-Caller"] is None
    assert "Bearer t" not in str([r.headers for r in other_server.requests])


@pytest.mark.parametrize("status", [400, 401, 403])
def test_another_origin_that_refuses_a_blocks_login(server, other_server, status):
    """S3 refuses a pre-signed URL with an Authorization."""
    refusal = Fault(status, match=lambda r: r.headers["Authorization"], times=None)
    url = other_server.at("/b", File(b"abc", faults=[refusal]))
    headers = {"authorization": "Bearer b", "Host": "virtual"}
    block = (server.at("/b", redirect_to(url)), headers)
    check(b"abc", server.ticket([block]), max_retries=0)
    assert {"virtual"} & {r.headers["Host"] for r in other_server.requests} == set()
    assert len(server.asked("/reads/x")) == 1


def test_a_blocks_headers_never_go_from_https_to_http(tls_server, server, trusting):
    url = tls_server.at("/b", redirect_to(server.at("/b", b"abc")))
    for headers in ({"Authorization": "Bearer b"}, {"X-Secret": "s"}):
        ticket = tls_server.ticket([(url, headers)])
        check(htsget.HtsgetException, ticket, ssl_context=trusting)
    assert server.requests == []
    check(b"abc", tls_server.ticket([url]), ssl_context=trusting)


def test_a_redirected_block_is_resumed(server, other_server):
    file = File(BODY, '"1"', faults=[Fault(cut=9000)])
    other_server.at("/b", file)
    server.at("/b", redirect_to(other_server.url + "/b", 307))
    check(BODY, server.ticket([closed(server.url + "/b", 0, len(BODY))]))
    assert other_server.ranges("/b") == ["bytes=0-29999", "bytes=9000-29999"]


def test_cookies_live_as_long_as_a_transfer(server):
    file = File(b"abc", headers={"Set-Cookie": "node=7"})
    ticket = server.ticket([server.at("/b", file)] * 2)
    for _ in range(2):
        check(b"abcabc", ticket, connections=1)
    sent = [request.headers["Cookie"] for request in server.asked("/b")]
    assert sent == [None, "node=7"] * 2


def test_the_user_agent_goes_with_every_request(server):
    ticket = server.ticket([server.at("/b", b"abc")])
    for headers in (None, {"user-agent": "pipeline/7"}):
        check(b"abc", ticket, headers=headers)
    sent = [request.headers.get_all("User-Agent") for request in server.requests]
    assert sent == [["htsget.py/" + htsget.__version__]] * 2 + [["pipeline/7"]] * 2


# -- proxies


class ProxyHandler(Handler):
    """A proxy for http and, with CONNECT, for https; refuses what has not its login."""

    def do_GET(self):
        request = Request(self.command, self.path, self.headers, b"", self.number)
        self.server.requests.append(request)
        has_login = self.headers["Proxy-Authorization"] == self.server.login
        if self.server.refusal or not has_login:
            self.reply(self.server.refusal or 407, b"the proxy's words")
        elif self.command == "CONNECT":
            host, port = self.path.split(":")
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            self.relay(socket.create_connection((host, int(port))))
        else:
            self.reply(200, ticket_json([data_uri(b"via proxy")]))

    do_CONNECT = do_POST = do_GET

    def relay(self, upstream):
        def pump(source, target):
            with contextlib.suppress(OSError):
                for data in iter(lambda: source.recv(65536), b""):
                    target.sendall(data)
            target.close()

        in_background(pump, upstream, self.connection)
        pump(self.connection, upstream)
        self.close_connection = True


@pytest.fixture
def proxy(monkeypatch):
    with Server(handler=ProxyHandler) as started:
        started.login = "Basic " + base64.b64encode(b"me:pw").decode()
        started.refusal = None
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, started.url.replace("//", "//me:pw@"))
        yield started


def test_https_goes_through_a_tunnel(proxy, tls_server, trusting):
    url = tls_server.ticket([tls_server.at("/b", b"abc")])
    check(b"abc", url, ssl_context=trusting, bearer_token="t")
    for request in proxy.requests:
        assert request.method == "CONNECT"
        assert request.headers["Host"] == "127.0.0.1:%d" % tls_server.port
        assert request.headers["Authorization"] is None
    for request in tls_server.requests:
        assert request.headers["Proxy-Authorization"] is None


@pytest.mark.parametrize("status", [407, 403])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses(proxy, tls_server, trusting, status, scheme):
    proxy.refusal = status
    url = tls_server.url if scheme == "https" else "http://localhost:1"
    error = check(htsget.ClientError, url + "/reads/x", ssl_context=trusting)
    assert (error.status, len(proxy.requests)) == (status, 1)
    assert "proxy" in str(error) and "pw" not in str(error)


def test_nobody_listens(monkeypatch):
    """An error that a rerun may overcome; a proxy is named."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = "127.0.0.1:%d" % unused.getsockname()[1]
    check(htsget.RetryableIOError, "http://%s/reads/x" % address, max_retries=1)
    monkeypatch.setenv("http_proxy", "http://me:pw@%s/" % address)
    expected = (htsget.RetryableError, r"through the proxy %s\)" % address)
    check(expected, "http://localhost:1/reads/x", max_retries=0)


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_what_goes_through_a_proxy(proxy, server, monkeypatch, lookups, variable):
    """All that no_proxy does not name; all_proxy is for schemes without one."""
    monkeypatch.delenv("http_proxy")
    monkeypatch.setenv(variable, proxy.url.replace("//", "//me:pw@"))
    for no_proxy, host, is_direct in [
        ("127.0.0.1", "127.0.0.1", True), ("127.0.0.0/8", "127.0.0.1", True),
        ("10.0.0.0/8, 127.0.0.0/30", "127.0.0.1", True),
        ("10.0.0.0/8", "127.0.0.1", False), ("*", "127.0.0.1", True),
        ("name.invalid", "name.invalid", True), (".invalid", "name.invalid", True),
        ("*.invalid", "name.invalid", True), ("*.NAME.invalid", "a.name.invalid", True),
        ("ame.invalid", "name.invalid", False), ("b.invalid", "name.invalid", False),
        ("", "127.0.0.1", False),
    ]:  # fmt: skip
        monkeypatch.setenv("no_proxy", no_proxy)
        url = server.at("/reads/x", INLINE).replace("127.0.0.1", host)
        assert fetch(url) == (b"abc" if is_direct else b"via proxy"), no_proxy
        assert [r.path for r in proxy.requests] == [url] * (not is_direct)
        del proxy.requests[:]


def test_a_socks_proxy_is_refused_by_name(monkeypatch):
    for scheme in ("socks4", "socks5", "socks5h"):
        monkeypatch.setenv("all_proxy", scheme + "://127.0.0.1:1")
        check((htsget.HtsgetException, "SOCKS"), "http://localhost:1/reads/x")


# -- TLS


def test_what_certificates_are_trusted(tls_server, bundle, monkeypatch):
    """And ALPN: some gateways drop a client without, or prefer h2."""
    offered = []
    tls_server.tls.set_alpn_protocols(["h2", "http/1.1"])

    def note(handler):
        offered.append(handler.connection.selected_alpn_protocol())
        handler.reply(200, INLINE)

    url = tls_server.at("/reads/x", note)
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, bundle)
        check(b"abc", url)
        monkeypatch.delenv(name)
    check(htsget.ProtocolError, url)
    url = url.replace("https:", "htsget:")
    assert call(url, "-O", "-", "--cacert", bundle) == (0, b"abc", "")
    assert offered == ["http/1.1"] * 4


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_folders_of_certificates(tls_server, tmp_path, bundle, monkeypatch):
    """SSL_CERT_DIR may name several, as OpenSSL has it."""
    words = ["openssl", "x509", "-noout", "-hash", "-in", bundle]
    hashed = subprocess.check_output(words).decode().strip() + ".0"
    (tmp_path / "empty").mkdir()
    shutil.copy(bundle, str(tmp_path / hashed))
    folders = [str(tmp_path / "empty"), str(tmp_path)]
    monkeypatch.setenv("SSL_CERT_DIR", os.pathsep.join(folders))
    check(b"abc", tls_server.ticket([data_uri(b"abc")]))


def test_a_key_log_that_cannot_be_written(tls_server, tmp_path, bundle, monkeypatch):
    url = tls_server.ticket([data_uri(b"abc")])
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "no" / "log"))
    done = call(url, "-O", "-", "--cacert", bundle)
    assert done[:2] == (0, b"abc"), done.stderr
    if hasattr(ssl.SSLContext, "keylog_filename"):
        assert "SSLKEYLOGFILE" in done.stderr


def test_what_tls_refuses_is_not_retried(server, tls_server, trusting, lookups):
    def refused(words, url, context=trusting):
        check((htsget.ProtocolError, words), url + "/reads/x", ssl_context=context)

    refused("--cacert", tls_server.url, None)
    refused("certificate", tls_server.url.replace("127.0.0.1", "name.invalid"))
    refused("TLS", server.url.replace("http:", "https:"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = ssl.OP_NO_TLSv1_2 | getattr(ssl, "OP_NO_TLSv1_3", 0)
        tls_server.tls.options |= old
        tls_server.tls.set_ciphers("ALL:@SECLEVEL=0")
    refused("TLS", tls_server.url)
    assert (tls_server.connections, server.connections) == (3, 1)


# ---- blocks and parts

OLD, NEW = pattern(300000, 3), pattern(300000, 4)
LONGER = pattern(450000, 5)

# The Range of most blocks, and what belongs to it.
OWN = "bytes=1000-200999"
SLICE = OLD[1000:201000]

# An error of the server's, whichever; where the whole transfer would have to begin
# again and cannot; where a Range is ignored.
ERROR = htsget.HtsgetException
CHANGED = htsget.RetryableError
IGNORES = (htsget.ProtocolError, "ignores the Range header")

# Whether what was delivered can be taken back.
BOTH = pytest.mark.parametrize("kind", ["seekable", "pipe"])


def spoil(status=None, content_range=None, body=None, headers=(), **changes):
    """What is wrong with a response, for `Fault`; an empty Content-Range is none."""
    if content_range is not None:
        headers = dict(headers, **{"Content-Range": content_range or None})
    changes.update({"headers": dict(headers)} if headers else {})
    changes.update({} if body is None else {"body": body})
    return dict(changes, status=status)


def one_block(server, wanted, file, **more):
    """A ticket of one block with a Range, or with None."""
    url = server.at("/b", file)
    return server.ticket([(url, {"Range": wanted}) if wanted else url], **more)


# -- where a response lies: to the ticket's own request


MULTIPART = {"Content-Type": "multipart/byteranges; boundary=x"}
WHOLE_200, IN_CHUNKS = spoil(ranges=False), {"framing": "chunked"}
SHORT, EARLIER = "bytes 1000-100999/300000", "bytes 0-199999/300000"

# Range; how a response is spoiled; the result if it is spoiled once and no retry is
# allowed; the result if all such responses are spoiled, where that is another.
OWN_RESPONSES = {
    "right": (OWN, {}, SLICE),
    "chunks": (OWN, spoil(**IN_CHUNKS), SLICE),
    "chunks without an end": (OWN, spoil(cut=200000, **IN_CHUNKS), SLICE),
    "aligned": (OWN, spoil(206, "bytes 0-262143/300000", OLD[:262144]), SLICE),
    "aligned, chunks": (OWN, spoil(206, EARLIER, OLD[9:200009], **IN_CHUNKS), ERROR),
    "total unknown": (OWN, spoil(206, "bytes 1000-200999/*"), SLICE),
    "total of the slice": (OWN, spoil(206, "bytes 1000-200999/200000"), SLICE),
    "ends early": (OWN, spoil(206, SHORT, OLD[1000:101000]), SLICE),
    "early end, chunks": (OWN, spoil(206, SHORT, OLD[1000:101000], **IN_CHUNKS), SLICE),
    "no Content-Range": (OWN, spoil(206, ""), SLICE),
    "no Content-Range, another length": (OWN, spoil(206, "", OLD[1000:99999]), ERROR),
    "200 with the slice": (OWN, spoil(200, ""), SLICE),
    "200 that names the slice": (OWN, spoil(200), SLICE),
    "200 that names other bytes": (OWN, spoil(200, EARLIER, OLD[:200000]), ERROR),
    "200 with the whole file": (OWN, WHOLE_200, SLICE, IGNORES),
    "200 with less": (OWN, spoil(200, "", OLD[1000:99999]), SLICE, IGNORES),
    "200 with nothing": (OWN, spoil(200, "", b""), SLICE, IGNORES),
    "200, whole file in chunks": (OWN, spoil(ranges=False, **IN_CHUNKS), ERROR),
    "200, slice in chunks": (OWN, spoil(200, "", **IN_CHUNKS), SLICE),
    "206, slice in chunks": (OWN, spoil(206, "", **IN_CHUNKS), SLICE),
    "200, less in chunks": (OWN, spoil(200, "", OLD[9:9999], **IN_CHUNKS), ERROR),
    "200, slice without framing": (OWN, spoil(200, "", framing="close"), ERROR),
    "starts earlier": (OWN, spoil(206, EARLIER, OLD[:200000]), ERROR),
    "later": (OWN, spoil(206, "bytes 2000-200999/300000", OLD[2000:201000]), ERROR),
    "counted from the slice": (OWN, spoil(206, "bytes 0-199999/200000"), ERROR),
    "another unit": (OWN, spoil(206, "items 1000-200999/300000"), ERROR),
    "no total": (OWN, spoil(206, "bytes 1000-200999"), ERROR),
    "backwards": (OWN, spoil(206, "bytes 200999-1000/300000"), ERROR),
    "not numbers": (OWN, spoil(206, "bytes a-b/c"), ERROR),
    "beyond its own total": (OWN, spoil(206, "bytes 1000-200999/9999"), ERROR),
    "more than it names": (OWN, spoil(206, body=OLD[1000:201001]), ERROR),
    "more in chunks than it names": (OWN, spoil(206, body=OLD, **IN_CHUNKS), CHANGED),
    "less than it names": (OWN, spoil(206, body=OLD[1000:200999]), ERROR),
    "multipart": (OWN, spoil(206, "", b"--x", headers=MULTIPART), ERROR),
    # The file ends before the Range.
    "beyond the end": ("bytes=200000-399999", {}, OLD[200000:]),
    "beyond the end, from 0": ("bytes=0-399999", {}, OLD),
    "beyond the end, 200": ("bytes=0-399999", WHOLE_200, OLD, IGNORES),
    "begins at the end": ("bytes=300000-300999", {}, ERROR),
    # An open Range.
    "open": ("bytes=1000-", {}, OLD[1000:]),
    "open, whole file": ("bytes=1000-", WHOLE_200, OLD[1000:], IGNORES),
    "open, 200 with the slice": (
        "bytes=1000-", spoil(200, "", OLD[1000:]), OLD[1000:], IGNORES,
    ),
    "open, total unknown": ("bytes=0-", spoil(206, "bytes 0-299999/*"), OLD, ERROR),
    "open from 0, 200": ("bytes=0-", WHOLE_200, OLD),
    "open from 0, 200 in chunks": ("bytes=0-", spoil(ranges=False, **IN_CHUNKS), OLD),
    "open, 200 names a part": (
        "bytes=0-", spoil(200, "bytes 0-999/300000", OLD[:1000]), ERROR,
    ),
    "open, ends early": ("bytes=0-", spoil(206, "bytes 0-999/300000", OLD[:1000]), OLD),
    # No Range: a 206 is the block, whatever it says.
    "no Range": (None, {}, OLD),
    "no Range, chunks": (None, spoil(**IN_CHUNKS), OLD),
    "no Range, 206": (None, spoil(206), OLD),
    "no Range, 206 with a Content-Range": (None, spoil(206, "bytes 5-9/10"), OLD),
    "no Range, 200 names a part": (
        None, spoil(200, "bytes 0-999/300000", OLD[:1000]), ERROR,
    ),
    "no Range, no length": (None, spoil(framing="close"), OLD),
    "no Range, HTTP/1.0": (None, spoil(framing="HTTP/1.0"), OLD),
    "no Range, nothing": (None, spoil(body=b""), b""),
}  # fmt: skip
FINAL = {"begins at the end", "200, slice without framing", "200, whole file in chunks"}
FINAL.add("more in chunks than it names")


@pytest.mark.parametrize("name", OWN_RESPONSES)
def test_a_response_to_the_tickets_own_request(server, name):
    wanted, changes, once, *more = OWN_RESPONSES[name]
    file = File(OLD, faults=[Fault(**changes)])
    check(once, one_block(server, wanted, file), "pipe", max_retries=0)
    if more == [IGNORES]:
        assert len(server.asked("/b")) == 2
    if name not in FINAL:
        # With a retry, it costs nothing but time.
        again = once if isinstance(once, bytes) else SLICE if wanted == OWN else OLD
        file = File(OLD, '"1"', faults=[Fault(**changes)])
        check(again, one_block(server, wanted, file), "pipe", max_retries=1)
    own = Fault(match=lambda r: r.range == wanted, times=None, **changes)
    ticket = one_block(server, wanted, File(OLD, faults=[own]))
    check(more[0] if more else once, ticket, max_retries=1)
    assert len(server.requests) < 40


@BOTH
@pytest.mark.parametrize("framing", ["chunked", "close"])
@pytest.mark.parametrize("stop", [100000, 200000, 300000])
def test_bytes_in_doubt_whose_number_fits(server, framing, stop, kind):
    """The whole file instead of the slice, cut: also just where the slice would end."""
    doubtful = Fault(**spoil(200, "", OLD[:stop], framing=framing, cut=stop))
    ticket = one_block(server, OWN, File(OLD, etag='"E"', faults=[doubtful] * 2))
    try:
        check(SLICE, ticket, kind)
    except htsget.HtsgetException:
        # Where something was delivered to a pipe, it cannot be taken back.
        assert kind == "pipe" or framing != "chunked" or stop == 300000


def test_a_response_in_doubt_announces_no_size(server):
    """A missing end marker is an error then, which says what may be the matter."""
    data = make_bam(400)[:-28]
    file = File(data, ranges=False, framing="chunked")
    ticket = one_block(server, "bytes=0-%d" % (len(data) - 1), file, format="BAM")
    check((htsget.IntegrityError, "ignores the Range header"), ticket)


# An ETag vouches for what was delivered; a changed Range has worked.
@pytest.mark.parametrize("faults, count", [
    ([Fault(cut=50000), Fault(501)], 1), ([Fault(cut=50000), None], 2),
])  # fmt: skip
@pytest.mark.parametrize("body", [OLD, SLICE])
def test_a_response_in_doubt_where_others_would_be_certain(server, faults, count, body):
    """It costs a retry, and nothing of it is delivered."""
    doubtful = Fault(**spoil(200, "", body, framing="chunked"))
    url = server.at("/b", File(OLD, '"1"', faults=[*faults, doubtful]))
    ticket = server.ticket([closed(url, 1000, 201000)] * count)
    check(SLICE * count, ticket, "pipe", connections=1, max_retries=2)


# -- where a response lies: to a changed Range

CHANGED_RESPONSES = {
    "no ETag": spoil(headers={"ETag": None}),
    "200 with the whole file": spoil(ranges=False),
    "200 with the slice": spoil(200, "", SLICE), "200 with the rest": spoil(200, ""),
    "200 in chunks": spoil(200, "", **IN_CHUNKS),
    "206 in chunks": spoil(206, "", **IN_CHUNKS),
    "206, no Content-Range": spoil(206, ""), "malformed": spoil(206, "bytes */300000"),
    "unframed": spoil(200, "", framing="close"),
    "another start": spoil(206, "bytes 1000-200999/300000"),
    "ticket's slice": spoil(206, "bytes 1000-99999/300000", OLD[1000:100000]),
    "counted from the slice": spoil(206, "bytes 50000-199999/*"),
    "multipart": spoil(206, "", b"--x", headers=MULTIPART),
    "403": spoil(403), "405": spoil(405), "416": spoil(416), "500": spoil(500),
    "501": spoil(501), "no response": spoil(raw=b""),
}  # fmt: skip


@pytest.mark.parametrize("etag, kind", [(None, "seekable"), ('"1"', "pipe")])
@pytest.mark.parametrize("name", CHANGED_RESPONSES)
def test_a_changed_range_that_never_works(server, name, etag, kind):
    changes = dict(CHANGED_RESPONSES[name], match=lambda r: r.range != OWN, times=None)
    file = File(OLD, etag, faults=[Fault(cut=50000), Fault(**changes)])
    check(SLICE, one_block(server, OWN, file), kind, max_retries=2)
    assert server.ranges("/b")[-1] == OWN or (name, etag) == ("no ETag", None)
    assert len(server.asked("/b")) <= 5


@pytest.mark.parametrize("name", sorted(set(CHANGED_RESPONSES) - {"405", "501"}))
def test_a_changed_range_that_fails_after_one_has_worked(server, name):
    """A cache miss or an outage: what has been delivered is not fetched again."""
    spoiled, cut = Fault(**CHANGED_RESPONSES[name]), Fault(cut=70000)
    file = File(OLD, '"1"', faults=[cut, cut, spoiled, spoiled])
    check(SLICE, one_block(server, OWN, file), "pipe", max_retries=3)
    assert set(server.ranges("/b")[2:]) == {"bytes=141000-200999"}


REST, REST_OF_ALL = "bytes=51000-200999", "bytes=50000-299999"
CUT_50000, TWICE_REST = Fault(cut=50000), [None, REST_OF_ALL, REST_OF_ALL, None]
ANOTHER_TOTAL = Fault(**spoil(206, "bytes 0-300000/300001", OLD + b"x", times=2))
NO_TOTAL = Fault(**spoil(206, "bytes 50000-299999/*", times=2))
RESUMED = {
    # Range, responses, and the Ranges that are requested.
    "no Range": (None, [CUT_50000], [None, REST_OF_ALL]),
    "206 without a Range": (None, [Fault(206, cut=50000), Fault(206)], [None] * 2),
    "429": (OWN, [CUT_50000, Fault(429, times=3)], [OWN] + [REST] * 4),
    "503": (OWN, [CUT_50000, Fault(503, times=3)], [OWN] + [REST] * 4),
    "522": (OWN, [CUT_50000, Fault(522, times=3)], [OWN] + [REST] * 4),
    "open": ("bytes=0-", [CUT_50000], ["bytes=0-", REST_OF_ALL]),
    # Without a Range: the query may name a slice, and a Range be one of the whole file.
    "another total": (None, [CUT_50000, ANOTHER_TOTAL], TWICE_REST),
    "total unknown": (None, [CUT_50000, NO_TOTAL], TWICE_REST),
}


@pytest.mark.parametrize("name", RESUMED)
def test_what_is_requested_after_a_cut(server, name):
    """The rest, also after an outage: that does not tell that Ranges do not work."""
    wanted, faults, ranges = RESUMED[name]
    ticket = one_block(server, wanted, File(OLD, faults=faults))
    check(SLICE if wanted == OWN else OLD, ticket, "pipe", max_retries=4)
    assert server.ranges("/b") == ranges


@pytest.mark.parametrize("etag, faults, sent", [
    ('"1"', [], ['"1"']), ('W/"1"', [], [None]), ("1", [], [None]), (None, [], [None]),
    # Another replica, perhaps.
    ('"1"', [Fault(ranges=False)], ['"1"', None]),
])  # fmt: skip
def test_if_range_goes_with_a_strong_etag(server, etag, faults, sent):
    file = File(OLD, etag, faults=[CUT_50000, *faults])
    check(SLICE, one_block(server, OWN, file), max_retries=1)
    assert [r.headers["If-Range"] for r in server.asked("/b")] == [None, *sent]


def test_much_is_not_read_again_because_of_one_response(server):
    data = pattern(1 << 20) * 66
    file = File(data, faults=[Fault(cut=65 << 20), Fault(501), Fault(ranges=False)])
    ticket = one_block(server, "bytes=0-%d" % (len(data) - 1), file)
    check(data, ticket, connections=1)
    assert "bytes=0-%d" % (len(data) - 1) not in server.ranges("/b")[1:]


@pytest.mark.parametrize("refusal", [403, 416, 500])
@pytest.mark.parametrize("make", [closed, signed])
def test_a_server_of_nothing_but_the_tickets_ranges(server, make, refusal):
    cuts = [Fault(match=OWN, cut=70000), Fault(match=OWN, cut=140000)]
    file = File(OLD, only=[OWN], refusal=Fault(refusal), faults=cuts)
    ticket = server.ticket([make(server.at("/b", file), 1000, 201000)] * 2)
    check(SLICE * 2, ticket, "pipe", connections=1)
    if make is signed:
        assert set(server.ranges("/b")) == {OWN}


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("total", ["size", "slice", "*"])
def test_cut_twice(server, framing, total):
    """Whatever the server says about sizes, the rest arrives."""
    faults = [Fault(cut=100000), Fault(cut=170000)]
    file = File(OLD, framing=framing, total=total, faults=faults)
    check(SLICE, one_block(server, OWN, file), "pipe", max_retries=1)
    file = File(OLD, framing=framing, ranges=False, faults=faults)
    check(OLD, one_block(server, None, file), "pipe", max_retries=3)


# -- bytes that are read again


@BOTH
@pytest.mark.parametrize("etags", [('"1"', '"2"'), (None, None), ('"1"', None)])
@pytest.mark.parametrize("new", [NEW, LONGER, NEW[:1000]])
@pytest.mark.parametrize("ranges", [True, False])
def test_an_object_that_is_replaced(server, etags, new, ranges, kind):
    """All of the new object, or an error where that is not possible."""
    if ranges and len(new) == len(OLD) and etags[1] is None:
        pytest.skip("nothing but an MD5 could tell")
    fault = Fault(cut=150000, then=(new, etags[1]))
    file = File(OLD, etags[0], ranges=ranges, faults=[fault])
    expected = CHANGED if kind == "pipe" else new
    check(expected, one_block(server, None, file), kind)
    assert len(server.asked("/reads/x")) <= 3
    assert len(server.asked("/b")) < 30


@BOTH
def test_a_size_that_was_announced_does_not_change(server, kind):
    fault = spoil(206, "bytes 0-299999/*", cut=150000, then=(NEW[:200000], None))
    file = File(OLD, faults=[Fault(**fault)])
    expected = CHANGED if kind == "pipe" else NEW[:200000]
    check(expected, one_block(server, "bytes=0-299999", file), kind)


def test_a_transfer_that_cannot_begin_again(server):
    """An object that is replaced twice; a ticket without a server."""
    fault = Fault(cut=150000, etag='"1"', then=(NEW, '"2"'))
    url = server.at("/1", File(OLD, faults=[fault]))
    file = File(NEW, '"2"', faults=[Fault(cut=100000, then=(LONGER, '"3"'))])
    check(CHANGED, server.ticket(lambda n: [server.at("/1", file) if n else url]))
    check(CHANGED, spoiled(server, "block", [fault], OLD))


def test_what_was_delivered_is_taken_back_before_the_transfer_begins_again(server):
    file = File(OLD, '"1"', faults=[Fault(cut=150000, then=(NEW[:100000], '"2"'))])
    output, calls = io.BytesIO(b"before"), []
    output.seek(0, 2)
    url = server.ticket([data_uri(b"head"), server.at("/b", file)])
    htsget.get(url, output, progress=lambda *call: calls.append(call), **QUICK)
    is_right = output.getvalue() == b"beforehead" + NEW[:100000]
    assert is_right and calls[-1][0] == 100004 < max(calls)[0]


@pytest.mark.parametrize("wrong", [1, 9])
def test_another_replica_is_asked_again(server, wrong):
    """The next one behind the same name may hold the right object."""
    stale = Fault(data=NEW, etag='"2"', ranges=True, times=wrong)
    file = File(OLD, '"1"', faults=[Fault(cut=150000), stale])
    check(OLD, one_block(server, None, file), "pipe", max_retries=1)
    requests = server.asked("/b")[1:]
    assert len({request.connection for request in requests}) == wrong + 1
    assert len(server.asked("/reads/x")) == 1


@pytest.mark.parametrize("wanted", ["bytes=0-299999", "bytes=0-", None])
def test_a_stale_replica_without_an_etag(server, wanted):
    stale = Fault(206, body=NEW[150000:], headers={"ETag": None})
    file = File(OLD, '"1"', faults=[Fault(cut=150000), stale])
    check(OLD, one_block(server, wanted, file), "pipe", max_retries=1)


@BOTH
@pytest.mark.parametrize("first", [0, 1])
def test_two_nodes_with_etags_of_their_own(server, kind, first):
    """Balanced per request: the bytes of one, and nothing begins again."""
    nodes = [Fault(cut=80000), Fault(cut=80000, data=NEW, etag='"2"')]
    one, other = nodes[first], nodes[1 - first]
    file = File(OLD, '"1"', faults=[one, other, one, *[other] * 12, one, one, one])
    check([OLD, NEW][first], one_block(server, None, file), kind, connections=1)
    assert len(server.asked("/reads/x")) == 1


@BOTH
@pytest.mark.parametrize("make", [closed, signed, lambda *span: signed(*span, span[1])])
@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("etag, new", [('"1"', (NEW, '"2"')), (None, (LONGER, None))])
def test_blocks_of_an_object_that_changes(server, make, kind, connections, etag, new):
    file = File(OLD, etag, faults=[None] * (3 // connections) + [Fault(then=new)])
    blocks = sliced(server.at("/b", file), len(OLD), 8, make)
    expected = CHANGED if kind == "pipe" else new[0][: len(OLD)]
    check(expected, server.ticket(blocks), kind, connections=connections)


def test_blocks_that_differ_in_headers_or_query_are_objects_of_their_own(server):
    numbers, wanted = itertools.count(), {"Range": "bytes=0-99999"}
    url = server.at("/b", lambda handler: File(OLD, '"%d"' % next(numbers))(handler))
    blocks = [(url, dict(wanted, HtsgetCurrentBlock=number)) for number in "12"]
    blocks += [(url + "?st=1", wanted), (url + "?st=2", wanted), url, url]
    check(OLD[:100000] * 4 + OLD * 2, server.ticket(blocks), "pipe")
    assert len(server.requests) == 7


# -- a refusal, and tickets that are requested again


def expiring(server, count, **options):
    """A ticket whose URLs work a number of times; see `uses` of File."""
    url = server.at("/b", File(OLD, **options))
    return server.ticket(lambda n: sliced("%s?token=%d" % (url, n), len(OLD), count))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
@pytest.mark.parametrize("connections", [1, 4])
def test_expired_urls_are_renewed(server, connections, status):
    ticket = expiring(server, 4, uses=3, refusal=Fault(status, body=b"expired"))
    tokens = map("token{}".format, itertools.count())
    options = {"connections": connections, "bearer_token": lambda: next(tokens)}
    check(OLD, ticket, "pipe", max_retries=0, **options)
    sent = [request.headers["Authorization"] for request in server.asked("/reads/x")]
    assert sent == ["Bearer token%d" % number for number in range(len(sent))]
    assert 2 <= len(sent) <= 3


def test_repeated_expiry_in_the_middle_costs_little(server):
    ticket = expiring(server, 2, uses=2, faults=[Fault(cut=20000), None] * 6)
    check(OLD, ticket, "pipe", max_retries=1, connections=1)
    assert server.sent < 1.3 * len(OLD)


def test_a_url_that_is_refused_for_good(server):
    ticket = server.ticket([closed(server.at("/b", Fault(403, body=b"no")), 0, 99)])
    assert check(htsget.ClientError, ticket).status == 403
    assert len(server.asked("/b")) == 4
    assert len(server.asked("/reads/x")) == 4


HEAD, BODY_CLASS = data_uri(b"head"), {"url": "@", "class": "body"}
EQUIVALENT = {
    # Ticket and renewed ticket (@: the block's URL, @@: another node's); what that is.
    "the same": (["@"], ["@"], True),
    "another signature": (["@?X-Amz-X=1&a=1"] * 2, ["@?X-Amz-X=2&a=1"] * 2, True),
    "another token": (["@?token=1"] * 2, ["@"] * 2, True),
    "another time of Azure's": (["@?st=1&sig=1"] * 2, ["@?st=2&sig=2"] * 2, True),
    "st without a signature": (["@?st=1"] * 2, ["@?st=2"] * 2, False),
    "another query": (["@?a=1"] * 2, ["@?a=2"] * 2, False),
    "another header": ([("@", {"Block": "1"})] * 2, [("@", {"Block": "2"})] * 2, False),
    "another login": (
        [("@", {"Authorization": "1"})] * 2, [("@", {"authorization": "2"})] * 2, True,
    ),
    "a single block, another path": (["@"], ["@2"], True),
    "another path": (["@"] * 2, ["@2"] * 2, False),
    "another node": (["@"] * 2, ["@@"] * 2, True),
    "another path with a Range": (
        [closed("@", 0, 300000)] * 2, [closed("@2", 0, 300000)] * 2, True,
    ),
    "another Range": (sliced("@", 300000, 2), sliced("@", 300000, 3), False),
    "other inline data": ([HEAD, "@"], [data_uri(b"HEAD"), "@"], False),
    "the same inline data": ([HEAD, "@"], [HEAD, "@"], True),
    "another class": ([BODY_CLASS], [{"url": "@", "class": "header"}, "@"], False),
    "another format": (
        {"urls": [BODY_CLASS]}, {"urls": [BODY_CLASS], "format": "VCF"}, False,
    ),
    "another number": (["@"], ["@", "@"], False),
    "Crypt4GH, encrypted anew": (
        [data_uri(b"crypt4gh1"), "@"], [data_uri(b"crypt4gh2"), "@"], True,
    ),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", EQUIVALENT)
def test_a_renewed_ticket_is_used_if_it_is_equivalent(server, name, kind):
    """Otherwise all begins again, with the new ticket's blocks."""
    *tickets, is_equivalent = EQUIVALENT[name]

    def ticket(number, path):
        text = json.dumps(tickets[min(number, 1)])
        text = text.replace("@@", "http://localhost:%d%s" % (server.port, path))
        return json.loads(text.replace("@", server.url + path))

    for path in ("/b", "/b2", "/c", "/c2"):
        server.at(path, File(OLD, '"1"'))
    options = {"connections": 1, "verify": False}
    expected = fetch(server.ticket(ticket(not is_equivalent, "/c")), **options)
    begins_again = not is_equivalent and kind != "pipe"
    del server.requests[:]

    def is_expired(request):
        return len(server.asked("/reads/x")) == 1

    expires = [Fault(cut=100000), Fault(403, match=is_expired, times=None)]
    server.at("/b", File(OLD, '"1"', faults=expires))
    url = server.ticket(lambda number: ticket(number, "/b"))
    check(expected if is_equivalent or begins_again else CHANGED, url, kind, **options)
    # Once for the refusal, and once more to begin again.
    assert len(server.asked("/reads/x")) == (3 if begins_again else 2)


def test_renewed_urls_that_lead_to_other_nodes(server):
    """Each node makes its own ETags; the bytes are the same."""
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(Server()) for _ in range(4)]
        for number, node in enumerate(nodes):
            faults = [Fault(cut=75000), Fault(403, times=None)]
            node.at("/b", File(OLD, '"%d"' % number, faults=faults))
        nodes[3].at("/b", File(OLD, '"3"'))
        ticket = server.ticket(
            lambda n: [closed(nodes[n].url + "/b", 0, len(OLD)), data_uri(b"tail")]
        )
        check(OLD + b"tail", ticket, "pipe")
        assert sum(node.sent for node in nodes) < 1.3 * len(OLD)


def test_the_nodes_of_an_object_agree(server, other_server):
    def test(kind, expected, *nodes):
        nodes, spans = [*nodes, nodes[-1]], [(0, 150000), (150000, 300000)]
        url = server.ticket(lambda n: [closed(u, *s) for u, s in zip(nodes[n], spans)])
        check(expected, url, kind, connections=1)

    ours = server.at("/1", File(LONGER, faults=[Fault(403, match="=0-", times=None)]))
    other = other_server.at("/1", File(OLD))
    test("pipe", CHANGED, (ours, ours), (other, ours))
    ours, other = [node.at("/2", Fault(403)) for node in (server, other_server)]
    file = File(OLD, '"1"', faults=[Fault(then=(NEW, '"2"'))])
    last = server.at("/3", file).replace("127.0.0.1", "localhost")
    test("seekable", NEW, (ours, ours), (other, ours), (last, last))


@pytest.mark.parametrize("reduced", ["allowed", "header"])
@pytest.mark.parametrize("faults", [
    [Fault(cut=150000), Fault(403, times=None)],
    # The transfer begins again.
    [Fault(cut=150000, then=(LONGER, None))],
])  # fmt: skip
def test_a_renewed_ticket_that_is_reduced(server, reduced, faults):
    """The login has died: what it may not see any more is not discarded."""
    url = server.at("/b", File(OLD, faults=faults))

    def blocks(number):
        if number and reduced == "header":
            return {"urls": [{"url": data_uri(b"head"), "class": "header"}]}
        entries = [{"url": data_uri(b"head"), "class": "header"}, {"url": url}]
        return dict({"urls": entries}, **({"allowed": []} if number else {}))

    check((htsget.ClientError, "expired"), server.ticket(blocks), "path")


# -- what must never be taken for the data

GROWS, REFUSED = [spoil(cut=150000, then=(LONGER, None))], spoil(416, times=None)
WIDER = spoil(206, "bytes 500-201499/300000", OLD[:201000], **IN_CHUNKS)
WIDER_REST = spoil(206, "bytes 50000-201999/300000", OLD[:152000], **IN_CHUNKS)
NEVER_WRONG = {
    # Range, responses; the result, and that of a pipe.
    "another total, open": ("bytes=0-", GROWS, LONGER, CHANGED),
    "another total, closed": ("bytes=0-299999", GROWS, LONGER[:300000], CHANGED),
    "100 of unknown many": (
        "bytes=0-", [spoil(206, "bytes 0-99/*", OLD[:100]), REFUSED], ERROR, ERROR,
    ),
    "100 of 1,000, then 416": (
        "bytes=0-", [spoil(206, "bytes 0-99/1000", OLD[:100]), REFUSED], ERROR, ERROR,
    ),
    "100 of who knows": ("bytes=0-", [spoil(206, "", OLD[:100])], OLD, OLD),
    "the whole file in chunks with the right ETag": (
        OWN, [dict(WHOLE_200, cut=99999, etag='"E"', **IN_CHUNKS), {"etag": '"E"'}],
        SLICE, ERROR,
    ),
    # A damaged Content-Range that begins earlier and ends later.
    "wider, chunks": (OWN, [WIDER], SLICE, SLICE),
    "wider than the rest, chunks": (OWN, [{"cut": 50000}, WIDER_REST], SLICE, SLICE),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", NEVER_WRONG)
def test_never_wrong_bytes(server, name, kind):
    wanted, faults, expected, on_a_pipe = NEVER_WRONG[name]
    faults = [Fault(**changes) for changes in faults]
    ticket = one_block(server, wanted, File(OLD, faults=faults))
    check(on_a_pipe if kind == "pipe" else expected, ticket, kind, max_retries=2)
    assert len(server.requests) < 60


@BOTH
def test_a_renewed_ticket_that_is_cut_elsewhere(server, kind):
    """The ranges are in the queries."""

    def route(handler):
        first, stop = map(int, handler.path.partition("?")[2].split("-"))
        is_refused = (first, stop) == (100000, 300000)
        handler.reply(403 if is_refused else 200, OLD[first:stop])

    url = server.at("/b", route)

    def blocks(number):
        edge = 101500 if number else 100000
        return ["%s?0-%d" % (url, edge), "%s?%d-300000" % (url, edge)]

    check(CHANGED if kind == "pipe" else OLD, server.ticket(blocks), kind)


def test_an_empty_last_block(server):
    """It is not announced, so that the missing EOF marker is an error."""
    urls = [server.at("/1", make_bam(400)[:-28]), server.at("/2", b"")]
    check(htsget.IntegrityError, server.ticket(urls, format="BAM"))


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_a_short_first_block(server, framing):
    """A cache that holds a truncated file answers 200."""
    data = make_vcf(20000)
    half = data.index(b"\n", len(data) // 2) + 1
    short = Fault(**spoil(200, "", make_vcf(5000), framing=framing, times=None))
    urls = [server.at("/1", File(data, faults=[short])), server.at("/2", File(data))]
    blocks = [closed(urls[0], 0, half), closed(urls[1], half, len(data))]
    expected = IGNORES if framing == "length" else ERROR
    check(expected, server.ticket(blocks, format="VCF"))


@pytest.mark.parametrize("total", ["*", "slice", "size"])
def test_a_slice_that_is_named_by_the_query(server, total):
    """And a Range is one of the whole file."""
    whole = File(OLD, total=total)
    named = File(OLD[50000:250000], faults=[Fault(cut=100000)])

    def route(handler):
        (whole if handler.headers.get("Range") else named)(handler)

    ticket = server.ticket([server.at("/b", route) + "?from=50000"])
    check(OLD[50000:250000], ticket, "pipe")


@pytest.mark.parametrize("number", [0, 1])
def test_an_early_end_that_nothing_tells(server, number):
    """The process behind one of two blocks without a length dies, once."""
    faults = [[Fault(cut=70000)] * (index == number) for index in (0, 1)]
    old, new = File(OLD, faults=faults[0]), File(NEW, faults=faults[1])
    old.framing = new.framing = "HTTP/1.0"
    ticket = server.ticket([server.at("/0", old), server.at("/1", new)])
    check(OLD + NEW, ticket, "pipe")


def test_an_end_that_nothing_announces_is_worth_one_warning(server, caplog):
    """Once it has come twice at the same place."""
    ticket = one_block(server, None, File(OLD, framing="close"))
    check(OLD, ticket, "pipe", max_retries=0)
    (record,) = caplog.records
    assert "at byte 300000" in record.getMessage()


def test_a_200_with_the_slice_does_not_tell_the_total(server):
    fault = Fault(**spoil(200, "", OLD[:150000]))
    blocks = sliced(server.at("/b", File(OLD, faults=[fault])), len(OLD), 2)
    check(OLD, server.ticket(blocks), "pipe", connections=1, max_retries=0)


@BOTH
def test_an_object_that_is_published_anew_under_another_url(server, kind):
    expires = [Fault(cut=150000), Fault(403, times=None)]
    urls = [server.at("/1", File(OLD, faults=expires)), server.at("/2", File(LONGER))]
    ticket = server.ticket(lambda n: [opened(urls[min(n, 1)], 0)])
    check(CHANGED if kind == "pipe" else LONGER, ticket, kind)


@pytest.mark.parametrize("encoding, data, is_data", [
    ("br", OLD, False), ("zstd", OLD, False), ("deflate", OLD, False),
    ("compress", OLD, False), ("gzip", gzip.compress(OLD), False),
    ("gzip", bgzf(OLD), True), ("gzip", OLD, True), ("", OLD, True),
    ("identity", OLD, True), ("aws-chunked", OLD, True), ("utf-8", OLD, True),
])  # fmt: skip
def test_a_content_encoding(server, encoding, data, is_data):
    file = File(data, headers={"Content-Encoding": encoding}, faults=[Fault(cut=999)])
    ticket = server.ticket([data_uri(b"##"), server.at("/b", file), data_uri(b"#")])
    refusal = (ERROR, "Content-Encoding")
    check(b"##" + data + b"#" if is_data else refusal, ticket, "pipe")


def test_gzip_magic_where_a_block_is_resumed(server):
    data = bgzf(OLD) + b"\x1f\x8b\x08\0" + OLD
    cut = data.index(b"\x1f\x8b\x08\0")
    headers = {"Content-Encoding": "gzip"}
    file = File(data, '"1"', headers=headers, faults=[Fault(cut=cut)])
    check(data, one_block(server, None, file), verify=False)
    assert len(server.asked("/b")) == 2


@pytest.mark.parametrize("first, label", [
    ("<a", "text/html"), ("{", "application/json"), (" [", "text/json"),
])  # fmt: skip
def test_data_with_the_label_of_an_error_document(server, first, label):
    """Resumed where the next byte is one that such a document begins with."""
    data = OLD[:100000] + first.encode() + b'"a": 1}' + OLD[:50000]
    file = File(data, headers={"Content-Type": label}, faults=[Fault(cut=100000)] * 2)
    for wanted in ("bytes=0-%d" % (len(data) - 1), None):
        check(data, one_block(server, wanted, file), max_retries=1)


@pytest.mark.parametrize("wanted", [
    "bytes=-5", "bytes=5", "bytes=9-5", "lines=1-2", "bytes=0-1,3-4", "0-5", "a-", "",
])  # fmt: skip
def test_a_range_of_a_ticket_that_is_neither_closed_nor_open(server, wanted):
    block = (server.at("/b", File(OLD)), {"Range": wanted})
    check(htsget.ProtocolError, server.ticket([block]), "path")
    assert len(server.requests) == 1


def test_blocks_of_every_kind(server, kind):
    """Inline and remote, with and without Ranges, empty ones, one URL several times."""
    check(b"ab", server.ticket([data_uri(b"a"), data_uri(b"b")]), kind)
    url = server.at("/b", File(OLD, '"1"'))
    blocks = [
        data_uri(b"head"), "data:,a%20b", data_uri(b""), closed(url, 0, 1),
        closed(url, 299999, 300000), (url, {"range": "bytes=5-9"}), opened(url, 299000),
        url, signed(url, 7, 77), server.at("/empty", b""),
        data_uri(b"tail", "application/octet-stream"),
    ]  # fmt: skip
    expected = [b"heada b", OLD[:1], OLD[-1:], OLD[5:10], OLD[299000:], OLD, OLD[7:77]]
    check(b"".join(expected) + b"tail", server.ticket(blocks), kind)


# ---- the window
#
# Where it matters that several requests are in flight, the server waits for them. A
# client begins to read ahead after 100 ms of waiting, so the first responses are late
# ones: all of `latency` LATE, or the first one of a large block (`late`).

LATE = 0.02
LARGE = pattern(4 * MIB + 99, 21)


def blocks_of(server, count=24, size=1000, **options):
    """Blocks that are one file each, and their data."""
    parts = [pattern(size, 100 + number) for number in range(count)]
    urls = [server.at("/%d" % n, File(part, **options)) for n, part in enumerate(parts)]
    return urls, b"".join(parts)


def wrap(server, make):
    """Replace each block's route by what a function makes of it."""
    for path in list(server.routes):
        server.routes[path] = make(server.routes[path])


def threads():
    """Threads that are neither the tests' nor the interpreter's."""
    known = (threading.main_thread(), threading.current_thread())
    return [t for t in threading.enumerate() if t not in known and t.name != "test"]


@pytest.mark.parametrize("limit", [2, 7])
def test_connections_is_the_most_at_the_same_time(server, limit):
    server.latency, (urls, data) = LATE, blocks_of(server)

    def route(file):
        def wait(handler):
            # From here on, until it has happened once.
            if len(server.requests) > 12:
                server.wait_until(lambda s: s.most_active >= limit)
            file(handler)

        return wait

    wrap(server, route)
    check(data, server.ticket(urls), "pipe", connections=limit)
    assert server.most_active == limit
    assert server.most_open <= limit
    assert len(server.requests) == 25


def test_one_connection_needs_no_thread(server):
    server.latency, (urls, data) = LATE, blocks_of(server, 8)
    before, seen = threads(), []
    output = Pipe(lambda pipe: seen.append(threads()))
    htsget.get(server.ticket(urls), output, connections=1)
    assert output.getvalue() == data
    assert all(now == before for now in seen)
    assert server.connections == 1


def test_the_order_is_kept(server):
    (urls, data), rng = blocks_of(server, 30), random.Random(4)

    def at_random(file):
        seconds = rng.random() * 2 * LATE
        run = Fault(run=lambda handler: server.ended.wait(seconds))
        return lambda handler: file.respond(handler, run)

    wrap(server, at_random)
    check(data, server.ticket(urls), "pipe", connections=6)


# -- large blocks


def late(handler):
    handler.server.ended.wait(0.13)


def large(server, *faults, make=closed, **options):
    """A ticket of a block whose first response is late; then come the faults."""
    faults = [Fault(run=late), *faults]
    file = File(LARGE, **dict({"etag": '"1"', "faults": faults}, **options))
    url = server.at("/b", file)
    return server.ticket([make(url, 0, len(LARGE)) if make else url])


def test_a_large_block_is_cut_where_an_etag_vouches_for_its_parts():
    """If it has a Range, or the server says that it heeds them."""

    def test(server, row):
        is_cut, options = row
        check(LARGE, large(server, **options), "path")
        requests = server.asked("/b")
        assert (len(requests) > 1) == is_cut, options
        assert all(request.headers["If-Range"] == '"1"' for request in requests[1:])
        assert server.most_open <= 4
        # Each byte is requested once.
        spans = [[int(n) for n in re.findall(r"\d+", r.range)] for r in requests[1:]]
        spans = sorted(spans) + [[len(LARGE), None]]
        assert all(a[1] + 1 == b[0] for a, b in zip(spans, spans[1:]))

    accepts = {"Accept-Ranges": "bytes"}
    at_once(test, [
        (True, {}), (True, {"framing": "chunked"}), (False, {"make": None}),
        (True, {"make": None, "headers": accepts}), (False, {"make": signed}),
        (False, {"make": None, "etag": None, "headers": accepts}),
        (False, {"etag": None}), (False, {"etag": 'W/"1"'}),
    ])  # fmt: skip


def test_only_one_cut_is_tried_before_one_has_worked(server):
    tried = []

    def note(handler):
        # A client that tries more has some time to do so.
        server.ended.wait(0.15)
        tried.append(len(server.asked("/b")))

    check(LARGE, large(server, Fault(run=note)), connections=8)
    assert tried == [2]


def test_a_cut_that_fails():
    """What has come is not thrown away."""

    def test(server, fault):
        is_page = fault.get("body", b"")[:1] == b"<"
        check(htsget.ProtocolError if is_page else LARGE, large(server, fault), "pipe")
        ranges = server.ranges("/b")
        assert ranges.count(ranges[0]) == 1, fault.changes

    at_once(test, [
        Fault(ranges=False), Fault(403), Fault(500), Fault(503), Fault(cut=100000),
        Fault(raw=b""), Fault(206, headers={"ETag": None}),
        Fault(206, body=pattern(1000, 5), headers={"ETag": '"2"'}),
        Fault(200, body=b"<html>maintenance", headers={"ETag": '"page"'}),
    ])  # fmt: skip


def test_a_stale_node_answers_some_of_the_cuts(server):
    """From an older copy of the same size, without an ETag."""

    def ignore_if_range(handler):
        del handler.headers["If-Range"]

    stale = Fault(data=pattern(len(LARGE), 22), etag=None, run=ignore_if_range)
    check(LARGE, large(server, *[None, stale, stale] * 4), "pipe", max_retries=8)


@pytest.mark.parametrize("kind", ["seekable", "pipe"])
def test_an_object_that_is_replaced_before_it_is_cut(server, kind):
    new = pattern(len(LARGE), 23)
    ticket = large(server, faults=[Fault(run=late, then=(new, '"2"'))])
    check(htsget.RetryableError if kind == "pipe" else new, ticket, kind)


def test_a_response_from_before_a_change_is_no_second_node(server):
    def after(handler):
        server.wait_until(lambda s: s.ranges("/b").count("bytes=200000-299999") > 1)

    old = {"data": OLD, "etag": '"1"'}
    faults = [Fault(run=late, **old), Fault(match="=100000-", run=after, **old)]
    blocks = sliced(server.at("/b", File(NEW, '"2"', faults=faults)), len(NEW), 3)
    check(NEW, server.ticket(blocks), max_retries=1)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_what_follows_a_block_that_cannot_be_cut_is_read_ahead(server, framing):
    """The first block ends only after the second one was requested."""
    requested = threading.Event()
    fault = Fault(run=late, cut=500000, stall=requested)
    slow = File(LARGE, framing=framing, faults=[fault])
    second = File(b"second", faults=[Fault(run=lambda handler: requested.set())])
    urls = [server.at("/1", slow), server.at("/2", second)]
    # If it were not, the first one would time out.
    check(LARGE + b"second", server.ticket(urls), max_retries=0)


def test_a_whole_block_does_not_wait_for_the_first_cut(server):
    """The ticket's own request is no trial: the cut is answered after that one."""
    edge, requested = 2 * MIB + 200000, threading.Event()
    run = Fault(match="=%d-" % edge, run=lambda handler: requested.set())
    wait = Fault(wait=requested, times=None)
    file = File(LARGE[: edge + 99], '"1"', faults=[Fault(run=late), run, wait])
    url = server.at("/b", file)
    ticket = server.ticket([closed(url, 0, edge), closed(url, edge, edge + 99)])
    check(LARGE[: edge + 99], ticket, "pipe", max_retries=0)
    # None of them has timed out.
    assert len(server.asked("/b")) == 3


def test_what_one_block_tells_lets_the_next_be_cut(server):
    """Before its first response, if they are of the same object."""
    size, file = len(LARGE), File(LARGE * 3, '"1"', faults=[Fault(run=late)])
    url = server.at("/b", file)
    first, second = closed(url, 0, size), closed(url, size, 3 * size)
    check(LARGE * 3, server.ticket([first, second]), "pipe")
    assert second[1]["Range"] not in server.ranges("/b")


# -- servers that limit connections or requests


@pytest.mark.parametrize("most, status, after", [(1, 429, "0"), (3, 503, None)])
def test_a_server_that_limits_requests(server, most, status, after):
    """A refusal is no failure then: it costs no retry, and it does not repeat."""
    server.latency, (urls, data), refused = LATE / 2, blocks_of(server, 30), []

    def limited(file):
        def route(handler):
            if server.active > most:
                refused.append(handler.path)
                handler.reply(status, b"", {"Retry-After": after} if after else {})
            else:
                file(handler)

        return route

    wrap(server, limited)
    check(data, server.ticket(urls), "pipe", connections=6, max_retries=2)
    assert len(refused) < 25


def test_everything_is_refused_for_good(server):
    """A refusal of a single request counts, whatever it invites to."""
    server.latency, (urls, _) = LATE, blocks_of(server, 15)
    for number in range(8, 15):
        server.at("/%d" % number, Fault(503, headers={"Retry-After": "0"}))
    check(htsget.RetryableIOError, server.ticket(urls), "path", max_retries=2)
    assert len(server.requests) < 100
    del server.requests[:]
    check(htsget.RetryableIOError, server.ticket(urls[8:9]), max_retries=3)
    assert len(server.asked("/8")) == 4


# -- errors, and readers that are slow


def test_an_outage_that_is_over_before_the_data_is_due(server):
    """A helper has used up its retries: the caller's thread tries again."""
    server.latency, (urls, data) = LATE, blocks_of(server, 30)
    for number in range(15, 18):
        file = server.routes["/%d" % number]
        server.at("/%d" % number, File(file.data, faults=[Fault(500)]))
    check(data, server.ticket(urls), "pipe", max_retries=0)


def test_an_error_comes_after_everything_before_it(server):
    server.latency, (urls, data) = LATE, blocks_of(server, 30)
    server.at("/20", Fault(404))
    output = Pipe()
    with pytest.raises(htsget.ClientError):
        htsget.get(server.ticket(urls), output, **QUICK)
    assert output.getvalue() == data[:20000]


@pytest.mark.parametrize("make, query", [(closed, "?token=%d"), (signed, "&token=%d")])
def test_urls_that_expire_again_and_again(server, make, query):
    """Several parts are refused at the same time, and one of them renews the ticket."""
    data, server.latency = pattern(1200000, 41), LATE
    url = server.at("/b", File(data, uses=5))

    def blocks(number):
        entries = sliced(url, len(data), 24, make)
        return [(url + query % number, headers) for url, headers in entries]

    check(data, server.ticket(blocks), connections=6, max_retries=1)
    assert server.sent < 1.3 * len(data)
    assert len(server.asked("/reads/x")) < 25


def a_server_of_one_connection(server):
    """It leaves the others unanswered: they are given up for the one that is due."""
    turn, owner = threading.Lock(), []

    def alone(file):
        def route(handler):
            if owner[:1] != [handler.number]:
                while not turn.acquire(timeout=0.02):
                    if server.ended.is_set() or not is_connected(handler.raw):
                        handler.close_connection = True
                        return
                owner[:] = [handler.number]
                in_background(release, handler.raw)
            server.ended.wait(LATE / 2)
            file(handler)

        return route

    def release(connection):
        while is_connected(connection) and not server.ended.is_set():
            server.ended.wait(0.01)
        owner.clear()
        turn.release()

    urls, data = blocks_of(server, 60, 65536)
    wrap(server, alone)
    check(data, server.ticket(urls), "pipe", connections=2, timeout=20)


def a_slow_reader(server):
    """A reader that pauses for longer than a server may is no slow server: what is read
    ahead is bounded, and not read twice."""
    data = pattern(1 << 20, 51) * 36
    url, count, paused = server.at("/b", File(data)), 6, []
    server.latency = 0.06

    def pause(pipe):
        if len(pipe.data) > 13 * MIB and not paused:
            before = -1
            while server.sent > before:
                before = server.sent
                server.ended.wait(0.3)
            paused.append(server.sent - len(pipe.data))
            server.ended.wait(3.2)

    output = Pipe(pause)
    ticket = server.ticket(sliced(url, len(data), count, signed))
    htsget.get(ticket, output, connections=2, timeout=20)
    is_right = output.getvalue() == data
    assert is_right
    # The window of 16 MiB, and what the system's buffers take.
    assert paused[0] < 16 * MIB + 3 * 6 * MIB
    assert len(server.asked("/b")) == count
    assert server.sent < 1.1 * len(data)


def test_who_waits_for_three_seconds():
    at_once(
        lambda server, test: test(server), [a_slow_reader, a_server_of_one_connection]
    )


def test_no_thread_can_be_started(server):
    """The limit of a node: the transfer goes on in the caller's thread."""
    server.latency, (urls, data) = LATE, blocks_of(server, 12)
    code = """
import htsget, threading
def start(thread):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
htsget.get(sys.argv[1], sys.stdout.buffer)
"""
    done = run(server.ticket(urls), code=code)
    assert done[:2] == (0, data), done.stderr
    assert server.most_active == 1


@pytest.mark.parametrize("route", [b"x", Fault(404), Fault(wait=True)])
def test_no_thread_is_left(server, route):
    """At the end, after an error, when a stream is closed, when an output fails."""
    server.latency, (urls, data) = LATE, blocks_of(server, 16)
    url = server.ticket([*urls, server.at("/16", route)])

    def fail(pipe):
        if len(pipe.data) > 10000:
            assert threads()
            raise OSError(errno.EPIPE, "closed")

    if route == b"x":
        check(data + b"x", url)
    elif route.status == 404:
        check(htsget.ClientError, url)
    else:
        with htsget.open(url) as stream:
            stream.read(10000)
            assert threads()
        with pytest.raises(OSError):
            htsget.get(url, Pipe(fail))
    for thread in threads():
        thread.join(10)
    assert threads() == []


# ---- output and journal

# Two checkpoints are at most 1 MiB apart, and one chunk of data.
STEP = MIB + (300 << 10)
STEADY = dict(QUICK, connections=1)
NOBODY = 65534

# What most transfers here fetch, where they die, and where they resume at least.
SIZE, DIED = 3 * MIB, 5 * MIB // 2
DATA, LEAST = pattern(SIZE, 31), DIED - STEP

as_root = pytest.mark.skipif(getattr(os, "geteuid", int)() != 0, reason="needs root")
needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


@pytest.fixture
def out(tmp_path):
    """The path that is written."""
    return tmp_path / "out"


def rewrite(path, content):
    with open(str(path), "wb") as file:
        file.write(content)


def holds(path, data):
    """Whether a file is as it should be; pytest would compare long bytes for ever."""
    return contents(path) == data


def snapshot(path):
    """The part file and the journal: their contents, None for one that is missing."""
    return [contents(name) if os.path.exists(name) else None for name in kept(path)]


def restore(path, files):
    for name, content in zip(kept(path), files):
        if os.path.exists(name):
            os.remove(name)
        if content is not None:
            rewrite(name, content)


def die(source, path, position=DIED, **options):
    """Have a transfer to `path` end at `position` as by kill -9: what is written to
    its files after that moment is taken back."""
    files = []
    progress = dying_at(position, lambda: files.extend(snapshot(path)))
    with pytest.raises(Death):
        htsget.get(source, path, progress=progress, **dict(STEADY, **options))
    restore(path, files)


def complete(server, data=DATA, faults=(), **more):
    """A ticket of one block with a Range, the whole of /file."""
    url = server.at("/file", File(data, etag='"1"', faults=faults))
    return server.ticket([closed(url, 0, len(data))], **more)


def killed(server, path, data=DATA, position=DIED, **more):
    """The URL of a transfer that has died."""
    url = complete(server, data, **more)
    die(url, path, position)
    del server.requests[:]
    return url


def begun_at(server, path="/file"):
    """Where the first request for a file begins; far beyond it if there was none."""
    wanted = server.ranges(path)
    return int(re.match(r"bytes=(\d+)-", wanted[0]).group(1)) if wanted else 1 << 60


def resume(server, source, path, data=DATA, **options):
    """The same transfer once more, to its end; where it began."""
    del server.requests[:]
    htsget.get(source, path, **dict(STEADY, **options))
    assert holds(path, data)
    assert not [name for name in kept(path) if os.path.exists(name)]
    return begun_at(server)


def taking(base=object, most=999, returned=int, **more):
    """An output that takes at most so many bytes at a time."""

    def write(self, data):
        self.data += bytes(data[:most])
        return returned(min(len(data), most))

    more.update(data=b"", write=write, writable=lambda self: True)
    return type("Output", (base,), more)()


def time_out(pipe):
    raise TimeoutError("of the output")


# Outputs, and the error that is raised as it is. One returns an integer of numpy's
# kind, one nothing.
@pytest.mark.parametrize("output, error", [
    (taking(), None), (taking(io.RawIOBase), None), (taking(io.BufferedIOBase), None),
    (taking(returned=type("Index", (int,), {})), None),
    (taking(most=1 << 30, returned=lambda count: None), None),
    (taking(most=1 << 30, returned=lambda count: True), None),
    (taking(most=0), OSError), (Pipe(time_out), OSError), (None, ValueError),
    (7, ValueError), (io.StringIO(), ValueError), ("", ValueError),
])  # fmt: skip
def test_short_writes_are_completed_and_errors_are_raised(server, output, error):
    data = pattern(20000)
    url = server.at("/file", File(data, etag='"1"', faults=[Fault(cut=7000)]))
    url = server.ticket(sliced(url, len(data)))
    if not error:
        htsget.get(url, output, **QUICK)
        is_right = output.data == data
        assert is_right
        return
    with pytest.raises((error, htsget.RequestError)) as caught:
        htsget.get(url, output, **STEADY)
    is_refused = isinstance(caught.value, ValueError)
    assert is_refused or not isinstance(caught.value, htsget.HtsgetException)
    assert len(server.requests) == (0 if is_refused else 2)


def test_what_a_flush_says_is_an_error(server):
    with pytest.raises(TimeoutError):
        htsget.get(server.ticket([data_uri(b"x")]), taking(flush=time_out))


@pytest.mark.skipif(not hasattr(os, "set_blocking"), reason="needs set_blocking")
def test_a_non_blocking_output_is_waited_for(server):
    received, (reading, writing) = [], os.pipe()
    os.set_blocking(writing, False)
    with io.open(reading, "rb") as pipe, io.open(writing, "wb", buffering=0) as output:
        reader = in_background(lambda: received.append(pipe.read()))
        htsget.get(complete(server), output, **QUICK)
        output.close()
        reader.join()
    is_right = received == [DATA]
    assert is_right


# How an existing file of 0123456789 is opened, and what is before the data then.
OPENED = dict.fromkeys(["wb", "a path", "a symlink", "a dangling symlink"], b"")
OPENED.update({"r+b": b"01234", "ab": b"0123456789", "a+b": b"0123456789"})


@pytest.mark.parametrize("how", sorted(OPENED))
@pytest.mark.parametrize("changes", [False, True])
def test_what_is_before_the_data_stays(server, out, how, changes):
    target = out.parent / "folder" / "target"
    target.parent.mkdir()
    if "symlink" in how:
        out.symlink_to(os.path.join("folder", "target"))
    if "dangling" not in how:
        out.write_bytes(b"0123456789")
    old, new = pattern(300000, 1), pattern(200000, 2)
    # The object is replaced by a shorter one after much of it was written.
    fault = Fault(cut=250000, then=(new, '"2"')) if changes else Fault(cut=99)
    url = server.ticket([server.at("/file", File(old, etag='"1"', faults=[fault]))])
    if how.startswith("a "):
        htsget.get(url, str(out), **QUICK)
    else:
        is_raw = "+" in how and not changes
        with io.open(str(out), how, buffering=0 if is_raw else -1) as output:
            output.seek(5 if how == "r+b" else 0)
            htsget.get(url, output, **QUICK)
    assert holds(out, OPENED[how] + (new if changes else old))
    # A symlink is followed and not replaced.
    assert out.is_symlink() == target.exists() == ("symlink" in how)
    assert len(list(out.parent.iterdir())) == 2 > len(list(target.parent.iterdir()))


# ---- output and journal: a path


def test_the_file_appears_only_when_it_is_complete(server, tmp_path, out, monkeypatch):
    seen, fsync, link = [], os.fsync, tmp_path / "link"

    def watched(number):
        is_folder = stat.S_ISDIR(os.fstat(number).st_mode)
        seen.append((is_folder, holds(out, data), sorted(os.listdir(str(tmp_path)))))
        fsync(number)

    data = pattern(5000) + b"tail"
    url = server.ticket([server.at("/a", pattern(5000)), data_uri(b"tail")])
    monkeypatch.setattr(os, "fsync", watched)
    for output in (out, str(out)):
        out.write_bytes(b"old")
        os.link(str(out), str(link))
        htsget.get(url, output, **STEADY)
        # Nothing is rewritten in place.
        assert holds(link, b"old")
        os.remove(str(link))
        assert os.listdir(str(tmp_path)) == ["out"]
        # Data and name are forced to the disk in this order; the journal goes last.
        assert seen[0] == (False, False, ["link", "out", "out.part", "out.part.json"])
        if os.name != "nt":
            assert seen[-1] == (True, True, ["link", "out", "out.part.json"])
        del seen[:]


@needs_posix
@pytest.mark.parametrize("name, status", [
    ("EINVAL", 0), ("ENOTSUP", 0), ("ENOSYS", 0), ("EIO", 1), ("ENOSPC", 75),
    ("EDQUOT", 75), ("EFBIG", 75),
])  # fmt: skip
def test_what_fsync_says_is_an_error(server, out, monkeypatch, name, status):
    code, url = getattr(errno, name), complete(server)
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fail(number):
        raise OSError(code, os.strerror(code))

    with tempfile.TemporaryFile() as stdout, contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)
        patch = stack.enter_context(monkeypatch.context())
        if name == "EFBIG":
            # A write fails, at a limit that is lifted later.
            resource.setrlimit(resource.RLIMIT_FSIZE, (DIED, before[1]))
        else:
            patch.setattr(os, "fsync", fail)
        # Some file systems report a full quota only then, for standard output, too.
        for output in ("/dev/fd/%d" % stdout.fileno(), out):
            result = call(url, "-O", output, "-q")
            assert result.status == status, result.stderr
            assert len(result.stderr.splitlines()) == (status > 0)
        if status == 0:
            assert holds(out, DATA)
            return
        with pytest.raises(OSError, match="out") as caught:
            htsget.get(url, out, **STEADY)
    assert caught.value.errno == code and not out.exists()
    assert str(out) in result.stderr
    assert resume(server, url, out) >= LEAST


# An output that is standard output, and the mode in which that was opened.
@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="needs /dev/stdout")
@pytest.mark.parametrize("output, mode", [
    ("-", "wb"), ("/dev/stdout", "ab"), ("/dev/fd/1", "wb"),
])  # fmt: skip
def test_standard_output_is_never_replaced(server, tmp_path, out, output, mode):
    out.write_bytes(b"old")
    data, number = pattern(99999), os.stat(str(out)).st_ino
    file = server.at("/b", File(data, etag='"1"', faults=[Fault(cut=5000)]))
    with io.open(str(out), mode, buffering=0) as stdout:
        stdout.write(b"first")
        result = run(server.ticket([file]), "-O", output, "-W", "0", stdout=stdout)
    assert result.status == 0, result.stderr
    assert holds(out, (b"oldfirst" if mode == "ab" else b"first") + data)
    assert os.stat(str(out)).st_ino == number
    assert os.listdir(str(tmp_path)) == ["out"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_what_is_no_regular_file_is_written_directly(server, tmp_path, out):
    os.mkfifo(str(out))
    received, url = [], complete(server, faults=[Fault(cut=1000), Fault(cut=2000)])
    reader = in_background(lambda: received.append(contents(out)))
    htsget.get(url, out, **QUICK)
    reader.join()
    is_right = received == [DATA]
    assert is_right and os.listdir(str(tmp_path)) == ["out"]
    htsget.get(url, os.devnull, **QUICK)
    assert not os.path.isfile(os.devnull)
    assert not os.path.exists(os.devnull + ".part")


@pytest.mark.parametrize(
    "name", ["missing/out", ".", "file/out", "new/", "new//", "folder/", "folder/../n/"]
)
def test_an_impossible_path_is_refused_first(server, tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    url, path = server.ticket([data_uri(b"x")]), os.path.join(str(tmp_path), name)
    with pytest.raises((OSError, ValueError)):
        htsget.get(url, path, **QUICK)
    result = call(url, "-O", path)
    assert result.status in (1, 2) and len(result.stderr.splitlines()) == 1
    assert server.requests == []
    assert sorted(os.listdir(str(tmp_path))) == ["file", "folder"]


NAMES = ["x" * size for size in (245, 246, 250, 251, 255)]
NAMES += ["\xfc" * 127 + "x", "x" + "\u8d8a" * 84, "\u03b1\u8d8a", os.fsdecode(b"\xff")]
NAMES += ["a\nb", "%s {0} %(x)d", " ", "~", "-", "a\x1b[31m", "..."]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_of_all_kinds_work(server, tmp_path, name):
    path = os.path.join(str(tmp_path), name)
    url = complete(server, faults=[Fault(cut=DIED)])
    assert call(url, "-O", path, "-M", "0", "-c", "1").status == 75
    assert len(os.listdir(str(tmp_path))) == 2
    del server.requests[:]
    result = call(url, "-O", path, "-v", "-c", "1")
    assert result.status == 0, result.stderr
    assert holds(path, DATA) and begun_at(server) >= LEAST
    assert os.listdir(str(tmp_path)) == [name]
    assert (r"\x1b" in result.stderr) == ("\x1b" in name)
    lines = result.stderr.splitlines()
    assert len([line for line in lines if "resuming" in line]) == 1


# Mode and owner of the file that exists, the umask.
SELF = (os.geteuid(), os.getegid()) if hasattr(os, "geteuid") else None
PERMISSIONS = [(0o600, SELF, 0o022), (0o660, SELF, 0o077)]
PERMISSIONS += [(None, SELF, 0o022), (None, SELF, 0o077)]
for owner in ((NOBODY, NOBODY), (0, 12), (NOBODY, 0)):
    PERMISSIONS += [pytest.param(0o640, owner, 0o022, marks=as_root)]


@needs_posix
@pytest.mark.parametrize("mode, owner, umask", PERMISSIONS)
def test_no_file_ever_has_wider_permissions(server, out, mode, owner, umask):
    seen, expected = [], 0o666 & ~umask if mode is None else mode
    if mode is not None:
        out.write_bytes(b"old")
        out.chmod(mode)
        os.chown(str(out), *owner)

    def look(*args):
        found = [path.lstat() for path in sorted(out.parent.iterdir())]
        assert {(s.st_uid, s.st_gid) for s in found} == {owner}
        seen.append([stat.S_IMODE(s.st_mode) for s in found])

    url, before = complete(server), os.umask(umask)
    try:
        htsget.get(url, out, progress=look, **STEADY)
        look()
    finally:
        os.umask(before)
    # Before: the part file, its journal and perhaps the old file.
    assert seen.pop() == [expected] and seen[-1][-2] == expected
    assert [mode for found in seen for mode in found if mode & ~expected] == []
    # What another run has given away is resumed.
    die(url, out)
    assert resume(server, url, out) >= LEAST


def test_where_a_rename_fails_the_data_is_kept(server, out):
    def obstruct(handler):
        os.makedirs(str(out / "folder"))
        handler.reply(200, b"x")

    file = server.at("/file", File(DATA, etag='"1"'))
    url = server.ticket([closed(file, 0, SIZE), server.at("/last", obstruct)])
    result = call(url, "-O", out)
    shutil.rmtree(str(out))
    assert result.status == 1
    assert "out.part" in result.stderr and "complete" in result.stderr
    assert holds(kept(out)[0], DATA + b"x")
    server.at("/last", b"x")
    # Nothing is requested again.
    assert resume(server, url, out, DATA + b"x") > SIZE


@needs_posix
@pytest.mark.parametrize("file_mode, folder_mode", [(0o644, 0o555), (0o444, 0o755)])
def test_what_cannot_be_replaced_keeps_its_content(server, file_mode, folder_mode):
    url, is_root = server.ticket([server.at("/b", b"new")]), os.geteuid() == 0
    # What is still to be imported: not everybody may read where Python is.
    fetch(server.ticket([server.at("/warm", make_bam(1))], path="/reads/warm"))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "out")
        rewrite(path, b"precious")
        for name, mode in ((path, file_mode), (folder, folder_mode)):
            os.chown(name, NOBODY if is_root else -1, -1)
            os.chmod(name, mode)
        if is_root:
            os.setresuid(NOBODY, NOBODY, 0)
        try:
            result = call(url, "-O", path)
        finally:
            if is_root:
                os.setresuid(0, 0, 0)
            os.chmod(folder, 0o755)
        assert result.status == 1 and folder in result.stderr, result.stderr
        assert server.asked("/b") == server.asked("/reads/x") == []
        assert os.listdir(folder) == ["out"] and holds(path, b"precious")
        # The way out.
        assert file_mode == 0o444 or "-O - >" in result.stderr


# ---- output and journal: kill and resume

BEFORE, AFTER = pattern(5000, 8), pattern(7000, 9)


@pytest.mark.parametrize("position, connections", [
    (1, 1), (5001, 4), (2 * MIB, 4), (5000 + SIZE - 1, 1), (12000 + SIZE, 4),
])  # fmt: skip
def test_a_killed_transfer_resumes(server, out, position, connections):
    file = server.at("/file", File(DATA, etag='"1"'))
    url = server.ticket([data_uri(BEFORE), *sliced(file, SIZE), data_uri(AFTER)])
    die(url, out, position, connections=connections)
    assert not out.exists()
    first = resume(server, url, out, BEFORE + DATA + AFTER)
    assert first >= position - len(BEFORE) - STEP


@pytest.mark.parametrize("make, ranges", [(signed, True), (closed, False)])
def test_a_block_that_cannot_be_cut_costs_itself_only(server, out, make, ranges):
    half = SIZE // 2
    wanted = ["bytes=0-%d" % (half - 1), "bytes=%d-%d" % (half, SIZE - 1)]
    blocks = sliced(server.at("/file", File(DATA, only=wanted)), SIZE, 2, make)
    if not ranges:
        halves = ("/half", DATA[:half]), ("/other", DATA[half:])
        blocks = [server.at(path, Fault(data=data)) for path, data in halves]
    url = server.ticket([data_uri(BEFORE), *blocks, data_uri(AFTER)])
    die(url, out)
    first = resume(server, url, out, BEFORE + DATA + AFTER)
    assert first == half or not ranges and server.asked("/half") == []


def test_no_checkpoint_takes_back_an_earlier_one(server, out):
    """Ranges do not work for the moment: what was kept in the block is kept."""
    file = File(DATA, '"1"', faults=[Fault(cut=2 * MIB), Fault(501)])
    block = closed(server.at("/file", file), 0, SIZE)
    url = server.ticket([data_uri(BEFORE), block])
    with pytest.raises(Death):
        htsget.get(url, out, progress=dying_at(DIED), **STEADY)
    assert server.ranges("/file")[-1] == block[1]["Range"]
    assert resume(server, url, out, BEFORE + DATA) >= 2 * MIB - STEP


def test_a_missing_end_marker_is_an_error_after_a_resume_too(server, out):
    """The journal knows that the first block's size was not announced."""
    data = big_bam()[:-28]
    first = server.at("/1", File(data[:MIB], framing="chunked"))
    second = server.at("/file", File(data[MIB:], '"1"'))
    url = server.ticket([first, second], format="BAM")
    die(url, out, len(data) - 1)
    del server.requests[:]
    with pytest.raises(htsget.IntegrityError):
        htsget.get(url, out, **STEADY)
    assert server.asked("/1") == [] and begun_at(server) > 0


def test_the_end_of_a_transfer_is_no_end_of_a_block(server, out):
    """What sockets report while it is being stopped says nothing about their data."""
    server.latency, (urls, head) = LATE, blocks_of(server, 12)
    data, half = pattern(200000, 71), 100000
    # A response that ends where the first one was cut would confirm that end.
    stalled = threading.Event()
    stall = argparse.Namespace(is_set=stalled.set)
    faults = [Fault(cut=half), Fault(cut=half, stall=stall)]
    file = File(data, framing="HTTP/1.0", faults=faults)
    url = server.ticket([*urls, server.at("/half", file), data_uri(b"tail")])
    progress = dying_at(len(head) + half, stalled.wait)
    with pytest.raises(Death):
        htsget.get(url, out, progress=progress, **dict(QUICK, connections=2))
    resume(server, url, out, head + data + b"tail")


def test_deaths_one_after_the_other_lose_nothing(server, out):
    url, least = complete(server), 0
    for position in range(MIB // 2, SIZE, MIB // 2):
        del server.requests[:]
        die(url, out, position)
        assert begun_at(server) >= least
        # Killed again, at the first byte, and while a line was written.
        die(url, out, 0)
        with open(kept(out)[1], "ab") as journal:
            journal.write(b'\n{"block": 0, "offs')
        least = max(0, position - STEP)
    assert resume(server, url, out) >= least


def test_a_checkpoint_leaves_the_total_right(server, out):
    """It is due at the end of the block with which all sizes are known."""
    first, totals = File(DATA[:756000], framing="chunked"), set()
    blocks = server.at("/1", first), server.at("/2", DATA[:60000]), data_uri(b"tail")
    options = dict(STEADY, progress=lambda so_far, total: totals.add(total))
    htsget.get(server.ticket(blocks), out, **options)
    assert totals == {None, 816004}


def test_checkpoints_beyond_a_damage_do_not_count_again(server, out):
    url = killed(server, out)
    part, journal = snapshot(out)
    restore(out, [part[: 3 * MIB // 2] + bytes(9) + part[3 * MIB // 2 + 9 :], journal])
    die(url, out, SIZE - 9)
    assert resume(server, url, out) >= SIZE - STEP


@pytest.mark.parametrize("shared", [False, True])
def test_a_rerun_knows_each_object(server, out, shared):
    """One that was seen after the first checkpoint, or shared a URL, is replaced."""
    new, paths = pattern(SIZE, 32), ("/first", "/file")
    urls = [server.at(path, File(DATA, '"%s"' % path)) for path in paths]
    first = [urls[0], urls[not shared]]
    url = server.ticket(lambda n: [closed(u, 0, SIZE) for u in (urls if n else first)])
    die(url, out, SIZE + DIED)
    server.at("/file", File(new, '"3"'))
    resume(server, url, out, DATA + new)


def test_a_slow_transfer_has_a_checkpoint_each_second(server, out, monkeypatch):
    sizes, real = set(), time.monotonic

    def progress(so_far, total):
        sizes.add(os.path.getsize(kept(out)[1]))
        if len(sizes) > 1:
            raise Death

    url = server.ticket([server.at("/file", File(DATA, etag='"1"', rate=640000))])
    # A second of the client's is an eighth of the server's.
    monkeypatch.setattr(time, "monotonic", lambda: 8 * real())
    with pytest.raises(Death):
        htsget.get(url, out, progress=progress, **STEADY)
    server.at("/file", File(DATA, etag='"1"'))
    assert 0 < resume(server, url, out) < MIB // 2


def test_the_journal_is_appended_to_and_holds_no_secret(server, out):
    data, seen = pattern(6 * MIB), [b""]
    url = server.at("/file", File(data)).replace("//", "//hush1:hush2@")
    url += "?token=hush3&X-Amz-Signature=hush4"
    secret = {"Authorization": "Bearer hush5", "X-Auth": "hush6"}
    source = server.ticket([(url, secret)]) + "?key=hush7"
    options = dict(STEADY, bearer_token="hush8", headers={"X-Key": "hush9"})
    options["progress"] = lambda *args: seen.append(snapshot(out)[1] or b"")
    htsget.get(source, out, **options)
    assert len(set(seen)) > 4
    assert all(after.startswith(before) for before, after in zip(seen, seen[1:]))
    assert all(json.loads(line.decode()) for line in seen[-1].split(b"\n") if line)
    assert b"hush" not in seen[-1] and len(seen[-1]) < 8000
    die(htsget.Ticket(None, [htsget.DataBlock(url, secret, None)], None), out)
    assert b"hush" not in snapshot(out)[1]


# What a crash makes of the part file and the journal, where the transfer then resumes
# at least, and a word that is said if it does not.
HALF = 2 * MIB
CRASHES = {
    "no part file": (lambda p, j: (None, j), 0, None),
    "no journal": (lambda p, j: (p, None), 0, "journal"),
    "journal ahead": (lambda p, j: (p[:HALF], j), HALF - STEP, ""),
    "data ahead": (lambda p, j: (p + pattern(MIB, 3), j), LEAST, ""),
    "zeros at the end": (lambda p, j: (p[:HALF] + bytes(MIB), j), HALF - STEP, ""),
    "zeros for all data": (lambda p, j: (bytes(len(p)), j), 0, "damaged"),
    "half a first line": (lambda p, j: (p, j[:20]), 0, "damaged"),
    "torn last line": (lambda p, j: (p, j[:-9]), LEAST - STEP, ""),
    "a torn line": (lambda p, j: (p, j.replace(j.split(b"\n")[2][9:], b"")), LEAST, ""),
    "zeros after the journal": (lambda p, j: (p, j + bytes(4000)), LEAST - STEP, ""),
    "zeros in the journal": (lambda p, j: (p, j[:-99] + bytes(99)), LEAST - STEP, ""),
    "noise after it": (lambda p, j: (p, j + b"\n" + pattern(300)), LEAST, ""),
    "noise for a journal": (lambda p, j: (p, pattern(3000)), 0, "damaged"),
    "a deep line": (lambda p, j: (p, j + b"\n" + b"[" * 200000), LEAST, ""),
    "other JSON values": (lambda p, j: (p, b"\n[1]\nnull\n7\n"), 0, "damaged"),
    "an old version": (lambda p, j: (p, b'{"block": 0, "begin": 0}\n'), 0, "version"),
    "the first line only": (lambda p, j: (p, j[: j.index(b"\n", 9)]), 0, "checkpoint"),
    "twice": (lambda p, j: (p, j + b"\n" + j), 0, ""),
}


@pytest.mark.parametrize("change, least, word", CRASHES.values(), ids=CRASHES)
def test_a_crash_costs_what_is_not_proven(server, tmp_path, out, change, least, word):
    url = killed(server, out)
    part, journal = change(*snapshot(out))
    restore(out, [part, journal])
    result = call(url, "-O", out, "-c", "1")
    first, said = begun_at(server), result.stderr
    assert result.status == 0 and holds(out, DATA), said
    assert os.listdir(str(tmp_path)) == ["out"]
    assert least <= first <= len(part or b"")
    if first:
        assert re.search(r"resuming .*out.* %d\b" % first, said), said
        assert "damaged" not in said
    elif word:
        assert re.search("starting over.*" + word, said), said


def test_kept_files_that_are_cut_or_damaged_anywhere(server, out):
    data = pattern(5 * MIB // 4, 5)
    url = killed(server, out, data, 9 * MIB // 8)
    part, journal = snapshot(out)
    variants = [(part, journal[:cut]) for cut in range(0, len(journal), 23)]
    for place in range(0, len(journal), 29):
        changed = bytearray(journal)
        changed[place] ^= 1
        variants.append((part, bytes(changed)))
    for size in [MIB - 1, MIB, MIB + 1, *range(0, len(part), 299999)]:
        variants += [(part[:size] + lost, journal) for lost in (b"", bytes(999))]
    for files in variants:
        restore(out, files)
        assert resume(server, url, out, data) <= len(files[0]), files[1]


@functools.lru_cache(None)
def big_bam():
    noise = random.Random(1).getrandbits(SIZE * 8).to_bytes(SIZE, "big")
    return bgzf(b"BAM\1" + noise)


@pytest.mark.parametrize("page", [50000, 2400000])
@pytest.mark.parametrize("data_format", ["BAM", "VCF", "OTHER"])
def test_a_kept_page_of_zeros_is_fetched_again(server, out, data_format, page):
    data = {"BAM": big_bam(), "VCF": make_vcf(SIZE // 20), "OTHER": DATA}[data_format]
    md5 = hashlib.md5(data).hexdigest()
    url = killed(server, out, data, format=data_format, md5=md5)
    page -= page % 4096
    if data_format == "BAM":
        page = data.index(b"\x1f\x8b\x08\x04", page)
    part, journal = snapshot(out)
    restore(out, [part[:page] + bytes(4096) + part[page + 4096 :], journal])
    assert page - STEP <= resume(server, url, out, data) <= page


@pytest.mark.parametrize("refusal", [
    Fault(404), Fault(503), Fault(data=b"BAM\1"), Fault(data=b'{"htsget": 7}'),
    Fault(data=ticket_json([data_uri(b"x")], format="CRAM")), None,
])  # fmt: skip
def test_a_refusal_leaves_what_was_kept(server, out, refusal):
    options = dict(STEADY, data_format="BAM", verify=False, max_retries=0)
    url = complete(server)
    die(url, out, **options)
    routes, before = dict(server.routes), snapshot(out)
    # The ticket request is refused, or that for the data.
    server.at("/reads/x" if refusal else "/file", refusal or Fault(403))
    with pytest.raises(htsget.HtsgetException):
        htsget.get(url, out, **options)
    assert refusal is None or snapshot(out) == before
    server.routes.update(routes)
    assert resume(server, url, out, **options) >= LEAST


def test_another_request_leaves_the_part_file_alone(server, out):
    # This ticket says from the beginning that something is left out.
    url = killed(server, out, allowed=["chr1"])
    before = snapshot(out)
    with pytest.raises(FileExistsError, match="--no-resume"):
        htsget.get(url, out, reference_name="chr2", start=5, **STEADY)
    result = call(url, "-O", out, "-r", "chr2", "-s", "5")
    assert result.status == 1
    assert "--no-resume" in result.stderr and "out.part" in result.stderr
    assert snapshot(out) == before and server.asked("/file") == []
    assert resume(server, url, out) >= LEAST
    die(url, out)
    numbers, other = {os.stat(kept(out)[1]).st_ino}, {"reference_name": "chr2"}
    # The journal is the lock: it is emptied, never replaced.
    other["progress"] = lambda *args: numbers.add(os.stat(kept(out)[1]).st_ino)
    other["resume"] = False
    assert resume(server, url, out, **other) == 0 and len(numbers) == 1
    die(url, out)
    result = call(url, "-O", out, "--no-resume", "-c", "1")
    assert result.status == 0 and holds(out, DATA)
    assert "resuming" not in result.stderr


RANGE = "bytes=0-%d" % (SIZE - 1)
WITH_HEADER = b"header" + DATA + b"end"
RESUMES, OVER, NO_LOGIN = "resuming", "starting over.*ticket.*changed", "login"


def two(url, header=b"header", end=b"end", **remote):
    """A ticket's object: a block of data between two inline ones."""
    block = dict({"url": url, "headers": {"Range": RANGE}}, **remote)
    return {"urls": [{"url": data_uri(header)}, block, {"url": data_uri(end)}]}


LOGIN = {"Range": RANGE, "Authorization": "Basic Mg=="}
HEADER_ONLY = {"urls": [{"url": data_uri(b"header"), "class": "header"}]}

# The ticket of a rerun, and what is said about it.
RERUNS = {
    "the same": (two, RESUMES),
    "another object": (two, RESUMES),
    "signature": (lambda url: two(url + "?X-Amz-Signature=2&X-Amz-Date=3"), RESUMES),
    "path": (lambda url: two(url.replace("/file", "/token2/file")), RESUMES),
    "node": (lambda url: two(url.replace("127.0.0.1", "localhost")), RESUMES),
    "login": (lambda url: two(url, headers=LOGIN), RESUMES),
    "Range": (lambda url: two(url, headers={"Range": RANGE[:-1]}), OVER),
    "class": (lambda url: two(url, **{"class": "body"}), OVER),
    "MD5": (lambda url: dict(two(url), md5=hashlib.md5(WITH_HEADER).hexdigest()), OVER),
    "format": (lambda url: dict(two(url), format="X"), OVER),
    "inline data": (lambda url: two(url, b"other!"), OVER),
    "inline data behind": (lambda url: two(url, end=b"fin"), OVER),
    "fewer blocks": (lambda url: {"urls": two(url)["urls"][1:]}, OVER),
    "an allowed key": (lambda url: dict(two(url), allowed=["chr1"]), NO_LOGIN),
    "only a header": (lambda url: HEADER_ONLY, NO_LOGIN),
}


@pytest.mark.parametrize("name", sorted(RERUNS))
def test_the_ticket_of_a_rerun_decides(server, out, name):
    make, said = RERUNS[name]
    server.at("/token2/file", File(DATA, etag='"1"'))
    file = server.at("/file", File(DATA, etag='"1"'))
    first, second = two(file), make(file)
    url = server.ticket(lambda number: second if number else first)
    die(url, out)
    if name == "another object":
        server.at("/file", File(pattern(SIZE, 32), etag='"2"'))
    fresh = fetch(server.ticket(lambda number: second, "/reads/fresh"))
    before = snapshot(out)
    del server.requests[:]
    result = call(url, "-O", out, "-c", "1")
    assert re.search(said, result.stderr), result.stderr
    if said == NO_LOGIN:
        assert result.status == 1
        with pytest.raises(htsget.ClientError):
            htsget.get(url, out, **STEADY)
        assert snapshot(out) == before and server.asked("/file") == []
        server.ticket(lambda number: first)
        assert resume(server, url, out, WITH_HEADER) >= LEAST
        return
    assert result.status == 0 and holds(out, fresh)
    begun = min(begun_at(server), begun_at(server, "/token2/file"))
    assert begun >= LEAST if said == RESUMES else begun == 0


@pytest.mark.parametrize("position", [MIB, DIED])
def test_encrypted_data_of_two_tickets_is_not_joined(server, out, position):
    """A Crypt4GH header, an inline block, is encrypted anew for each ticket."""
    half = sliced(server.at("/file", File(DATA, etag='"1"')), SIZE, 2)
    inline = [(b"crypt4gh" + pattern(50, n), pattern(70, n)) for n in (1, 2)]
    urls = [[data_uri(a), half[0], data_uri(b), half[1]] for a, b in inline]
    url = server.ticket(urls.__getitem__)
    die(url, out, position)
    # All inline blocks are kept, or none.
    first, second = inline[position < SIZE // 2]
    data = first + DATA[: SIZE // 2] + second + DATA[SIZE // 2 :]
    assert (resume(server, url, out, data) == 0) == (position == MIB)


def given(url, header=b"header", **headers):
    """A ticket as a file has it: given, not requested."""
    blocks = [(data_uri(header), {}), (url, dict({"Range": RANGE}, **headers))]
    return htsget.Ticket(None, [htsget.DataBlock(*b, None) for b in blocks], None)


# Paths of two given tickets, and what else is different in the second one.
GIVEN = {
    "query": ("/v?referenceName=1&sig=", "/v?referenceName=2&sig=", {}),
    "short name": ("/v?st=1", "/v?st=2", {}),
    "path": ("/v1", "/v2", {}),
    "inline": ("/v2", "/v2", {"header": b"other!"}),
    "header": ("/v", "/v", {"HtsgetCurrentBlock": "2"}),
    "Amazon": ("/2?X-Amz-Date=1&X-Amz-Signature=1", "/2?X-Amz-Signature=2", {}),
    "Google": ("/2?X-Goog-Date=1&X-Goog-Signature=1", "/2?X-Goog-Signature=2", {}),
    "Azure": ("/2?id=1&st=1&se=1&sv=2&sig=1", "/2?id=1&st=2&se=2&sv=2&sig=2", {}),
    "CloudFront": ("/2?Expires=1&Signature=1&Key-Pair-Id=1", "/2?Signature=2", {}),
    "token": ("/2?access_token=1", "/2?access_token=3", {}),
}


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_given_tickets_share_a_journal_only_if_equivalent(server, out, name):
    first, second, more = GIVEN[name]
    files = [File(pattern(SIZE, number), etag='"1"') for number in (1, 2)]

    def route(handler):
        words = handler.path + (handler.headers["HtsgetCurrentBlock"] or "")
        files["2" in words](handler)

    for path in ("/v", "/v1", "/v2", "/2"):
        server.at(path, route)
    one, two = given(server.url + first), given(server.url + second, **more)
    die(one, out)
    before = snapshot(out)
    del server.requests[:]
    try:
        htsget.get(two, out, **STEADY)
    except FileExistsError:
        assert snapshot(out) == before and not first.startswith("/2")
        resume(server, one, out, b"header" + files["2" in first].data)
    else:
        assert holds(out, more.get("header", b"header") + files[1].data)
        has_resumed = begun_at(server, second.split("?")[0]) > 0
        assert has_resumed == first.startswith("/2")
        assert has_resumed or name in ("inline", "header")


@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("what", ["md5", "chain", "first"])
def test_a_rerun_after_an_integrity_error_succeeds(server, out, what, is_cut):
    data = big_bam()
    block = data.index(b"\x1f\x8b\x08\x04", 2 * MIB)
    places = {"md5": block + 777, "chain": block, "first": 0}
    spoiled = bytearray(data)
    spoiled[places[what]] ^= 0x55
    fault = Fault(data=bytes(spoiled), **({"cut": len(data) - 5} if is_cut else {}))
    more = {"md5": hashlib.md5(data).hexdigest()} if what == "md5" else {}
    url = complete(server, data, faults=[fault], format="BAM", **more)
    # The wrong byte is kept, and found when the rest has come.
    with pytest.raises((htsget.IntegrityError, htsget.RetryableError)):
        htsget.get(url, out, **dict(STEADY, max_retries=0))
    with contextlib.suppress(htsget.IntegrityError):
        if is_cut:
            htsget.get(url, out, **STEADY)
    assert is_cut or not out.exists()
    assert resume(server, url, out, data) == 0


# ---- output and journal: other processes


@needs_posix
@pytest.mark.parametrize("name, status", [("KILL", -9), ("INT", 130), ("TERM", 143)])
def test_kept_files_are_locked_until_a_death_and_named_then(server, out, name, status):
    url = complete(server, faults=[Fault(cut=DIED, stall=True)])
    with running(url, "-O", out, "-c", 1) as process:
        while len(snapshot(out)[0] or b"") < DIED:
            time.sleep(0.01)
        for is_resuming in (True, False):
            with pytest.raises(BlockingIOError):
                htsget.get(url, out, **dict(STEADY, resume=is_resuming))
        result = call(url, "-O", out)
        assert result.status == 75 and len(server.asked("/file")) == 1
        assert re.search("another process|in use|locked", result.stderr)
        assert str(out) in result.stderr and len(result.stderr.splitlines()) == 1
        said = end_by(process, name)
    assert process.returncode == status
    assert said.count("\n") == said.count("out.part") == (status > 0), said
    assert resume(server, url, out) >= LEAST


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore")
def test_a_forked_process_does_not_keep_the_lock(server, out):
    url, children = complete(server), []

    def fork():
        children.append(os.fork())
        if children[0] == 0:
            time.sleep(2 * PATIENCE)
            os._exit(0)

    with pytest.raises(Death):
        htsget.get(url, out, progress=dying_at(0, fork), **STEADY)
    try:
        resume(server, url, out)
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


# What another process, which no lock has kept away, does to the part file (0) or the
# journal (1) in the middle of a transfer.
MEDDLING = {
    "lengthens": lambda name: rewrite(name, contents(name) + b"x"),
    "shortens": lambda name: os.truncate(name, 9),
    "removes": os.remove,
    "replaces": lambda name: (os.remove(name), rewrite(name, b"other")),
}


@needs_posix
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("what", MEDDLING)
def test_what_is_renamed_is_what_was_written(server, out, number, what):
    out.write_bytes(b"old")
    url, names = complete(server, pattern(300000)), [kept(out)[number]]
    progress = {"progress": lambda *args: names and MEDDLING[what](names.pop())}
    with pytest.raises(BlockingIOError):
        htsget.get(url, out, **dict(STEADY, **progress))
    assert holds(out, b"old") and not names
    assert what != "replaces" or holds(kept(out)[number], b"other")


@needs_posix
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("is_resuming", [True, False])
def test_what_was_renamed_meanwhile_is_not_truncated(server, out, number, is_resuming):
    killed(server, out)
    before, moved = snapshot(out)[number], str(out) + "2"
    fault = Fault(run=lambda handler: os.rename(kept(out)[number], moved))
    url = server.ticket([closed(server.url + "/file", 0, SIZE)], faults=[fault])
    with pytest.raises(BlockingIOError):
        htsget.get(url, out, **dict(STEADY, resume=is_resuming))
    assert contents(moved).startswith(before) and not out.exists()


OBSTACLES = {
    "symlink": lambda name, target: os.symlink(target, name),
    "dangling symlink": lambda name, target: os.symlink(target + "x", name),
    "folder": lambda name, target: os.mkdir(name),
    "FIFO": lambda name, target: os.mkfifo(name),
}


def get_or_refuse(server, url, out):
    """Fetch with doubtful kept files: from the beginning, or an error before."""
    try:
        htsget.get(url, out, **STEADY)
    except OSError as error:
        assert "out.part" in str(error)
        assert server.requests == [] and not out.exists()
    else:
        assert holds(out, DATA) and begun_at(server) == 0
        assert not hasattr(os, "geteuid") or out.stat().st_uid == os.geteuid()


@needs_posix
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("obstruct", OBSTACLES.values(), ids=OBSTACLES)
def test_what_is_no_kept_file_is_no_trap(server, tmp_path, out, obstruct, number):
    url, target = killed(server, out), str(tmp_path / "was")
    name, before = kept(out)[number], snapshot(out)[number]
    os.rename(name, target)
    obstruct(name, target)
    get_or_refuse(server, url, out)
    assert holds(target, before) and not os.path.exists(target + "x")


@as_root
@pytest.mark.parametrize("numbers", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("is_share", [False, True])
def test_somebody_elses_files_are_not_used(server, tmp_path, out, numbers, is_share):
    url = killed(server, out)
    for name in [kept(out)[n] for n in numbers] + [str(tmp_path)] * is_share:
        os.chown(name, NOBODY, NOBODY)
    if is_share:
        # As on a share that shows one owner for every file.
        assert resume(server, url, out) >= LEAST
    else:
        get_or_refuse(server, url, out)


# ---- the verifier

# What becomes of data: it passes, with or without a warning, or is an IntegrityError.
PASSES, WARNED, FAILS = "passes", "passes with a warning", "fails"

BAM, BCF, VCF, CRAM = make_bam(30), make_bcf(15), make_vcf(30), make_cram(1000)
VCF_GZ = bgzf(VCF)
ENDLESS = [("BAM", BAM[:-28]), ("CRAM", CRAM[:-38]), ("VCF", VCF[:-1])]

# How data arrives: the size of the ticket's inline blocks (None: all of it in one),
# and whether the size of everything is announced: where it is not, the last byte comes
# in a chunked response.
ARRIVALS = [(None, True), (1, True), (None, False), (7, False)]


@pytest.fixture
def verdict(server, caplog):
    """A function: what becomes of data, and what is said about it."""

    def function(data, data_format, step=None, is_announced=True, md5=None, **options):
        caplog.clear()
        size = len(data) if is_announced else len(data) - 1
        starts = range(0, size, step or size or 1)
        urls = [data_uri(data[n : min(n + (step or size), size)]) for n in starts]
        if not is_announced:
            urls.append(server.at("/rest", Fault(data=data[-1:], framing="chunked")))
        blocks = [htsget.DataBlock(url) for url in urls or ["data:,"]]
        try:
            is_right = fetch(htsget.Ticket(data_format, blocks, md5), **options) == data
        except htsget.IntegrityError as error:
            return FAILS, str(error)
        assert is_right, "wrong bytes"
        said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        return WARNED if said else PASSES, "\n".join(said)

    return function


def with_subfield(data):
    """BGZF data whose first block has a subfield before the usual one."""
    (size,) = struct.unpack_from("<H", data, 16)
    header = data[:10] + struct.pack("<H", 12) + b"XY\2\0ab" + data[12:16]
    return header + struct.pack("<H", size + 6) + data[18:]


RECORDS = bgzf(b"records", eof=False)
SMALL = bgzf(b"##fileformat=VCFv4.3\n")
SEVERAL = "(several|more than one).*region"

# Data, its format, and the words of the error, None where it passes.
CASES = {
    "BCF": ("BCF", BCF, None),
    "CRAM 3.1": ("CRAM", CRAM.replace(b"\3\0", b"\3\1", 1), None),
    "small letters": ("bam", BAM, None),
    "no format": (None, b"anything", None),
    "no known format": ("OTHER", b"anything", None),
    "further subfields": ("BAM", BAM[:-28] + with_subfield(bgzf(b"records")), None),
    "not compressed": ("BAM", bgzf(b"BAM\1abc", level=0), None),
    "two end markers": ("BAM", BAM + BGZF_EOF, None),
    "an end marker, then records": ("BAM", BAM + RECORDS + BGZF_EOF, None),
    "an end marker, then few bytes": ("BAM", BAM + bgzf(b"BAM") + bgzf(b"##f"), None),
    "no end marker, then a header": ("BAM", BAM[:-28] + bgzf(b"BAM\1"), None),
    "a CRAM end in the middle": ("CRAM", CRAM + bytes(99) + CRAM_EOF, None),
    "CRAM in the middle": ("CRAM", CRAM[:500] + b"CRAM\3\0" + CRAM[500:], None),
    "##fileformat= in a line": ("VCF", VCF + b"1 ##fileformat=VCFv4.3\n", None),
    "nothing": ("BAM", b"", ""),
    "a web page": ("BAM", b"<html>", "BAM"),
    "VCF for BAM": ("BAM", VCF_GZ, "BAM"),
    "BCF for VCF": ("VCF", BCF, "VCF"),
    "CRAM for BAM": ("BAM", CRAM, "BAM"),
    "BAM for CRAM": ("CRAM", BAM, "CRAM"),
    "a byte is missing": ("BAM", BAM[:1000] + BAM[1001:], "byte [0-9]+"),
    "a broken chain, no format": (None, BAM[:1000] + BAM[1001:], "byte [0-9]+"),
    "bytes after the end": ("BAM", BAM + b"x" * 20, "byte %d" % len(BAM)),
    "several BAM": ("BAM", BAM + BAM, SEVERAL),
    "several BCF": ("BCF", BCF + BCF, SEVERAL),
    "several compressed VCF": ("VCF", VCF_GZ + VCF_GZ, SEVERAL),
    "several CRAM": ("CRAM", CRAM + CRAM, SEVERAL),
    "several VCF": ("VCF", VCF + VCF, SEVERAL),
    "several small VCF": ("VCF", SMALL + SMALL, SEVERAL),
    "two end markers between": ("BAM", BAM + BGZF_EOF + BAM, SEVERAL),
    "records between": ("BAM", BAM + RECORDS + BGZF_EOF + BAM, SEVERAL),
    "a second header alone": ("BAM", BAM + bgzf(b"BAM\1", eof=False), SEVERAL),
    "second not compressed": ("BAM", BAM + bgzf(b"BAM\1", level=0), SEVERAL),
    "second with a subfield": ("BAM", BAM + with_subfield(BAM), SEVERAL),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_data_passes_or_is_an_integrity_error(verdict, name):
    data_format, data, words = CASES[name]
    for arrival in ARRIVALS[: None if data else 1] + [(len(data) // 2, True)]:
        result, said = verdict(data, data_format, *arrival)
        assert result == (PASSES if words is None else FAILS), (arrival, said)
        assert re.search(words or "^", said) and (words is not None) == bool(said), said
    assert verdict(data, data_format, verify=False) == (PASSES, "")


CUTS = [("BAM", BAM), ("VCF", bgzf(VCF * 9)), ("CRAM", CRAM), ("VCF", VCF)]


def small_blocks(data):
    """The beginning of BGZF data in three blocks of over 1 KiB; where they end."""
    data, edges = bgzf(gzip.decompress(data)[:3300], 1100, level=0), [0]
    while edges[-1] < len(data):
        edges.append(edges[-1] + struct.unpack_from("<H", data, edges[-1] + 16)[0] + 1)
    return data, edges[1:]


@pytest.mark.parametrize("is_announced", [True, False])
@pytest.mark.parametrize("data_format, data", CUTS, ids="BAM VCF.gz CRAM VCF".split())
def test_data_that_is_cut_anywhere(verdict, data_format, data, is_announced):
    """A missing end is a warning where every size was announced, else an error; half
    a BGZF block is always an error."""
    edges = []
    if data.startswith(b"\x1f"):
        data, edges = small_blocks(data)
        assert len(edges) == 4 and edges[-1] == len(data)
    near = [edge + more for edge in edges[:-1] for more in (0, 1, 17, 18)]
    for cut in near + [*range(30, len(data), 29), len(data)]:
        is_line = data is VCF and data[cut - 1 : cut] == b"\n"
        expected = WARNED if is_announced else FAILS
        if cut == len(data) or is_line:
            expected = PASSES
        elif edges and cut not in edges:
            expected = FAILS
        found, said = verdict(data[:cut], data_format, None, is_announced)
        assert found == expected, (cut, said)
        assert found == PASSES or re.search("EOF|end|line feed", said), said


@pytest.mark.parametrize("framings", [
    ("length", "chunked"), ("chunked", "length"), ("close", "close"),
])  # fmt: skip
@pytest.mark.parametrize("data_format, data", ENDLESS)
def test_one_unknown_size_is_a_doubt(server, caplog, data_format, data, framings):
    halves = zip(framings, (data[:500], data[500:]), ("/1", "/2"))
    blocks = [server.at(path, Fault(data=half, framing=f)) for f, half, path in halves]
    url = server.ticket(blocks, format=data_format)
    assert "no-verify" in str(check(htsget.IntegrityError, url))
    # A Range announces a size, too, whatever the total.
    for total in ("size", "slice", "*"):
        caplog.clear()
        file = server.at("/file", File(data, framing=framings[0], total=total))
        check(data, server.ticket(sliced(file, len(data), 2), format=data_format))
        (record,) = caplog.records
        assert record.levelname == "WARNING"


@pytest.mark.parametrize("data_format, data", ENDLESS)
def test_a_header_needs_no_end_marker(server, caplog, data_format, data):
    url = server.at("/b", File(data, ranges=False, framing="chunked"))
    block = {"url": url, "class": "header"}
    options = {"data_format": data_format, "data_class": "header"}
    check(data, server.ticket([url], format=data_format), **options)
    check(data, server.ticket([block], format=data_format), **options)
    assert caplog.records == []
    # Records were requested: only their absence is worth a warning.
    check(data, server.ticket([block], format=data_format))
    assert ["header" in record.getMessage() for record in caplog.records] == [True]
    body = {"url": data_uri(b"."), "class": "body"}
    check(htsget.IntegrityError, server.ticket([block, body], format=data_format))


def test_any_changed_byte_in_the_chain_is_found(verdict):
    data, (second, *_) = small_blocks(BAM)
    # Magic, subfield and size of a block; the end marker.
    header = [second + n for n in (0, 1, 2, 3, 12, 13, 14, 15, 16, 17)]
    for place in header + list(range(len(data) - 28, len(data))):
        changed = bytearray(data)
        changed[place] ^= 0x41
        assert verdict(bytes(changed), "BAM", None, False)[0] == FAILS, place
        assert place not in header or verdict(bytes(changed), "BAM")[0] == FAILS


@pytest.mark.parametrize("data_format, data", [("BAM", BAM), (None, pattern(300))])
def test_the_md5_of_the_ticket_decides(verdict, data_format, data):
    wrong = data[:100] + bytes([data[100] ^ 1]) + data[101:]
    right, found = (hashlib.md5(each).hexdigest() for each in (data, wrong))
    for arrival in ARRIVALS:
        assert verdict(data, data_format, *arrival, md5=right) == (PASSES, "")
        result, said = verdict(wrong, data_format, *arrival, md5=right)
        assert result == FAILS and right in said and found in said
    assert verdict(data, data_format, md5=right.upper()) == (PASSES, "")
    assert verdict(wrong, data_format, md5=right, verify=False)[0] == PASSES


def test_where_md5_is_forbidden_as_by_fips_is_a_warning(verdict, monkeypatch):
    monkeypatch.setattr(hashlib, "md5", lambda *args, **options: bytes.fromhex("?"))
    result, said = verdict(b"data", None, md5="0" * 32)
    assert result == WARNED and "MD5" in said


def test_a_file_per_region_is_an_error_for_every_output(server, tmp_path):
    data, path = make_bam(600), tmp_path / "out"
    blocks = [closed(server.at("/1", File(data)), 0, len(data))]
    blocks += sliced(server.at("/2", File(data)), len(data), 2)
    url = server.ticket(blocks, format="BAM")
    regions = [("chr1", 0, 9), ("chr2", 0, 9)]
    for kind in KINDS:
        check((htsget.IntegrityError, "region"), url, kind, regions=regions)
    result = call(url, "-O", path, "--region", "chr1:1-9", "--region", "chr2:1-9")
    assert result.status == 1 and "one region" in result.stderr
    assert not path.exists()


@pytest.mark.parametrize("asked, said", [("BAM", "CRAM"), ("VCF", "BCF")])
def test_a_ticket_of_another_format_is_refused_first(server, asked, said):
    url = server.ticket([server.at("/b", MAKERS[said]())], format=said)
    error = check((htsget.ProtocolError, asked), url, data_format=asked)
    assert said in str(error) and server.asked("/b") == []
    # Where the ticket names no format, the requested one counts.
    url = server.ticket([data_uri(MAKERS[said]())])
    check(MAKERS[said](), url, data_format=said.lower())
    check((htsget.IntegrityError, asked), url, data_format=asked)
    check(htsget.ProtocolError, server.ticket([], format=asked))


CRYPT4GH = b"crypt4gh\1\0\0\0" + pattern(999)


def test_encrypted_data_passes_with_a_warning(verdict):
    right = hashlib.md5(CRYPT4GH).hexdigest()
    for arrival, md5 in itertools.product(ARRIVALS, (None, right)):
        result, said = verdict(CRYPT4GH, "BAM", *arrival, md5=md5)
        assert result == WARNED and re.search("(?i)crypt", said), arrival
    assert verdict(CRYPT4GH, "BAM", md5="0" * 32)[0] == FAILS


def test_encrypted_data_that_was_requested_passes_without_a_warning(server, caplog):
    file = server.at("/file", File(CRYPT4GH))
    url = server.ticket([data_uri(CRYPT4GH[:99]), opened(file, 99)], format="BAM")
    check(CRYPT4GH, url + "?encryptionScheme=C4GH")
    assert caplog.records == []
    check(CRYPT4GH, url + "?id=encryptionScheme")
    assert len(caplog.records) == 1
    file = server.at("/file", File(CRYPT4GH, faults=[Fault(cut=500)]))
    url = server.ticket([file], format="BAM")
    check(htsget.ContentLengthMismatch, url, max_retries=0)


# ---- delivery

FIRST, SECOND = pattern(900000, 61), pattern(700000, 62)


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_progress_counts_every_byte_once(server, connections, framing):
    """The total is given once all sizes are known, and is then right."""
    file = File(FIRST, '"1"', framing=framing, faults=[Fault(cut=100000), Fault(503)])
    urls = [data_uri(b"head"), *sliced(server.at("/1", file), len(FIRST), 5)]
    urls += [server.at("/2", File(SECOND, framing=framing)), server.at("/3", b"")]
    calls, data = [], b"head" + FIRST + SECOND
    options = {"progress": lambda *args: calls.append(args)}
    check(data, server.ticket(urls), connections=connections, **options)
    counts = [so_far for so_far, _ in calls]
    assert counts == sorted(set(counts)) and counts[-1] == len(data)
    assert {total for _, total in calls} <= {None, len(data)}
    # A single block without a Range announces its size, too.
    del calls[:]
    check(SECOND, server.ticket([server.url + "/2"]), **options)
    known = len(SECOND) if framing == "length" else None
    assert {total for _, total in calls} == {known}


def test_a_transfer_that_begins_again_keeps_nothing_of_the_first(server, tmp_path):
    """No kept bytes, no journal, no counts, another ticket; and it can be resumed."""
    path, options = str(tmp_path / "out"), dict(QUICK, connections=1)
    file = File(FIRST, '"1"')
    url = server.ticket([*sliced(server.at("/b", file), 600000, 3), data_uri(b"end")])
    with pytest.raises(Death):
        htsget.get(url, path, progress=dying_at(350000), **options)
    file.data, file.etag = SECOND, '"2"'
    del server.requests[:]
    with pytest.raises(Death):
        # The kept bytes are of another object: all is fetched again.
        htsget.get(url, path, progress=dying_at(250000), **options)
    assert server.ranges("/b")[-1] == "bytes=200000-399999"
    assert len(server.asked("/reads/x")) == 2
    del server.requests[:]
    htsget.get(url, path, **options)
    is_right = contents(path) == SECOND[:600000] + b"end"
    assert is_right
    first = int(re.findall(r"\d+", server.ranges("/b")[0])[0])
    assert 200000 <= first <= 400000
    assert len(server.asked("/reads/x")) == 1


def test_a_reader_gets_only_the_first_object(server):
    """What was delivered cannot be taken back: the rest is an error, for ever."""
    file = File(FIRST, '"1"', faults=[Fault(cut=400000, then=(SECOND, '"2"'))])
    delivered = []
    with htsget.open(server.ticket([server.at("/b", file)]), **QUICK) as stream:
        with pytest.raises(htsget.RetryableError):
            delivered.extend(iter(lambda: stream.read(1000), b""))
        for _ in range(2):
            with pytest.raises(htsget.RetryableError):
                stream.read(1)
    assert FIRST.startswith(b"".join(delivered))


@pytest.mark.parametrize("kind, connections, number, body", [
    ("path", 1, 7, b""), ("path", 1, 7, b"shorter"), ("path", 1, 0, b"shorter"),
    ("path", 1, 11, b"x" * 99999), ("pipe", 5, 7, b"shorter"), ("pipe", 5, 11, b""),
], ids=["empty", "short", "first", "long", "pipe", "last"])  # fmt: skip
def test_a_block_that_is_not_its_range(server, kind, connections, number, body):
    """Never a transfer that is complete but for one block."""
    server.latency = 0.02 if connections > 1 else 0
    blocks = sliced(server.at("/b", File(FIRST, '"1"')), len(FIRST), 12)
    wrong = File(FIRST, faults=[Fault(200, body=body, times=None)])
    blocks[number] = server.at("/wrong", wrong), blocks[number][1]
    expected = (htsget.ProtocolError, "Range")
    check(expected, server.ticket(blocks), kind, connections=connections)


def test_as_many_blocks_as_there_are(server):
    """Many small blocks, inline and remote, empty ones among them."""
    parts = [pattern(number % 7 * 11, number) for number in range(300)]
    blocks = [data_uri(part) for part in parts]
    for number in range(0, 300, 3):
        blocks[number] = server.at("/%d" % number, parts[number])
    check(b"".join(parts), server.ticket(blocks), "pipe")
    assert len(server.requests) == 101


# ---- progress meter and messages

ONCE = ["-M", "0", "-W", "0"]


def on_a_terminal(*args, columns=80, stdout=None):
    """Run the command line on a pseudo-terminal; its status and what was shown."""
    terminal, inside = os.openpty()
    streams = {"stdin": inside, "stdout": stdout or inside, "stderr": inside}
    shown = b""
    with running(*args, env={"COLUMNS": str(columns)}, **streams) as process:
        os.close(inside)
        with contextlib.suppress(OSError):
            for data in iter(lambda: os.read(terminal, 65536), b""):
                shown += data
        os.close(terminal)
        return process.wait(), shown.decode()


def test_the_meter_is_one_line_of_a_terminal(server, tmp_path):
    file = server.at("/b", File(pattern(2 * MIB), rate=8 * MIB))
    args = [server.ticket([data_uri(b"x"), closed(file, 0, 2 * MIB)]), "-c", "1"]

    def start(row):
        output, options, *more = row
        return on_a_terminal("-O", output, *args, *more, **options)

    small, path = {"columns": 20, "stdout": subprocess.DEVNULL}, tmp_path / "out.bin"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        (status, shown), (_, narrow), *unmetered = pool.map(start, [
            (path, {}), ("-", small), (tmp_path / "1", {}, "--no-progress"),
            (tmp_path / "2", {}, "-q"),
        ])  # fmt: skip
    lines = [line for line in shown.split("\r") if "iB of 2.0 MiB" in line]
    meter = r"[\d.]+ [MK]iB of 2\.0 MiB, \d+ %, [\d.]+ [MK]iB/s, 0:(00:)?\d\d left"
    assert status == 0 and lines and re.match(r"out\.bin: " + meter, lines[-1]), shown
    assert all(len(line.rstrip("\n")) < 80 for line in lines)
    # The summary is written where the meter was taken off.
    summary = r"\r {40,}\r(htsget: )?out\.bin: 2\.0 MiB in .*/s\).*; not verified\s$"
    assert re.search(summary, shown), shown
    assert re.match("standard output: .{0,3}\r", narrow), narrow
    for status, shown in unmetered:
        assert status == 0 and len(shown.split("\n")) < 3 and "%" not in shown
    assert "\r" not in call("-O", tmp_path / "out", *args, "--progress").stderr


def test_binary_data_is_not_written_to_a_terminal(server):
    url = server.ticket([data_uri(b"\x1b[2J")])
    status, shown = on_a_terminal(url)
    assert status == 2 and "-O -" in shown and "\x1b" not in shown
    assert on_a_terminal(url, "-O", "-", "-q") == (0, "\x1b[2J")


# Verbosity, and what each line of standard error has: the server cuts once.
SUMMARY = r"out\.bam: SIZE in [\d.]+ s \([\d.]+ [KMG]iB/s\).*; verified: BGZF, MD5$"
RETRIED = r"cut|ended|closed|shorter|incomplete|missing|too few|of \d+"
GET = r"GET http://127\.0\.0\.1:\d+/"
BEGUN, *MORE = (GET + r"b .*bytes=%s-\d+\b.*\b206\b.*\d" % n for n in (0, 1000, r"\d+"))
VERBOSE = [GET + r"reads/x .*\b200\b.*\bLENGTH$", BEGUN, RETRIED, *MORE, SUMMARY]
LINES = [([], [RETRIED]), (["-v"], [RETRIED, SUMMARY]), (["-vv"], VERBOSE)]


@pytest.mark.parametrize("args, lines", [(["-q"], []), *LINES])
def test_a_run_says_as_much_as_it_is_told_to(server, tmp_path, args, lines):
    data = make_bam(14000)
    file = server.at("/b", File(data, faults=[Fault(cut=1000)])) + "?hush"
    blocks, md5 = sliced(file, len(data), 2), hashlib.md5(data).hexdigest()
    url = server.ticket(blocks, format="BAM", md5=md5) + "?hush"
    args = ["-W", "0", "-c", "1", "-b", "hush", *args]
    result = call(url, "-O", tmp_path / "out.bam", *args)
    shown = result.stderr.splitlines()
    assert (result.status, len(shown)) == (0, len(lines)), result.stderr
    length = str(len(server.routes["/reads/x"].data()))
    size = r"%.1f KiB" % (len(data) / 1024)
    for line, words in zip(shown, lines):
        words = words.replace("LENGTH", length).replace("SIZE", size)
        assert re.search(words, line), result.stderr
    assert "hush" not in result.stderr


def test_what_is_kept_and_where_a_run_resumes_are_said(server, tmp_path):
    data, path = pattern(300000), tmp_path / "out"
    faults = [Fault(cut=200000), Fault(cut=50000)]
    file = server.at("/b", File(data, etag='"x"', faults=faults))
    url = server.ticket([data_uri(b"12345"), closed(file, 0, 300000)])
    ticket = server.routes["/reads/x"]
    refused = [(1, ["-b", "t"], Fault(401)), (1, ["-b", "t"], Fault(403))]
    for status, more, route in [(75, [], ticket)] * 2 + refused + [(0, ["-q"], ticket)]:
        server.at("/reads/x", route)
        result = call(url, "-O", path, "-c", 1, *ONCE + more)
        assert result.status == status
        begin = re.findall(r"\d+", server.ranges("/b")[-1])[0]
        resumed = re.findall(r"resuming \S*out\S* at byte (\d+)", result.stderr)
        is_said = begin != "0" and not more
        assert resumed == ([str(5 + int(begin))] if is_said else [])
        if status:
            last = result.stderr.splitlines()[-1]
            words = "same command" if status == 75 else "valid login"
            assert str(path) + ".part" in last and words in last
    assert int(begin) > 200000
    assert contents(path) == b"12345" + data


@pytest.mark.parametrize("place, fault", [
    ("/b", Fault(503)), ("/reads/x", Fault(503)),
    # Nothing of it can be resumed.
    ("/b", Fault(data=pattern(9999), cut=5000, framing="chunked")),
])  # fmt: skip
def test_a_run_without_data_claims_nothing(server, tmp_path, place, fault):
    url = server.ticket([server.at("/b", pattern(9))])
    route = server.routes[place]
    server.at(place, fault)
    result = call(url, "-O", tmp_path / "out", *ONCE)
    assert result.status == 75
    assert not re.search(r"kept|resume|out\.part", result.stderr), result.stderr
    assert os.listdir(str(tmp_path)) == [] or place == "/b"
    server.at(place, route)
    result = call(url, "-O", tmp_path / "out")
    assert result[:2] == (0, b"") and bool(result.stderr) == bool(fault.get("cut"))


# Where a request is refused, the status, further arguments, and what the last line has
# or (with "!") has not.
TOKEN_HINT = r"(^|[ (])-b\b|--bearer-token|HTS_AUTH_LOCATION"
ID_HINT = "check the id"


@pytest.mark.parametrize("place, status, args, words", [
    ("ticket", 401, [], TOKEN_HINT), ("ticket", 403, [], TOKEN_HINT),
    ("ticket", 401, ["-b", "T"], "does not accept"),
    ("ticket", 401, ["-b", "T"], "!" + TOKEN_HINT),
    ("ticket", 403, ["-b", "T"], "login may not read"),
    ("block", 401, [], "!" + TOKEN_HINT), ("file", 403, [], "new ticket"),
    ("block", 403, ["-H", "Authorization: T"], "!login may not|" + TOKEN_HINT),
    ("ticket", 404, [], ID_HINT), ("ticket", 404, ["--service-info"], "!" + ID_HINT),
    ("ticket", 404, ["-f", "CRAM"], "id.*format|format.*id"),
    ("ticket", 404, ["-r", "chrZ"], "!%s in the URL *$" % ID_HINT),
    ("ticket", 404, ["--region", "chrZ:1-2"], "!%s in the URL *$" % ID_HINT),
])  # fmt: skip
def test_a_refusal_has_a_true_hint(server, tmp_path, place, status, args, words):
    error = "NotFound" if status == 404 else "Refused"
    source = server.at("/reads/x", lambda h: h.refuse(status, error, "none"))
    server.at("/reads/service-info", server.routes["/reads/x"])
    if place != "ticket":
        source = server.ticket([source + "?X-Amz-Signature=hush"], "/t")
    if place == "file":
        (tmp_path / "ticket").write_bytes(server.routes["/t"].data())
        source = tmp_path / "ticket"
    result = call(source, "-O", tmp_path / "out", *args + ONCE)
    assert result.status == 1
    line = result.stderr.splitlines()[-1]
    assert str(status) in line and "hush" not in result.stderr
    assert bool(re.search(words.lstrip("!"), line)) != words.startswith("!"), line


def test_a_server_that_takes_no_post_is_named(server):
    for status in (404, 405, 501):
        url = server.at("/t", Fault(status))
        check((htsget.ClientError, "region"), url, regions=[("1",), ("2",)])


def test_an_expiry_is_mentioned_once_a_transfer(server, tmp_path):
    data = pattern(80000)
    file = server.at("/b", File(data, uses=2))
    url = server.ticket(lambda n: sliced("%s?n=%d" % (file, n), 80000, 8))
    result = call(url, "-O", tmp_path / "out", "-W", "0", "-c", "1")
    assert result.status == 0 and len(server.asked("/reads/x")) == 4
    assert result.stderr.count("expired") <= 1 >= len(result.stderr.splitlines())


# What a terminal might obey.
NASTY = "a\x1b[31m\x9b2J\x07\x7f\x85\u2028z"


def nasty(status=None, **more):
    """A response of JSON with such strings."""
    return Fault(status, body=json.dumps(more, ensure_ascii=False).encode())


NASTY_TICKET = nasty(htsget={"urls": [], "format": NASTY, "allowed": [NASTY]})
NASTY_ERROR = {"error": NASTY, "message": NASTY}
NASTY_PHRASE = b"HTTP/1.1 404 a\x1b[31m\x9bz\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("arg, route", [
    ("--dry-run", NASTY_TICKET), ("-O-", NASTY_TICKET),
    ("-O-", Fault(503, body=NASTY.encode())), ("-O-", Fault(raw=NASTY_PHRASE)),
    ("-O-", nasty(404, htsget=NASTY_ERROR)), ("-O-", nasty(htsget=NASTY_ERROR)),
    ("--service-info", nasty(name=NASTY, htsget={NASTY: [NASTY]})),
], ids=range(7))  # fmt: skip
def test_nothing_that_a_server_sent_is_printed_raw(server, arg, route):
    server.at("/reads/service-info", route)
    result = call(server.at("/reads/x", route), "-vv", arg, *ONCE)
    shown = result.stdout.decode() + result.stderr
    assert re.findall("[^\n\t -~\xa0-\u2027\u202a-\uffff]", shown) == []
    if arg == "--service-info":
        sent = route.get("body").decode()
        assert json.loads(result.stdout.decode()) == json.loads(sent)


def test_strings_that_the_locale_cannot_show():
    def test(server, locale):
        info = {"id": "x", "name": "Universit\xe4t \u6f22 \u2192", "n": 1}
        server.at("/reads/service-info", json.dumps(info).encode())
        result = run(server.url + "/reads", "--service-info", env=locale)
        assert result.status == 0, result.stderr
        assert json.loads(result.stdout.decode()) == info
        server.at("/%FF%E4", lambda h: h.refuse(404, "No", "nicht da: \xe4\u6f22"))
        url = server.url.encode() + b"/\xff\xe4"
        result = run(os.fsdecode(url), "-O", "-", env=locale)
        assert result.status == 1
        assert re.match("htsget: error: .*nicht da.*\n$", result.stderr), result.stderr

    # Without the UTF-8 mode that Python 3.7 and later use as a fallback.
    c_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    at_once(test, [c_locale, {"PYTHONIOENCODING": "cp1252"}])


def changing_object(handler):
    File(pattern(20000), etag='"%d"' % len(handler.server.requests))(handler)


LOCATION, HTML = {"Location": "http://u:hush@h:x/?hush"}, {"Content-Type": "text/html"}
OTHER, WRONG_MD5 = {"Content-Range": "bytes 5-5/900"}, ticket_json([], md5="0" * 32)
# A transfer that fails: the route of its block or (with "ticket") its ticket, and a
# name of the exception, some of them as 0.2.6 has them.
FAILURES = {
    "web page ticket": (b"<html></html>", "InvalidLeadingJsonError"),
    "listed ticket": (b"[]", "InvalidLeadingJsonError"),
    "half a ticket": (b'{"htsget": {', "InvalidJsonError"),
    "odd ticket": (b'{"htsget": "\xff"}', "TicketDecodeError"),
    "other ticket": (b"{}", "MalformedJsonError"),
    "empty ticket": (b"", "EmptyTicketError"),
    "refused ticket": (Fault(404, body=b"no"), "ClientError"),
    "busy ticket": (Fault(503, body=b"no"), "ExceptionWrapper"),
    "redirected ticket": (Fault(302, headers=LOCATION), "HtsgetException"),
    "ticket of wrong MD5": (WRONG_MD5, "IntegrityError"),
    "refused block": (Fault(404, body=b"gone"), "ClientError"),
    "other bytes": (Fault(206, body=b"x", headers=OTHER), "ProtocolError"),
    "changing object": (changing_object, "RetryableError"),
    "cut": (Fault(body=b"xy", cut=1), "ContentLengthMismatch"),
    "reset": (Fault(body=b"x", reset=True), "RetryableError"),
    "garbage": (Fault(raw=b"garbage\r\n\r\n"), "RetryableIOError"),
    "nothing": (Fault(raw=b""), "RetryableIOError"),
    "silence": (Fault(wait=True), "RetryableIOError"),
    "loop": (Fault(302, headers={"Location": "/loop?hush"}), "ProtocolError"),
    "page": (Fault(body=b"<html>", headers=HTML), "ProtocolError"),
}
SECRET = {"X-A": "hush", "Authorization": "hush"}
RANGES = {"changing object": [(0, 9), (9, 20)], "other bytes": [(100, 110)]}


def failing(server, kind):
    """The URL of a transfer that fails in this way."""
    url = server.at("/" + kind.replace(" ", "-"), FAILURES[kind][0])
    if "ticket" in kind:
        return url
    blocks = [closed(url + "?hush", *span) for span in RANGES.get(kind, [])]
    blocks = [(url, dict(SECRET, **headers)) for url, headers in blocks]
    return server.ticket(blocks or [(url + "?hush", SECRET)])


def everything_in(error):
    """All that an exception, and what led to it, says and has."""
    said = []
    while error is not None:
        said.append(repr((error, str(error), error.args, vars(error))))
        with contextlib.suppress(Exception):
            said.append(repr(pickle.dumps(error)))
        error = error.__cause__ or error.__context__
    return "\n".join(said)


@pytest.mark.parametrize("kind", sorted(FAILURES))
def test_an_error_holds_no_secret_and_survives_copying(server, caplog, kind):
    caplog.set_level(0, "htsget")
    url = failing(server, kind).replace("//", "//me:hush@") + "?hush"
    options = {"bearer_token": "hush", "headers": {"X-A": "hush"}}
    options["timeout"] = 0.1 if kind == "silence" else 5
    expected = getattr(htsget, FAILURES[kind][1])
    error = check(expected, url, max_retries=1, **options)
    assert isinstance(error, htsget.HtsgetException)
    assert getattr(htsget, type(error).__name__) is type(error)
    if isinstance(error, htsget.RetryableIOError):
        assert isinstance(error.source, Exception)
    assert "hush" not in everything_in(error) + caplog.text
    # Lower protocols have no name for some of the built-in exceptions.
    protocols = range(3, pickle.HIGHEST_PROTOCOL + 1)
    copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in protocols]
    for again in [*copies, copy.copy(error), copy.deepcopy(error)]:
        assert type(again) is type(error)
        assert (str(again), repr(again)) == (str(error), repr(error))
        for name in "status error message body exception_str".split():
            assert getattr(again, name, None) == getattr(error, name, None)
        assert type(getattr(again, "source", 0)) is type(getattr(error, "source", 0))


def copy_of_htsget(name):
    """The module once more, as a vendored copy of this name."""
    spec = importlib.util.spec_from_file_location(name, PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_copies_do_not_disturb_each_others_logging(server, capfd, caplog):
    one, two = copy_of_htsget("one._vendor.htsget"), copy_of_htsget("two.htsget")
    file = server.at("/inner", File(b"x", faults=[Fault(503), None] * 3))
    inner = server.ticket([file], "/two")

    def outer(handler):
        two.get(inner, io.BytesIO(), retry_wait=0)
        handler.reply(200, b"outer")

    url = server.ticket([server.at("/outer", outer)])
    for args in (["-q"], ["-vv"]):
        caplog.clear()
        assert one.main(args + [url, "-O", "-"]) == 0
        assert "HTTP 503" in caplog.text
    # And this copy's logging is as it was before its own command line ran.
    caplog.clear()
    one.get(inner, Pipe(), retry_wait=0)
    assert "HTTP 503" in caplog.text
    out, errors = capfd.readouterr()
    assert out == "outerouter" and "/outer" in errors
    assert "HTTP 503" not in errors and "/inner" not in errors


# ---- public functions


# As in 0.2.6.
ARGUMENTS = """
    url output reference_name reference_md5 start end fields tags notags data_format
    max_retries retry_wait timeout bearer_token headers
"""
PUBLIC = """
    get get_ticket service_info parse_region Region Ticket DataBlock main
    HtsgetException RequestError ProtocolError IntegrityError ClientError RetryableError
    RetryableIOError ContentLengthMismatch
"""


def test_the_public_names():
    """A star import leaves `open` alone."""
    code, names = htsget.get.__code__, {}
    assert list(code.co_varnames[: code.co_argcount]) == ARGUMENTS.split()
    assert htsget.get.__defaults__ == (None,) * 8 + (5, 5, 120, None, None)
    exec("from htsget import *", names)
    assert set(PUBLIC.split()) <= set(names)
    assert "open" not in names and names["get"] is htsget.get
    for name in [*PUBLIC.split(), "open"]:
        assert getattr(htsget, name).__doc__, name


def test_what_pyega3_calls(server):
    data = make_bam(200)
    url = server.ticket(sliced(server.at("/b", File(data)), len(data)), format="BAM")
    options = {"data_format": "BAM", "max_retries": sys.maxsize, "retry_wait": 5}
    options.update(reference_md5=None, bearer_token="token")
    for name, start, end in (("chr1", 0, 1000), (None, None, None)):
        check(data, url, reference_name=name, start=start, end=end, **options)


@pytest.mark.parametrize("timeout", [(0.02, 9), [9.0, 0.02], (0.02, None), None, 1e300])
def test_the_larger_of_a_pair_of_timeouts_holds(server, timeout):
    server.latency = 0.05
    check(b"x", server.ticket([server.at("/b", File(b"x"))]), timeout=timeout)
    if timeout == (0.02, 9):
        url = server.at("/t", Fault(wait=True))
        check(htsget.RetryableIOError, url, timeout=(0.01, 0.02), max_retries=0)


def test_the_modules_of_0_2_6_can_be_imported(server):
    """And nothing comes from outside the standard library."""
    code = """
before = set(sys.modules)
import htsget.exceptions, htsget.io, htsget.protocol, htsget.cli as cli
from htsget.cli import htsget_main
from htsget.exceptions import RetryableIOError
assert RetryableIOError is htsget.RetryableIOError
assert htsget.io.get is htsget.get
assert htsget.cli is cli and htsget.protocol
for name in set(sys.modules) - before:
    assert "site-packages" not in (getattr(sys.modules[name], "__file__", "") or "")
sys.exit(htsget_main())
"""
    result = run(server.ticket([data_uri(b"x")]), "-O", "-", code=code)
    assert result == (0, b"x", "")
    result = run(server.url + "/nothing", "-O", "-", code=code)
    assert result.status == 1 and len(result.stderr.splitlines()) == 1


# -- streams


def test_a_stream_can_be_read_in_every_way(server):
    data = make_bam(3000)
    url = server.ticket(sliced(server.at("/b", File(data)), len(data)), format="BAM")
    with htsget.open(url) as stream:
        assert stream.readable() and not stream.writable()
        parts = [stream.read(100), stream.read1(10), bytearray(1000)]
        assert stream.readinto(parts[2]) == 1000
        parts.append(stream.read())
        is_right = b"".join(parts) == data
        assert is_right and stream.read() == stream.read(1) == b""
    with pytest.raises(ValueError):
        stream.read()


def test_a_stream_gives_lines_while_the_rest_is_not_there_yet(server):
    data, go_on = make_vcf(20000), threading.Event()
    file = File(data, faults=[Fault(cut=300000, stall=go_on)])
    url = server.ticket([server.at("/b", file)], format="VCF")
    with htsget.open(url, timeout=20, max_retries=0) as stream:
        lines = io.TextIOWrapper(stream)
        assert next(lines) == "##fileformat=VCFv4.3\n"
        go_on.set()
        assert len(list(lines)) == 20002


UNMARKED = make_bam(100)[:-28]


@pytest.mark.parametrize("route, options, error", [
    (File(UNMARKED, framing="chunked"), {}, htsget.IntegrityError),
    (File(UNMARKED, framing="chunked"), {"verify": False}, None),
    (Fault(404), {}, htsget.ClientError), (make_cram(9), {}, htsget.IntegrityError),
    (Fault(data=UNMARKED, cut=99), {}, htsget.ContentLengthMismatch),
])  # fmt: skip
def test_a_stream_ends_only_when_all_is_verified(server, route, options, error):
    url = server.ticket([server.at("/b", route)], format="BAM")
    with htsget.open(url, max_retries=0, connections=1, **options) as stream:
        read = b""
        with pytest.raises(error) if error else contextlib.ExitStack():
            for data in iter(lambda: stream.read1(500), b""):
                read += data
            assert read == UNMARKED
        # An error stays: no later read may be taken for the end.
        for method in ("read", "read1", "readline") if error else ():
            with pytest.raises(error):
                getattr(stream, method)(9)


def test_a_stream_that_cannot_begin_is_an_error(server, monkeypatch):
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append, raising=False)
    for url in (server.url + "/nothing", server.at("/t", b"<html>")):
        with pytest.raises(htsget.HtsgetException):
            htsget.open(url).read()
    gc.collect()
    assert ignored == []


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("tls", [False, True])
def test_a_stream_is_closed_by_another_thread(
    server, tls_server, trusting, tls, connections
):
    origin = tls_server if tls else server
    file = origin.at("/b", Fault(data=pattern(99999), cut=65536, stall=True))
    url = origin.ticket([file, origin.at("/c", Fault(wait=True))])
    # Without a timeout, nothing else can end the read.
    options = {"timeout": None, "ssl_context": trusting, "connections": connections}
    stream = htsget.open(url, **options)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(stream.read)
        origin.wait_until(lambda s: s.sent >= 65536)
        stream.close()
        assert isinstance(reading.exception(), Exception)
    assert stream.closed
    assert {t.name for t in threading.enumerate()} <= {"MainThread", "test"}


# -- service-info


@pytest.mark.parametrize("path", ["", "/", "/NA12878", "/service-info", "/a/b?x=y"])
def test_service_info_is_found_from_every_address(server, path):
    info = {"id": "x", "htsget": {"datatype": "reads"}, "n": [1, None]}
    server.at("/reads/service-info", json.dumps(info).encode())
    url = server.url + "/reads" + path
    assert htsget.service_info(url, bearer_token="t", headers={"X-A": "1"}) == info
    (request,) = server.requests
    assert request.headers["Authorization"] == "Bearer t"
    assert request.headers["X-A"] == "1"


@pytest.mark.parametrize("route, error, count", [
    (b"[]", htsget.ProtocolError, 1), (b'{"name": "\xe4"}', htsget.ProtocolError, 1),
    (Fault(404), htsget.ClientError, 1), (Fault(503), htsget.RetryableIOError, 2),
])  # fmt: skip
def test_a_service_info_that_is_none_is_an_error(server, route, error, count):
    url = server.at("/variants/service-info", route)
    with pytest.raises(error):
        htsget.service_info(url, max_retries=1, retry_wait=0)
    assert len(server.requests) == count


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
@pytest.mark.skipif(PYPY, reason="PyPy collects its garbage later")
@pytest.mark.parametrize("uri, count", [("data:;base64,A", 30), ("data:,%41", 2)])
def test_inline_data_takes_little_more_memory_than_the_ticket(server, uri, count):
    code = """
import os, re, htsget
with open(os.devnull, "wb") as output:
    htsget.get(sys.argv[1], output)
with open("/proc/self/status") as file:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", file.read()).group(1))
"""
    uri += uri.rpartition(",")[2] * (count * MIB - 1)
    result = run(server.at("/t", ticket_json([uri])), code=code)
    assert result.status == 0, result.stderr
    assert int(result.stdout) < 120 << 10


# ---- command line


# Command lines that succeed, with {url} and {out}; the query and headers that are sent.
@pytest.mark.parametrize("line, query, headers", [
    ("{url} -O {out}", "", {}),
    ("--bearer-token T {url} --output {out}", "", {"Authorization": "Bearer T"}),
    ("{url} -O {out} -f bam -r 1", "format=BAM&referenceName=1", {}),
    ("{url} -O {out} -r 1 -s 0 -e 9 -W 1", "referenceName=1&start=0&end=9", {}),
    ("{url} --reference-name 1 --start=5 -O {out}", "referenceName=1&start=5", {}),
    ("{url} -O {out} --fields SEQ --notags OQ", "fields=SEQ&notags=OQ", {}),
    ("-T 30.5 -M -1 -W 0.5 -m {md5} {url} -O {out}", "referenceMD5={md5}", {}),
    ("-M 3 -O {out} --headers {{}} --tags= -- {url}", "tags=", {}),
    ("{url} -o {out} -H X-A:b --headers X-C:d -H=", "", {"X-A": "b", "X-C": "d"}),
    ("-c2 -O{out} {url} --no-verify --no-resume --no-progress", "", {}),
    ("{url} -O {out} -r HLA-A*01:01", "referenceName=HLA-A*01:01", {}),
    ("{url} --class header -f BAM -O {out}", "class=header&format=BAM", {}),
    ("{url} --region chr1:1-10 -O {out}", "referenceName=chr1&start=0&end=10", {}),
])  # fmt: skip
def test_command_lines_that_are_accepted(server, tmp_path, line, query, headers):
    data = make_bam(100)
    url = server.ticket([server.at("/b", data)], format="BAM")
    path, md5 = tmp_path / "out.bam", "0" * 32
    result = call(*[w.format(url=url, out=path, md5=md5) for w in line.split()])
    assert (result.status, result.stdout) == (0, b""), result.stderr
    assert result.stderr == ""
    assert contents(path) == data
    request = server.requests[0]
    expected = query.format(md5=md5).split("&")
    assert sorted(request.query.split("&")) == sorted(expected)
    for name in ("Authorization", "X-A", "X-C"):
        assert request.headers[name] == headers.get(name)


# Arguments besides -O - and the URL, and what the usage error names. Options of a
# request do not go with a ticket in a file, `given`.
USAGE = [
    (["-s", "5"], "-s/--start -r/--reference-name"), (["-T", "0"], "-T/--timeout"),
    (["-r", "1", "-s", "5", "-e", "4"], "-s/--start -e/--end"),
    (["-r", "chr1:100-200"], "--region"), (["-m", "xyz"], "-m/--reference-md5"),
    (["--class", "header"], "--class -f/--format"), (["-b", ""], "-b/--bearer-token"),
    (["--fields", "QNAME,WRONG"], "--fields"), (["-W", "-1"], "-W/--retry-wait"),
    (["--tags", "NM", "--notags", "NM"], "--tags --notags"),
    (["--region", "1:1-2", "-r", "1"], "--region -r/--reference-name"),
    (["--region", "chr1:%s-2" % ("9" * 5000)], ""),
    (["--region", os.fsdecode(b"chr\xff"), "--region", "2"], ""),
    (["-H", "X y: 1"], "-H/--headers"), (["-H", "nonsense"], "-H/--headers"),
    (["-H", '{"X": 1}'], "-H/--headers"), (["-O", ""], "-O/--output"),
    (["out.bam"], "-O/--output"), (["--wrong"], "--wrong"),
    (["given", "--region", "1:1-2"], "--region ticket"),
    (["given", "-L", "-"], "-L/--regions-file ticket"),
    (["given", "-b", "hush"], "-b/--bearer-token ticket"),
    (["--quiet=hush"], "-q/--quiet"),
    (["given", "--bearer-token-file", "t"], "--bearer-token-file ticket"),
    (["given", "-H", "X: hush"], "-H/--headers ticket"),
]  # fmt: skip
# Abbreviations, which Python can forbid from 3.8 on.
for name in "regions regio out form prog quie".split() * (sys.version_info >= (3, 8)):
    USAGE.append((["--" + name, "1"], "--" + name))
# The names of `get`, and a secret.
LIBRARY = "(data|reference|bearer|max|retry|regions)_[a-z]|None|hush"


@pytest.mark.parametrize("args, options", USAGE, ids=range(len(USAGE)))
def test_a_usage_error_names_options(server, tmp_path, monkeypatch, args, options):
    monkeypatch.chdir(str(tmp_path))
    (tmp_path / "given").write_bytes(ticket_json(["data:,x"]))
    args = args if "given" in args else [server.ticket([]), *args]
    result = call("-O", "-", *args)
    assert (result.status, result.stdout, server.requests) == (2, b"", [])
    (line,) = result.stderr.splitlines()
    assert line.startswith("htsget: error: ") and len(line) < 1000
    for names in options.split():
        named = r"(?<![\w-])(%s)(?![\w-])" % names.replace("/", "|")
        assert re.search(named, line), line
    assert not re.search(LIBRARY, line), line
    assert os.listdir(str(tmp_path)) == ["given"]


# A URL (of a server without anything), an output, and what the error says.
@pytest.mark.parametrize("url, output, words", [
    ("{url}/", "-", "/reads/ID.*/variants/ID"), ("{url}", "-", "/reads/ID.*/variants/"),
    ("example.org/reads/x", "-", "https://"),
    ("/nonexistent/ticket.json", "-", "nonexistent/ticket"),
    ("{url}", "{tmp}/no\x1bne/out", r"/no\\x1bne(?!.*\.part)"),
])  # fmt: skip
def test_an_address_that_is_none_is_explained(server, tmp_path, url, output, words):
    output = output.format(tmp=tmp_path)
    result = call(url.format(url=server.url), "-O", output)
    (line,) = result.stderr.splitlines()
    assert result.status in (1, 2) and re.search(words, line), line


# -- tokens


# What a token file has (None: there is none), and the header that is sent.
@pytest.mark.parametrize("content, sent", [
    (b"tok", "Bearer tok"), (b"\xef\xbb\xbfbearer tok\r\n", "Bearer tok"),
    (b'\xef\xbb\xbf{"access_token": "Bearer tok", "x": 1}\r\n', "Bearer tok"),
    (b"-dash", "Bearer -dash"), (b"", None), (b'{"access_token": null}', None),
    (b'{"access_token": {}}', None), (b"hush\nhush", None), (None, None),
])  # fmt: skip
@pytest.mark.parametrize("how", ["option", "environment"])
def test_a_token_comes_from_a_file(server, tmp_path, monkeypatch, content, sent, how):
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    args = [server.ticket([data_uri(b"x")]), "-O", "-"]
    args += ["--bearer-token-file", path] if how == "option" else []
    monkeypatch.setenv("HTS_AUTH_LOCATION", str(tmp_path if args[3:] else path))
    result = call(*args)
    if sent:
        assert result == (0, b"x", "")
        assert server.requests[0].headers["Authorization"] == sent
        path.unlink()
    else:
        assert result.status == 2 and server.connections == 0
        (line,) = result.stderr.splitlines()
        assert (str(path) in line or "token" in line) and "hush" not in line
    # A token on the command line needs no file.
    assert call("-b", "own", *args).status == 0
    assert server.requests[-1].headers["Authorization"] == "Bearer own"


def test_a_token_file_is_read_for_each_ticket_request(server, tmp_path):
    path = tmp_path / "token"
    path.write_text("one")
    first = Fault(503, run=lambda handler: path.write_text("two"))
    url = server.ticket([data_uri(b"x")], faults=[first])
    args = ["-O", "-", "--bearer-token-file", path, "-q", "-W", "0"]
    assert call(url, *args) == (0, b"x", "")
    sent = [r.headers["Authorization"] for r in server.requests]
    assert sent == ["Bearer one", "Bearer two"]


def test_a_token_from_a_pipe_is_read_once(server):
    url = server.ticket([data_uri(b"x")], faults=[Fault(503)])
    args = [url, "-O", "-", "--bearer-token-file", "-", "-q", "-W", "0"]
    assert run(*args, stdin=b"one") == (0, b"x", "")
    assert server.requests[-1].headers["Authorization"] == "Bearer one"


@pytest.mark.parametrize("args", [
    "--bearer-token=-hush", "-b -hush", "-b --hush", "--bearer-token -hush",
])  # fmt: skip
def test_a_token_with_a_dash_is_used_or_the_way_is_shown(server, args):
    result = call(server.ticket([data_uri(b"x")]), "-O", "-", *args.split())
    assert "hush" not in result.stderr
    if result.status == 0:
        token = re.split("[ =]", args)[1]
        assert server.requests[0].headers["Authorization"] == "Bearer " + token
    else:
        assert result.status == 2 and server.requests == []
        (line,) = result.stderr.splitlines()
        assert re.search("--bearer-token(=-|-file)|-b=-", line), line
        assert "=" not in args


# -- regions


BED = b"# comment\ntrack name=x\nbrowser x\n\nchr2\t5\t9\tname\t0\nchr3\t1\t2\r\n"
BEDS = [BED, gzip.compress(BED), b"\xef\xbb\xbfchr2 5 9\r\nchr3 1 2\r\n"]


@pytest.mark.parametrize("content", BEDS, ids=["tabs", "gzip", "spaces"])
@pytest.mark.parametrize("path", ["regions.bed", "-"])
def test_several_regions_are_a_post(server, tmp_path, monkeypatch, content, path):
    monkeypatch.chdir(str(tmp_path))
    (tmp_path / "regions.bed").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    args = [server.ticket([data_uri(b"x")]), "--region", "chr1:1-10", "-O", "-"]
    assert call(*args, "-L", path) == (0, b"x", "")
    assert json.loads(server.requests[0].body.decode())["regions"] == [
        {"referenceName": "chr1", "start": 0, "end": 10},
        {"referenceName": "chr2", "start": 5, "end": 9},
        {"referenceName": "chr3", "start": 1, "end": 2},
    ]


def test_an_error_in_a_bed_file_is_located(server, tmp_path):
    """In the second line, or nowhere."""
    for number, (content, words) in enumerate([
        (b"chr1\t0\t9\nchr2\t5\n", "2: columns.*START"), (b"", ""), (None, ""),
        (b"chr1\t0\t9\nchr2\tx\t9", "2: .*integers"), (b"chr1\t0\t9\n\xff", ""),
        (b"chr1\t0\t9\nchr2\t9\t5", "2: .*START <= END"),
        (b"chr1\t0\t9\nchr2\t0\t4294967296", r"2: .*2\*\*32"),
        (b"chr1\t0\t9\nchr2\t0\t" + b"9" * 5000, "2: "),
    ]):  # fmt: skip
        path = tmp_path / ("%d.bed" % number)
        if content is not None:
            path.write_bytes(content)
        result = call(server.ticket([]), "-L", path, "-O", "-")
        (line,) = result.stderr.splitlines()
        assert result.status == 2 and server.requests == [], line
        assert re.search(r"\d\.bed(, line )?.*" + words, line), line
        assert len(line) < 1000 and "--" not in line


# -- a ticket in a file, --dry-run, --service-info


def test_a_ticket_comes_from_a_file_or_standard_input(tmp_path):
    raw, path = ticket_json([data_uri(b"abc")]), tmp_path / "ticket.json"
    path.write_bytes(raw)
    assert call(path, "-O", "-") == (0, b"abc", "")
    # The environment's token is for servers.
    result = run("-", "-O", "-", stdin=raw, env={"HTS_AUTH_LOCATION": "/nonexistent"})
    assert (result.status, result.stdout) == (0, b"abc")
    path.write_bytes(raw[:-3])
    assert call(path, "-O", "-").status == 1


def test_a_dry_run_downloads_nothing_and_shows_no_secrets(server, tmp_path):
    headers = {"Range": "bytes=0-99", "X": "hush"}
    blocks = [data_uri(b"12345"), (server.url + "/b?hush", headers)]
    url = server.ticket(blocks, format="BAM", md5="0" * 32)
    (tmp_path / "given").write_bytes(server.routes["/reads/x"].data())
    for source in (url, tmp_path / "given"):
        result = call("--dry-run", source)
        shown = result.stdout.decode()
        assert (result.status, result.stderr) == (0, "")
        for words in ("BAM", r"2 \(1 inline\)", "105 bytes", "127.0.0.1", "0" * 32):
            assert re.search(words, shown), shown
        assert "hush" not in shown
    assert len(server.requests) == 1
    shown = call("--dry-run", server.ticket([server.url + "/b"])).stdout.decode()
    assert "not known" in shown and "not given" in shown


def test_help_and_version():
    """Among others, environment variables, exit statuses and groups."""
    words = """
        http_proxy no_proxy ALL_PROXY SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE
        CURL_CA_BUNDLE HTS_AUTH_LOCATION HTS_ALLOW_UNENCRYPTED_AUTHORIZATION_HEADER
        .netrc 75 129 130 143 request: transfer: output: examples: --reference-name
    """
    result = call("--help")
    shown = result.stdout.decode()
    assert result.status == 0 and max(map(len, shown.splitlines())) <= 88
    assert [word for word in words.split() if word not in shown] == []
    version = ("htsget %s\n" % htsget.__version__).encode()
    assert call("--version") == call("-V") == (0, version, "")


# -- exit statuses and standard streams


# A redirection, arguments, the exit status, the lines of standard error.
STREAMS = [
    (">/dev/full", ["URL"], 75, 1), (">/dev/full", ["URL", "--dry-run"], 1, 1),
    (">/dev/full", ["--help"], 1, 1), (">/dev/full 2>/dev/full", ["URL"], 75, 0),
    (">/dev/full", ["--version"], 1, 1), ("</dev/null", ["-"], 1, 1),
    (">/dev/full", ["URL", "--service-info"], 1, 1), ("2>/dev/full", ["NOTHING"], 1, 0),
    (">/dev/full 2>&-", ["URL", "--dry-run"], 1, 0), ("2>/dev/full", ["--wrong"], 2, 0),
    ("2>/dev/full", ["URL", "-O", "OUT", "-vv", "--progress"], 0, 0),
    ("<&- >&- 2>&-", ["URL", "-O", "OUT", "-vv"], 0, 0), ("<&- >&-", ["-"], 2, 1),
    (">&-", ["--dry-run", "URL"], 1, 1), ("<&-", ["URL", "-L", "-"], 2, 1),
    (">&-", ["URL"], 2, 1),
]  # fmt: skip


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_standard_streams_that_are_full_or_closed(tmp_path):
    data = pattern(30000)

    def test(server, row):
        redirection, args, status, lines = row
        out = tempfile.mktemp(dir=str(tmp_path))
        file = server.at("/b", File(data, faults=[Fault(503), Fault(cut=9000)]))
        server.at("/reads/service-info", b'{"id": "x"}')
        words = {"URL": server.ticket([file]), "NOTHING": server.url, "OUT": out}
        args = ["-W", "0"] + [words.get(arg, arg) for arg in args]
        args += [] if "-vv" in args else ["-q"]
        script = 'exec "$0" "$@" ' + redirection
        result = launch(["sh", "-c", script] + command(args))
        assert result[:2] == (status, b""), (row, result)
        assert len(result.stderr.splitlines()) == lines, (row, result)
        if lines:
            assert result.stderr.startswith("htsget: error: "), (row, result)
            assert not re.search("resum|Exception ignored", result.stderr), result
        if lines and status == 75:
            assert re.search("No space left.*(free|rerun)", result.stderr), result
        is_right = out not in args or contents(out) == data
        assert is_right, row

    at_once(test, STREAMS)


def test_a_standard_error_that_goes_away_changes_nothing(tmp_path):
    data = pattern(MIB)

    def test(server, opened):
        go_on, (reader, writer) = threading.Event(), opened
        file = File(data, faults=[Fault(503), Fault(cut=MIB // 2, stall=go_on)])
        url, path = server.ticket([server.at("/b", file)]), tmp_path / str(reader)
        words = [url, "-O", path, "-W", "0", "-vv", "--progress"]
        with running(*words, stderr=writer) as process:
            os.close(writer)
            os.read(reader, 1)
            os.close(reader)
            go_on.set()
            assert process.wait() == 0
        is_right = contents(path) == data
        assert is_right

    at_once(test, [os.pipe(), os.openpty()])


def test_a_broken_pipe_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)

    def test(server, args):
        url = server.ticket([server.at("/b", pattern(MIB))])
        server.at("/reads/service-info", b'{"id": "x"}')
        result = run(url, *args, stdout=writer)
        assert result.status == 141 and not result.stderr, (args, result)

    at_once(test, [[], ["--help"], ["--service-info"]])
    os.close(writer)


# -- signals


def test_a_signal_before_any_data_ends_a_run(tmp_path):
    def test(server, row):
        path, name, status = row
        url = server.ticket([server.url + "/b"], "/t")
        server.at(path, Fault(wait=True))
        with running(url, "-O", tmp_path / name) as process:
            server.wait_until(lambda s: s.asked(path))
            time.sleep(0.1)
            said = end_by(process, name)
        assert process.returncode == status and said.startswith("htsget: error: ")
        assert not re.search(r"kept|resume|\.part|\n.", said), said

    at_once(test, [("/t", "INT", 130), ("/b", "TERM", 143), ("/b", "HUP", 129)])
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.skipif(PYPY, reason="PyPy does not tell that a signal is ignored")
def test_nohup_is_obeyed(server):
    go_on = threading.Event()
    url = server.ticket([server.at("/b", Fault(body=b"x", wait=go_on))])
    code = "import htsget, signal; signal.signal(1, signal.SIG_IGN); htsget.main()"
    with running(url, "-O", "-", code=code) as process:
        server.wait_until(lambda s: s.asked("/b"))
        process.send_signal(signal.SIGHUP)
        go_on.set()
        assert process.communicate() == (b"x", b"")


def test_signals_of_a_program_are_left_as_they_were(server):
    seen, results, url = [], [], server.ticket([data_uri(b"x")])
    before = signal.signal(signal.SIGTERM, lambda *args: seen.append(args))
    try:
        results.append(call(url, "-O", "-"))
        os.kill(os.getpid(), signal.SIGTERM)
        # And in a thread there are none to be had.
        in_background(lambda: results.append(call(url, "-O", "-"))).join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(seen) == 1 and results == [(0, b"x", "")] * 2


# -- packaging


def test_the_file_runs_without_being_installed(server, tmp_path):
    """From a zipapp, in a folder that cannot be written, and in a package, where it
    leaves the name htsget alone."""
    app, folder, package, other = [
        tmp_path / name for name in ("app", "folder", "pkg/_vendor", "htsget")
    ]
    other.mkdir()
    for target in (app, folder, package):
        target.mkdir(parents=True)
        shutil.copy(PROGRAM, str(target / "htsget.py"))
    text = "import sys\nimport htsget.cli\nsys.exit(htsget.cli.htsget_main())\n"
    (app / "__main__.py").write_text(text)
    zipapp.create_archive(str(app), str(tmp_path / "htsget.pyz"))
    folder.chmod(0o555)
    for path in (package.parent, package):
        (path / "__init__.py").write_text("")
    for name in ("__init__", "io", "cli"):
        (other / (name + ".py")).write_text("other = True\n")
    url = server.ticket([data_uri(b"x")])
    for words in (["htsget.pyz"], ["folder/htsget.py"], ["-m", "pkg._vendor.htsget"]):
        words = [sys.executable, *words, url, "-O", "-"]
        assert launch(words, cwd=str(tmp_path), env={}) == (0, b"x", "")
    code = """
import sys; sys.path[0] = '.'
import pkg._vendor.htsget
print(sorted(n for n in sys.modules if n.split('.')[0] == 'htsget'))
import htsget.io, htsget.cli
print(htsget.other and htsget.io.other and htsget.cli.other)
"""
    result = launch([sys.executable, "-c", code], cwd=str(tmp_path))
    assert result == (0, b"[]\nTrue\n", "")


# ---- the random model
#
# Random tickets, servers, faults, kills and outputs, each from a seed. What arrives is
# exactly right, or there is an exception; a scenario lasts this many seconds at most.
SCENARIO_LIMIT = 25


class Versions(File):
    """A file of which there are two versions: the second one from some response on,
    or, behind a load balancer, now and then."""

    def __init__(self, versions, change_at, balance, seed, **options):
        super().__init__(*versions[0], **options)
        self.versions, self.change_at, self.balance = versions, change_at, balance
        self.rng, self.count = random.Random(seed), 0

    def respond(self, handler, fault):
        with self.lock:
            self.count += 1
            is_second = self.count > self.change_at
            if self.balance:
                is_second = self.rng.random() < self.balance
        data, etag = self.versions[is_second and len(self.versions) > 1]
        changes = dict({"data": data, "etag": etag}, **fault.changes)
        super().respond(handler, Fault(fault.status, **changes))


class Scenario:
    """A ticket, its servers and what happens; `expected` has for each block the name
    of its object, and the block's bytes in each version of that."""

    def __init__(self, seed, stack, folder):
        self.rng = rng = random.Random(seed)
        self.seed, self.folder = seed, folder
        self.nodes = [stack.enter_context(Server()) for _ in range(rng.choice([1, 3]))]
        self.profile = rng.choice(["mixed", "mixed", "crowd", "big"])
        self.is_changing = rng.random() < 0.25
        # Faults that a transfer must overcome, and a server that does as it should.
        self.is_benign = not self.is_changing and rng.random() < 0.5
        self.expires, self.is_slow = rng.random() < 0.3, rng.random() < 0.4
        self.moves = not self.is_changing and rng.random() < 0.5
        for node in self.nodes:
            node.latency = rng.choice([0.01, 0.03]) if self.is_slow else 0
        # Functions that make an entry of the nth ticket.
        self.entries, self.expected, self.files = [], [], []
        counts = {"mixed": rng.randrange(1, 5), "crowd": 3, "big": 1}
        for number in range(counts[self.profile]):
            self.add_file("/%d" % number)
        # A renewed ticket may have another block in front, an empty one.
        self.is_elsewhere = not self.is_benign and rng.random() < 0.2
        self.spoil(rng.choice([0, 1, 2, 4]))
        ticket_faults = [rng.choice([Fault(503), Fault(raw=b"")])] * rng.randrange(2)
        self.url = self.nodes[0].ticket(self.ticket, faults=ticket_faults)

    def add_file(self, path):
        """A file on each node, and blocks of it."""
        rng = self.rng
        sizes = {"mixed": [1, 500, 70000, 200000, 600000], "crowd": [400000, 2000000]}
        size = rng.choice(sizes.get(self.profile, [3 * MIB, 5 * MIB]))
        make = rng.choice(["inline", "plain", "closed", "closed", "open", "signed"])
        heed = rng.choice(["all"] * 3 + ["none", "own", "slice"])
        etags = rng.choice([('"1"', '"2"')] * 2 + [(None, None), ('W/"1"', 'W/"2"')])
        framing = rng.choice(["length"] * 3 + ["chunked", "close", "HTTP/1.0"])
        total = rng.choice(["size"] * 3 + ["slice", "*"])
        if self.is_benign or self.profile != "mixed":
            make, heed = rng.choice(["closed", "plain", "open"]), "all"
            framing, total = rng.choice(["length", "chunked"]), "size"
        if self.is_changing:
            heed, etags, total = "all", ('"1"', '"2"'), "size"
            make = "closed" if make in ("inline", "open") else make
        data = pattern(size, rng.randrange(9))
        if make == "inline":
            self.expected.append(("inline", [data[:900]]))
            self.entries.append(lambda n: data_uri(data[:900]))
            return
        versions = [(data, etags[0])]
        if self.is_changing:
            sizes = [size, max(1, size // 2), size + 1000]
            versions.append((pattern(rng.choice(sizes), 10), etags[1]))
        elif rng.random() < 0.2 and not self.is_benign:
            # Nodes with ETags of their own.
            versions.append((data, etags[1]))
        counts = {"mixed": [1, 2, 3, 4, 5], "crowd": [4], "big": [1, 2]}
        count = rng.choice(counts[self.profile])
        count = 1 if make == "plain" else min(count, size)
        spans = sliced(None, size, count, lambda url, first, stop: (first, stop))
        if make in ("open", "plain"):
            spans[-1] = (spans[-1][0], None)
        options = {
            "framing": framing, "total": total, "ranges": heed in ("all", "own"),
            "rate": rng.choice([None, 20 * MIB]) if self.is_slow else None,
            "headers": {"Accept-Ranges": "bytes"} if heed == "all" else {},
            "only": None if heed != "own" else [byte_range(*span) for span in spans],
            "refusal": Fault(403 if self.expires else rng.choice([400, 416, 500, 501])),
        }  # fmt: skip
        change_at = rng.randrange(8) if len(versions) > 1 else 1 << 30
        balance = rng.choice([0, 0.3]) if len(versions) > 1 else 0
        # Blocks share an object where their ranges do, and only there.
        for index, (first, stop) in enumerate(spans):
            at, slices = path, [(one[first:stop], etag) for one, etag in versions]
            if heed == "slice":
                at = "%s/%d" % (path, index)
            for node in self.nodes if index == 0 or heed == "slice" else []:
                uses = rng.choice([2, 4]) if self.expires else None
                served = slices if heed == "slice" else versions
                args = served, change_at, balance, rng.random()
                self.files.append(Versions(*args, uses=uses, **options))
                node.at(at, self.files[-1])
            self.entries.append(self.entry(make, at, first, stop, len(self.entries)))
            self.expected.append((at, [one for one, _ in slices]))

    def entry(self, make, path, first, stop, index):
        def build(ticket):
            node = self.nodes[(ticket if self.moves else 0) % len(self.nodes)]
            query = "?token=%d" % ticket if self.expires else ""
            if make == "signed":
                query = "?X-Amz-SignedHeaders=range&X-Amz-Signature=%d-%d"
                query %= (ticket if self.expires else 0, index)
            if make == "plain":
                return node.url + path + query
            return node.url + path + query, {"Range": byte_range(first, stop)}

        return build

    def ticket(self, number):
        elsewhere = [data_uri(b"")] if number and self.is_elsewhere else []
        return elsewhere + [build(number) for build in self.entries]

    def spoil(self, most):
        for file in self.files:
            faults = [self.fault(file) for _ in range(self.rng.randrange(most + 1))]
            goods = [Fault()] * self.rng.randrange(4)
            file.faults = faults + goods
            self.rng.shuffle(file.faults)
            file.left = [1] * len(file.faults)

    def fault(self, file):
        rng, size = self.rng, len(file.versions[0][0])
        cut, again = rng.randrange(size), {"Retry-After": rng.choice(["0", None])}
        busy = Fault(rng.choice([429, 503]), headers=again)
        kinds = [
            Fault(cut=cut), Fault(cut=cut, reset=True), Fault(cut=0), busy, busy,
            Fault(rng.choice([500, 502, 503, 504, 408, 429])),
            Fault(raw=rng.choice([b"", b"garbage\r\n\r\n", b"HTTP/1.1 2", b"\0" * 99])),
        ]  # fmt: skip
        if self.seed % 5 == 0:
            kinds.append(Fault(cut=cut, stall=True))
        if not self.is_benign and not self.is_changing:
            wrong = "bytes %d-%d/%d" % (cut, cut + rng.randrange(size), size)
            kinds += [
                Fault(headers={"Content-Range": wrong}), Fault(403), Fault(404),
                Fault(headers={"Content-Range": wrong}, framing="chunked"),
                Fault(headers={"Content-Range": None}), Fault(headers={"ETag": None}),
                Fault(ranges=False), Fault(ranges=False, framing="chunked"),
                Fault(ranges=False, framing="chunked", cut=cut),
                Fault(200, body=b"<html><p>try later</p></html>"),
            ]  # fmt: skip
        return rng.choice(kinds)

    def run(self):
        """Do it all; whether everything arrived."""
        kinds = ["seekable", "pipe", "stream", "path"] * 5 + ["path"] * 4 + ["child"]
        kind = self.rng.choice(kinds)
        options = {"timeout": 0.3 if self.seed % 5 == 0 else 10, "max_retries": 12}
        options.update(connections=self.rng.choice([1, 2, 4, 8]), retry_wait=0)
        path = os.path.join(self.folder, "out")
        if kind in ("path", "child"):
            for _ in range(self.rng.randrange(3)):
                if self.die(kind, path, options):
                    break
                if self.rng.random() < 0.3:
                    self.damage(path)
        try:
            data = self.get(kind, path, options)
        except htsget.HtsgetException as error:
            assert "bug" not in str(error) and "out of order" not in str(error), error
            assert not os.path.exists(path)
            # Where nothing but the output or the moment was in the way.
            assert not self.is_benign or self.expires, repr(error)
            self.check_rerun(path, options)
            return False
        assert self.is_right(data), "wrong bytes in a %s" % kind
        return True

    def get(self, kind, path, options):
        if kind == "stream":
            with htsget.open(self.url, **options) as stream:
                return stream.read()
        if kind not in ("path", "child"):
            return fetch(self.url, kind, **options)
        if not os.path.exists(path):
            htsget.get(self.url, path, **options)
        return contents(path)

    def check_rerun(self, path, options):
        """After an error, when the servers have recovered."""
        for file in self.files:
            file.faults, file.uses = [], None
        with contextlib.suppress(htsget.HtsgetException):
            htsget.get(self.url, path, **options)
        is_right = not os.path.exists(path) or self.is_right(contents(path))
        assert is_right, "wrong bytes in a rerun"

    def die(self, kind, path, options):
        """A run that ends at a random place; whether it came to its end before."""
        end = self.rng.randrange(sum(len(data[0]) for _, data in self.expected) + 1)
        self.spoil(self.rng.choice([0, 2]))
        if kind == "child":
            return self.kill_child(path, options, end)

        def progress(so_far, size):
            if so_far >= end:
                raise Death

        with contextlib.suppress(Death, htsget.HtsgetException):
            htsget.get(self.url, path, progress=progress, **options)
        return os.path.exists(path)

    def kill_child(self, path, options, end):
        """The same with a process that gets SIGKILL."""
        code = "import htsget, json; url, path, options = sys.argv[1:]\n"
        code += "htsget.get(url, path, **json.loads(options))"
        limit = self.nodes[0].sent + end
        with running(self.url, path, json.dumps(options), code=code) as process:
            while process.poll() is None and sum(n.sent for n in self.nodes) < limit:
                time.sleep(0.005)
            process.kill()
            process.communicate()
        return os.path.exists(path)

    def damage(self, path):
        """What a crash or a full disk leaves of the kept files."""
        name = self.rng.choice(kept(path))
        if os.path.exists(name) and os.path.getsize(name):
            size = self.rng.randrange(os.path.getsize(name))
            with open(name, "r+b") as file:
                file.seek(size)
                file.write(bytes(self.rng.choice([0, 0, 1, 4096])))
                if file.tell() == size:
                    file.truncate()

    def is_right(self, data):
        """Whether the data is that of all blocks, each object in one version."""
        states = {(0, ())}
        for name, versions in self.expected:
            reached = set()
            for position, chosen in states:
                for number, expected in enumerate(versions):
                    known = dict(chosen).get(name, number)
                    if known == number and data.startswith(expected, position):
                        more = tuple(sorted({*chosen, (name, number)}))
                        reached.add((position + len(expected), more))
            states = reached
        return any(position == len(data) for position, _ in states)


def byte_range(first, stop):
    return "bytes=%d-%s" % (first, "" if stop is None else stop - 1)


def run_model(seconds, seed, workers=4):
    """Run scenarios for some seconds; how many, and how many arrived."""
    deadline, results, failures = time.monotonic() + seconds, [], []
    seeds, running_since = itertools.count(seed), {}

    def work():
        while time.monotonic() < deadline and not failures:
            number = next(seeds)
            running_since[number] = time.monotonic()
            try:
                with tempfile.TemporaryDirectory() as folder:
                    with contextlib.ExitStack() as stack:
                        results.append(Scenario(number, stack, folder).run())
            except BaseException as error:
                failures.append((number, error))
            del running_since[number]

    threads = [in_background(work) for _ in range(workers)]
    while any(thread.is_alive() for thread in threads):
        threads[0].join(0.05)
        for number, since in list(running_since.items()):
            if time.monotonic() - since > SCENARIO_LIMIT:
                faulthandler.dump_traceback()
                raise AssertionError("HTSGET_MODEL_SEED=%d: stands still" % number)
    for number, error in failures:
        raise AssertionError("HTSGET_MODEL_SEED=%d: %r" % (number, error)) from error
    return len(results), sum(results)


def test_a_random_model():
    seconds = float(os.environ.get("HTSGET_MODEL_SECONDS", 1.5))
    seed = int(os.environ.get("HTSGET_MODEL_SEED", 1))
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds + 2 * SCENARIO_LIMIT, 5)
    faulthandler.dump_traceback_later(seconds + 4 * SCENARIO_LIMIT, exit=True)
    count, arrived = run_model(seconds, seed)
    assert arrived > 0.4 * count


def main_model(seconds="100", seed=None):
    seed = int(seed or random.randrange(1 << 30))
    logging.disable(logging.CRITICAL)
    print("first seed %d" % seed, flush=True)
    print("%d scenarios, of which %d arrived" % run_model(float(seconds), seed))


# ---- serve and demo by themselves


@pytest.fixture(scope="module")
def archive():
    with demo_site(size=0.1, token="tt", fail=5) as site:
        yield site


NINE = ("chr1", 0, 9)


@pytest.mark.parametrize("endpoint, form", [("reads", "BAM"), ("variants", "VCF")])
@pytest.mark.parametrize("name, options, expected", [
    ("demo", {}, "all"), ("demo", {"data_class": "header"}, "header"),
    ("demo", {"reference_name": "chr1", "start": 0, "end": 300000}, "some"),
    ("demo", {"regions": [NINE, ("chr1", 900000, None)]}, "some"),
    ("demo", {"fields": "QNAME", "tags": "NM", "notags": "OQ"}, "all"),
    ("s3", {}, "all"), ("restricted", {}, "some"),
    ("several", {"regions": [NINE]}, "some"),
    ("several", {"regions": [NINE, NINE]}, htsget.IntegrityError),
    ("demo", {"reference_name": "chr2"}, htsget.ClientError),
    ("demo", {"data_format": "CRAM"}, htsget.ClientError),
    ("demo", {"bearer_token": "o"}, htsget.ClientError),
    ("demo", {"bearer_token": None}, htsget.ClientError),
    ("other", {}, htsget.ClientError),
])  # fmt: skip
def test_what_serve_has(archive, endpoint, form, name, options, expected):
    options = dict({"bearer_token": "tt", "data_format": form}, **options)
    url, served = "%s/%s/%s" % (archive.url, endpoint, name), archive.archives[endpoint]
    if not isinstance(expected, str):
        check(expected, url, **options)
        return
    data = fetch(url, **options)
    header, is_all = served.data[: served.header], data == served.data
    assert data.startswith(header)
    assert {"all": is_all, "header": data == header, "some": not is_all}[expected]


def test_serve_and_demo_as_programs(archive, tmp_path):
    info = htsget.service_info(archive.url + "/reads", bearer_token="tt")
    assert info["htsget"]["formats"] == ["BAM"]
    path = os.path.abspath(sys.modules[Server.__module__].__file__)
    env = child_env({"PYTHONPATH": os.path.dirname(PROGRAM)})
    words = [sys.executable, "-B", "-u", path]
    demo = [*words, "demo", "--size", "0.6", "--rate", "1500000"]
    more = {"env": env, "cwd": str(tmp_path), "stdout": subprocess.PIPE}
    with subprocess.Popen([*words, "serve", "--size", "0.1"], **more) as process:
        first = process.stdout.readline().decode()
        lines = iter(lambda: process.stdout.readline().decode(), "")
        last = next(line for line in lines if "/variants/restricted" in line)
        assert fetch(re.search(r"http://\S+?(?=;)", first).group() + "/reads/demo")
        assert " -O " in last
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    done = subprocess.run(demo, stderr=subprocess.PIPE, **more)
    assert done.returncode == 0, done.stderr
    assert b"identical" in done.stdout
    folder = re.search(r"demo are in (\S+)\.\n", done.stdout.decode()).group(1)
    assert not os.path.exists(folder)
    assert os.listdir(str(tmp_path)) == []


# ---- the README


def readme():
    with open(os.path.join(HERE, "README.rst"), encoding="utf-8") as file:
        return file.read()


def readme_blocks(opening=r"\S.*::|::"):
    """The literal blocks that follow such a line."""
    found = re.findall(r"(?m)^(?:%s)\n\n((?:    .*\n|\n)+)" % opening, readme())
    return [textwrap.dedent(block).strip("\n") for block in found]


EXAMPLES = [
    (language, block)
    for language in ("sh", "python")
    for block in readme_blocks(r"\.\. code-block:: " + language)
]
TRANSCRIPTS = [block for block in readme_blocks() if block.startswith("$ ")]


def example_with(word):
    """The language and the text of the example that has such a word."""
    return next(example for example in EXAMPLES if word in example[1])


def missing_tools(text):
    """What an example needs that is not there."""
    modules = re.findall(r"^ *(?:import|from) (\w+)", text, re.M)
    gone = [m for m in modules if m != "htsget" and not importlib.util.find_spec(m)]
    programs = ["bash"] + [p for p in ("samtools", "snakemake") if p + " " in text]
    return gone + [p for p in programs if shutil.which(p) is None]


def skip_without_tools(text):
    if missing_tools(text):
        pytest.skip("needs " + ", ".join(missing_tools(text)))


def write_program(folder, name, text):
    path = folder / name
    path.write_text("#!/bin/sh\n%s\n" % text)
    path.chmod(0o755)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with a copy of the file. `python3` is this Python, `htsget` that file,
    `crypt4gh` copies, `scontrol` notes what it is asked."""
    programs, folder = tmp_path / "bin", tmp_path / "work"
    programs.mkdir()
    folder.mkdir()
    python, program = map(shlex.quote, [sys.executable, PROGRAM])
    write_program(programs, "python3", 'exec %s "$@"' % python)
    write_program(programs, "htsget", 'exec %s %s "$@"' % (python, program))
    write_program(programs, "crypt4gh", "exec cat")
    write_program(programs, "scontrol", 'echo "$@" >> requeued')
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    shutil.copy(PROGRAM, str(folder))
    (folder / "regions.txt").write_text("chr1:1-10\nchr1:200,000-300,000\n")
    (folder / "alice.pub").write_text("-----BEGIN CRYPT4GH PUBLIC KEY-----\nabc\n" * 9)
    return folder


def run_in(folder, words, **environment):
    """Status, standard output and standard error of a command."""
    done = launch(words, cwd=str(folder), env=child_env(environment), timeout=25)
    return done._replace(stdout=done.stdout.decode())


def run_example(example, folder, url, **environment):
    """Run an example as printed, but for the server's address."""
    language, text = example
    text = text.replace("https://example.org", url) + "\n"
    (folder / "example").write_text(text)
    words = {"python": [sys.executable], "sh": ["bash", "-e"]}[language]
    if text.startswith("#!"):
        words = [text[2:].splitlines()[0]]
    slurm = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    environment = dict(slurm, TOKEN="secret", **environment)
    return run_in(folder, words + ["example"], **environment)


def test_what_the_readme_shows_works(desk):
    def test(_, example):
        folder = desk.parent / ("example%d" % EXAMPLES.index(example))
        shutil.copytree(str(desk), str(folder))
        with demo_site() as site:
            result = run_example(example, folder, site.url)
            assert result.status == 0, (example, result)
            assert bool(site.requests) == ("example.org" in example[1])
        assert not list(folder.glob("*.part*")) and not list(folder.glob("requeued"))

    at_once(test, [e for e in EXAMPLES if not missing_tools(e[1])])


def masked(text, folder):
    """A transcript without what differs from run to run."""
    text = text.replace(str(folder), "/scratch/me")
    return re.sub(r"\d[\d.]* (bytes|[KMGT]iB)|\d[\d.]*", "N", text)


def run_killed(words, folder):
    """Standard error of a command that is terminated once its output has begun."""
    part, more = folder / (words[-1] + ".part"), {"stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=str(folder), env=child_env(), **more) as process:
        while process.poll() is None and not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
        return end_by(process, "TERM")


@pytest.mark.parametrize("transcript", TRANSCRIPTS)
def test_the_readme_shows_what_is_printed(desk, transcript):
    skip_without_tools("")
    folder = os.path.realpath(str(desk))
    with demo_site(size=0.2, rate=400000) as site:
        shown = ""
        for line in re.findall(r"(?m)^\$ (.*)$", transcript):
            words = shlex.split(line.replace("https://example.org", site.url))
            shown += "$ %s\n" % line
            if words[0] == "timeout":
                shown += run_killed(words[2:], desk)
            else:
                result = run_in(desk, words)
                assert result.status == 0, result
                shown += result.stdout + result.stderr
    assert masked(shown, folder) == masked(transcript + "\n", folder)


@pytest.mark.parametrize("word", ["pipefail", "Popen"])
def test_a_recipe_with_a_pipe_fails_when_the_data_does(desk, server, word):
    skip_without_tools(example_with(word)[1])
    for first in (b"", make_bam(9), pattern(1 << 20)):
        server.ticket([data_uri(first), server.url + "/gone"], path="/reads/demo")
        result = run_example(example_with(word), desk, server.url)
        assert result.status != 0, result


def test_the_recipe_for_several_regions_stops_at_an_error(desk):
    example = example_with("samtools merge")
    skip_without_tools(example[1])
    (desk / "regions.txt").write_text("chr1:1-10\nchr2:1-10\n")
    with demo_site() as site:
        assert run_example(example, desk, site.url).status == 1
    assert not (desk / "merged.bam").exists()


def test_the_recipe_for_crypt4gh_sends_the_key(desk):
    skip_without_tools("")
    with demo_site() as site:
        assert run_example(example_with("crypt4gh"), desk, site.url).status == 0
        sent = site.requests[0].headers["Htsget-Context-Public-Key"]
    assert base64.b64decode(sent, validate=True) == contents(desk / "alice.pub")


def test_the_snakefile_works(desk):
    text = next(block for block in readme_blocks() if block.startswith("rule"))
    skip_without_tools("snakemake ")
    with demo_site() as site:
        text = text.replace("https://example.org", site.url)
        (desk / "Snakefile").write_text(text)
        line = re.search(r"``(snakemake .*?)``", readme()).group(1)
        result = run_in(desk, line.split(), HOME=str(desk))
        assert result.status == 0, result
        assert contents(desk / "chr1.bam") == site.archives["reads"].data


def test_slurm_requeues_a_task_that_gave_up_but_not_for_ever(desk):
    skip_without_tools("")
    log = desk / "requeued"
    rows = [(0, "0", 0), (1, "0", 0), (75, "", 1), (75, "4", 1), (75, "5", 0)]
    for status, restarts, requeued in rows:
        log.write_text("")
        write_program(desk.parent / "bin", "htsget", "exit %d" % status)
        restarts = {"SLURM_RESTART_COUNT": restarts}
        result = run_example(example_with("#SBATCH"), desk, "", **restarts)
        assert result.status == status
        assert log.read_text() == "requeue 7_1\n" * requeued


def test_a_vendored_copy_needs_no_other_file(desk):
    package = desk / "yourpkg" / "_vendor"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (desk / "htsget.py").rename(package / "htsget.py")
    for line in re.findall(r"``(python3 -m yourpkg\S+|from yourpkg.*?)``", readme()):
        words = line.split() + ["--version"]
        if line.startswith("from"):
            words = ["python3", "-c", line + "; print('htsget', htsget.__version__)"]
        expected = (0, "htsget %s\n" % htsget.__version__, "")
        assert run_in(desk, words) == expected, line
    pydoc = re.search(r"``(python3 -m pydoc .*?)``", readme()).group(1).split()
    assert "max_retries" in run_in(package, pydoc).stdout
    assert b"SPDX-License-Identifier: MIT\n# Copyright" in contents(PROGRAM)[:200]


def test_the_readme_names_every_option():
    options = call("--help").stdout.decode()
    for option in set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", options)):
        assert re.search(r"(?<![\w-])%s(?![\w-])" % option, readme()), option


def test_the_readme_quotes_messages_that_exist():
    source = contents(PROGRAM).decode()
    source = re.sub(r'"\n *"', "", source)
    table = readme().split("\nmessage ")[1].split("\n\n")[0]
    quoted = re.findall(r'"(.+?)"', table)
    assert len(quoted) > 9
    assert [words for words in quoted if words not in source] == []


def test_the_readme_selects_tests_that_exist():
    runs = [block for block in readme_blocks() if "-m pytest" in block]
    headings = re.findall(r"(?m)^# ---- (.*)$", contents(__file__).decode())
    known = set(globals()) | {"section_" + h.replace(" ", "_") for h in headings}
    names = re.findall(r"-k (\S+)", "\n".join(runs))
    # A section's name is known where its tests are in this file.
    is_whole = os.path.basename(__file__) == "test_htsget.py"
    names = [n for n in names if is_whole or not n.startswith("section_")]
    assert names and set(names) <= known


# ---- sections by name


def name_sections():
    """Let `-k section_transport` select the tests under that heading."""
    lines = enumerate(contents(__file__).decode().splitlines(), 1)
    headings = [(number, line[7:]) for number, line in lines if line[:7] == "# ---- "]
    for name, function in list(globals().items()):
        if name.startswith("test_"):
            first = function.__code__.co_firstlineno
            heading = [text for number, text in headings if number < first][-1]
            setattr(function, "section_" + heading.replace(" ", "_"), True)


name_sections()

if __name__ == "__main__":
    main_model(*sys.argv[2:])
