"""Settings: ``H5FEED_*`` environment variables; the command line's flags override them."""

from __future__ import annotations

import io
import ipaddress
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from dotenv import dotenv_values
from h5feed.errors import BadParameter
from h5feed.suggestions import did_you_mean
from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from .store_address import StoreAddress

ANY_HOST = "*"
"""As an allowed host: whatever name the server is asked for by."""

_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")

_BEGIN = "H5FEED_"
_OF_CLIENT = frozenset({"H5FEED_URL", "H5FEED_TOKEN"})
_SEE = "see docs/reference/settings.md"

_PREFIX = re.compile(r"(?:/[A-Za-z0-9_~@:+=,-][A-Za-z0-9_.~@:+=,%-]*){1,16}")
"""Nothing that means something in HTML, in a header or in a URL, and no ``..``."""

OWN_PATHS = frozenset(
    {
        "datasets",
        "docs",
        "explorer",
        "feed",
        "h5grove",
        "healthz",
        "metrics",
        "openapi.json",
        "readyz",
        "redoc",
        "sign-in",
    }
    | {"sign-out", "simple", "static", "v1"}
)
"""How the server's own paths begin."""

_URL = re.compile(r"([a-z][a-z0-9+.-]{1,}):/+([^/].*)")
"""A URL, also after it was made into a path. Such a path would be that of a folder whose name ends with a colon."""

_PLACEHOLDERS = frozenset({"changeme", "yourtoken", "token"})
"""What documents write where a token belongs, without marks and in lower case: the first that anybody tries."""

_MAX_TOKEN = 1024
"""Characters. Heads of requests are bounded, and a token is to fit into one together with all else."""


