"""Parameters of joins: the datasets whose rows are parts of the same samples."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Self
from urllib.parse import quote, unquote

from h5feed.joins import join_parts
from pydantic import AfterValidator, BaseModel, Field, model_validator

MAX_JOINS = 16


class Join(NamedTuple):
    """One joined dataset.

    Attributes
    ----------
    dataset : str
    revision : str or None
        None: the current one.
    key, other_key : str or None
        Fields of this and of the other dataset with equal values. None: rows are joined by their numbers.
    """

    dataset: str
    revision: str | None = None
    key: str | None = None
    other_key: str | None = None

    @classmethod
    def parse(cls, text: str) -> Join:
        """Parse ``OTHER[@REVISION][:KEY[=OTHERKEY]]``; each part is percent-encoded.

        Raises
        ------
        ValueError
        """
        name, revision, keys = join_parts(text)
        by = [] if keys is None else keys.split("=", 1)
        parts = [name, *([] if revision is None else [revision]), *by]
        if not all(parts) or any(char in part for part in parts for char in ":@="):
            raise ValueError(
                f"{text[:200]!r} is no join: expected OTHER, OTHER:key or OTHER:key=otherkey, perhaps with @revision "
                "after OTHER. Percent-encode : @ = and % in names"
            )
        key, other_key = (unquote(by[0]), unquote(by[-1])) if by else (None, None)
        return cls(unquote(name), None if revision is None else unquote(revision), key, other_key)

    def __str__(self) -> str:
        text = quote(self.dataset, safe="")
        if self.revision is not None:
            text += f"@{quote(self.revision, safe='')}"
        if self.key is not None and self.other_key is not None:
            text += f":{quote(self.key, safe='')}"
            text += "" if self.key == self.other_key else f"={quote(self.other_key, safe='')}"
        return text


def _canonical(joins: tuple[str, ...]) -> tuple[str, ...]:
    parsed = [Join.parse(text) for text in joins]
    if len(parsed) > MAX_JOINS:
        raise ValueError(f"{len(parsed)} datasets are joined, more than the limit of {MAX_JOINS}")
    names = [join.dataset for join in parsed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is joined twice: the names of its fields would not be unique")
    return tuple(map(str, parsed))


class JoinsSpec(BaseModel):
    """Which other datasets are joined."""

    join: Annotated[
        tuple[str, ...],
        AfterValidator(_canonical),
        Field(
            description="Another dataset whose rows are parts of the same samples: `OTHER` by row number, `OTHER:key` "
            "by equal values of the field `key` of both (classes: by name), or `OTHER:key=otherkey`. Its fields are "
            "named `OTHER/field`. `OTHER@revision` answers 409 instead of other data. Repeat the parameter for several "
            "datasets.",
            json_schema_extra={"maxItems": MAX_JOINS},
        ),
    ] = ()
    how: Literal["inner"] | None = Field(
        None,
        description="`inner`: leave out rows without a partner in a joined dataset. Default: such rows are an error.",
    )

    @property
    def joins(self) -> tuple[Join, ...]:
        return tuple(map(Join.parse, self.join))

    @model_validator(mode="after")
    def _leaves_rows_out(self) -> Self:
        if self.how is not None and not any(join.key for join in self.joins):
            raise ValueError("how=inner needs join=OTHER:key: joined by number, every row has a partner")
        return self
