# SPDX-License-Identifier: MIT
# Copyright (c) 2026 The htsget.py developers
"""Fetch slices of BAM, CRAM, VCF and BCF files over the GA4GH htsget protocol.

An htsget server answers a request with a ticket: a JSON list of data blocks, each a
URL (a byte range of a file, or a ``data:`` URI) with the headers it needs. The file
that was asked for is the concatenation of the blocks. This module asks for the
ticket, fetches the blocks and joins them. It is one file, needs the standard library
only, and works on CPython 3.6 and later.

Library use:

    import htsget

    # To a path: "NA12878.bam" appears when, and only when, it is complete.
    htsget.get("https://example.org/reads/NA12878", "NA12878.bam",
               reference_name="chr1", start=0, end=100000, data_format="BAM")

    # To any binary file object.
    with open("NA12878.bam", "wb") as output:
        htsget.get("https://example.org/reads/NA12878", output)

    # As a stream that is read while the data comes.
    with gzip.open(htsget.open("https://example.org/variants/x"), "rt") as vcf:
        for line in vcf:
            ...

    # The ticket by itself, and what the server says of itself.
    ticket = htsget.get_ticket("https://example.org/reads/NA12878")
    info = htsget.service_info("https://example.org/reads")

Command line:

    python -m htsget https://example.org/reads/NA12878 -O NA12878.bam
    python3 htsget.py --help

What ``get`` returns from without an exception is exactly the concatenation of the
ticket's data blocks. Everything that goes wrong between here and the servers is an
`HtsgetException`; errors of the output (disk full, broken pipe) are the `OSError`
they are.
"""

import argparse
import base64
import binascii
import collections
import contextlib
import copy
import email.utils
import errno
import functools
import hashlib
import http.client
import io
import json
import logging
import operator
import os
import random
import re
import shutil
import signal
import socket
import ssl
import stat
import struct
import sys
import threading
import time
import urllib.parse
import urllib.request
import zlib
from typing import (
    Any,
    BinaryIO,
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
    Pattern,
    Set,
    TextIO,
    Tuple,
    TypeVar,
    Union,
)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore

__version__ = "1.0.0"

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
    "open",
    "parse_region",
    "service_info",
]

_log = logging.getLogger("htsget")


# ---- constants

# The media type of the protocol version that is spoken here (spec: "Versioning").
_MEDIA_TYPE = "application/vnd.ga4gh.htsget.v1.3.0+json"

# Bytes asked of a socket at once. Larger reads are no faster, and above malloc's
# mmap threshold every one of them would cost page faults.
_CHUNK = 1 << 17

# Bytes that a chunk which is kept for later costs beside its own.
_CHUNK_COST = 250

# A ticket with inline data may be large; endless JSON must not fill the memory.
_TICKET_LIMIT = 64 << 20

# Bytes of an error's body that are looked at, and characters of it that are shown.
_ERROR_LIMIT = 1 << 16
_ERROR_SHOWN = 300

# TLS delivers bulk data in full records; as many are joined before they go on.
_TLS_RECORD = 1 << 14
_TLS_RECORDS = 8

# Bytes of an answer's head, and informational (1xx) answers before the real one.
_HEAD_LIMIT = 1 << 17
_INFORMATIONAL_LIMIT = 20

# What browsers and curl allow is more; an archive needs one or two.
_REDIRECT_LIMIT = 10

# Bytes that all parts fetched ahead may hold together, and that a kill may cost, for
# each connection and at the most.
_WINDOW_EACH = 4 << 20
_WINDOW_MOST = 32 << 20

# The most parts under way at once: a piece of the window is then worth a request.
_PARTS_MOST = 128

# Seconds between two looks at how busy the process is; the share of a processor below
# which it is mostly idle, so that more connections would pay, and above which they do
# not; and how many looks in a row have to say so before one connection is tried again.
_LOOK = 0.025
_IDLE = 0.25
_BUSY = 0.9
_BUSY_LOOKS = 10

# Seconds without a byte after which idle connections are closed, and after which full
# parts let go of theirs, in case that the server handles only so many at a time.
_STARVED = 0.5
_LET_GO = 3.0

# Seconds between two lines of the progress meter on a terminal, and elsewhere; and the
# time over which the rate is taken.
_METER_TERMINAL = 0.2
_METER_LOG = 30.0
_METER_SPAN = 5.0

# Bytes after which the journal gets an entry: what a kill may cost.
_JOURNAL_STEP = 1 << 20

# New bytes after which a transfer counts as going on, so that its retries begin anew.
_PROGRESS = 1 << 16

# The longest wait between two retries, unless `retry_wait` or the server ask for more.
_LONGEST_WAIT = 60.0

# The longest timeout: what the system calls take, in milliseconds.
_LONGEST_TIMEOUT = 2e6

# The longest wait that a server can impose with Retry-After.
_LONGEST_RETRY_AFTER = 3600.0

# Seconds for which an answer that was asked for ahead is relied on: a server gives up
# what nobody reads.
_AHEAD_LASTS = 10.0

# Answers that a later attempt may overcome. 520 to 529 are those of CDNs.
_RETRIED_STATUS = {408, 429, 500, 502, 503, 504} | set(range(520, 530))

# Answers that stand for an expired URL when the ticket was good before.
_EXPIRED_STATUS = {400, 401, 403, 404, 410}

# Answers of servers that refuse a Range which is not the one in the ticket.
_RANGE_REFUSED_STATUS = {400, 403, 416}

# The SAM fields of the spec's `fields` parameter.
_FIELDS = "QNAME FLAG RNAME POS MAPQ CIGAR RNEXT PNEXT TLEN SEQ QUAL".split()

# The environment variable with which htslib's users allow tokens over plain http.
_ALLOW_PLAIN = ("HTS_ALLOW_UNENCRYPTED_AUTHORIZATION_HEADER", "I understand the risks")

# Headers that say how a message is framed are this client's own business.
_OWN_HEADERS = {
    "accept-encoding",
    "connection",
    "content-length",
    "expect",
    "keep-alive",
    "te",
    "transfer-encoding",
    "upgrade",
}


# ---- exceptions


class HtsgetException(Exception):
    """Base of every exception that a failed transfer ends in."""

    # Whether the same request may succeed when it is made again right away.
    _transient = False
    # Seconds that the server asked to wait before that.
    _retry_after = 0.0


class RequestError(HtsgetException, ValueError):
    """The caller asked for something that the protocol forbids."""


class ProtocolError(HtsgetException):
    """The server's ticket or answer breaks the protocol."""


class IntegrityError(ProtocolError):
    """The bytes are complete but wrong: MD5, format, BGZF chain or EOF marker."""


class ClientError(HtsgetException):
    """The server refused the request.

    `status` is the HTTP status (int), `error` the error type of the htsget spec
    (section "Errors") or the HTTP reason, `message` the server's explanation.
    """

    def __init__(self, status: int, error: str, message: str, url: str = "") -> None:
        super().__init__(status, error, message, url)
        self.status = status
        self.error = error
        self.message = message
        self._url = url

    def __str__(self) -> str:
        text = "HTTP %d %s" % (self.status, self.error)
        if self.message:
            text += ": " + self.message
        return text + (" (%s)" % self._url if self._url else "")


class RetryableError(HtsgetException):
    """Gave up on something that a later run may overcome."""

    _transient = True


class RetryableIOError(RetryableError):
    """A connection error, a timeout or a 5xx answer; the cause is chained."""


class ContentLengthMismatch(RetryableError):
    """An answer ended early."""


# ---- the ticket request


class Region(NamedTuple):
    """A piece of a reference: its name, and 0-based half-open `start` and `end`."""

    reference_name: str
    start: Optional[int] = None
    end: Optional[int] = None


class _Options(NamedTuple):
    """The options of `get`, in its order."""

    reference_name: Optional[str] = None
    reference_md5: Optional[str] = None
    start: Optional[int] = None
    end: Optional[int] = None
    fields: Union[str, Iterable[str], None] = None
    tags: Union[str, Iterable[str], None] = None
    notags: Union[str, Iterable[str], None] = None
    data_format: Optional[str] = None
    max_retries: int = 5
    retry_wait: float = 5
    timeout: Optional[float] = 120
    bearer_token: Union[str, Callable[[], Optional[str]], None] = None
    headers: Optional[Mapping[str, str]] = None
    data_class: Optional[str] = None
    regions: Optional[Iterable[Tuple[Any, ...]]] = None
    connections: int = 4
    verify: bool = True
    resume: bool = True
    progress: Optional[Callable[[int, Optional[int]], Any]] = None
    ssl_context: Optional[ssl.SSLContext] = None


class _TicketRequest:
    """What is asked of the ticket server: a URL, headers and, for POST, a body."""

    __slots__ = ("url", "body", "_headers", "_token")

    def __init__(self, url: str, options: _Options) -> None:
        """Check the options and raise RequestError before anything is sent."""
        self.url, login = _without_userinfo(_checked_url(url))
        self.body: Optional[bytes] = None
        self._headers = login
        self._token = options.bearer_token
        for name, value in (options.headers or {}).items():
            _require_header(name, value)
            self._headers[name.title()] = value
        if self._token is not None and "Authorization" in self._headers:
            _log.warning("the bearer token replaces the Authorization header")
        if not callable(self._token):
            self.headers()
        parameters = _parameters(options)
        if options.regions is None:
            self.url = _with_query(self.url, parameters)
        else:
            single = (options.reference_name, options.start, options.end)
            if single != (None, None, None):
                raise RequestError("regions go without reference_name, start and end")
            parameters["regions"] = _regions(options.regions)
            self.body = json.dumps(parameters).encode("ascii")

    def headers(self) -> Dict[str, str]:
        """The request's headers; a token that comes from a function is fresh.

        A login from .netrc is used when there is no other.
        """
        headers = {"Accept": _MEDIA_TYPE}
        if self.body is not None:
            headers["Content-Type"] = "application/json"
        headers.update(self._headers)
        token = self._token() if callable(self._token) else self._token
        if token is not None:
            _require_header("Authorization", token)
            headers["Authorization"] = "Bearer " + token
        private = _is_private(self.url)
        if headers.get("Authorization", "").startswith("Bearer ") and not private:
            raise RequestError(
                "not sending a token to %s over plain http; use https, or set %s='%s'"
                % ((_shown(self.url),) + _ALLOW_PLAIN)
            )
        if "Authorization" not in headers and private:
            headers.update(_netrc_login(self.url))
        return headers


def _is_private(url: str) -> bool:
    """Whether nobody on the way can read a request: https, or within this machine; or
    the user said, in htslib's way, that it does not matter."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    loopback = re.match(r"(.+\.)?localhost\Z|127(\.\d{1,3}){3}\Z|::1\Z", host)
    name, value = _ALLOW_PLAIN
    return bool(parts.scheme == "https" or loopback or os.environ.get(name) == value)


def _netrc_login(url: str) -> Dict[str, str]:
    """The Authorization header that .netrc (or the file NETRC) has for a URL's host."""
    import netrc

    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    if not os.path.exists(path):
        return {}
    try:
        host = urllib.parse.urlsplit(url).hostname or ""
        known = netrc.netrc(path).authenticators(host)
    except (OSError, ValueError, netrc.NetrcParseError) as error:
        # Before Python 3.11 one odd line is enough.
        reason = getattr(error, "msg", None) or type(error).__name__
        _log.warning("cannot use %s: %s", path, reason)
        return {}
    if known is None:
        return {}
    login = "%s:%s" % (known[0] or "", known[2] or "")
    return {"Authorization": _basic(login.encode("utf-8"))}


def _basic(login: bytes) -> str:
    return "Basic " + base64.b64encode(login).decode("ascii")


def _require_header(name: Any, value: Any) -> None:
    """Raise RequestError for a header of the caller's that cannot be sent."""
    problem = _header_problem(name, value)
    if problem:
        raise RequestError(problem)


# The many blocks of a ticket often have one URL.
@functools.lru_cache(maxsize=64)
def _url_problem(url: str) -> Optional[str]:
    """What keeps a URL from being fetched, in words that do not show it."""
    if re.search("[^\x21-\x7e]", url):
        return "it has spaces, control or non-ASCII characters"
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https"):
            return "it is neither http nor https"
        if not parts.hostname:
            return "it names no host"
        if parts.port == 0:
            return "its port is 0"
        if re.search("[^\x21-\x7e]", urllib.parse.unquote(parts.hostname)):
            return "its host has spaces, control or non-ASCII characters"
    except ValueError:
        return "its host or port is malformed"
    return None


def _checked_url(url: str) -> str:
    """The caller's URL, with what URLs cannot hold percent-encoded."""
    if not isinstance(url, str):
        raise RequestError("the URL is no string")
    if re.search("[\x00-\x1f\x7f]", url):
        raise RequestError("the URL has control characters")
    url = urllib.parse.quote(url.strip(), safe="!#$%&'()*+,/:;=?@[]~\"<>\\^`{|}")
    problem = _url_problem(url)
    if problem:
        raise RequestError("cannot use the URL %s: %s" % (_shown(url), problem))
    return urllib.parse.urldefrag(url).url


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
    """A foreign text as it may be printed: one line, no control characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _header_problem(name: Any, value: Any) -> Optional[str]:
    """What keeps a header from being sent, in words that do not show its value."""
    if not isinstance(name, str) or not isinstance(value, str):
        return "a header's name or value is no string"
    if not re.match(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z", name):
        return "a header's name is malformed"
    if not re.match("[\t\x20-\x7e\x80-\xff]*\\Z", value):
        return "the header %s has control characters or is not Latin-1" % name
    return None


def _parameters(options: _Options) -> Dict[str, Any]:
    """The request parameters of the spec (section "Query parameters"), checked."""
    parameters: Dict[str, Any] = {}
    if options.data_format is not None:
        parameters["format"] = options.data_format.upper()
    if options.data_class is not None:
        if options.data_class != "header":
            raise RequestError("data_class is None or 'header'")
        if options.data_format is None:
            raise RequestError("data_class='header' goes only with data_format")
        parameters["class"] = options.data_class
    if options.reference_name is not None:
        parameters["referenceName"] = options.reference_name
    if options.reference_md5 is not None:
        if not re.match(r"[0-9A-Fa-f]{32}\Z", options.reference_md5):
            raise RequestError("reference_md5 is not 32 hexadecimal digits")
        parameters["referenceMD5"] = options.reference_md5
    parameters.update(_interval(options.start, options.end))
    if "start" in parameters or "end" in parameters:
        if options.reference_name in (None, "*") and options.reference_md5 is None:
            raise RequestError("start and end go only with a reference that is not '*'")
    parameters.update(_name_lists(options))
    return parameters


def _interval(start: Optional[int], end: Optional[int]) -> Dict[str, int]:
    """The parameters `start` and `end`: 0 <= start <= end < 2**32."""
    interval = {}
    for name, value in (("start", start), ("end", end)):
        if value is not None:
            try:
                interval[name] = operator.index(value)
            except TypeError:
                raise RequestError("%s is no integer" % name) from None
            if not 0 <= interval[name] < 1 << 32:
                raise RequestError("%s is not between 0 and 2**32 - 1" % name)
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
            lists[key] = [name.strip() for name in names if name.strip()]
    if "fields" in lists:
        lists["fields"] = [name.upper() for name in lists["fields"]]
        unknown = sorted(set(lists["fields"]) - set(_FIELDS))
        if unknown or not lists["fields"]:
            wrong = "unknown fields %s" % unknown if unknown else "fields is empty"
            raise RequestError("%s; there are %s" % (wrong, " ".join(_FIELDS)))
    both = sorted(set(lists.get("tags", ())) & set(lists.get("notags", ())))
    if both:
        raise RequestError("tags and notags overlap: %s" % ", ".join(both))
    if not lists.get("notags"):
        # Nothing to leave out is what the server assumes anyway.
        lists.pop("notags", None)
    return lists


def _regions(regions: Iterable[Tuple[Any, ...]]) -> List[Dict[str, Any]]:
    """The `regions` of a POST body (spec: "POST request")."""
    result = []
    for region in regions:
        if not isinstance(region, (tuple, list)) or not 1 <= len(region) <= 3:
            raise RequestError("a region is no tuple (name, start, end)")
        name, start, end = Region(*region)
        interval = _interval(start, end)
        if not isinstance(name, str) or (name == "*" and interval):
            raise RequestError("a region needs a reference name, '*' no start and end")
        result.append(dict(interval, referenceName=name))
    if not result:
        raise RequestError("regions is empty")
    return result


def _with_query(url: str, parameters: Mapping[str, Any]) -> str:
    """The URL with the parameters added to its query; what is there stays as it is."""
    pairs = [
        (name, ",".join(value) if isinstance(value, list) else value)
        for name, value in parameters.items()
    ]
    added = urllib.parse.urlencode(pairs, quote_via=urllib.parse.quote, safe=",*:")
    parts = urllib.parse.urlsplit(url)
    query = "&".join(text for text in (parts.query, added) if text)
    return parts._replace(query=query).geturl()


# ---- the ticket


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
    does not say.
    """

    format: Optional[str]
    blocks: List[DataBlock]
    md5: Optional[str] = None


