"""Settings: ``H5FEED_*`` environment variables; the command line's flags override them."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "h5feed"


class Settings(BaseSettings):
    """What the server needs to know; passed in, never global."""

    model_config = SettingsConfigDict(env_prefix="H5FEED_", frozen=True, extra="ignore")

    data_dir: Path = Field(Path("data"), description="Folder of HDF5 files; only ever read.")
    cache_dir: Path = Field(default_factory=_default_cache_dir, description="Layouts, digests, splits; safe to delete.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port; 0 takes a free one and prints it.")
    uds: str | None = Field(None, description="Path of a Unix socket to listen on instead.")
    workers: int = Field(1, ge=1, le=64, description="Processes.")
    public: bool = Field(False, description="Serve another address than loopback without tokens.")
    tokens: str = Field("", description="Comma-separated bearer tokens; any of them opens everything.")

    digest_limit: int = Field(8 << 30, ge=0, description="Bytes of a file hashed in full for its revision.")
    max_body_bytes: int = Field(256 << 20, ge=1 << 16, description="Bytes of one batch or row answer at most.")
    max_rows: int = Field(1_000_000, ge=1, description="Rows of one batch or row request at most.")
    inflight_bytes: int = Field(256 << 20, ge=1 << 20, description="Bytes of bodies being filled or sent, per worker.")
    cache_bytes: int = Field(64 << 20, ge=0, description="Bytes of small fields kept decoded in memory, per worker.")
    chunk_cache_bytes: int = Field(128 << 20, ge=0, description="Bytes of decoded chunks kept in memory, per worker.")
    order_cache_bytes: int = Field(128 << 20, ge=0, description="Bytes of split rows and orders kept, per worker.")
    disk_cache_bytes: int = Field(4 << 30, ge=0, description="Bytes of the cache folder.")
    open_files: int = Field(128, ge=1, description="Descriptors of HDF5 files held open, per worker.")
    request_threads: int = Field(16, ge=1, description="Requests read at the same time, per worker.")
    readers: int = Field(2, ge=1, le=64, description="Processes that read what only h5py can, per worker, if needed.")
    inspect_timeout: float = Field(30.0, gt=0, description="Seconds that inspecting one file may take.")
    read_timeout: float = Field(60.0, gt=0, description="Seconds that answering one request may take.")
    max_job_bytes: int = Field(1 << 40, ge=1 << 20, description="Bytes that one job may read; more is 413.")
    job_patience: float = Field(600.0, gt=0, description="Seconds that a job goes on when nobody asks for it.")
    admit_timeout: float = Field(5.0, ge=0, description="Seconds that a request waits for room before 503.")

    @property
    def token_list(self) -> tuple[str, ...]:
        """The tokens, one by one; none: everybody may read."""
        return tuple(token.strip() for token in self.tokens.split(",") if token.strip())
