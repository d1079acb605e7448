#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The htsget.py developers
"""Fetch slices of BAM, CRAM, VCF and BCF files over the GA4GH htsget protocol.

An htsget server responds to a request with a ticket: a JSON list of data blocks, each a
URL (a byte range of a file, or a ``data:`` URI) with the headers it needs. The data is
the concatenation of the blocks. This module requests the ticket, fetches the blocks and
joins them. It is one file without dependencies, for CPython 3.6 and later and PyPy. To
vendor it, copy it, for example to ``yourpkg/_vendor/htsget.py``.

    import htsget

    url = "https://example.org/reads/NA12878"

    # To a path: the file appears when, and only when, it is complete.
    htsget.get(url, "NA12878.bam", reference_name="chr1", start=0, end=100000)

    # To any binary file object.
    with open("NA12878.bam", "wb") as output:
        htsget.get(url, output, data_format="BAM")

    # As a stream that is read while the data arrives.
    with gzip.open(htsget.open("https://example.org/variants/x"), "rt") as vcf:
        for line in vcf:
            ...

    # The ticket alone, and what the server says about itself.
    ticket = htsget.get_ticket(url)
    info = htsget.service_info("https://example.org/reads")

Command line:

    python3 htsget.py https://example.org/reads/NA12878 -O NA12878.bam
    python3 htsget.py --help

What ``get`` promises. Never wrong bytes: when it returns, the output is exactly the
concatenation of the ticket's data blocks, counted and verified. Never start over: after
a failure, reading resumes at the byte where it stopped; so does a later run with the
same path, from the part file and its journal. Never wait needlessly: latency is
overlapped, memory is bounded, and what cannot succeed fails with a message that helps.

Errors are `HtsgetException` and its subclasses, except those of the output (disk full,
broken pipe), which are plain `OSError`. Messages go to the logger of the module's name.
"""

import argparse
import base64
import binascii
import collections
import contextlib
import datetime
import email.utils
import errno
import functools
import hashlib
import http.client
import itertools
import json
import logging
import os
import random
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import sys
import textwrap
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
import zlib
from io import BufferedReader, FileIO, RawIOBase, TextIOBase
from io import open as _open
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Deque,
    Dict,
    Generator,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Set,
    TextIO,
    Tuple,
    Union,
)

__version__ = "3.0.0"

# Without `open`: a star import must not replace the built-in.
__all__ = ["get", "get_ticket", "main", "parse_region", "service_info"]
__all__ += ["DataBlock", "Region", "Ticket", "ContentLengthMismatch"]
__all__ += ["HtsgetException", "RequestError", "ProtocolError", "IntegrityError"]
__all__ += ["ClientError", "RetryableError", "RetryableIOError"]

_log = logging.getLogger(__name__ if __name__ != "__main__" else "htsget")


# ---- constants

# The media type of protocol version 1.3 (spec: "Protocol versioning"). The EGA
# responds with 406 if nothing else is acceptable.
_ACCEPT = "application/vnd.ga4gh.htsget.v1.3.0+json, */*;q=0.8"
# The SAM fields of the spec's `fields` parameter.
_FIELDS = "QNAME FLAG RNAME POS MAPQ CIGAR RNEXT PNEXT TLEN SEQ QUAL".split()
# The environment variable with which htslib's users allow tokens over plain http.
_ALLOW_PLAIN = ("HTS_ALLOW_UNENCRYPTED_AUTHORIZATION_HEADER", "I understand the risks")
# Query parameters that sign a URL; the short names, only where there is a signature.
_SIGNATURE = re.compile(r"(?i)x-(amz|goog|oss)-|(access_)?token\Z")
_SIGNED = re.compile(
    _SIGNATURE.pattern + r"|(awsaccesskeyid|googleaccessid|sig|signature|expires|policy"
    r"|key-pair-id|s[eprtv]|spr|sk[estv]|skoid|sktid)\Z"
)
# New bytes that count as progress and reset the count of retries.
_PROGRESS = 1 << 16
# Seconds: the longest wait between two retries, unless `retry_wait` is longer; the
# longest Retry-After; the longest timeout (poll() takes milliseconds in a C int).
_LONGEST_WAIT = 60.0
_LONGEST_RETRY_AFTER = 3600.0
_LONGEST_TIMEOUT = 2e6
# Progress meter: seconds between updates on a terminal and elsewhere; the rate's span.
_METER_TERMINAL = 0.2
_METER_LOG = 30.0
_METER_SPAN = 5.0
# A disk or quota without room: a rerun resumes once there is some.
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))

# Bytes of a read: larger buffers are allocated by mmap, with page faults each time.
_CHUNK = 1 << 18
# TLS delivers bulk data in records of this size.
_TLS_RECORD = 1 << 14
# Buffer for a response's header section and a small body that arrives with it.
_FIRST_READ = 68 << 10
# Bytes of an error body that are read.
_ERROR_LIMIT = 1 << 16
# A ticket with inline data may be large; endless JSON must not fill the memory.
_TICKET_LIMIT = 64 << 20
# Statuses that a later attempt may overcome; 520 to 529 are those of CDNs.
_RETRIED_STATUS = {408, 429, 500, 502, 503, 504} | set(range(520, 530))

# How many replicas behind a load balancer are tried for an object.
_REPLICA_ATTEMPTS = 10
# Bytes of a block that may be read again to learn whether its server takes Ranges.
_REREAD_LIMIT = 64 << 20
# Statuses of URLs that may have expired, or of Ranges that may not be changed.
_REFUSED_STATUS = (400, 401, 403, 404, 410, 416)
# Statuses of a server that limits connections or requests.
_CROWDED_STATUS = (429, 503)
# Renewals in a row for the ticket's own request (URLs may expire unused) and others.
_RENEWALS_OWN, _RENEWALS_CHANGED = 3, 1
# Headers of a ticket that would interfere with the framing of messages.
_FRAMING_HEADERS = set(
    "accept-encoding connection content-length expect keep-alive te transfer-encoding"
    " upgrade".split()
)
# The window: bytes per connection and in all; the first cut, and the smallest.
_WINDOW_EACH = 8 << 20
_WINDOW_MOST = 64 << 20
_FIRST_CUT = 1 << 20
_SMALLEST_CUT = 1 << 18
# Seconds: shorter waits are noise, longer ones mean a slow server.
_NOTICEABLE = 0.1
# Seconds after which connections of other parts are suspected to block the part due.
_STARVED = 3.0
# Seconds between checks for a starved part that is due, or a stopped transfer.
_POLL = 0.25
# Memory that a chunk takes besides its data, in bytes.
_CHUNK_OVERHEAD = 250

# The journal's checkpoints are so many bytes (1 MiB, less a chunk) or seconds apart,
# whichever is less, but at least 1/1024 of the file: for 1 TB the journal has 1.5 MB.
_CHECKPOINT_BYTES = 3 << 18
_CHECKPOINT_SECONDS = 1.0
_CHECKPOINT_SHIFT = 10
# The version of the journal's form: another one is not read.
_JOURNAL_VERSION = 3
# Names of streams that are open: they are written, never replaced.
_OWN_STREAM = re.compile(r"/(?:dev|proc/self)/(?:fd/)?(\d{1,9}|stdout|stderr)\Z")
# File systems without fsync report these.
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
# Most file systems allow file names of this many bytes.
_LONGEST_NAME = 255
# What data of a format begins with, once decompressed.
_MAGIC = {"BAM": b"BAM\1", "BCF": b"BCF\2", "CRAM": b"CRAM", "VCF": b"##"}
# What the first BGZF block of a new file begins with, once decompressed.
_BGZF_BEGINNINGS = (b"BAM\1", b"BCF\2", b"##fileformat")
# Bytes by which a format or an error document is known; enough for inflating some.
_BEGINNING = 1 << 10
# A BGZF block's header (SAM spec 4.1): magic, 6 bytes, XLEN 6 and subfield BC of length
# 2, BSIZE. The empty block that ends BAM, BCF and compressed VCF files (4.1.2).
_BGZF_HEADER = struct.Struct("<4s6x6sH")
_BGZF_MAGIC = b"\x1f\x8b\x08\x04"
_BGZF_USUAL = b"\6\0BC\2\0"
_BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
# The end of the EOF container of CRAM 3 (CRAM spec 9). The bits before vary by writer.
_CRAM_EOF = bytes.fromhex("e0454f4600000000010005bdd94f0001000606010001000100ee63014b")


# ---- version and platform shims

# Windows has no file locks of this kind.
fcntl: Any
try:
    import fcntl
except ImportError:
    fcntl = None

# For Python 3.6, which has no time.thread_time.
_thread_time: Callable[[], float] = getattr(time, "thread_time", time.process_time)
if sys.version_info < (3, 7) and hasattr(time, "clock_gettime"):
    _thread_time = functools.partial(time.clock_gettime, time.CLOCK_THREAD_CPUTIME_ID)

if TYPE_CHECKING:
    # From Python 3.8; only for type checkers.
    from typing import Protocol

    class _Writable(Protocol):
        def write(self, __data: bytes) -> Any:
            """What an output must have."""


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Threads started here leave signals to the main one (not on Windows)."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _new_md5() -> Any:
    """An MD5 object, or None where FIPS forbids it. The `if` goes with Python 3.8."""
    try:
        if sys.version_info >= (3, 9):
            return hashlib.md5(usedforsecurity=False)
        return hashlib.md5()
    except ValueError:
        _log.warning("MD5 is not available here: not checking the ticket's MD5")
        return None


def _require_tls_1_2(context: ssl.SSLContext) -> None:
    """The default from Python 3.10 on; goes with 3.9."""
    if sys.version_info < (3, 10):
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1


def _notice_cut_tls(context: ssl.SSLContext) -> ssl.SSLContext:
    """Debian 12's Python 3.11.2 sets SSL_OP_IGNORE_UNEXPECTED_EOF (0x80): OpenSSL 3
    then takes a cut connection for a clean end."""
    context.options &= ~0x80
    return context


# ---- exceptions
#
# Split by who broke the contract: the caller, the server, or the network. `transient`
# and `retry_after` are for the retry policy. Output errors propagate as plain OSError.