def _parse_ticket(raw: bytes) -> Ticket:
    """Read a ticket, or raise ProtocolError (spec: "Response JSON fields")."""
    document = _parse_json(raw, "the ticket")
    body = _typed(document, "htsget", dict, "the ticket")
    if body is None:
        raise ProtocolError("the ticket has no object 'htsget'")
    if "error" in body:
        raise ProtocolError(
            "the ticket is an error: %s" % _printable(": ".join(_error_text(body)))
        )
    entries = _typed(body, "urls", list, "the ticket")
    if entries is None:
        raise ProtocolError("the ticket has no list 'urls'")
    data_format = _typed(body, "format", str, "the ticket")
    md5 = _typed(body, "md5", str, "the ticket")
    ticket = Ticket(
        data_format.upper() if data_format else None,
        [_parse_block(entry, number) for number, entry in enumerate(entries, 1)],
        md5,
    )
    _check_ticket(ticket)
    return ticket


def _parse_json(raw: bytes, what: str) -> Dict[str, Any]:
    """A JSON object that came from a server."""

    def refuse(constant: str) -> Any:
        raise ValueError("%s is not JSON" % constant)

    try:
        text = raw.decode("utf-8-sig")
        document = json.loads(text, parse_constant=refuse, parse_int=_parse_int)
        if isinstance(document, dict):
            return document
        problem = "not a JSON object"
    except UnicodeDecodeError:
        problem = "not UTF-8"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:
        problem = "not valid JSON: " + _printable(str(error), 100)
    # Outside of the handlers: their exceptions hold the text, secrets included.
    raise ProtocolError("%s is %s" % (what, problem))


def _parse_int(digits: str) -> float:
    """An integer; int() would take forever on a million digits."""
    return int(digits) if len(digits) < 300 else float(digits)


def _typed(container: Mapping[str, Any], key: str, kind: Any, what: str) -> Any:
    """A value of an object in the ticket; None when absent or null."""
    value = container.get(key)
    if value is not None and not isinstance(value, kind):
        names = {dict: "object", list: "list", str: "string"}
        raise ProtocolError("%r in %s is no %s" % (key, what, names[kind]))
    return value


def _parse_block(entry: Any, number: int) -> DataBlock:
    """One entry of the ticket's `urls`."""
    what = "data block %d" % number
    if not isinstance(entry, dict):
        raise ProtocolError("%s is not a JSON object" % what)
    url = _typed(entry, "url", str, what)
    if url is None:
        raise ProtocolError("%s has no 'url'" % what)
    headers = _typed(entry, "headers", dict, what)
    data_class = _typed(entry, "class", str, what)
    if data_class is None:
        # The EGA's name for it.
        data_class = _typed(entry, "urlClass", str, what)
    return DataBlock(url, headers or {}, data_class)


def _check_ticket(ticket: Ticket) -> None:
    """Raise ProtocolError for a ticket that cannot be fetched as it stands."""
    if ticket.md5 is not None and not re.match(r"[0-9A-Fa-f]{32}\Z", ticket.md5):
        raise ProtocolError("the ticket's md5 is not 32 hexadecimal digits")
    for number, block in enumerate(ticket.blocks, 1):
        what = "data block %d" % number
        problem = None
        if block.url[:5].lower() == "data:":
            _decode_data_uri(block.url, what)
        else:
            problem = _url_problem(block.url)
        if problem:
            raise ProtocolError("cannot use the URL of %s: %s" % (what, problem))
        for name, value in block.headers.items():
            problem = _header_problem(name, value)
            if problem:
                raise ProtocolError("%s: %s" % (what, problem))


def _decode_data_uri(uri: str, what: str) -> bytes:
    """The bytes of a data URI (RFC 2397), also in the EGA's form data:base64,..."""
    header, comma, data = uri[5:].partition(",")
    if not comma:
        raise ProtocolError("the data URI of %s has no comma" % what)
    with contextlib.suppress(UnicodeEncodeError, binascii.Error):
        content = urllib.parse.unquote_to_bytes(data)
        if header.split(";")[-1].strip().lower() == "base64":
            content = base64.b64decode(b"".join(content.split()), validate=True)
        return content
    raise ProtocolError("the data URI of %s is malformed" % what)


def _error_text(body: Mapping[str, Any]) -> List[str]:
    """The error type and message of an htsget error object (spec: "Errors")."""
    return [str(body[key]) for key in ("error", "message") if body.get(key)]


# ---- transport

_UNTRUSTED = (
    "%s: the server's certificate is not trusted: %s; if it is of a private authority, "
    "name that one's certificate with --cacert or SSL_CERT_FILE (Python 3.13 and later "
    "are stricter than others)"
)

# What the standard library raises for broken connections and broken answers.
_LIBRARY_ERRORS = (OSError, http.client.HTTPException, ValueError)

# What it raises for a connection that the other side has closed.
_DEAD = (ConnectionError, ssl.SSLError)

# How to see what has come unasked; Windows cannot.
_PEEK = 0
if hasattr(socket, "MSG_DONTWAIT"):
    _PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)

# The head of an answer, and the framing of its body.
_LINE_END = re.compile(rb"\n")
_BLANK_LINE = re.compile(rb"^\r?\n", re.M)
_FOLD = re.compile(r"\n[ \t]+")
_STATUS_LINE = re.compile(r"HTTP/1\.([0-9]) +([1-9][0-9][0-9])(| .*)\r?\n\Z")
_CHUNK_SIZE = re.compile(r"([0-9A-Fa-f]{1,15})[ \t]*(;.*)?\r?\n\Z")
_CONTENT_LENGTH = re.compile(r"[0-9]{1,18}\Z")


class _Connection:
    """A connection to a server, and what has come over it and was not taken yet.

    http.client connects. A second handle on the socket allows another thread to shut it
    down, whatever this one is doing.
    """

    def __init__(self, made: http.client.HTTPConnection) -> None:
        self._made = made
        # What http.client calls to get a socket.
        made._create_connection = self._connect  # type: ignore
        self._handle: Optional[socket.socket] = None
        self._lock = threading.Lock()
        self._shut = False
        # The request that was sent and not answered yet, and when (time.monotonic).
        self.asked: Optional[bytes] = None
        self.asked_at = 0.0
        # What came ahead of being taken, and how much of that was taken.
        self._ahead = b""
        self._taken = 0

    def _connect(
        self, address: Tuple[str, int], timeout: Optional[float], source: Any = None
    ) -> socket.socket:
        """socket.create_connection, with a handle on the socket from the beginning."""
        failure = OSError("no address for %s" % address[0])
        for found in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            plain = None
            try:
                plain = socket.socket(*found[:3])
                with self._lock:
                    self._handle = plain.dup()
                    # The module's default would make it wait.
                    self._handle.settimeout(None)
                plain.settimeout(timeout)
                if not self._shut:
                    plain.connect(found[4])
                if self._shut:
                    raise ConnectionAbortedError("given up")
                return plain
            except OSError as error:
                failure = error
                if plain is not None:
                    plain.close()
                self._close_handle()
        raise failure

    def is_free(self) -> bool:
        """Whether nothing was sent, and nothing has come: its end, or bytes that belong
        to no request."""
        # TLS may have decrypted more than was taken.
        pending = getattr(self._made.sock, "pending", None)
        if self.asked or self._ahead or self._handle is None or (pending and pending()):
            return False
        try:
            if _PEEK:
                self._handle.recv(1, _PEEK)
            return not _PEEK
        except BlockingIOError:
            return True
        except OSError:
            return False

    def ask(self, message: bytes) -> None:
        """Send a request."""
        self._made.send(message)
        self.asked, self.asked_at = message, time.monotonic()

    def wait(self) -> None:
        """Wait until something comes for the request that was sent."""
        self._ahead = self._made.sock.recv(_CHUNK)
        if not self._ahead:
            raise http.client.RemoteDisconnected("closed without an answer")
        self.asked = None

    def take(self, most: int) -> bytes:
        """The next bytes, as many as there are up to `most`; b"" at the end."""
        if not self._ahead:
            return self._made.sock.recv(most)
        return self._take_ahead(self._taken + most)

    def take_to(self, end: Pattern[bytes]) -> str:
        """What comes up to a match of `end`, with that."""
        while True:
            match = end.search(self._ahead, self._taken)
            if match:
                return self._take_ahead(match.end()).decode("latin-1")
            self._ahead, self._taken = self._ahead[self._taken :], 0
            if len(self._ahead) > _HEAD_LIMIT:
                raise http.client.HTTPException("a line or head that is too long")
            data = self._made.sock.recv(_CHUNK)
            if not data:
                raise http.client.IncompleteRead(b"")
            self._ahead += data

    def _take_ahead(self, stop: int) -> bytes:
        data = self._ahead[self._taken : stop]
        self._taken += len(data)
        if self._taken == len(self._ahead):
            self._ahead, self._taken = b"", 0
        return data

    def shut_down(self) -> None:
        """End it for good; a thread that waits for it gets an error."""
        self._shut = True
        with self._lock:
            if self._handle is not None:
                with contextlib.suppress(OSError):
                    self._handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of it."""
        self._made.close()
        self._close_handle()

    def _close_handle(self) -> None:
        with self._lock:
            if self._handle is not None:
                self._handle.close()


class _Answer:
    """One HTTP answer: status, headers, and a body whose bytes are counted.

    The head is read here, which is strict and bounded, and takes half the time that the
    standard library's e-mail parser does.
    """

    def __init__(
        self, url: str, connection: _Connection, release: Callable[[bool], None]
    ) -> None:
        self.url = url
        self._connection = connection
        self._release = release
        for _ in range(_INFORMATIONAL_LIMIT):
            persistent = self._read_status()
            # By lower-case name.
            self.headers = self._read_fields()
            if self.status >= 200:
                break
        else:
            raise http.client.HTTPException("endless informational answers")
        options = self.headers.get("connection", "").lower()
        persistent = persistent or "keep-alive" in options
        coding = self.headers.get("transfer-encoding", "identity").lower()
        if coding not in ("identity", "chunked"):
            raise http.client.HTTPException("unknown Transfer-Encoding")
        self._chunked = coding == "chunked"
        # Bytes that are missing of a chunk; None before the first one.
        self._chunk_left: Optional[int] = None
        # The body's length in bytes, None where only its end will tell; and whether
        # that end can be told from a cut connection.
        self.length = None if self._chunked else self._content_length()
        self.framed = self._chunked or self.length is not None
        self._reusable = self.framed and persistent and "close" not in options

    def _read_status(self) -> bool:
        """Read the first line; whether connections of its version are kept."""
        line = self._connection.take_to(_LINE_END)
        match = _STATUS_LINE.match(line)
        if match is None:
            raise http.client.BadStatusLine(line)
        self.status, self.reason = int(match.group(2)), match.group(3).strip()
        return match.group(1) != "0"

    def _read_fields(self) -> Dict[str, str]:
        """Read headers or trailers."""
        fields: Dict[str, str] = {}
        text = self._connection.take_to(_BLANK_LINE).replace("\r\n", "\n")
        for line in _FOLD.sub(" ", text).split("\n"):
            name, colon, value = line.partition(":")
            if colon:
                name, value = name.lower(), value.strip()
                fields[name] = fields[name] + ", " + value if name in fields else value
            elif name.strip():
                raise http.client.HTTPException("a malformed header")
        return fields

    def _content_length(self) -> Optional[int]:
        if self.status in (204, 304):
            return 0
        value = self.headers.get("content-length")
        if value is None:
            return None
        # It may have come twice.
        value, *others = {length.strip() for length in value.split(",")}
        if others or not _CONTENT_LENGTH.match(value):
            raise http.client.HTTPException("a malformed Content-Length")
        return int(value)

    def _take_chunked(self, most: int) -> bytes:
        """The next bytes of a chunked body; b"" at its end."""
        if not self._chunk_left:
            self._chunk_left = self._next_chunk()
            if self._chunk_left == 0:
                return b""
        data = self._connection.take(min(most, self._chunk_left))
        if not data:
            raise http.client.IncompleteRead(b"")
        self._chunk_left -= len(data)
        return data

    def _next_chunk(self) -> int:
        """The size of the next chunk; 0 at the body's end."""
        if self._chunk_left == 0:
            end = self._connection.take_to(_LINE_END)
        else:
            end = ""
        match = _CHUNK_SIZE.match(self._connection.take_to(_LINE_END))
        if match is None or end.strip():
            raise http.client.IncompleteRead(b"")
        size = int(match.group(1), 16)
        if size == 0:
            try:
                self._read_fields()
            except _LIBRARY_ERRORS:
                # All of the body is there.
                self._reusable = False
        return size

    def chunks(self) -> Iterator[bytes]:
        """The body, piece by piece; ContentLengthMismatch when it ends early."""
        take = self._take_chunked if self._chunked else self._connection.take
        left = self.length
        failure: Optional[HtsgetException] = None
        records: List[bytes] = []
        while left is None or left > 0:
            most = _TLS_RECORD if records else _CHUNK
            try:
                data = take(min(most, left or most))
            except _LIBRARY_ERRORS as error:
                data, failure = b"", _network_error(error, self.url)
            if not data:
                break
            if left is not None:
                left -= len(data)
            if records or len(data) == _TLS_RECORD:
                records.append(data)
                if len(data) == _TLS_RECORD and len(records) < _TLS_RECORDS and left:
                    continue
                data, records = b"".join(records), []
            if left == 0:
                # The next request may use the connection while this is delivered.
                self._finish(self._reusable)
            yield data
        if records:
            yield b"".join(records)
        if failure is not None:
            raise failure
        if left:
            raise ContentLengthMismatch(
                "%s: the answer ended %d bytes early" % (_shown(self.url), left)
            )
        self._finish(self._reusable)

    def _finish(self, reusable: bool) -> None:
        """Let go of the connection, once."""
        release, self._release = self._release, lambda reusable: None
        release(reusable)

    def close(self) -> None:
        """Drop what was not read, and the connection with it."""
        self._finish(False)

    def text(self) -> str:
        """The first part of an error's body; keeps the connection if that is all."""
        body = b""
        try:
            for data in self.chunks():
                body += data
                if len(body) > _ERROR_LIMIT:
                    break
        except HtsgetException:
            pass
        self.close()
        return body[:_ERROR_LIMIT].decode("utf-8", "replace")