def default_cache_dir() -> Path:
    """The cache folder if none is set: ``$XDG_CACHE_HOME/h5feed``, else ``~/.cache/h5feed``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "h5feed"


MAX_WORKERS = 64
"""Worker processes of one server."""


class Settings(BaseSettings):
    """What the server needs to know; passed in, never global."""

    # Tracebacks must not show tokens.
    model_config = SettingsConfigDict(
        env_prefix="H5FEED_", env_ignore_empty=True, frozen=True, extra="ignore", hide_input_in_errors=True
    )

    data_dir: Path = Field(
        Path("data"),
        description="Folder of HDF5 files, or a single one; never written to. Or the URL of an object store or web "
        "server, such as s3://bucket/prefix.",
    )
    listing_seconds: float = Field(
        30.0, ge=1, description="Seconds between listings of an object store, which find new objects."
    )
    cache_dir: Path = Field(
        default_factory=default_cache_dir, description="Folder for layouts, digests and splits; safe to delete."
    )
    store_cache_bytes: int = Field(
        16 << 30,
        ge=0,
        description="Disk space in the cache folder for rows and chunks of an object store, in bytes; 0: no cache.",
    )
    store_ahead_bytes: int = Field(
        64 << 20,
        ge=0,
        description="Memory for rows and chunks that are prefetched from an object store, per worker, in bytes; 0: "
        "no prefetching.",
    )
    store_request_rate: float = Field(
        0,
        ge=0,
        allow_inf_nan=False,
        description="Maximum number of requests per second to object stores, of all workers together; 0 for no limit.",
    )
    mounts: str = Field(
        "",
        description="Comma-separated URLs of buckets, folders in them or web servers that h5feed.toml in the data "
        "folder may mount, such as s3://bucket; empty: none.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port; 0 picks a free port and prints it.")
    uds: str | None = Field(
        None, description="Unix socket to listen on; instead of a port, unless a host or a port is set, too."
    )
    socket_mode: str = Field(
        "",
        pattern="^([0-7]{3,4})?$",
        description="Permissions of the Unix socket in octal, such as 0666; 0660 if there is a group, else those that "
        "the umask leaves.",
    )
    socket_group: str = Field("", description="Group of the Unix socket: its name or number.")
    uds_mode: str = Field("", pattern="^([0-7]{3,4})?$", description="Older name of socket_mode.")
    local: bool = Field(
        True, description="Open a Unix socket for this user's clients on this machine, unless there is one already."
    )
    workers: int = Field(1, ge=1, le=MAX_WORKERS, description="Worker processes.")
    public: bool = Field(False, description="Allow serving non-loopback addresses without tokens.")
    tokens: str = Field("", description="Comma-separated bearer tokens; each grants full access.")
    token_file: Path | None = Field(
        None, description="File of further tokens, which `h5feed-server token` manages; read again when it changes."
    )
    published_on: str = Field(
        "",
        pattern=r"^(.+:[0-9]{1,5})?$",
        description="ADDRESS:PORT under which the container engine publishes the port.",
    )
    allowed_hosts: str = Field("", description="Comma-separated host names accepted by a server without tokens.")
    follow_links: bool = Field(False, description="Follow symbolic links that lead out of the data folder.")

    trusted_proxies: str = Field(
        "", description="Comma-separated addresses of proxies whose X-Forwarded-… headers are trusted."
    )
    root_path: str = Field("", description="Path prefix under which a reverse proxy publishes the server.")
    access_log: bool = Field(False, description="Log every request.")
    log_format: Literal["pretty", "json"] = Field("pretty", description="Format of all lines of the log.")

    digest_limit: int = Field(
        8 << 30, ge=0, description="Files up to this size are hashed in full for their revision, in bytes."
    )
    provisional_bytes: int = Field(
        32 << 20,
        ge=0,
        description="Datasets whose files have more bytes to hash than this are served under a provisional revision "
        "until that is done.",
    )
    digest_rate: int = Field(
        0, ge=0, description="Bytes per second that a worker hashes in the background; 0 for no limit."
    )
    max_body_bytes: int = Field(
        256 << 20, ge=1 << 16, description="Maximum size of one response with batches or rows, in bytes."
    )
    max_rows: int = Field(1_000_000, ge=1, description="Maximum number of rows per request.")
    inflight_bytes: int = Field(
        256 << 20, ge=1 << 20, description="Memory for responses being filled or sent, per worker, in bytes."
    )
    descriptors: Literal["auto", "off"] = Field(
        "auto",
        description="Whether clients on the Unix socket get descriptors of files that they may read as a whole.",
    )
    io_uring: bool = Field(True, description="Read many rows with one system call, where the system allows io_uring.")
    cache_bytes: int = Field(64 << 20, ge=0, description="Memory for small decoded fields, per worker, in bytes.")
    chunk_cache_bytes: int = Field(128 << 20, ge=0, description="Memory for decoded chunks, per worker, in bytes.")
    order_cache_bytes: int = Field(128 << 20, ge=0, description="Memory for splits and orders, per worker, in bytes.")
    weights_bytes: int = Field(1 << 30, ge=0, description="Maximum size of all weights given by clients, in bytes.")
    weights_arrays: int = Field(256, ge=1, description="Maximum number of arrays of weights given by clients.")
    weights_seconds: float = Field(
        7 * 24 * 3600.0, gt=0, description="Seconds after their last use that weights given by clients are kept."
    )
    idle_seconds: float = Field(
        30.0, gt=0, description="Seconds without requests after which a worker empties its caches."
    )
    disk_cache_bytes: int = Field(4 << 30, ge=0, description="Maximum size of the cache folder, in bytes.")
    transposed_bytes: int = Field(
        16 << 30,
        ge=0,
        description="Disk space in the cache folder for copies by rows of sparse matrices that are stored by columns, "
        "in bytes; 0: such matrices are not served.",
    )
    open_files: int = Field(128, ge=1, description="HDF5 files kept open, per worker.")
    request_threads: int = Field(16, ge=1, description="Requests processed at the same time, per worker.")
    readers: int = Field(
        2,
        ge=1,
        le=64,
        description="Processes for data that only h5py can read, and as many for listing what is in files, per "
        "worker; started when needed.",
    )
    inspect_timeout: float = Field(30.0, gt=0, description="Time limit for inspecting one file, in seconds.")
    read_timeout: float = Field(60.0, gt=0, description="Time limit for one request, in seconds.")
    max_job_bytes: int = Field(1 << 40, ge=1 << 20, description="Maximum number of bytes that one job may read.")
    job_patience: float = Field(600.0, gt=0, description="Seconds after which a job that nobody asks for is stopped.")
    admit_timeout: float = Field(5.0, ge=0, description="Seconds that a request waits for memory before it gets a 503.")
    min_rate: int = Field(1024, ge=1, description="Minimum transfer rate of a client, in bytes per second.")
    connections: int = Field(2000, ge=10, description="Maximum number of connections, per worker.")

    _file: str = PrivateAttr("")
    """Name of the only file that is served; empty for all."""

    _store: StoreAddress | None = PrivateAttr(None)
    """The object store that is served; None for a folder."""

    @model_validator(mode="after")
    def _check_socket(self) -> Settings:
        for name in ("socket_mode", "socket_group", "uds_mode"):
            if getattr(self, name) and self.uds is None:
                raise ValueError(
                    f"{name} is for the Unix socket of --uds (H5FEED_UDS), which is not set. The socket that the "
                    "server opens itself is for its own user alone"
                )
        if self.socket_mode and self.uds_mode and int(self.socket_mode, 8) != int(self.uds_mode, 8):
            raise ValueError(
                f"socket_mode {self.socket_mode} and uds_mode {self.uds_mode} are two names of one setting: set only "
                "socket_mode"
            )
        return self

    @field_validator("trusted_proxies")
    @classmethod
    def _are_addresses(cls, value: str) -> str:
        for item in _items(value):
            try:
                if item != "unix":
                    ipaddress.ip_network(item, strict=False)
            except ValueError:
                raise ValueError(f"{item!r} is not an address, a network such as 10.0.0.0/8, or 'unix'") from None
        return value

    @field_validator("root_path")
    @classmethod
    def _check_prefix(cls, value: str) -> str:
        return checked_prefix(value)

    @field_validator("tokens")
    @classmethod
    def _check_tokens(cls, tokens: str) -> str:
        """Refuse what would let everybody in, or nobody; no token is told, for who can read the log has none."""
        for number, token in enumerate(tokens.split(",") if tokens else (), 1):
            which = f"token {number} of {tokens.count(',') + 1}"
            token = token.strip()
            if not token:
                raise ValueError(f"{which} is empty (an unset variable?): remove it or set it")
            if not all("!" <= char <= "~" for char in token):
                raise ValueError(
                    f"{which} has a character that cannot be sent in a header: use visible ASCII without spaces"
                )
            if len(token) > _MAX_TOKEN:
                raise ValueError(f"{which} has {len(token)} characters: use at most {_MAX_TOKEN}")
            if re.sub(r"[\W_]", "", token.lower()) in _PLACEHOLDERS:
                raise ValueError(
                    f"{which} is the placeholder {token!r} from an example: use a secret token, such as the output of "
                    "`openssl rand -hex 16`"
                )
        return tokens

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, hosts: str) -> str:
        for host in _items(hosts):
            if host != ANY_HOST and not _HOST_NAME.fullmatch(host.lower()):
                raise ValueError(
                    f"{host!r} is not a host name: expected something like gpu-box.example.org, or * for any"
                )
        return hosts

    def for_file(self) -> Settings:
        """These settings, or if the data folder is a file or an object store, those of a server for it.

        Raises
        ------
        BadParameter
            It is the URL of something else.
        """
        if (url := _url_of(self.data_dir)) is not None:
            return self._for_store(url)
        if not self.data_dir.is_file():
            return self
        copy = self.model_copy(update={"data_dir": self.data_dir.parent})
        copy._file = self.data_dir.name
        return copy

    def _for_store(self, url: str) -> Settings:
        address = StoreAddress.parse(url)
        copy = self.model_copy(update={"data_dir": address.folder(self.cache_dir)})
        copy._store, copy._file = address, address.only
        return copy

    @property
    def store(self) -> StoreAddress | None:
        """The object store that is served; None for a folder."""
        return self._store

    @property
    def only(self) -> tuple[str, ...] | None:
        """The only files of the data folder that are served; None for all of them."""
        return (self._file,) if self._file else None

    @property
    def source(self) -> Path | str:
        """What is served: a folder or a file, or the URL of an object store."""
        if self._store is not None:
            return "/".join(part for part in (self._store.url, self._file) if part)
        return self.data_dir / self._file

    def may_mount(self, url: str) -> bool:
        """Whether ``h5feed.toml`` may mount the store with this URL."""
        allowed = (one.rstrip("/") for one in _items(self.mounts))
        return any(url == one or url.startswith(f"{one}/") for one in allowed if "://" in one)

    # Not cached: a copy with other tokens, such as a generated one, would keep the list of the original.
    @property
    def token_list(self) -> tuple[str, ...]:
        """The tokens of the variable, one by one."""
        return _items(self.tokens)

    @property
    def is_guarded(self) -> bool:
        """Whether clients need a token. With an empty token file, nobody can connect."""
        return bool(self.token_list) or self.token_file is not None

    @property
    def allowed_host_list(self) -> tuple[str, ...]:
        """The names, in lower case."""
        return _items(self.allowed_hosts.lower())

    @property
    def has_port(self) -> bool:
        """Whether the server listens on a port: not if there is a Unix socket and nobody has named an address."""
        return self.uds is None or bool({"host", "port"} & self.model_fields_set)

    @property
    def permissions(self) -> str:
        """Permissions of the Unix socket in octal; empty for those that the umask leaves."""
        return self.socket_mode or self.uds_mode or ("0660" if self.socket_group else "")

    @property
    def proxy_list(self) -> tuple[str, ...]:
        """The trusted proxies, one by one."""
        return _items(self.trusted_proxies)


def unknown_variables(variables: Iterable[str]) -> list[str]:
    """A line for each variable that begins with ``H5FEED_`` but is not a setting, for it may be misspelt."""
    lines = []
    for name in sorted(variables):
        if name.startswith(_BEGIN) and name not in _NAMES and name not in _OF_CLIENT:
            lines.append(f"{name} is not a setting and is ignored: {did_you_mean(name, _NAMES, _SEE)}")
    return lines


def variables_of(file: Path | None) -> dict[str, str]:
    """Settings from a file of lines ``H5FEED_NAME=VALUE``, by field; those that the environment has are left out.

    Raises
    ------
    BadParameter
        The file cannot be read, or has a line that sets nothing.
    """
    if file is None:
        return {}
    try:
        found = dotenv_values(stream=io.StringIO(file.read_text("utf-8")), interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise BadParameter(f"--env-file {file}: {getattr(error, 'strerror', None) or error}") from None
    for name, value in found.items():
        if name not in _NAMES:
            raise BadParameter(f"--env-file {file}: {name!r} is not a setting: {did_you_mean(name, _NAMES, _SEE)}")
        if value is None:
            raise BadParameter(f"--env-file {file}: {name} has no value: write {name}=VALUE")
    # As everywhere, the environment comes first and what is empty is not set.
    return {_NAMES[name]: value for name, value in found.items() if value and not os.environ.get(name)}


def checked_prefix(value: str) -> str:
    """A path prefix without the slash at its end; empty for none.

    Raises
    ------
    ValueError
        It is no path, or paths below it could be mistaken for the server's own.
    """
    prefix = value.rstrip("/")
    if prefix and not _PREFIX.fullmatch(prefix):
        raise ValueError(f"{value[:80]!r} is not a path prefix: expected something like /h5feed")
    if prefix.split("/")[1:2] and (first := prefix.split("/")[1]) in OWN_PATHS:
        raise ValueError(f"the prefix {prefix!r} cannot begin with /{first}, which is a path of the server itself")
    return prefix


def _url_of(path: Path) -> str | None:
    """The URL that was made into a path, which has one slash less; None if it is a path."""
    match = _URL.fullmatch(str(path))
    return None if match is None else f"{match[1]}://{match[2]}"


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


_NAMES = {f"{_BEGIN}{name.upper()}": name for name in Settings.model_fields}
"""The field of each variable."""

_FORMS = {
    "socket_mode": "an octal number such as 0660",
    "uds_mode": "an octal number such as 0660",
    "published_on": "ADDRESS:PORT, such as 127.0.0.1:8000",
}
"""What a setting with a pattern looks like."""


def explain(error: ValidationError, flags: Mapping[str, Any]) -> None:
    """Print a line for each invalid setting, with the name under which it was given.

    Parameters
    ----------
    flags : mapping of str
        Options of the command line by the names of the settings; None where an option was not given.

    Raises
    ------
    ValidationError
        It is not about settings.
    """
    if error.title != Settings.__name__:
        raise error
    for item in error.errors():
        if not item["loc"]:
            # About several settings at once.
            print(f"h5feed-server: {item['msg'].removeprefix('Value error, ')}", file=sys.stderr)
            continue
        name = str(item["loc"][0])
        if flags.get(name) is not None:
            flag = "allowed-host" if name == "allowed_hosts" else name.replace("_", "-")
            setting = f"--{flag} {item['input']}"
        else:
            # Tokens must not appear in the log.
            setting = f"H5FEED_{name.upper()}" + ("" if name == "tokens" else f"={item['input']}")
        message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if item["type"] == "string_pattern_mismatch":
            message = f"must be {_FORMS[name]}"
        print(f"h5feed-server: {setting}: {message}", file=sys.stderr)
