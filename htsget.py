#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The htsget.py developers
"""Fetch slices of BAM, CRAM, VCF and BCF files over the GA4GH htsget protocol.

An htsget server answers a request with a ticket: a JSON list of data blocks, each a
URL (a byte range of a file, or a ``data:`` URI) with the headers it needs. The data
is the concatenation of the blocks. This module requests the ticket, fetches the
blocks and joins them. It is one file, needs only the standard library, and runs on
CPython 3.6 and later and on PyPy.

Library use:

    import htsget

    # To a path: "NA12878.bam" appears when, and only when, it is complete.
    htsget.get("https://example.org/reads/NA12878", "NA12878.bam",
               reference_name="chr1", start=0, end=100000, data_format="BAM")

    # To any binary file object.
    with open("NA12878.bam", "wb") as output:
        htsget.get("https://example.org/reads/NA12878", output)

    # As a stream that is read while the data arrives.
    with gzip.open(htsget.open("https://example.org/variants/x"), "rt") as vcf:
        for line in vcf:
            ...

    # The ticket alone, and what the server says about itself.
    ticket = htsget.get_ticket("https://example.org/reads/NA12878")
    info = htsget.service_info("https://example.org/reads")

Command line:

    python -m htsget https://example.org/reads/NA12878 -O NA12878.bam
    python3 htsget.py --help

When ``get`` returns, the output is exactly the concatenation of the ticket's data
blocks. Whatever goes wrong on the way from the servers is an `HtsgetException`;
errors of the output (disk full, broken pipe) propagate as plain `OSError`.
"""

import argparse
import base64
import collections
import contextlib
import email.utils
import errno
import functools
import hashlib
import http.client
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
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
import zlib
from io import BufferedReader, BytesIO, FileIO, IOBase, RawIOBase, TextIOBase
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
    TypeVar,
    Union,
)

__version__ = "2.0.0"

# Without `open`: a star import must not replace the built-in.
__all__ = [
    "ClientError",
    "ContentLengthMismatch",
    "DataBlock",
    "HtsgetException",
    "IntegrityError",
    "ProtocolError",
    "Region",
    "RequestError",
    "RetryableError",
    "RetryableIOError",
    "Ticket",
    "get",
    "get_ticket",
    "main",
    "parse_region",
    "service_info",
]

_log = logging.getLogger(__name__ if __name__ != "__main__" else "htsget")


# ---- constants

# The media type of the protocol version spoken here (spec: "Protocol versioning").
# Servers that know only an older one must not answer 406.
_ACCEPT = "application/vnd.ga4gh.htsget.v1.3.0+json, */*;q=0.8"

# Bytes requested from a socket at once: file systems take large writes with less work
# for each byte. Larger ones yet are no faster.
_CHUNK = 1 << 19

# The same for what begins with a head: a small block comes along with it.
_FIRST_READ = 1 << 16

# Per-chunk overhead of buffering, in bytes.
_CHUNK_COST = 250

# A ticket with inline data may be large; endless JSON must not fill the memory.
_TICKET_LIMIT = 64 << 20

# Bytes of an error body that are read, and characters of it that are shown.
_ERROR_LIMIT = 1 << 16
_ERROR_SHOWN = 300

# TLS delivers bulk data in full records; join up to this many per chunk.
_TLS_RECORD = 1 << 14
_TLS_RECORDS = 8

# How often an answer of another version of an object is asked for again at once:
# behind a balancer the next replica may be the one that served the first part.
_REPLICA_TRIES = 12

# Mirrors set the same file's date a little apart, in seconds.
_DATE_TOLERANCE = 5

# Buffer for parts read ahead, per connection and in all, in bytes.
_WINDOW_EACH = 4 << 20
_WINDOW_MOST = 32 << 20

# The most parts under way at once: a piece of the window is then worth a request.
_PARTS_MOST = 128

# CPU sampling interval in seconds; the share of one core below which the transfer
# mostly waits, so that more connections pay, and above which they do not; and the
# number of samples in a row that must agree before going back to one connection.
_SAMPLE = 0.025
_IDLE = 0.25
_BUSY = 0.9
_BUSY_SAMPLES = 10

# Seconds without data after which idle connections are closed, and full parts give up
# theirs, in case the server handles only so many connections at a time.
_STARVED = 0.5
_LET_GO = 3.0

# Seconds to keep to fewer connections after a server has refused one of several.
_CROWDED = 30.0

# Progress meter: seconds between updates on a terminal and elsewhere; seconds over
# which the rate is averaged.
_METER_TERMINAL = 0.2
_METER_LOG = 30.0
_METER_SPAN = 5.0

# Checkpoints of the journal are this many bytes or seconds apart, whichever is less,
# but at least this fraction of the file: the journal of 1 TB stays near 1 MB.
_CHECKPOINT_BYTES = 1 << 20
_CHECKPOINT_SECONDS = 1.0
_CHECKPOINT_SHIFT = 10

# How much of the part file the system is asked to write to the disk at once.
_SETTLED_BYTES = 1 << 23

# New bytes that count as progress, so that the count of retries begins anew.
_PROGRESS = 1 << 16

# The longest wait between two retries in seconds, unless `retry_wait` is longer; the
# longest that a server can impose with Retry-After.
_LONGEST_WAIT = 60.0
_LONGEST_RETRY_AFTER = 3600.0

# The longest timeout in seconds: what poll() takes, in milliseconds.
_LONGEST_TIMEOUT = 2e6

# Statuses that a later attempt may overcome; 520 to 529 are those of CDNs.
_RETRIED_STATUS = {408, 429, 500, 502, 503, 504} | set(range(520, 530))

# Statuses of a server that limits connections or requests.
_CROWDED_STATUS = (429, 503)

# Statuses of an expired URL, when the ticket was good before.
_EXPIRED_STATUS = (400, 401, 403, 404, 410)

# Statuses of servers that refuse any Range but the ticket's; an empty 206, too.
_RANGE_REFUSED_STATUS = (206, 400, 403, 416)

# The SAM fields of the spec's `fields` parameter.
_FIELDS = "QNAME FLAG RNAME POS MAPQ CIGAR RNEXT PNEXT TLEN SEQ QUAL".split()

# The environment variable with which htslib's users allow tokens over plain http.
_ALLOW_PLAIN = ("HTS_ALLOW_UNENCRYPTED_AUTHORIZATION_HEADER", "I understand the risks")

# Where CA certificates come from; OpenSSL itself reads the first two.
_CA_VARIABLES = "SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE".split()

# Headers of a ticket that would interfere with the framing of messages.
_FRAMING_HEADERS = set(
    "accept-encoding connection content-length expect keep-alive te transfer-encoding"
    " upgrade".split()
)

# Query parameters of signed URLs: they change when a URL is signed anew.
_SIGNATURE = re.compile(
    r"(x-amz-|x-goog-|x-oss-)|(awsaccesskeyid|googleaccessid|signature|expires|policy"
    r"|key-pair-id|token|access_token|sig|se|sp|sv|sr|st|spr|ske|sks|skt|skv|skoid"
    r"|sktid|md5)\Z",
    re.I,
)

# Headers of a ticket that differ when it is requested again.
_SECRET = re.compile(r"(authorization|cookie|date)\Z", re.I)

# File systems without fsync answer with these.
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)

# A disk without room: a rerun resumes once there is some.
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))

# ---- version and platform shims, in this one place

# Windows has no file locks of this kind.
fcntl: Any
try:
    import fcntl
except ImportError:
    fcntl = None

# Python 3.6 has no time.thread_time; goes with it.
_thread_time: Callable[[], float] = getattr(time, "thread_time", time.process_time)
if not hasattr(time, "thread_time") and hasattr(time, "clock_gettime"):
    _thread_time = functools.partial(time.clock_gettime, time.CLOCK_THREAD_CPUTIME_ID)


if TYPE_CHECKING:
    # From Python 3.8; only for type checkers.
    from typing import Protocol

    class _Writable(Protocol):
        def write(self, __data: bytes) -> Any:
            """What an output has to have."""