class _HttpRequest(urllib.request.Request):
    """A request, how often it was redirected, and whose headers it carries.

    `private` headers are the caller's and for one origin only; the others are those
    of a data block and follow its redirects. `ahead`: it is only sent, over an
    idle connection, and the same request takes its answer later.
    """

    def __init__(
        self,
        url: str,
        headers: Dict[str, str],
        body: Optional[bytes] = None,
        private: bool = False,
        redirects: int = 0,
        ahead: bool = False,
    ) -> None:
        # An origin host is for cookies only, and not to be worked out each time.
        super().__init__(url, body, headers, origin_req_host="")
        # The stock ProxyHandler adds to `headers` what is for the proxy only.
        self.own_headers = headers
        self.private = private
        self.redirects = redirects
        self.ahead = ahead


class _KeepAlive(urllib.request.AbstractHTTPHandler):
    """Send requests over connections that are kept and used again.

    The stock handlers close every connection after one answer.
    """

    def __init__(self, ssl_context: Optional[ssl.SSLContext]) -> None:
        super().__init__()
        self._ssl_context = ssl_context
        self._lock = threading.Lock()
        # All connections, and those that are idle.
        self._open: Set[_Connection] = set()
        self._idle: Dict[Any, List[_Connection]] = {}
        self._aborted = False

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def http_open(self, request: _HttpRequest) -> Optional[_Answer]:
        """Exchange a request for an answer (called by the opener); or only send it, if
        a connection is idle, so that its answer is there when it is wanted."""
        tunnel = getattr(request, "_tunnel_host", None)
        key = (request.type, request.host, tunnel)
        message = self._message(request, tunnel)
        while True:
            idle = self._take_idle(key, message)
            if request.ahead and idle is None:
                return None
            connection = idle or self._new(request, tunnel)
            answered = False
            try:
                if not connection.asked:
                    connection.ask(message)
                if request.ahead:
                    self._release(key, connection, True)
                    return None
                connection.wait()
                answered = True
                release = functools.partial(self._release, key, connection)
                return _Answer(request.full_url, connection, release)
            except BaseException as error:
                self._drop(connection)
                # An idle connection may have died meanwhile: that costs no retry.
                dead = idle and not answered and isinstance(error, _DEAD)
                if not dead or self._aborted:
                    raise

    https_open = http_open

    def _take_idle(self, key: Any, message: bytes) -> Optional[_Connection]:
        """An idle connection that was asked just this, or is free."""
        while True:
            with self._lock:
                idle = self._idle.get(key)
                if not idle:
                    return None
                idle.sort(key=lambda one: (one.asked == message, one.asked is None))
                connection = idle.pop()
            fresh = time.monotonic() - connection.asked_at < _AHEAD_LASTS
            if (connection.asked == message and fresh) or connection.is_free():
                return connection
            self._drop(connection)

    def _new(self, request: _HttpRequest, tunnel: Optional[str]) -> _Connection:
        """A new connection, to the proxy where there is one."""
        host, timeout = request.host or "", request.timeout
        if request.type == "http":
            made = http.client.HTTPConnection(host, timeout=timeout)
        else:
            context = self._ssl_context or _default_ssl_context()
            made = http.client.HTTPSConnection(host, timeout=timeout, context=context)
            if tunnel:
                login = request.headers.get("Proxy-authorization")
                headers = {"Proxy-Authorization": login} if login else {}
                made.set_tunnel(tunnel, headers=headers)
        connection = _Connection(made)
        with self._lock:
            if self._aborted:
                raise ConnectionAbortedError("given up")
            self._open.add(connection)
        return connection

    @staticmethod
    def _message(request: _HttpRequest, tunnel: Optional[str]) -> bytes:
        """A request as it is sent.

        What is in it was checked when the URL and the headers came in.
        """
        headers = dict(request.unredirected_hdrs, **request.headers)
        headers["Accept-encoding"] = "identity"
        if tunnel:
            headers.pop("Proxy-authorization", None)
        lines = ["%s %s HTTP/1.1" % (request.get_method(), request.selector or "/")]
        lines += ["%s: %s" % (name.title(), value) for name, value in headers.items()]
        body = request.data if isinstance(request.data, bytes) else b""
        return "\r\n".join(lines + ["", ""]).encode("latin-1") + body

    def _release(self, key: Any, connection: _Connection, reusable: bool) -> None:
        with self._lock:
            kept = reusable and not self._aborted
            if kept:
                self._idle.setdefault(key, []).append(connection)
        if not kept:
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        connection.close()
        with self._lock:
            self._open.discard(connection)

    def close_idle(self) -> bool:
        """Close the idle connections, if there are any."""
        with self._lock:
            idle = [one for each in self._idle.values() for one in each]
            self._idle.clear()
        for connection in idle:
            self._drop(connection)
        return bool(idle)

    def abort(self) -> None:
        """Shut down every connection, in use or not, for good."""
        self._aborted = True
        self.close_idle()
        with self._lock:
            for connection in self._open:
                connection.shut_down()


class _Redirects(urllib.request.BaseHandler):
    """Follow redirects without giving anything to whom it does not belong."""

    def http_response(
        self, request: _HttpRequest, answer: Optional[_Answer]
    ) -> Optional[_Answer]:
        """Follow a redirect, if the answer is one (called by the opener)."""
        if answer is None or answer.status not in (301, 302, 303, 307, 308):
            return answer
        answer.text()
        location = answer.headers.get("location")
        if not location:
            raise _damaged("a redirect without Location", answer.url)
        if request.redirects >= _REDIRECT_LIMIT:
            raise ProtocolError("%s: too many redirects" % _shown(answer.url))
        url = urllib.parse.urljoin(request.full_url, location.strip())
        problem = _url_problem(url)
        if problem:
            text = "%s: cannot follow the redirect: %s" % (_shown(answer.url), problem)
            raise ProtocolError(text)
        # A POST keeps its method, or its regions would be lost; but 303 means GET.
        body = None if answer.status == 303 else request.data
        url, login = _without_userinfo(url)
        target = _HttpRequest(
            url,
            dict(self._headers(request, url), **login),
            body if isinstance(body, bytes) else None,
            request.private,
            request.redirects + 1,
        )
        return self.parent.open(target, timeout=request.timeout)  # type: ignore

    https_response = http_response

    @staticmethod
    def _headers(request: _HttpRequest, url: str) -> Dict[str, str]:
        """The headers that may go on to a redirect's target."""
        headers = request.own_headers
        before, after = _origin(request.full_url), _origin(url)
        if before == after:
            return headers
        if request.private:
            public = ("Accept", "Content-Type")
            return {name: headers[name] for name in public if name in headers}
        if (
            before[0] == "https"
            and after[0] == "http"
            and set(headers) - {"Range", "If-Range"}
        ):
            raise ProtocolError(
                "%s redirects to plain http, where the data block's headers must not "
                "be sent" % _shown(request.full_url)
            )
        return headers


class _Transport:
    """Sends requests through the handlers above; errors become ours."""

    def __init__(
        self, timeout: Optional[float], ssl_context: Optional[ssl.SSLContext]
    ) -> None:
        self._timeout = None if timeout is None else min(timeout, _LONGEST_TIMEOUT)
        keep_alive = _KeepAlive(ssl_context)
        self._opener = urllib.request.OpenerDirector()
        self._opener.addheaders = [("User-Agent", "htsget.py/" + __version__)]
        for handler in (urllib.request.ProxyHandler(), keep_alive, _Redirects()):
            self._opener.add_handler(handler)
        # Close the connections that are not in use, were there any?, and all of them.
        self.close_idle, self.abort = keep_alive.close_idle, keep_alive.abort

    def ask_ahead(self, url: str, headers: Dict[str, str]) -> None:
        """Send a request that is going to be made next, so that the server works on it
        meanwhile. Nothing depends on it."""
        request = _HttpRequest(url, headers, ahead=True)
        with contextlib.suppress(HtsgetException, *_LIBRARY_ERRORS):
            self._opener.open(request, timeout=self._timeout)

    def request(
        self,
        url: str,
        headers: Dict[str, str],
        body: Optional[bytes] = None,
        private: bool = False,
    ) -> _Answer:
        """The answer to a request, whatever its status, after redirects."""
        request = _HttpRequest(url, headers, body, private)
        try:
            answer: _Answer = self._opener.open(request, timeout=self._timeout)
        except HtsgetException:
            raise
        except _LIBRARY_ERRORS as error:
            failure = _network_error(error, url)
        else:
            if _log.isEnabledFor(logging.DEBUG):
                method, shown = request.get_method(), _shown(answer.url)
                _log.debug("%s %s: %d", method, shown, answer.status)
            return answer
        # Outside of the handler: its exception may hold what must not be shown.
        raise failure


@functools.lru_cache(maxsize=None)
def _ssl_context(bundle: Optional[str]) -> ssl.SSLContext:
    """Verifying, TLS 1.2 or later; trusting a file or folder of certificates, or what
    the system does. Building one takes 20 ms, so once per process."""
    context = ssl.create_default_context()
    if bundle:
        kind = "capath" if os.path.isdir(bundle) else "cafile"
        try:
            context.load_verify_locations(**{kind: bundle})
        except OSError as error:
            text = "cannot read certificates from %s: %s" % (bundle, error)
            raise RequestError(text) from None
    # Python 3.6 has no `minimum_version`; from 3.7 on these are deprecated.
    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    return context


def _default_ssl_context() -> ssl.SSLContext:
    """What the environment asks for; OpenSSL itself honours SSL_CERT_FILE and _DIR."""
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    return _ssl_context(bundle)


@functools.lru_cache(maxsize=64)
def _origin(url: str) -> Tuple[str, str, int]:
    """Scheme, host and port of a URL."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return parts.scheme, parts.hostname or "", port


def _network_error(error: Exception, url: str) -> HtsgetException:
    """The exception of ours for one of the standard library's, which becomes its cause
    unless its text may hold what must not be shown."""
    where = _shown(url)
    text = _printable(str(error) or type(error).__name__, 150)
    certificate = isinstance(error, ssl.CertificateError)
    proxy = re.match(r"Tunnel connection failed: (4\d\d) ?(.*)", text)
    failure: HtsgetException
    if certificate or getattr(error, "reason", "") == "CERTIFICATE_VERIFY_FAILED":
        failure = ProtocolError(_UNTRUSTED % (where, text))
    elif proxy:
        message = "the proxy refuses the connection"
        failure = ClientError(int(proxy.group(1)), proxy.group(2), message, where)
    elif isinstance(error, http.client.IncompleteRead):
        failure = ContentLengthMismatch("%s: the answer was cut short" % where)
    elif isinstance(error, (ValueError, http.client.InvalidURL)):
        return ProtocolError("%s: the request cannot be sent" % where)
    elif type(error) is http.client.BadStatusLine:
        return RetryableIOError("%s: the answer is not HTTP" % where)
    elif isinstance(error, socket.timeout):
        failure = RetryableIOError("%s: nothing came for too long" % where)
    else:
        failure = RetryableIOError("%s: %s" % (where, text))
    failure.__cause__ = error
    return failure


def _damaged(what: str, url: str) -> ProtocolError:
    """An answer that breaks HTTP; it may have been damaged on its way, so try again."""
    error = ProtocolError("%s: the answer has %s" % (_shown(url), what))
    error._transient = True
    return error


def _refusal(answer: _Answer) -> HtsgetException:
    """The exception for an answer that is an error (spec: "Errors")."""
    text, where = answer.text(), _shown(answer.url)
    error, message = answer.reason, text
    if text.lstrip().startswith("{") or answer.status < 400:
        # Nothing else of a JSON object is shown: it might be a ticket.
        message = ""
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            body = json.loads(text)
            body = body.get("htsget", body)
            error = str(body.get("error", error))
            message = str(body.get("message", ""))
    refused = ClientError(
        answer.status, _printable(error, 80), _printable(message), where
    )
    if answer.status not in _RETRIED_STATUS:
        return refused
    failure = RetryableIOError(str(refused))
    failure.__cause__ = refused
    failure._retry_after = _retry_after(answer.headers.get("retry-after"), time.time())
    return failure


# ---- retry policy


def _retry_after(value: Optional[str], now: float) -> float:
    """Seconds to wait for a Retry-After header (a number or a date) at time `now`."""
    text = (value or "").strip()
    if re.match(r"\d{1,9}\Z", text, re.A):
        seconds = float(text)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - now
        except (TypeError, ValueError, IndexError, OverflowError):
            return 0.0
    return max(0.0, min(seconds, _LONGEST_RETRY_AFTER))


class _Retry:
    """Counts the failures in a row of one transfer and says how long to wait."""

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
        """Seconds to wait after an error; raises it when there is no use in waiting."""
        if not error._transient or 0 <= self._limit <= self._failures:
            raise error
        doubled = self._wait * float(1 << min(self._failures, 30))
        self._failures += 1
        wait = min(doubled, max(_LONGEST_WAIT, self._wait)) * random.uniform(1.0, 1.2)
        return max(wait, error._retry_after)


# ---- reading one part


_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})\Z")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)\Z")
_SIGNED = re.compile(r"[?&]X-Amz-SignedHeaders=([^&]*)", re.I)


class _ObjectChanged(RetryableError):
    """What is behind a URL is not what earlier blocks were taken from."""

    def __init__(self) -> None:
        super().__init__("what is behind the URL has changed")


class _Again(Exception):
    """Read the part once more, in another way, at once."""


class _Stopped(Exception):
    """The transfer ends; whoever still works for it is to let go."""


class _Stored:
    """What is behind a URL that several blocks may share, known by a validator: its
    ETag, or where it has none its Last-Modified date."""

    def __init__(self, first: int) -> None:
        # The first block of those that share it.
        self.first = first
        # Whether ranges of it were served, or the whole of it instead of a range.
        self.ranged = False
        self.rangeless = False
        self.validator: Optional[str] = None
        # The blocks that have bytes of it; -1 stands for those of an earlier run.
        self._users: Set[int] = set()
        self._lock = threading.Lock()

    def recall(self, validator: str) -> None:
        """Take up the validator of an earlier run."""
        self.validator = validator
        self._users = {-1}

    def condition(self) -> Optional[str]:
        """The If-Range header; only a strong ETag is good for it (RFC 9110 13.1.5)."""
        strong = self.validator is not None and self.validator.startswith('"')
        return self.validator if strong else None

    def agree(self, validator: str, block: int, alone: bool) -> bool:
        """Whether an answer's validator is the one that was known.

        A new one is taken when no bytes but the block's own depend on the old one, and
        those are in one part (`alone`); else nothing can be mended here.
        """
        with self._lock:
            known = self.validator or validator
            same = known.replace("W/", "", 1) == validator.replace("W/", "", 1)
            if not same and not (alone and self._users <= {block}):
                raise _ObjectChanged
            self.validator = validator
            self._users.add(block)
            return same


class _Block:
    """A data block under way: the ticket's entry, and what its server has shown."""

    def __init__(self, index: int, entry: DataBlock, stored: _Stored) -> None:
        self.index = index
        self.stored = stored
        # Bytes in the block; None where only its end will tell.
        self.size: Optional[int] = None
        # The decoded content of a data URI.
        self.data: Optional[bytes] = None
        # Where the block begins in its file, if its Range says so.
        self.base = 0
        # The Range is of a kind that cannot be reckoned with.
        self.opaque = False
        # The server takes no other Range than the ticket's: it is signed, or another
        # one was of no use.
        self.pinned = False
        # The server answers a Range with the whole file.
        self.whole = False
        # The furthest end that an answer has announced.
        self.announced = 0
        # The block was refused, and has not been served since.
        self.refused = False
        self.use(entry)

    def use(self, entry: DataBlock) -> None:
        """Take URL and headers from a ticket's entry, the first or a renewed one."""
        if entry.url[:5].lower() == "data:":
            self.data = _decode_data_uri(entry.url, "data block %d" % (self.index + 1))
            self.size = len(self.data)
            return
        self.url, headers = _without_userinfo(entry.url)
        for name, value in entry.headers.items():
            if name.lower() not in _OWN_HEADERS:
                headers[name.title()] = value
        self.headers = headers
        self.origin = _origin(self.url)
        self.range = self.headers.get("Range")
        if self.range is not None:
            self._read_range(self.range)
        signed = _SIGNED.search(self.url)
        if signed:
            names = urllib.parse.unquote(signed.group(1)).lower()
            self.pinned = self.pinned or "range" in names.split(";")

    def _read_range(self, text: str) -> None:
        match = _RANGE.match(text.strip().lower())
        if match is None:
            self.opaque = self.pinned = True
            return
        self.base = int(match.group(1))
        if match.group(2):
            self.size = int(match.group(2)) + 1 - self.base
            if self.size <= 0:
                text = "data block %d has a Range that ends before it begins"
                raise ProtocolError(text % (self.index + 1))