class HtsgetException(Exception):
    """Base class of the errors of a transfer."""

    # Whether the same request may succeed when it is repeated soon, and the seconds to
    # wait before that, as the server asked.
    _transient = False
    _retry_after = 0.0

    def __init__(
        self,
        text: str = "",
        *values: Any,
        transient: Optional[bool] = None,
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(text % values if values else text)
        if transient is not None:
            self._transient = transient
        self._retry_after = retry_after


class RequestError(HtsgetException, ValueError):
    """The caller asked for something that the protocol forbids."""


class ProtocolError(HtsgetException):
    """The server's ticket or response breaks the protocol."""


class IntegrityError(ProtocolError):
    """The bytes are complete but wrong: MD5, format, BGZF chain or EOF marker."""


class ClientError(HtsgetException):
    """The server refused the request (spec: "Errors").

    `status` (int) is the HTTP status; `error` (str) the error type of the specification
    or the HTTP reason; `message` (str) the server's explanation; `url` (str) has no
    query; `body` (str) is the beginning of the response's body.
    """

    def __init__(
        self,
        status: int,
        error: str,
        message: str = "",
        url: str = "",
        body: str = "",
        kind: str = "",
    ) -> None:
        # `args` leaves out the body: it is printed with the exception's repr.
        Exception.__init__(self, status, error, message, url)
        self.status, self.error, self.message = status, error, message
        self.url, self.body = url, body
        # "ticket", "data block" or "proxy", perhaps "… with login".
        self._kind = kind

    @property
    def exception_str(self) -> str:
        """Status and error, as in the htsget package on PyPI."""
        return "HTTP %d %s" % (self.status, self.error)

    def __str__(self) -> str:
        text = self.exception_str + (": " + self.message if self.message else "")
        return text + (" (%s)" % self.url if self.url else "")


class RetryableError(HtsgetException):
    """Gave up on something that a later run may overcome."""

    _transient = True


class ExceptionWrapper(HtsgetException):
    """An error that has another exception, `source`, as its cause."""

    def __init__(
        self, text: str, source: Optional[Exception] = None, retry_after: float = 0.0
    ) -> None:
        super().__init__(text, retry_after=retry_after)
        self.source = self.__cause__ = source


class RetryableIOError(RetryableError, ExceptionWrapper):
    """A connection error, a timeout or a 5xx response; `source` is the cause."""


class ContentLengthMismatch(RetryableError):
    """The response ended early."""


# Names that callers of the htsget package on PyPI (0.2.6) may catch.
InvalidJsonError = InvalidLeadingJsonError = TicketDecodeError = ProtocolError
MalformedJsonError = EmptyTicketError = ProtocolError


class _Stopped(Exception):
    """The transfer was stopped: what sockets report from then on is ignored."""


# ---- the ticket request
#
# What is requested from the ticket server, checked before anything is sent: a URL with
# a query string, or a JSON body. Pure, no network. Owns the table of options, which is
# also the help of the command line and part of the message when an option is wrong.
# Messages use the names of `get`; the command line replaces them. Promises 1 and 3.

_Options = types.SimpleNamespace

# Groups of options, as --help shows them. Columns: the name in `get` and `main`; flags;
# value ("-": a switch); help ("repeatable" there makes it so).
_OPTION_TABLE = {
    "request": """
data_format        -f/--format          FORMAT   BAM, CRAM, VCF or BCF
reference_name     -r/--reference-name  NAME     such as chr1; * for unplaced reads
reference_md5      -m/--reference-md5   MD5      MD5 of the reference, 32 hex digits
start              -s/--start           N        first position, 0-based, below 2**32
end                -e/--end             N        position after the last, 0-based
regions            --region             REGION   such as chr1:1,000-2,000; repeatable
regions_file       -L/--regions-file    BED      BED file; - for standard input
fields             --fields             LIST     comma-separated, of {fields}
tags               --tags               LIST     to include, comma-separated; may be ''
notags             --notags             LIST     to leave out, comma-separated
data_class         --class              CLASS    'header' for the header only
bearer_token       -b/--bearer-token    TOKEN    token for the ticket server
bearer_token_file  --bearer-token-file  PATH     file with the token
headers            -H/--headers         HEADER   'Name: value', repeatable; or JSON
""",
    "transfer": """
max_retries        -M/--max-retries     N        in a row (default: 5); -1: no limit
retry_wait         -W/--retry-wait      SECONDS  before the first retry (default: 5)
timeout            -T/--timeout         SECONDS  over 0, to wait for data (default: 120)
connections        -c/--connections     N        from 1, the most at a time (default: 4)
cacert             --cacert             PATH     file or folder of more CA certificates
verify             --no-verify          -        do not check MD5, format, end of data
resume             --no-resume          -        start over, whatever is in PATH.part
""",
    "output": """
output             -O/-o/--output       PATH     file to write (default, and -: stdout)
service_info       --service-info       -        print what the server says about itself
dry_run            --dry-run            -        print what the ticket says
show_progress      --progress           -        show progress even without a terminal
show_progress      --no-progress        -        show no progress
quiet              -q/--quiet           -        show errors only
verbose            -v/--verbose         -        show more; -vv: every request
""",
}


_Option = collections.namedtuple("_Option", "group name flags value help")
_OPTIONS = [
    _Option(group, *row.format(fields=" ".join(_FIELDS)).split(None, 3))
    for group, rows in _OPTION_TABLE.items()
    for row in rows.strip().splitlines()
]


class Region(NamedTuple):
    """A part of a reference.

    `reference_name` is a str; `start` and `end` are 0-based, half-open positions (int),
    None for the reference's own beginning or end.
    """

    reference_name: str
    start: Optional[int] = None
    end: Optional[int] = None


def _string(value: Any, pattern: str = "(?s).+") -> str:
    value = value.encode("utf-8", "surrogateescape").decode("utf-8")
    if not re.fullmatch(pattern, value):
        raise ValueError
    return str(value)


def _number(value: Any, least: float, most: float = float("inf")) -> float:
    number = float(value)
    if not least <= number <= most:
        raise ValueError
    return number


def _position(value: Any) -> int:
    position = _number(value, 0, (1 << 32) - 1)
    if not position.is_integer():
        raise ValueError
    return int(position)


def _names(value: Any) -> List[str]:
    names = value.split(",") if isinstance(value, str) else value
    return [_string(name) for name in map(str.strip, names) if name]


def _sam_fields(value: Any) -> List[str]:
    names = [name.upper() for name in _names(value)]
    if not names or not set(names) <= set(_FIELDS):
        raise ValueError
    return names


def _regions(regions: Any) -> List[Dict[str, Any]]:
    given = list(regions)
    if not given or any(isinstance(region, str) for region in given):
        raise ValueError
    return [_region(*region) for region in given]


def _region(name: Any, start: Any = None, end: Any = None) -> Dict[str, Any]:
    pairs = (("start", start), ("end", end))
    interval = {key: _position(value) for key, value in pairs if value is not None}
    return dict(interval, referenceName=_string(name))


def _timeout(value: Any) -> Optional[float]:
    """Seconds; of a tuple (to connect, to read), as requests has it, the larger."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return None if None in values else _number(max(values), sys.float_info.min)


# For each option with a value to check: the parameter of the protocol (spec: "Request
# parameters"), in the order in which they are sent, and what checks and converts it.
_CHECKS: Dict[str, Tuple[str, Callable[[Any], Any]]] = {
    "data_format": ("format", lambda value: _string(value).upper()),
    "data_class": ("class", lambda value: _string(value, "header")),
    "reference_name": ("referenceName", _string),
    "reference_md5": ("referenceMD5", lambda v: _string(v.lower(), "[0-9a-f]{32}")),
    "start": ("start", _position),
    "end": ("end", _position),
    "fields": ("fields", _sam_fields),
    "tags": ("tags", _names),
    # To leave nothing out is the server's default.
    "notags": ("notags", lambda value: _names(value) or None),
    "regions": ("regions", _regions),
    "max_retries": ("", lambda value: _number(value, float("-inf"))),
    "retry_wait": ("", lambda value: _number(value, 0)),
    "timeout": ("", _timeout),
    "connections": ("", lambda value: int(_number(value, 1))),
}


def _checked(arguments: Mapping[str, Any]) -> _Options:
    checked = dict(arguments)
    helps = {option.name: option.help for option in _OPTIONS}
    for name, (parameter, convert) in _CHECKS.items():
        if checked[name] is not None or not parameter:
            try:
                checked[name] = convert(checked[name])
            except (AttributeError, TypeError, ValueError, OverflowError):
                words = name, helps[name]
                raise RequestError("%s is not valid (%s)", *words) from None
    return _Options(**checked)


def _parameters(options: _Options) -> Dict[str, Any]:
    known = [(pair[0], getattr(options, name)) for name, pair in _CHECKS.items()]
    given = {name: value for name, value in known if name and value is not None}
    if "class" in given and "format" not in given:
        raise RequestError("data_class requires data_format")
    if "regions" in given and {"referenceName", "start", "end"} & set(given):
        raise RequestError("regions excludes reference_name, start and end")
    for region in given.get("regions", [given]):
        reference = region.get("referenceName", options.reference_md5)
        if reference in (None, "*") and {"start", "end"} & set(region):
            raise RequestError("start and end require a reference_name other than '*'")
        if region.get("start", 0) > region.get("end", 1 << 32):
            raise RequestError("start is greater than end")
    both = set(given.get("tags", ())) & set(given.get("notags", ()))
    if both:
        raise RequestError("tags and notags overlap: %s", ", ".join(sorted(both)))
    return given


class _TicketRequest:
    """A URL, headers and, for a POST, a body."""

    def __init__(self, options: _Options) -> None:
        parameters = _parameters(options)
        is_post = "regions" in parameters
        url, login = _without_userinfo(_checked_url(options.url))
        self.url = _with_query(url, parameters, {} if is_post else parameters)
        self.body: Optional[bytes] = None
        self._headers = dict(login, Accept=_ACCEPT)
        if is_post:
            self.body = json.dumps(parameters).encode("ascii")
            self._headers["Content-Type"] = "application/json"
        for name, value in dict(options.headers or {}).items():
            if value is not None:
                problem = _header_problem(name, value)
                if problem:
                    raise RequestError("headers: %s", problem)
                # A token and cookies take these names' place.
                is_special = name.lower() in ("authorization", "cookie")
                self._headers[name.title() if is_special else name] = value
        given = {name.lower(): value for name, value in self._headers.items()}
        self.user_agent = given.get("user-agent")
        self._token = options.bearer_token
        has_login = "authorization" in given
        if self._token is None and not has_login and _is_private(self.url):
            self._headers.update(_netrc_login(self.url))
        if self._token is not None and has_login:
            _log.warning("the bearer token replaces the Authorization header")

    def headers(self) -> Dict[str, str]:
        headers = dict(self._headers)
        token = self._token() if callable(self._token) else self._token
        if token is not None:
            headers["Authorization"] = _bearer(token)
        _require_private(self.url, headers)
        return headers


def _bearer(token: Any) -> str:
    pattern = r"\s*(?i:bearer\s+)?([!-~]+)\s*"
    match = re.fullmatch(pattern, token) if isinstance(token, str) else None
    if match is None:
        raise RequestError("bearer_token is empty, or has blanks or odd characters")
    return "Bearer " + match.group(1)


def _require_private(url: str, headers: Mapping[str, str]) -> None:
    """RequestError for a bearer token that others could read on its way."""
    logins = [headers[name] for name in headers if name.lower() == "authorization"]
    is_bearer = any(re.match(r"(?i)\s*bearer", login) for login in logins)
    if is_bearer and not _is_private(url):
        text = "not sending a token over plain http to %s; use https, or set %s='%s'"
        raise RequestError(text, _shown(url), *_ALLOW_PLAIN)


def _is_private(url: str) -> bool:
    """Whether only the server can read a request, or the user accepts the risk."""
    parts = urllib.parse.urlsplit(url)
    variable, consent = _ALLOW_PLAIN
    if parts.scheme == "https" or os.environ.get(variable) == consent:
        return True
    loopback = r"(.+\.)?localhost\Z|127(\.\d{1,3}){3}\Z|::1\Z"
    is_near = re.match(loopback, parts.hostname or "") is not None
    return is_near and _proxy_for(parts.scheme, parts.netloc) is None


def _netrc_login(url: str) -> Dict[str, str]:
    import netrc

    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    login = None
    try:
        if os.path.exists(path):
            login = netrc.netrc(path).authenticators(_origin(url)[1])
    except (OSError, ValueError, netrc.NetrcParseError) as error:
        # Before Python 3.11 one odd line is enough. The error may quote a password.
        _log.warning("cannot use %s: %s", path, type(error).__name__)
    return _basic(("%s:%s" % (login[0], login[2])).encode("utf-8")) if login else {}


def _basic(login: bytes) -> Dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(login).decode("ascii")}


def _header_problem(name: Any, value: Any) -> Optional[str]:
    """Why a header cannot be sent, in words that do not show its value."""
    if not isinstance(name, str) or not re.match(r"[!#-'*+.^_`|~\w-]+\Z", name, re.A):
        return "the name of a header is malformed"
    if not isinstance(value, str) or not re.match("[\t -~\x80-\xff]*\\Z", value):
        return "the header %s is not a string, or has odd characters" % name
    return None


# The many blocks of a ticket often have one URL.
@functools.lru_cache(maxsize=64)
def _url_problem(url: str) -> Optional[str]:
    """Why a URL cannot be fetched, in words that do not show it."""
    if re.search("[^!-~]", url):
        return "the URL has spaces, control or non-ASCII characters"
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https"):
            return "the URL is neither http nor https; begin with https://"
        # The library would decode percent signs; a zone of IPv6 has one.
        if parts.port != 0 and re.fullmatch(r"[^%]+|.*:.*%25\w+", parts.hostname or ""):
            return None
    return "the host or port of the URL is missing or malformed"


@functools.lru_cache(maxsize=64)
def _origin(url: str) -> Tuple[str, str, int]:
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname or "", port


def _checked_url(url: Any) -> str:
    """The caller's URL, percent-encoded where it must be. A "#" is part of the id."""
    # htsjdk and GATK write htsget://.
    url = re.sub("(?i)^htsget://", "https://", str(url).strip())
    # Control characters stay, to be refused.
    safe = "".join(set(map(chr, range(128))) - set(" #"))
    url = urllib.parse.quote(url, safe, errors="surrogateescape")
    problem = _url_problem(url)
    if problem:
        raise RequestError("%s: %s", _shown(url), problem)
    return str(url)


def _without_userinfo(url: str) -> Tuple[str, Dict[str, str]]:
    """A URL without its user-info, and the Authorization header that stands for it."""
    parts = urllib.parse.urlsplit(url)
    userinfo, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    login = _basic(urllib.parse.unquote_to_bytes(userinfo))
    return parts._replace(netloc=host).geturl(), login


def _shown(url: str) -> str:
    """A URL as it may be printed: without user-info, query and fragment."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#]*@)?([^?#]*)", url)
    return _printable("".join(match.groups()), 200) if match else "(not a URL)"


def _printable(text: str, limit: int = 300) -> str:
    """A string from elsewhere as it may be printed: one line, no control characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _split_query(query: str) -> List[Tuple[str, str]]:
    """The parameters of a query string: each one's name, and how it is written."""
    pairs = filter(None, query.split("&"))
    return [(urllib.parse.unquote_plus(pair.partition("=")[0]), pair) for pair in pairs]


def _with_query(url: str, removed: Iterable[str], added: Mapping[str, Any]) -> str:
    parts = urllib.parse.urlsplit(url)
    pairs = [pair for name, pair in _split_query(parts.query) if name not in removed]
    for name, value in added.items():
        text = ",".join(value) if isinstance(value, list) else str(value)
        pairs.append(name + "=" + urllib.parse.quote(text, safe=",*:"))
    return parts._replace(query="&".join(pairs)).geturl()


# ---- the ticket
#
# Tickets: parsing, and what two tickets for the same data have in common. Pure, no
# network, no state. Promise 1: a ticket that cannot be fetched exactly is an error, and
# data is joined only under equivalent tickets.


class DataBlock(NamedTuple):
    """One entry of a ticket's `urls` (spec: "Response JSON fields").

    `url` (str) is http, https or data; `headers` (mapping of str to str) go with every
    request for it; `data_class` is "header", "body" or None.
    """

    url: str
    headers: Mapping[str, str] = {}
    data_class: Optional[str] = None

    def __repr__(self) -> str:
        url = "data:..." if _is_inline(self) else _shown(self.url)
        shown = (url, sorted(self.headers), self.data_class)
        return "DataBlock(url=%r, headers=%r, data_class=%r)" % shown


class Ticket(NamedTuple):
    """A server's response to a request for data (spec: "Response JSON fields").

    `format` (str, upper-case) and `md5` (str, 32 hexadecimal digits) are None when the
    server does not give them; `blocks` is the list of `DataBlock`, in order.
    """

    format: Optional[str]
    blocks: List[DataBlock]
    md5: Optional[str] = None


class _RestrictedTicket(Ticket):
    """A ticket whose key `allowed` (htsget-rs) names what this login may see."""

    allowed = ""

    def __new__(cls, *fields: Any, allowed: str = "") -> "_RestrictedTicket":
        self = super().__new__(cls, *fields)
        self.allowed = allowed
        return self


def _allowed_words(allowed: Any) -> str:
    try:
        rules = [rule for entry in allowed for rule in entry.get("rules", [entry])]
        return _printable(", ".join(map(_allowed_region, rules)))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return _printable(json.dumps(allowed, separators=(",", ":")))


def _allowed_region(rule: Mapping[str, Any]) -> str:
    """A rule in samtools' notation, 1-based and inclusive."""
    name = rule.get("referenceName") or rule["name"]
    start, end = rule.get("start") or 0, rule.get("end") or ""
    return str(name) + (":%d-%s" % (start + 1, end) if start or end else "")


def _parse_ticket(raw: bytearray) -> Ticket:
    """Parse a ticket; ProtocolError if it is not one (spec: "Response JSON fields")."""
    what = "the ticket"
    body = _typed(_parse_json(raw, what), "htsget", dict, what, is_needed=True)
    entries = _typed(body, "urls", list, what, is_needed=True)
    ticket = Ticket(
        (_typed(body, "format", str, what) or "").upper() or None,
        [_parse_block(entry, number) for number, entry in enumerate(entries, 1)],
        _typed(body, "md5", str, what),
    )
    _check_ticket(ticket)
    if body.get("allowed") is None:
        return ticket
    return _RestrictedTicket(*ticket, allowed=_allowed_words(body["allowed"]))


def _parse_json(raw: bytearray, what: str) -> Dict[str, Any]:
    """A JSON object from a server; `raw` is emptied, as it may be large."""
    problem = "not a JSON object"
    try:
        text = raw.decode("utf-8-sig")
        raw.clear()
        document = json.loads(text)
        if isinstance(document, dict):
            return document
    except (RecursionError, ValueError) as error:
        problem = "not valid JSON: " + _printable(str(error), 100)
    # Outside of the handler: its exception holds the document, secrets included.
    raise ProtocolError("%s is %s", what, problem)


def _parse_block(entry: Any, number: int) -> DataBlock:
    what = "data block %d" % number
    return DataBlock(
        _typed(entry, "url", str, what, is_needed=True),
        _typed(entry, "headers", dict, what) or {},
        # `urlClass` is the EGA's name for it.
        _typed(entry, "class", str, what) or _typed(entry, "urlClass", str, what),
    )


def _typed(holder: Any, key: str, kind: Any, what: str, is_needed: bool = False) -> Any:
    """A value of an object in the ticket; None when absent or null."""
    value = holder.get(key) if isinstance(holder, dict) else None
    if not isinstance(value, kind) and (is_needed or value is not None):
        words = {dict: "an object", list: "a list", str: "a string"}[kind]
        raise ProtocolError("%r in %s is missing or not %s", key, what, words)
    return value


def _check_ticket(ticket: Ticket) -> None:
    if not re.fullmatch("([0-9A-Fa-f]{32})?", ticket.md5 or ""):
        raise ProtocolError("the ticket's md5 is not 32 hexadecimal digits")
    for number, block in enumerate(ticket.blocks, 1):
        what = "data block %d" % number
        problems = [_header_problem(*item) for item in (block.headers or {}).items()]
        if _is_inline(block):
            _decode_data_uri(block.url, what)
        else:
            problems.append(_url_problem(block.url))
        for problem in filter(None, problems):
            raise ProtocolError("%s: %s", what, problem)


def _is_inline(block: DataBlock) -> bool:
    return block.url[:5].lower() == "data:"


# A few thousand octets, percent-encoded, or any number that are not.
_ENCODED = re.compile("(?:%[0-9A-Fa-f]{2}|%|[^%]+){1,9999}")


def _decode_data_uri(uri: str, what: str) -> bytes:
    """The bytes of a data URI (RFC 2397), also in the EGA's form data:base64,..."""
    begin = uri.find(",") + 1
    is_base64 = uri[5:begin].rpartition(";")[2].strip(" ,").lower() == "base64"
    # Of what may be 64 MiB, the library makes an object for each octet.
    parts = (match.group() for match in _ENCODED.finditer(uri, begin))
    with contextlib.suppress(ValueError):
        content = b"".join(map(urllib.parse.unquote_to_bytes, parts))
        if begin and not is_base64:
            return content
        content = content.translate(None, b" \t\n\v\f\r")
        if begin and re.fullmatch(b"[A-Za-z0-9+/]*={0,2}", content):
            return binascii.a2b_base64(content)
    raise ProtocolError("the data URI of %s is malformed", what)


def _is_crypt4gh(ticket: Ticket) -> bool:
    """Whether the data is encrypted: its inline beginning says so."""
    first = ticket.blocks[0] if ticket.blocks else DataBlock("")
    return _is_inline(first) and _decode_data_uri(first.url, "")[:8] == b"crypt4gh"


def _is_reduced(ticket: Ticket) -> bool:
    return isinstance(ticket, _RestrictedTicket) or _is_header_only(ticket)


def _require_unreduced(was_reduced: bool, is_reduced: bool) -> None:
    """ClientError if a ticket has lost what this login could see before."""
    if is_reduced and not was_reduced:
        text = "the ticket has less than before: the login may have expired"
        raise ClientError(403, "Forbidden", text, kind="ticket")


def _is_header_only(ticket: Ticket) -> bool:
    return {block.data_class for block in ticket.blocks} == {"header"}


def _warn_of_gaps(ticket: Ticket, options: _Options) -> None:
    """Warn of what the ticket says about its own completeness."""
    if isinstance(ticket, _RestrictedTicket) and ticket.allowed:
        text = "this login may see only %s: the server left out the rest"
        _log.warning(text, ticket.allowed)
    # For a given ticket, it is not known what was requested.
    is_known = isinstance(options.url, str) and "class=header" not in options.url
    if is_known and options.data_class is None and _is_header_only(ticket):
        _log.warning("the ticket has only header blocks, and no records")
    if not ticket.blocks:
        _log.warning("the ticket has no data blocks")


# What tickets have in common.


@functools.lru_cache(maxsize=64)
def _without_signature(url: str) -> str:
    """A URL without the query parameters that differ when it is signed anew."""
    base, mark, query = url.partition("?")
    pairs = _split_query(query)
    is_signed = any(name.lower() in ("sig", "signature") for name, _ in pairs)
    pattern = _SIGNED if is_signed else _SIGNATURE
    return base + mark + "&".join(p for name, p in pairs if not pattern.match(name))


def _address(url: str) -> List[Any]:
    parts = urllib.parse.urlsplit(_without_signature(url))
    return [parts.hostname, parts.path, parts.query]


def _selectors(block: DataBlock) -> Tuple[Optional[str], List[Tuple[str, str]]]:
    """The Range of a block, and its other headers that tell objects apart."""
    headers = {name.lower(): value for name, value in (block.headers or {}).items()}
    wanted = headers.pop("range", None)
    headers.pop("authorization", None)
    return wanted, sorted(h for h in headers.items() if not _SIGNATURE.match(h[0]))


def _object_key(block: DataBlock) -> Tuple[Any, ...]:
    return _without_signature(block.url), tuple(_selectors(block)[1])


def _outline(ticket: Ticket) -> List[Any]:
    """What equivalent tickets have in common. A block without a Range may have one in
    its query, unless it is the only one; Crypt4GH headers are encrypted anew."""
    is_encrypted = _is_crypt4gh(ticket)
    outline: List[Any] = [ticket.format, (ticket.md5 or "").lower()]
    for block in ticket.blocks:
        wanted, others = _selectors(block)
        content: Any = None
        if _is_inline(block):
            data = b"" if is_encrypted else _decode_data_uri(block.url, "")
            content = hashlib.sha256(data).hexdigest()
        elif wanted is None and len(ticket.blocks) > 1:
            content = [_address(block.url)[1:], others]
        outline.append([block.data_class, wanted, content])
    return outline


def _is_equivalent(first: Ticket, renewed: Ticket) -> bool:
    """Whether a transfer can go on with another ticket for the same request."""
    return _outline(first) == _outline(renewed)


# Where the ticket of a transfer comes from.
_Source = Union[_TicketRequest, Ticket]


def _identity(source: _Source, ticket: Ticket) -> Dict[str, Any]:
    """What the journal knows a transfer by: digests of the request (of a given ticket,
    what its blocks request) and of what equivalent tickets have in common."""
    if isinstance(source, Ticket):
        remote = [block for block in ticket.blocks if not _is_inline(block)]
        request = [[_address(block.url), *_selectors(block)] for block in remote]
    else:
        request = [[_without_signature(source.url), repr(source.body)]]
    digests = {"request": _digest(request), "ticket": _digest(_outline(ticket))}
    return dict(digests, is_reduced=_is_reduced(ticket))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("ascii")).hexdigest()


# ---- retry policy
#
# Arithmetic only: how often to retry, and how long to wait before. Promise 2.


def _timestamp(text: str, otherwise: float) -> float:
    with contextlib.suppress(TypeError, ValueError, IndexError, OverflowError):
        return email.utils.parsedate_to_datetime(text).timestamp()
    return otherwise


def _retry_after(value: Optional[str], now: float) -> float:
    """Seconds to wait for a Retry-After header (a number or a date) at time `now`."""
    text = (value or "").strip()
    is_number = re.match(r"\d{1,9}\Z", text, re.A)
    seconds = float(text) if is_number else _timestamp(text, now) - now
    return max(0.0, min(seconds, _LONGEST_RETRY_AFTER))


class _Retry:
    """Counts failures in a row and says how long to wait."""

    def __init__(self, limit: float, wait: float) -> None:
        self._limit = limit
        self._wait = wait
        self._failures = 0
        self._new = 0

    def progress(self, count: int) -> None:
        self._new += count
        if self._new >= _PROGRESS:
            self._failures = self._new = 0

    def pause(self, error: HtsgetException) -> float:
        """Seconds to wait after an error; raises it if there is no further retry."""
        if not error._transient or 0 <= self._limit <= self._failures:
            raise error
        doubled = self._wait * float(1 << min(self._failures, 30))
        self._failures += 1
        wait = min(doubled, max(_LONGEST_WAIT, self._wait)) * random.uniform(1.0, 1.2)
        return max(wait, error._retry_after)


# ---- transport
#
# The only code that opens sockets: urllib's opener over http.client connections that
# are kept and reused. Owns the connections and cookies of a transfer, and knows nothing
# of data blocks. Promises 1 (a body that is cut short, or whose framing is in doubt, is
# an error) and 3 (`stop` ends every wait).

# What the library raises for broken connections and responses, and for dead idle ones.
_BROKEN = (OSError, http.client.HTTPException, OverflowError, TypeError, ValueError)
_DEAD = (ConnectionError, ssl.SSLError, http.client.BadStatusLine)
# Headers that another origin may see: the caller's; of a block, as they are no secret.
_PUBLIC = ("accept", "content-type", "user-agent")
_HARMLESS = ("host", "if-range", "range", "user-agent")
# Headers that must not come with two values.
_SINGLE = ("content-length", "content-range", "etag", "transfer-encoding")
# For example "bytes 0-99/1234"; some servers write "bytes=0-99/1234".
_CONTENT_RANGE = r"(?:bytes)?[ =:]*(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)"
# The beginning of JSON, XML or HTML without bytes that no text has; of a web page.
_DOCUMENT = re.compile(rb"(\xef\xbb\xbf)?\s*([{\[]|<[A-Za-z!?])[\t-\r -~\x80-\xff]*\Z")
_WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype\s+)?html", re.I)
# Where JSON error documents of all makes have their explanation.
_MESSAGE_KEYS = "message userMessage title detail msg error_description".split()
# By lower-case name: the name as it is sent (some gateways compare case), the value.
_Headers = Dict[str, Tuple[str, str]]


class _Lines(BufferedReader):
    """The file that http.client reads a response from. Raises where the library would
    accept a line or header section that the connection's end has cut off."""

    _is_in_headers = False

    def readline(self, limit: Optional[int] = -1) -> bytes:
        """Read a line; an error where the connection has ended within it."""
        line = super().readline(limit)
        is_whole = line.endswith(b"\n") or len(line) == limit
        if not is_whole and (line or self._is_in_headers):
            raise http.client.IncompleteRead(b"")
        is_header = self._is_in_headers and line.strip() != b""
        self._is_in_headers = is_header or line.startswith(b"HTTP/")
        return line