def _is_readable(sock: socket.socket) -> bool:
    """Whether something has come unasked; Windows and eventlet have no poll()."""
    if not hasattr(select, "poll"):
        return bool(select.select([sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start threads that leave signals to the main thread: in another one a signal
    does not end what the main thread waits for. Windows has no masks."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _require_tls_1_2(context: ssl.SSLContext) -> None:
    """From Python 3.10 on this is the default; goes with 3.9."""
    if sys.version_info < (3, 10):
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1


def _notice_cut_tls(context: ssl.SSLContext) -> ssl.SSLContext:
    """Python 3.8 and 3.9 have OpenSSL 3 take a cut connection for a proper end
    (SSL_OP_IGNORE_UNEXPECTED_EOF); goes with 3.9."""
    if sys.version_info < (3, 10):
        context.options &= ~0x80
    return context


def _new_md5() -> Any:
    """An MD5 object, or None where the system forbids MD5 (FIPS).

    Before Python 3.9 there is no `usedforsecurity`.
    """
    try:
        if sys.version_info >= (3, 9):
            return hashlib.md5(usedforsecurity=False)
        return hashlib.md5()
    except ValueError:
        _log.warning("MD5 is not available here: not checking the ticket's MD5")
        return None


# ---- exceptions


class HtsgetException(Exception):
    """Base class of the errors of a transfer."""

    # Whether the same request may succeed when it is made again soon.
    _transient = False
    # Seconds to wait before that, as the server asked.
    _retry_after = 0.0
    # Whether the server, or this system, has too many connections open.
    _crowded = False
    # Whether asking again, perhaps in another way, does not count as a retry.
    _is_free = False
    # Whether the object behind a block's URL is another one than before.
    _is_changed = False

    def __init__(self, text: str = "", *values: Any) -> None:
        super().__init__(text % values if values else text)

    def _marked(self: "_E", **marks: Any) -> "_E":
        """The same error with other marks than its class has."""
        for name, value in marks.items():
            setattr(self, name, value)
        return self


_E = TypeVar("_E", bound=HtsgetException)


class RequestError(HtsgetException, ValueError):
    """The caller asked for something that the protocol forbids."""


class ProtocolError(HtsgetException):
    """The server's ticket or answer breaks the protocol."""


class IntegrityError(ProtocolError):
    """The bytes are complete but wrong: MD5, format, BGZF chain or end marker."""

    # Bytes from the beginning of the data that are certainly good.
    _sound = 0


class ClientError(HtsgetException):
    """The server refused the request.

    `status` is the HTTP status (int), `error` the error type (spec: "Errors") or the
    HTTP reason, `message` the server's explanation, `body` the beginning of the
    answer's body (str).
    """

    def __init__(
        self,
        status: int,
        error: str,
        message: str = "",
        url: str = "",
        body: str = "",
        asked: str = "",
    ) -> None:
        # Not the body: it may hold what must not be shown.
        Exception.__init__(self, status, error, message, url)
        self.status, self.error, self.message = status, error, message
        self.url, self.body = url, body
        # What was asked for: "ticket", "ticket with login", "data block" or "proxy".
        self._asked = asked

    @property
    def exception_str(self) -> str:
        """Status and error, as the htsget package on PyPI has it."""
        return "HTTP %d %s" % (self.status, self.error)

    def __str__(self) -> str:
        text = self.exception_str
        if self.message:
            text += ": " + self.message
        return text + (" (%s)" % self.url if self.url else "")


class RetryableError(HtsgetException):
    """Gave up on something that a later run may overcome."""

    _transient = True


class ExceptionWrapper(HtsgetException):
    """An error with another one as its cause, `source`."""

    def __init__(self, text: str, source: Optional[BaseException] = None) -> None:
        super().__init__(text)
        self.source = self.__cause__ = source


class RetryableIOError(RetryableError, ExceptionWrapper):
    """A connection error, a timeout or a 5xx answer; the cause is chained."""


class ContentLengthMismatch(RetryableError):
    """An answer ended early."""


# Names of the htsget package on PyPI (0.2.6) that its callers may catch.
InvalidJsonError = InvalidLeadingJsonError = TicketDecodeError = ProtocolError
MalformedJsonError = EmptyTicketError = ProtocolError


class _Stopped(Exception):
    """The transfer, or this window on it, has ended: whatever comes now is void."""


class _Restart(Exception):
    """A reader cannot go on; the delivery decides where to begin again."""

    def __init__(self, block: int, error: HtsgetException) -> None:
        super().__init__(block, error)
        self.block, self.error = block, error


# ---- the ticket request
#
# What is asked of the ticket server, checked before anything is sent. Pure: no network.
# A RequestError names the options as the caller of `get` does.

_Options = types.SimpleNamespace

# For each parameter that is a text: its option, how it is sent, and what it has to be,
# in words and as a pattern.
_TEXTS: Dict[str, Tuple[str, Callable[[str], str], str, str]] = {
    "format": ("data_format", str.upper, "a string, or is empty", "(?s).+"),
    "class": ("data_class", str, "'header'", "header"),
    "referenceName": ("reference_name", str, "a string, or is empty", "(?s).+"),
    "referenceMD5": ("reference_md5", str.lower, "32 hex digits", "[0-9a-f]{32}"),
}

# What a URL or a host cannot hold.
_NOT_IN_URLS = "[^\x21-\x7e]"


class Region(NamedTuple):
    """A part of a reference: its name, and 0-based half-open `start` and `end`."""

    reference_name: str
    start: Optional[int] = None
    end: Optional[int] = None


class _TicketRequest:
    """A URL, headers and, for a POST, a body."""

    def __init__(self, options: _Options) -> None:
        """Check the options; RequestError before anything is sent."""
        self.url, self._headers = _without_userinfo(_checked_url(options.url))
        self.body: Optional[bytes] = None
        self._token = options.bearer_token
        for name, value in dict(options.headers or {}).items():
            if value is not None:
                _require_header("headers", name, value)
                self._headers[name.title()] = value
        if self._token is not None and "Authorization" in self._headers:
            _log.warning("the bearer token replaces the Authorization header")
        if not callable(self._token):
            self.headers()
        parameters = _parameters(options)
        if options.regions is None:
            self.url = _with_query(self.url, parameters, _query(parameters))
            return
        if (options.reference_name, options.start, options.end) != (None,) * 3:
            text = "regions cannot be combined with reference_name, start or end"
            raise RequestError(text)
        parameters["regions"] = _regions(options.regions)
        self.url = _with_query(self.url, parameters)
        self.body = json.dumps(parameters).encode("ascii")

    def headers(self) -> Dict[str, str]:
        """The headers; a token that comes from a function is fetched anew.

        .netrc is consulted only where there is neither a token nor an Authorization.
        """
        headers = {"Accept": _ACCEPT}
        if self.body is not None:
            headers["Content-Type"] = "application/json"
        headers.update(self._headers)
        token = self._token
        if callable(token):
            token = token()
            token = token.strip() if isinstance(token, str) else token
        if token is not None:
            headers["Authorization"] = _bearer(token)
        _require_private(self.url, headers)
        if "Authorization" not in headers and _is_private(self.url):
            headers.update(_netrc_login(self.url))
        return headers


def _bearer(token: Any) -> str:
    """The Authorization header for a token, which may already say "Bearer"."""
    if not isinstance(token, str) or not token.strip():
        raise RequestError("bearer_token is empty or not a string")
    value = "Bearer " + re.sub(r"\A\s*bearer\s+", "", token, flags=re.I)
    _require_header("bearer_token", "Authorization", value)
    return value


def _require_private(url: str, headers: Mapping[str, str]) -> None:
    """RequestError for a bearer token that others could read on its way."""
    for name, value in headers.items():
        is_token = name.lower() == "authorization" and re.match(r"(?i)\s*bearer", value)
        if is_token and not _is_private(url):
            text = (
                "not sending a token over plain http to %s; use https, or set %s='%s'"
            )
            raise RequestError(text, _shown(url), *_ALLOW_PLAIN)


def _is_private(url: str) -> bool:
    """Whether nobody on the way can read a request: https, or within this machine; or
    whether the user accepts the risk, in htslib's way."""
    parts = urllib.parse.urlsplit(url)
    name, value = _ALLOW_PLAIN
    if parts.scheme == "https" or os.environ.get(name) == value:
        return True
    loopback = r"(.+\.)?localhost\Z|127(\.\d{1,3}){3}\Z|::1\Z"
    is_near = re.match(loopback, parts.hostname or "") is not None
    return is_near and _proxy_for(parts.scheme, parts.netloc) is None


def _netrc_login(url: str) -> Dict[str, str]:
    """The Authorization header that .netrc (or the file NETRC) has for a URL's host."""
    import netrc

    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        known = netrc.netrc(path).authenticators(host)
    except (FileNotFoundError, NotADirectoryError):
        known = None
    except (OSError, ValueError, netrc.NetrcParseError) as error:
        # Before Python 3.11 one odd line is enough; the error's text may show secrets.
        _log.warning("cannot use %s: %s", path, type(error).__name__)
        known = None
    if known is None:
        return {}
    login = "%s:%s" % (known[0] or "", known[2] or "")
    return {"Authorization": _basic(login.encode("utf-8"))}


def _basic(login: bytes) -> str:
    return "Basic " + base64.b64encode(login).decode("ascii")


def _require_header(option: str, name: Any, value: Any) -> None:
    """RequestError for a header of the caller's that cannot be sent."""
    problem = _header_problem(name, value)
    if problem:
        raise RequestError("%s: %s", option, problem)


def _header_problem(name: Any, value: Any) -> Optional[str]:
    """Why a header cannot be sent, in words that do not show its value."""
    if not isinstance(name, str) or not isinstance(value, str):
        return "the name or value of a header is not a string"
    if not re.match(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z", name):
        return "the name of a header is malformed"
    if not re.match("[\t\x20-\x7e\x80-\xff]*\\Z", value):
        return "the header %s has control characters or is not Latin-1" % name
    return None


# The many blocks of a ticket often have one URL.
@functools.lru_cache(maxsize=64)
def _url_problem(url: str) -> Optional[str]:
    """Why a URL cannot be fetched, in words that do not show it."""
    if re.search(_NOT_IN_URLS, url):
        return "the URL has spaces, control or non-ASCII characters"
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https"):
            return "the URL is neither http nor https"
        host = urllib.parse.unquote(parts.hostname or "")
        if host and parts.port != 0 and not re.search(_NOT_IN_URLS, host):
            return None
    return "the host or port of the URL is missing or malformed"


def _checked_url(url: Any) -> str:
    """The caller's URL, with what a URL cannot hold percent-encoded."""
    if not isinstance(url, str) or re.search("[\x00-\x1f\x7f]", url):
        raise RequestError("the URL is not a string, or has control characters")
    # As htsjdk and GATK write them.
    url = re.sub(r"\A\s*htsget://", "https://", url, flags=re.I).strip()
    safe = "!#$%&'()*+,/:;=?@[]~\"<>\\^`{|}"
    try:
        url = urllib.parse.quote(url, safe=safe, errors="surrogateescape")
        problem = _url_problem(url)
    except UnicodeEncodeError:
        problem = "the URL is not text"
    if problem:
        raise RequestError("%s: %s", _shown(url), problem)
    return str(urllib.parse.urldefrag(url).url)


def _without_userinfo(url: str) -> Tuple[str, Dict[str, str]]:
    """A URL without its user-info, and the Authorization header that stands for it."""
    parts = urllib.parse.urlsplit(url)
    userinfo, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    login = _basic(urllib.parse.unquote_to_bytes(userinfo))
    return parts._replace(netloc=host).geturl(), {"Authorization": login}


def _shown(url: str) -> str:
    """A URL as it may be printed: without user-info, query and fragment."""
    if url[:5].lower() == "data:":
        return "data: URI"
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#]*@)?([^?#]*)", url)
    return _printable("".join(match.groups()), 200) if match else "(not a URL)"


def _printable(text: str, limit: int = _ERROR_SHOWN) -> str:
    """Foreign text as it may be printed: one line, no control characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _parameters(options: _Options) -> Dict[str, Any]:
    """The request parameters (spec: "Request parameters"), checked."""
    parameters: Dict[str, Any] = {}
    for name, (option, cased, form, pattern) in _TEXTS.items():
        value = getattr(options, option)
        if value is not None:
            parameters[name] = cased(value) if isinstance(value, str) else ""
            if not re.fullmatch(pattern, parameters[name]):
                raise RequestError("%s is not %s", option, form)
    if "class" in parameters and "format" not in parameters:
        raise RequestError("data_class requires data_format")
    interval = _interval(options.start, options.end)
    if interval and options.reference_md5 is None:
        if options.reference_name in (None, "*"):
            text = "start and end require reference_name, and one that is not '*'"
            raise RequestError(text)
    return dict(parameters, **interval, **_name_lists(options))


def _interval(start: Any, end: Any) -> Dict[str, int]:
    """The parameters `start` and `end`: 0 <= start <= end < 2**32."""
    interval = {}
    for name, value in (("start", start), ("end", end)):
        if value is not None:
            try:
                interval[name] = int(value)
                is_whole = isinstance(value, str) or interval[name] == value
            except (TypeError, ValueError, OverflowError):
                is_whole = False
            if not is_whole or not 0 <= interval[name] < 1 << 32:
                raise RequestError("%s is not an integer from 0 to 2**32-1", name)
    if interval.get("start", 0) > interval.get("end", 1 << 32):
        raise RequestError("start is greater than end")
    return interval


def _name_lists(options: _Options) -> Dict[str, List[str]]:
    """The parameters `fields`, `tags` and `notags`, each a list of names."""
    lists = {}
    for key in ("fields", "tags", "notags"):
        value = getattr(options, key)
        if value is not None:
            names = value.split(",") if isinstance(value, str) else list(value)
            if not all(isinstance(name, str) for name in names):
                raise RequestError("%s has names that are not strings", key)
            lists[key] = [name.strip() for name in names if name.strip()]
    if "fields" in lists:
        lists["fields"] = [name.upper() for name in lists["fields"]]
        if not lists["fields"] or not set(lists["fields"]) <= set(_FIELDS):
            raise RequestError("fields can only have %s", ", ".join(_FIELDS))
    both = set(lists.get("tags", ())) & set(lists.get("notags", ()))
    if both:
        raise RequestError("tags and notags overlap: %s", ", ".join(sorted(both)))
    if not lists.get("notags"):
        # Leaving nothing out is the server's default.
        lists.pop("notags", None)
    return lists


def _regions(regions: Iterable[Any]) -> List[Dict[str, Any]]:
    """The `regions` of a POST body (spec: "POST request")."""
    result = []
    for region in regions:
        if not isinstance(region, (tuple, list)) or not 1 <= len(region) <= 3:
            raise RequestError("a region is not a tuple (name, start, end)")
        name, start, end = Region(*region)
        interval = _interval(start, end)
        is_text = isinstance(name, str) and re.match("[^\ud800-\udfff]+\\Z", name)
        if not is_text or (name == "*" and interval):
            text = "a region needs a reference name, and '*' takes no start or end"
            raise RequestError(text)
        result.append(dict(interval, referenceName=name))
    if not result:
        raise RequestError("regions is empty")
    return result


def _query(parameters: Mapping[str, Any]) -> str:
    """The parameters as a query string."""
    pairs = [
        (name, ",".join(value) if isinstance(value, list) else value)
        for name, value in parameters.items()
    ]
    quote = urllib.parse.quote
    # Arguments of the command line may have bytes that are no text.
    odd = "surrogateescape"
    try:
        return urllib.parse.urlencode(pairs, safe=",*:", errors=odd, quote_via=quote)
    except UnicodeEncodeError:
        raise RequestError("an option is not text") from None


def _with_query(url: str, names: Iterable[str], query: str = "") -> str:
    """The URL with more in its query, where the parameters of these names go; the rest
    of it stays as it is."""
    parts = urllib.parse.urlsplit(url)
    pairs = [
        pair
        for pair in parts.query.split("&")
        if urllib.parse.unquote_plus(pair.partition("=")[0]) not in names
    ]
    query = "&".join(filter(None, pairs + [query]))
    return parts._replace(query=query).geturl()


# ---- the ticket
#
# Tickets: parsing, what stays the same when one is requested again. Pure: no network.

_Raw = Union[bytes, bytearray]

# The types of JSON that a ticket has, in words.
_JSON_TYPES = {dict: "an object", list: "a list", str: "a string"}


class DataBlock(NamedTuple):
    """One entry of a ticket (spec: "Response JSON fields").

    `url` is http, https or data; `headers` go with every request for it;
    `data_class` is "header", "body" or None.
    """

    url: str
    headers: Mapping[str, str] = {}
    data_class: Optional[str] = None

    def __repr__(self) -> str:
        shown = (_shown(self.url), sorted(self.headers), self.data_class)
        return "DataBlock(url=%r, headers=%r, data_class=%r)" % shown


class Ticket(NamedTuple):
    """A server's answer: the `format` of the data, its `blocks` in order, its `md5`.

    `format` (upper-case) and `md5` (32 hexadecimal digits) are None when the server
    does not give them.
    """

    format: Optional[str]
    blocks: List[DataBlock]
    md5: Optional[str] = None


# Where the ticket of a transfer comes from.
_Source = Union[_TicketRequest, Ticket]


def _parse_ticket(raw: _Raw) -> Ticket:
    """Parse a ticket; ProtocolError if it is not one (spec: "Response JSON fields")."""
    what = "the ticket"
    body = _typed(_parse_json(raw, what), "htsget", dict, what, is_required=True)
    if "error" in body:
        said = ": ".join(str(body[key]) for key in ("error", "message") if key in body)
        raise ProtocolError("the ticket is an error: %s", _printable(said))
    entries = _typed(body, "urls", list, what, is_required=True)
    ticket = Ticket(
        (_typed(body, "format", str, what) or "").upper() or None,
        [_parse_block(entry, number) for number, entry in enumerate(entries, 1)],
        _typed(body, "md5", str, what),
    )
    _check_ticket(ticket)
    return ticket


def _parse_json(raw: _Raw, what: str) -> Dict[str, Any]:
    """A JSON object from a server; `raw` is emptied, as it may be large."""

    def refuse(constant: str) -> Any:
        raise ValueError("%s is not JSON" % constant)

    try:
        text = raw.decode("utf-8-sig")
        if isinstance(raw, bytearray):
            raw.clear()
        document = json.loads(text, parse_constant=refuse, parse_int=_parse_int)
        if isinstance(document, dict):
            return document
        problem = "not a JSON object"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:
        problem = "not valid JSON: " + _printable(str(error), 100)
    # Outside of the handlers: their exceptions hold the text, secrets included.
    raise ProtocolError("%s is %s", what, problem)


def _parse_int(digits: str) -> float:
    """An integer; int() would take forever on a million digits."""
    return int(digits) if len(digits) < 300 else float(digits)


def _typed(
    container: Any, key: str, kind: Any, what: str, is_required: bool = False
) -> Any:
    """A value of an object in the ticket; None when absent or null."""
    value = container.get(key)
    if not isinstance(value, kind) and (is_required or value is not None):
        text = "%r in %s is missing or not %s"
        raise ProtocolError(text, key, what, _JSON_TYPES[kind])
    return value


def _parse_block(entry: Any, number: int) -> DataBlock:
    """One entry of the ticket's `urls`."""
    what = "data block %d" % number
    if not isinstance(entry, dict):
        raise ProtocolError("%s is not a JSON object", what)
    # `urlClass` is the EGA's name for it.
    name = "class" if "class" in entry else "urlClass"
    return DataBlock(
        _typed(entry, "url", str, what, is_required=True),
        _typed(entry, "headers", dict, what) or {},
        _typed(entry, name, str, what),
    )


def _check_ticket(ticket: Ticket) -> None:
    """ProtocolError for a ticket that cannot be fetched as it stands."""
    if ticket.md5 is not None and not re.match(r"[0-9A-Fa-f]{32}\Z", ticket.md5):
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


def _decode_data_uri(uri: str, what: str) -> bytes:
    """The bytes of a data URI (RFC 2397), also in the EGA's form data:base64,..."""
    begin = uri.find(",") + 1
    is_base64 = uri[5:begin].rpartition(";")[2].strip(" ,").lower() == "base64"
    with contextlib.suppress(ValueError):
        if begin and not is_base64:
            return urllib.parse.unquote_to_bytes(uri[begin:])
        if re.search(r"[%\s]", uri):
            uri = "".join(urllib.parse.unquote(uri[begin:]).split())
            begin = 0
        # In pieces: the URI may be all of a 64 MiB ticket.
        content, step = BytesIO(), 1 << 20
        for start in range(begin, len(uri), step):
            content.write(base64.b64decode(uri[start : start + step], validate=True))
        return content.getvalue()
    raise ProtocolError("the data URI of %s is malformed", what)


def _outline(ticket: Ticket) -> Tuple[Any, ...]:
    """What stays the same of a ticket when it is requested again."""
    return ticket.format, ticket.md5, list(map(_shape, ticket.blocks))


def _shape(block: DataBlock) -> Tuple[Any, ...]:
    """What stays the same of a data block when its URL is signed anew."""
    headers = {name.lower(): value for name, value in (block.headers or {}).items()}
    content = _decode_data_uri(block.url, "") if _is_inline(block) else b""
    return headers.get("range"), block.data_class, hashlib.sha256(content).hexdigest()


def _identity(source: _Source, ticket: Ticket) -> Dict[str, str]:
    """What tells a transfer from others, without secrets: digests of what was asked for
    and of what lasts of the ticket. Without a request only the queries and headers of
    the ticket's blocks can say what was asked for."""
    asked: Any = None
    if isinstance(source, Ticket):
        asked = list(map(_lasting_values, ticket.blocks))
    else:
        asked = source.url, (source.body or b"").decode("ascii")
    blocks = [
        [_is_inline(block) or block.url.partition("?")[0], *sorted(block.headers or {})]
        for block in ticket.blocks
    ]
    return {"request": _digest(asked), "ticket": _digest([_outline(ticket), blocks])}


def _lasting_values(block: DataBlock) -> List[Any]:
    """The query and headers of a block, less signatures and secrets."""
    pairs = [(n, v) for n, v in (block.headers or {}).items() if not _SECRET.match(n)]
    if not _is_inline(block):
        pairs += urllib.parse.parse_qsl(urllib.parse.urlsplit(block.url).query, True)
    return sorted(pair for pair in pairs if not _SIGNATURE.match(pair[0]))


def _digest(value: Any) -> str:
    """A digest of something that JSON can hold."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


# ---- retry policy
#
# Arithmetic only: how often, and how long to wait.


# What a malformed date raises.
_NO_DATE = (TypeError, ValueError, IndexError, OverflowError)


def _timestamp(text: str, otherwise: float) -> float:
    """The date in a header, in seconds since the epoch; `otherwise` if malformed."""
    with contextlib.suppress(*_NO_DATE):
        return email.utils.parsedate_to_datetime(text).timestamp()
    return otherwise


def _retry_after(value: Optional[str], now: float) -> float:
    """Seconds to wait for a Retry-After header (a number or a date) at time `now`."""
    text = (value or "").strip()
    if re.match(r"\d{1,9}\Z", text, re.A):
        seconds = float(text)
    else:
        seconds = _timestamp(text, now) - now
    return max(0.0, min(seconds, _LONGEST_RETRY_AFTER))


class _Retry:
    """Counts failures in a row and says how long to wait."""

    def __init__(self, limit: int, wait: float) -> None:
        self._limit = limit
        self._wait = wait
        self._failures = 0
        self._new = 0

    def progress(self, count: int) -> None:
        """Note `count` new bytes."""
        self._new += count
        if self._new >= _PROGRESS:
            self._failures = self._new = 0

    def pause(self, error: HtsgetException) -> float:
        """Seconds to wait after an error; raises it when retrying is of no use."""
        if not error._transient or 0 <= self._limit <= self._failures:
            raise error
        doubled = self._wait * float(1 << min(self._failures, 30))
        self._failures += 1
        wait = min(doubled, max(_LONGEST_WAIT, self._wait)) * random.uniform(1.0, 1.2)
        return max(wait, error._retry_after)


# ---- transport
#
# The only code that opens sockets: urllib's opener over http.client connections that
# are kept and used again. Nothing here knows about tickets or data blocks.

# What the standard library raises for broken connections and broken answers, and when
# an idle connection turns out to be dead.
_LIBRARY_ERRORS = (OSError, http.client.HTTPException, ValueError)
_DEAD = (ConnectionError, ssl.SSLError, http.client.BadStatusLine)

# Errors of a process, or system, that has too many connections open.
_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)

# What the resolver says of names that do not exist.
_NO_SUCH_HOST = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))

# TLS failures that a retry cannot mend, by OpenSSL's reason.
_NOT_TLS = "WRONG_VERSION|UNKNOWN_PROTOCOL|HTTP_REQUEST|PACKET_LENGTH|RECORD_LAYER"
_OLD_TLS = "PROTOCOL_VERSION|UNSUPPORTED_PROTOCOL|NO_PROTOCOLS|NO_SHARED|LEGACY_SIGALG"
_TLS_FAILURES = {
    _NOT_TLS: "this port does not speak TLS",
    _OLD_TLS: "no common TLS version (1.2 or later is required)",
    "CERTIFICATE_REQUIRED|HANDSHAKE": "TLS may require a client certificate",
    "LEGACY_RENEGOTIATION": "the server requires unsafe legacy TLS renegotiation",
}


class _Hosts:
    """What a transfer has learned of hosts: which were reached, which addresses do not
    answer, which origins have asked for patience."""

    def __init__(self) -> None:
        self.reached: Set[str] = set()
        self.silent: Set[Any] = set()
        self._busy: Dict[Any, float] = {}
        self._patient_until = 0.0

    def resolve(self, host: str, port: int) -> List[Any]:
        """What getaddrinfo says, silent addresses last."""
        found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        return sorted(found, key=lambda entry: entry[4] in self.silent)

    def postpone(self, url: str, seconds: float) -> None:
        """Let no connection ask a URL's origin for some time."""
        until = max(time.monotonic() + seconds, self._busy.get(_origin(url), 0.0))
        self._busy[_origin(url)] = until
        self._patient_until = max(until, self._patient_until)

    def delay(self, url: str) -> float:
        """Seconds until a URL's origin may be asked again."""
        return self._busy.get(_origin(url), 0.0) - time.monotonic()

    def is_patient(self) -> bool:
        """Whether a delay is pending for any origin."""
        return time.monotonic() < self._patient_until


class _Wire(RawIOBase):
    """The raw bytes of an answer; a deadline bounds what must come as a whole."""

    def __init__(self, raw: Any, sock: socket.socket) -> None:
        self._raw = raw
        self._sock = sock
        self._timeout = sock.gettimeout()
        self._deadline: Optional[float] = None

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what one receive brings, within the deadline if there is one."""
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise socket.timeout("timed out")
            self._sock.settimeout(left)
        return self._raw.readinto(buffer)  # type: ignore

    def hurry(self) -> None:
        """Let all that comes from now on take `timeout` as a whole."""
        if self._deadline is None and self._timeout is not None:
            self._deadline = time.monotonic() + self._timeout

    def relax(self) -> None:
        """Let each receive have `timeout` for itself."""
        if self._deadline is not None:
            self._deadline = None
            with contextlib.suppress(OSError):
                self._sock.settimeout(self._timeout)

    def close(self) -> None:
        """Close the library's file; the connection stays open."""
        self._raw.close()
        super().close()


class _Lines(BufferedReader):
    """The file that http.client reads an answer from: a line that is cut off is an
    error, and a run of lines (head, trailers) has `timeout` as a whole."""

    def __init__(self, wire: _Wire) -> None:
        super().__init__(wire, _FIRST_READ)
        self.wire = wire
        self.last = b""

    def readline(self, limit: Optional[int] = -1) -> bytes:
        """Read a line; b"" only where nothing has come at all."""
        self.wire.hurry()
        line = super().readline(limit)
        if not line.endswith(b"\n") and len(line) != limit and (line or self.last):
            raise http.client.IncompleteRead(line)
        self.last = line
        return line


class _Answer(http.client.HTTPResponse):
    """An answer, whose body is counted here; the library reads head and framing."""

    def __init__(self, connection: "_Connection", *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.fp = self._lines = _Lines(_Wire(self.fp.detach(), connection.sock))
        self._connection: Optional[_Connection] = connection
        self._pool = connection.pool
        self.url, self.via, self.login = connection.asked
        # Bytes in the body, None where only its end will tell; and whether that end
        # can be told from a cut connection.
        self.size: Optional[int] = None
        self.framed = True
        self.fields: Dict[str, str] = {}
        self._is_bounded = False

    def begin(self) -> None:
        """Read the head; refuse one that leaves in doubt where the body ends."""
        super().begin()
        while self.status < 200:
            # Informational; the library skips only 100.
            self.headers = None  # type: ignore
            super().begin()
        # By lower-case name: these are looked up a lot.
        raw = reversed(list(self.headers.raw_items()))
        self.fields = {name.lower(): value for name, value in raw}
        lengths = ",".join(self.headers.get_all("content-length", [])).split(",")
        size = set(map(str.strip, lengths)) - {""}
        coding = self.fields.get("transfer-encoding", "identity").strip().lower()
        unclear = coding not in ("identity", "chunked") or (self.chunked and size)
        if unclear or len(size) > 1 or not re.match("[0-9]{0,18}\\Z", "".join(size)):
            raise http.client.HTTPException("malformed or contradictory framing")
        for defect in self.headers.defects:
            # Those of a multipart body are none of the head.
            if not re.search("Multipart|Boundary", type(defect).__name__):
                raise http.client.HTTPException("malformed headers")
        # The library knows the statuses that have no body.
        self.size = int(size.pop()) if size and self.length != 0 else self.length
        self.framed = self.chunked or self.size is not None
        self._lines.wire.relax()

    def pieces(self) -> Iterator[bytes]:
        """The body as it comes; ContentLengthMismatch where it ends early."""
        left = sys.maxsize if self.size is None else self.size
        failure: Optional[HtsgetException] = None
        records: List[bytes] = []
        while left > 0:
            try:
                data = self._receive(min(left, _TLS_RECORD if records else _CHUNK))
            except _LIBRARY_ERRORS as error:
                data, failure = b"", _network_error(error, self.url, self.via)
            if not data:
                break
            left -= len(data)
            if records or (self.size and len(data) == _TLS_RECORD):
                records.append(data)
                if len(data) == _TLS_RECORD and len(records) < _TLS_RECORDS and left:
                    continue
                data, records = b"".join(records), []
            if left == 0:
                # The next request may use the connection while this is delivered.
                self._release()
            yield data
        if records:
            yield b"".join(records)
        if self._pool.stopped.is_set():
            # The end is of our own making and says nothing about the body.
            raise _Stopped
        if failure is not None:
            raise failure
        if self.size is not None and left:
            text = "%s: the answer ended %d bytes early"
            raise ContentLengthMismatch(text, _shown(self.url), left)
        self._release()

    def _receive(self, most: int) -> bytes:
        """What one receive brings of the body; b"" at its end."""
        if not self._is_bounded:
            self._lines.wire.relax()
        try:
            data = self.read1(most)
        except _LIBRARY_ERRORS:
            if self.chunked and re.match(rb"0+\s*(;|\r?\n)", self._lines.last):
                # The last chunk has come; trailers do not matter.
                self.close()
                return b""
            raise
        if self.chunked and (self.chunk_left or 0) < 0:
            raise http.client.IncompleteRead(b"")
        return data

    def document(self) -> Iterator[bytes]:
        """As `pieces`, but the whole body must come within `timeout`."""
        self._is_bounded = True
        self._lines.wire.hurry()
        return self.pieces()

    def text(self) -> str:
        """The first part of an error's body; keeps the connection if that is all."""
        body = b""
        with contextlib.suppress(HtsgetException):
            for data in self.document():
                body += data
                if len(body) > _ERROR_LIMIT:
                    break
        self.close()
        return body[:_ERROR_LIMIT].decode("utf-8", "replace")

    def read(self, amt: Optional[int] = None) -> bytes:
        """What urllib drops of a redirect's body, bounded."""
        return self.text().encode()

    def close(self) -> None:
        """Drop what was not read, and the connection with it."""
        self._release(is_complete=False)

    def _release(self, is_complete: bool = True) -> None:
        """Let go of the connection, which is free if the body is complete."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._lines.wire.relax()
            super().close()
            is_free = is_complete and self.framed and not self.will_close
            self._pool.take_back(connection, is_free)


class _Connection(http.client.HTTPConnection):
    """A connection to a server, perhaps through a proxy, that another thread can shut
    down whatever this one waits for."""

    def __init__(self, pool: "_Transport", request: "_Request") -> None:
        self.route = scheme, host, self._tunnel = _route(request)
        # A proxy is spoken to in plain http.
        _, name, port = _origin(("http" if self._tunnel else scheme) + "://" + host)
        super().__init__(name, port, timeout=request.timeout)
        # URL, proxy and whether there was a login, of the last request; and its form
        # (see `_form`), until its answer comes.
        self.asked = ("", "", False)
        self._sent: Any = None
        self.pool = pool
        # What http.client makes an answer with.
        self.response_class: Any = functools.partial(_Answer, self)
        self._proxy_login = request.headers.get("Proxy-authorization")
        # Also while http.client has handed its socket to the answer.
        self._socket: Optional[socket.socket] = None

    def connect(self) -> None:
        """Open the connection (called by http.client)."""
        failure = OSError("no address for %s" % self.host)
        for *kind, _, address in self.pool.hosts.resolve(self.host, self.port):
            try:
                self._watch(socket.socket(*kind))
                self.sock.settimeout(self.timeout)
                self.sock.connect(address)
                break
            except OSError as error:
                failure = error
                if error.errno in _TOO_MANY_FILES:
                    raise
                if self.sock is not None:
                    self.sock.close()
                self.pool.hosts.silent.add(address)
        else:
            raise failure
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tunnel:
            self._open_tunnel(self._tunnel)
        if self.route[0] == "https":
            name = urllib.parse.urlsplit("//" + (self._tunnel or "")).hostname
            given = self.pool.options.ssl_context
            wrapped = _notice_cut_tls(given or _default_ssl_context()).wrap_socket(
                self.sock,
                server_hostname=name or self.host,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
            )
            self._watch(wrapped)
            wrapped.do_handshake()

    def _watch(self, sock: Any) -> None:
        """Take up a socket; from here on `shut_down` reaches it."""
        self.sock = self._socket = sock
        if self.pool.stopped.is_set():
            raise _Stopped

    def _open_tunnel(self, tunnel: str) -> None:
        """CONNECT, as http.client's own leaves out Host and the brackets of IPv6."""
        target = tunnel if re.search(r":\d+\Z", tunnel) else tunnel + ":443"
        lines = ["CONNECT %s HTTP/1.1" % target, "Host: " + target]
        if self._proxy_login:
            lines.append("Proxy-Authorization: " + self._proxy_login)
        self.sock.sendall("\r\n".join(lines + ["", ""]).encode("latin-1"))
        answer = self.response_class(self.sock, method="CONNECT")
        try:
            answer.begin()
            if answer.status // 100 != 2:
                raise _refusal(answer, "proxy")
        finally:
            http.client.HTTPResponse.close(answer)

    def _form(self, request: "_Request") -> Any:
        """What is sent of a request: method, target, body and headers."""
        headers = dict(request.unredirected_hdrs, **request.headers)
        if self._tunnel:
            headers.pop("Proxy-authorization", None)
        titled = {name.title(): value for name, value in headers.items()}
        return request.get_method(), request.selector, request.data, titled

    def has_sent(self, request: "_Request") -> bool:
        """Whether this very request was sent ahead."""
        return self._sent is not None and self._sent == self._form(request)

    def ask(self, request: "_Request") -> None:
        """Send a request, unless it was sent ahead."""
        _require_private(request.full_url, request.headers)
        if self._sent is None:
            form = self._form(request)
            self.asked = request.full_url, _via(request), "Authorization" in form[3]
            self.request(*form)
            self._sent = form

    def exchange(self, request: "_Request") -> _Answer:
        """Send a request and read the head of its answer."""
        self.ask(request)
        answer: Any = self.getresponse()
        self._sent = None
        self.pool.hosts.reached.add(self.host)
        return answer  # type: ignore

    def is_clean(self) -> bool:
        """Whether nothing was sent ahead, and nothing has come unasked: neither the
        connection's end nor bytes."""
        pending = getattr(self.sock, "pending", int)
        with contextlib.suppress(OSError, ValueError):
            return not (self._sent or pending() or _is_readable(self.sock))
        return False

    def shut_down(self) -> None:
        """End it; a thread that waits for it wakes up."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # SSLSocket.shutdown would take the TLS state from under a reader.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _Request(urllib.request.Request):
    """A request that knows whose headers it carries.

    `private` headers are the caller's and for one origin only; the others are those
    of a data block and follow its redirects.
    """

    def __init__(
        self, url: str, headers: Dict[str, str], body: Any, private: bool, jar: Any
    ) -> None:
        # The origin's host matters for cookies of third parties only.
        super().__init__(url, body, headers, origin_req_host="")
        self.add_unredirected_header("User-agent", "htsget.py/" + __version__)
        # The stock ProxyHandler adds to `headers` what is for the proxy only.
        self.own_headers = headers
        self.private = private
        # The cookies that were set on the way, if any.
        self.jar = jar


def _route(request: _Request) -> Tuple[str, str, Optional[str]]:
    """What a connection for a request is made for: the scheme, the host (or proxy), and
    the host that a proxy shall connect to, if any."""
    return request.type, request.host or "", getattr(request, "_tunnel_host", None)


def _via(request: _Request) -> str:
    """The proxy (host and port) that a request goes through, if any."""
    _, host, tunnel = _route(request)
    return host if tunnel or request.has_proxy() else ""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects without leaking headers to another origin."""

    # An archive needs one or two.
    max_redirections = 10

    def http_response(self, request: _Request, answer: _Answer) -> Any:
        """Follow a redirect, if the answer is one (called by the opener)."""
        if answer.status not in (301, 302, 303, 307, 308):
            return answer
        head: Any = (answer.status, answer.reason, answer.headers)
        try:
            # Without Location there is nowhere to go: a refusal.
            return self.http_error_302(request, answer, *head) or answer
        except urllib.error.HTTPError as error:
            is_endless = str(error.msg).startswith(self.inf_msg)
            problem = "too many redirects" if is_endless else "not to http or https"
        except HtsgetException:
            answer.close()
            raise
        except ValueError:
            problem = "its target is not a URL that can be fetched"
        answer.close()
        shown = _shown(request.full_url)
        raise ProtocolError("%s: cannot follow the redirect: %s", shown, problem)

    https_response = http_response

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> _Request:
        """The request to the redirect's target (called by the stock handler)."""
        if _url_problem(newurl):
            raise ValueError
        url, login = _without_userinfo(newurl)
        own = dict(self._headers(req, url), **login)
        # A POST keeps its method, or its regions would be lost; but 303 means GET.
        body = None if code == 303 else req.data
        jar = req.jar
        if jar is None and headers.get("set-cookie"):
            import http.cookiejar

            jar = http.cookiejar.CookieJar()
        new = _Request(url, own, body, req.private, jar)
        if jar is not None:
            jar.extract_cookies(fp, req)
            jar.add_cookie_header(new)
        return new

    @staticmethod
    def _headers(request: _Request, url: str) -> Dict[str, str]:
        """The headers that may go on to a redirect's target."""
        before, after = _origin(request.full_url), _origin(url)
        if before == after:
            return request.own_headers
        headers = {k: v for k, v in request.own_headers.items() if k != "Host"}
        if request.private:
            public = ("Accept", "Content-Type")
            return {name: headers[name] for name in public if name in headers}
        is_downgrade = (before[0], after[0]) == ("https", "http")
        if is_downgrade and set(headers) - {"Range", "If-Range"}:
            text = "%s redirects to plain http, where block headers must not be sent"
            raise ProtocolError(text, _shown(request.full_url))
        return headers


class _Proxies(urllib.request.ProxyHandler):
    """The stock handler, for the proxies that are supported and not bypassed."""

    def proxy_open(self, req: Any, proxy: str, type: str) -> Any:
        """Send a request through the proxy, if it applies (called by the opener)."""
        if _via(req) or _proxy_for(type, req.host) is None:
            return None
        problem = _proxy_problem(type, proxy)
        if problem:
            raise ProtocolError("the proxy for %s %s", type, problem)
        return super().proxy_open(req, proxy, type)


def _proxies() -> Dict[str, str]:
    """The proxies by scheme; ALL_PROXY where a scheme has none of its own."""
    known = urllib.request.getproxies()
    found = {name: known.get(name) or known.get("all") for name in ("http", "https")}
    return {name: proxy for name, proxy in found.items() if proxy}


def _proxy_for(scheme: str, host: str) -> Optional[str]:
    """The proxy for a host (with port), unless no_proxy names the host, a suffix of
    it, its address or a network of it."""
    proxy = _proxies().get(scheme)
    if not proxy or urllib.request.proxy_bypass(host):
        return None
    import ipaddress

    exceptions = urllib.request.getproxies().get("no", "").split(",")
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(_origin("//" + host)[1])
        for entry in exceptions:
            with contextlib.suppress(ValueError):
                if address in ipaddress.ip_network(entry.strip(" []"), strict=False):
                    return None
    return proxy


def _proxy_problem(scheme: str, proxy: str) -> Optional[str]:
    """Why a proxy cannot be used, in words that do not show its login."""
    url = proxy if "://" in proxy else "http://" + proxy
    if url.lower().startswith("socks"):
        return "is a SOCKS proxy, which is not supported; use an HTTP proxy"
    if _url_problem(url):
        return "is not a URL such as http://HOST:PORT"
    if scheme == "https" and url.lower().startswith("https"):
        return "is an https:// proxy, which is not supported for https; use http://"
    return None


class _Transport(urllib.request.AbstractHTTPHandler):
    """Exchanges requests for answers, until it is stopped, over connections that are
    kept and used again; there are never more than `connections`. The stock handlers
    close after each answer."""

    def __init__(self, options: _Options, hosts: _Hosts) -> None:
        super().__init__()
        self.hosts = hosts
        self.stopped = threading.Event()
        self.options = options
        self._opener = urllib.request.OpenerDirector()
        for handler in (_Proxies(_proxies()), self, _Redirects()):
            self._opener.add_handler(handler)
        self._lock = threading.Lock()
        self._open: Set[_Connection] = set()
        # Longest idle first.
        self._idle: List[_Connection] = []

    def wait(self, seconds: float) -> None:
        """Wait, unless the transport is stopped."""
        if self.stopped.wait(max(0.0, min(seconds, threading.TIMEOUT_MAX))):
            raise _Stopped

    def request(
        self, url: str, headers: Dict[str, str], body: Any = None, private: bool = False
    ) -> _Answer:
        """The answer to a request after redirects, whatever its status."""
        request: Any = _Request(url, headers, body, private, jar=None)
        timeout = self.options.timeout and min(self.options.timeout, _LONGEST_TIMEOUT)
        answer: Any = self._opener.open(request, timeout=timeout)
        if _log.isEnabledFor(logging.DEBUG):
            method, shown = request.get_method(), _shown(answer.url)
            _log.debug("%s %s: %d", method, shown, answer.status)
        elsewhere = answer.login and _origin(answer.url) != _origin(url)
        if elsewhere and not private and answer.status in (400, 401, 403):
            # A signed URL does not bear a second login.
            answer.text()
            other = {k: v for k, v in headers.items() if k not in _OF_ONE_ORIGIN}
            return self.request(answer.url, other)
        return answer  # type: ignore

    def ask_ahead(self, url: str, headers: Dict[str, str]) -> None:
        """Send a request whose answer is wanted soon, if an idle connection (without
        a proxy) is there for it; the same `request` takes up the answer."""
        asked = _Request(url, headers, body=None, private=False, jar=None)
        request: Any = self.http_request(asked)
        connection = self._take_idle(request)
        if connection is not None:
            try:
                connection.ask(request)
                self.take_back(connection, True)
            except _LIBRARY_ERRORS:
                self.take_back(connection, False)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, request: _Request) -> _Answer:
        """Exchange a request for an answer (called by the opener)."""
        while True:
            idle = self._take_idle(request)
            connection = idle or self._new(request)
            try:
                return connection.exchange(request)
            except BaseException as error:
                self.take_back(connection, False)
                if self.stopped.is_set():
                    raise _Stopped from None
                if idle and isinstance(error, _DEAD):
                    # It died while it was idle: that costs no retry.
                    continue
                ours = isinstance(error, HtsgetException)
                if ours or not isinstance(error, _LIBRARY_ERRORS):
                    raise
                url, via = request.full_url, _via(request)
                failure = _network_error(error, url, via, self.hosts.reached)
            # Outside of the handler: its exception may hold what must not be shown.
            raise failure

    https_open = http_open

    def _take_idle(self, request: _Request) -> Optional[_Connection]:
        """The connection where a request was sent ahead, or else the last used one."""
        route = _route(request)
        while True:
            with self._lock:
                fitting = [one for one in self._idle if one.route == route]
                asked = [one for one in fitting if one.has_sent(request)]
                if not fitting:
                    return None
                connection = (asked or fitting)[-1]
                self._idle.remove(connection)
            if asked or connection.is_clean():
                return connection
            self.take_back(connection, False)

    def _new(self, request: _Request) -> _Connection:
        connection = _Connection(self, request)
        with self._lock:
            if self.stopped.is_set():
                raise _Stopped
            self._open.add(connection)
        self.close_idle(max(0, len(self._open) - self.options.connections))
        return connection

    def take_back(self, connection: _Connection, is_free: bool) -> None:
        """Keep a connection that is free, or close it."""
        with self._lock:
            if is_free and not self.stopped.is_set():
                self._idle.append(connection)
                return
            self._open.discard(connection)
        connection.close()

    def close_idle(self, most: Optional[int] = None) -> bool:
        """Close idle connections (all, or that many), if there are any."""
        with self._lock:
            idle = self._idle[:most]
            del self._idle[:most]
        for connection in idle:
            self.take_back(connection, False)
        return bool(idle)

    def stop(self) -> None:
        """End every connection, in use or not, for good."""
        self.stopped.set()
        self.close_idle()
        with self._lock:
            for connection in self._open:
                connection.shut_down()


# Headers that another origin than the first does not need.
_OF_ONE_ORIGIN = ("Authorization", "Host")


def _default_ssl_context(cacert: Optional[str] = None) -> ssl.SSLContext:
    """The context for a file or folder of certificates and the environment."""
    return _ssl_context(cacert, *map(os.environ.get, _CA_VARIABLES))


# Building a context takes 20 ms.
@functools.lru_cache(maxsize=8)
def _ssl_context(*paths: Optional[str]) -> ssl.SSLContext:
    """Verifying, TLS 1.2 or later, for exactly these values."""
    named = [pair for pair in zip(["--cacert", *_CA_VARIABLES], paths) if pair[1]]
    context = ssl.create_default_context()
    for name, path in named:
        if not os.path.exists(path or ""):
            raise RequestError("%s: no certificates at %s", name, path)
    # OpenSSL has read SSL_CERT_FILE and SSL_CERT_DIR by itself.
    for name, path in [pair for pair in named if pair[0][:4] != "SSL_"][:1]:
        kind = "capath" if os.path.isdir(path or "") else "cafile"
        try:
            context.load_verify_locations(**{kind: path})
        except OSError as error:
            text = "%s: cannot read certificates from %s: %s"
            raise RequestError(text, name, path, error) from None
    _require_tls_1_2(context)
    return context


def _has_no_certificates() -> bool:
    """Whether this Python finds no CA certificates at all."""
    paths = ssl.get_default_verify_paths()
    folder = paths.capath if paths.capath and os.listdir(paths.capath) else None
    loaded = _default_ssl_context().cert_store_stats()["x509"]
    return not (loaded or paths.cafile or folder)


@functools.lru_cache(maxsize=64)
def _origin(url: str) -> Tuple[str, str, int]:
    """Scheme, host and port of a URL."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname or "", port


def _network_error(
    error: Exception, url: str, via: str, reached: Iterable[str] = ()
) -> HtsgetException:
    """The exception of ours for one of the standard library's, which becomes its cause
    unless its text may hold what must not be shown."""
    where = _shown(url) + (" (through the proxy %s)" % via if via else "")
    text = _printable(getattr(error, "strerror", None) or str(error), 150)
    host = _origin("http://" + via if via else url)[1]
    number, tls_problem = getattr(error, "errno", 0), _tls_problem(error)
    is_unknown = number in _NO_SUCH_HOST and host not in reached
    words = text or type(error).__name__
    failure: HtsgetException = RetryableIOError("%s: %s" % (where, words), error)
    if tls_problem:
        failure = ProtocolError("%s: %s", where, tls_problem)
    elif isinstance(error, socket.gaierror) and is_unknown:
        failure = ProtocolError("%s: cannot find the host: %s", where, text)
    elif isinstance(error, http.client.IncompleteRead):
        failure = ContentLengthMismatch("%s: the answer was cut short", where)
    elif type(error) is http.client.BadStatusLine:
        return RetryableIOError("%s: the answer is not HTTP" % where)
    elif isinstance(error, (ValueError, http.client.InvalidURL)):
        return ProtocolError("%s: the request cannot be sent", where)
    elif isinstance(error, socket.timeout):
        failure = RetryableIOError("%s: timed out waiting for data" % where, error)
    return failure._marked(__cause__=error, _crowded=number in _TOO_MANY_FILES)


def _tls_problem(error: Exception) -> Optional[str]:
    """What is wrong with the server's TLS for good, if that is it."""
    reason = str(getattr(error, "reason", ""))
    # Python 3.6 has a CertificateError of its own.
    if reason == "CERTIFICATE_VERIFY_FAILED" or isinstance(error, ssl.CertificateError):
        text = _printable(getattr(error, "verify_message", "") or str(error), 150)
        # Python 3.6 does not say why.
        if re.search(r"local issuer|self[ -]signed|verify failed \(_ssl", text):
            if _has_no_certificates():
                return (
                    "this Python has no CA certificates: set SSL_CERT_FILE or use "
                    "--cacert"
                )
            text += "; for a private authority, use --cacert or SSL_CERT_FILE"
        return "the server's certificate is not trusted: " + text
    if isinstance(error, ssl.SSLError):
        # Python 3.6 does not know the newer reasons, but shows them.
        shown = reason + str(error).upper().replace(" ", "_")
        for pattern, words in _TLS_FAILURES.items():
            if re.search(pattern, shown):
                return "%s (%s)" % (words, _printable(reason or str(error), 60))
    return None


def _explanation(text: str) -> Tuple[str, str]:
    """The error and message in a body: JSON of whatever make, XML, HTML or text."""
    string = r'("(?:[^"\\]|\\.)*")'
    keys = ("message", "userMessage", "detail", "title", "msg")
    if re.match(r'\s*(\{|\[\s*[{"])', text):
        # Nothing else of a JSON document is shown: it might be a ticket.
        found = re.findall(r'"(error|%s)"\s*:\s*%s' % ("|".join(keys), string), text)
        said = {key: json.loads(value, strict=False) for key, value in reversed(found)}
        messages = [said[key] for key in keys if key in said]
        return said.get("error", ""), "".join(messages[:1])
    marked = re.findall(r"(?is)<(title|Code|Message)\b[^>]*>(.*?)</\1>", text)
    if marked and re.match(r"\s*<", text):
        import html

        return "", html.unescape(": ".join(inner for _, inner in marked))
    return "", re.sub(r"(?is)<(style|script)\b.*?</\1>|<[^<>]*>", " ", text)


def _refusal(answer: _Answer, asked: str) -> HtsgetException:
    """The exception for an answer that is an error (spec: "Errors")."""
    text = answer.text()
    error = message = ""
    with contextlib.suppress(ValueError):
        error, message = _explanation(text)
    login = answer.login
    if asked == "proxy" or answer.status == 407:
        asked = "proxy"
        scheme, host, _ = _origin(answer.url)
        login = "@" in (_proxy_for(scheme, host) or "")
    where = _shown(answer.url)
    if answer.via:
        where += " (through the proxy %s)" % answer.via
    refused = ClientError(
        answer.status,
        _printable(error or answer.reason, 80),
        _printable(message),
        where,
        text,
        asked + (" with login" if login and asked != "data block" else ""),
    )
    if answer.status not in _RETRIED_STATUS:
        return refused
    # By the server's clock: this machine's may be wrong.
    now = _timestamp(answer.fields.get("date", ""), time.time())
    return RetryableIOError(str(refused), refused)._marked(
        _retry_after=_retry_after(answer.fields.get("retry-after"), now),
        _crowded=answer.status in _CROWDED_STATUS,
    )


# ---- reading one part of a block
#
# There are three ways to ask for a block's bytes. Each block begins with the first one
# that its ticket allows, and only moves down. A part delivers its bytes once, in order;
# where it cannot go on it raises `_Restart`.

# Any sub-range may be asked for.
_RANGES = 0
# Only the ticket's own request, to the letter: its Range is signed or cannot be read,
# or the server refuses or misunderstands any other.
_OWN = 1
# The server answers the Range with the whole file; the slice is cut out.
_WHOLE = 2
_WAYS = ("in ranges", "only as the ticket does", "by cutting it out of the whole file")

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})\Z")
_CONTENT_RANGE = re.compile(
    r"(?:bytes\b)?[ =:]*([0-9]{1,18})-([0-9]{1,18})(?:/([0-9]{1,18}|\*))?\Z", re.I
)
_NO_CONTENT_RANGE = re.compile(r"bytes \*/([0-9]{1,18})\Z", re.I)
_Pieces = Generator[bytes, None, None]

_SIGNED = re.compile(r"[?&]X-Amz-SignedHeaders=([^&]*)", re.I)


class _Resource:
    """What is behind a URL that several blocks may share: its validators and size.
    Each is learned once, and kept until the object is known to have changed."""

    def __init__(self, first: int) -> None:
        # The first of the blocks that share it.
        self.first = first
        # Whether a Range was answered with 206, or with the whole file.
        self.is_ranged = self.is_rangeless = False
        # ETag, Last-Modified and size.
        self.known: List[Any] = ["", "", None]
        self._is_vouched = False

    def condition(self) -> Optional[str]:
        """The If-Range header; only a strong ETag will do (RFC 9110, 13.1.5)."""
        is_strong = self.known[0].startswith('"') and not self._is_vouched
        return self.known[0] if is_strong else None

    def conflict(self, answer: _Answer) -> str:
        """How an answer contradicts what is known, in words; like is compared with
        like, and what is missing says nothing."""
        (etag, date, total), (new_etag, new_date, new) = self.known, _evidence(answer)
        if self._is_vouched:
            return ""
        if None not in (total, new) and total != new:
            return "%d bytes, then %d" % (total, new)
        if etag and new_etag:
            is_same = etag.replace("W/", "", 1) == new_etag.replace("W/", "", 1)
            return "" if is_same else "ETag %s, then %s" % (etag, new_etag)
        if date and new_date and not _is_same_date(date, new_date):
            return "Last-Modified %s, then %s" % (date, new_date)
        return ""

    def learn(self, answer: _Answer, total: Optional[int]) -> None:
        """Take up an answer's validators, and the size that it shows."""
        etag, date, said = _evidence(answer)
        known_etag, known_date, known = self.known
        size = known if known is not None else total if said is None else said
        self.known = [known_etag or etag, known_date or date, size]
        self.is_ranged = self.is_ranged or answer.status == 206

    def vouch(self, answer: _Answer) -> bool:
        """Leave it to the ticket's MD5 whether it is one object, if sizes agree."""
        total = _evidence(answer)[2]
        self._is_vouched = total is not None and total == self.known[2]
        return self._is_vouched

    def ignores_ranges(self) -> None:
        """The whole file came for a Range: so it will for other blocks."""
        self.is_rangeless = True

    def recall(self, known: List[Any]) -> None:
        """Take up what an earlier run knew, or nothing."""
        self.known = known


def _evidence(answer: _Answer) -> Tuple[str, str, Any]:
    """ETag, Last-Modified and the size of the whole file, as far as an answer has them
    and can be believed: some servers give the length of the slice as the size."""
    fields = answer.fields
    etag, date = fields.get("etag", ""), fields.get("last-modified", "")
    text = fields.get("content-range", "")
    first, stop, total = _content_range(text) or (0, 0, None)
    is_believed = total is not None and total >= stop and total != stop - first
    return etag.strip(), date.strip(), total if is_believed else None


@functools.lru_cache(maxsize=64)
def _content_range(text: str) -> Optional[Tuple[int, int, Optional[int]]]:
    """Where the first byte of an answer lies in its file, where the last one ends, and
    the file's size if that is given, by a Content-Range; None if it does not say so."""
    match = _CONTENT_RANGE.match(text.strip())
    if match is None:
        return None
    first, last, total = match.groups()
    return int(first), int(last) + 1, None if total in (None, "*") else int(total)


def _is_same_date(*dates: str) -> bool:
    """Whether two dates are those of mirrors; a malformed one says nothing."""
    with contextlib.suppress(*_NO_DATE):
        one, other = map(email.utils.parsedate_to_datetime, dates)
        return abs((one - other).total_seconds()) <= _DATE_TOLERANCE
    return True


class _Block:
    """A data block: where its bytes lie, and what its server has shown of them."""

    def __init__(self, index: int, entry: DataBlock, resource: _Resource) -> None:
        self.index = index
        self.resource = resource
        # Bytes in the block, None where only its end will tell; the size by the Range;
        # the furthest end that the server has announced before it sent the data.
        self.size: Optional[int] = None
        self._range_size: Optional[int] = None
        self.announced: Optional[int] = None
        # The decoded content of a data URI.
        self.data: Optional[bytes] = None
        # Whether it has a Range, which is read once, from the first ticket, and where
        # the block begins in its file; for a Range that cannot be calculated with, the
        # bytes at the file's end that it asks for, 0 if it is of another kind.
        self.is_range = False
        self.base = 0
        self.suffix: Optional[int] = None
        self.way = _RANGES
        # What is handed out is only taken for the slice, until its end confirms it.
        self.is_guessed = False
        # URL, headers and ticket (0: the first) of requests for it, in one.
        self.request: Tuple[str, Dict[str, str], int] = ("", {}, 0)
        if _is_inline(entry):
            self.data = _decode_data_uri(entry.url, "data block %d" % (index + 1))
            self.size = self.announced = len(self.data)
        else:
            self.renew(entry, 0)
            self._read_range(self.request[1].get("Range"))
            signed = urllib.parse.unquote("".join(_SIGNED.findall(entry.url)))
            if "range" in signed.lower().split(";"):
                self.way = _OWN

    def _read_range(self, text: Optional[str]) -> None:
        if text is None:
            return
        self.is_range = True
        match = _RANGE.match(re.sub(r"\s", "", text.lower()))
        first, last = match.groups() if match else ("", "")
        if not first:
            self.suffix = int(last or 0)
            self.way = _OWN
            return
        self.base = int(first)
        if last:
            self.size = self._range_size = int(last) + 1 - self.base
            if self.size <= 0:
                text = "data block %d has a Range that ends before it begins"
                raise ProtocolError(text, self.index + 1)

    def renew(self, entry: DataBlock, ticket: int) -> None:
        """Take URL and headers from a ticket's entry."""
        url, headers = _without_userinfo(entry.url)
        for name, value in (entry.headers or {}).items():
            if name.lower() not in _FRAMING_HEADERS:
                headers[name.title()] = value
        self.request = url, headers, ticket

    def move_down(self, way: int) -> None:
        """Ask for it in another way from now on."""
        if way > self.way:
            self.way = way
            _log.info("data block %d: asking for it %s", self.index + 1, _WAYS[way])

    def guess(self, is_guessed: bool) -> None:
        """Note whether what is handed out is only taken for the slice."""
        self.is_guessed = is_guessed

    def announce(self, end: int) -> None:
        """The server said how far its data goes before it sent it."""
        self.announced = max(end, self.announced or 0)

    def learn_size(self, size: int) -> None:
        """The block has turned out to end here, if not at its Range's end."""
        self.size = size if self._range_size is None else min(size, self._range_size)

    def forget(self) -> None:
        """The object has changed: so may have its size, unless the Range gives it."""
        self.resource.recall(["", "", None])
        self.is_guessed = False
        self.announced = None
        self.size = self._range_size


class _Tickets:
    """The ticket of a transfer, its blocks, and their renewal when URLs expire."""

    def __init__(
        self, source: _Source, options: _Options, transport: _Transport
    ) -> None:
        self.source = source
        self.blocks: List[_Block] = []
        self._options = options
        self._lock = threading.Lock()
        # How often the ticket was renewed; blocks refused since they were served last.
        self._renewals = 0
        self._refused: Set[int] = set()
        # How many blocks `total` has counted, and their bytes.
        self._counted = 0, 0
        self.ticket = self._request(transport)
        resources: Dict[Any, _Resource] = {}
        for index, entry in enumerate(self.ticket.blocks):
            headers = (entry.headers or {}).items()
            others = frozenset(item for item in headers if item[0].lower() != "range")
            shared = resources.setdefault((entry.url, others), _Resource(index))
            self.blocks.append(_Block(index, entry, shared))

    def _request(self, transport: _Transport) -> Ticket:
        if isinstance(self.source, Ticket):
            return self.source
        return _ask_ticket_server(transport, self.source, self._options, _parse_ticket)

    def total(self) -> Optional[int]:
        """Bytes in all blocks; None while one of them is not known."""
        count, total = self._counted
        for block in self.blocks[count:]:
            if block.size is None:
                return None
            count, total = count + 1, total + block.size
            self._counted = count, total
        return total

    def served(self, block: _Block) -> None:
        """Note that a block was served: should it be refused, its URL has expired."""
        self._refused.discard(block.index)

    def renew(self, transport: _Transport, block: _Block, ticket: int) -> bool:
        """Ask for the ticket again after a URL of it was refused, as URLs expire.

        `ticket` is the one that the refused URL was of. False when the block was
        refused before and has not been served since, or there is nobody to ask.
        """
        with self._lock:
            if self._renewals > ticket:
                return True
            if isinstance(self.source, Ticket) or block.index in self._refused:
                return False
            level = logging.INFO if self._renewals else logging.WARNING
            text = "%s was refused and may have expired; asking for the ticket again"
            _log.log(level, text, _shown(block.request[0]))
            renewed = self._request(transport)
            if _outline(renewed) != _outline(self.ticket):
                text = "the ticket, requested again, has other data blocks"
                raise RetryableError(text)._marked(_transient=False)
            self._refused.add(block.index)
            self._renewals += 1
            for known, entry in zip(self.blocks, renewed.blocks):
                if known.data is None:
                    known.renew(entry, self._renewals)
            return True


_T = TypeVar("_T")


def _ask_ticket_server(
    transport: _Transport,
    request: _TicketRequest,
    options: _Options,
    parse: Callable[[bytearray], _T],
) -> _T:
    """The parsed answer of the ticket server, asked as often as the policy says."""
    retry = _Retry(options.max_retries, options.retry_wait)
    while True:
        try:
            headers, body = request.headers(), request.body
            answer = transport.request(request.url, headers, body, private=True)
            if answer.status != 200:
                raise _ticket_refusal(answer, request)
            raw = _read_json(answer)
            try:
                return parse(raw)
            except ProtocolError as broken:
                # Without framing it may just have been cut off.
                broken._marked(_transient=not answer.framed)
                raise
        except HtsgetException as error:
            seconds = retry.pause(error)
            _log.warning("%s; trying again in %.1f s", error, seconds)
        transport.wait(seconds)


def _ticket_refusal(answer: _Answer, request: _TicketRequest) -> HtsgetException:
    error = _refusal(answer, "ticket")
    if request.body and answer.status in (404, 405, 501):
        text = "the server does not appear to support multi-region requests"
        return ClientError(answer.status, answer.reason, text, _shown(request.url))
    return error


# The beginning of what cannot be a JSON object.
_NOT_AN_OBJECT = re.compile(rb"[\xef\xbb\xbf \t\r\n]*[^\xef\xbb\xbf \t\r\n{]")


def _read_json(answer: _Answer) -> bytearray:
    """A body that should be a JSON object; given up as soon as it cannot be one."""
    body, where = bytearray(), _shown(answer.url)
    is_gzip = "gzip" in answer.fields.get("content-encoding", "").lower()
    inflate = zlib.decompressobj(31) if is_gzip else None
    with contextlib.closing(answer):
        try:
            for data in answer.document():
                if inflate is not None:
                    data = inflate.decompress(data, _TICKET_LIMIT + 1 - len(body))
                body += data
                if len(body) >= _HEAD and _NOT_AN_OBJECT.match(body, 0, _ERROR_LIMIT):
                    break
                if len(body) > _TICKET_LIMIT:
                    raise ProtocolError("%s: the ticket is too large", where)
            if inflate is not None and not inflate.eof:
                raise zlib.error
        except zlib.error:
            raise ProtocolError("%s: the gzip data is not valid", where) from None
        except RetryableError:
            # JSON says itself where it ends.
            if answer.framed or not body.rstrip().endswith(b"}"):
                raise
    if _NOT_AN_OBJECT.match(body, 0, _ERROR_LIMIT):
        start = bytes(body[:_ERROR_LIMIT]).lstrip()
        raise ProtocolError("%s: %s", where, _instead_of_a_ticket(start))
    return body


def _instead_of_a_ticket(start: bytes) -> str:
    """What came instead of a ticket, and what to do about it."""
    kind = _kind(start)
    if kind in ("BGZF", "gzip"):
        with contextlib.suppress(zlib.error):
            kind = _kind(zlib.decompressobj(31).decompress(start, _HEAD)) or kind
    if kind:
        return "this is a %s file, not an htsget ticket; fetch it with curl" % kind
    if _is_page(start):
        return "this is a web page (a login?), not an htsget ticket"
    if start[:1] == b"<":
        return "this is XML: %s" % _printable(start.decode("utf-8", "replace"), 60)
    return "the answer is not a JSON object, so not an htsget ticket"


def _is_page(start: bytes) -> bool:
    return re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype )?html", start, re.I) is not None


class _Transfer:
    """What the parts of one transfer share: its tickets, connections and policy."""

    def __init__(self, source: _Source, options: _Options) -> None:
        self.options = options
        self.hosts = _Hosts()
        self.pace = _Pace(min(options.connections, _PARTS_MOST))
        self.transport = _Transport(options, self.hosts)
        self._is_stopped = False
        # The last warning and when it was given (time.monotonic).
        self._warned = "", 0.0
        try:
            self.tickets = _Tickets(source, options, self.transport)
        except BaseException:
            self.stop()
            raise

    def reopen(self) -> None:
        """Have new connections: those of an ended window are ended with it."""
        self.transport = _Transport(self.options, self.hosts)
        if self._is_stopped:
            self.stop()

    def start_over(self) -> None:
        """Take a new ticket, as the objects of the old one have changed."""
        self.tickets = _Tickets(self.tickets.source, self.options, self.transport)

    def stop(self) -> None:
        """End all connections and waits, in all threads, for good."""
        self._is_stopped = True
        self.transport.stop()

    def new_retry(self) -> _Retry:
        """A count of retries."""
        return _Retry(self.options.max_retries, self.options.retry_wait)

    def pause(self, retry: _Retry, error: HtsgetException, url: str) -> None:
        """Wait before the next attempt, or raise the error if there is none."""
        seconds = retry.pause(error)
        if error._crowded:
            # That goes for all connections to the server.
            self.hosts.postpone(url, seconds)
        # Connections that fail alike are mentioned once.
        text, now = str(error), time.monotonic()
        is_new = self._warned[0] != text or now - self._warned[1] > seconds / 2
        self._warned = text, now
        level = logging.WARNING if is_new else logging.INFO
        _log.log(level, "%s; trying again in %.1f s", text, seconds)
        self.transport.wait(seconds)


class _Asked(NamedTuple):
    """A request for the bytes from `start` up to `end` (None: all) of a block;
    `is_changed`: with another Range than the ticket's."""

    start: int
    end: Optional[int]
    headers: Dict[str, str]
    is_changed: bool

    def size(self) -> Optional[int]:
        """How many bytes these are, if the end is known."""
        return None if self.end is None else self.end - self.start


def _ask(block: _Block, start: int, end: Optional[int]) -> _Asked:
    """The request for part of a block; for all of it, or where that is the only way,
    the ticket's own. Ranges are closed wherever the end is known: some servers fail on
    open ones."""
    headers = block.request[1]
    is_all = start == 0 and (end is None or end == block.size)
    if is_all or block.way != _RANGES:
        return _Asked(0, block.size, headers, False)
    last = "" if end is None else block.base + end - 1
    headers = dict(headers, Range="bytes=%d-%s" % (block.base + start, last))
    condition = block.resource.condition()
    if condition is not None:
        headers["If-Range"] = condition
    return _Asked(start, end, headers, True)


class _Span(NamedTuple):
    """Where the body of an answer lies, in bytes from the block's start.

    `is_final`: the block or its file ends where the body ends. `is_guessed`: the body
    is taken for the slice that was asked for, but nothing says so yet.
    """

    start: int
    end: Optional[int]
    is_final: bool = False
    is_guessed: bool = False


# What `_locate` returns: the span, None when the answer is of no use, and the way that
# the block should be asked for from now on.
_Located = Tuple[Optional[_Span], int]


def _locate(block: _Block, asked: _Asked, answer: _Answer) -> _Located:
    """Where in the block the answer's body lies; ProtocolError if it cannot. Whatever
    contradicts a changed Range, the ticket's own request must tell."""
    length, said = answer.size, _content_range(answer.fields.get("content-range", ""))
    if answer.status == 200:
        return _locate_full(block, asked, length)
    if not block.is_range and not asked.is_changed:
        # The range is in the query; what a Range would mean is anybody's guess.
        return _Span(0, length, is_final=True), _OWN
    if "multipart/" in answer.fields.get("content-type", "").lower():
        problem = "is multipart"
    elif "content-range" not in answer.fields:
        if asked.is_changed and (length is None or length != asked.size()):
            return None, _OWN
        if asked.end is None or length is None or length <= asked.end:
            return _locate_unlabelled(block, asked, length)
        problem = "has more than the range that was asked for"
    elif said is None:
        problem = "has a malformed Content-Range"
    else:
        if said[1] > said[0] and length in (None, said[1] - said[0]):
            located = _locate_partial(block, asked, said)
            if located is not None:
                return located
        problem = "has another range than was asked for"
    if asked.is_changed:
        return None, _OWN
    raise _damaged(answer, problem)


def _locate_full(block: _Block, asked: _Asked, length: Optional[int]) -> _Located:
    """A 200: the slice exactly when its length says so, else the whole file."""
    if length is not None and length == asked.size():
        return _Span(asked.start, asked.end), block.way
    if asked.is_changed:
        # The ticket's slice or the whole file: only the ticket's own request can tell.
        return None, _OWN
    if not block.is_range or (block.base == 0 and block.suffix is None):
        # The same, whether it is the slice or the whole file.
        return _Span(0, length, is_final=True), block.way
    if block.suffix is not None or (length is not None and length <= block.base):
        text = "data block %d: the server does not honour its Range"
        raise ProtocolError(text, block.index + 1)._marked(_transient=True)
    is_whole = block.way == _WHOLE or block.resource.is_rangeless
    if length is None and asked.end is not None and not is_whole:
        return _Span(0, asked.end, is_guessed=True), block.way
    end = None if length is None else length - block.base
    return _Span(-block.base, end, is_final=True), _WHOLE


def _locate_unlabelled(block: _Block, asked: _Asked, length: Optional[int]) -> _Located:
    """A 206 without Content-Range: only its length can say that it is the slice."""
    if length is None and asked.end is not None:
        return _Span(0, asked.end, is_guessed=block.base > 0), block.way
    end = None if length is None else asked.start + length
    return _Span(asked.start, end, is_final=asked.end is None), block.way


def _locate_partial(
    block: _Block, asked: _Asked, said: Tuple[int, int, Optional[int]]
) -> Optional[_Located]:
    """A 206: what its Content-Range says must begin where it was asked to, or contain
    the slice; it may end earlier only with the file. A total that is the slice's
    length is not believed."""
    first, stop, total = said
    if block.suffix is not None:
        size = min(block.suffix, stop)
        is_other = block.suffix and (stop != total or stop - first != size)
        return None if is_other else (_Span(0, stop - first, is_final=True), _OWN)
    start, end = first - block.base, stop - block.base
    is_wider = 0 <= start < asked.start and asked.end is not None and end >= asked.end
    if start != asked.start and not is_wider:
        return None
    knows_only_its_own = asked.is_changed and (start, end) == (0, block.size)
    way = _OWN if knows_only_its_own else block.way
    if asked.end is None:
        return _Span(start, end, is_final=total is None or total <= stop), way
    believed = total == stop and (first > 0 or block.way != _RANGES)
    return _Span(start, end, is_final=believed and end < asked.end), way


def _damaged(answer: _Answer, problem: str) -> HtsgetException:
    """The error for an answer that contradicts its request or itself; it may have been
    damaged on the way."""
    error = ProtocolError("%s: the answer %s", _shown(answer.url), problem)
    return error._marked(_transient=True)


class _Part:
    """A run of a block's bytes: from `start` up to `end` (None: the block's end), of
    which the next one to deliver is at `position`."""

    def __init__(
        self, transfer: _Transfer, block: _Block, start: int, end: Optional[int]
    ) -> None:
        self.block = block
        self.start = self.position = start
        self.end = end
        self._transfer = transfer
        self._transport = transfer.transport
        self._tickets = transfer.tickets
        # A way down that one answer has suggested, and the ticket it was of: it takes
        # a second answer to believe it.
        self._suggested = -1, -1
        self._way = block.way
        # Why the last attempt failed.
        self._failure: Optional[HtsgetException] = None

    def limit(self) -> Optional[int]:
        """Where the part ends, as far as is known."""
        end, size = self.end, self.block.size
        if end is None or size is None:
            return size if end is None else end
        return end if end < size else size

    def is_complete(self) -> bool:
        """Whether nothing is missing; False while the end is not known, or in doubt."""
        limit = self.limit()
        is_in_doubt = self.block.is_guessed and self.position > self.start
        return limit is not None and self.position >= limit and not is_in_doubt

    def stop_at(self, end: Optional[int]) -> None:
        """Let the part end somewhere else; called by the thread that reads it."""
        self.end = end

    def read(self, is_crowded: Callable[["_Part"], bool]) -> _Pieces:
        """Deliver the bytes, with retries. `is_crowded` is asked when the server
        refuses this connection: True ends the part here for others to go on."""
        if self.block.data is not None:
            begin, self.position = self.position, self.limit() or 0
            yield self.block.data[begin : self.position]
            return
        retry = self._transfer.new_retry()
        self._failure = None
        while not self.is_complete():
            url = self.block.request[0]
            try:
                for data in self._attempt():
                    self.position += len(data)
                    retry.progress(len(data))
                    yield data
            except HtsgetException as error:
                self._failure = error
                if error._crowded and is_crowded(self):
                    self._transfer.hosts.postpone(url, error._retry_after)
                    return
                if not error._is_free:
                    self._transfer.pause(retry, error, url)

    def _attempt(self) -> Iterator[bytes]:
        """Ask once for what is missing and deliver what comes."""
        block = self.block
        if self.position > 0 and (block.way != _RANGES or block.is_guessed):
            text = "%s: cannot be continued in the middle"
            reason = self._failure or RetryableError(text, _shown(block.request[0]))
            raise _Restart(block.index, reason._marked(_is_free=self._has_moved()))
        asked, answer = self._open()
        with contextlib.closing(answer):
            span, way = _locate(block, asked, answer)
            if way != block.way:
                # Believed when the answer leaves no doubt, or a second one confirms it
                # and nothing else has changed between them.
                suggested, self._suggested = self._suggested, (way, block.request[2])
                is_certain = span is not None or answer.status == 200
                if is_certain or suggested == self._suggested:
                    block.move_down(way)
            if span is None:
                text = "%s does not say what it sends, or ignores the Range header"
                raise RetryableError(text, _shown(answer.url))._marked(_is_free=True)
            if answer.status == 206 or not block.is_range or span.start == -block.base:
                # A slice that is sent as a file of its own has its own validators.
                is_file = answer.status == 200 and span.is_final
                total = span.end - span.start if is_file and span.end else None
                block.resource.learn(answer, total)
            if span.end is not None and not span.is_guessed:
                if span.is_final:
                    self._learn_size(span.end)
                block.announce(span.end)
            block.guess(span.is_guessed)
            yield from self._deliver(span, answer)

    def _has_moved(self) -> bool:
        """Whether the block is asked for in another way than at first: as it only moves
        down, to go on that way does not count as a retry."""
        return self.block.way != self._way

    def _deliver(self, span: _Span, answer: _Answer) -> Iterator[bytes]:
        """What an answer has of the part; at its end, whether that was all."""
        offset, begun = span.start, self.position
        for data in _checked_body(answer):
            stop = offset + len(data)
            if span.end is not None and stop > span.end:
                if not span.is_guessed or self.block.way == _WHOLE:
                    raise _damaged(answer, "has more data than it announces")
                # What was taken for the slice is the whole file.
                self.block.move_down(_WHOLE)
                self.block.resource.ignores_ranges()
                reason = _damaged(answer, "ignores the Range header")
                raise _Restart(self.block.index, reason._marked(_is_free=True))
            limit = self.limit()
            cut = len(data) if limit is None else max(0, limit - offset)
            new = data[max(0, self.position - offset) : cut]
            offset = stop
            if new:
                yield new
            # The limit changes when the rest of the block is left to others.
            limit = self.limit()
            if limit is not None and offset >= limit and not span.is_guessed:
                if offset != span.end:
                    return
        self._check_end(span, answer, offset, self.position > begun)

    def _check_end(
        self, span: _Span, answer: _Answer, offset: int, is_new: bool
    ) -> None:
        """The body ended at `offset`: is that the end of the part?"""
        block, limit = self.block, self.limit()
        is_entire = span.end is None or offset == span.end
        # The whole file cannot be as long as a slice that begins inside it.
        is_slice = span.start < 0 and offset - span.start == block.size
        is_short = limit is not None and offset < limit and span.end is None
        # Nothing tells such an end from a cut connection.
        is_doubtful = not answer.framed and (span.is_guessed or is_short)
        if not is_entire or is_slice or is_doubtful:
            text = "%s: the answer ended early, at byte %d of data block %d"
            values = _shown(answer.url), offset, block.index + 1
            raise ContentLengthMismatch(text, *values)
        block.guess(False)
        if limit is not None and offset >= limit:
            return
        if not span.is_final:
            # Some servers give a range in pieces.
            text = "%s: gives less than was asked for"
            reason = ContentLengthMismatch(text, _shown(answer.url))
            raise reason._marked(_is_free=is_new)
        self._learn_size(offset)
        if not answer.framed:
            text = "%s does not announce the length of data block %d: taking %d bytes"
            _log.warning(text, _shown(answer.url), block.index + 1, offset)

    def _learn_size(self, size: int) -> None:
        """The block ends at `size`; only a Range may promise more than there is."""
        known = self.block.announced
        if self.position > 0 and known is not None and size < known:
            raise self._changed("%d bytes, then %d" % (known, size))
        self.block.learn_size(size)

    def _changed(self, conflict: str) -> _Restart:
        text, url = "%s has changed during the transfer (%s)", self.block.request[0]
        reason = ProtocolError(text, _shown(url), _printable(conflict))
        reason._marked(_transient=True, _is_changed=True)
        return _Restart(self.block.index, reason)

    def _open(self) -> Tuple[_Asked, _Answer]:
        """What was asked, and an answer that has data of the known object."""
        block, options = self.block, self._transfer.options
        for attempt in range(1 + _REPLICA_TRIES):
            asked, ticket = _ask(block, self.position, self.limit()), block.request[2]
            answer = self._request(asked)
            is_empty = answer.status == 206 and answer.size == 0 != asked.size()
            if answer.status not in (200, 206) or is_empty:
                answer = self._on_refusal(asked, answer, ticket)
            self._tickets.served(block)
            # A slice that is sent as a file of its own has its own validators.
            is_slice = answer.status == 200 and answer.size == asked.size()
            is_own_file = is_slice and block.base > 0 and not asked.is_changed
            conflict = "" if is_own_file else block.resource.conflict(answer)
            if not conflict:
                return asked, answer
            can_vouch = options.verify and self._tickets.ticket.md5 is not None
            if attempt == _REPLICA_TRIES and can_vouch and block.resource.vouch(answer):
                return asked, answer
            # Behind a balancer, the next answer may come from another replica.
            answer.close()
            self._transport.wait(random.uniform(0, 0.002) * attempt)
        raise self._changed(conflict)

    def _request(self, asked: _Asked) -> _Answer:
        """The answer to a request, once its server may be asked."""
        url, hosts = self.block.request[0], self._transfer.hosts
        while hosts.delay(url) > 0:
            # Not all at the same moment.
            self._transport.wait(hosts.delay(url) + random.uniform(0, 0.1))
        return self._transport.request(url, asked.headers)

    def _on_refusal(self, asked: _Asked, answer: _Answer, ticket: int) -> _Answer:
        """The answer to the same request after all; an error that is free when another
        one may help, else the refusal.

        That a changed Range is refused means something only if the ticket's own
        request is served and the changed one is then refused once more; if both are
        refused, the URL has expired.
        """
        status, refusal = answer.status, _damaged(answer, "has no data")
        if status != 206:
            refusal = _refusal(answer, "data block")
        answer.close()
        reason = RetryableError("%s was refused", _shown(answer.url))
        if asked.is_changed and status in _RANGE_REFUSED_STATUS:
            own = _ask(self.block, 0, None)
            proof = self._request(own)
            if proof.status in (200, 206):
                proof.close()
                answer = self._request(asked)
                if answer.status in (200, 206) and answer.size != 0:
                    return answer
                answer.close()
                is_twice = answer.status == status in (206, 416)
                if is_twice and self._is_end(own, proof, answer):
                    raise reason._marked(_is_free=True)
                is_same = self.block.request[2] == ticket
                if is_same and answer.status in _RANGE_REFUSED_STATUS:
                    self.block.move_down(_OWN)
                raise reason._marked(_is_free=self._has_moved())
            status, refusal = proof.status, _refusal(proof, "data block")
        if status in _EXPIRED_STATUS:
            if self._tickets.renew(self._transport, self.block, ticket):
                raise reason._marked(_is_free=True)
        raise refusal

    def _is_end(self, own: _Asked, proof: _Answer, answer: _Answer) -> bool:
        """Whether the block ends at the part's position, as the answer to the ticket's
        own request shows; if so, the size is learned."""
        base, span = self.block.base, _locate(self.block, own, proof)[0]
        if span is None or self.block.resource.conflict(proof):
            return False
        end, total = span.end, _evidence(proof)[2]
        if end is None or (end < self.position and total is None):
            # The server gives ranges in pieces, or no length: the refusal must tell.
            said = answer.fields.get("content-range", "").strip()
            match = _NO_CONTENT_RANGE.match(said)
            if match is None and proof.status == 200:
                # The whole of it: no piece, and nothing that says where it ends.
                return False
            end = int(match.group(1)) - base if match else self.position
            if self.position == self.start and not match:
                # Of a part that begins beyond the end nobody knows where that is.
                raise ContentLengthMismatch("%s: no data", _shown(answer.url))
        is_at_end = end == self.position or end < self.position == self.start
        if not is_at_end or (total is not None and total - base > end):
            return False
        self._learn_size(max(0, end))
        return True


def _checked_body(answer: _Answer) -> Iterator[bytes]:
    """The body; an error when its label is wrong in a way that changes the bytes."""
    is_html = "text/html" in answer.fields.get("content-type", "").lower()
    coding = answer.fields.get("content-encoding", "identity").strip() or "identity"
    pieces = answer.pieces()
    start = next(pieces, b"")
    if is_html or coding.lower() != "identity":
        # A label that may be wrong: the first bytes decide.
        for data in pieces:
            start += data
            if len(start) >= _HEAD:
                break
        if coding.lower() != "identity" and _kind(start) == "gzip":
            text = "%s: the data was compressed on the way (Content-Encoding: %s)"
            raise ProtocolError(text, _shown(answer.url), _printable(coding, 40))
    if _is_page(start):
        raise ProtocolError("%s: a web page instead of data", _shown(answer.url))
    yield start
    yield from pieces


# ---- several parts, delivered in order
#
# The window reads parts ahead and delivers them in order; it knows nothing of outputs.


class _Pace:
    """Decides how many connections a transfer uses, by the CPU time of its threads.

    One connection, read by the caller's own thread, is fastest when the processor is
    the limit; several are while the transfer mostly waits.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.wanted = 1
        self._lock = threading.RLock()
        # Each thread's CPU time and the time when it was last counted.
        self._mine = threading.local()
        self._cpu = self._sampled = 0.0
        # Seconds that the output or the stream's reader took of the interval.
        self._delivery = 0.0
        # Samples in a row that found it busy, and how many it takes.
        self._busy = 0
        self._patience = _BUSY_SAMPLES
        # Until when a server that refused connections is spared, and for how long.
        self._crowded_until = 0.0
        self._crowded_for = _CROWDED
        # How often it helped to let connections go.
        self._rescues = 0

    def may_cut(self) -> bool:
        """Whether blocks may be cut into pieces for several connections."""
        return self.most > 1 and not self._is_sparing()

    def is_due(self) -> bool:
        """Whether it is time for the calling thread's next sample."""
        return time.monotonic() - getattr(self._mine, "last", (0.0,))[0] >= _SAMPLE

    def delivered(self, seconds: float) -> None:
        """Count the time of a delivery: a slow output is not a slow server."""
        self._delivery += seconds

    def sample(self, may_grow: bool, is_whole: bool) -> None:
        """Count the calling thread's CPU time; and adapt to what all have used, if the
        most important one of them is not missing in it (`is_whole`)."""
        now, cpu, mine = time.monotonic(), _thread_time(), self._mine
        before = getattr(mine, "last", (now, cpu))[1]
        with self._lock:
            self._cpu += cpu - before
            mine.last = now, cpu
            # The first sample only begins the interval.
            self._sampled = self._sampled or now
            passed = now - self._sampled
            if not is_whole or passed < _SAMPLE:
                return
            use = max(self._cpu, self._delivery) / passed
            self._cpu, self._delivery, self._sampled = 0.0, 0.0, now
            self._busy = self._busy + 1 if use > _BUSY else 0
            if use < _IDLE and may_grow:
                self.grow()
            elif self._busy >= self._patience and self.wanted > 1:
                # May oscillate: require twice the samples next time.
                self._patience *= 2
                self.wanted = 1

    def grow(self) -> None:
        """Use twice as many, unless a server is to be spared."""
        with self._lock:
            if not self._is_sparing():
                self.wanted = min(2 * self.wanted, self.most)

    def _is_sparing(self) -> bool:
        """Whether a server has refused one of several connections lately."""
        return time.monotonic() < self._crowded_until

    def crowd(self) -> None:
        """A server refuses one of several connections: use half as many, and grow
        again late."""
        with self._lock:
            self.wanted = max(1, self.wanted // 2)
            self._crowded_until = time.monotonic() + self._crowded_for
            self._crowded_for *= 2

    def rescue(self) -> None:
        """It helped to let connections go; the second time that is no coincidence."""
        self._rescues += 1
        if self._rescues == 2:
            self.limit(1)

    def limit(self, most: int) -> None:
        """Use no more than this from now on."""
        with self._lock:
            self.most = max(1, most)
            self.wanted = min(self.wanted, self.most)


class _Slot:
    """A part in the window, read by the caller's own thread or ahead by a helper, with
    what was read of it and the error that ended it."""

    def __init__(self, part: _Part, is_own: bool) -> None:
        self.part = part
        self.is_own = is_own
        self.held = 0
        self.is_done = False
        self._data: List[bytes] = []
        self._error: Optional[BaseException] = None

    def put(self, data: bytes) -> None:
        """Add data that was read."""
        self._data.append(data)
        self.held += len(data) + _CHUNK_COST

    def end(self, error: Optional[BaseException] = None) -> None:
        """Nothing more comes."""
        self._error = error
        self.is_done = True

    def take(self) -> List[bytes]:
        """Remove and return what is there; raises the error once all is taken."""
        data, self._data, self.held = self._data, [], 0
        if not data and self._error is not None:
            raise self._error
        return data

    def key(self) -> Tuple[int, int]:
        """Where it stands in the order of the data."""
        return self.part.block.index, self.part.start


# A part of a block: its number, start and end (None: the block's end).
_Run = Tuple[int, int, Optional[int]]


class _Window:
    """Reads the blocks from a place on, several parts at once if that pays, and
    delivers their bytes in order.

    At first the caller's thread reads by itself. While it mostly waits, helpers read
    ahead into slots of bounded size, and the caller's thread delivers what they read.
    """

    def __init__(self, transfer: _Transfer, index: int, offset: int) -> None:
        self._transfer = transfer
        self._transport = transfer.transport
        self._pace = transfer.pace
        # Bytes that a slot holds, and that a block is cut into.
        window = min(self._pace.most * _WINDOW_EACH, _WINDOW_MOST)
        self._piece = window // self._most_slots()
        # What no slot reads yet: runs in order, then the blocks from `next` on.
        self._unread: List[_Run] = [(index, offset, None)] if offset > 0 else []
        self._next = index + len(self._unread)
        self._slots: Deque[_Slot] = collections.deque()
        # On one lock: something came for the caller's thread; there is work or room.
        lock = threading.RLock()
        self._arrived = threading.Condition(lock)
        self._needed = threading.Condition(lock)
        self._helpers: List[threading.Thread] = []
        # When the caller's thread began to wait for data (time.monotonic), and whether
        # full slots should give up their connections for it.
        self._waits_since: Optional[float] = time.monotonic()
        self._is_starving = False

    def chunks(self) -> Generator[Tuple[int, int, bytes], None, None]:
        """All bytes in order, as (block, offset in it, data)."""
        while True:
            slot = self._head()
            if slot is None:
                return
            offset = slot.part.start
            for data in self._read_own(slot) if slot.is_own else self._fetched(slot):
                self._waits_since = None
                begun = time.monotonic()
                yield slot.part.block.index, offset, data
                offset += len(data)
                self._waits_since = time.monotonic()
                self._pace.delivered(self._waits_since - begun)
                self._sample(is_own=True)
            with self._arrived:
                self._slots.popleft()
                if self._pace.wanted > 1:
                    # A lone helper only watches: not to be woken block by block.
                    self._needed.notify_all()

    def close(self) -> None:
        """End all helpers, within a second in all."""
        self._transport.stop()
        with self._arrived:
            self._needed.notify_all()
        deadline = time.monotonic() + 1.0
        for thread in self._helpers:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _head(self) -> Optional[_Slot]:
        """The slot that is delivered next; None at the end."""
        with self._arrived:
            while True:
                if self._slots and not self._is_due():
                    return self._slots[0]
                if self._is_all_claimed():
                    return None
                if self._pace.most > 1 and not self._helpers:
                    # It watches the caller's thread, and is the first to help it.
                    self._add_helper()
                if self._pace.wanted == 1:
                    self._claim(is_own=True)
                else:
                    self._rest(self._arrived)

    def _read_own(self, slot: _Slot) -> Iterator[bytes]:
        """Read a part in the caller's thread."""
        part = slot.part
        for data in part.read(self._is_crowded):
            if part.is_complete() and self._pace.wanted == 1:
                self._ask_ahead()
            yield data
            self._adjust(part)

    def _ask_ahead(self) -> None:
        """Ask for the next block while the last bytes of this one are written: the
        server takes a moment to answer. Only where it answers a Range with 206, which
        says what bytes these are."""
        with self._arrived:
            if self._unread or self._is_all_claimed():
                return
            block = self._transfer.tickets.blocks[self._next]
        url, headers, _ = block.request
        is_told = block.is_range and block.size and block.resource.is_ranged
        if is_told and self._transfer.hosts.delay(url) <= 0:
            self._transport.ask_ahead(url, headers)

    def _adjust(self, part: _Part) -> None:
        """Leave the rest of the block that the caller's thread reads to helpers, if
        there are any; take it back when there are none."""
        pace = self._pace
        if pace.wanted == 1 and part.end is None:
            return
        with self._arrived:
            rest = self._unread[0] if self._unread else None
            end = part.position + self._piece
            if pace.wanted > 1 and part.end is None and self._can_cut(part.block, end):
                part.stop_at(end)
                self._unread.insert(0, (part.block.index, end, None))
                self._needed.notify_all()
            elif pace.wanted == 1 and rest and rest[:2] == (part.block.index, part.end):
                part.stop_at(rest[2])
                del self._unread[0]

    def _fetched(self, slot: _Slot) -> Iterator[bytes]:
        """What a helper reads of a part, as it comes."""
        while True:
            with self._arrived:
                self._wait_for(slot)
                is_done, data = slot.is_done, slot.take()
                self._needed.notify_all()
            yield from data
            if is_done and not data:
                return

    def _wait_for(self, slot: _Slot) -> None:
        """Wait until a helper has read something of a part, or its end.

        If nothing comes for long, the server may handle only so many connections:
        close the idle ones, then have full slots give up theirs. Use a single one from
        then on if that has helped.
        """
        since = looked = time.monotonic()
        let_go = 0.0
        while not slot.held and not slot.is_done:
            self._rest(self._arrived)
            now = time.monotonic()
            if now - looked > _STARVED:
                looked = now
                if self._transport.close_idle():
                    let_go = now
            if now - since > _LET_GO and not self._is_starving:
                self._is_starving, let_go = True, now
                self._needed.notify_all()
        self._is_starving = False
        if time.monotonic() - let_go < _STARVED / 2:
            self._pace.rescue()

    def _rest(self, change: threading.Condition) -> None:
        """Wait a moment for a change (with the lock)."""
        self._transport.wait(0)
        change.wait(_SAMPLE)
        self._sample(is_own=change is self._arrived)

    def _sample(self, is_own: bool) -> None:
        if self._pace.is_due():
            with self._arrived:
                # While the caller's thread does not wait, only it knows what it used.
                self._pace.sample(self._may_grow(), is_own or self._is_stalled())

    def _is_stalled(self) -> bool:
        """Whether the caller's thread has waited for a while."""
        since = self._waits_since
        return since is not None and time.monotonic() - since > 2 * _SAMPLE

    # Who reads what.

    def _most_slots(self) -> int:
        """Twice as many as connections, so that none waits for the delivery."""
        return min(2 * self._pace.most, _PARTS_MOST)

    def _is_due(self) -> bool:
        """Whether what was given back comes before all that is being read."""
        first = self._slots[0].key() if self._slots else (-1, 0)
        return bool(self._unread) and self._unread[0][:2] < first

    def _is_all_claimed(self) -> bool:
        return not self._unread and self._next >= len(self._transfer.tickets.blocks)

    def _may_grow(self) -> bool:
        """Whether there is work for more connections, and no server asks to wait."""
        own = self._slots[0].part if self._slots and self._slots[0].is_own else None
        is_big = own is not None and self._can_cut(own.block, own.position)
        work = is_big or not self._is_all_claimed()
        return work and not self._transfer.hosts.is_patient()

    def _claim(self, is_own: bool) -> _Slot:
        """Make a slot for the next unread part, a piece of a block if helpful."""
        blocks = self._transfer.tickets.blocks
        if self._unread:
            index, start, end = self._unread.pop(0)
        else:
            index, start, end = self._next, 0, None
            self._next += 1
        cut = start + self._piece
        if not is_own and end is None and self._can_cut(blocks[index], cut):
            self._unread.insert(0, (index, cut, end))
            end = cut
        slot = _Slot(_Part(self._transfer, blocks[index], start, end), is_own)
        self._slots.insert(sum(s.key() < slot.key() for s in self._slots), slot)
        return slot

    def _can_cut(self, block: _Block, at: int) -> bool:
        """Whether a block's Range may be changed, and what follows is worth it."""
        return (
            block.data is None
            and block.size is not None
            and block.size - at > self._piece // 2
            and block.way == _RANGES
            and not block.is_guessed
            and block.resource.is_ranged
            and self._pace.may_cut()
        )

    def _is_crowded(self, part: _Part) -> bool:
        """A server refuses the connection of a part: if others are open, give the rest
        of the part back, for fewer connections to read."""
        with self._arrived:
            readers = [slot for slot in self._slots if not slot.is_done]
            if len(readers) < 2:
                return False
            self._pace.crowd()
            if self._slots[0].is_own and self._slots[0].part is part:
                return False
            self._give_back(part)
            return True

    def _give_back(self, part: _Part) -> None:
        """Leave the rest of a part unread, joined with what is unread of its block:
        fewer requests, while blocks are not cut."""
        runs: List[_Run] = []
        rest = part.block.index, part.position, part.end
        part.stop_at(part.position)
        for index, start, end in sorted([*self._unread, rest], key=lambda run: run[:2]):
            if runs and runs[-1][0] == index and runs[-1][2] == start:
                index, start = runs.pop()[:2]
            runs.append((index, start, end))
        self._unread = runs

    # The helpers' side.

    def _add_helper(self) -> None:
        # A daemon, so that nothing can keep the process from ending.
        thread = threading.Thread(target=self._help, name="htsget", daemon=True)
        try:
            with _signals_blocked():
                thread.start()
            self._helpers.append(thread)
        except RuntimeError:
            # The system has no more threads: go on with those that there are.
            self._pace.limit(len(self._helpers))

    def _help(self) -> None:
        """Read parts ahead until the window ends."""
        with contextlib.suppress(_Stopped):
            while True:
                slot = self._next_ahead()
                error: Optional[BaseException] = None
                try:
                    self._read_ahead(slot)
                except _Stopped:
                    raise
                except BaseException as failure:
                    error = failure
                with self._arrived:
                    slot.end(error)
                    self._arrived.notify()

    def _next_ahead(self) -> _Slot:
        """The next part to read ahead, once there is need and room for it."""
        with self._arrived:
            while True:
                if self._pace.wanted == 1 and self._is_stalled() and self._may_grow():
                    # While the caller's thread waits for a server, others may, too.
                    self._pace.grow()
                reading = sum(not slot.is_done for slot in self._slots)
                room = len(self._slots) < self._most_slots()
                # Full slots wait for what was given back, and is due before them.
                allowed = (reading < self._pace.wanted and room) or self._is_due()
                if self._pace.wanted > 1 and allowed and not self._is_all_claimed():
                    if len(self._helpers) < self._pace.wanted:
                        self._add_helper()
                    return self._claim(is_own=False)
                self._rest(self._needed)

    def _read_ahead(self, slot: _Slot) -> None:
        """Read a part into its slot, as far as there is room."""
        while not slot.part.is_complete():
            with contextlib.closing(slot.part.read(self._is_crowded)) as pieces:
                for data in pieces:
                    with self._arrived:
                        slot.put(data)
                        if slot is self._slots[0]:
                            self._arrived.notify()
                        while slot.held >= self._piece:
                            if self._is_starving:
                                # Another part may be waiting for the connection.
                                pieces.close()
                            self._rest(self._needed)
                    self._sample(is_own=False)


# ---- output and journal
#
# Where the bytes go. An output knows positions in bytes, and nothing of blocks; the
# journal of a path says what a later run can prove of the bytes that are kept.


@contextlib.contextmanager
def _naming(path: Optional[str]) -> Iterator[None]:
    """Have the errors of what was opened here carry its path."""
    try:
        yield
    except OSError as error:
        if path is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, path) from None


class _Output:
    """A binary file object that takes the data, from its current position on. With a
    path, it was opened here, and is closed here."""

    def __init__(self, stream: Any, path: Optional[str] = None) -> None:
        self._stream = stream
        self._path = path
        # What to call it in messages.
        self.name = os.path.basename(path or "output")
        # Bytes of the last write that have got there.
        self.taken = 0
        # Where the data begins, if the stream can be taken back there.
        self._start: Optional[int] = None
        with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
            self._start = self._find_start(stream)

    def _find_start(self, stream: Any) -> Optional[int]:
        """Where a stream stands; None if it is not seekable or cannot be truncated."""
        raw = getattr(stream, "raw", stream)
        if getattr(type(raw), "truncate", raw.truncate) is IOBase.truncate:
            return None
        if hasattr(stream, "seekable") and not stream.seekable():
            return None
        with contextlib.suppress(AttributeError, OSError):  # BytesIO has no number
            number = stream.fileno()
            mode = os.fstat(number).st_mode
            if not stat.S_ISREG(mode) and not (self._path and stat.S_ISCHR(mode)):
                return None
            if fcntl and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_APPEND:
                # As after ">>" in a shell, where the position begins at 0.
                stream.seek(0, os.SEEK_END)
        return int(stream.tell())

    def is_seekable(self) -> bool:
        """Whether `truncate` works."""
        return self._start is not None

    def write(self, data: bytes) -> None:
        """Write all of `data`, also to what takes less at once."""
        self.taken = 0
        with _naming(self._path):
            while self.taken < len(data):
                count = self._stream.write(data[self.taken :])
                if count is None and not isinstance(self._stream, RawIOBase):
                    count = len(data)
                if not count:
                    raise BlockingIOError(errno.EAGAIN, "the output takes no more data")
                self.taken += count

    def truncate(self, position: int) -> None:
        """Forget what was written from `position` on."""
        with _naming(self._path):
            self._stream.seek((self._start or 0) + position)
            try:
                self._stream.truncate()
            except OSError as error:
                # A device has no length.
                if error.errno != errno.EINVAL:
                    raise

    def sync(self) -> None:
        """Have the data on the disk, where the file system can tell."""
        try:
            with _naming(self._path):
                os.fsync(self._stream.fileno())
        except OSError as error:
            if error.errno not in _NO_FSYNC:
                raise

    def commit(self, size: int) -> None:
        """The data is complete, `size` bytes."""
        if hasattr(self._stream, "flush"):
            self._stream.flush()

    def close(self) -> None:
        """Let go of the stream."""
        if self._path is not None:
            self._stream.close()


class _DirectOutput(_Output):
    """An existing file whose content is replaced; left empty when that fails."""

    def commit(self, size: int) -> None:
        """Cut off what the file had beyond."""
        self.truncate(size)
        self.sync()
        self._stream.close()

    def close(self) -> None:
        """Close the file; never leave wrong bytes under the final name."""
        if not self._stream.closed and self._stream.tell():
            self._stream.truncate(0)
        self._stream.close()


class _PathOutput(_Output):
    """A path: written as `path`.part, with a journal beside it, and moved in place."""

    def __init__(self, path: str, existing: Optional[os.stat_result]) -> None:
        self._target = path
        self._existing = existing
        self.part = _part_path(path)
        self.journal = _Journal(self.part + ".json", existing)
        super().__init__(_open_part(self.part, existing), self.part)
        self.name = os.path.basename(path)
        self._start = self._settled = 0

    def size(self) -> int:
        """Bytes in the part file."""
        return os.fstat(self._stream.fileno()).st_size

    def settle(self) -> None:
        """Have the system write what is new to the disk meanwhile: less is lost in a
        power cut, and the fsync at the end takes no time."""
        start, size = self._settled, self.size()
        if hasattr(os, "posix_fadvise") and size - start >= _SETTLED_BYTES:
            self._settled = size
            with contextlib.suppress(OSError):
                advice = os.POSIX_FADV_DONTNEED
                os.posix_fadvise(self._stream.fileno(), start, size - start, advice)

    def kept(self, start: int, stop: int) -> Iterator[bytes]:
        """What the part file has from `start` up to `stop`, or as far as it goes."""
        self._stream.seek(start)
        for position in range(start, min(stop, self.size()), _CHUNK):
            yield self._stream.read(min(_CHUNK, stop - position))

    def commit(self, size: int) -> None:
        """Move the file in place, if it is still the one that was written."""
        self.sync()
        if self.size() != size or not _is_at(self.part, self._stream):
            text = "another process has changed or removed it"
            raise OSError(errno.ESTALE, text, self.part)
        if os.name == "nt":
            # An open file cannot be moved there.
            self._stream.close()
        self._put_in_place(size)
        _sync_folder(os.path.dirname(self._target))
        self.journal.remove()
        self._stream.close()

    def _put_in_place(self, size: int) -> None:
        """Move the file; where there are other hard links, or the existing file cannot
        be replaced (a mount point, another owner's sticky folder), copy its content."""
        if self._existing is None or self._existing.st_nlink == 1:
            try:
                os.replace(self.part, self._target)
                return
            except OSError:
                if self._existing is None:
                    raise
        target = _DirectOutput(_open(self._target, "r+b", buffering=0), self._target)
        with contextlib.closing(target), _open(self.part, "rb") as source:
            shutil.copyfileobj(source, target, _CHUNK)
            target.commit(size)
        os.remove(self.part)

    def close(self) -> None:
        """Let go of the files, and remove them when there is no data."""
        if self._stream.closed:
            return
        is_void = self.size() == 0 and _is_at(self.part, self._stream)
        if os.name == "nt":
            self._stream.close()
        elif fcntl is not None:
            # A forked process would keep the lock.
            with contextlib.suppress(OSError):
                fcntl.flock(self._stream.fileno(), fcntl.LOCK_UN)
        if is_void:
            with contextlib.suppress(OSError):
                os.remove(self.part)
            self.journal.remove()
        self._stream.close()
        self.journal.close()


def _part_path(path: str) -> str:
    """Where a path's data is until it is complete."""
    folder, name = os.path.split(path)
    # Most file systems take names of 255 bytes.
    if len(os.fsencode(name)) > 255 - len(".part.json"):
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return os.path.join(folder, name + ".part")


def _open_part(path: str, like: Optional[os.stat_result]) -> Any:
    """The part file, locked for this process where there are locks."""
    while True:
        stream = _open_private(path, like)
        try:
            if fcntl is not None:
                fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.close()
            text = "locked: another process is writing to it"
            raise BlockingIOError(error.errno, text, path) from None
        except OSError:
            pass  # A file system without locks.
        if _is_at(path, stream):
            return stream
        # The process that had the lock has moved the file in place.
        stream.close()


def _is_at(path: str, stream: Any) -> bool:
    """Whether an open file is still the one at a path."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.lstat(path), os.fstat(stream.fileno()))
    return False


def _exists(path: str, like: Optional[os.stat_result]) -> bool:
    """Whether there is a file; an error if it is a link, or neither this user's nor its
    whose file it is going to replace: somebody else may have put it there."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    user = os.geteuid() if hasattr(os, "geteuid") else found.st_uid
    is_own = found.st_uid in (user, like.st_uid if like else user)
    if not stat.S_ISREG(found.st_mode) or not is_own:
        text = "not using it: it is not a regular file of this user"
        raise PermissionError(errno.EPERM, text, path)
    return True


def _open_private(path: str, like: Optional[os.stat_result]) -> Any:
    """Open a file for reading and appending that is no more open than the file it is
    going to replace."""
    flags = os.O_RDWR | os.O_APPEND
    for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    if not _exists(path, like):
        flags |= os.O_CREAT | os.O_EXCL
    number = os.open(path, flags, 0o600 if like else 0o666)
    if like:
        _imitate(number, like)
    return _open(number, "r+b", buffering=0)


def _imitate(number: int, like: os.stat_result) -> None:
    """Give an open file another one's owner and mode, where possible."""
    mode = stat.S_IMODE(like.st_mode) & 0o777
    for owner, group in ((-1, like.st_gid), (like.st_uid, -1)):
        with contextlib.suppress(OSError, AttributeError):
            os.fchown(number, owner, group)
    if os.fstat(number).st_gid != like.st_gid:
        # The mode was meant for another group.
        mode &= ~0o070
    with contextlib.suppress(OSError, AttributeError):
        os.fchmod(number, mode)


def _sync_folder(path: str) -> None:
    with contextlib.suppress(OSError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


# Of the journal's form; one of another version is not used.
_JOURNAL_VERSION = 2


class _Checkpoint(NamedTuple):
    """A place that a later run can go on from: the next byte due is at `offset` in
    `block`; the part file's first `position` bytes have the CRC-32 `crc`. A `block` of
    -1 says that the bytes from `position` on have turned out to be wrong."""

    block: int
    offset: int
    position: int
    crc: int
    # Whether every size so far was announced before the data was read.
    announced: bool
    # By the first block of each resource: its ETag, Last-Modified and size.
    validators: Dict[str, List[Any]]


class _Journal:
    """The file that says what of a part file can be proven: JSON lines, only ever
    appended to. First what tells the transfer from others, then checkpoints, each with
    the validators of the resources since the one before."""

    def __init__(self, path: str, like: Optional[os.stat_result]) -> None:
        self._path = path
        self._like = like
        self._file: Optional[_Output] = None
        # Position and time (time.monotonic) of the last checkpoint, and its block.
        self._last = 0, time.monotonic()
        self.block = 0
        _exists(path, like)

    def is_due(self, position: int) -> bool:
        """Whether it is time for the next checkpoint."""
        new = position - self._last[0]
        if new < position >> _CHECKPOINT_SHIFT:
            return False
        passed = time.monotonic() - self._last[1]
        # Before another chunk makes it too much.
        return new > _CHECKPOINT_BYTES - _CHUNK or passed >= _CHECKPOINT_SECONDS

    def load(self, identity: Dict[str, str]) -> List[_Checkpoint]:
        """The checkpoints of an earlier run, in order; OSError or ValueError says why
        there are none that can be used."""
        with _open(self._path, "rb") as file:
            lines = file.read(_TICKET_LIMIT).split(b"\n")
        if _parsed(lines[0]) != dict(identity, journal=_JOURNAL_VERSION):
            raise ValueError("its journal is damaged, or of another request or version")
        points: List[_Checkpoint] = []
        length, validators = len(lines[0]) + 1, {}
        # The last line is empty, or torn by a crash; what follows a torn one is void.
        for line in lines[1:-1]:
            entry = _parsed(line)
            if not _is_checkpoint(entry):
                break
            point = _Checkpoint(**entry)
            # A restart went back: what was beyond is void.
            while points and points[-1].position >= point.position:
                points.pop()
            validators.update(point.validators)
            if point.block >= 0:
                points.append(point._replace(validators=dict(validators)))
            length += len(line) + 1
        os.truncate(self._path, length)
        return points

    def begin(self, identity: Dict[str, str]) -> None:
        """Begin a new one."""
        self.remove()
        self._append(dict(identity, journal=_JOURNAL_VERSION))

    def add(self, point: _Checkpoint) -> None:
        """Add a checkpoint."""
        self._last, self.block = (point.position, time.monotonic()), point.block
        self._append(point._asdict())

    def void(self, position: int) -> None:
        """The bytes from `position` on have turned out to be wrong."""
        self._append(_Checkpoint(-1, 0, position, 0, False, {})._asdict())

    def _append(self, entry: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = _Output(_open_private(self._path, self._like), self._path)
        self._file.write((json.dumps(entry) + "\n").encode("ascii"))

    def remove(self) -> None:
        """Remove it: nothing can be proven any more."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._path)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _parsed(line: bytes) -> Dict[str, Any]:
    """A line of the journal; {} if it is damaged."""
    with contextlib.suppress(ValueError, RecursionError):
        entry = json.loads(line.decode("ascii"))
        if isinstance(entry, dict):
            return entry
    return {}


def _is_checkpoint(entry: Dict[str, Any]) -> bool:
    """Whether a line of the journal has what a checkpoint has, of the right types."""
    kinds = [type(entry.get(name)) for name in _Checkpoint._fields]
    if kinds != [int, int, int, int, bool, dict] or len(entry) != len(kinds):
        return False
    for known in entry["validators"].values():
        kinds = [type(value) for value in known] if isinstance(known, list) else []
        if kinds not in ([str, str, int], [str, str, type(None)]):
            return False
    return all(map(str.isdigit, entry["validators"]))


def _open_output(output: Any) -> _Output:
    """The output behind a file object or a path."""
    if not isinstance(output, (str, os.PathLike)):
        is_text = isinstance(getattr(output, "file", output), TextIOBase)
        if is_text or not callable(getattr(output, "write", None)):
            raise RequestError("output is neither a binary file object nor a path")
        if hasattr(output, "writable") and not output.writable():
            raise RequestError("output is not open for writing")
        return _Output(output)
    path = os.fsdecode(output)
    if not path:
        raise RequestError("output is empty")
    own = re.match(
        r"/(?:dev|proc/self)/(?:fd/)?(\d+|stdout|stderr)\Z", os.path.abspath(path)
    )
    if own:
        number = {"stdout": 1, "stderr": 2}.get(own.group(1)) or int(own.group(1))
        with _naming(path):
            return _Output(_open(os.dup(number), "wb", buffering=0), path)
    existing: Optional[os.stat_result] = None
    with contextlib.suppress(FileNotFoundError):
        existing = os.stat(path)
    if existing is None and path.endswith(("/", os.sep)):
        raise IsADirectoryError(errno.EISDIR, "there is no such folder", path)
    if existing and not stat.S_ISREG(existing.st_mode):
        return _Output(_open(path, "wb", buffering=0), path)
    if existing and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is read-only", path)
    path = os.path.realpath(path)
    if existing and not os.access(os.path.dirname(path), os.W_OK):
        # Nothing can be kept beside it.
        return _DirectOutput(_open(path, "r+b", buffering=0), path)
    return _PathOutput(path, existing)


# ---- verifier
#
# Checks what can be checked of the data while it passes, in constant memory. Pure.

# The empty BGZF block that ends BAM, BCF and compressed VCF files (SAM spec 4.1.2).
_BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")

# The containers that end CRAM files of version 2.1 and 3.x (CRAM spec 9).
_CRAM_2_EOF = bytes.fromhex(
    "0b000000ffffffff0fe0454f460000000001000001000606010001000100"
)
_CRAM_3_EOF = bytes.fromhex(
    "0f000000ffffffff0fe0454f4600000000010005bdd94f0001000606010001000100ee63014b"
)

# A BGZF block's header: magic, 6 bytes, XLEN and subfield BC of length 2, BSIZE.
_BGZF_HEADER = struct.Struct("<4s6x6sH")
_BGZF_MAGIC = b"\x1f\x8b\x08\x04"
_BGZF_USUAL = b"\6\0BC\2\0"

# An error in the chain of BGZF blocks shows within two blocks, of 64 KiB at most.
_BGZF_REACH = 1 << 17

# Bytes that show what a file is, also of the compressed beginning of one.
_HEAD = 1 << 10


class _Kind(NamedTuple):
    """A kind of file: the pattern it begins with, the formats that may begin so, and
    the name and bytes of the end marker."""

    name: str
    pattern: bytes
    formats: str
    end: str = ""
    marker: bytes = b""


# The first that matches; the last one matches everything.
_FILE_KINDS = (
    _Kind("BGZF", b"\x1f\x8b\b\4.{8}BC", "BAM BCF VCF", "BGZF EOF marker", _BGZF_EOF),
    _Kind("gzip", b"\x1f\x8b", "VCF", "end of the gzip stream"),
    _Kind("CRAM", b"CRAM\2\1", "CRAM", "CRAM EOF container", _CRAM_2_EOF),
    _Kind("CRAM", b"CRAM\3", "CRAM", "CRAM EOF container", _CRAM_3_EOF),
    _Kind("CRAM", b"CRAM", "CRAM"),
    _Kind("BAM", b"BAM\1", "BAM"),
    _Kind("BCF", b"BCF\2", "BCF"),
    _Kind("VCF", b"##", "VCF", "final line feed", b"\n"),
    _Kind("", b"", ""),
)


def _kind_of(head: bytes) -> _Kind:
    return next(kind for kind in _FILE_KINDS if re.match(kind.pattern, head, re.S))


def _kind(head: bytes) -> Optional[str]:
    """What the first bytes of a file show it to be."""
    return _kind_of(head).name or None


class _Check:
    """Checks the data of one kind: here its end marker only, if it has one."""

    def __init__(self, kind: _Kind) -> None:
        self.kind = kind

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""

    def is_ended(self, tail: bytes) -> bool:
        """Whether the data, of which these are the last bytes, has its end marker."""
        found = bytearray(tail[len(tail) - len(self.kind.marker) :])
        if len(found) > 8:
            # In CRAM, the high bits of the fifth byte of -1 in ITF8 have no meaning.
            found[8] &= 0x0F
        return found == self.kind.marker

    def copy(self) -> "_Check":
        """The state as it is now."""
        return _copied(self)


def _copied(one: _T, **changes: Any) -> _T:
    """A shallow copy with changes. copy.copy is slow, and each block takes one."""
    other = one.__class__.__new__(one.__class__)
    other.__dict__.update(one.__dict__, **changes)
    return other


class _Bgzf(_Check):
    """Walks the chain of BGZF blocks by their sizes, without decompressing."""

    # Where the data so far ends, where the next block should begin; the beginning of
    # that one's header.
    _end = _next = 0
    _carried = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        start = self._end - len(self._carried)
        self._end += len(data)
        data = self._carried + data
        at, last = self._next - start, len(data) - _BGZF_HEADER.size
        while at <= last:
            magic, fields, size = _BGZF_HEADER.unpack_from(data, at)
            if magic != _BGZF_MAGIC or fields != _BGZF_USUAL:
                size = self._odd_size(data[at:], start + at)
                if size is None:
                    break
            at += size + 1
        self._carried = data[at:]
        self._next = start + at

    @staticmethod
    def _odd_size(header: bytes, position: int) -> Optional[int]:
        """BSIZE of a header with further subfields; None while it is incomplete."""
        if header.startswith(_BGZF_MAGIC):
            at, end = 12, 12 + int.from_bytes(header[10:12], "little")
            if end > len(header):
                return None
            while at + 6 <= end:
                name, length, size = struct.unpack_from("<2sHH", header, at)
                if name == b"BC" and length == 2:
                    return int(size)
                at += 4 + length
        text = "the next BGZF block was expected, found %r" % header[:4]
        raise _broken(position, text)

    def is_ended(self, tail: bytes) -> bool:
        """Whether the data has its end marker; an error if it ends within a block."""
        if self._end != self._next:
            raise _broken(self._end, "the data ends inside a BGZF block")
        is_ended = super().is_ended(tail)
        if not is_ended and tail[-28:].startswith(_BGZF_EOF[:18]):
            raise _broken(self._end - 28, "the BGZF EOF marker is damaged")
        return is_ended


def _broken(position: int, text: str) -> IntegrityError:
    error = IntegrityError("byte %d: %s", position, text)
    return error._marked(_sound=max(0, position - _BGZF_REACH))


class _Gzip(_Check):
    """Inflates gzip that is not BGZF, member by member, and keeps nothing."""

    _member: Any = None

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        try:
            while data:
                if self._member is None or self._member.eof:
                    self._member = zlib.decompressobj(31)
                self._member.decompress(data, _CHUNK)
                data = self._member.unconsumed_tail or self._member.unused_data
        except zlib.error as error:
            raise IntegrityError("the gzip data is damaged: %s", error) from None

    def is_ended(self, tail: bytes) -> bool:
        """Whether the last member is complete."""
        return bool(self._member.eof)

    def copy(self) -> "_Gzip":
        """The state as it is now."""
        return _copied(self, _member=self._member.copy())


class _Verifier:
    """Checks format, MD5, the chain of blocks and the end marker."""

    def __init__(self, ticket: Ticket, options: _Options) -> None:
        classes = {block.data_class for block in ticket.blocks}
        self._is_header = options.data_class == "header" or classes == {"header"}
        self._is_empty = not ticket.blocks
        self._format = self._expected = ""
        # The first bytes, until they are enough to tell what they belong to.
        self._head: Optional[bytes] = None
        if options.verify:
            self._format = (options.data_format or ticket.format or "").upper()
            self._expected = (ticket.md5 or "").lower()
            self._head = b""
        self._md5 = _new_md5() if self._expected else None
        self._check = _Check(_FILE_KINDS[-1])
        self._size, self._tail = 0, b""

    def copy(self) -> "_Verifier":
        """The verifier as it is now, to be taken up again later."""
        md5 = self._md5 and self._md5.copy()
        return _copied(self, _check=self._check.copy(), _md5=md5)

    def feed(self, data: bytes) -> None:
        """Take the next bytes; IntegrityError if they are wrong."""
        if self._md5 is not None:
            self._md5.update(data)
        self._size += len(data)
        self._tail = (self._tail + data[-len(_CRAM_3_EOF) :])[-len(_CRAM_3_EOF) :]
        if self._head is None:
            self._check.feed(data)
        else:
            self._head += data
            if len(self._head) >= _HEAD:
                self._begin(self._head)

    def _begin(self, head: bytes) -> None:
        """Compare the first bytes with the format; choose the further checks."""
        kind, inner = _kind_of(head), None
        if kind.name == "BGZF":
            with contextlib.suppress(zlib.error):
                inner = _kind(zlib.decompressobj(31).decompress(head, _HEAD))
        is_right = self._format in kind.formats and inner in (None, self._format)
        if self._format in ("BAM", "BCF", "CRAM", "VCF") and not is_right:
            found = inner + " data" if inner else repr(head[:4])
            text = "byte 0: %s data was expected, found %s"
            raise IntegrityError(text, self._format, found)
        checks = {"BGZF": _Bgzf, "gzip": _Gzip}
        self._check = checks.get(kind.name, _Check)(kind)
        self._check.feed(head)
        self._head = None

    def verdict(self) -> str:
        """What was found to be well, for a message."""
        found = [self._check.kind.name] * bool(self._check.kind.end)
        found += ["MD5"] * bool(self._md5)
        return "verified: " + ", ".join(found) if found else "nothing to verify"

    def finish(self, is_announced: bool) -> None:
        """All data has passed: IntegrityError if it is not what it should be.

        An end marker may be missing where every size was announced before the data
        came (`is_announced`): then the server just does not send one.
        """
        if self._head is not None:
            if self._is_empty:
                text = "the ticket has no data blocks"
                if self._format:
                    raise IntegrityError(text)
                _log.warning(text)
            self._begin(self._head)
        kind = self._check.kind
        if not self._check.is_ended(self._tail) and not self._is_header:
            text = "byte %d: the %s is missing"
            text %= self._size - len(kind.marker), kind.end
            if not is_announced:
                raise IntegrityError(
                    text + ", so the data may be truncated; if the server never sends "
                    "one, verify=False (--no-verify) accepts it"
                )
            _log.warning("%s; the server announced all sizes, and kept to them", text)
        if self._md5 is not None and self._md5.hexdigest() != self._expected:
            text = "the MD5 of the data is %s, but the ticket says %s"
            raise IntegrityError(text, self._md5.hexdigest(), self._expected)


# ---- delivery
#
# Takes the bytes in order to where they go, and decides where to begin again. All
# counts of restarts live here, so that they are bounded as retries are.


class _Mark(NamedTuple):
    """The beginning of a block in the output: its number, its position, and CRC-32 and
    verifier of the bytes before it."""

    block: int
    position: int
    crc: int
    verifier: _Verifier


class _Delivery:
    """The way of the bytes to the output (None: to a stream's reader), the verifier
    and the journal."""

    def __init__(self, transfer: _Transfer, output: Optional[_Output]) -> None:
        self._transfer = transfer
        self._output = output
        # From `begin` on: before that, an earlier run's is not to be touched.
        self._journal: Optional[_Journal] = None
        self._retry = transfer.new_retry()
        # Bytes delivered; of these, those of an earlier run; at the last restart.
        self.position = 0
        self.resumed = 0
        self._furthest = 0
        # The byte due next, less than `position` while bytes that were delivered come
        # again (a replay); the CRC-32 of the bytes before it; and what that must be at
        # the end of the replay.
        self._at = 0
        self._crc = 0
        self._expected: Optional[int] = None
        self._verifier = _new_verifier(transfer)
        self._mark = _Mark(0, 0, 0, self._verifier.copy())

    def begin(self) -> Tuple[int, int]:
        """The place (block, offset in it) to begin at: where an earlier run is proven
        to have got to, or the beginning."""
        output = self._output
        if not isinstance(output, _PathOutput):
            return 0, 0
        is_resumed = self._transfer.options.resume and self._resume(output)
        if not is_resumed:
            output.truncate(0)
            output.journal.begin(self._identity())
        self._journal = output.journal
        place = self._next_place()
        if is_resumed:
            text, words = "resuming %s at byte %d", {"always": True}
            _log.info(text, output.part, self.position, extra=words)
        return place

    def begin_again(self, restart: _Restart) -> Tuple[int, int]:
        """The place to begin at when a reader cannot go on: at the byte due, if the
        block can be asked for from there and is the same object; else at the block's
        beginning, or at that of everything, going back in the output if it can be
        sought, and comparing the bytes that were written already if not."""
        new = self.position - self._furthest
        self._furthest = max(self._furthest, self.position)
        if restart.error._is_free or new >= _PROGRESS:
            self._retry.progress(new)
            _log.info("%s", restart.error)
        else:
            self._transfer.pause(self._retry, restart.error, "")
        if restart.error._is_changed:
            self._forget(self._transfer.tickets.blocks[restart.block])
        return self._next_place()

    def _next_place(self) -> Tuple[int, int]:
        index, offset = self._mark.block, self._at - self._mark.position
        if offset > 0:
            block = self._transfer.tickets.blocks[index]
            if block.way == _RANGES and not block.is_guessed:
                return index, offset
        self._go_back()
        return index, 0

    def _forget(self, block: _Block) -> None:
        """An object has changed: void are the bytes that came from it."""
        if block.resource.first == block.index:
            for other in self._transfer.tickets.blocks[block.index :]:
                # What was read ahead came from the same object.
                if other.resource is block.resource:
                    other.forget()
            if block.index == self._mark.block:
                self._go_back()
            return
        self._transfer.start_over()
        self._mark = _Mark(0, 0, 0, _new_verifier(self._transfer))
        self._go_back()
        if self._journal:
            self._journal.begin(self._identity())

    def _go_back(self) -> None:
        """Go back to the mark: in the output, or by a replay."""
        mark, is_beyond = self._mark, self.position > self._mark.position
        is_seekable = self._output is not None and self._output.is_seekable()
        if is_beyond and not is_seekable and self._expected is None:
            self._expected = self._crc
        self._at, self._crc = mark.position, mark.crc
        if is_beyond and self._output is not None and is_seekable:
            self._output.truncate(mark.position)
            self.position = mark.position
            if self._journal:
                self._note()
        if self.position == mark.position:
            self._verifier = mark.verifier.copy()

    def take(self, index: int, offset: int, data: bytes) -> bytes:
        """Take the next bytes; returns those that are new."""
        if index != self._mark.block:
            self._enter(index)
        if self._mark.position + offset != self._at:
            text = "data block %d came out of order; this is a bug in htsget.py"
            raise HtsgetException(text, index + 1)
        if self._expected is not None:
            data = self._compare(data, self._expected)
        if data:
            self._verify(index, data)
            try:
                if self._output is not None:
                    self._output.write(data)
            finally:
                # Also when a disk is full.
                self._count(
                    data if self._output is None else data[: self._output.taken]
                )
            if self._journal and self._journal.is_due(self.position):
                self._note()
        progress = self._transfer.options.progress
        if progress is not None:
            if isinstance(progress, _Meter):
                progress.note_block(index, len(self._transfer.tickets.blocks))
            progress(self.position, self._transfer.tickets.total())
        return data

    def _count(self, data: bytes) -> None:
        """Note what was delivered."""
        if self._journal or self._output is None or not self._output.is_seekable():
            self._crc = zlib.crc32(data, self._crc)
        self._at = self.position = self.position + len(data)

    def _enter(self, index: int) -> None:
        """What comes next is the beginning of another block."""
        self._mark = _Mark(index, self._at, self._crc, self._verifier.copy())

    def _compare(self, data: bytes, expected: int) -> bytes:
        """Drop the bytes that were delivered already, if they are the same."""
        old = data[: self.position - self._at]
        self._crc = zlib.crc32(old, self._crc)
        self._at += len(old)
        if self._at == self.position:
            if self._crc != expected:
                raise _differs()
            self._expected = None
        return data[len(old) :]

    def _verify(self, index: int, data: bytes) -> None:
        try:
            self._verifier.feed(data)
        except IntegrityError as error:
            block = self._transfer.tickets.blocks[index]
            if not block.is_guessed:
                raise
            # What was taken for the slice is not: it must be the whole file.
            block.move_down(_WHOLE)
            reason = RetryableError(str(error))._marked(_is_free=True)
            raise _Restart(index, reason) from None

    def finish(self) -> str:
        """All bytes have come: IntegrityError if they are not what they should be,
        else what was verified."""
        if self._expected is not None:
            raise _differs()
        blocks = self._transfer.tickets.blocks
        self._enter(len(blocks))
        self._verifier.finish(all(block.announced is not None for block in blocks))
        return self._verifier.verdict()

    def note_at_last(self, error: Optional[BaseException]) -> None:
        """Have the journal say what a later run can go on from."""
        if self._journal is None:
            return
        try:
            if not isinstance(error, IntegrityError):
                self._note()
            elif error._sound:
                self._journal.void(error._sound)
            else:
                self._journal.remove()
        except OSError as failure:
            _log.warning("cannot write the journal: %s", failure)

    def _note(self) -> None:
        """Add a checkpoint; what is only guessed does not count."""
        assert self._journal is not None and isinstance(self._output, _PathOutput)
        self._output.settle()
        blocks, mark = self._transfer.tickets.blocks, self._mark
        crc, offset = self._crc, self._at - mark.position
        if mark.block < len(blocks) and blocks[mark.block].is_guessed:
            crc, offset = mark.crc, 0
        position = mark.position + offset
        announced = all(block.announced is not None for block in blocks[: mark.block])
        recent = blocks[self._journal.block : mark.block + 1]
        resources = [block.resource for block in recent if block.data is None]
        known = {str(resource.first): resource.known for resource in resources}
        point = _Checkpoint(mark.block, offset, position, crc, announced, known)
        self._journal.add(point)

    def _identity(self) -> Dict[str, str]:
        tickets = self._transfer.tickets
        return _identity(tickets.source, tickets.ticket)

    def _resume(self, output: _PathOutput) -> bool:
        """Take up what an earlier run has left, as far as it can be proven."""
        if output.size() == 0:
            return False
        try:
            self._prove(output, output.journal.load(self._identity()))
        except (ValueError, OSError) as error:
            _log.warning("starting over: cannot resume %s: %s", output.part, error)
            return False
        return True

    def _prove(self, output: _PathOutput, points: List[_Checkpoint]) -> None:
        """Read the kept bytes once, and go to the last checkpoint that they prove;
        ValueError if there is none."""
        blocks = self._transfer.tickets.blocks
        verifier, crc, at = self._verifier.copy(), 0, 0
        mark, best = self._mark, None
        for point in points:
            begin = point.position - point.offset
            with contextlib.suppress(IntegrityError):
                for stop in (begin, point.position):
                    for data in output.kept(at, stop):
                        verifier.feed(data)
                        crc, at = zlib.crc32(data, crc), at + len(data)
                    if at == begin and mark.block != point.block:
                        mark = _Mark(point.block, at, crc, verifier.copy())
            is_placed = mark[:2] == (point.block, begin) and point.block <= len(blocks)
            if (at, crc) != (point.position, point.crc) or not is_placed:
                break
            if at > 0:
                best = point, mark, verifier.copy()
        if best is None:
            raise ValueError("it is damaged")
        point, self._mark, self._verifier = best
        output.truncate(point.position)
        self.position = self.resumed = self._furthest = self._at = point.position
        self._crc = point.crc
        for first, validators in point.validators.items():
            blocks[int(first)].resource.recall(validators)
        if point.announced:
            for block in blocks[: point.block]:
                block.announce(0)


def _differs() -> ProtocolError:
    return ProtocolError("the data differs from what was already delivered")


def _new_verifier(transfer: _Transfer) -> _Verifier:
    """The verifier for a transfer; ProtocolError if its ticket is of another format
    than the one asked for."""
    options, ticket = transfer.options, transfer.tickets.ticket
    asked = (options.data_format or "").upper()
    if asked and ticket.format and ticket.format != asked:
        shown = _printable(ticket.format, 40)
        raise ProtocolError("%s was requested, but the ticket is for %s", asked, shown)
    return _Verifier(ticket, options)


def _deliver(transfer: _Transfer, delivery: _Delivery) -> Iterator[bytes]:
    """The loop of a transfer: from a place on until everything is delivered, or a
    reader cannot go on; then from where the delivery decides. Yields what is new."""
    index, offset = delivery.begin()
    while True:
        window = _Window(transfer, index, offset)
        try:
            with contextlib.closing(window.chunks()) as chunks:
                for chunk in chunks:
                    yield delivery.take(*chunk)
            return
        except _Restart as restart:
            reason = restart
        finally:
            window.close()
        transfer.reopen()
        index, offset = delivery.begin_again(reason)


# ---- progress meter
#
# The line that shows how far a transfer is, and how messages are written.


def _size(count: float) -> str:
    """A number of bytes for people."""
    if count < 1024:
        return "%d bytes" % count
    power = min((int(count).bit_length() - 1) // 10, 4)
    return "%.1f %siB" % (count / 1024**power, " KMGT"[power])


def _duration(seconds: float) -> str:
    """A time for people: h:mm:ss, or m:ss."""
    minutes, second = divmod(int(seconds), 60)
    whole = "%d:%02d" % divmod(minutes, 60) if minutes >= 60 else str(minutes)
    return "%s:%02d" % (whole, second)


class _Meter:
    """A function for `progress` that shows it: one line that is overwritten on a
    terminal, a new line now and then elsewhere."""

    def __init__(self, stream: TextIO, name: str, is_terminal: bool) -> None:
        self.is_terminal = is_terminal
        self._stream = stream
        self._name = os.path.basename(name) or name
        self._interval = _METER_TERMINAL if is_terminal else _METER_LOG
        # (time, bytes) of the last seconds, the newest one last.
        self._past: Deque[Tuple[float, int]] = collections.deque()
        self._is_shown = False
        self._blocks = 0, 0

    def note_block(self, index: int, count: int) -> None:
        """Note which block of how many is under way."""
        self._blocks = index + 1, count

    def __call__(self, so_far: int, total: Optional[int]) -> None:
        now = time.monotonic()
        if self._past and now < self._past[-1][0] + self._interval:
            return
        self._past.append((now, so_far))
        if len(self._past) > 1:
            while len(self._past) > 2 and self._past[1][0] < now - _METER_SPAN:
                self._past.popleft()
            _write(self._stream, self._line(so_far, total), self.is_terminal)
            self._is_shown = True

    def _line(self, so_far: int, total: Optional[int]) -> str:
        """Bytes, percent, rate of the last seconds, time left, blocks."""
        (then, before), (now, _) = self._past[0], self._past[-1]
        rate = (so_far - before) / max(now - then, 1e-3)
        percent = left = ""
        if total:
            percent = " of %s, %d %%" % (_size(total), 100 * so_far // total)
            if rate > 0:
                left = ", %s left" % _duration((total - so_far) / rate)
        done, speed = self._name + ": " + _size(so_far) + percent, _size(rate)
        return "%s, %s/s%s, block %d of %d" % ((done, speed, left) + self._blocks)

    def clear(self) -> None:
        """Take the line off the terminal, for something else to be written."""
        if self._is_shown and self.is_terminal:
            _write(self._stream, "", is_overwritten=True)
            self._is_shown = False


def _write(stream: Optional[TextIO], text: str, is_overwritten: bool = False) -> None:
    """Write a message as one line, with control characters escaped. Whatever comes
    next may overwrite it. That it cannot be written never matters."""
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

    url: str, the address of the data, such as "https://example.org/reads/NA12878"; a
        query in it is kept, except for parameters that are given here, too. Or a
        `Ticket`, which takes none of the options of this paragraph.
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
        called before every ticket request. Not sent over plain http to another
        machine, or through a proxy, unless HTS_ALLOW_UNENCRYPTED_AUTHORIZATION_HEADER
        is set to "I understand the risks".
    headers: mapping of str to str, sent to the ticket server only; None leaves one
        out. Without a token and an Authorization here, .netrc is consulted.

    Where it goes and how it is fetched:

    output: a binary file object, written from its current position on, or a path. A
        path is written as PATH.part and moved in place when the data is complete.
    max_retries: int, how often in a row a transfer is retried without progress (64
        KiB of new data); negative for no limit.
    retry_wait: seconds before the first retry; doubled for each further one up to
        60 s, with a little jitter.
    timeout: seconds to wait for data (of a tuple, the larger one).
    connections: int, the most connections at once.
    verify: bool, check MD5, format and end of the data.
    resume: bool, continue what an earlier run left at PATH.part.
    progress: function called with the bytes so far and in all (None if unknown).
    ssl_context: ssl.SSLContext for https, instead of the default.

    Raises RequestError (also a ValueError) before anything is sent for arguments that
    the protocol forbids, ClientError when the server refuses, ProtocolError when it
    breaks the protocol, IntegrityError when the data is wrong, RetryableError when
    retries are used up; and OSError when the output fails.
    """
    options = _checked(_Options(**locals()))
    source = _source(options)
    target = _open_output(output)
    try:
        _save(source, target, options)
    finally:
        target.close()


def open(url: Union[str, Ticket], **options: Any) -> BufferedReader:
    """Request data and return it as a readable binary stream, while it is fetched.

    The options are those of `get`, and so are the exceptions, which any read may
    raise; a read that returns b"" means that the data is complete and verified. Close
    the stream, or use it as a context manager: that ends the transfer at once, also
    when another thread reads.
    """
    known = _options_of_get(url, options)
    return _BufferedStream(_Stream(_Transfer(_source(known), known)), _CHUNK)


def get_ticket(url: str, **options: Any) -> Ticket:
    """Request a ticket and return it; `get` takes it in place of a URL.

    The options are those of `get`, and so are the exceptions.
    """
    known = _options_of_get(url, options)
    return _request_json(_TicketRequest(known), known, _parse_ticket)


def service_info(url: str, **options: Any) -> Dict[str, Any]:
    """What an htsget server says about itself (spec: "GET /reads/service-info").

    url: str, an address of the server: of its service-info, its reads or variants, or
        of one of these. The options are those of `get`, and so are the exceptions.
    """
    known = _options_of_get(url, options)
    parts = urllib.parse.urlsplit(_checked_url(url))
    path = re.sub(r"(.*/(reads|variants))(/.*)?\Z", r"\1/service-info", parts.path)
    if not path.endswith("/service-info"):
        path = path.rstrip("/") + "/service-info"
    login = {"bearer_token": known.bearer_token, "headers": known.headers}
    address = parts._replace(path=path).geturl()
    request = _TicketRequest(_options_of_get(address, login))
    return _request_json(request, known, lambda raw: _parse_json(raw, "the answer"))


# A name and positions; a name that has braces around it may have colons.
_REGION = re.compile(
    r"(?:\{(?P<braced>[^{}]+)\}|(?P<plain>[^{}\s]+?))"
    r"(?::(?=.*[0-9])(?P<first>[0-9][0-9,]{0,24})?"
    r"(?:-(?P<last>[0-9][0-9,]{0,24})?)?)?\Z"
)


def parse_region(text: str) -> Region:
    """The `Region` for samtools' notation, which is 1-based and inclusive.

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


# The options of `get` that are about the ticket request.
_REQUEST_OPTIONS = (
    "reference_name reference_md5 start end fields tags notags data_format bearer_token"
    " headers data_class regions"
).split()


def _options_of_get(url: Any, given: Dict[str, Any]) -> _Options:
    """The options of `get` as they are given to another function."""
    import inspect

    bound = inspect.signature(get).bind(url, None, **given)
    bound.apply_defaults()
    return _checked(_Options(**bound.arguments))


def _checked(options: _Options) -> _Options:
    """The options that are not about the request, checked."""
    timeout = options.timeout
    if isinstance(timeout, (tuple, list)):
        timeout = None if None in timeout else max(timeout, default=None)
    for name, value, least in (
        ("max_retries", options.max_retries, float("-inf")),
        ("retry_wait", options.retry_wait, 0),
        ("connections", options.connections, 1),
        ("timeout", 1 if timeout is None else timeout, sys.float_info.min),
    ):
        if not isinstance(value, (int, float)) or not value >= least:
            raise RequestError("%s is too small, or not a number", name)
    return _Options(**dict(vars(options), timeout=timeout))


def _source(options: _Options) -> _Source:
    """Where the ticket comes from; checks the arguments."""
    ticket = options.url
    if not isinstance(ticket, Ticket):
        return _TicketRequest(options)
    given = [name for name in _REQUEST_OPTIONS if getattr(options, name) is not None]
    _refuse_with_ticket(given)
    _check_ticket(ticket)
    return ticket


def _refuse_with_ticket(given: List[str]) -> None:
    """RequestError if there are options of the ticket request."""
    if given:
        text = "%s cannot be combined with a ticket, which says what is fetched"
        raise RequestError(text, ", ".join(given))


def _request_json(
    request: _TicketRequest, options: _Options, parse: Callable[[bytearray], _T]
) -> _T:
    """The ticket server's parsed answer to a single request."""
    transport = _Transport(options, _Hosts())
    try:
        return _ask_ticket_server(transport, request, options, parse)
    finally:
        transport.stop()


def _save(source: _Source, output: _Output, options: _Options) -> None:
    """Fetch everything, write it and verify it."""
    begun = time.monotonic()
    transfer = _Transfer(source, options)
    failure: Optional[BaseException] = None
    delivery: Optional[_Delivery] = None
    try:
        delivery = _Delivery(transfer, output)
        for _ in _deliver(transfer, delivery):
            pass
        verdict = delivery.finish()
    except BaseException as error:
        failure = error
        is_wrong = isinstance(error, IntegrityError)
        if is_wrong and isinstance(output, _PathOutput) and output.size():
            text = "%s; the data is kept in %s"
            raise IntegrityError(text, error, output.part) from None
        raise
    finally:
        transfer.stop()
        if delivery is not None:
            delivery.note_at_last(failure)
    output.commit(delivery.position)
    passed = max(time.monotonic() - begun, 1e-3)
    rate = _size((delivery.position - delivery.resumed) / passed)
    count = len(transfer.tickets.blocks)
    blocks = "1 data block" if count == 1 else "%d data blocks" % count
    text = "%s: %s in %.1f s (%s/s), %s; %s"
    values = output.name, _size(delivery.position), passed, rate, blocks, verdict
    _log.info(text, *values, extra={"on_terminal": True})


class _Stream(RawIOBase):
    """The data of a transfer, to be read."""

    def __init__(self, transfer: _Transfer) -> None:
        super().__init__()
        self._transfer = transfer
        self._data = self._verified()
        self._left = memoryview(b"")
        self._failure: Optional[BaseException] = None

    def _verified(self) -> Iterator[bytes]:
        delivery = _Delivery(self._transfer, None)
        yield from _deliver(self._transfer, delivery)
        delivery.finish()

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes; 0 at the end."""
        try:
            while self._failure is None and not self._left:
                data = next(self._data, None)
                if data is None:
                    return 0
                self._left = memoryview(data)
        except _Stopped:
            self._failure = ValueError("I/O operation on closed file")
        except BaseException as error:
            self._failure = error
        # Later reads raise it again: an error is never mistaken for the end.
        if self._failure is not None:
            raise self._failure
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def stop(self) -> None:
        """End the transfer, whoever reads it."""
        self._transfer.stop()

    def close(self) -> None:
        """End the transfer."""
        if not self.closed:
            self.stop()
            # "already executing": another thread reads, and gets an error.
            with contextlib.suppress(ValueError):
                self._data.close()  # type: ignore
        super().close()


class _BufferedStream(BufferedReader):
    """A buffered `_Stream` that can be closed while another thread reads."""

    def close(self) -> None:
        """End the transfer; its reader gets an error."""
        self.raw.stop()  # type: ignore
        super().close()


# ---- command line
#
# Arguments in; an exit status and one line per message out.

_EXAMPLES = """examples:
  htsget https://example.org/reads/NA12878 -O NA12878.bam
  htsget https://example.org/reads/NA12878 --region chr1:1,000-2,000 -O slice.bam
  htsget https://example.org/variants/1000g -f VCF -r chr22 | zcat | less

exit status: 0 done; 1 refused or wrong; 2 usage error; 75 gave up, rerun to resume;
  129, 130, 143 hang-up, interrupted, terminated; 141 broken pipe
"""

# Signals that end a run in order, and what the error line says then.
_SIGNALS = {1: "hung up", 2: "interrupted", 15: "terminated"}

# What a refusal for lack of a login says, by what was asked.
_LOGIN_HINTS = {
    "proxy": "; the proxy wants a login: write it in the proxy's URL",
    "proxy with login": "; the proxy does not accept the login in its URL",
    "ticket": "; if a token is needed, give it with -b or --bearer-token-file",
    "ticket with login": "; the server does not accept this login",
}


class _Messages(logging.Handler):
    """Writes messages to standard error, past the progress line."""

    def __init__(self, lowest: int, meter: Optional[_Meter]) -> None:
        super().__init__()
        self._lowest = lowest
        self._meter = meter

    def filter(self, record: logging.LogRecord) -> bool:
        """By level; what a person at a terminal wants to know goes there anyway."""
        wanted = getattr(record, "always", False) and self._lowest < logging.ERROR
        if self._meter is not None and self._meter.is_terminal:
            wanted = wanted or getattr(record, "on_terminal", False)
        return wanted or record.levelno >= self._lowest

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        if self._meter is not None:
            self._meter.clear()
        _write(sys.stderr, "htsget: " + record.getMessage())


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line with `argv` (default: sys.argv[1:]); return its status.

    0: done. 1: refused or wrong, a rerun will not help. 2: usage error. 75: gave up,
    a rerun may help. 129, 130, 143: hang-up, interrupted, terminated. 141: broken
    pipe.
    """
    try:
        args = _parse_arguments(sys.argv[1:] if argv is None else argv)
    except SystemExit as done:
        return int(done.code or 0)
    except RequestError as error:
        _write(sys.stderr, "htsget: error: %s (see htsget --help)" % error)
        return 2
    meter = _meter(args)
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    lowest = logging.ERROR if args.quiet else levels[min(args.verbose, 2)]
    handler, before = _Messages(lowest, meter), _log.level
    _log.setLevel(min(lowest, logging.INFO))
    _log.addHandler(handler)
    try:
        return _run(args, meter)
    finally:
        _log.removeHandler(handler)
        _log.setLevel(before)


def _meter(args: argparse.Namespace) -> Optional[_Meter]:
    """The progress meter, if it is wanted: by default on a terminal only."""
    with contextlib.suppress(ValueError, AttributeError):
        is_terminal = sys.stderr.isatty()
        wanted = is_terminal if args.show_progress is None else args.show_progress
        is_path = args.output not in (None, "-")
        if wanted and not args.quiet and (is_path or not sys.stdout.isatty()):
            name = args.output if is_path else "standard output"
            return _Meter(sys.stderr, name, is_terminal)
    return None


def _run(args: argparse.Namespace, meter: Optional[_Meter]) -> int:
    """Do what the arguments say; errors become one line and an exit status."""
    try:
        with _terminable():
            _act(args, meter)
        return 0
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        status, message = 128 + number, _SIGNALS[number] + _kept(args)
    except (HtsgetException, OSError) as error:
        status, advice = _verdict(error, args)
        message = str(error) + advice
    finally:
        if meter is not None:
            meter.clear()
    _write(sys.stderr, "htsget: error: " + message)
    return status


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let the signals end what runs here in order."""

    def terminate(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in signal.Signals:
            # What nohup ignores stays ignored.
            if number in _SIGNALS and signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _verdict(error: Exception, args: argparse.Namespace) -> Tuple[int, str]:
    """The exit status for an error, and what to do about it where that is known."""
    if isinstance(error, RequestError):
        return 2, ""
    if isinstance(error, RetryableError):
        return 75, _kept(args) or "; a rerun may help"
    if isinstance(error, ClientError):
        return 1, _hint(error, args)
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return 75, "; free some space and rerun" + (" to resume" if _kept(args) else "")
    return 75 if isinstance(error, BlockingIOError) else 1, ""


def _kept(args: argparse.Namespace) -> str:
    """What is kept of the output, and how to continue."""
    if args.output not in (None, "-"):
        part = _part_path(os.path.realpath(args.output))
        with contextlib.suppress(OSError):
            size = os.stat(part).st_size
            if size:
                text = "; %s kept in %s: rerun the same command to resume"
                return text % (_size(size), part)
    return ""


def _hint(error: ClientError, args: argparse.Namespace) -> str:
    """What to do about a refusal, where that is known."""
    asked, status = error._asked, error.status
    if asked.startswith("proxy"):
        return _LOGIN_HINTS[asked] if status == 407 else "; the proxy refuses"
    if asked.startswith("ticket") and status in (401, 403):
        return _LOGIN_HINTS[asked]
    if asked.startswith("ticket") and error.error in ("NotFound", "Not Found"):
        # Of a server's own address, or of more than the id, it may be something else.
        other = (args.service_info, args.reference_name, args.reference_md5)
        is_id = not any(other + (args.region, args.regions_file))
        return "; check the id in the URL" if is_id else ""
    if asked == "data block" and status in _EXPIRED_STATUS and not _is_url(args.url):
        return "; the URLs of the ticket may have expired: get a new ticket"
    if error.error == "UnsupportedFormat":
        with contextlib.suppress(HtsgetException, LookupError, TypeError):
            options = dict(_options(args), max_retries=0, timeout=10)
            info = service_info(args.url, **options)
            formats = ", ".join(info["htsget"]["formats"])
            return "; the server has " + _printable(formats)
    return ""


def _act(args: argparse.Namespace, meter: Optional[_Meter]) -> None:
    """Call the function that the arguments ask for."""
    source = args.url
    if not args.service_info and not _is_url(source):
        names = [*_REQUEST_OPTIONS, "region", "regions_file", "bearer_token_file"]
        given = [name for name in names if getattr(args, name, None) not in (None, [])]
        _refuse_with_ticket([args.words[name] for name in given])
        source = _ticket(source)
    options = _options(args)
    output = None if args.service_info or args.dry_run else _output(args)
    try:
        if args.service_info:
            print(json.dumps(service_info(source, **options), indent=2), flush=True)
        elif output is not None:
            get(source, output, progress=meter, **options)
        else:
            if _is_url(args.url):
                source = get_ticket(source, **options)
            print(_described(source), flush=True)
    except RequestError as error:
        # What the library calls an option has another name here.
        pattern = r"(?<!\S)(%s)(?=[,:;]?(\s|\Z))" % "|".join(args.words)
        named = re.sub(pattern, lambda match: args.words[match.group(1)], str(error))
        raise RequestError(named) from None


def _output(args: argparse.Namespace) -> Union[str, FileIO]:
    """Where the data goes, for `get`."""
    if args.output not in (None, "-"):
        return str(args.output)
    if sys.stdout is None:
        raise RequestError("standard output is closed; give -O PATH")
    if args.output is None and sys.stdout.isatty():
        text = "not writing binary data to a terminal; give -O PATH or -O -"
        raise RequestError(text)
    return FileIO(sys.stdout.fileno(), "w", closefd=False)


def _is_url(text: str) -> bool:
    return re.match("[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def _ticket(path: str) -> Ticket:
    """The ticket in a file, or on standard input for "-"."""
    if path != "-" and not os.path.exists(path):
        shown = _printable(path, 100)
        raise RequestError("%s is neither a URL nor a file with a ticket", shown)
    return _parse_ticket(bytearray(_read_input(path)))


def _read_input(path: str) -> bytes:
    """The content of an input file, or of standard input for "-"."""
    try:
        if path == "-":
            return sys.stdin.buffer.read()
        with _open(path, "rb") as file:
            return bytes(file.read())
    except (OSError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "standard input is closed"
        raise RequestError("cannot read %s: %s", path, reason) from None


def _described(ticket: Ticket) -> str:
    """What --dry-run tells of a ticket: no query, no header's value."""
    resource = _Resource(0)
    blocks = [_Block(n, block, resource) for n, block in enumerate(ticket.blocks)]
    sizes = [block.size for block in blocks]
    remote = [block for block in blocks if block.data is None]
    hosts = sorted({_origin(block.request[0])[1] for block in remote})
    size = "not known" if None in sizes else "%d bytes" % sum(n or 0 for n in sizes)
    lines = [
        "format: %s" % _printable(ticket.format or "not given", 40),
        "blocks: %d (%d inline)" % (len(blocks), len(blocks) - len(remote)),
        "size:   %s" % size,
        "MD5:    %s" % (ticket.md5 or "not given"),
        "hosts:  %s" % (", ".join(hosts) or "none"),
    ]
    return "\n".join(lines)


def _options(args: argparse.Namespace) -> Dict[str, Any]:
    """The options of `get` that the arguments stand for."""
    names = get.__code__.co_varnames[2:]
    given = {name: value for name, value in vars(args).items() if value is not None}
    options = {name: value for name, value in given.items() if name in names}
    options["headers"] = _parse_headers(args.headers) or None
    if args.cacert:
        options["ssl_context"] = _default_ssl_context(args.cacert)
    path = args.bearer_token_file
    if _is_url(args.url):
        path = path or os.environ.get("HTS_AUTH_LOCATION")
    if args.bearer_token is None and path:
        options["bearer_token"] = functools.partial(_read_token, path)
    regions = [parse_region(text) for text in args.region]
    if args.regions_file:
        regions += _read_bed(args.regions_file)
    if regions and {"reference_name", "start", "end"} & set(given):
        raise RequestError("--region and -L cannot be combined with -r, -s or -e")
    if len(regions) == 1:
        options.update(regions[0]._asdict())
    elif regions:
        options["regions"] = regions
    return options


def _parse_headers(texts: List[str]) -> Dict[str, str]:
    """The headers of -H: "Name: value", or a JSON object as htsget 0.2.6 takes it."""
    headers = {}
    for text in filter(str.strip, texts):
        try:
            if text.lstrip().startswith("{"):
                headers.update(json.loads(text))
            else:
                name, value = text.split(":", 1)
                headers[name.strip()] = value.strip()
        except ValueError:
            text = "-H/--headers takes 'Name: value' or a JSON object"
            raise RequestError(text) from None
    return headers


def _read_token(path: str) -> str:
    """A token from a file: text, or JSON with `access_token`, as htslib reads it."""
    raw = _read_input(path)
    with contextlib.suppress(ValueError, KeyError):
        text = raw.decode("utf-8-sig").strip()
        token = json.loads(text)["access_token"] if text.startswith("{") else text
        if isinstance(token, str) and token.strip():
            return token
    text = "no token in %s; it must hold the token, or JSON with access_token"
    raise RequestError(text, path)


def _read_bed(path: str) -> List[Region]:
    """The regions of a BED file, which may be compressed with gzip."""
    import gzip

    raw = _read_input(path)
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        lines = raw.decode("utf-8-sig").splitlines()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RequestError("cannot read %s: %s", path, error) from None
    regions = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not re.match(r"#|(track|browser)(\s|\Z)", line):
            columns: List[Any] = line.split("\t" if "\t" in line else None)
            try:
                if len(columns) < 3:
                    raise RequestError("fewer than three columns")
                regions.append(Region(*columns[:3]))
                _regions(regions[-1:])
            except RequestError as error:
                raise RequestError("%s, line %d: %s", path, number, error) from None
    if not regions:
        raise RequestError("%s has no regions", path)
    return regions


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> Any:
        """What is wrong with the arguments."""
        raise RequestError(message)


def _parse_arguments(argv: List[str]) -> argparse.Namespace:
    """The arguments, where no option can be abbreviated: argparse's own way to forbid
    that also forbids -vv before Python 3.8. `words`: the options by what `get` calls
    them."""
    parser = _Parser(
        prog="htsget",
        description="Fetch slices of BAM, CRAM, VCF and BCF files from htsget servers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "address of the data; or a file with a ticket, - for standard input"
    parser.add_argument("url", metavar="URL", help=text)
    version = "%(prog)s " + __version__
    parser.add_argument("-V", "--version", action="version", version=version)
    actions = _add_options(parser)
    words = {action.dest: "/".join(action.option_strings) for action in actions}
    parser.set_defaults(words=words)
    flags = {flag for action in actions for flag in action.option_strings}
    for arg in argv[: argv.index("--") if "--" in argv else None]:
        name = arg.partition("=")[0]
        if name.startswith("--") and name not in flags | {"--help", "--version"}:
            parser.error("unrecognized arguments: %s" % arg)
    return parser.parse_args(argv)


def _add_options(parser: argparse.ArgumentParser) -> List[argparse.Action]:
    """Add the options; defaults that are not given here are those of `get`."""
    kinds: Dict[str, Any] = {"N": {"type": int}, "SECONDS": {"type": float}}
    many: Dict[str, Any] = {"action": "append", "default": []}
    either: Dict[str, Any] = {"dest": "show_progress", "default": None}
    actions = []

    def add(flags: str, value: str, text: str, **more: Any) -> None:
        settings = dict(kinds.get(value, {}), help=text, **more)
        if value:
            settings["metavar"] = value
        elif "action" not in more:
            settings["action"] = "store_false" if "--no-" in flags else "store_true"
        actions.append(group.add_argument(*flags.split(), **settings))

    group = parser.add_argument_group("request")
    add("-f --format", "FORMAT", "BAM, CRAM, VCF or BCF", dest="data_format")
    add("-r --reference-name", "NAME", "reference, such as chr1")
    add("-m --reference-md5", "MD5", "MD5 of the reference sequence")
    add("-s --start", "N", "first position, 0-based")
    add("-e --end", "N", "end position, 0-based, exclusive")
    add(
        "--region", "REGION", "chr1:1,000-2,000, 1-based, inclusive; repeatable", **many
    )
    add("-L --regions-file", "BED", "regions, 0-based; - for standard input")
    add("--fields", "LIST", "SAM fields to include, comma-separated")
    add("--tags", "LIST", "tags to include; '' for none")
    add("--notags", "LIST", "tags to leave out")
    add("--class", "CLASS", "'header': header only", dest="data_class")
    add("--service-info", "", "print what the server says about itself, and stop")
    add("--dry-run", "", "print what the ticket says, and stop")
    group = parser.add_argument_group("transfer")
    add("-M --max-retries", "N", "in a row without progress (default: 5; <0: no limit)")
    add("-W --retry-wait", "SECONDS", "wait before the first retry (default: 5)")
    add("-c --connections", "N", "the most connections at once (default: 4)")
    add("--no-verify", "", "do not check MD5, format and end of data", dest="verify")
    add("--no-resume", "", "start over, whatever is in PATH.part", dest="resume")
    group = parser.add_argument_group("connection")
    add("-T --timeout", "SECONDS", "how long to wait for data (default: 120)")
    add("-b --bearer-token", "TOKEN", "token for the ticket server")
    add(
        "--bearer-token-file",
        "PATH",
        "file with the token (default: $HTS_AUTH_LOCATION)",
    )
    add("-H --headers", "HEADER", "'Name: value', repeatable; or a JSON object", **many)
    add("--cacert", "PATH", "file or folder of additional CA certificates")
    group = parser.add_argument_group("output")
    add("-O -o --output", "PATH", "file to write (default, and -: standard output)")
    add("--progress", "", "show progress even without a terminal", **either)
    add("--no-progress", "", "show no progress", **either)
    add("-q --quiet", "", "show errors only")
    add("-v --verbose", "", "say more (-vv: most)", action="count", default=0)
    return actions


# ---- the modules of the htsget package on PyPI, where this file stands in for it


def htsget_main() -> None:
    """Run the command line and exit, as htsget 0.2.6 does."""
    sys.exit(main())


if __name__ == "htsget":
    exceptions = io = protocol = cli = sys.modules[__name__]
    for _name in ("exceptions", "io", "protocol", "cli"):
        sys.modules["htsget." + _name] = sys.modules[__name__]

if __name__ == "__main__":
    sys.exit(main())