_T = TypeVar("_T")


class _Session:
    """One transfer's dealings with its servers: the ticket, retries, connections."""

    def __init__(
        self, source: Union[_TicketRequest, Ticket], options: _Options
    ) -> None:
        self._source = source
        self._options = options
        self._ticket = Ticket(None, [])
        # Those of several blocks, by the first of these.
        self._shared: Dict[int, _Stored] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        # When an origin may be asked again (time.monotonic).
        self._busy_until: Dict[Any, float] = {}
        self.blocks: List[_Block] = []
        self.connections = options.connections
        # How many blocks `total` has counted, and their bytes.
        self._sized = self._total = 0
        # How often the ticket was renewed.
        self.renewals = 0
        self.transport = _Transport(options.timeout, options.ssl_context)

    def __enter__(self) -> "_Session":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """End all connections and waits, in all threads, for good."""
        self._stopping.set()
        self.transport.abort()

    def stopped(self) -> bool:
        """Whether that was done."""
        return self._stopping.is_set()

    def new_retry(self) -> _Retry:
        """A count of retries for one transfer."""
        return _Retry(self._options.max_retries, self._options.retry_wait)

    def pause(self, retry: _Retry, error: HtsgetException, url: str) -> None:
        """Wait before the next attempt, or raise the error if there is none."""
        if self.stopped():
            raise _Stopped
        seconds = retry.pause(error)
        if isinstance(error.__cause__, ClientError):
            # The server is busy: that goes for all connections to it.
            origin, until = _origin(url), time.monotonic() + seconds
            self._busy_until[origin] = max(until, self._busy_until.get(origin, 0))
        _log.warning("%s; trying again in %.1f s", error, seconds)
        self._wait(seconds)

    def request(self, block: _Block, headers: Dict[str, str]) -> _Answer:
        """The answer to a request for a block, once its server may be asked."""
        while True:
            seconds = self._busy_until.get(block.origin, 0) - time.monotonic()
            if seconds <= 0:
                return self.transport.request(block.url, headers)
            # Not all at the same moment.
            self._wait(seconds + random.uniform(0, 0.1))

    def ask_ahead(self, index: int) -> None:
        """Have the server begin with the block that is read next, if there is one."""
        for block in self.blocks[index : index + 1]:
            if block.data is None and not self.waiting():
                self.transport.ask_ahead(block.url, block.headers)

    def _wait(self, seconds: float) -> None:
        if self._stopping.wait(min(seconds, threading.TIMEOUT_MAX)):
            raise _Stopped

    def waiting(self) -> bool:
        """Whether a server has asked for patience."""
        return any(until > time.monotonic() for until in self._busy_until.values())

    def ticket(self) -> Ticket:
        """The ticket, asked for anew unless it was given."""
        if isinstance(self._source, Ticket):
            return self._source
        return self.retried(self._source, _parse_ticket)

    def retried(self, request: _TicketRequest, parse: Callable[[bytes], _T]) -> _T:
        """Ask the ticket server, as often as the policy says."""
        retry = self.new_retry()
        while True:
            try:
                return self._ask_once(request, parse)
            except HtsgetException as error:
                self.pause(retry, error, request.url)

    def _ask_once(self, request: _TicketRequest, parse: Callable[[bytes], _T]) -> _T:
        answer = self.transport.request(
            request.url, request.headers(), request.body, private=True
        )
        if answer.status != 200:
            error = _refusal(answer)
            if request.body and answer.status in (404, 405, 501):
                text = "the server seems not to take several regions at once"
                error = ClientError(
                    answer.status, answer.reason, text, _shown(request.url)
                )
            raise error
        try:
            return parse(_read_json(answer))
        except ProtocolError as broken:
            # Without a length it may just have been cut off.
            broken._transient = not answer.framed
            raise

    def begin(self) -> Ticket:
        """Get the ticket and make its blocks ready; those of one URL share `stored`."""
        ticket = self.ticket()
        stored: Dict[Any, _Stored] = {}
        self._ticket = ticket
        for index, entry in enumerate(ticket.blocks):
            others = frozenset(
                item for item in entry.headers.items() if item[0].lower() != "range"
            )
            key = entry.url, others
            if key not in stored:
                stored[key] = _Stored(index)
            one = stored[key]
            self.blocks.append(_Block(index, entry, one))
            if one.first != index:
                self._shared[one.first] = one
        return ticket

    def validators(self, index: int, validator: Optional[str]) -> Dict[str, str]:
        """The validators that a later run has to know: those of what several blocks
        share, and the one that the block `index` was fetched with."""
        known = {first: stored.validator for first, stored in self._shared.items()}
        for block in self.blocks[index : index + 1]:
            known[block.stored.first] = validator
        return {str(first): one for first, one in known.items() if one is not None}

    def total(self) -> Optional[int]:
        """Bytes in all blocks; None while one of them is not known."""
        while self._sized < len(self.blocks):
            size = self.blocks[self._sized].size
            if size is None:
                return None
            self._total += size
            self._sized += 1
        return self._total

    @staticmethod
    def _outline(ticket: Ticket) -> Tuple[Any, ...]:
        """What stays the same of a ticket when it is asked for again."""
        return ticket.format, ticket.md5, list(map(_shape, ticket.blocks))

    def identity(self) -> Dict[str, Any]:
        """What tells this transfer from others, without secrets: digests of the
        request and of what stays the same when the ticket is asked for again."""
        request: Any = None
        if not isinstance(self._source, Ticket):
            request = self._source.url, (self._source.body or b"").decode("ascii")
        lasting = [
            (_shape(entry), entry.url.partition("?")[0], sorted(entry.headers))
            for entry in self._ticket.blocks
        ]
        whole = self._ticket.format, self._ticket.md5, lasting
        return {"request": _digest(request), "ticket": _digest(whole)}

    def renew(self, block: _Block, renewals: int) -> bool:
        """Ask for the ticket again because a block's URL was refused, as it may have
        expired; `renewals` is how often that was done before the block was asked for.
        False when the block was refused before and has not been served since."""
        with self._lock:
            if self.renewals > renewals:
                return True
            if isinstance(self._source, Ticket) or block.refused:
                return False
            _log.warning(
                "%s was refused and may have expired; asking for the ticket again",
                _shown(block.url),
            )
            ticket = self.ticket()
            if self._outline(ticket) != self._outline(self._ticket):
                text = "the ticket, asked for again, has other data blocks"
                error = RetryableError(text)
                error._transient = False
                raise error
            block.refused = True
            for known, entry in zip(self.blocks, ticket.blocks):
                known.use(entry)
            self.renewals += 1
            return True


def _read_json(answer: _Answer) -> bytes:
    """A body that should be a JSON object; given up early when it cannot be one."""
    body = bytearray()
    try:
        for data in answer.chunks():
            body += data
            start = bytes(body[:_ERROR_LIMIT]).lstrip(b"\xef\xbb\xbf \t\r\n")
            if start and start[:1] != b"{":
                raise ProtocolError(
                    "%s: the answer is not a JSON object" % _shown(answer.url)
                )
            if len(body) > _TICKET_LIMIT:
                raise ProtocolError("%s: the ticket is too large" % _shown(answer.url))
    finally:
        answer.close()
    return bytes(body)


def _shape(entry: DataBlock) -> Tuple[Any, ...]:
    """What stays the same of a data block when its URL is signed anew."""
    headers = {name.lower(): value for name, value in entry.headers.items()}
    inline = entry.url if entry.url[:5].lower() == "data:" else None
    return headers.get("range"), entry.data_class, inline


class _Asked(NamedTuple):
    """A request for part of a block: the bytes from `start` up to `end` of the block.

    `changed`: by another Range than the ticket's.
    """

    start: int
    end: Optional[int]
    headers: Dict[str, str]
    changed: bool

    def size(self) -> Optional[int]:
        """How many bytes these are, if the end is known."""
        return None if self.end is None else self.end - self.start


class _Span(NamedTuple):
    """Where the body of an answer lies, in bytes from the block's start.

    `final`: the block or its file ends where the body ends. `guessed`: the body is
    taken for the slice that was asked for, but its length does not say so.
    """

    start: int
    end: Optional[int]
    final: bool = False
    guessed: bool = False


def _ask(block: _Block, start: int, end: Optional[int], own: bool) -> _Asked:
    """The request for the bytes from `start` up to `end` (None: all) of a block.

    `own`, and a request for the whole block, is the ticket's own, to the letter. Ranges
    are closed wherever the end is known: some servers fail on open ones.
    """
    if own or block.pinned or (start == 0 and (end is None or end == block.size)):
        return _Asked(0, block.size, block.headers, False)
    last = "" if end is None else str(block.base + end - 1)
    headers = dict(block.headers, Range="bytes=%d-%s" % (block.base + start, last))
    condition = block.stored.condition()
    if condition is not None:
        headers["If-Range"] = condition
    return _Asked(start, end, headers, True)


def _locate(block: _Block, asked: _Asked, answer: _Answer) -> _Span:
    """Where in the block the answer's body lies; ProtocolError when it cannot be of
    it, _Again (with the block pinned) when only the ticket's own request can tell."""
    if "text/html" in answer.headers.get("content-type", "").lower():
        raise ProtocolError("%s: an HTML page instead of data" % _shown(answer.url))
    if answer.status == 200:
        return _locate_full(block, asked, answer)
    if block.range is None and not asked.changed:
        # Some servers have the range in the query and answer a plain request so; what
        # a Range would mean to them is anybody's guess.
        block.pinned = True
        return _Span(0, answer.length, final=True)
    text = answer.headers.get("content-range")
    if text is None:
        return _locate_unsaid(block, asked, answer)
    return _locate_partial(block, asked, answer, text.strip())


def _locate_unsaid(block: _Block, asked: _Asked, answer: _Answer) -> _Span:
    """A 206 without Content-Range: only its length can say that it is the slice."""
    if "multipart/" in answer.headers.get("content-type", ""):
        raise _damaged("several ranges", answer.url)
    rest = asked.size()
    if asked.changed and (rest is None or answer.length != rest):
        block.pinned = True
        raise _Again("%s does not say what it sends" % _shown(answer.url))
    if answer.length is None:
        return _Span(0, asked.end, asked.end is None, guessed=True)
    if rest is not None and answer.length > rest:
        raise _damaged("more than the range that was asked for", answer.url)
    return _Span(asked.start, asked.start + answer.length, asked.end is None)


def _locate_partial(block: _Block, asked: _Asked, answer: _Answer, text: str) -> _Span:
    """A 206: what its Content-Range says must be within what was asked for.

    The total behind the slash is not checked: some servers give the slice's length. It
    only helps to tell whether a short answer is short because the file ends.
    """
    match = _CONTENT_RANGE.match(text)
    if not match:
        raise _damaged("a malformed Content-Range", answer.url)
    first, stop = int(match.group(1)), int(match.group(2)) + 1
    if stop <= first or answer.length not in (None, stop - first):
        raise _damaged("a Content-Range unlike its length", answer.url)
    if block.opaque:
        return _Span(0, stop - first, final=True)
    start, end = first - block.base, stop - block.base
    if asked.changed and start == 0 and end == block.size:
        block.pinned = True
        raise _Again("%s knows only the ticket's range" % _shown(answer.url))
    if start != asked.start or (asked.end is not None and end > asked.end):
        raise _damaged("another range than was asked for", answer.url)
    total = match.group(3)
    if asked.end is None:
        final = total == "*" or int(total) <= stop
    else:
        final = total == str(stop) and (first > 0 or block.pinned)
    return _Span(start, end, final)


def _locate_full(block: _Block, asked: _Asked, answer: _Answer) -> _Span:
    """A 200: the whole block where that has no Range; otherwise the slice that was
    asked for exactly when its length says so, and the whole file when it does not."""
    length = answer.length
    rest = asked.size()
    if length is not None and length == rest:
        return _Span(asked.start, asked.end)
    if block.range is None:
        return _Span(0, length, final=True)
    if block.opaque:
        raise ProtocolError("%s ignores the Range header" % _shown(answer.url))
    if asked.changed:
        # The slice of the ticket, or the whole file: only its own Range can tell.
        block.pinned = True
        raise _Again("%s ignores the Range header" % _shown(answer.url))
    if length is None:
        if asked.end is None or block.whole or block.stored.rangeless:
            return _Span(-block.base, None, final=True)
        return _Span(0, asked.end, guessed=True)
    if length < block.base:
        raise _damaged("less than the range that was asked for", answer.url)
    return _Span(-block.base, length - block.base, final=True)


class _Chunk(NamedTuple):
    """Bytes of a block at an `offset` in it, of the part that begins at `start`.

    When the offset goes back, what came of the part is void. `validator` is that of
    the object they come from; `lasting`: a later run can go on behind them.
    """

    block: int
    start: int
    offset: int
    data: bytes
    validator: Optional[str]
    lasting: bool


