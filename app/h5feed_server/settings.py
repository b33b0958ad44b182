"""Settings: ``H5FEED_*`` environment variables; the command line's flags override them."""

from __future__ import annotations

import ipaddress
import os
import re
from functools import cached_property
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ANY_HOST = "*"
"""As an allowed host: whatever name the server is asked for by."""

_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")

_PLACEHOLDERS = frozenset({"changeme", "yourtoken", "token"})
"""What documents write where a token belongs, without marks and in lower case: the first that anybody tries."""

_MAX_TOKEN = 1024
"""Characters. Heads of requests are bounded, and a token is to fit into one together with all else."""


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "h5feed"


class Settings(BaseSettings):
    """What the server needs to know; passed in, never global."""

    model_config = SettingsConfigDict(env_prefix="H5FEED_", env_ignore_empty=True, frozen=True, extra="ignore")

    data_dir: Path = Field(Path("data"), description="Folder of HDF5 files; only ever read.")
    cache_dir: Path = Field(default_factory=_default_cache_dir, description="Layouts, digests, splits; safe to delete.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port; 0 takes a free one and prints it.")
    uds: str | None = Field(None, description="Path of a Unix socket to listen on instead.")
    workers: int = Field(1, ge=1, le=64, description="Processes.")
    public: bool = Field(False, description="Serve another address than loopback without tokens.")
    tokens: str = Field("", description="Comma-separated bearer tokens; any of them opens everything.")
    published_on: str = Field(
        "", pattern=r"^(.+:[0-9]{1,5})?$", description="ADDRESS:PORT on which a container engine publishes the port."
    )
    allowed_hosts: str = Field("", description="Comma-separated names that a server without tokens may be asked for.")
    follow_links: bool = Field(False, description="Serve files to which links lead out of the data folder.")

    trusted_proxies: str = Field("", description="Comma-separated addresses whose X-Forwarded-For is believed.")
    access_log: bool = Field(False, description="Write a line for each request.")

    digest_limit: int = Field(8 << 30, ge=0, description="Bytes of a file hashed in full for its revision.")
    max_body_bytes: int = Field(256 << 20, ge=1 << 16, description="Bytes of one batch or row answer at most.")
    max_rows: int = Field(1_000_000, ge=1, description="Rows of one batch or row request at most.")
    inflight_bytes: int = Field(256 << 20, ge=1 << 20, description="Bytes of bodies being filled or sent, per worker.")
    cache_bytes: int = Field(64 << 20, ge=0, description="Bytes of small fields kept decoded in memory, per worker.")
    chunk_cache_bytes: int = Field(128 << 20, ge=0, description="Bytes of decoded chunks kept in memory, per worker.")
    order_cache_bytes: int = Field(128 << 20, ge=0, description="Bytes of split rows and orders kept, per worker.")
    idle_seconds: float = Field(
        30.0, gt=0, description="Seconds after which a worker without requests empties its caches."
    )
    disk_cache_bytes: int = Field(4 << 30, ge=0, description="Bytes of the cache folder.")
    open_files: int = Field(128, ge=1, description="Descriptors of HDF5 files held open, per worker.")
    request_threads: int = Field(16, ge=1, description="Requests read at the same time, per worker.")
    readers: int = Field(2, ge=1, le=64, description="Processes that read what only h5py can, per worker, if needed.")
    inspect_timeout: float = Field(30.0, gt=0, description="Seconds that inspecting one file may take.")
    read_timeout: float = Field(60.0, gt=0, description="Seconds that answering one request may take.")
    max_job_bytes: int = Field(1 << 40, ge=1 << 20, description="Bytes that one job may read; more is 413.")
    job_patience: float = Field(600.0, gt=0, description="Seconds that a job goes on when nobody asks for it.")
    admit_timeout: float = Field(5.0, ge=0, description="Seconds that a request waits for room before 503.")
    min_rate: int = Field(1024, ge=1, description="Bytes per second that a peer has to take or send at least.")
    connections: int = Field(2000, ge=10, description="Connections, per worker.")

    @field_validator("trusted_proxies")
    @classmethod
    def _are_addresses(cls, value: str) -> str:
        for item in _items(value):
            try:
                if item != "unix":
                    ipaddress.ip_network(item, strict=False)
            except ValueError:
                raise ValueError(f"{item!r} is no address, no network like 10.0.0.0/8, and not 'unix'") from None
        return value

    @field_validator("tokens")
    @classmethod
    def _check_tokens(cls, tokens: str) -> str:
        """Refuse what would let everybody in, or nobody; no token is told, for who can read the log has none."""
        for number, token in enumerate(tokens.split(",") if tokens else (), 1):
            which = f"token {number} of {tokens.count(',') + 1}"
            token = token.strip()
            if not token:
                raise ValueError(f"{which} is empty, maybe a variable that is not set: every token needs a character")
            if not all("!" <= char <= "~" for char in token):
                raise ValueError(f"{which} has a character that no header carries: use visible ASCII, without spaces")
            if len(token) > _MAX_TOKEN:
                raise ValueError(f"{which} has {len(token)} characters: use at most {_MAX_TOKEN}")
            if re.sub(r"[\W_]", "", token.lower()) in _PLACEHOLDERS:
                raise ValueError(
                    f"{which} is the placeholder {token!r}, which everybody knows: use one of your own, as "
                    "`openssl rand -hex 16` makes them"
                )
        return tokens

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, hosts: str) -> str:
        for host in _items(hosts):
            if host != ANY_HOST and not _HOST_NAME.fullmatch(host.lower()):
                raise ValueError(f"{host!r} is no host name: write it as in gpu-box.example.org, or * for any")
        return hosts

    @cached_property
    def token_list(self) -> tuple[str, ...]:
        """The tokens, one by one; none: everybody may read."""
        return _items(self.tokens)

    @property
    def allowed_host_list(self) -> tuple[str, ...]:
        """The names, in lower case."""
        return _items(self.allowed_hosts.lower())

    @property
    def proxy_list(self) -> tuple[str, ...]:
        """The trusted proxies, one by one."""
        return _items(self.trusted_proxies)


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())