class _Response(http.client.HTTPResponse):
    """The library's response, with a counted body. `length` is None where only chunks
    or the connection's end delimit it; `is_framed`: its end cannot be a cut."""

    def __init__(
        self, connection: "_Connection", request: "_Request", *args: Any, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self.fp: Any = _Lines(self.fp.detach(), _FIRST_READ)
        self.asked = request
        self.url = request.full_url
        self._connection = connection
        self._start = b""
        self._chunks = self._receive(connection)

    def begin(self) -> None:
        """Read the header section (called by http.client)."""
        super().begin()
        while self.status < 200:
            # The library skips no interim response but 100.
            self.headers = None  # type: ignore
            super().begin()
        _require_clear_framing(self.headers)
        self.is_framed = self.chunked or self.length is not None

    def _receive(self, connection: "_Connection") -> Iterator[bytes]:
        joins_records = connection.route[0] == "https" and self.length is not None
        most = left = sys.maxsize if self.length is None else self.length
        while left:
            try:
                if self.chunked:
                    data = self.read1(_CHUNK)
                    if (self.chunk_left or 0) < 0:
                        raise http.client.IncompleteRead(b"")
                elif joins_records:
                    # C joins records; a failure loses no more than has come before.
                    size = max(_TLS_RECORD, most - left)
                    data = self.fp.read(min(left, size, _CHUNK))
                else:
                    data = self.fp.read1(min(left, _CHUNK))
            except _BROKEN as error:
                # Once stopped, what sockets report says nothing about the body.
                connection.pool.wait(0)
                raise _network_error(error, self.asked, is_known=True) from error
            if not data:
                break
            left -= len(data)
            yield data
        connection.pool.wait(0)
        if self.length is not None and left:
            text = "%s: the response ended %d bytes early"
            raise ContentLengthMismatch(text, self.asked.where(), left)
        self._release(is_complete=True)

    def body(self) -> Iterator[bytes]:
        """The body in chunks as they arrive; an error if it is cut short."""
        start, self._start = self._start, b""
        return filter(None, itertools.chain([start], self._chunks))

    def peek(self, n: int = _BEGINNING) -> bytes:
        """The body's first bytes, or all of it; `body` yields them again."""
        while len(self._start) < n:
            data = next(self._chunks, b"")
            if not data:
                break
            self._start += data
        return self._start[:n]

    def read_text(self) -> str:
        with contextlib.suppress(HtsgetException):
            self.peek(_ERROR_LIMIT)
        self.close()
        return self._start[:_ERROR_LIMIT].decode("utf-8-sig", "replace")

    def close(self) -> None:
        """Drop what was not read, and the connection with it."""
        self._release(is_complete=False)

    def _release(self, is_complete: bool) -> None:
        # There is none yet if a signal interrupts the constructor.
        connection = vars(self).pop("_connection", None)
        if connection is not None:
            is_reusable = is_complete and self.is_framed and not self.will_close
            if not is_reusable:
                # First, so that closing the file never waits for a reader.
                connection.shut_down()
            super().close()
            connection.pool.give_back(connection, is_reusable)


def _require_clear_framing(headers: http.client.HTTPMessage) -> None:
    """HTTPException for a header section that leaves the body's length in doubt."""
    coding = headers.get("transfer-encoding", "identity").lower()
    framing = "%s %s" % (coding, headers.get("content-length", "-"))
    is_clear = re.match(r"(chunked -|identity (-|[0-9]{1,18}))\s*\Z", framing)
    distinct = [name.lower() for name, _ in set(headers.raw_items())]
    is_single = max(map(distinct.count, _SINGLE)) < 2
    # Multipart defects are not in the header section.
    names = [type(defect).__name__ for defect in headers.defects]
    is_sound = all(re.search("Multipart|Boundary", name) for name in names)
    if not (is_clear and is_single and is_sound):
        raise http.client.HTTPException("malformed or contradictory headers")


class _Connection(http.client.HTTPConnection):
    """A connection that another thread can shut down whatever this one waits for."""

    def __init__(self, pool: "_Transport", request: "_Request") -> None:
        self.pool = pool
        self.route = scheme, host, tunnel = request.route()
        self.default_port = 443 if scheme == "https" else 80
        # Also while http.client has handed its socket to the response.
        self._socket: Any = None
        # A proxy is spoken to in plain http.
        _, name, port = _origin(("http" if tunnel else scheme) + "://" + host)
        super().__init__(name, port, timeout=request.timeout)
        if tunnel:
            target = tunnel if re.search(r":\d+\Z", tunnel) else tunnel + ":443"
            self.set_tunnel(target, headers=dict(request.proxy_login(), Host=target))

    def connect(self) -> None:
        super().connect()
        self._socket = self.sock
        # Whoever stops the transfer either sees the socket, or is seen here.
        self.pool.wait(0)
        scheme, host, tunnel = self.route
        if scheme == "https":
            self.sock = self._socket = self.pool.ssl_context().wrap_socket(
                self.sock,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
                server_hostname=_origin("//" + (tunnel or host))[1],
            )
            self.pool.wait(0)
            self.sock.do_handshake()

    def exchange(self, request: "_Request") -> _Response:
        """Send a request and read the header section of its response."""
        headers = dict(request.unredirected_hdrs, **dict(request.own.values()))
        if not self.route[2]:
            headers.update(request.proxy_login())
        self.request(request.get_method(), request.selector, request.data, headers)
        # Only now: the response to CONNECT is of the library's class.
        self.response_class: Any = functools.partial(_Response, self, request)
        return self.getresponse()  # type: ignore

    def is_usable(self) -> bool:
        """Whether nothing has arrived while idle: neither the end nor bytes."""
        with contextlib.suppress(ValueError):
            has_record = self.route[0] == "https" and self._socket.pending()
            return not (has_record or select.select([self._socket], [], [], 0)[0])
        # A descriptor beyond what select() can handle.
        return False

    def shut_down(self) -> None:
        """End it; a thread that waits for it wakes up."""
        with contextlib.suppress(OSError, TypeError):
            # SSLSocket.shutdown would take the TLS state from under a reader.
            socket.socket.shutdown(self._socket or self.sock, socket.SHUT_RDWR)


class _Request(urllib.request.Request):
    """A request with its `own` headers, which are for one origin only if `is_callers`.
    The library adds the login for the proxy to `headers`, and cookies elsewhere."""

    def __init__(self, url: str, own: _Headers, body: Any, is_callers: bool) -> None:
        # The origin's host matters for cookies of third parties only.
        super().__init__(url.partition("#")[0], body, origin_req_host="")
        self.own = own
        self.is_callers = is_callers

    def route(self) -> Tuple[str, str, Optional[str]]:
        """The scheme, the host (or proxy), and the target of CONNECT, if any."""
        return self.type, self.host or "", getattr(self, "_tunnel_host", None)

    def proxy_login(self) -> Dict[str, str]:
        return {name.title(): value for name, value in self.headers.items()}

    def where(self) -> str:
        _, host, tunnel = self.route()
        via = " (through the proxy %s)" % host if tunnel or self.has_proxy() else ""
        return _shown(self.full_url) + via


class _Transport(urllib.request.BaseHandler):
    """Exchanges requests for responses until it is stopped, as the opener's handler
    for http and https; closes idle connections to stay within the limit."""

    def __init__(self, options: _Options, user_agent: Optional[str] = None) -> None:
        self._user_agent = user_agent or "htsget.py/" + __version__
        self._timeout = options.timeout and min(options.timeout, _LONGEST_TIMEOUT)
        self._ssl_context = options.ssl_context
        self._opener = urllib.request.OpenerDirector()
        cookies = urllib.request.HTTPCookieProcessor()
        for handler in (_Proxies(_proxies()), self, cookies, _Redirects()):
            self._opener.add_handler(handler)
        # Routes on which a response has arrived.
        self._reached: Set[Any] = set()
        self._stopped = threading.Event()
        # Reentrant, as the garbage collector may close a response.
        self._lock = threading.RLock()
        self._most = options.connections
        self._open: Set[_Connection] = set()
        # Longest idle first.
        self._idle: List[_Connection] = []

    def request(
        self,
        url: str,
        headers: Mapping[str, str],
        body: Optional[bytes] = None,
        is_callers: bool = False,
    ) -> _Response:
        """The response after redirects. `is_callers`: with the caller's own headers."""
        pairs = [("User-Agent", self._user_agent), *headers.items()]
        own = {k.lower(): (k, v) for k, v in pairs if k.lower() not in _FRAMING_HEADERS}
        request: Any = _Request(url, own, body, is_callers)
        response: Any = self._opener.open(request, timeout=self._timeout)
        has_moved = _origin(response.url) != _origin(request.full_url)
        is_refused = not is_callers and response.status in (400, 401, 403)
        own = response.asked.own
        if has_moved and is_refused and "authorization" in own:
            # A signed URL does not bear a second login.
            response.read_text()
            del own["authorization"]
            return self.request(response.url, dict(own.values()))
        return response  # type: ignore

    def http_open(self, req: _Request) -> _Response:
        """Exchange a request for a response (called by the opener)."""
        _require_private(req.full_url, dict(req.own.values()))
        while True:
            connection = self._take(req)
            is_reused = connection.sock is not None
            try:
                response = connection.exchange(req)
                self._reached.add(connection.route)
                _log_exchange(response)
                return response
            except Exception as error:
                self.give_back(connection, is_reusable=False)
                if self._stopped.is_set():
                    raise _Stopped from None
                if is_reused and isinstance(error, _DEAD):
                    # It died while it was idle: that costs no retry.
                    continue
                is_known = connection.route in self._reached
                failure = _network_error(error, req, is_known)
            # Outside of the handler: its exception may hold what must not be shown.
            raise failure

    https_open = http_open

    def ssl_context(self) -> ssl.SSLContext:
        return _notice_cut_tls(self._ssl_context or _default_ssl_context())

    def _take(self, request: _Request) -> _Connection:
        with self._lock:
            self.wait(0)
            route = request.route()
            for connection in [one for one in self._idle[::-1] if one.route == route]:
                self._idle.remove(connection)
                if connection.is_usable():
                    return connection
                self.give_back(connection, is_reusable=False)
            connection = _Connection(self, request)
            self._open.add(connection)
            self.close_idle(self._most)
            return connection

    def give_back(self, connection: _Connection, is_reusable: bool) -> None:
        with self._lock:
            if is_reusable and not self._stopped.is_set():
                self._idle.append(connection)
            else:
                self._open.discard(connection)
                connection.close()
            self.close_idle(self._most)

    def close_idle(self, most: int = 0) -> None:
        """Close idle connections while more than `most` connections are open."""
        with self._lock:
            while self._idle and len(self._open) > most:
                connection = self._idle.pop(0)
                self._open.discard(connection)
                connection.close()

    def limit(self, most: int) -> None:
        self._most = most
        self.close_idle(most)

    def wait(self, seconds: float) -> None:
        if self._stopped.wait(max(0.0, min(seconds, threading.TIMEOUT_MAX))):
            raise _Stopped

    def stop(self) -> None:
        self._stopped.set()
        self.close_idle()
        with self._lock:
            for connection in self._open:
                connection.shut_down()


def _log_exchange(response: _Response) -> None:
    """One line with what the help desk of an archive needs."""
    if _log.isEnabledFor(logging.DEBUG):
        asked, length = response.asked, response.length
        span = _printable(asked.own.get("range", ("", "no Range"))[1], 60)
        size = "unknown" if length is None else length
        details = asked.get_method(), asked.where(), span, response.status, size
        _log.debug("%s %s (%s): %d, length %s", *details)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects (at most ten) without leaking headers to another origin."""

    def http_response(self, request: _Request, response: Any) -> Any:
        """Follow a redirect, if the response is one (called by the opener)."""
        status, headers = response.status, response.headers
        if status not in (301, 302, 303, 307, 308) or "location" not in headers:
            return response
        response.read_text()
        try:
            return self.http_error_302(request, response, status, "", headers)
        except urllib.error.HTTPError as error:
            error.close()
        except ValueError as error:
            if isinstance(error, HtsgetException):
                raise
        # Outside of the handler: its exception shows the URL's query.
        text = "%s: too many redirects, or one to something that is not http(s)"
        raise ProtocolError(text, request.where())

    https_response = http_response

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> _Request:
        """The request to the redirect's target (called by the library)."""
        if _url_problem(newurl):
            raise ValueError
        url, _ = _without_userinfo(newurl)
        # A POST keeps its method, or its regions would be lost; but 303 means GET.
        body = None if code == 303 else req.data
        return _Request(url, _redirected_headers(req, url), body, req.is_callers)


def _redirected_headers(request: _Request, url: str) -> _Headers:
    own, before, after = request.own, _origin(request.full_url), _origin(url)
    if before == after:
        return own
    if request.is_callers:
        return {name: own[name] for name in own if name in _PUBLIC}
    if (before[0], after[0]) == ("https", "http") and not set(own).issubset(_HARMLESS):
        text = "%s redirects to plain http, where block headers must not be sent"
        raise ProtocolError(text, request.where())
    return {name: own[name] for name in own if name != "host"}


class _Proxies(urllib.request.ProxyHandler):
    """The library's handler, for the proxies that are supported and not bypassed."""

    def proxy_open(self, req: Any, proxy: str, type: str) -> Any:
        """Send a request through the proxy, if it applies (called by the opener)."""
        if not proxy or _proxy_for(type, req.host) is None:
            return None
        if _url_problem(proxy if "://" in proxy else "http://" + proxy):
            text = "the proxy for %s is malformed or not http; SOCKS is not supported"
            raise ProtocolError(text, type)
        # A proxy is spoken to in plain http, also if its URL says https.
        return super().proxy_open(req, proxy.rpartition("://")[2].rstrip("/"), type)


def _proxies() -> Dict[str, str]:
    known = urllib.request.getproxies()
    return {name: known.get(name) or known.get("all", "") for name in ("http", "https")}


def _proxy_for(scheme: str, netloc: str) -> Optional[str]:
    """The proxy for a host, unless no_proxy names it, its domain or its network."""
    from ipaddress import ip_address, ip_network

    proxy = _proxies()[scheme]
    if not proxy or urllib.request.proxy_bypass(netloc):
        return None
    host = _origin("//" + netloc)[1]
    excluded = urllib.request.getproxies().get("no", "").lower()
    for entry in re.split(r"[][\s,]+", excluded):
        is_suffix = entry.startswith("*.") and host.endswith(entry[1:])
        with contextlib.suppress(ValueError):
            if is_suffix or ip_address(host) in ip_network(entry, strict=False):
                return None
    return proxy


def _default_ssl_context(cacert: Optional[str] = None) -> ssl.SSLContext:
    """The context for a file or folder of certificates and the environment."""
    known = os.environ.get
    path = cacert or known("REQUESTS_CA_BUNDLE") or known("CURL_CA_BUNDLE")
    return _ssl_context(path, known("SSL_CERT_FILE"), known("SSL_CERT_DIR"))


# Building a context takes 20 ms.
@functools.lru_cache(maxsize=8)
def _ssl_context(path: Optional[str], *_: Optional[str]) -> ssl.SSLContext:
    """A context. `_` is only for the cache: OpenSSL itself reads these variables."""
    try:
        context = ssl.create_default_context()
    except OSError as error:
        _log.warning("SSLKEYLOGFILE cannot be opened and is ignored: %s", error)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_default_certs()
    # Some servers close connections without ALPN.
    context.set_alpn_protocols(["http/1.1"])
    _require_tls_1_2(context)
    if path:
        kind = "capath" if os.path.isdir(path) else "cafile"
        try:
            context.load_verify_locations(**{kind: path})
        except OSError as error:
            text = "cannot read certificates from %s: %s"
            raise RequestError(text, path, error) from None
    return context


@functools.lru_cache(maxsize=64)
def _content_range(text: str) -> Optional[Tuple[int, int, Optional[int]]]:
    """First byte, end (exclusive) and total of a Content-Range; None if malformed."""
    match = re.match(_CONTENT_RANGE + r"\Z", text.strip(), re.A | re.I)
    if match is None:
        return None
    first, stop = int(match.group(1)), int(match.group(2)) + 1
    total = None if match.group(3) == "*" else int(match.group(3))
    # Some servers give the length of the slice as the total.
    is_possible = total in (None, stop - first) or stop <= (total or 0)
    return (first, stop, total) if first < stop and is_possible else None


def _network_error(error: Exception, request: _Request, is_known: bool) -> Exception:
    """Our exception for a library error. `is_known`: the server has responded once."""
    if isinstance(error, HtsgetException) or not isinstance(error, _BROKEN):
        return error
    where = request.where()
    words = getattr(error, "strerror", "") or str(error) or type(error).__name__
    refused = re.match("Tunnel connection failed: ([0-9]+) ?(.*)", words)
    if refused:
        status, reason = int(refused.group(1)), _printable(refused.group(2), 80)
        kind = "proxy with login" if request.headers else "proxy"
        text = "the proxy refused to connect"
        return _failure(ClientError(status, reason, text, where, "", kind), {})
    words = _printable(words, 150)
    problem = _permanent_problem(error, words, is_known)
    if problem:
        return ProtocolError("%s: %s", where, problem)
    if isinstance(error, http.client.IncompleteRead):
        return ContentLengthMismatch("%s: the response was cut short", where)
    return RetryableIOError("%s: %s" % (where, words), error)


def _permanent_problem(error: Exception, words: str, is_known: bool) -> str:
    """Why no retry can help; "" if one may."""
    # Python 3.6 has a CertificateError that is no SSLError.
    if "VERIFY_FAILED" in words or isinstance(error, ssl.CertificateError):
        advice = "for a private authority, use --cacert or SSL_CERT_FILE"
        return "the server's certificate is not trusted: %s (%s)" % (words, advice)
    if isinstance(error, (ValueError, http.client.InvalidURL)):
        return "the request or response is malformed"
    if is_known:
        return ""
    if isinstance(error, ssl.SSLError) and "eof" not in words.lower():
        text = "no TLS 1.2 or later on this port, or a client certificate is required"
        return "%s (%s)" % (text, words)
    is_no_host = isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME
    return "cannot find the host: " + words if is_no_host else ""


def _explanation(text: str) -> Tuple[str, str]:
    """The error and message in an error body: JSON of whatever make, or text."""
    # S3 repeats an expired token.
    text = re.sub(r"(?a)(\\u\w{4}|\\.)|[\w.~+=/-]{50,}", lambda m: m[1] or "...", text)
    if not re.match(r"\s*[{\[]", text):
        return "", re.sub(r"(?is)<(style|script)\b.*?(</\1>|$)|<[^<>]*>", " ", text)
    # Nothing else of a JSON document is shown: it might be a ticket.
    pairs: List[Tuple[str, Any]] = []
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text, strict=False, object_pairs_hook=pairs.extend)
    said = {key: value for key, value in pairs if isinstance(value, str)}
    messages = [said[key] for key in _MESSAGE_KEYS if key in said]
    return said.get("error", ""), ": ".join(messages)


def _refusal(response: _Response, kind: str) -> HtsgetException:
    """The exception for a response that is an error (spec: "Errors")."""
    asked, status, text = response.asked, response.status, response.read_text()
    error, message = _explanation(text)
    if asked.data and kind == "ticket" and status in (404, 405, 501):
        message = message or "does the server support multi-region requests?"
    if status == 407:
        kind = "proxy with login" if asked.headers else "proxy"
    elif kind == "ticket" and "authorization" in asked.own:
        kind = "ticket with login"
    error, message = _printable(error or response.reason, 80), _printable(message)
    refused = ClientError(status, error, message, asked.where(), text, kind)
    return _failure(refused, response.headers)


def _failure(refused: ClientError, headers: Any) -> HtsgetException:
    """The refusal, or a retryable error where its status is transient."""
    after = headers.get("retry-after")
    if refused.status in _RETRIED_STATUS or (refused.status == 202 and after):
        # By the server's clock: this machine's may be wrong.
        now = _timestamp(headers.get("date", ""), time.time())
        return RetryableIOError(str(refused), refused, _retry_after(after, now))
    return refused