class _Part:
    """A run of a block's bytes that is delivered in order, over as many attempts as
    it takes: from `start` up to `end` (None: the block's end)."""

    def __init__(
        self,
        block: _Block,
        rewindable: bool,
        start: int = 0,
        end: Optional[int] = None,
        position: int = 0,
    ) -> None:
        self.block = block
        self.start = start
        self.end = end
        # The next byte to deliver.
        self.position = max(start, position)
        # Whether the part can be delivered again; if not, what was delivered is known
        # by its CRC, which costs a third of a cryptographic digest.
        self.rewindable = rewindable
        self._delivered = self._repeated = 0
        # What was delivered must be compared with an answer from the block's start
        # before anything can be added to it.
        self.unproved = False
        # Bytes were delivered of which it is not certain that they are the slice.
        self.guessed = False
        # The end of a complete answer that was shorter than what was asked for.
        self.short: Optional[int] = None

    def limit(self) -> Optional[int]:
        """Where the part ends, as far as is known."""
        end, size = self.end, self.block.size
        if end is None or size is None:
            return size if end is None else end
        return min(end, size)

    def complete(self) -> bool:
        """Whether nothing is missing; False while the end is not known."""
        limit = self.limit()
        beyond = limit is not None and self.position == self.start > limit
        return self.position == limit or beyond

    def begin(self, span: _Span, answer: _Answer) -> None:
        """Get ready for an answer: is it the same object, does it repeat bytes?"""
        block = self.block
        if self._is_other(span, answer) or (self.guessed and not span.guessed):
            block.announced, self.short = 0, None
            if self.position > self.start:
                self.go_back()
                if span.start > self.start:
                    self.guessed = False
                    text = "%s has changed during the transfer"
                    raise RetryableIOError(text % _shown(answer.url))
        if not span.guessed:
            block.announced = max(block.announced, span.end or 0)
        if block.range is None and span.start == 0:
            if (
                span.end is not None
                and span.end < self.position
                and not self.rewindable
            ):
                raise self._differs()
            block.size = span.end
        if span.start < self.position:
            self.go_back()
        self.guessed = span.guessed and block.base + span.start > 0

    def _is_other(self, span: _Span, answer: _Answer) -> bool:
        """Note the validator; whether it, or the size, shows another object."""
        block, headers = self.block, answer.headers
        sliced = answer.status == 200 and block.range and span.start != -block.base
        # A slice that is sent as a file of its own has a validator of its own.
        validator = (
            None if sliced else headers.get("etag") or headers.get("last-modified")
        )
        shrunk = span.final and span.end is not None and span.end < block.announced
        alone = self.start == 0 and self.end in (None, block.size)
        if shrunk and not alone:
            raise _ObjectChanged
        if validator is None:
            return shrunk
        return not block.stored.agree(validator, block.index, alone) or shrunk

    def go_back(self) -> None:
        """What was delivered is void, or in doubt where it cannot be taken back."""
        if self.rewindable:
            self.position = self.start
        else:
            self._repeated = 0
            self.unproved = True

    def accept(self, offset: int, data: bytes) -> bytes:
        """What is new in the `data` at `offset`; the rest must repeat what was."""
        if offset < self.position:
            new = min(self.position - offset, len(data))
            if not self.rewindable:
                again = data[max(0, self.start - offset) : new]
                self._repeated = zlib.crc32(again, self._repeated)
                if offset + new == self.position:
                    if self._repeated != self._delivered:
                        raise self._differs()
                    self.unproved = False
            data = data[new:]
        self.position += len(data)
        if not self.rewindable:
            self._delivered = zlib.crc32(data, self._delivered)
        return data

    def chunk(self, offset: int, data: bytes) -> _Chunk:
        """What is delivered, with what is known of it now."""
        block = self.block
        lasting = not block.pinned and not self.guessed
        validator = block.stored.validator
        return _Chunk(block.index, self.start, offset, data, validator, lasting)

    def _differs(self) -> ProtocolError:
        text = "%s: the data differs from what was already delivered"
        return ProtocolError(text % _shown(self.block.url))


def _read_part(session: _Session, part: _Part) -> Generator[_Chunk, None, None]:
    """Deliver a part, retrying as the policy says."""
    retry = session.new_retry()
    data = part.block.data
    if data is not None:
        begin, part.position = part.position, len(data)
        yield part.chunk(begin, data[begin:])
    delivered = reached = part.position
    while not part.complete():
        try:
            for chunk in _attempt(session, part):
                delivered = chunk.offset + len(chunk.data)
                retry.progress(max(0, delivered - reached))
                reached = max(delivered, reached)
                yield chunk
            return
        except _ObjectChanged:
            raise
        except _Again as reason:
            _log.info("%s", reason)
        except HtsgetException as error:
            session.pause(retry, error, part.block.url)
        if part.position < delivered:
            delivered = part.position
            yield part.chunk(delivered, b"")


def _attempt(session: _Session, part: _Part) -> Iterator[_Chunk]:
    """Ask once for what is missing of a part and deliver what comes."""
    asked, answer = _open_part(session, part)
    with contextlib.closing(answer):
        if answer.status == 416:
            return
        before = part.position
        span = _locate(part.block, asked, answer)
        part.begin(span, answer)
        if part.position < before:
            yield part.chunk(part.position, b"")
        if answer.status == 206 and not span.guessed:
            part.block.stored.ranged = True
        begun, offset = part.position, span.start
        for data in answer.chunks():
            stop = offset + len(data)
            if span.end is not None and stop > span.end:
                _check_surplus(part, span)
            # The limit changes when the rest of the block is left to others.
            limit = part.limit()
            surplus = limit is not None and stop > limit
            if limit is not None:
                data = data[: max(0, limit - offset)]
            new = part.accept(offset, data)
            offset = stop
            if new:
                yield part.chunk(part.position - len(new), new)
            if surplus and not part.guessed:
                # Only the end of a guessed slice can tell whether it is one.
                break
        else:
            _check_end(part, answer, span, offset, part.position > begun)
        part.guessed = False


def _open_part(session: _Session, part: _Part) -> Tuple[_Asked, _Answer]:
    """An answer with data, or a 416 that says that the file has no more of it."""
    block = part.block
    own = part.unproved
    while True:
        renewals = session.renewals
        asked = _ask(block, part.position, part.limit(), own)
        answer = session.request(block, asked.headers)
        if answer.status in (200, 206):
            block.refused = False
            block.pinned = block.pinned or (own and not part.unproved)
            return asked, answer
        if asked.changed and answer.status == 416 and _is_at_end(part, answer):
            return asked, answer
        error = _refusal(answer)
        if asked.changed and answer.status in _RANGE_REFUSED_STATUS:
            own = True
        elif answer.status in _EXPIRED_STATUS and session.renew(block, renewals):
            own = part.unproved
        else:
            raise error


def _is_at_end(part: _Part, answer: _Answer) -> bool:
    """Whether a 416 says that the file ends where the part should go on."""
    block, text = part.block, answer.headers.get("content-range", "")
    total = re.match(r"bytes \*/(\d{1,18})\Z", text.strip(), re.A)
    size = int(total.group(1)) - block.base if total else part.short
    # A file that is shorter than it was, or than what was delivered, is another one.
    if size is None or size < block.announced:
        return False
    if size == part.position or (size < part.position == part.start):
        block.size = max(0, size)
        return True
    return False


def _check_surplus(part: _Part, span: _Span) -> None:
    """More data came than the answer should have: what was taken for the slice is the
    whole file, which is as good if it begins where the slice does."""
    block = part.block
    if not span.guessed:
        raise _damaged("more data than it announces", block.url)
    block.stored.rangeless = True
    if block.base + span.start == 0:
        return
    part.guessed = False
    if not part.rewindable:
        raise ProtocolError("%s ignores the Range header" % _shown(block.url))
    part.go_back()
    block.whole = True
    raise _Again("%s ignores the Range header" % _shown(block.url))


def _check_end(
    part: _Part, answer: _Answer, span: _Span, offset: int, progress: bool
) -> None:
    """The body ended at `offset`: is that the end of the part?"""
    block, limit = part.block, part.limit()
    entire = span.end is None or offset == span.end
    if offset >= part.position and entire and limit is not None and offset >= limit:
        return
    if span.guessed and answer.framed and block.base + span.start == 0:
        # Slice or whole file, it is the same, and it ends here.
        entire, span = True, span._replace(final=True)
    ambiguous = span.start < 0 and offset - span.start == block.size
    if offset < part.position or not entire or ambiguous:
        raise ContentLengthMismatch(
            "%s: the answer ended early, at byte %d of data block %d"
            % (_shown(block.url), offset, block.index + 1)
        )
    if span.final:
        block.size = offset
        if not answer.framed:
            _log.warning(
                "%s does not say how long data block %d is: taking what came, %d bytes",
                _shown(block.url),
                block.index + 1,
                offset,
            )
    elif progress and not block.pinned:
        part.short = offset
        raise _Again("%s gives data in pieces" % _shown(block.url))
    else:
        raise ContentLengthMismatch("%s gives less than asked" % _shown(block.url))


# ---- several parts, delivered in order


class _Slot:
    """A part in the window: read by the caller's own thread, or ahead by a helper."""

    def __init__(self, part: _Part, own: bool) -> None:
        self.part = part
        self.own = own
        # What a helper has read and nobody has taken yet.
        self.chunks: List[_Chunk] = []
        self.held = 0
        self.done = False


class _Window:
    """Reads parts, several at once if that pays, and delivers them in order.

    At first the caller's thread reads by itself, with one connection; that is the
    fastest way when the processor is the limit. It asks for a block as soon as the last
    bytes of the one before are there and the connection is free. While the process is
    mostly idle, helper threads are added. They read ahead into a window of bounded
    size, and the caller's thread only delivers, until the processor turns out to be the
    limit.
    """

    def __init__(self, session: _Session, rewindable: bool) -> None:
        self._session = session
        self._rewindable = rewindable
        self._most = min(session.connections, _PARTS_MOST)
        self._slots_most = min(2 * self._most, _PARTS_MOST)
        window = min(self._most * _WINDOW_EACH, _WINDOW_MOST)
        # Bytes that one part may hold, and that a block is cut into.
        self._piece = window // self._slots_most
        # The block and the offset in it that nobody has claimed yet.
        self._cursor = 0, 0
        self._slots: Deque[_Slot] = collections.deque()
        self._lock = threading.RLock()
        # Something came for the caller's thread; there is something for a helper to do.
        self._arrived = threading.Condition(self._lock)
        self._needed = threading.Condition(self._lock)
        self._helpers: List[threading.Thread] = []
        # Connections that may be used now, and helpers that use one.
        self._wanted = 1
        self._reading = 0
        # Nothing comes of the part at the head, so that others are to let go of their
        # connections; and how often that, or the closing of idle ones, has helped.
        self._starving = False
        self._rescues = 0
        self._failure: Optional[BaseException] = None
        # The last look at the clocks, how many in a row found the process busy, and how
        # many it takes.
        self._looked = time.monotonic(), time.process_time()
        self._busy_looks = 0
        self._patience = _BUSY_LOOKS

    def chunks(self, index: int, offset: int) -> Generator[_Chunk, None, None]:
        """All bytes in order, beginning in a block at an offset in it."""
        self._cursor = index, 0
        # Where the part has to begin, and what is due next.
        begin, due = (index, 0), (index, offset)
        try:
            while True:
                slot = self._head(offset)
                offset = 0
                if slot is None:
                    return
                fetched = None if slot.own else self._fetched(slot)
                for chunk in fetched or _read_part(self._session, slot.part):
                    if (chunk.block, chunk.offset) != due:
                        self._check_return(chunk, begin)
                    due = chunk.block, chunk.offset + len(chunk.data)
                    if slot.own and slot.part.complete():
                        self._ask_ahead()
                    yield chunk
                    self._look()
                part, block = slot.part, slot.part.block
                if part.position > part.start and due != (block.index, part.position):
                    raise self._disorder(block.index)
                if part.position >= (block.size or 0):
                    due = block.index + 1, 0
                begin = due
                with self._lock:
                    self._slots.popleft()
                    if self._wanted > 1:
                        self._needed.notify_all()
        except _Stopped:
            if self._failure is None:
                raise
        finally:
            self._close()
        if self._failure is not None:
            raise self._failure

    def _ask_ahead(self) -> None:
        """While the last bytes of a block are written, have the server begin with the
        next one, if the caller's thread is going to read that too."""
        index, start = self._cursor
        if self._wanted == 1 and len(self._slots) == 1 and start == 0:
            self._session.ask_ahead(index)

    def _check_return(self, chunk: _Chunk, begin: Tuple[int, int]) -> None:
        """Other bytes come than are due: a part begins anew, in an output that can be
        rewound, or there is an error."""
        anew = (chunk.block, chunk.start) == begin and chunk.offset == chunk.start
        if not (anew and self._rewindable):
            raise self._disorder(chunk.block)

    @staticmethod
    def _disorder(index: int) -> HtsgetException:
        """What cannot happen; but if it did, it must not go unnoticed."""
        text = "data block %d came out of order; this is a bug in htsget.py"
        return HtsgetException(text % (index + 1))

    def _head(self, offset: int) -> Optional[_Slot]:
        """The part that is to be delivered next; None at the end."""
        with self._lock:
            while not self._slots:
                if self._at_end():
                    return None
                if self._wanted == 1:
                    self._claim(own=True, position=offset)
                    if self._most > 1 and not self._helpers:
                        self._add_helper()
                else:
                    self._rest(self._arrived)
            return self._slots[0]

    def _fetched(self, slot: _Slot) -> Iterator[_Chunk]:
        """What a helper reads of a part, as it comes."""
        # `done` comes first: nothing is added after it is set.
        while not slot.done or slot.chunks:
            with self._lock:
                self._wait_for_chunks(slot)
                if slot.held >= self._piece:
                    self._needed.notify_all()
                chunks, slot.chunks, slot.held = slot.chunks, [], 0
            yield from chunks

    def _wait_for_chunks(self, slot: _Slot) -> None:
        """Wait for something of a part, or its end.

        If nothing comes for long, the server may handle only so many connections at a
        time: close the idle ones, then have full parts let go of theirs. When that has
        helped twice, use only one.
        """
        since = looked = time.monotonic()
        let_go = 0.0
        while not slot.chunks and not slot.done:
            self._rest(self._arrived)
            now = time.monotonic()
            if now - looked > _STARVED:
                looked = now
                if self._session.transport.close_idle():
                    let_go = now
            if now - since > _LET_GO and not self._starving:
                self._starving, let_go = True, now
                self._needed.notify_all()
        self._starving = False
        if time.monotonic() - let_go < _STARVED / 2:
            self._rescues += 1
            if self._rescues == 2:
                self._wanted = self._most = 1

    def _rest(self, change: threading.Condition) -> None:
        """Wait a moment for a change (with the lock)."""
        if self._session.stopped():
            raise _Stopped
        change.wait(_LOOK)
        self._look()

    # What follows decides who reads what.

    def _at_end(self) -> bool:
        return self._cursor[0] >= len(self._session.blocks)

    def _claim(self, own: bool, position: int = 0) -> _Slot:
        """Take the next part, a piece of a block where that can be cut."""
        index, start = self._cursor
        block = self._session.blocks[index]
        end = None
        if not own and self._can_be_cut(block, start):
            end = start + self._piece
        self._cursor = (index + 1, 0) if end is None else (index, end)
        slot = _Slot(_Part(block, self._rewindable, start, end, position), own)
        self._slots.append(slot)
        return slot

    def _can_be_cut(self, block: _Block, start: int) -> bool:
        """Whether the block has a Range that may be changed, and is worth it."""
        return (
            block.data is None
            and block.range is not None
            and block.size is not None
            and block.size - start > self._piece
            and not block.pinned
            and not block.whole
            and block.stored.ranged
        )

    def _cut_own(self) -> None:
        """Leave the rest of the block that the caller's thread reads to helpers, unless
        they have gone beyond it.

        That thread looks at the new end with each chunk, which is less than a piece.
        """
        if len(self._slots) == 1 and self._slots[0].own:
            part = self._slots[0].part
            end = part.position + self._piece
            if self._can_be_cut(part.block, end) and not part.guessed:
                part.end = end
                self._cursor = part.block.index, end

    def _look(self) -> None:
        """Use more connections while the process is mostly idle, fewer while it is busy
        with itself."""
        if time.monotonic() - self._looked[0] < _LOOK or self._most == 1:
            return
        with self._lock:
            wall, cpu = time.monotonic(), time.process_time()
            passed, used = wall - self._looked[0], cpu - self._looked[1]
            if passed < _LOOK:
                # Another thread was quicker.
                return
            use, self._looked = used / passed, (wall, cpu)
            self._busy_looks = self._busy_looks + 1 if use > _BUSY else 0
            if use < _IDLE and not self._session.waiting():
                self._use_more()
            elif self._busy_looks >= self._patience and self._wanted > 1:
                # Should that be wrong, it is tried less and less often.
                self._patience *= 2
                self._wanted = 1

    def _use_more(self) -> None:
        """Use twice as many connections."""
        if self._wanted == 1:
            self._cut_own()
        if self._at_end() or self._session.stopped():
            return
        self._wanted = min(2 * self._wanted, self._most)
        for _ in range(len(self._helpers), self._wanted):
            self._add_helper()
        self._needed.notify_all()

    # What follows is the helpers' side.

    def _add_helper(self) -> None:
        thread = threading.Thread(target=self._help, name="htsget")
        # A daemon, so that nothing can keep the process from ending.
        thread.daemon = True
        try:
            thread.start()
            self._helpers.append(thread)
        except RuntimeError:
            # The system has no more threads; go on with those that there are.
            self._most = max(1, len(self._helpers))
            self._wanted = min(self._wanted, self._most)

    def _help(self) -> None:
        """Read parts ahead until there is nothing more to do."""
        try:
            while True:
                slot = self._next_ahead()
                self._read_ahead(slot)
                with self._lock:
                    slot.done = True
                    self._reading -= 1
                    self._arrived.notify()
        except _Stopped:
            pass
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
                self._arrived.notify()
            self._session.stop()

    def _next_ahead(self) -> _Slot:
        """The next part to read ahead, once there is need and room for it."""
        with self._lock:
            while True:
                own = bool(self._slots) and self._slots[0].own
                room = len(self._slots) < self._slots_most
                allowed = self._wanted > 1 and self._reading < self._wanted - own
                if allowed and room and not self._at_end():
                    self._reading += 1
                    return self._claim(own=False)
                self._rest(self._needed)

    def _read_ahead(self, slot: _Slot) -> None:
        """Read a part into its slot, as far as there is room."""
        while not slot.part.complete():
            with contextlib.closing(_read_part(self._session, slot.part)) as pieces:
                for chunk in pieces:
                    with self._lock:
                        slot.chunks.append(chunk)
                        slot.held += len(chunk.data) + _CHUNK_COST
                        if slot is self._slots[0]:
                            self._arrived.notify()
                        while slot.held >= self._piece:
                            if self._starving:
                                # Another part may be waiting for the connection.
                                pieces.close()
                            self._rest(self._needed)
                    self._look()

    def _close(self) -> None:
        """End all helpers, and wait a moment until they have."""
        self._session.stop()
        with self._lock:
            self._needed.notify_all()
        for thread in self._helpers:
            thread.join(1.0)


