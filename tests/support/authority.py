"""Certificates as an authority of one's own makes them, with the openssl program."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")


class Issued(NamedTuple):
    """Paths of a certificate and its key, PEM."""

    cert: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """Of a server that shows it."""
        made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        made.load_cert_chain(self.cert, self.key)
        return made


class Authority:
    """An authority in a folder of its own.

    Attributes
    ----------
    cert : Path
        Its certificate: what is to be trusted.
    """

    def __init__(self, folder: Path, name: str = "An authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.cert, self._key = folder / "ca.pem", folder / "ca.key"
        extensions = ("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
        _openssl(
            *("req", "-x509", *_KEY, "-nodes", "-days", "2", "-subj", f"/CN={name}", *extensions),
            *("-out", self.cert, "-keyout", self._key),
        )

    def issue(self, name: str, *, days: int = 2, password: str = "") -> Issued:
        """A certificate for a host or a client of that name; with negative `days`, one that has expired."""
        stem = f"{name}{days}{password}"
        made = Issued(self._folder / f"{stem}.pem", self._folder / f"{stem}.key")
        request, extensions = self._folder / f"{stem}.csr", self._folder / f"{stem}.ext"
        extensions.write_text(f"subjectAltName=DNS:{name}\nextendedKeyUsage=serverAuth,clientAuth\n")
        cipher = ("-passout", f"pass:{password}") if password else ("-nodes",)
        _openssl("req", "-new", *_KEY, *cipher, "-subj", f"/CN={name}", "-out", request, "-keyout", made.key)
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key, "-CAcreateserial"),
            *("-days", str(days), "-extfile", extensions, "-out", made.cert),
        )
        return made


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