def _require_data(response: _Response) -> None:
    """ProtocolError for an error document or a web page where data should be."""
    said = response.headers.get("content-range", "")
    if response.status == 206 and _content_range(said):
        return
    start, label = response.peek(), response.headers.get("content-type", "")
    is_labelled = re.search("(?i)html|json|xml", label) is not None
    if _DOCUMENT.match(start) and (is_labelled or _WEB_PAGE.match(start)):
        words = "a document instead of data", *_explanation(response.read_text())
        said = _printable(": ".join(filter(None, words)))
        raise ProtocolError("%s: %s", response.asked.where(), said)


def _require_identity(response: _Response, is_block_start: bool) -> None:
    """ProtocolError for data that was compressed on its way; BGZF often says gzip."""
    coding = response.headers.get("content-encoding", "").lower()
    is_compressed: Any = re.search(r"\b(br|zstd|deflate|compress)\b", coding)
    if "gzip" in coding and is_block_start and not is_compressed:
        is_compressed = re.match(rb"(?s)\x1f\x8b(?!\x08\x04.{8}BC)", response.peek())
    if is_compressed:
        text = "%s: the data was compressed on the way (Content-Encoding: %s)"
        raise ProtocolError(text, response.asked.where(), _printable(coding, 40))


def _request_json(
    transport: _Transport, request: _TicketRequest, options: _Options
) -> bytearray:
    retry = _Retry(options.max_retries, options.retry_wait)
    while True:
        try:
            headers, body = request.headers(), request.body
            response = transport.request(request.url, headers, body, is_callers=True)
            with contextlib.closing(response):
                if response.status != 200:
                    raise _refusal(response, "ticket")
                return _read_json(response)
        except HtsgetException as error:
            seconds = retry.pause(error)
            _log.warning("%s; trying again in %.1f s", error, seconds)
        transport.wait(seconds)


def _read_json(response: _Response) -> bytearray:
    """A body that should be a JSON object; given up as soon as it cannot be one."""
    body, where = bytearray(), response.asked.where()
    is_gzip, inflater = response.peek(2) == b"\x1f\x8b", zlib.decompressobj(31)
    try:
        for data in response.body():
            body += inflater.decompress(data, _TICKET_LIMIT) if is_gzip else data
            start = body[:_BEGINNING].lstrip(b"\xef\xbb\xbf \t\r\n")
            if start and not start.startswith(b"{"):
                raise ProtocolError("%s: %s", where, _instead_of_a_ticket(start))
            if len(body) >= _TICKET_LIMIT:
                raise ProtocolError("%s: the ticket is too large", where)
    except zlib.error:
        raise ProtocolError("%s: the gzip data is not valid", where) from None
    if not response.is_framed and not body.rstrip().endswith(b"}"):
        raise ContentLengthMismatch("%s: the ticket was cut short", where)
    return body


def _instead_of_a_ticket(start: bytearray) -> str:
    kind = re.match(rb"(?:##fileformat=)?(BAM|BCF|CRAM|VCF)", start)
    if kind:
        found = "a %s file; fetch it with curl" % kind.group(1).decode()
    elif _WEB_PAGE.match(start):
        found = "a web page (a login?)"
    else:
        found = _printable(_explanation(start.decode("utf-8", "replace"))[1], 60)
    return "this is not htsget's JSON, but " + (found or "another document")


# ---- blocks and parts
#
# The only code that requests data. A part reads a byte range of a block once, from its
# first byte to its last, and resumes where it stopped. A response that is not exactly
# as it must be is an error. Owns what responses have shown of the objects behind the
# URLs. Promises 1 and 2.

# Any sub-range of the block may be requested.
_RANGES = "RANGES"
# Only the ticket's own request, verbatim.
_OWN = "OWN"

_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})\Z", re.I)
_SIGNED_HEADERS = re.compile(r"[?&]X-(?:Amz|Goog)-SignedHeaders=([^&]*)", re.I)


class _ObjectChanged(Exception):
    """The object behind a URL has changed: only a new transfer can be right."""


class _Contradiction(RetryableError):
    """The response is of another object than the responses before it."""


class _NotUseful(RetryableError):
    """The response to a changed Range does not say that it has the bytes wanted."""


class _IgnoresRange(ProtocolError):
    """The response to the ticket's Range is not of that range."""


class _EndedEarly(ContentLengthMismatch):
    """The response was as announced, but announced less than was requested."""


class _Evidence(NamedTuple):
    """The strong ETag and total size that a response shows; perhaps just a slice's."""

    etag: str
    total: Optional[int] = None
    is_slice: bool = False


class _Object:
    """The object behind a URL that blocks may share, as responses have shown it."""

    def __init__(self, number: int, url: str, kin: Optional["_Object"] = None) -> None:
        # The number of the first block that shares it: its name in the journal.
        self.number = number
        self.known: _Evidence = kin.known._replace(etag="") if kin else _Evidence("")
        # A changed Range has worked; replicas with two ETags take turns behind a name.
        self.is_proven = self.has_two_replicas = self.was_contradicted = False
        self._origin = _origin(url)
        # The nodes, by origin, that renewed URLs lead to: `kin` is one of them.
        self._nodes: Dict[Any, _Object] = kin._nodes if kin else {}
        self._lock: Any = kin._lock if kin else threading.Lock()
        self._nodes[self._origin] = self

    def check(self, evidence: _Evidence) -> None:
        """Raise _Contradiction if a response is of another object."""
        (etag, total, is_slice), known = evidence, self.known
        is_unknown = None in (total, known.total) or (is_slice and known.is_slice)
        has_other_etag = "" not in (etag, known.etag) and etag != known.etag
        if has_other_etag or (total != known.total and not is_unknown):
            self.was_contradicted = True
            shown = known.etag or "no ETag", known.total, etag or "no ETag", total
            words = _printable("%s, %s bytes; then %s, %s bytes" % shown)
            raise _Contradiction("the object has changed (%s)", words)

    def learn(self, evidence: _Evidence, ask: "_Ask") -> None:
        """Take up what the response to a request has shown."""
        with self._lock:
            # Another thread may have learned of another object meanwhile.
            self.check(evidence)
            known = self.known
            if evidence.etag and known.etag and ask.is_after_contradiction:
                self.has_two_replicas = True
            if evidence.total is None or not (known.total is None or known.is_slice):
                evidence = known._replace(etag=evidence.etag)
            self.known = evidence._replace(etag=known.etag or evidence.etag)
            for node in self._nodes.values():
                node._share(self.known)
            self.is_proven = self.is_proven or ask.is_changed

    def _share(self, known: _Evidence) -> None:
        self.known = known._replace(etag=self.known.etag)

    def at(self, url: str) -> "_Object":
        """The object behind a renewed URL: another node makes its own ETags."""
        with self._lock:
            return self._nodes.get(_origin(url)) or _Object(self.number, url, self)

    def record(self) -> List[Any]:
        return [*self.known, *self._origin]

    def recall(self, record: List[Any]) -> None:
        etag, total, is_slice, *origin = record
        etag = etag if tuple(origin) == self._origin else self.known.etag
        size = self.known[1:] if total is None else (total, is_slice)
        self.known = _Evidence(etag, *size)


class _BlockRequest(NamedTuple):
    """The ticket's own request for a block, its object, and the ticket's number."""

    url: str
    headers: Dict[str, str]
    object: _Object
    renewal: int


class _Block:
    """A data block: where its bytes lie in its object, and how to request them."""

    def __init__(
        self, index: int, entry: DataBlock, shared: Dict[Any, _Object]
    ) -> None:
        self.index = index
        # The decoded content of a data URI.
        self.data: Optional[bytes] = None
        # Offset of the block in its object, and the length that its Range gives.
        self.has_range = False
        self.base = 0
        self.range_size: Optional[int] = None
        # Length of the block in bytes, None until known; whether the server announced
        # that before the data, and in a way that lets the block be cut.
        self.size: Optional[int] = None
        self.is_announced = False
        self._is_divisible = False
        # Whether it was read from a response that did not say what it has.
        self.is_in_doubt = False
        self.mode = _RANGES
        if _is_inline(entry):
            self.data = _decode_data_uri(entry.url, "data block %d" % (index + 1))
            self.size, self.is_announced = len(self.data), True
            return
        self._read_range(_selectors(entry)[0])
        url, headers = _url_and_headers(entry)
        # A block without a Range is an object by itself: its query may name a slice.
        key = _object_key(entry) if self.has_range else index
        found = shared.setdefault(key, _Object(index, url))
        self.request = _BlockRequest(url, headers, found, 0)
        signed = ";".join(_SIGNED_HEADERS.findall(url))
        if "range" in re.split("[;,]", urllib.parse.unquote(signed).lower()):
            self.mode = _OWN

    @property
    def object(self) -> _Object:
        return self.request.object

    def _read_range(self, text: Optional[str]) -> None:
        if text is None:
            return
        match = _RANGE.match("".join(text.split()))
        first, last = match.groups() if match else ("1", "0")
        self.has_range, self.base = True, int(first)
        if last:
            self.size = self.range_size = int(last) + 1 - self.base
            if self.size <= 0:
                problem = "data block %d has a Range other than bytes=A-B or bytes=A-"
                raise ProtocolError(problem, self.index + 1)

    def renew(self, entry: DataBlock, renewal: int) -> None:
        if self.data is None:
            url, headers = _url_and_headers(entry)
            self.request = _BlockRequest(url, headers, self.object.at(url), renewal)

    def use_own_requests(self, is_in_doubt: bool = False) -> None:
        """From now on, send only the ticket's own request."""
        self.is_in_doubt = self.is_in_doubt or is_in_doubt
        self.mode = _OWN

    def learn_size(self, size: Optional[int]) -> None:
        self.size = self.size if size is None else size

    def announce(self, is_divisible: bool) -> None:
        """The server has announced the size before it sent the data."""
        self.is_announced = True
        self._is_divisible = self._is_divisible or is_divisible

    def can_be_cut(self) -> bool:
        """Whether its size is certain, and an ETag can vouch for several parts."""
        if self.data is not None or self.mode == _OWN or self.size is None:
            return False
        etag, total, is_slice = self.object.known
        range_end = self.base + (self.range_size or sys.maxsize)
        reaches_end = not is_slice and (total or 0) >= range_end
        return etag != "" and (self._is_divisible or reaches_end)


def _url_and_headers(entry: DataBlock) -> Tuple[str, Dict[str, str]]:
    url, login = _without_userinfo(entry.url)
    return url, dict(login, **(entry.headers or {}))


class _Ask(NamedTuple):
    """A request for bytes of a block, perhaps with another Range than the ticket's."""

    start: int
    end: Optional[int]
    is_changed: bool
    request: _BlockRequest
    is_after_contradiction: bool


class _Span(NamedTuple):
    """Where in its block a body lies (`end` None: unknown), and the block's size."""

    start: int
    end: Optional[int]
    size: Optional[int]
    is_in_doubt: bool = False


class _Reply(NamedTuple):
    """A response with its request, where its body lies, and what it shows."""

    ask: _Ask
    response: _Response
    evidence: _Evidence
    span: _Span


def _ask_for(block: _Block, position: int, end: Optional[int], if_range: bool) -> _Ask:
    """The request for a block's bytes from `position` on, perhaps with If-Range."""
    request, size = block.request, block.size
    etag, is_after = request.object.known.etag, request.object.was_contradicted
    is_all = position == 0 and end in (None, size)
    if is_all or block.mode == _OWN or size is None:
        return _Ask(0, size, False, request, is_after)
    end = size if end is None else end
    headers = {k: v for k, v in request.headers.items() if k.lower() != "range"}
    headers["Range"] = "bytes=%d-%d" % (block.base + position, block.base + end - 1)
    if etag and if_range:
        headers["If-Range"] = etag
    return _Ask(position, end, True, request._replace(headers=headers), is_after)


def _strong_etag(response: _Response) -> str:
    etag = response.headers.get("etag", "").strip()
    return etag if etag.startswith('"') else ""


def _evidence(block: _Block, response: _Response) -> _Evidence:
    """What a response shows; the total only where it is certain what it counts."""
    total, is_slice = None, False
    if response.status == 206:
        said = _content_range(response.headers.get("content-range", ""))
        if block.has_range and said is not None:
            total = said[2]
            is_slice = total == said[1] - said[0]
    elif block.base == 0 and block.range_size is None:
        total = response.length
    return _Evidence(_strong_etag(response), total, is_slice)


_Said = Tuple[int, int, Optional[int]]


def _locate(block: _Block, ask: _Ask, response: _Response) -> _Span:
    """Where in the block a response's body lies (RFC 9110, 15.3.7). Raises _NotUseful
    for a changed Range; for the ticket's own, ProtocolError or _IgnoresRange."""
    text = response.headers.get("content-range")
    said = _content_range(text or "")
    length, wanted, base = response.length, block.range_size, block.base
    is_partial = response.status == 206
    is_odd = "multipart/" in response.headers.get("content-type", "").lower()
    if is_odd or (said is not None and length not in (None, said[1] - said[0])):
        said = None
    if is_partial and said is not None and _is_wanted(block, ask, response, said):
        size = _size_by_total(block, response, said)
        return _Span(said[0] - block.base, said[1] - block.base, size)
    if ask.is_changed:
        raise _NotUseful(_of(block, response, "not certainly of the requested Range"))
    if is_partial and not block.has_range:
        return _Span(0, length, length)
    is_same = said is not None and said[:2] == (base, base + (wanted or said[2] or 0))
    if is_odd or (text is not None and not is_same):
        raise _damaged(block, response, "not of the requested Range")
    if base == 0 and wanted is None and not is_partial:
        return _Span(0, length, length)
    if wanted is not None and length in (None, wanted):
        return _Span(0, wanted, wanted, is_in_doubt=length is None)
    if is_partial:
        raise _damaged(block, response, "no Content-Range")
    raise _IgnoresRange(_of(block, response, "the server ignores the Range header"))


def _is_wanted(block: _Block, ask: _Ask, response: _Response, said: _Said) -> bool:
    """Whether a 206 begins at the first byte requested, or earlier and contains all
    (caches align ranges); for a changed Range, also that it is surely of the object."""
    (first, stop, total), is_whole = said, not block.has_range
    start, end = first - block.base, stop - block.base
    contains_all = stop == total if ask.end is None else end >= ask.end
    # Without Content-Length, an end that contradicts Content-Range shows too late.
    is_aligned = start < ask.start and contains_all and response.length is not None
    is_placed = start == ask.start or is_aligned
    if not ask.is_changed:
        return is_placed and block.has_range
    lacks_etag = ask.request.object.known.etag != "" and not _strong_etag(response)
    # The query of a URL may name a slice, and the Range be one of the whole file.
    return is_placed and not lacks_etag and not (is_whole and total != block.size)


def _size_by_total(block: _Block, response: _Response, said: _Said) -> Optional[int]:
    """The size of a block by the object's total, which may be just the length of the
    slice (the EGA); that is certain only for a slice from the object's first byte."""
    first, stop, total = said
    is_certain = total is not None and (first == 0 or total != stop - first)
    if total is None or not is_certain or not block.has_range:
        return block.size
    size = total - block.base
    if size <= 0:
        raise _damaged(block, response, "the Range begins beyond the object's end")
    return size if block.range_size is None else min(size, block.range_size)


def _is_announced(block: _Block, reply: _Reply) -> bool:
    """Whether a response announces the block's size before its data."""
    span, (_, total, is_slice) = reply.span, reply.evidence
    if not span.size or span.is_in_doubt:
        return False
    if not block.has_range:
        return reply.response.length is not None
    if total is not None and not is_slice and reply.response.status == 206:
        return total >= block.base + (block.range_size or 0)
    return span.start <= 0 and (span.end or 0) >= (block.range_size or sys.maxsize)


def _of(block: _Block, response: _Response, problem: str) -> str:
    where = _shown(response.url), response.status, block.index + 1, problem
    return "%s: response %d for data block %d: %s" % where


def _damaged(block: _Block, response: _Response, problem: str) -> ProtocolError:
    """The error for a response that may have been damaged on its way."""
    return ProtocolError(_of(block, response, problem), transient=True)


class _Places:
    """How many requests may be in flight; the part that is due takes the next place."""

    def __init__(self, transport: _Transport, most: int) -> None:
        self._transport = transport
        self.allowed = most
        self._used = 0
        # Counts reductions of the limit.
        self._reductions = 0
        # The part whose data the caller needs next; whether only it gets a place.
        self.due: Optional[_Part] = None
        self._is_for_due = False
        self._freed = threading.Condition()

    def prefer(self, part: "_Part") -> None:
        with self._freed:
            self.due = part
            self._freed.notify_all()

    @contextlib.contextmanager
    def hold(self, part: "_Part") -> Iterator[Tuple[int, int]]:
        """Hold a place; gives the numbers of reductions and of requests in flight."""
        with self._freed:
            is_due = part is self.due
            while self._used >= self.allowed or (self._is_for_due and not is_due):
                self._is_for_due = self._is_for_due or is_due
                self._freed.wait(_POLL)
                self._transport.wait(0)
                is_due = part is self.due
            self._is_for_due = self.allowed == 1 or (self._is_for_due and not is_due)
            self._freed.notify_all()
            self._used += 1
            numbers = self._reductions, self._used
        try:
            yield numbers
        finally:
            with self._freed:
                self._used -= 1
                self._freed.notify_all()

    def reduce(self) -> None:
        with self._freed:
            self._reductions += self.allowed > 1
            self.allowed = max(1, self.allowed - 1)
            self._transport.limit(self.allowed)

    def refuse(self, number: int, used: int) -> int:
        """After a refusal, allow one request fewer than were in flight, unless fewer
        have been allowed since. Returns 2 if the part has to wait for a place now, 1 if
        fewer are allowed, 0 if there were not too many."""
        with self._freed:
            if number == self._reductions and max(used, self._used) > 1:
                self.allowed = min(self.allowed, max(used, self._used))
                self.reduce()
            return (number < self._reductions) + (self._used > self.allowed)


class _Transfer:
    """What the parts of one transfer share."""

    def __init__(self, source: _Source, options: _Options) -> None:
        self.options = options
        self.transport = _Transport(options, getattr(source, "user_agent", None))
        self.places = _Places(self.transport, options.connections)
        self.source: Any = source
        # Counts renewals of the ticket; only one thread renews it.
        self._renewals = 0
        self._renewing = threading.Lock()
        shared: Dict[Any, _Object] = {}
        try:
            self.ticket = source if isinstance(source, Ticket) else self._request()
            entries = enumerate(self.ticket.blocks)
            self.blocks = [_Block(index, entry, shared) for index, entry in entries]
        except BaseException:
            self.transport.stop()
            raise

    def _request(self) -> Ticket:
        return _parse_ticket(_request_json(self.transport, self.source, self.options))

    def renew(self, renewal: int) -> None:
        """Request the ticket again, unless it was renewed since then."""
        with self._renewing:
            if self._renewals > renewal:
                return
            _log.info("a URL was refused and may have expired; renewing the ticket")
            renewed = self._request()
            _require_unreduced(_is_reduced(self.ticket), _is_reduced(renewed))
            if not _is_equivalent(self.ticket, renewed):
                raise _ObjectChanged("the renewed ticket has other data blocks")
            self._renewals += 1
            for block, entry in zip(self.blocks, renewed.blocks):
                block.renew(entry, self._renewals)