# ---- output


class _Place(NamedTuple):
    """How far the output is: `position` bytes in all; the block that comes next, or
    is being written, where it begins, its size if known; and the validators of what
    was fetched from, by the first block of each."""

    block: int = 0
    begin: int = 0
    position: int = 0
    size: Optional[int] = None
    validators: Mapping[str, str] = {}


class _Output:
    """A binary file object that takes the data, from its current position on."""

    # What to call it in messages, and where the data is when it turns out to be wrong.
    name, kept_in = "output", "the output"

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._raw = isinstance(stream, io.RawIOBase)
        # Where the data begins, if the stream can be taken back there.
        self._start: Optional[int] = None
        with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
            self._start = self._find_start(stream)

    @staticmethod
    def _find_start(stream: BinaryIO) -> Optional[int]:
        """Where a stream stands; None if it is not seekable or cannot be truncated."""
        truncate = getattr(type(stream), "truncate", stream.truncate)
        if truncate is io.IOBase.truncate:
            return None
        if hasattr(stream, "seekable") and not stream.seekable():
            return None
        try:
            number = stream.fileno()
        except (AttributeError, OSError):
            return stream.tell()  # such as io.BytesIO
        if not stat.S_ISREG(os.fstat(number).st_mode):
            return None
        if fcntl and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_APPEND:
            # As after ">>" in a shell, where the position begins at 0.
            return stream.seek(0, os.SEEK_END)
        return stream.tell()

    @property
    def rewindable(self) -> bool:
        """Whether `rewind` works."""
        return self._start is not None

    def write(self, data: bytes) -> None:
        """Write all of `data`; a raw stream may take it in several bites."""
        while data:
            count = self._stream.write(data)
            if not self._raw:
                return
            if not count:
                raise BlockingIOError(errno.EAGAIN, "the output takes no more data")
            data = data[count:]

    def rewind(self, position: int) -> None:
        """Forget what was written from `position` on."""
        self._stream.seek((self._start or 0) + position)
        self._stream.truncate()

    def begin(self, session: _Session, resume: bool) -> Optional[_Place]:
        """Get ready; where an earlier run got to, which only a path can know."""
        return None

    def kept(self, start: int, stop: int) -> Iterator[bytes]:
        """What an earlier run left."""
        return iter(())

    def clear(self) -> None:
        """Forget all that was written."""
        self.rewind(0)

    def note(self, place: _Place) -> None:
        """Remember how far the output is."""

    def commit(self, size: int) -> None:
        """The data is complete, `size` bytes."""
        flush = getattr(self._stream, "flush", None)
        if flush is not None:
            flush()

    def close(self) -> None:
        """Let go of the stream; it stays open, it is the caller's."""


class _PathOutput(_Output):
    """A path: written as `path`.part, with a journal beside it, and moved in place.

    The journal, `path`.part.json, says which request and ticket the part file is of,
    and up to where it can be relied on. It is one write of a few hundred bytes.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._part = self.kept_in = path + ".part"
        self.name = os.path.basename(path)
        self._journal_path = path + ".part.json"
        super().__init__(_open_locked(self._part))
        self._start = 0
        self._journal: Any = None
        self._width = 0
        self._identity: Dict[str, Any] = {}

    def begin(self, session: _Session, resume: bool) -> Optional[_Place]:
        """Where an earlier run of the same transfer got to, if it left something."""
        self._identity = session.identity()
        place = self._earlier() if resume else None
        if place is None:
            self.clear()
        else:
            self.rewind(place.position)
            _log.info("going on with %s at byte %d", self._part, place.position)
        return place

    def _earlier(self) -> Optional[_Place]:
        """What the journal says, if it can be relied on and there is something kept."""
        identity = self._identity
        size = self._stream.seek(0, os.SEEK_END)
        try:
            with io.open(self._journal_path, "rb") as file:
                entry = json.loads(file.read().decode("ascii"))
            if entry.pop("check") != _digest(entry):
                raise ValueError("its journal is damaged")
            if {name: entry.pop(name) for name in identity} != identity:
                raise ValueError("it is of another request or ticket")
            place = _Place(**entry)
            if size < place.begin:
                raise ValueError("it is shorter than it should be")
        except FileNotFoundError:
            if size:
                _log.warning("cannot go on with %s: it has no journal", self._part)
            return None
        except Exception as error:
            # Whatever is wrong with the journal, it is not to be relied on.
            _log.warning("cannot go on with %s: %s", self._part, error)
            return None
        if size < place.position:
            # Killed after the block began anew.
            _log.warning("cannot go on with %s inside a block", self._part)
            place = place._replace(position=place.begin)
        return place if place.position else None

    def kept(self, start: int, stop: int) -> Iterator[bytes]:
        """What the part file has from `start` up to `stop`."""
        self._stream.seek(start)
        while start < stop:
            data = self._stream.read(min(_CHUNK, stop - start))
            if not data:
                raise OSError(errno.EIO, "became shorter", self._part)
            start += len(data)
            yield data

    def clear(self) -> None:
        """Forget all that was written, the journal first."""
        self.note(_Place())
        self.rewind(0)

    def note(self, place: _Place) -> None:
        """Make an entry in the journal, over the one before."""
        if self._journal is None:
            exists = os.path.exists(self._journal_path)
            mode = "r+b" if exists else "w+b"
            self._journal = io.open(self._journal_path, mode, buffering=0)
            self._width = self._journal.seek(0, os.SEEK_END)
        entry = dict(self._identity, **place._asdict())
        text = json.dumps(dict(entry, check=_digest(entry)))
        # Blanks cover what was longer; a kill leaves this entry or the one before.
        self._width = max(self._width, len(text))
        self._journal.seek(0)
        self._journal.write(text.ljust(self._width).encode("ascii"))

    def commit(self, size: int) -> None:
        """Move the file in place."""
        os.fsync(self._stream.fileno())
        if os.fstat(self._stream.fileno()).st_size != size:
            raise OSError(errno.EBUSY, "another process has written to it", self._part)
        if os.name == "nt":
            # An open file cannot be moved there.
            self._stream.close()
        os.replace(self._part, self._path)
        self._remove_journal()
        self._stream.close()

    def close(self) -> None:
        """Let go of the part file, and remove it when there is nothing in it."""
        if self._stream.closed:
            return
        empty = self._stream.seek(0, os.SEEK_END) == 0
        if empty and os.name != "nt":
            os.remove(self._part)
            self._remove_journal()
        self._stream.close()
        if self._journal is not None:
            self._journal.close()

    def _remove_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
        try:
            os.remove(self._journal_path)
        except FileNotFoundError:
            pass


def _digest(value: Any) -> str:
    """A digest of something that JSON can hold."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _open_locked(path: str) -> BinaryIO:
    """Open a file for appending, for this process alone where there are locks."""
    while True:
        stream = io.open(path, "a+b", buffering=0)
        if fcntl is None:
            return stream
        try:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.close()
            text = "another process is writing to it"
            raise BlockingIOError(error.errno, text, path) from None
        except OSError:
            # A file system without locks.
            return stream
        try:
            if os.path.samestat(os.stat(path), os.fstat(stream.fileno())):
                return stream
        except FileNotFoundError:
            pass
        # The process that had the lock has moved the file in place.
        stream.close()


class _OpenedOutput(_Output):
    """A stream that was opened here, as for /dev/stdout, and is closed here."""

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()


class _DeviceOutput(_OpenedOutput):
    """A path that is no regular file: a device or a FIFO, written directly."""

    def __init__(self, path: str) -> None:
        super().__init__(io.open(path, "wb", buffering=0))
        if self._stream.seekable():
            self._start = self._stream.tell()

    def rewind(self, position: int) -> None:
        """Go back; a device has no length that could be cut."""
        self._stream.seek((self._start or 0) + position)


def _open_output(output: Union[BinaryIO, str, "os.PathLike[str]"]) -> _Output:
    """The output behind a file object or a path."""
    if not isinstance(output, (str, os.PathLike)):
        return _Output(output)
    path = os.fspath(output)
    own = re.match(
        r"/(dev|proc/self)/(fd/(\d+)|stdout|stderr)\Z", os.path.abspath(path)
    )
    if own:
        number = own.group(3) or {"stdout": "1", "stderr": "2"}[own.group(2)]
        return _OpenedOutput(io.open(os.dup(int(number)), "wb", buffering=0))
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        regular = True
    return _PathOutput(os.path.realpath(path)) if regular else _DeviceOutput(path)


# ---- verifier

# The empty BGZF block that ends BAM, BCF and compressed VCF files (SAM spec 4.1.2).
_BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")

# A BGZF block's header: magic, 6 bytes, XLEN and subfield BC of length 2, BSIZE.
_BGZF_HEADER = struct.Struct("<I6x6sH")
_BGZF_MAGIC = 0x04088B1F
_BGZF_USUAL = b"\6\0BC\2\0"

# The containers that end CRAM files, by version (CRAM spec 9).
_CRAM_EOF = {
    b"\x02\x01": bytes.fromhex(
        "0b000000ffffffff0fe0454f460000000001000001000606010001000100"
    ),
    b"\x03": bytes.fromhex(
        "0f000000ffffffff0fe0454f4600000000010005bdd94f0001000606010001000100ee63014b"
    ),
}

# What a file of a format may begin with.
_BEGINNINGS = {
    "BAM": ("BGZF", "BAM"),
    "BCF": ("BGZF", "BCF"),
    "CRAM": ("CRAM",),
    "VCF": ("VCF", "BGZF", "gzip"),
}


def _kind(head: bytes) -> Optional[str]:
    """What the first bytes of a file show it to be."""
    if head[:4] == b"\x1f\x8b\x08\x04" and head[12:14] == b"BC":
        return "BGZF"
    for magic, kind in (
        (b"\x1f\x8b", "gzip"),
        (b"CRAM", "CRAM"),
        (b"BAM\1", "BAM"),
        (b"BCF\2", "BCF"),
        (b"##", "VCF"),
    ):
        if head.startswith(magic):
            return kind
    return None


class _Bgzf:
    """Walks the chain of BGZF blocks by their sizes, without decompressing."""

    name = "BGZF"

    def __init__(self) -> None:
        # Where the data at hand begins, where the next block should, what follows.
        self._start = 0
        self._next = 0
        self._carried = b""
        self._tail = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._tail = (self._tail + data[-len(_BGZF_EOF) :])[-len(_BGZF_EOF) :]
        if self._carried:
            data = self._carried + data
        at, last = self._next - self._start, len(data) - _BGZF_HEADER.size
        unpack, usual = _BGZF_HEADER.unpack_from, _BGZF_USUAL
        while at <= last:
            magic, fields, size = unpack(data, at)
            if magic != _BGZF_MAGIC or fields != usual:
                found = self._odd_header(data, at)
                if found is None:
                    break
                size = found
            at += size + 1
        self._carried = data[at:]
        self._next = self._start + at
        self._start += len(data) - len(self._carried)

    def _odd_header(self, data: bytes, at: int) -> Optional[int]:
        """BSIZE of a header with further subfields; None while it is incomplete."""
        if data[at : at + 4] == b"\x1f\x8b\x08\x04":
            (extra,) = struct.unpack_from("<H", data, at + 10)
            field, end = at + 12, at + 12 + extra
            if end > len(data):
                return None
            while field + 6 <= end:
                name, length, size = struct.unpack_from("<2sHH", data, field)
                if name == b"BC" and length == 2 and size >= extra + 19:
                    return int(size)
                field += 4 + length
        raise IntegrityError(
            "byte %d: the next BGZF block was expected, found %r"
            % (self._start + at, data[at : at + 4])
        )

    def finish(self, header_only: bool) -> None:
        """Is the last block complete, and is it the EOF marker?"""
        end = self._start + len(self._carried)
        if end != self._next or self._carried:
            raise IntegrityError(
                "byte %d: the data ends inside a BGZF block that goes on to byte %d"
                % (end, max(self._next, end + 1))
            )
        if not header_only and self._tail != _BGZF_EOF:
            raise _no_eof_marker(end - len(_BGZF_EOF), "BGZF EOF marker")


