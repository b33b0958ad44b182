"""Every error of h5feed, one class per ``code`` of the HTTP contract.

The server sends them as ``application/problem+json``; the client raises the same class again. ::

    FeedError
    ├── BadParameter          400 bad_parameter        an invalid value; the message names a valid one
    ├── Unauthorized          401 unauthorized
    ├── NotFound
    │   ├── DatasetNotFound   404 dataset_not_found
    │   ├── FieldNotFound     404 field_not_found
    │   ├── SplitNotFound     404 split_not_found
    │   ├── BatchOutOfRange   404 batch_out_of_range
    │   ├── RowOutOfRange     404 row_out_of_range
    │   ├── KeysNotFound      404 keys_not_found       no row has one of the keys
    │   ├── WeightsUnknown    404 weights_unknown      the server lacks an array of weights: give it, and repeat
    │   └── PageNotFound      404 not_found            no such URL on this server
    ├── MethodNotAllowed      405 method_not_allowed
    ├── NotAcceptable         406 not_acceptable
    ├── RevisionChanged       409 revision_changed     the file has changed since the caller opened the dataset
    ├── JobWanted             409 job_wanted           other clients wait for this job, so it continues
    ├── TooLarge              413 too_large            rejected before anything is read
    ├── HostNotAllowed        421 host_not_allowed     the Host header is not one of the server's names
    ├── UnsupportedField      422 unsupported_field
    ├── AmbiguousKey          422 ambiguous_key        several rows have one of the keys
    ├── SplitImpossible       422 split_impossible
    ├── Unreadable            422 unreadable
    ├── DatasetCorrupt        500 dataset_corrupt
    ├── InternalError         500 internal_error
    ├── Transient                                      the same request may succeed later: clients retry these
    │   ├── TooManyRequests   429 too_many_requests
    │   ├── SourceUnavailable 503 source_unavailable   the files or their folder cannot be read at the moment
    │   ├── Preparing         503 preparing            the files are being inspected for the first time
    │   ├── Overloaded        503 overloaded
    │   ├── ReaderCrashed     503 reader_crashed
    │   └── ReadTimeout       504 read_timeout
    └── ConnectionFailed          connection_failed    client only: no complete response before the deadline
        └── BadAnswer             bad_answer           client only: the response violates the contract
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing import Self


class FeedError(Exception):
    """Base class of all h5feed errors.

    Parameters
    ----------
    detail : str
        One sentence that names the bad value and a valid one.
    retry_after : float, optional
        Seconds after which the same request may succeed.
    request_id : str, optional
        Id of the failed request in the server's log.
    """

    code: ClassVar[str] = "error"

    def __init__(self, detail: str, *, retry_after: float | None = None, request_id: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after
        self.request_id = request_id

    def __str__(self) -> str:
        # KeyError.__str__ would return the message in quotes.
        return self.detail


class BadParameter(FeedError, ValueError):
    code = "bad_parameter"


class Unauthorized(FeedError):
    code = "unauthorized"


class NotFound(FeedError, LookupError):
    code = "not_found"


class DatasetNotFound(NotFound, KeyError):
    code = "dataset_not_found"


class FieldNotFound(NotFound, KeyError):
    code = "field_not_found"


class SplitNotFound(NotFound):
    code = "split_not_found"


class BatchOutOfRange(NotFound, IndexError):
    code = "batch_out_of_range"


class RowOutOfRange(NotFound, IndexError):
    code = "row_out_of_range"


class KeysNotFound(NotFound, KeyError):
    code = "keys_not_found"


class WeightsUnknown(NotFound):
    code = "weights_unknown"


class PageNotFound(NotFound):
    code = "not_found"


class MethodNotAllowed(FeedError):
    code = "method_not_allowed"


class NotAcceptable(FeedError):
    code = "not_acceptable"


class RevisionChanged(FeedError):
    code = "revision_changed"


class JobWanted(FeedError):
    code = "job_wanted"


class TooLarge(FeedError):
    code = "too_large"


class HostNotAllowed(FeedError):
    code = "host_not_allowed"


class UnsupportedField(FeedError):
    code = "unsupported_field"


class AmbiguousKey(FeedError):
    code = "ambiguous_key"


class SplitImpossible(FeedError):
    code = "split_impossible"


class Unreadable(FeedError):
    code = "unreadable"


class DatasetCorrupt(FeedError):
    code = "dataset_corrupt"


class InternalError(FeedError):
    code = "internal_error"


class Transient(FeedError):
    """Temporary errors. Clients retry them after ``retry_after`` seconds, if the server names a time."""


class TooManyRequests(Transient):
    code = "too_many_requests"


class SourceUnavailable(Transient):
    code = "source_unavailable"


class Preparing(Transient):
    code = "preparing"


class Overloaded(Transient):
    code = "overloaded"

    lacking: str = "other"
    """In the server: what there is too little of. See `h5feed_server.sharing.metrics.LACKING`."""

    def because_of(self, lacking: str) -> Self:
        """Set `lacking`; returns the error."""
        self.lacking = lacking
        return self


class ReaderCrashed(Transient):
    code = "reader_crashed"


class ReadTimeout(Transient, TimeoutError):
    code = "read_timeout"


class ConnectionFailed(FeedError, ConnectionError):
    """No complete response arrived before the deadline, despite retries."""

    code = "connection_failed"


class BadAnswer(ConnectionFailed):
    """The response violates the contract: another service listens on that port, a proxy sent its own page …"""

    code = "bad_answer"


def _leaves(parent: type[FeedError]) -> Iterator[type[FeedError]]:
    for child in parent.__subclasses__():
        if "code" in child.__dict__:
            yield child
        yield from _leaves(child)


CLASS_BY_CODE: Mapping[str, type[FeedError]] = {
    cls.code: cls for cls in _leaves(FeedError) if cls not in (NotFound, ConnectionFailed, BadAnswer)
}
"""Error class of each ``code`` that a server may send."""

_MOST_SHOWN = 4000
"""Maximum length of a message from a server, in characters."""

_CODE_BY_STATUS = {429: TooManyRequests, 502: SourceUnavailable, 503: Overloaded, 504: ReadTimeout, 401: Unauthorized}
"""Error class of a response without a problem body, as a proxy sends it."""


def from_problem(status: int, problem: Mapping[str, Any], *, retry_after: float | None = None) -> FeedError:
    """The exception for a problem+json response (RFC 9457). Unknown codes become `BadAnswer` or a retryable class."""
    code = problem.get("code")
    known = CLASS_BY_CODE.get(code) if isinstance(code, str) else None
    cls = known or _CODE_BY_STATUS.get(status, BadAnswer)
    texts = [text for key in ("detail", "title") if isinstance(text := problem.get(key), str) and text]
    said = texts[0] if texts else f"the server returned HTTP status {status}"
    # One line of printable characters.
    detail = "".join(char if char.isprintable() else " " for char in said[:_MOST_SHOWN])
    request_id = problem.get("request_id")
    return cls(detail, retry_after=retry_after, request_id=request_id if isinstance(request_id, str) else None)
