"""A note in the metadata of an object with the digest of its content, so that it has the revision of a local copy.

`h5feed-server build` writes the note with the object. Metadata may be copied to other bytes, so the note also has the
MD5 of the content. If the store's ETag is this MD5, it confirms that the note belongs to the object.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

KEY = "h5feed"
"""Name of the metadata: ``x-amz-meta-h5feed`` in S3. Other stores allow letters and digits only."""

_NOTE = re.compile(r"1 (\d{1,16}) ([0-9a-f]{128}) ([0-9a-f]{32}) (-|[0-9a-f]{32}-\d{1,5})")
"""Version, and the fields of `ContentNote` in order."""


@dataclass(frozen=True)
class ContentNote:
    """The content of an object.

    Attributes
    ----------
    size : int
        Bytes.
    digest : str
        `catalog.revision.content_digest` of all bytes, hexadecimal.
    md5 : str
        Of all bytes, hexadecimal: the ETag of an object that was written by one request.
    parts : str
        ETag of the object if it was written in the parts that the writer chose; empty if by one request.
    """

    size: int
    digest: str
    md5: str
    parts: str = ""

    @classmethod
    def parse(cls, text: str) -> ContentNote | None:
        """The note that metadata hold; None if it is not one that this version knows."""
        if (match := _NOTE.fullmatch(text)) is None:
            return None
        size, digest, md5, parts = match.groups()
        return cls(int(size), digest, md5, "" if parts == "-" else parts)

    def __str__(self) -> str:
        return f"1 {self.size} {self.digest} {self.md5} {self.parts or '-'}"

    def is_of(self, size: int, e_tag: str) -> bool:
        """Whether size and ETag confirm that the note belongs to this object."""
        return size == self.size and e_tag.strip('"') in (self.md5, self.parts or self.md5)


def e_tag_of_parts(md5s: Iterable[bytes]) -> str:
    """The ETag that S3 gives an object of parts with these MD5s."""
    listed = list(md5s)
    return f"{hashlib.md5(b''.join(listed), usedforsecurity=False).hexdigest()}-{len(listed)}"