class _Part:
    """The bytes `start` to `end` (None: the block's end) of a block, of which the next
    to yield is `position`. Bytes already yielded are vouched for by the strong ETag of
    the part's first response or, without one, by their CRC-32."""

    def __init__(
        self, transfer: _Transfer, block: _Block, start: int, end: Optional[int]
    ) -> None:
        self.block = block
        self.start = start
        self.end = end
        self.position = start
        # Since when it lacks a response (time.monotonic, or None); its requests so far.
        self.idle_since: Optional[float] = time.monotonic()
        self.requests = 0
        self._transfer = transfer
        # None before the first response, "" if that had none; for a cut, the object's.
        self._etag = block.object.known.etag if start > 0 else None
        self._crc = 0 if start == 0 else None
        # Counts of failures since data came last; what the last one was ("status" …).
        self._trouble: Dict[str, int] = collections.Counter()
        # The last request, and what the places had when it was sent.
        self._ask: Any = None
        self._numbers = 0, 0

    def limit(self) -> Optional[int]:
        end, size = self.end, self.block.size
        return end if size is None or (end is not None and end < size) else size

    def is_complete(self) -> bool:
        return self._is_at_end(self.position)

    def _is_at_end(self, offset: int) -> bool:
        limit = self.limit()
        return limit is not None and offset >= limit

    def resume(self, position: int, crc: int) -> None:
        """Begin after the bytes that an earlier run has kept, with their CRC-32."""
        self.position, self._crc = position, crc

    def stop_at(self, end: int) -> None:
        """Let the part end earlier; called by the thread that reads it."""
        self.end = end

    def read(self) -> Generator[bytes, None, None]:
        """Yield the bytes from `position` on; the retry loop for data blocks."""
        options = self._transfer.options
        retry = _Retry(options.max_retries, options.retry_wait)
        self._trouble.clear()
        while not self.is_complete():
            before = self.position
            try:
                with contextlib.closing(self._attempt()) as chunks:
                    for data in chunks:
                        self.position += len(data)
                        if self._crc is not None:
                            self._crc = zlib.crc32(data, self._crc)
                        retry.progress(len(data))
                        yield data
            except HtsgetException as error:
                self._recover(error, retry, self.position > before)
            finally:
                self.idle_since = self.idle_since or time.monotonic()

    def _attempt(self) -> Generator[bytes, None, None]:
        block, transport = self.block, self._transfer.transport
        if block.data is not None:
            yield block.data[self.position :]
            return
        with self._transfer.places.hold(self) as self._numbers:
            # If-Range makes a replica with another ETag send the whole object.
            if_range = not self._trouble["full"]
            self._ask = ask = _ask_for(block, self.position, self.limit(), if_range)
            self.requests += 1
            if self._trouble["contradictions"]:
                # A new connection may lead to another replica.
                transport.close_idle()
            response = transport.request(ask.request.url, ask.request.headers)
            with contextlib.closing(response):
                reply = self._judge(ask, response)
                self.idle_since = None
                yield from self._new_bytes(reply)

    def _judge(self, ask: _Ask, response: _Response) -> _Reply:
        """Judge a response: is it data, of the same object, and where does it lie?"""
        block = self.block
        if response.status not in (200, 206):
            if response.status in _CROWDED_STATUS:
                self._trouble["crowded"] = self._transfer.places.refuse(*self._numbers)
            self._trouble["status"] = response.status
            raise _refusal(response, "data block")
        _require_data(response)
        evidence = _evidence(block, response)
        ask.request.object.check(evidence)
        self._trouble["full"] = ask.is_changed and response.status == 200
        span = _locate(block, ask, response)
        _require_identity(response, span.start == 0)
        if span.is_in_doubt:
            self._doubt(response)
        elif response.status == 206 and not block.has_range and not ask.is_changed:
            block.use_own_requests()
        return _Reply(ask, response, evidence, span)

    def _doubt(self, response: _Response) -> None:
        """The body may be the slice or the whole file: only its end will tell."""
        block = self.block
        text = _of(block, response, "neither Content-Range nor Content-Length")
        is_vouched = self._crc is None and self.position > 0
        if is_vouched or block.object.is_proven or self.end not in (None, block.size):
            raise RetryableError(text)
        if not response.is_framed:
            raise ProtocolError(text)
        self._etag, self._crc = "", self._crc or 0
        block.use_own_requests(is_in_doubt=True)

    def _new_bytes(self, reply: _Reply) -> Iterator[bytes]:
        """Drop the bytes of a response before `position`, and yield those after it."""
        span, body = reply.span, _bounded(self.block, reply, self.position)
        rest = self._drop(reply, body)
        self._learn(reply)
        first = offset = self.position
        # Hold back the last bytes until the end that must follow is seen.
        is_open = span.end is None and self.block.size is not None
        needs_end, held = span.is_in_doubt or is_open, b""
        limit = self.limit()
        for data in itertools.chain([rest], body):
            new = data if limit is None else data[: max(0, limit - offset)]
            offset += len(data)
            if not span.is_in_doubt and new:
                self._trouble.clear()
            if needs_end:
                held, new = new or held, held if new else b""
            if new:
                yield new
            # The caller's thread may have left the rest of the block to others.
            limit, end = self.limit(), self.block.size if span.end is None else span.end
            if limit is not None and limit <= offset < (end or 0):
                # The rest belongs to other parts, or lies beyond the block.
                break
        else:
            self._conclude(reply, offset, is_confirmed=offset == first > 0)
        if held:
            yield held

    def _drop(self, reply: _Reply, body: Iterator[bytes]) -> bytes:
        """Drop what precedes `position`, if it is what was yielded; return the rest."""
        left, crc, rest = self.position - reply.span.start, 0, b""
        is_vouched = bool(self._etag) and reply.evidence.etag == self._etag
        needs_proof = not reply.ask.is_changed and self.position > 0
        needs_proof = needs_proof and (reply.span.is_in_doubt or not is_vouched)
        if needs_proof and self._crc is None:
            raise _Contradiction("nothing shows that the object is the same")
        while left > 0:
            data = next(body, b"")
            if not data:
                text = "data block %d has ended early"
                raise ContentLengthMismatch(text, self.block.index + 1)
            if needs_proof:
                # What lies before the block is not compared.
                seen = max(0, left - self.position)
                crc = zlib.crc32(data[seen:left], crc)
            left, rest = left - len(data), data[left:]
        if needs_proof and crc != self._crc:
            raise _Contradiction("data block %d has other bytes", self.block.index + 1)
        return rest

    def _learn(self, reply: _Reply) -> None:
        """Take up what a response has shown, now that its bytes are proven."""
        block, (ask, response, evidence, span) = self.block, reply
        is_new = span.size not in (None, block.size) and block.size is not None
        is_short = (span.size or sys.maxsize) < self.position
        if is_short or (is_new and (block.is_announced or block.range_size is None)):
            raise _Contradiction("data block %d has another size", block.index + 1)
        if not span.is_in_doubt:
            ask.request.object.learn(evidence, ask)
        block.learn_size(span.size)
        if _is_announced(block, reply):
            ranges = response.headers.get("accept-ranges", "").strip().lower()
            block.announce(is_divisible=response.status == 206 or ranges == "bytes")
        if self._etag is None:
            self._etag = evidence.etag
            if self._etag and self.position == 0:
                self._crc = None

    def _conclude(self, reply: _Reply, offset: int, is_confirmed: bool) -> None:
        """The body ended at `offset`; `is_confirmed`: so did an earlier one."""
        block, response, span = self.block, reply.response, reply.span
        if span.end is None and block.size is None:
            if response.is_framed or is_confirmed:
                block.learn_size(offset)
            if is_confirmed and not response.is_framed:
                text = "data block %d: the server does not announce its end at byte %d"
                _log.warning(text, block.index + 1, offset)
        elif span.end is not None and offset < span.end:
            text = "%d bytes are missing" % (span.end - offset)
            raise ContentLengthMismatch(_of(block, response, text))
        if not self._is_at_end(offset):
            text = "ended at byte %d, possibly too early" % offset
            raise _EndedEarly(_of(block, response, text))

    def _recover(self, error: HtsgetException, retry: _Retry, has_new: bool) -> None:
        """Decide what follows a failure: another request or the error."""
        ask, block, trouble = self._ask, self.block, self._trouble
        status, crowded = trouble.pop("status", 0), trouble.pop("crowded", 0)
        trouble["repeats"] += crowded > 0
        trouble["ignored"] = (trouble["ignored"] + 1) * isinstance(error, _IgnoresRange)
        is_free = self.is_complete() or ask.request.renewal != block.request.renewal
        if is_free or (isinstance(error, _EndedEarly) and has_new):
            return
        if isinstance(error, _Contradiction):
            self._repeat_elsewhere(error, retry)
        elif crowded > 1 or (crowded and trouble["repeats"] == 1):
            _log.warning("%s; trying again with fewer requests at once", error)
            self._transfer.transport.wait(error._retry_after)
        elif status in _REFUSED_STATUS:
            self._descend(error, ask)
        elif trouble["ignored"]:
            if trouble["ignored"] > 1:
                is_proven = block.object.is_proven
                self._pause(RetryableError(str(error)) if is_proven else error, retry)
        elif ask.is_changed and not block.object.is_proven:
            self._doubt_ranges(error, status, retry)
        else:
            self._pause(error, retry)

    def _pause(self, error: HtsgetException, retry: _Retry) -> None:
        """Wait before the next request, or raise the error if there is none."""
        seconds, transport = retry.pause(error), self._transfer.transport
        if isinstance(getattr(error, "source", None), socket.timeout):
            # A server may leave a new connection unanswered while others are open.
            transport.close_idle()
        _log.warning("%s; trying again in %.1f s", error, seconds)
        transport.wait(seconds)

    def _repeat_elsewhere(self, error: HtsgetException, retry: _Retry) -> None:
        """Let the next replica have a try; if none has the object, it has changed."""
        trouble = self._trouble
        trouble["contradictions"] += 1
        if trouble["contradictions"] > _REPLICA_ATTEMPTS:
            if not self.block.object.has_two_replicas:
                where = _shown(self.block.request.url), error
                raise _ObjectChanged("%s: %s" % where)
            trouble["contradictions"] = 0
            self._pause(error, retry)

    def _descend(self, error: HtsgetException, ask: _Ask) -> None:
        """After a refusal: a renewed ticket, the ticket's own request, or the error."""
        trouble, block, transfer = self._trouble, self.block, self._transfer
        is_trial = ask.is_changed and not block.object.is_proven
        most = _RENEWALS_CHANGED if is_trial else _RENEWALS_OWN
        if trouble["renewals"] < most and not isinstance(transfer.source, Ticket):
            trouble["renewals"] += 1
            with transfer.places.hold(self):
                transfer.renew(ask.request.renewal)
        elif is_trial:
            trouble["renewals"] = 0
            block.use_own_requests()
        else:
            raise error

    def _doubt_ranges(self, error: HtsgetException, status: int, retry: _Retry) -> None:
        """A changed Range has failed, and none of the object has worked yet: perhaps
        none will. Where much would have to be read again, that is not tried."""
        trouble, is_dear = self._trouble, self.position > _REREAD_LIMIT
        is_useless = isinstance(error, _NotUseful)
        is_closed = isinstance(error.__cause__, http.client.RemoteDisconnected)
        is_broken = status == 500 or is_closed
        is_refused = not error._transient and status > 0
        trouble["useless"] = trouble["useless"] + 1 if is_useless else 0
        trouble["broken"] = trouble["broken"] + 1 if is_broken else 0
        if not is_dear and (is_refused or 2 in (trouble["useless"], trouble["broken"])):
            self.block.use_own_requests()
        elif is_dear or not is_useless:
            try:
                self._pause(RetryableError(str(error)) if is_refused else error, retry)
            except RetryableError:
                if not is_dear:
                    raise
                self.block.use_own_requests()
                retry.progress(_PROGRESS)


def _bounded(block: _Block, reply: _Reply, position: int) -> Iterator[bytes]:
    span, response = reply.span, reply.response
    end = block.size if span.end is None else span.end
    offset = span.start
    for data in response.body():
        offset += len(data)
        if end is not None and offset > end:
            if span.is_in_doubt:
                text = "the server ignores the Range header"
                raise _IgnoresRange(_of(block, response, text))
            text = "more data than announced"
            if offset - len(data) > position:
                # Nothing shows which bytes are right.
                raise _ObjectChanged(_of(block, response, text))
            raise _damaged(block, response, text)
        yield data


# ---- the window
#
# Splits blocks into parts, strictly in order, and yields their data in order. There is
# one decision, in one direction: at first the caller's thread reads whole blocks; once
# it mostly waits, helper threads read ahead for the rest of the transfer. Owns the
# place where unread data begins, the slots and the helpers. Promise 3.

# A chunk: the number of its block, its offset in that block, and the data.
_Chunk = Tuple[int, int, bytes]


class _Slot:
    """A part that is read ahead, its data so far, and the error that ended it."""

    def __init__(self, part: _Part) -> None:
        self.part = part
        self.held = 0
        self.is_done = False
        self.error: Optional[BaseException] = None
        self._chunks: List[_Chunk] = []

    def put(self, offset: int, data: bytes) -> None:
        self._chunks.append((self.part.block.index, offset, data))
        self.held += len(data) + _CHUNK_OVERHEAD

    def take(self) -> List[_Chunk]:
        chunks, self._chunks, self.held = self._chunks, [], 0
        return chunks

    def end(self, error: Optional[BaseException]) -> None:
        self.error, self.is_done = error, True


class _Clock:
    """Whether the caller's thread mostly waits for servers, by its recent time."""

    def __init__(self) -> None:
        self._wall = self._cpu = 0.0
        self._halved = time.monotonic()

    def next(self, chunks: Iterator[bytes]) -> Optional[bytes]:
        """The next chunk, None after the last; counts the time that it takes."""
        wall, cpu = time.monotonic(), _thread_time()
        data = next(chunks, None)
        now = time.monotonic()
        self._wall += now - wall
        self._cpu += _thread_time() - cpu
        if now - self._halved > 1.0:
            # Old samples fade.
            self._wall, self._cpu, self._halved = self._wall / 2, self._cpu / 2, now
        return data

    def is_waiting(self) -> bool:
        return self._wall - self._cpu > max(_NOTICEABLE, 3 * self._cpu)