class _Cram:
    """Looks for the EOF container at the end of a CRAM file."""

    name = "CRAM"

    def __init__(self, head: bytes) -> None:
        marker = _CRAM_EOF.get(head[4:6]) or _CRAM_EOF.get(head[4:5])
        # Other versions have none.
        self._marker = marker or b""
        self._tail = b""
        self._end = 0

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._tail = (self._tail + data[-38:])[-38:]
        self._end += len(data)

    def finish(self, header_only: bool) -> None:
        """Is the EOF container there?"""
        found = bytearray(self._tail[len(self._tail) - len(self._marker) :])
        if len(found) > 8:
            # The high bits of the fifth byte of -1 in ITF8 are of no meaning.
            found[8] &= 0x0F
        if not header_only and found != self._marker:
            raise _no_eof_marker(self._end - len(self._marker), "CRAM EOF container")


def _no_eof_marker(offset: int, name: str) -> IntegrityError:
    return IntegrityError(
        "byte %d: the %s was expected, so the data may be truncated; if the server "
        "never sends one, verify=False (--no-verify) accepts it" % (offset, name)
    )


class _Verifier:
    """Checks what can be checked of the data while it goes by, in constant memory."""

    def __init__(self, ticket: Ticket, header_only: bool, enabled: bool) -> None:
        classes = {block.data_class for block in ticket.blocks}
        self._header_only = header_only or classes == {"header"}
        self._format = ticket.format if enabled else None
        self._expected = ticket.md5.lower() if ticket.md5 and enabled else None
        self._md5 = _new_md5() if self._expected else None
        # The first bytes, until they are enough to tell what they belong to.
        self._head: Optional[bytes] = b"" if enabled else None
        self._check: Union[_Bgzf, _Cram, None] = None

    def copy(self) -> "_Verifier":
        """The verifier as it is now, to be taken up again later."""
        if (self._md5, self._check, self._head) == (None, None, None):
            return self
        other = copy.copy(self)
        other._md5 = self._md5.copy() if self._md5 else None
        other._check = copy.copy(self._check)
        return other

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        if self._md5 is not None:
            self._md5.update(data)
        if self._head is not None:
            self._head += data
            if len(self._head) >= _BGZF_HEADER.size:
                self._begin(self._head)
        elif self._check is not None:
            self._check.feed(data)

    def _begin(self, head: bytes) -> None:
        """Compare the first bytes with the format; choose the further checks."""
        kind = _kind(head)
        allowed = _BEGINNINGS.get(self._format or "")
        if allowed is not None and kind not in allowed:
            text = "byte 0: %s data was expected, found %r"
            raise IntegrityError(text % (self._format, head[:4]))
        if kind == "BGZF":
            self._check = _Bgzf()
        elif kind == "CRAM":
            self._check = _Cram(head)
        if self._check is not None:
            self._check.feed(head)
        self._head = None

    def verdict(self) -> str:
        """What was found to be well, for a message."""
        found = []
        if self._check is not None:
            found.append("%s complete" % self._check.name)
        if self._md5 is not None:
            found.append("MD5 right")
        return "".join(", " + text for text in found)

    def finish(self) -> None:
        """All data has gone by: raise IntegrityError if it is not what it should be."""
        if self._head is not None:
            self._begin(self._head)
        if self._check is not None:
            self._check.finish(self._header_only)
        if self._md5 is not None and self._md5.hexdigest() != self._expected:
            text = "the MD5 of the data is %s, but the ticket says %s"
            raise IntegrityError(text % (self._md5.hexdigest(), self._expected))


def _new_verifier(ticket: Ticket, options: _Options) -> _Verifier:
    """The verifier that a transfer's options ask for."""
    return _Verifier(ticket, options.data_class == "header", options.verify)


def _new_md5() -> Any:
    """An MD5 object; None where the system forbids MD5 (FIPS)."""
    try:
        if sys.version_info >= (3, 9):
            return hashlib.md5(usedforsecurity=False)
        return hashlib.md5()
    except ValueError:
        _log.warning("MD5 is not available here, so the ticket's is not checked")
        return None


# ---- progress meter


def _size(count: float) -> str:
    """A number of bytes for people."""
    if count < 1024:
        return "%d bytes" % count
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return "%.1f %s" % (count, unit)
    return "%.1f TiB" % (count / 1024)


def _duration(seconds: float) -> str:
    """A time for people: h:mm:ss, or m:ss."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    if hour:
        return "%d:%02d:%02d" % (hour, minute, second)
    return "%d:%02d" % (minute, second)


class _Meter:
    """A function for `progress` that shows it: one line that is written over again on
    a terminal, a new line now and then elsewhere."""

    def __init__(self, stream: TextIO, name: str, terminal: bool) -> None:
        self._stream = stream
        self._name = os.path.basename(name) or name
        self._terminal = terminal
        self._interval = _METER_TERMINAL if terminal else _METER_LOG
        self._next = time.monotonic() + self._interval
        # (time, bytes) of the last seconds.
        self._past: Deque[Tuple[float, int]] = collections.deque()
        self._shown = False
        # Which block of how many is on its way; set by the writer.
        self.block = self.blocks = 0

    def __call__(self, so_far: int, total: Optional[int]) -> None:
        now = time.monotonic()
        if not self._past:
            self._past.append((now, so_far))
        if now < self._next:
            return
        self._next = now + self._interval
        self._past.append((now, so_far))
        while len(self._past) > 2 and self._past[1][0] < now - _METER_SPAN:
            self._past.popleft()
        text = self.line(so_far, total, now)
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + text[:width].ljust(width))
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
        self._shown = True

    def line(self, so_far: int, total: Optional[int], now: float) -> str:
        """The text: bytes, percent, rate of the last seconds, time left, blocks."""
        then, before = self._past[0]
        rate = (so_far - before) / max(now - then, 1e-3)
        parts = [self._name + ": " + _size(so_far)]
        if total:
            parts[0] += " of " + _size(total)
            parts.append("%d %%" % (100 * so_far // total))
        parts.append(_size(rate) + "/s")
        if total and rate > 0:
            parts.append(_duration((total - so_far) / rate) + " left")
        parts.append("block %d of %d" % (self.block + 1, self.blocks))
        return ", ".join(parts)

    def clear(self) -> None:
        """Take the line off the terminal, for something else to be written."""
        if self._shown and self._terminal:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + " " * width + "\r")
            self._stream.flush()
            self._shown = False


# ---- public functions


def get(
    url: Union[str, Ticket],
    output: Union[BinaryIO, str, "os.PathLike[str]"],
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
    timeout: Optional[float] = 120,
    bearer_token: Union[str, Callable[[], Optional[str]], None] = None,
    headers: Optional[Mapping[str, str]] = None,
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

    What is asked for (spec: "Query parameters" and "POST request"):

    url: str, the server's address of the data, such as
        "https://example.org/reads/NA12878"; a query in it is kept. Or a `Ticket`.
    output: a binary file object, written from its current position on, or a path.
    reference_name: str, a reference such as "chr1"; "*" for unplaced unmapped reads.
    reference_md5: str, 32 hexadecimal digits, the MD5 of the reference's sequence.
    start, end: int, 0-based half-open positions on the reference.
    fields, tags, notags: a comma-separated str or an iterable of str: the SAM fields
        and tags to include, the tags to leave out; tags="" asks for no tags.
    data_format: str, "BAM", "CRAM", "VCF" or "BCF".
    data_class: "header" for the header only; goes with `data_format`.
    regions: an iterable of `Region` or tuples (name, start, end), instead of
        `reference_name`, `start` and `end`.

    How it is fetched:

    max_retries: int, how often in a row a transfer is tried again without progress;
        negative for without limit.
    retry_wait: seconds before the first retry; doubled up to 60 s for further ones.
    timeout: seconds without a byte after which a connection is given up.
    bearer_token: str, sent to the ticket server only; or a function that returns it,
        called before every ticket request.
    headers: mapping of str to str, sent to the ticket server only.
    connections: int, the most connections at once.
    verify: check MD5, format and end of the data.
    resume: go on with what an earlier run left at the path `output`.
    progress: function called with the bytes so far and in all (None if unknown).
    ssl_context: ssl.SSLContext for https, instead of the default.

    Raises RequestError (also a ValueError) before anything is sent for arguments that
    the protocol forbids, ClientError when the server refuses, ProtocolError when it
    breaks the protocol, IntegrityError when the data is wrong, RetryableError when
    retries are used up; and OSError when the output fails.
    """
    options = _Options(
        reference_name,
        reference_md5,
        start,
        end,
        fields,
        tags,
        notags,
        data_format,
        max_retries,
        retry_wait,
        timeout,
        bearer_token,
        headers,
        data_class,
        regions,
        connections,
        verify,
        resume,
        progress,
        ssl_context,
    )
    source = _source(url, options)
    target = _open_output(output)
    try:
        size = _save(source, target, options)
        target.commit(size)
    finally:
        target.close()


def get_ticket(url: str, **options: Any) -> Ticket:
    """Ask for a ticket and return it; `get` takes it in place of a URL.

    The options are those of `get`, and so are the exceptions.
    """
    known = _Options(**options)
    with _Session(_source(url, known), known) as session:
        return session.ticket()


def open(url: Union[str, Ticket], **options: Any) -> io.BufferedReader:
    """Ask for data and return it as a readable binary stream, while it is fetched.

    The options are those of `get`, and so are the exceptions, which may come with any
    read; a read that returns b"" means that the data is complete and verified. Close
    the stream, or use it as a context manager: that ends the transfer at once.
    """
    known = _Options(**options)
    return io.BufferedReader(_Stream(_source(url, known), known), _CHUNK)


def service_info(url: str, **options: Any) -> Dict[str, Any]:
    """What an htsget server says of itself (spec: "GET /reads/service-info").

    url: str, an address of the server: of its service-info, its reads or variants, or
        of one of these. The options are those of `get`, and so are the exceptions.
    """
    known = _Options(**options)
    _check_limits(known)
    parts = urllib.parse.urlsplit(_checked_url(url))
    path = re.sub(r"(.*/(reads|variants))(/.*)?\Z", r"\1/service-info", parts.path)
    if not path.endswith("/service-info"):
        path = path.rstrip("/") + "/service-info"
    named = _Options(bearer_token=known.bearer_token, headers=known.headers)
    request = _TicketRequest(parts._replace(path=path).geturl(), named)
    with _Session(request, known) as session:
        return session.retried(request, lambda raw: _parse_json(raw, "the answer"))


def parse_region(text: str) -> Region:
    """The `Region` for samtools' notation, which is 1-based and inclusive.

    "chr1", "chr1:100" (from there on), "chr1:1,000-2,000", "*", and with a name that
    has colons "{HLA:A*01:01}:1-5". Raises RequestError.
    """
    braced = re.match(r"\{([^{}]+)\}(?::(.+))?\Z", text)
    plain = re.match(r"(.+):([0-9][0-9,]*(?:-[0-9,]*)?|-[0-9,]+)\Z", text)
    if braced:
        name, positions = braced.groups()
    else:
        name, positions = plain.groups() if plain else (text, None)
    if positions is None:
        if not name:
            raise RequestError("a region is empty")
        return Region(name)
    match = re.match(r"([0-9]*)(?:-([0-9]*))?\Z", positions.replace(",", ""))
    if match is None:
        raise RequestError("%r is no region" % text)
    first, last = (int(number) if number else None for number in match.groups())
    if first == 0 or (last is not None and last < (first or 1)):
        raise RequestError("the region %r ends before it begins, or begins at 0" % text)
    return Region(name, None if first is None else first - 1, last)