class _Pace:
    """The size of a cut that is worth a request, by the rate of one connection."""

    def __init__(self) -> None:
        self.cut = _FIRST_CUT

    def chunks(self, part: _Part, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on a part's chunks and measure the time that they take to arrive."""
        first_wait = waited = 0.0
        start = begun = part.position
        before = time.monotonic()
        for data in chunks:
            passed = time.monotonic() - before
            if part.position - len(data) == start:
                # The rate counts from the first byte.
                first_wait, begun = passed, part.position
            else:
                waited += passed
            yield data
            before = time.monotonic()
        if part.position - start >= _SMALLEST_CUT and waited > 0:
            # Longer waits were for a place, not for the server.
            span = min(max(1.0, first_wait), _STARVED)
            self.cut = max(int((part.position - begun) / waited * span), _SMALLEST_CUT)


class _Window:
    """Yields the data of a resumed part, if any, and of all blocks from `first` on."""

    def __init__(self, transfer: _Transfer, first: int, part: Optional[_Part]) -> None:
        self._transfer = transfer
        self._most: int = transfer.options.connections
        self._pace = _Pace()
        self._clock = _Clock()
        # Where the data begins that nobody has started to read: a block and an offset.
        self._unread = first, 0
        # Guards what helpers share; notified when it changes.
        self._changed = threading.Condition()
        self._slots: Deque[_Slot] = collections.deque()
        self._helpers: List[threading.Thread] = []
        self._resumed = part
        # Since when the caller waits for the part that is due.
        self._waits_since: Optional[float] = None
        # The due part and the number of its request that was last relieved.
        self._relieved: Tuple[Optional[_Part], int] = (None, 0)

    def chunks(self) -> Generator[_Chunk, None, None]:
        part = self._resumed or self._claim()
        while part is not None:
            yield from self._read(part)
            part = None if self._helpers else self._claim()
        for slot in iter(self._next_slot, None):
            yield from self._take(slot)

    def close(self) -> None:
        self._transfer.transport.stop()
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + 1.0
        for helper in list(self._helpers):
            helper.join(max(0.0, deadline - time.monotonic()))

    # The caller's side.

    def _read(self, part: _Part) -> Iterator[_Chunk]:
        self._transfer.places.prefer(part)
        with contextlib.closing(part.read()) as chunks:
            is_watched = self._most > 1 and part.block.data is None
            for data in self._watched(part, chunks) if is_watched else chunks:
                yield part.block.index, part.position - len(data), data

    def _watched(self, part: _Part, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Pass on the chunks of a part, and have helpers start once it mostly waits."""
        measured = self._pace.chunks(part, chunks)
        while True:
            self._waits_since = time.monotonic()
            data = self._clock.next(measured)
            self._waits_since = None
            if data is None:
                return
            yield data
            if not self._helpers and self._most > 1 and self._clock.is_waiting():
                self._spread(part)

    def _spread(self, part: _Part) -> None:
        """Have helpers read what follows the next cut of the caller's part or block."""
        block = part.block
        # A healthy stream is not given up for a try.
        is_cheap = part.position - part.start <= _REREAD_LIMIT or block.object.is_proven
        cut = self._next_end(block, part.position) if is_cheap else None
        with self._changed, _signals_blocked():
            if cut is None and self._unread[0] >= len(self._transfer.blocks):
                return
            # `_Places` keeps their requests within `connections`.
            for _ in range(self._most):
                # Daemons cannot keep the process from ending.
                helper = threading.Thread(target=self._help, name="htsget", daemon=True)
                try:
                    helper.start()
                except RuntimeError:
                    # The system has no more threads.
                    break
                self._helpers.append(helper)
            if not self._helpers:
                self._most = 1
            elif cut is not None:
                part.stop_at(cut)
                self._unread = block.index, cut

    def _next_slot(self) -> Optional[_Slot]:
        with self._changed:
            while not self._slots:
                if self._unread[0] >= len(self._transfer.blocks):
                    return None
                self._pause()
            self._transfer.places.prefer(self._slots[0].part)
            return self._slots[0]

    def _take(self, slot: _Slot) -> Iterator[_Chunk]:
        """Yield what helpers read of a part. After an error that passes, the caller's
        thread reads the part on: an outage that is over must not end a transfer."""
        is_done = False
        while not is_done:
            with self._changed:
                self._waits_since = time.monotonic()
                while not slot.held and not slot.is_done:
                    self._pause()
                self._waits_since = None
                chunks, is_done = slot.take(), slot.is_done
                self._changed.notify_all()
            yield from chunks
        with self._changed:
            self._slots.popleft()
            self._changed.notify_all()
        if isinstance(slot.error, HtsgetException) and slot.error._transient:
            yield from self._read(slot.part)
        elif slot.error is not None:
            raise slot.error

    # Both sides, with the lock.

    def _pause(self) -> None:
        """Wait for a change; relieve a part that is due and starved."""
        part, transfer = self._transfer.places.due, self._transfer
        request = part, part.requests if part else 0
        if self._is_starved() and self._relieved != request:
            self._relieved = request
            transfer.transport.close_idle()
            transfer.places.reduce()
        self._changed.wait(_POLL)
        transfer.transport.wait(0)

    def _is_starved(self, other: Optional[_Part] = None) -> bool:
        """Whether the part that is due (unless it is `other`) has long had no response
        while the caller waits: the server may handle only so many connections."""
        part, since = self._transfer.places.due, self._waits_since
        idle_since = None if part is None else part.idle_since
        if since is None or idle_since is None or part is other:
            return False
        return time.monotonic() - max(since, idle_since) > _STARVED

    def _most_slots(self) -> int:
        return 2 * self._transfer.places.allowed

    def _share(self) -> int:
        """How many bytes a slot may hold: more, where fewer requests are allowed."""
        window = min(self._most * _WINDOW_EACH, _WINDOW_MOST)
        return window // max(len(self._slots), self._most_slots())

    def _claim(self) -> Optional[_Part]:
        index, start = self._unread
        if index >= len(self._transfer.blocks):
            return None
        block = self._transfer.blocks[index]
        end = self._next_end(block, start) if self._helpers else None
        self._unread = (index + 1, 0) if end is None else (index, end)
        return _Part(self._transfer, block, start, end)

    def _next_end(self, block: _Block, start: int) -> Optional[int]:
        """Where a cut from `start` ends; None if the block is not to be cut there."""
        end = start + min(self._pace.cut, self._share())
        is_long = block.size is not None and block.size - end > _SMALLEST_CUT
        is_worth_it = is_long and self._transfer.places.allowed > 1
        return end if is_worth_it and block.can_be_cut() else None

    def _is_trial_pending(self) -> bool:
        """Whether the next part must wait for the first cut of its object."""
        index, start = self._unread
        block = self._transfer.blocks[min(index, len(self._transfer.blocks) - 1)]
        is_whole = start == 0 and self._next_end(block, start) is None
        if is_whole or block.mode == _OWN or block.object.is_proven:
            return False
        parts = [slot.part for slot in self._slots if not slot.is_done]
        cuts = [part for part in parts if part.start > 0 or part.end is not None]
        return any(part.block.object is block.object for part in cuts)

    # The helpers' side.

    def _help(self) -> None:
        with contextlib.suppress(_Stopped):
            for slot in iter(self._open_slot, None):
                error: Optional[BaseException] = None
                try:
                    while self._read_ahead(slot):
                        pass
                except BaseException as failure:
                    error = failure
                with self._changed:
                    slot.end(error)
                    self._changed.notify_all()

    def _open_slot(self) -> Optional[_Slot]:
        with self._changed:
            while len(self._slots) >= self._most_slots() or self._is_trial_pending():
                self._pause()
            part = self._claim()
            if part is None:
                return None
            self._slots.append(_Slot(part))
            self._changed.notify_all()
            return self._slots[-1]

    def _read_ahead(self, slot: _Slot) -> bool:
        """Fill a slot; True if its connection was given up for the part that is due."""
        part = slot.part
        with contextlib.closing(part.read()) as chunks:
            for data in self._pace.chunks(part, chunks):
                with self._changed:
                    slot.put(part.position - len(data), data)
                    if slot is self._slots[0]:
                        self._changed.notify_all()
                    while self._is_full(slot) and not self._is_starved(part):
                        self._pause()
                if self._is_full(slot):
                    break
            else:
                return False
        with self._changed:
            while self._is_full(slot):
                self._pause()
        return True

    def _is_full(self, slot: _Slot) -> bool:
        return slot.held >= self._share() and not slot.part.is_complete()


# ---- output and journal
#
# Where the data goes. An output knows positions in bytes, and nothing of data blocks.
# The journal beside a part file says what a later run can prove of the bytes in it.
# This section owns both files, their lock and the final name: a file appears under that
# name only when it is complete (promise 1), and what was fetched is kept (promise 2).


class _Naming:
    """Adds the path to errors of a file that was opened here."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._path and isinstance(error, OSError) and error.filename is None:
            raise OSError(error.errno, error.strerror, self._path) from None


class _Output:
    """A binary file object; with a path, it was opened here and is closed here."""

    def __init__(self, stream: Any, path: str = "") -> None:
        self._stream = stream
        self.path = path
        self._naming = _Naming(path)
        # What messages call it.
        self.name = os.path.basename(path or "output")
        # How many bytes of the last write got there.
        self.taken = 0
        # Whether it is a regular file; where the data begins in it, if it is seekable.
        self._is_file = False
        self._start: Optional[int] = None
        absent = AttributeError, OSError, TypeError, ValueError
        with contextlib.suppress(*absent):
            self._is_file = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
            if fcntl.fcntl(stream.fileno(), fcntl.F_GETFL) & os.O_APPEND:
                # After ">>" in a shell, the position is 0.
                stream.seek(0, os.SEEK_END)
        with contextlib.suppress(*absent):
            if stream.seekable():
                self._start = int(stream.tell())

    def is_seekable(self) -> bool:
        return self._start is not None

    def write(self, data: bytes) -> None:
        self.taken = 0
        with self._naming:
            while self.taken < len(data):
                rest = data[self.taken :]
                count = self._stream.write(rest)
                is_count = count is not None and count is not True
                if not is_count and not isinstance(self._stream, RawIOBase):
                    count = len(rest)
                self.taken += count or self._await_room()

    def _await_room(self) -> int:
        """Wait a second at most for a non-blocking output that is full."""
        try:
            select.select([], [self._stream], [], 1)
        except (TypeError, ValueError):
            text = "the output accepts no more data"
            raise BlockingIOError(errno.EAGAIN, text) from None
        return 0

    def truncate(self, position: int) -> None:
        with self._naming:
            self._stream.seek((self._start or 0) + position)
            self._stream.truncate()

    def commit(self, size: int) -> None:
        """The data is complete, `size` bytes: have it on the disk."""
        with self._naming:
            if hasattr(self._stream, "flush"):
                self._stream.flush()
            try:
                if self._is_file:
                    os.fsync(self._stream.fileno())
            except OSError as error:
                if error.errno not in _NO_FSYNC:
                    raise

    def close(self) -> None:
        if self.path:
            self._stream.close()


class _KeptFile(_Output):
    """A file beside the final one. It is kept for a later run unless it is empty."""

    def __init__(self, path: str, like: Optional[os.stat_result]) -> None:
        super().__init__(_open_beside(path, like), path)

    def size(self) -> int:
        return os.fstat(self._stream.fileno()).st_size

    def is_in_place(self) -> bool:
        """Whether it is still the file under its name."""
        found = os.fstat(self._stream.fileno())
        exists = os.path.lexists(self.path)
        return exists and os.path.samestat(os.lstat(self.path), found)

    def require_in_place(self, size: Optional[int] = None) -> None:
        """BlockingIOError unless it is still the file under its name, and of a size."""
        if not self.is_in_place() or size not in (None, self.size()):
            text = "another process has changed, moved or removed it"
            raise BlockingIOError(errno.EAGAIN, text, self.path)

    def close(self) -> None:
        if self._stream.closed:
            return
        is_void = self.size() == 0 and self.is_in_place()
        with contextlib.suppress(AttributeError, OSError):
            if is_void and fcntl is not None:
                # As long as no other process can lock it.
                os.remove(self.path)
            # A forked process would keep the lock.
            fcntl.flock(self._stream.fileno(), fcntl.LOCK_UN)
        self._stream.close()
        if is_void and fcntl is None:
            # Windows removes no open file, and locks none.
            with contextlib.suppress(OSError):
                os.remove(self.path)


def _open_beside(path: str, like: Optional[os.stat_result]) -> Any:
    """Open or create a file for reading and appending. One that is to replace another
    (`like`) gets its owner and mode, where possible, before any data."""
    flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)
    flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        number = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600 if like else 0o666)
    except FileExistsError:
        _require_own(path, like)
        number = os.open(path, flags)
    if like and hasattr(os, "fchown"):
        with contextlib.suppress(OSError):
            os.fchown(number, like.st_uid, like.st_gid)
        # What the group was allowed is not meant for another group.
        is_same_group = os.fstat(number).st_gid == like.st_gid
        with contextlib.suppress(OSError):
            os.fchmod(number, like.st_mode & (0o777 if is_same_group else 0o707))
    return _open(number, "r+b", buffering=0)


def _require_own(path: str, like: Optional[os.stat_result]) -> None:
    """PermissionError unless the owner is this user, the folder's (some shares show one
    for all files) or that of the file to be replaced."""
    found, folder = os.lstat(path), os.stat(os.path.dirname(path))
    # Where there is no geteuid, all owners are 0.
    owners = [getattr(os, "geteuid", int)(), folder.st_uid, (like or folder).st_uid]
    if not stat.S_ISREG(found.st_mode) or found.st_uid not in owners:
        text = "not used, since it is not a regular file of this user; remove it"
        raise PermissionError(errno.EPERM, text, path)


def _part_path(path: str) -> str:
    """The part file of a path; its name is short enough for the suffixes."""
    folder, name = os.path.split(path)
    if len(os.fsencode(name)) > _LONGEST_NAME - len(".part.json"):
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return os.path.join(folder, name + ".part")


class _PathOutput(_KeptFile):
    """A path: written as `path`.part beside its journal, and renamed when complete."""

    def __init__(self, path: str, like: Optional[os.stat_result]) -> None:
        self._target = path
        part = _part_path(path)
        # Opened first, since it holds the lock.
        self.journal = _Journal(part, like)
        try:
            super().__init__(part, like)
        except BaseException:
            self.journal.close()
            raise
        self.name = os.path.basename(path)
        self._start = 0

    def kept(self, start: int, stop: int) -> Iterator[bytes]:
        with self._naming:
            self._stream.seek(start)
            while start < min(stop, self.size()):
                data = self._stream.read(min(_CHUNK, stop - start))
                yield data
                start += len(data)

    def flush(self) -> None:
        """Have the system write to the disk meanwhile: the fsync later is short."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def truncate(self, position: int) -> None:
        # Where locks do not reach, another run may have renamed it meanwhile.
        self.require_in_place()
        self.journal.require_untouched()
        super().truncate(position)

    def commit(self, size: int) -> None:
        """Give the complete part file, `size` bytes, its final name."""
        super().commit(size)
        self.require_in_place(size)
        self.journal.require_untouched()
        with self._naming:
            # Some file systems rename no open file, or report a full quota only here.
            self._stream.close()
        try:
            os.replace(self.path, self._target)
        except OSError as error:
            text = "%s; the data is complete and verified in %s: move it by hand"
            text %= error.strerror, self.path
            raise OSError(error.errno, text, self._target) from None
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            folder = os.open(os.path.dirname(self._target), os.O_RDONLY)
            stack.callback(os.close, folder)
            os.fsync(folder)
        self.journal.discard()

    def close(self) -> None:
        if not self._stream.closed and self.size() == 0:
            self.journal.discard()
        super().close()
        self.journal.close()


class _Checkpoint(NamedTuple):
    """A place to resume: at `offset` in `block`, at `position` in the part file."""

    block: int
    offset: int
    # Of the block.
    size: Optional[int]
    position: int
    # CRC-32 of all bytes before the block, and before `position`.
    crc_before: int
    crc: int
    # Whether the sizes of all blocks so far were announced.
    announced: bool
    # What is known of the objects behind the blocks, by block number.
    objects: Dict[str, List[Any]]


class _Journal(_KeptFile):
    """What of a part file can be proven: JSON lines, only ever appended. The first one
    identifies the transfer, checkpoints follow. It holds the lock of both files."""

    def __init__(self, part: str, like: Optional[os.stat_result]) -> None:
        super().__init__(part + ".json", like)
        self._part_path = part
        # Bytes that it has if no other process writes to it.
        self._size = self.size()
        # Where the last checkpoint resumes; when one was due: position, time.monotonic.
        self._resumable = 0
        self._last = 0, time.monotonic()
        try:
            fcntl.flock(self._stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.close()
            text = "locked: another process is writing to it"
            raise BlockingIOError(error.errno, text, part) from None
        except (AttributeError, OSError):
            pass  # Windows, or a file system without locks.
        self.require_untouched()

    def require_untouched(self) -> None:
        """BlockingIOError if another process has written to it or removed it."""
        self.require_in_place(self._size)

    def load(self, identity: Dict[str, Any]) -> List[_Checkpoint]:
        """The checkpoints of an earlier run, in order; ValueError says why there are
        none. After FileExistsError and ClientError the part file stays as it is."""
        self._stream.seek(0)
        # A line begins with a line feed, so that one after a torn one is whole.
        lines = self._stream.readall().split(b"\n")[1:]
        entries = list(map(_parsed, lines))
        if not entries:
            raise ValueError("it has no journal")
        self._require_same(entries[0], identity)
        points: List[_Checkpoint] = []
        for entry in entries[1:]:
            # Whatever is no checkpoint does not count.
            with contextlib.suppress(TypeError):
                point = _Checkpoint(**entry)
                while points and points[-1].position >= point.position:
                    points.pop()
                if point.block >= 0 and 0 <= point.offset <= point.position:
                    points.append(point)
        if not points:
            what = "its journal is damaged" if entries[1:] else "no checkpoint yet"
            raise ValueError(what)
        return points

    def _require_same(self, first: Dict[str, Any], identity: Dict[str, Any]) -> None:
        if first.get("journal") != _JOURNAL_VERSION:
            raise ValueError("its journal is damaged, or of another version")
        if first.get("request") != identity["request"]:
            text = "it is kept for another request; --no-resume (resume=False) drops it"
            raise FileExistsError(errno.EEXIST, text, self._part_path)
        _require_unreduced(bool(first.get("is_reduced")), identity["is_reduced"])
        if first.get("ticket") != identity["ticket"]:
            raise ValueError("the ticket has changed")

    def begin(self, identity: Dict[str, Any]) -> None:
        self.discard()
        self._append(dict(identity, journal=_JOURNAL_VERSION))

    def is_due(self, position: int) -> bool:
        new, passed = position - self._last[0], time.monotonic() - self._last[1]
        is_much = new >= _CHECKPOINT_BYTES or passed >= _CHECKPOINT_SECONDS
        return is_much and new > position >> _CHECKPOINT_SHIFT

    def add(self, point: _Checkpoint, position: int) -> None:
        """Add a checkpoint at `position`, if it resumes further than the last one. It
        voids earlier ones at or beyond its own position."""
        self._last = position, time.monotonic()
        if point.position > self._resumable:
            self._append(point._asdict())
            self._resumable = point.position

    def _append(self, entry: Mapping[str, Any]) -> None:
        self.write(_line(entry))
        self._size += self.taken

    def discard(self) -> None:
        os.ftruncate(self._stream.fileno(), 0)
        self._size = self._resumable = 0
        self._last = 0, time.monotonic()


def _line(entry: Mapping[str, Any]) -> bytes:
    """A line of the journal with its checksum, after a line feed."""
    check = zlib.crc32(json.dumps(entry, sort_keys=True).encode("ascii"))
    return b"\n" + json.dumps(dict(entry, check=check), sort_keys=True).encode("ascii")


def _parsed(line: bytes) -> Dict[str, Any]:
    with contextlib.suppress(KeyError, RecursionError, TypeError, ValueError):
        entry = dict(json.loads(line.decode("ascii")))
        del entry["check"]
        return entry if _line(entry) == b"\n" + line else {}
    return {}


def _open_output(output: Any) -> _Output:
    """Open and lock the output behind a file object or a path."""
    if not isinstance(output, (str, os.PathLike)):
        _require_binary(output)
        return _Output(output)
    path = os.fsdecode(output)
    if not path:
        raise RequestError("output is empty")
    own = _OWN_STREAM.match(os.path.abspath(path))
    if own:
        number = {"stdout": 1, "stderr": 2}.get(own.group(1)) or int(own.group(1))
        return _Output(_open(os.dup(number), "wb", buffering=0), path)
    existing = os.stat(path) if os.path.exists(path) else None
    if existing and not stat.S_ISREG(existing.st_mode):
        return _Output(_open(path, "wb", buffering=0), path)
    _require_replaceable(path, existing is not None)
    return _PathOutput(os.path.realpath(path), existing)


def _require_binary(output: Any) -> None:
    is_text = isinstance(getattr(output, "file", output), TextIOBase)
    if is_text or not callable(getattr(output, "write", None)):
        raise RequestError("output is neither a binary file object nor a path")
    if hasattr(output, "writable") and not output.writable():
        raise RequestError("output is not open for writing")


def _require_replaceable(path: str, exists: bool) -> None:
    """OSError if no file can be created beside a path, and replace it."""
    folder = os.path.dirname(os.path.realpath(path) if os.path.basename(path) else path)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", folder)
    if exists and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is read-only", path)
    if not os.access(folder, os.W_OK):
        text = "no file can be created in this folder"
        text += "; to write to the existing file, use -O - > OUT" * exists
        raise PermissionError(errno.EACCES, text, folder)


# ---- the verifier
#
# Checks what can be checked of the data while it passes, in order and in constant
# memory: format, MD5, the chain of BGZF blocks, the end marker, and that it is one file
# (promise 1). It decompresses only the beginnings of files.


class _Check:
    """Checks nothing: for data of a kind that is not known."""

    # The kind of data, and the name of the end marker.
    name = end = ""

    def feed(self, data: bytes) -> None:
        """Check the next bytes."""

    def is_ended(self) -> bool:
        return True


class _Bgzf(_Check):
    """Walks the chain of BGZF blocks by their sizes."""

    name, end = "BGZF", "BGZF EOF marker"

    def __init__(self) -> None:
        # The beginning of a block, kept until there is enough of it, and its position.
        self._rest = b""
        self._position = 0
        # How many bytes of the last block are still to come.
        self._skip = 0
        # Whether the last block is an EOF marker.
        self._is_after_end = False

    def feed(self, data: bytes) -> None:
        data, at = self._rest + data, self._skip
        while len(data) - at >= _BGZF_HEADER.size:
            beginning = data[at : at + _BEGINNING]
            magic, subfield, last = _BGZF_HEADER.unpack_from(beginning)
            if magic != _BGZF_MAGIC or subfield != _BGZF_USUAL:
                last = _odd_size(beginning, self._position + at)
            if len(beginning) < min(last + 1, _BEGINNING):
                break
            if self._is_after_end and _content(beginning).startswith(_BGZF_BEGINNINGS):
                raise _several_files(self._position + at)
            self._is_after_end = beginning.startswith(_BGZF_EOF)
            at += last + 1
        self._rest, self._skip = data[at:], max(0, at - len(data))
        self._position += len(data) - len(self._rest)

    def is_ended(self) -> bool:
        if self._rest or self._skip:
            text = "byte %d: the data ends inside a BGZF block"
            raise IntegrityError(text, self._position + len(self._rest))
        return self._is_after_end


def _odd_size(header: bytes, position: int) -> int:
    """BSIZE of a header with other subfields; if it is cut off, its end."""
    if header.startswith(_BGZF_MAGIC):
        at, stop = 12, 12 + int.from_bytes(header[10:12], "little")
        if stop > len(header):
            return stop
        while at + 6 <= stop:
            name, length, size = struct.unpack_from("<2sHH", header, at)
            if name == b"BC" and length == 2:
                return int(size)
            at += 4 + length
    text = "byte %d: the next BGZF block was expected, found %r"
    raise IntegrityError(text, position, header[:4])


class _Scan(_Check):
    """Searches for a new file after an end marker, and for that marker at the end."""

    def __init__(self, name: str, end: str, marker: bytes, magic: bytes) -> None:
        self.name, self.end = name, end
        self._marker = marker
        self._seam = marker + magic
        # The last bytes, and where they begin.
        self._tail = b""
        self._position = 0

    def feed(self, data: bytes) -> None:
        data = self._tail + data
        at = data.find(self._seam)
        if at >= 0:
            raise _several_files(self._position + at + len(self._marker))
        self._tail = data[-len(self._seam) :]
        self._position += len(data) - len(self._tail)

    def is_ended(self) -> bool:
        return self._tail.endswith(self._marker)


def _several_files(position: int) -> IntegrityError:
    text = "byte %d: another file begins here: the server sent several complete files "
    text += "one after the other; request one region at a time"
    return IntegrityError(text, position)


def _content(data: bytes) -> bytes:
    """The first bytes, decompressed if they are gzip."""
    with contextlib.suppress(zlib.error):
        return zlib.decompressobj(31).decompress(data, 16)
    return data


def _check_for(data_format: str, beginning: bytes) -> _Check:
    """The check for data that begins so; IntegrityError if that is another format."""
    is_bgzf = data_format != "CRAM" and beginning.startswith(_BGZF_MAGIC)
    magic, content = _MAGIC.get(data_format, b""), _content(beginning)
    # The first BGZF block may be shorter than the magic.
    is_short = is_bgzf and magic.startswith(content)
    if not is_short and not content.startswith(magic):
        text = "byte 0: %s data was expected, found %r"
        raise IntegrityError(text, data_format, content[:8])
    if is_bgzf:
        return _Bgzf()
    if beginning.startswith(b"CRAM\3"):
        return _Scan("CRAM", "CRAM EOF container", _CRAM_EOF, b"CRAM")
    if beginning.startswith(b"##"):
        return _Scan("VCF", "final line feed", b"\n", b"##fileformat=")
    return _Check()


class _Verifier:
    """Checks the data of a transfer."""

    def __init__(self, ticket: Ticket, options: _Options) -> None:
        requested = options.data_format or ""
        found = (ticket.format or "").upper()
        if requested and found not in ("", requested):
            text = "%s was requested, but the ticket is for %s"
            raise ProtocolError(text, requested, _printable(found, 40))
        self._needs_end = options.data_class is None and not _is_header_only(ticket)
        query = options.url if isinstance(options.url, str) else ""
        self._may_be_encrypted = bool(re.search("[?&]encryptionScheme=", query, re.I))
        self._is_encrypted = False
        self._format = requested or found
        self._check = _Check()
        # The first bytes, until they are enough to choose a check.
        self._beginning: Optional[bytes] = b"" if options.verify else None
        self._expected = (ticket.md5 or "").lower()
        self._md5 = _new_md5() if self._expected and options.verify else None

    def feed(self, data: bytes) -> None:
        if self._md5 is not None:
            self._md5.update(data)
        if self._beginning is None:
            self._check.feed(data)
        else:
            self._beginning += data
            if len(self._beginning) >= _BEGINNING:
                self._begin(self._beginning)

    def _begin(self, beginning: bytes) -> None:
        self._beginning = None
        self._is_encrypted = beginning.startswith(b"crypt4gh")
        if not self._is_encrypted:
            self._check = _check_for(self._format, beginning)
            self._check.feed(beginning)

    def finish(self, is_announced: bool) -> None:
        """Judge all data; its end marker may be missing if all sizes were announced."""
        if self._beginning is not None:
            self._begin(self._beginning)
        if not self._check.is_ended() and self._needs_end:
            self._miss_end(is_announced)
        if self._md5 is not None and self._md5.hexdigest() != self._expected:
            text = "the MD5 of the data is %s, but the ticket says %s"
            raise IntegrityError(text, self._md5.hexdigest(), self._expected)
        if self._is_encrypted and not self._may_be_encrypted:
            text = "the data is encrypted (Crypt4GH): its content was not checked"
            _log.warning(text)

    def _miss_end(self, is_announced: bool) -> None:
        text = "the %s at the end is missing"
        if not is_announced:
            text += ", so the data may be truncated; if the server never sends one, "
            text += "verify=False (--no-verify) accepts it"
            raise IntegrityError(text, self._check.end)
        text += "; the server announced all sizes, and kept to them"
        _log.warning(text, self._check.end)

    def verdict(self) -> str:
        found = [self._check.name] * bool(self._check.name)
        found += ["MD5"] * bool(self._md5)
        return "verified: " + ", ".join(found) if found else "not verified"


# ---- delivery
#
# Counts every byte on its way to the output, and refuses whatever is not exactly the
# next one: no fault of the sections before can be silent. Owns the verifier and the
# counts, writes checkpoints and resumes from them. A transfer whose object has changed
# begins again here, once. Promise 1.

# The block to begin with and, in the middle of one, the part that reads the rest of it.
_Beginning = Tuple[int, Optional[_Part]]


class _Delivery:
    """Takes the chunks of a transfer in order, verifies, writes and records them."""

    def __init__(self, transfer: _Transfer, output: Optional[_Output]) -> None:
        self._transfer = transfer
        self._blocks = transfer.blocks
        self._output = output
        self._path = output if isinstance(output, _PathOutput) else None
        self._verifier = _Verifier(transfer.ticket, transfer.options)
        # Bytes delivered; of these, the bytes that an earlier run has kept.
        self.position = self.resumed = 0
        # The byte that is due: a block and an offset in it.
        self._due = 0, 0
        # CRC-32 of all bytes before the block that is due, and of all bytes so far.
        self._crcs = 0, 0
        # Whether the sizes of all blocks before the one due were announced.
        self._is_announced = True
        # The block due at the last checkpoint.
        self._noted = 0
        self._total: Optional[int] = None

    def begin(self, is_resuming: bool) -> _Beginning:
        if self._path is None:
            return 0, None
        transfer, output = self._transfer, self._path
        identity = _identity(transfer.source, transfer.ticket)
        if is_resuming and output.size():
            try:
                return self._resume(output, self._usable(output.journal.load(identity)))
            except (LookupError, TypeError, ValueError) as reason:
                _log.warning("starting over: cannot resume %s: %s", output.path, reason)
            self._verifier = _Verifier(transfer.ticket, transfer.options)
        output.truncate(0)
        output.journal.begin(identity)
        return 0, None

    def take(self, index: int, offset: int, data: bytes) -> None:
        while self._due[0] < index:
            self._end_block()
        if (index, offset) != self._due:
            raise _out_of_order(index)
        self._verifier.feed(data)
        try:
            if self._output is not None:
                self._output.write(data)
        finally:
            # A full disk takes less than everything.
            taken = len(data) if self._output is None else self._output.taken
            self._count(data[:taken])
        if self._path is not None and self._path.journal.is_due(self.position):
            self._note(self._path.journal)
            self._path.flush()
        progress = self._transfer.options.progress
        if progress is not None:
            if self._total is None and all(b.size is not None for b in self._blocks):
                rest = sum(block.size or 0 for block in self._blocks[self._due[0] :])
                self._total = self.position - self._due[1] + rest
            progress(self.position, self._total)

    def finish(self) -> str:
        while self._due[0] < len(self._blocks):
            self._end_block()
        self._verifier.finish(self._is_announced)
        return self._verifier.verdict()

    def end(self, error: Optional[BaseException]) -> None:
        """Let the journal say what a later run can resume from."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                if isinstance(error, (IntegrityError, _ObjectChanged)):
                    self._path.journal.discard()
                else:
                    self._note(self._path.journal)

    def _count(self, data: bytes) -> None:
        index, offset = self._due
        self._due = index, offset + len(data)
        self.position += len(data)
        if self._path is not None:
            self._crcs = self._crcs[0], zlib.crc32(data, self._crcs[1])

    def _end_block(self) -> None:
        index, offset = self._due
        block = self._blocks[index]
        if block.size != offset:
            raise _out_of_order(index)
        self._is_announced = self._is_announced and block.is_announced
        self._due, self._crcs = (index + 1, 0), (self._crcs[1], self._crcs[1])

    # Checkpoints.

    def _note(self, journal: _Journal) -> None:
        index, offset = self._due
        if offset > 0 and self._blocks[index].size == offset:
            self._end_block()
        journal.add(self._checkpoint(), self.position)
        self._noted = self._due[0]

    def _checkpoint(self) -> _Checkpoint:
        """Here, if the rest of the block can be requested; else at its beginning."""
        (index, offset), (before, crc) = self._due, self._crcs
        size, position, announced = None, self.position, self._is_announced
        if offset > 0:
            block = self._blocks[index]
            size = block.size
            if block.data is not None or block.mode == _OWN or size is None:
                position, offset, size, crc = position - offset, 0, None, before
            else:
                announced = announced and block.is_announced
        remote = [b for b in self._blocks[self._noted : index + 1] if b.data is None]
        known = {str(block.object.number): block.object.record() for block in remote}
        # The ticket of a later run may share objects otherwise.
        known.update({str(b.index): b.object.record() for b in remote[-1:]})
        return _Checkpoint(index, offset, size, position, before, crc, announced, known)

    def _usable(self, points: List[_Checkpoint]) -> List[_Checkpoint]:
        """The checkpoints that the ticket has, with the same bytes from there on."""
        inline = [block.index for block in self._blocks if block.data is not None]
        # Crypt4GH headers are encrypted anew for each ticket.
        first = inline[-1] + 1 if _is_crypt4gh(self._transfer.ticket) else 0
        usable = [p for p in points if p.block >= first and self._is_usable(p)]
        if not usable:
            raise ValueError("the ticket has none of its checkpoints")
        return usable

    def _is_usable(self, point: _Checkpoint) -> bool:
        if point.offset == 0:
            return point.block <= len(self._blocks)
        block, size = self._blocks[point.block], point.size or 0
        return block.data is None and point.offset < size <= (block.range_size or size)

    def _resume(self, output: _PathOutput, points: List[_Checkpoint]) -> _Beginning:
        """Resume from the last checkpoint that the kept bytes prove, or ValueError."""
        while points:
            count, crc = self._prove(output, points)
            if count == len(points):
                break
            points = points[:count]
        else:
            raise ValueError("it is damaged")
        point = points[-1]
        objects = dict(item for one in points for item in one.objects.items())
        output.journal.add(point._replace(objects=objects), point.position)
        output.truncate(point.position)
        for number, record in objects.items():
            self._blocks[int(number)].object.recall(record)
        self.position = self.resumed = point.position
        self._due = point.block, point.offset
        self._crcs = point.crc_before, point.crc
        self._is_announced = point.announced
        self._noted = point.block
        text, words = "resuming %s at byte %d", {"always": True}
        _log.info(text, output.path, point.position, extra=words)
        if point.offset == 0:
            return point.block, None
        block = self._blocks[point.block]
        block.learn_size(point.size)
        if point.announced:
            block.announce(is_divisible=False)
        part = _Part(self._transfer, block, 0, None)
        part.resume(point.offset, crc)
        return point.block + 1, part

    def _prove(self, output: _PathOutput, points: List[_Checkpoint]) -> Tuple[int, int]:
        """How many of the checkpoints the kept bytes prove, and the CRC-32 of what is
        kept of the last one's block."""
        self._verifier = _Verifier(self._transfer.ticket, self._transfer.options)
        index, begin, at, before, crc, block_crc = -1, 0, 0, 0, 0, 0
        for count, point in enumerate(points):
            start, stop = point.position - point.offset, point.position
            with contextlib.suppress(IntegrityError):
                if point.block != index:
                    at, crc, _ = self._reread(output, at, start, crc, 0)
                    index, begin, before, block_crc = point.block, at, crc, 0
                at, crc, block_crc = self._reread(output, at, stop, crc, block_crc)
            found = begin, at, before, crc
            if found != (start, stop, point.crc_before, point.crc):
                return count, 0
        return len(points), block_crc

    def _reread(
        self, output: _PathOutput, at: int, stop: int, crc: int, block_crc: int
    ) -> Tuple[int, int, int]:
        for data in output.kept(at, stop):
            self._verifier.feed(data)
            crc, block_crc = zlib.crc32(data, crc), zlib.crc32(data, block_crc)
        return min(stop, output.size()), crc, block_crc


def _out_of_order(index: int) -> HtsgetException:
    return HtsgetException("data block %d came out of order: this is a bug", index + 1)


class _Download:
    """A transfer from its ticket to the last verified byte. It begins again, once, if
    the object behind a URL has changed and the output can be truncated."""

    def __init__(
        self, source: _Source, options: _Options, output: Optional[_Output]
    ) -> None:
        self._options = options
        self._output = output
        self._begun = time.monotonic()
        self._verdict = ""
        self._window: Optional[_Window] = None
        self._transfer = _Transfer(source, options)
        try:
            self._delivery = _Delivery(self._transfer, output)
            _warn_of_gaps(self._transfer.ticket, options)
        except BaseException:
            self.close()
            raise

    def chunks(self) -> Iterator[bytes]:
        for is_last in (False, True):
            try:
                yield from self._deliver(self._options.resume and not is_last)
                return
            except _ObjectChanged as changed:
                reason = str(changed)
            output, before = self._output, self._transfer
            is_final = is_last or isinstance(before.source, Ticket)
            if output is None or not output.is_seekable() or is_final:
                raise RetryableError(reason)
            _log.warning("%s; fetching everything again", reason)
            self._transfer = _Transfer(before.source, self._options)
            is_reduced = _is_reduced(self._transfer.ticket)
            _require_unreduced(_is_reduced(before.ticket), is_reduced)
            output.truncate(0)
            self._delivery = _Delivery(self._transfer, output)

    def _deliver(self, is_resuming: bool) -> Iterator[bytes]:
        failure: Optional[BaseException] = None
        transfer, delivery = self._transfer, self._delivery
        self._window = window = _Window(transfer, *delivery.begin(is_resuming))
        try:
            for chunk in window.chunks():
                delivery.take(*chunk)
                yield chunk[2]
            self._verdict = delivery.finish()
        except BaseException as error:
            failure = error
            is_in_doubt = any(block.is_in_doubt for block in transfer.blocks)
            if isinstance(error, IntegrityError) and is_in_doubt:
                text = "%s; or the server ignores the Range header"
                raise IntegrityError(text, error) from None
            raise
        finally:
            window.close()
            delivery.end(failure)

    @property
    def position(self) -> int:
        return self._delivery.position

    def summary(self) -> str:
        passed = max(time.monotonic() - self._begun, 1e-3)
        rate = _size((self.position - self._delivery.resumed) / passed)
        done = _size(self.position), passed, rate, self._verdict
        return "%s in %.1f s (%s/s); %s" % done

    def close(self) -> None:
        self._transfer.transport.stop()
        if self._window is not None:
            self._window.close()


# ---- progress meter and messages
#
# The progress line, and messages on standard error. Failures to write them never
# matter. Owns nothing but the meter's past.


def _size(count: float) -> str:
    if count < 1024:
        return "%d bytes" % count
    power = min((int(count).bit_length() - 1) // 10, 4)
    return "%.1f %siB" % (count / 1024**power, " KMGT"[power])


class _Meter:
    """A `progress` function: a line that is overwritten, or one now and then."""

    def __init__(self, stream: TextIO, name: str, is_terminal: bool) -> None:
        self.is_terminal = is_terminal
        self._stream = stream
        self._name = os.path.basename(name) or name
        self._interval = _METER_TERMINAL if is_terminal else _METER_LOG
        # (time, bytes) of the last seconds, the newest one last.
        self._past: Deque[Tuple[float, int]] = collections.deque()
        self._is_shown = False

    def __call__(self, so_far: int, total: Optional[int]) -> None:
        now = time.monotonic()
        if self._past and now < self._past[-1][0] + self._interval:
            return
        self._past.append((now, so_far))
        while len(self._past) > 2 and self._past[1][0] < now - _METER_SPAN:
            self._past.popleft()
        if len(self._past) > 1:
            _write(self._stream, self._line(so_far, total), self.is_terminal)
            self._is_shown = self.is_terminal

    def _line(self, so_far: int, total: Optional[int]) -> str:
        (then, before), (now, _) = self._past[0], self._past[-1]
        rate = max(so_far - before, 0) / max(now - then, 1e-3)
        percent = left = ""
        if total:
            percent = " of %s, %d %%" % (_size(total), 100 * so_far // total)
            if rate > 0:
                seconds = int((total - so_far) / rate)
                left = ", %s left" % datetime.timedelta(seconds=seconds)
        done = self._name, _size(so_far), percent, _size(rate), left
        return "%s: %s%s, %s/s%s" % done

    def clear(self) -> None:
        if self._is_shown:
            _write(self._stream, "", is_overwritten=True)
        self._is_shown = False


def _write(stream: Optional[TextIO], text: str, is_overwritten: bool = False) -> None:
    """Write a message as one line; the next one may overwrite it."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if is_overwritten:
        width = shutil.get_terminal_size().columns - 1
        text = text[:width].ljust(width)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.write(text + ("\r" if is_overwritten else "\n"))  # type: ignore
        stream.flush()  # type: ignore


# ---- public functions
#
# What callers use: each checks its options and connects the sections above.


def get(
    url: Union[str, Ticket],
    output: Union["_Writable", str, "os.PathLike[str]"],
    reference_name: Optional[str] = None,
    reference_md5: Optional[str] = None,
    start: Optional[int] = None,
    end: Optional[int] = None,
    fields: Union[str, Iterable[str], None] = None,
    tags: Union[str, Iterable[str], None] = None,
    notags: Union[str, Iterable[str], None] = None,
    data_format: Optional[str] = None,
    max_retries: int = 5,
    retry_wait: float = 5,
    timeout: Union[float, Tuple[float, float], None] = 120,
    bearer_token: Union[str, Callable[[], Optional[str]], None] = None,
    headers: Optional[Mapping[str, Optional[str]]] = None,
    *,
    data_class: Optional[str] = None,
    regions: Optional[Iterable[Tuple[Any, ...]]] = None,
    connections: int = 4,
    verify: bool = True,
    resume: bool = True,
    progress: Optional[Callable[[int, Optional[int]], Any]] = None,
    ssl_context: Optional[ssl.SSLContext] = None,
) -> None:
    """Fetch data from an htsget server and write it to `output`.

    What is requested (spec: "Request parameters" and "POST request"):

    url: str, the address of the data, such as "https://example.org/reads/NA12878". Its
        own query is kept, except for parameters that are given here, too; a "#" is part
        of the id. Or a `Ticket`, which takes none of the options of this paragraph.
    reference_name: str, a reference such as "chr1"; "*" for unplaced unmapped reads.
    reference_md5: str, 32 hexadecimal digits, the MD5 of the reference sequence.
    start, end: int, 0-based half-open positions on the reference, below 2**32.
    fields, tags, notags: a comma-separated str or an iterable of str: the SAM fields
        and tags to include, the tags to leave out; tags="" requests no tags.
    data_format: str, "BAM", "CRAM", "VCF" or "BCF".
    data_class: "header" for the header only; requires `data_format`.
    regions: an iterable of `Region` or tuples (name, start, end), instead of
        `reference_name`, `start` and `end`.
    bearer_token: str, sent to the ticket server only; or a function that returns it,
        called before every ticket request. Over plain http, sent only to this machine
        without a proxy, unless HTS_ALLOW_UNENCRYPTED_AUTHORIZATION_HEADER is set to
        "I understand the risks".
    headers: mapping of str to str, sent to the ticket server only (but a User-Agent is
        sent with every request); None is skipped. With neither a token nor an
        Authorization, .netrc is used.

    Where the data goes and how it is fetched:

    output: a binary file object, written from its current position on, or a path. A
        path is written as PATH.part and renamed when the data is complete.
    max_retries: int, how often in a row a part is retried without progress (64 KiB of
        new data, or its end); negative for no limit.
    retry_wait: seconds before the first retry; doubled for each further one up to
        60 s, with a little jitter.
    timeout: seconds to wait for data (of a tuple, the larger); None for no limit.
    connections: int, the most connections open at the same time; 1 is strictly
        sequential, in the caller's own thread.
    verify: bool, check MD5, format and end of the data.
    resume: bool, continue what an earlier run left at PATH.part.
    progress: function called with the bytes so far and in all (None if unknown).
    ssl_context: ssl.SSLContext for https; its option 0x80 is cleared.

    Raises RequestError (also a ValueError) before anything is sent for arguments that
    the protocol forbids, ClientError when the server refuses, ProtocolError when it
    breaks the protocol, IntegrityError when the data is wrong, RetryableError when
    retries are used up; and OSError when the output fails.
    """
    options = _checked(locals())
    source = _source(options)
    with contextlib.closing(_open_output(output)) as target:
        with contextlib.closing(_Download(source, options, target)) as download:
            for _ in download.chunks():
                pass
        target.commit(download.position)
    _log.info("%s: %s", target.name, download.summary(), extra={"on_terminal": True})


def open(url: Union[str, Ticket], **options: Any) -> BufferedReader:
    """Request data and return it as a readable binary stream, while it is fetched.

    The options are those of `get`, without `output`, and so are the exceptions, which
    any read may raise, and which later reads raise again. A read that returns b"" means
    that the data is complete and verified. Closing the stream, or leaving it as a
    context manager, ends the transfer, even while another thread reads.
    """
    known = _options_of_get(url, options)
    download = _Download(_source(known), known, None)
    return _BufferedStream(_Stream(download), _CHUNK)


def get_ticket(url: str, **options: Any) -> Ticket:
    """Request a ticket and return it (spec: "Response JSON fields").

    The options are those of `get`, without `output`, and so are the exceptions. `get`
    takes the ticket in place of a URL.
    """
    known = _options_of_get(url, options)
    return _parse_ticket(_request(_TicketRequest(known), known))


def service_info(url: str, **options: Any) -> Dict[str, Any]:
    """What an htsget server says about itself (spec: "GET /reads/service-info").

    url: str, an address of the server: its service-info, its reads or variants, or
        one of these. The options are those of `get`, and so are the exceptions;
        only those for the connection matter. Returns the JSON object.
    """
    known = _options_of_get(url, options)
    parts = urllib.parse.urlsplit(_checked_url(url))
    path = re.sub(r"(.*/(reads|variants))(/.*)?\Z", r"\1/service-info", parts.path)
    if not path.endswith("/service-info"):
        path = path.rstrip("/") + "/service-info"
    address = parts._replace(path=path).geturl()
    login = {"bearer_token": known.bearer_token, "headers": known.headers}
    request = _TicketRequest(_options_of_get(address, login))
    return _parse_json(_request(request, known), "the service-info")


# A name and positions; a name in braces may have colons.
_REGION = re.compile(
    r"(?:\{(?P<braced>[^{}]+)\}|(?P<plain>[^{}\s]+?))"
    r"(?::(?=.*[0-9])(?P<first>[0-9][0-9,]{0,24})?"
    r"(?:-(?P<last>[0-9][0-9,]{0,24})?)?)?\Z"
)


def parse_region(text: str) -> Region:
    """The `Region` for samtools' notation (str), which is 1-based and inclusive.

    "chr1", "chr1:100" (from there on), "chr1:1,000-2,000", "*", and for a name that
    has colons "{HLA:A*01:01}:1-5". Raises RequestError.
    """
    match, shown = _REGION.match(text), _printable(text, 60)
    advice = "; write {NAME} or {NAME}:1-100 for a name with colons"
    plain = match.group("plain") if match else text
    numbers = match.group("first", "last") if match else (None, None)
    first, last = (int(n.replace(",", "")) if n else None for n in numbers)
    if (first, last) == (None, None):
        # Not a name, but positions in another notation.
        odd = plain and re.search(r":([^:]*-[^:]*|[0-9][0-9,.]*[a-zA-Z]*)?\Z", plain)
        if match is None or odd:
            text = "%r is not a region such as chr1:1,000-2,000%s"
            raise RequestError(text, shown, advice)
    elif first == 0 or (last is not None and last < (first or 1)):
        raise RequestError("the region %r ends before it begins, or begins at 0", shown)
    elif plain and re.search("[:*]", plain):
        _log.warning("reading %s as a position on %s%s", shown, plain, advice)
    name = plain or match.group("braced")  # type: ignore
    return Region(name, None if first is None else first - 1, last)


def _options_of_get(url: Any, given: Dict[str, Any]) -> _Options:
    import inspect

    bound = inspect.signature(get).bind(url, None, **given)
    bound.apply_defaults()
    return _checked(bound.arguments)


def _source(options: _Options) -> _Source:
    if not isinstance(options.url, Ticket):
        return _TicketRequest(options)
    _require_no_request(vars(options))
    _check_ticket(options.url)
    return options.url


def _require_no_request(given: Mapping[str, Any]) -> None:
    names = [option.name for option in _OPTIONS if option.group == "request"]
    wrong = [name for name in names if given.get(name) is not None]
    if wrong:
        raise RequestError("%s cannot be combined with a ticket", ", ".join(wrong))


def _request(request: _TicketRequest, options: _Options) -> bytearray:
    transport = _Transport(options, request.user_agent)
    try:
        return _request_json(transport, request, options)
    finally:
        transport.stop()


class _Stream(RawIOBase):
    """The data of a transfer, to be read."""

    def __init__(self, download: _Download) -> None:
        super().__init__()
        self._download = download
        self._chunks = download.chunks()
        self._left = memoryview(b"")
        self._failure: Optional[BaseException] = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes; 0 at the end. Later reads raise an error again."""
        try:
            while self._failure is None and not self._left:
                self._left = memoryview(next(self._chunks))
        except StopIteration:
            return 0
        except _Stopped:
            self._failure = ValueError("I/O operation on closed file")
        except BaseException as error:
            self._failure = error
        if self._failure is not None:
            raise self._failure
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        self._download.close()
        super().close()


class _BufferedStream(BufferedReader):
    """A buffered `_Stream` that can be closed while another thread reads."""

    def close(self) -> None:
        # BufferedReader itself would first wait for that thread.
        self.raw.close()
        super().close()


# ---- command line
#
# Arguments in; an exit status and one line per message out. Standard output carries the
# data and nothing else. Owns the process: its signals and its standard streams. For
# promise 3, hints name what to do, and are given only where they are true.

_Args = argparse.Namespace

# Signals that end a run in order, and what the message says then.
_SIGNALS = {1: "hung up", 2: "interrupted", 15: "terminated"}

# What to do about a refusal, by status and what was refused.
_HINTS = {
    (401, "ticket"): "the server needs a login: -b or --bearer-token-file",
    (401, "ticket with login"): "the server does not accept this login",
    (403, "ticket"): "if a login is needed, give it with -b or --bearer-token-file",
    (403, "ticket with login"): "this login may not read this",
    (407, "proxy"): "the proxy needs a login: write it in the proxy's URL",
    (407, "proxy with login"): "the proxy does not accept the login in its URL",
}


class _Messages(logging.Handler):
    """Writes messages to standard error, past the progress line."""

    def __init__(self, lowest: int, meter: Optional[_Meter]) -> None:
        super().__init__()
        self._lowest = lowest
        self._meter = meter

    def filter(self, record: logging.LogRecord) -> bool:
        is_on_terminal = self._meter is not None and self._meter.is_terminal
        is_raised = hasattr(record, "on_terminal") and is_on_terminal
        is_raised = is_raised or hasattr(record, "always")
        return (logging.WARNING if is_raised else record.levelno) >= self._lowest

    def emit(self, record: logging.LogRecord) -> None:
        if self._meter is not None:
            self._meter.clear()
        _write(sys.stderr, "htsget: " + record.getMessage())


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line with `argv` (default: sys.argv[1:]); return its exit status.

    examples:
      htsget https://example.org/reads/NA12878 -O NA12878.bam
      htsget https://example.org/reads/NA12878 --region chr1:1,000-2,000 -O slice.bam
      htsget https://example.org/variants/1000g -f VCF -r chr22 | zcat | less

    environment:
      http_proxy https_proxy ALL_PROXY no_proxy   proxies, and what to reach without
      SSL_CERT_FILE SSL_CERT_DIR                  CA certificates, not the system's
      REQUESTS_CA_BUNDLE CURL_CA_BUNDLE           more CA certificates
      HTS_AUTH_LOCATION                           file with the token; else ~/.netrc
      NETRC                                       file instead of ~/.netrc
      HTS_ALLOW_UNENCRYPTED_AUTHORIZATION_HEADER  "I understand the risks": tokens over
                                                  http

    exit status:
      0 done; 1 refused or wrong; 2 usage error; 75 gave up, rerun to resume;
      129, 130, 143 hang-up, interrupted, terminated; 141 broken pipe
    """
    status, message = _run(sys.argv[1:] if argv is None else argv)
    if message:
        _write(sys.stderr, "htsget: error: " + message)
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    return status


def _flush(stream: Any) -> None:
    """Flush a standard stream, or discard what it holds: otherwise Python would try
    again at exit, and change the exit status to 120."""
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(argv: List[str]) -> Tuple[int, str]:
    signals: List[int] = []
    args = _Args(url="", output=None, resume=None)
    try:
        args = _parse_arguments(argv)
        with _ended_by_signals(signals), _shown_messages(args) as meter:
            _act(args, meter)
    except SystemExit:
        # After --help and --version.
        pass
    except BaseException as error:
        return _outcome(error, args, signals)
    return 0, ""


@contextlib.contextmanager
def _ended_by_signals(received: List[int]) -> Iterator[None]:
    """Let signals end what runs here cleanly, and record them: the exception may
    surface as another one, such as a RuntimeError of Condition.wait()."""

    def end(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    known = [s for s in signal.Signals if s in _SIGNALS and is_main]
    # What nohup ignores stays ignored.
    heeded = [s for s in known if signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _shown_messages(args: _Args) -> Iterator[Optional[_Meter]]:
    """Show log messages; yield the progress meter if it is wanted."""
    meter = None
    is_terminal = _is_terminal(sys.stderr)
    is_wanted = is_terminal if args.show_progress is None else args.show_progress
    if is_wanted and not args.quiet:
        name = "standard output" if args.output in (None, "-") else args.output
        meter = _Meter(sys.stderr, name, is_terminal)
    lowest = max(logging.WARNING - 10 * args.verbose, logging.DEBUG)
    lowest = logging.ERROR if args.quiet else lowest
    handler, before = _Messages(lowest, meter), _log.level
    _log.setLevel(min(lowest, logging.INFO))
    _log.addHandler(handler)
    try:
        yield meter
    finally:
        _log.removeHandler(handler)
        _log.setLevel(before)
        if meter is not None:
            meter.clear()


def _is_terminal(stream: Optional[TextIO]) -> bool:
    return stream is not None and stream.isatty()


def _outcome(error: BaseException, args: _Args, signals: List[int]) -> Tuple[int, str]:
    text = re.sub(r"\A\[Errno \d+\] ", "", str(error))
    again = "the same command" if args.resume is None else "without --no-resume"
    kept = _kept(args, ": rerun %s to resume" % again)
    if signals or isinstance(error, KeyboardInterrupt):
        number = signals[0] if signals else signal.SIGINT
        return 128 + number, _SIGNALS[number] + kept
    if isinstance(error, BrokenPipeError):
        return 141, ""
    if isinstance(error, RequestError):
        # `get` and the command line have different names for an option.
        pattern = r"(?<!\S)(%s)(?=[,:;]?(\s|\Z))" % "|".join(_FLAGS)
        return 2, re.sub(pattern, lambda match: _FLAGS[match.group(1)], text)
    is_passing = isinstance(error, (RetryableError, BlockingIOError))
    if is_passing or getattr(error, "errno", None) in _DISK_FULL:
        return 75, text + (kept or "; a rerun may help")
    if isinstance(error, (HtsgetException, OSError)):
        return 1, text + _hint(error, args)
    raise error


def _kept(args: _Args, how: str) -> str:
    part = _part_path(os.path.realpath(args.output or "-"))
    with contextlib.suppress(OSError), _open(part + ".json" * bool(how), "rb") as file:
        size = os.stat(part).st_size
        # Without a checkpoint, nothing can be resumed.
        is_kept = size > 0 and (not how or file.read().count(b"\n") > 1)
        return "; %s kept in %s%s" % (_size(size), part, how) if is_kept else ""
    return ""


def _hint(error: Exception, args: _Args) -> str:
    kind, status = getattr(error, "_kind", ""), getattr(error, "status", 0)
    hint = ""
    if (status, kind) in _HINTS:
        hint = "; " + _HINTS[status, kind]
    elif kind == "data block":
        if not _is_url(args.url):
            hint = "; the URLs of the ticket may have expired: get a new ticket"
    elif _is_url(args.url) and not args.service_info:
        path = urllib.parse.urlsplit(args.url).path
        if re.fullmatch("/*((reads|variants)/*)?", path):
            hint = "; the URL needs /reads/ID or /variants/ID"
        elif status == 404:
            hint = "; check the id, and the format and reference name if given"
    if isinstance(error, OSError):
        return hint
    has_expired = status in (401, 403)
    return hint + _kept(args, ": rerun with a valid login" if has_expired else "")


def _act(args: _Args, meter: Optional[_Meter]) -> None:
    is_ticket = not args.service_info and not _is_url(args.url)
    source: Any = _read_ticket(args) if is_ticket else args.url
    options = _options(args)
    if args.service_info:
        _print(json.dumps(service_info(source, **options), indent=2))
    elif args.dry_run:
        _print(_described(source if is_ticket else get_ticket(source, **options)))
    else:
        get(source, _output(args), progress=meter, **options)


def _print(text: str) -> None:
    try:
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "it is closed"
        raise HtsgetException("cannot write standard output: %s", reason) from None


def _output(args: _Args) -> Union[str, FileIO]:
    if args.output == "":
        raise RequestError("the name after -O is empty; give -O PATH or -O -")
    if args.output not in (None, "-"):
        return str(args.output)
    if sys.stdout is None:
        raise RequestError("stdout is closed; give -O PATH")
    if args.output is None and _is_terminal(sys.stdout):
        raise RequestError("not writing data to a terminal; give -O PATH or -O -")
    return FileIO(sys.stdout.fileno(), "w", closefd=False)


def _is_url(text: str) -> bool:
    return re.match("[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def _read_ticket(args: _Args) -> Ticket:
    _require_no_request(vars(args))
    if args.url != "-" and not os.path.exists(args.url):
        text = "%s is not a file with a ticket, nor a URL: begin with https://"
        raise RequestError(text, _printable(args.url.partition("?")[0], 100))
    return _parse_ticket(bytearray(_read_text(args.url).encode("utf-8")))


def _read_text(path: str) -> str:
    """The content of a file, or of standard input for "-"; gzip is decompressed."""
    import gzip

    try:
        with _open(path, "rb") if path != "-" else sys.stdin.buffer as file:
            raw = file.read()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        return str(raw.decode("utf-8-sig"))
    except (OSError, EOFError, ValueError, AttributeError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "it is closed, or not text"
        raise RequestError("cannot read %s: %s", path, reason) from None


def _described(ticket: Ticket) -> str:
    sizes = [_Block(index, block, {}).size for index, block in enumerate(ticket.blocks)]
    size = "not known" if None in sizes else "%d bytes" % sum(n or 0 for n in sizes)
    remote = [block.url for block in ticket.blocks if not _is_inline(block)]
    hosts = sorted({_origin(url)[1] for url in remote})
    lines = [
        "format: " + _printable(ticket.format or "not given", 40),
        "blocks: %d (%d inline)" % (len(sizes), len(sizes) - len(remote)),
        "size:   " + size,
        "MD5:    " + (ticket.md5 or "not given"),
        "hosts:  " + (", ".join(hosts) or "none"),
    ]
    return "\n".join(lines)


def _options(args: _Args) -> Dict[str, Any]:
    known = set(get.__annotations__) - {"url", "output"}
    given = {name: value for name, value in vars(args).items() if value is not None}
    options = {name: given[name] for name in known & set(given)}
    if args.headers:
        options["headers"] = _parse_headers(args.headers)
    if args.cacert:
        options["ssl_context"] = _default_ssl_context(args.cacert)
    variable = "HTS_AUTH_LOCATION" if _is_url(args.url) else ""
    path = args.bearer_token_file or os.environ.get(variable)
    if args.bearer_token is None and path:
        # Read again for each ticket request; a pipe gives it once.
        read = functools.partial(_read_token, path)
        options["bearer_token"] = read if os.path.isfile(path) else read()
    if re.search(r".:[0-9,]+-[0-9,]*\Z", args.reference_name or ""):
        raise RequestError("-r takes a name only; give a region with --region")
    regions = list(map(parse_region, args.regions or []))
    if args.regions_file:
        regions += _read_bed(args.regions_file)
    options["regions"] = regions or None
    if len(regions) == 1 and not {"reference_name", "start", "end"} & set(given):
        options.update(regions[0]._asdict(), regions=None)
    return options


def _parse_headers(values: List[str]) -> Dict[str, str]:
    """The headers of -H: "Name: value", or a JSON object as htsget 0.2.6 takes it."""
    headers: Dict[str, str] = {}
    try:
        for text in filter(None, map(str.strip, values)):
            if text.startswith("{"):
                headers.update(json.loads(text))
            else:
                name, value = re.split(r"\s*:\s*", text, maxsplit=1)
                headers[name] = value
    except (RecursionError, ValueError):
        raise RequestError("-H takes 'Name: value' or a JSON object") from None
    return headers


def _read_token(path: str) -> str:
    """A token from a file: text, or JSON with `access_token`, as htslib reads it."""
    text = _read_text(path).strip()
    with contextlib.suppress(ValueError, KeyError):
        token = json.loads(text)["access_token"] if text.startswith("{") else text
        if isinstance(token, str) and token.strip():
            return token
    text = "no token in %s; it must hold the token, or JSON with access_token"
    raise RequestError(text, path)


def _read_bed(path: str) -> List[Region]:
    text = "%s, line %d: columns must be a name (not *), integers START <= END < 2**32"
    regions = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if line.strip() and not re.match(r"#|(track|browser)(\s|\Z)", line):
            try:
                name, start, end = line.split("\t" if "\t" in line else None)[:3]
                regions.append(Region(name, _position(start), _position(end)))
                if name == "*" or int(start) > int(end):
                    raise ValueError
            except ValueError:
                raise RequestError(text, path, number) from None
    if not regions:
        raise RequestError("there is no region in %s", path)
    return regions


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and never show what may be a token."""

    def error(self, message: str) -> Any:
        if "expected one argument" in message:
            message += "; if it begins with '-', put '=' before it, as in -b=-TOKEN"
        message = re.sub("(explicit argument|option:) .*", r"\1 (not shown)", message)
        raise RequestError("%s (see htsget --help)", message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help and version; argparse ignores errors here."""
        _print(message)


_FLAGS = {option.name: option.flags for option in _OPTIONS}


def _parse_arguments(argv: List[str]) -> _Args:
    parser = _Parser(
        prog="htsget",
        description="Fetch slices of BAM, CRAM, VCF and BCF files from htsget servers.",
        # Where Python keeps no docstrings, there is none.
        epilog=textwrap.dedent((main.__doc__ or "").partition("\n\n")[2]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Forbids -vv, too, before Python 3.8.
        allow_abbrev=sys.version_info < (3, 8),
    )
    text = "address of the data; or a file with a ticket, - for standard input"
    parser.add_argument("url", metavar="URL", help=text)
    version = "%(prog)s " + __version__
    parser.add_argument("-V", "--version", action="version", version=version)
    groups = {name: parser.add_argument_group(name) for name in _OPTION_TABLE}
    for option in _OPTIONS:
        settings: Dict[str, Any] = {"action": "store", "metavar": option.value}
        if option.name == "verbose":
            settings = {"action": "count", "default": 0}
        elif option.value == "-":
            is_on = not option.flags.startswith("--no-")
            settings = {"action": "store_const", "const": is_on}
        elif "repeatable" in option.help:
            settings["action"] = "append"
        settings.update(dest=option.name, help=option.help)
        groups[option.group].add_argument(*option.flags.split("/"), **settings)
    args, others = parser.parse_known_args(argv)
    for other in others:
        if not other.startswith("-"):
            parser.error("more than one URL; give the file to write with -O NAME")
        name = other.partition("=")[0] if other.startswith("--") else other[:2]
        parser.error("unrecognized arguments: %s" % name)
    return args


# The names of the htsget package on PyPI (0.2.6), where this file replaces it.


def htsget_main() -> None:
    """Run the command line and exit, as htsget 0.2.6 does."""
    sys.exit(main())


if __name__ == "htsget":
    exceptions = io = protocol = cli = sys.modules[__name__]
    for _name in ("exceptions", "io", "protocol", "cli"):
        sys.modules["htsget." + _name] = sys.modules[__name__]

if __name__ == "__main__":
    sys.exit(main())