class _Stream(io.RawIOBase):
    """The data of a transfer, to be read."""

    def __init__(
        self, source: Union[_TicketRequest, Ticket], options: _Options
    ) -> None:
        super().__init__()
        self._session = _Session(source, options)
        self._chunks = self._verified(options)
        self._left = memoryview(b"")
        self._failure: Optional[BaseException] = None
        self._ticket = self._session.begin()

    def _verified(self, options: _Options) -> Generator[bytes, None, None]:
        verifier = _new_verifier(self._ticket, options)
        position = 0
        with contextlib.closing(_Window(self._session, False).chunks(0, 0)) as chunks:
            for chunk in chunks:
                verifier.feed(chunk.data)
                yield chunk.data
                position += len(chunk.data)
                if options.progress is not None:
                    options.progress(position, self._session.total())
        verifier.finish()

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes; 0 at the end."""
        if self._failure is not None:
            raise self._failure
        try:
            while not self._left:
                data = next(self._chunks, None)
                if data is None:
                    return 0
                self._left = memoryview(data)
        except BaseException as error:
            # Never to be taken for the end by who reads on.
            self._failure = error
            raise
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def close(self) -> None:
        """End the transfer."""
        if not self.closed:
            self._session.stop()
            self._chunks.close()
        super().close()


def _source(
    url: Union[str, Ticket], options: _Options
) -> Union[_TicketRequest, Ticket]:
    """Where the ticket comes from; checks the arguments."""
    _check_limits(options)
    if isinstance(url, Ticket):
        _check_ticket(url)
        return url
    return _TicketRequest(url, options)


def _check_limits(options: _Options) -> None:
    """Raise RequestError for a timeout or a number of connections that cannot be."""
    if options.timeout is not None and options.timeout <= 0:
        raise RequestError("timeout is not greater than 0")
    if options.connections < 1:
        raise RequestError("connections is less than 1")


def _save(
    source: Union[_TicketRequest, Ticket], output: _Output, options: _Options
) -> int:
    """Fetch everything and write it; start over when the object has changed.

    Returns the size in bytes.
    """
    retry = _Retry(options.max_retries, options.retry_wait)
    while True:
        try:
            with _Session(source, options) as session:
                return _save_once(session, output, options)
        except _ObjectChanged as error:
            if not output.rewindable:
                raise
            seconds = retry.pause(error)
            _log.warning("%s; starting over in %.1f s", error, seconds)
            time.sleep(seconds)
            output.clear()
        except IntegrityError as error:
            text = "%s; the data is kept in %s" % (error, output.kept_in)
            raise IntegrityError(text) from None


def _save_once(session: _Session, output: _Output, options: _Options) -> int:
    """Fetch what is missing and write it; returns the size in bytes."""
    begun = time.monotonic()
    ticket = session.begin()
    writer = _Writer(session, ticket, output, options)
    writer.begin()
    try:
        offset = writer.position - writer.start
        chunks = _Window(session, output.rewindable).chunks(writer.block, offset)
        with contextlib.closing(chunks):
            for chunk in chunks:
                writer.take(chunk)
        writer.finish()
    finally:
        writer.note_at_last()
    passed = max(time.monotonic() - begun, 1e-3)
    _log.info(
        "%s: %s, %d blocks, %.1f s, %s/s%s",
        output.name,
        _size(writer.position),
        len(session.blocks),
        passed,
        _size(writer.fetched / passed),
        writer.verdict(),
    )
    return writer.position


class _Writer:
    """Takes the chunks to the output, the verifier and the progress function."""

    def __init__(
        self, session: _Session, ticket: Ticket, output: _Output, options: _Options
    ) -> None:
        # The block that is written, where it starts in the output, where the part does
        # in the block, and bytes in all.
        self.block = self.start = self._part = self.position = 0
        # Bytes written in this run, and the position that was noted last.
        self.fetched = 0
        self._noted = 0
        # What the last chunk said of its block.
        self._validator: Optional[str] = None
        self._lasting = True
        self._session = session
        self._ticket = ticket
        self._output = output
        self._options = options
        self._verifier = self._marked = _new_verifier(ticket, options)

    def begin(self) -> None:
        """Go on where an earlier run stopped, if that is beyond doubt."""
        place = self._output.begin(self._session, self._options.resume)
        if place is not None:
            try:
                self._go_on(place)
                return
            except IntegrityError as error:
                _log.warning("starting over: what was kept is wrong: %s", error)
                self._verifier = _new_verifier(self._ticket, self._options)
                self._output.clear()
        self._marked = self._verifier.copy()

    def _go_on(self, place: _Place) -> None:
        """Verify what was kept, and take up the state of the block that comes next."""
        self._feed_kept(0, place.begin)
        self._marked = self._verifier.copy()
        self._feed_kept(place.begin, place.position)
        blocks = self._session.blocks
        if place.block == len(blocks):
            self._verifier.copy().finish()
        elif blocks[place.block].size is None:
            blocks[place.block].size = place.size
        for first, validator in place.validators.items():
            blocks[int(first)].stored.recall(validator)
        for block in blocks[place.block : place.block + 1]:
            self._validator = block.stored.validator
        self.block, self.start, self.position = place[:3]

    def _feed_kept(self, start: int, stop: int) -> None:
        if self._options.verify:
            for data in self._output.kept(start, stop):
                self._verifier.feed(data)

    def take(self, chunk: _Chunk) -> None:
        """Write a chunk; one that goes back makes its part begin anew."""
        if (chunk.block, chunk.start) != (self.block, self._part):
            if chunk.block != self.block:
                self.block, self.start = chunk.block, self.position
            self._part = chunk.start
            self._marked = self._verifier.copy()
        elif self.start + chunk.offset < self.position:
            self.position = self.start + self._part
            self._note()
            self._output.rewind(self.position)
            self._verifier = self._marked.copy()
        self._validator, self._lasting = chunk.validator, chunk.lasting
        self._output.write(chunk.data)
        self._verifier.feed(chunk.data)
        self.position += len(chunk.data)
        self.fetched += len(chunk.data)
        if self.position - self._noted >= _JOURNAL_STEP:
            self._note()
        progress = self._options.progress
        if progress is not None:
            if isinstance(progress, _Meter):
                progress.block, progress.blocks = self.block, len(self._session.blocks)
            progress(self.position, self._session.total())

    def finish(self) -> None:
        """All is written: is it what it should be?"""
        self.block, self.start = len(self._session.blocks), self.position
        self._verifier.finish()

    def verdict(self) -> str:
        """What the verifier can say when all is well."""
        return self._verifier.verdict()

    def _note(self) -> None:
        """Have the journal say what a later run can rely on."""
        self._noted = self.position
        blocks, size = self._session.blocks, None
        if self.block < len(blocks):
            size = blocks[self.block].size
        position = self.position if self._lasting else self.start
        place = _Place(
            self.block,
            self.start,
            position,
            size,
            self._session.validators(self.block, self._validator),
        )
        self._output.note(place)

    def note_at_last(self) -> None:
        """The same when all is over, whatever the reason."""
        try:
            self._note()
        except OSError as error:
            _log.warning("cannot write the journal: %s", error)


# ---- command line


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line with `argv` (default: sys.argv[1:]); return its status.

    0: done. 1: refused or wrong, a rerun will not help. 2: wrong usage. 75: gave up,
    a rerun may help. 130, 143: interrupted, terminated. 141: broken pipe.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    meter = _meter(args)
    handler = _Messages(meter)
    handler.setFormatter(logging.Formatter("htsget: %(message)s"))
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    _log.setLevel(logging.ERROR if args.quiet else levels[min(args.verbose, 2)])
    _log.addHandler(handler)
    try:
        return _run(args, meter)
    finally:
        _log.removeHandler(handler)


class _Messages(logging.Handler):
    """Writes messages to standard error, past the progress line."""

    def __init__(self, meter: Optional[_Meter]) -> None:
        super().__init__()
        self._meter = meter

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        if self._meter is not None:
            self._meter.clear()
        if sys.stderr is not None:
            print(self.format(record), file=sys.stderr, flush=True)


def _meter(args: argparse.Namespace) -> Optional[_Meter]:
    """The progress meter, if it is wanted: by default on a terminal only."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    wanted = terminal if args.show_progress is None else args.show_progress
    if not wanted or args.quiet or sys.stderr is None:
        return None
    name = "standard output" if args.output in (None, "-") else args.output
    return _Meter(sys.stderr, name, terminal)


def _run(args: argparse.Namespace, meter: Optional[_Meter]) -> int:
    """Do what the arguments say; errors become one line and an exit status."""
    try:
        with _terminable():
            _act(args, meter)
        return 0
    except BrokenPipeError:
        return 141
    except _Terminated:
        status, message = 143, "terminated"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except RequestError as error:
        status, message = 2, str(error)
    except RetryableError as error:
        status, message = 75, "%s; the same command may go on later" % error
    except ClientError as error:
        status, message = 1, str(error) + _hint(error, args)
    except (HtsgetException, OSError) as error:
        status, message = 1, str(error)
    finally:
        if meter is not None:
            meter.clear()
    _log.error("error: %s", message)
    return status


class _Terminated(BaseException):
    """SIGTERM."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end what runs here as Ctrl-C does, in order."""

    def terminate(number: int, frame: Any) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _hint(error: ClientError, args: argparse.Namespace) -> str:
    """What to do about a refusal, where that is known."""
    if error.status in (401, 403):
        return "; a token is given with -b, --bearer-token-file or HTS_AUTH_LOCATION"
    if error.status == 404:
        return "; check the id in the URL"
    if error.status == 407:
        return "; the proxy wants a login, in the proxy's URL"
    if error.error == "UnsupportedFormat":
        try:
            options = dict(_options(args), max_retries=0, timeout=10)
            formats = service_info(args.url, **options)["htsget"]["formats"]
            return "; the server has " + _printable(", ".join(formats))
        except (HtsgetException, LookupError, TypeError):
            pass
    return ""


def _act(args: argparse.Namespace, meter: Optional[_Meter]) -> None:
    """Call the function that the arguments ask for."""
    options = _options(args)
    if args.service_info:
        info = service_info(args.url, **options)
        print(json.dumps(info, indent=2, ensure_ascii=False))
        return
    source = _ticket_argument(args.url)
    if args.dry_run:
        if isinstance(source, str):
            source = get_ticket(source, **options)
        print(_describe(source))
        return
    if args.output is None and sys.stdout.isatty():
        raise RequestError(
            "not writing binary data to a terminal; give -O PATH or -O -"
        )
    if args.output in (None, "-"):
        output: Any = io.FileIO(sys.stdout.fileno(), "w", closefd=False)
    else:
        output = args.output
    get(source, output, progress=meter, **options)


def _ticket_argument(url: str) -> Union[str, Ticket]:
    """A URL as it is; a file with a ticket, or "-" for one on standard input, read."""
    if re.match("[A-Za-z][A-Za-z0-9+.-]*://", url):
        return url
    try:
        if url == "-":
            return _parse_ticket(sys.stdin.buffer.read())
        with io.open(url, "rb") as file:
            return _parse_ticket(file.read())
    except OSError as error:
        text = "%s is no URL and cannot be read as a ticket: %s"
        raise RequestError(text % (url, error.strerror)) from None


def _describe(ticket: Ticket) -> str:
    """What --dry-run tells of a ticket: no query, no header's value."""
    with _Session(ticket, _Options()) as session:
        session.begin()
        total = session.total()
        hosts = {block.origin[1] for block in session.blocks if block.data is None}
        inline = sum(block.data is not None for block in session.blocks)
    lines = [
        "format: %s" % (ticket.format or "not given"),
        "blocks: %d (%d inline)" % (len(ticket.blocks), inline),
        "size:   %s" % ("not known" if total is None else "%d bytes" % total),
        "MD5:    %s" % (ticket.md5 or "not given"),
        "hosts:  %s" % (", ".join(sorted(hosts)) or "none"),
    ]
    return "\n".join(lines)


def _options(args: argparse.Namespace) -> Dict[str, Any]:
    """The options of `get` that the arguments stand for."""
    names = set(_Options._fields) & set(vars(args))
    options = {name: getattr(args, name) for name in names}
    options["headers"] = _parse_headers(args.headers)
    if args.cacert:
        options["ssl_context"] = _ssl_context(args.cacert)
    path = args.bearer_token_file or os.environ.get("HTS_AUTH_LOCATION")
    if args.bearer_token is None and path:
        options["bearer_token"] = functools.partial(_read_token, path)
    regions = [parse_region(text) for text in args.region]
    if args.regions_file:
        regions += _read_bed(args.regions_file)
    if regions and args.reference_name is not None:
        raise RequestError("--region and -L go without -r")
    if len(regions) == 1:
        if (args.start, args.end) != (None, None):
            raise RequestError("--region and -L go without -s and -e")
        options.update(regions[0]._asdict())
    elif args.region or args.regions_file:
        options["regions"] = regions
    return options


def _parse_headers(texts: List[str]) -> Dict[str, str]:
    """The headers of -H: "Name: value", or a JSON object as htsget 0.2.6 takes it."""
    headers = {}
    for text in texts:
        if text.lstrip().startswith("{"):
            try:
                headers.update(json.loads(text))
            except ValueError as error:
                raise RequestError("-H/--headers is not JSON: %s" % error) from None
        else:
            name, colon, value = text.partition(":")
            if not colon:
                raise RequestError("-H/--headers takes 'Name: value' or a JSON object")
            headers[name.strip()] = value.strip()
    return headers


def _read_token(path: str) -> str:
    """A token from a file: text, or JSON with `access_token`, as htslib reads it."""
    try:
        with io.open(path, encoding="utf-8") as file:
            text = file.read().strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise RequestError(
            "cannot read the token file %s: %s" % (path, reason)
        ) from None
    if not text.startswith("{"):
        return text
    try:
        return str(json.loads(text)["access_token"])
    except (ValueError, KeyError):
        raise RequestError("no access_token in the token file %s" % path) from None


def _read_bed(path: str) -> List[Region]:
    """The regions of a BED file, which may be compressed with gzip."""
    import gzip

    try:
        with io.open(path, "rb") as file:
            data = file.read()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, ValueError) as error:
        raise RequestError("cannot read %s: %s" % (path, error)) from None
    regions = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or re.match(r"#|(track|browser)(\s|\Z)", line):
            continue
        columns = line.split("\t") if "\t" in line else line.split()
        try:
            regions.append(Region(columns[0], int(columns[1]), int(columns[2])))
        except (ValueError, IndexError):
            raise RequestError("%s, line %d: not BED" % (path, number)) from None
    if not regions:
        raise RequestError("%s has no regions" % path)
    return regions


_EXAMPLES = """examples:
  htsget https://example.org/reads/NA12878 -O NA12878.bam
  htsget https://example.org/reads/NA12878 --region chr1:1,000-2,000 -O slice.bam
  htsget https://example.org/variants/1000g -f VCF -r chr22 | zcat | less

exit status: 0 done; 1 refused or wrong; 2 wrong usage; 75 gave up, try again later
"""


def _parser() -> argparse.ArgumentParser:
    """The options; where `get` has the option too, its name is that of `get`."""
    parser = argparse.ArgumentParser(
        prog="htsget",
        description="Fetch slices of BAM, CRAM, VCF and BCF files from htsget servers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "address of the data; or a file with a ticket, - for standard input"
    parser.add_argument("url", metavar="URL", help=text)
    version = "%(prog)s " + __version__
    parser.add_argument("-V", "--version", action="version", version=version)
    _add_request_options(parser.add_argument_group("request").add_argument)
    _add_transfer_options(parser.add_argument_group("transfer").add_argument)
    _add_connection_options(parser.add_argument_group("connection").add_argument)
    _add_output_options(parser.add_argument_group("output").add_argument)
    return parser


def _add_request_options(add: Callable[..., Any]) -> None:
    text = "BAM, CRAM, VCF or BCF"
    add("-f", "--format", dest="data_format", metavar="FORMAT", help=text)
    add("-r", "--reference-name", metavar="NAME", help="reference, such as chr1")
    add("-m", "--reference-md5", metavar="MD5", help="MD5 of the reference's sequence")
    add("-s", "--start", type=int, metavar="N", help="first position, 0-based")
    add("-e", "--end", type=int, metavar="N", help="position behind the last one")
    text = "such as chr1:1,000-2,000, 1-based and inclusive (repeatable)"
    add("--region", action="append", default=[], help=text)
    add("-L", "--regions-file", metavar="BED", help="regions of a BED file, 0-based")
    add("--fields", metavar="LIST", help="SAM fields to include, comma-separated")
    add("--tags", metavar="LIST", help="tags to include; '' for none")
    add("--notags", metavar="LIST", help="tags to leave out")
    add("--class", dest="data_class", metavar="CLASS", help="'header': header only")
    text = "print what the server says of itself, and stop"
    add("--service-info", action="store_true", help=text)
    text = "print what the ticket says, and stop"
    add("--dry-run", action="store_true", help=text)


def _add_transfer_options(add: Callable[..., Any]) -> None:
    text = "retries without progress; below 0: no limit (default: 5)"
    add("-M", "--max-retries", type=int, metavar="N", default=5, help=text)
    text = "wait before the first retry (default: 5)"
    add("-W", "--retry-wait", type=float, metavar="SECONDS", default=5, help=text)
    text = "the most connections at once (default: 4)"
    add("-c", "--connections", type=int, metavar="N", default=4, help=text)
    text = "do not check MD5, format and end of the data"
    add("--no-verify", dest="verify", action="store_false", help=text)
    text = "start over instead of going on with PATH.part"
    add("--no-resume", dest="resume", action="store_false", help=text)


def _add_connection_options(add: Callable[..., Any]) -> None:
    text = "time without a byte after which to give up (default: 120)"
    add("-T", "--timeout", type=float, metavar="SECONDS", default=120, help=text)
    add("-b", "--bearer-token", metavar="TOKEN", help="token for the ticket server")
    text = "file with the token (default: $HTS_AUTH_LOCATION), read when needed"
    add("--bearer-token-file", metavar="PATH", help=text)
    text = "'Name: value' for the ticket server (repeatable), or JSON"
    add("-H", "--headers", action="append", metavar="HEADER", default=[], help=text)
    text = "file or folder of certificates to trust too"
    add("--cacert", metavar="PATH", help=text)


def _add_output_options(add: Callable[..., Any]) -> None:
    text = "file to write (default, and -: standard output)"
    add("-O", "--output", metavar="PATH", help=text)
    either: Dict[str, Any] = {"dest": "show_progress", "default": None}
    text = "show progress even if standard error is no terminal"
    add("--progress", action="store_true", help=text, **either)
    add("--no-progress", action="store_false", help="show no progress", **either)
    add("-q", "--quiet", action="store_true", help="show errors only")
    add("-v", "--verbose", action="count", default=0, help="tell more (twice: most)")


if __name__ == "__main__":
    sys.exit(main())
