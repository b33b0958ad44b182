"""A dataset as a server describes it: its fields, and what batches of an order have of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast
from urllib.parse import unquote

from .crops import Crops, RowShape, crops_of
from .errors import BadParameter
from .fetching.cached import MadeOf
from .frames import Field, Frame
from .joins import join_parts
from .offsets import Offsets, has_masks, offsets_by_name, offsets_of, renamed
from .options import OrderOptions, field_names
from .plan import Plan, StoredImages, names_of, tail_of
from .ragged import OPTIONS, Layout, check_bucket, layout_of
from .samples import Samples
from .stored.packing import PACKING, Packing
from .tables import titled_table
from .wire import CROP, DATA, OFFSETS, ROWS

OF_OTHER = "/"
"""Between the names of a joined dataset and of its field: no name of either contains it."""

CROPPED = "rows are cropped by the server"
_NOT_BY_ID = "samples are made of several rows"
_JOINED = "samples are made of rows of several datasets"
"""See `Plan.not_by_id` and `Plan.not_here`."""


class Described(Samples):
    """The fields of a dataset, and of those joined to it.

    Parameters
    ----------
    info : dict
        The server's description.
    """

    fields: dict[str, Field]

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = info
        self.name: str = info["name"]
        self.rows: int = info["rows"]
        self.class_names: list[str] | None = info.get("class_names")
        self.fields = {
            field["name"]: Field(
                field["name"],
                field["role"],
                tuple(field["shape"]),
                field["dtype"],
                field["readable"],
                field["reason"],
                field["ragged"],
                tuple(field["class_names"]) if field.get("class_names") else None,
                field["sparse"]["index_dtype"] if field.get("sparse") else None,
            )
            for field in info["fields"]
        }
        self._joins: tuple[tuple[str, dict[str, Any]], ...] = ()
        self._how: str | None = None

    def __repr__(self) -> str:
        fields = ", ".join(f"{f.name}: {f.dtype}{list(f.shape)} ({f.role})" for f in self.fields.values())
        return f"<Dataset {self.name!r}, {self.rows} rows, {fields}, revision {self.revision}>"

    def _repr_html_(self) -> str:
        rows = [
            (field.name, field.role, field.dtype, list(field.shape), "ragged" if field.ragged else field.reason or "")
            for field in self.fields.values()
        ]
        classes = "" if self.class_names is None else f", {len(self.class_names):,} classes"
        title = f"Dataset {self.name!r}, {self.rows:,} rows{classes}, revision {self.revision}"
        return titled_table(title, ("field", "role", "dtype", "shape of a row", ""), rows)

    def __len__(self) -> int:
        """Number of rows."""
        return self.rows

    @property
    def shape(self) -> dict[str, tuple[int, ...]]:
        """Shape of each field with rows of equal shape, including the row axis."""
        return {field.name: (self.rows, *field.shape) for field in self.fields.values() if not field.ragged}

    @property
    def join_options(self) -> dict[str, Any]:
        """The options ``join``, with revisions, and ``how`` of the joined datasets; empty if there are none."""
        if not self._joins:
            return {}
        return {"join": [text for text, _ in self._joins]} | ({} if self._how is None else {"how": self._how})

    def crops(self, asked: Mapping[str, Any]) -> Crops | None:
        """Which fields of an order are cropped, and how; None if nothing is.

        Raises
        ------
        FieldNotFound, BadParameter
        """
        if asked.get("crop") is None:
            return None
        as_stored, known, stored = names_of(asked.get("encoded")), self._known(asked), renamed(asked)
        described = self._described()
        rows = {
            name: RowShape(
                known[name].shape, 0 if name in as_stored else described[stored.get(name, name)].get("spatial_axes", 0)
            )
            for name in self._chosen(asked)
            if name in known
        }
        return crops_of(asked, rows)

    def packed_fields(self, names: Iterable[str], options: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
        """Those of the fields that are packed by the CF conventions, and how: see `PackedInfo`."""
        described, stored = self._described(), renamed(options)
        ways = {name: described.get(stored.get(name, name), {}).get("cf") for name in names}
        return {name: packed for name, packed in ways.items() if packed}

    @property
    def _all_joins(self) -> dict[str, Any]:
        """The parameters of joins."""
        return {"join": tuple(text for text, _ in self._joins)} | ({} if self._how is None else {"how": self._how})

    def _origin_of(self, field: str) -> tuple[str, str]:
        """The joined dataset that a field is of, and its name there; "" if it is of this dataset."""
        for _, info in self._joins:
            if field.startswith(f"{info['name']}{OF_OTHER}"):
                return info["name"], field.removeprefix(f"{info['name']}{OF_OTHER}")
        return "", field

    def _described(self) -> dict[str, dict[str, Any]]:
        """The server's descriptions of all fields by name, also of joined datasets."""
        found = {field["name"]: field for field in self.info["fields"]}
        for _, info in self._joins:
            found |= {f"{info['name']}{OF_OTHER}{field['name']}": field for field in info["fields"]}
        return found

    def _unpacking(self, options: OrderOptions) -> dict[str, Packing]:
        """How to unpack the requested fields, with ``decode_cf``.

        Raises
        ------
        BadParameter
            The pieces of a field are packed in several ways, or its attributes have no meaning; or no field is packed.
        """
        if not options.get("decode_cf"):
            return {}
        found: dict[str, Packing] = {}
        for name, packed in self.packed_fields(self._chosen(options), options).items():
            problem = next((one["problem"] for one in packed if one.get("problem")), None)
            if problem is not None:
                raise BadParameter(
                    f"decode_cf: {name!r} cannot be unpacked: {problem}. Read it as it is stored, without decode_cf"
                )
            if len(packed) > 1:
                raise BadParameter(
                    f"decode_cf: the pieces of {name!r} are packed in {len(packed)} ways: let the server unpack them, "
                    'with apply = "scale" in h5feed.toml'
                )
            (one,) = packed
            found[name] = Packing(
                one["dtype"], one["scale_factor"], one["add_offset"], tuple(one["missing"]), one["unsigned"]
            )
        if not found:
            raise BadParameter(
                f"decode_cf: none of the fields {self._chosen(options)} of {self.name!r} has attributes that say how "
                f"to unpack it ({', '.join(PACKING)}), or the server unpacks it already: leave out decode_cf"
            )
        return found

    def _dense_bytes(self, frame: Frame) -> int:
        """Bytes of a row of all sparse fields as dense arrays."""
        return sum(columns * frame.tensors[name + DATA][0].itemsize for name, columns in frame.sparse.items())

    def _stored_images(self, asked: Mapping[str, Any]) -> dict[str, StoredImages]:
        """The requested fields that the server decodes from image files, and the client may decode instead."""
        if self._offsets(asked) or asked.get("crop") is not None:
            return {}
        as_stored, chosen = names_of(asked.get("encoded")), set(self._chosen(asked))
        return {
            name: StoredImages(
                field["decode"],
                field.get("image_libraries"),
                field.get("image_bytes"),
                self.rows * math.prod(self.fields[name].shape),
            )
            for field in self.info["fields"]
            if field.get("decode") and (name := field["name"]) in chosen and name not in as_stored
        }

    def _chosen(self, asked: Mapping[str, Any]) -> list[str]:
        """Names of the requested fields."""
        if asked.get("fields") is not None:
            return names_of(asked["fields"])
        of_roles = {*self.fields_of_role("input"), *self.fields_of_role("label")}
        # In the order of the server, which is that of all fields.
        found = [name for name in self.fields if name in of_roles]
        found = found or [field.name for field in self.fields.values() if field.readable and not field.ragged]
        return [*found, *renamed(asked)]

    def _frame(self, asked: Mapping[str, Any]) -> Frame:
        """The expected tensors of a response. Unknown fields are left to the server to reject."""
        known = self._known(asked)
        fields = [known[name] for name in self._chosen(asked) if name in known]
        crops = self.crops(asked)
        if crops is not None:
            fields = [replace(field, shape=crops.shape(field.name, field.shape)) for field in fields]
        return Frame.of(
            self.rows,
            fields,
            names_of(asked.get("encoded")),
            weighted=tail_of(asked) == "pad",
            offsets=self._offsets(asked),
            masked=has_masks(asked),
            cropped_axes=0 if crops is None else len(crops.lengths),
            packed=asked.get("pack") is not None,
        )

    def _frame_of_rows(self, plan: Plan) -> Frame:
        """The tensors of single rows of this dataset, of which the samples of a plan are made."""
        stored = renamed(plan.asked)
        own = dict.fromkeys(stored.get(name, name) for name in fields_of(plan))
        return self._frame({"fields": list(own), "encoded": plan.params.get("encoded")})

    def _known(self, asked: Mapping[str, Any]) -> dict[str, Field]:
        """All fields that batches may have, by the names that they have there."""
        known = dict(self.fields)
        for name, field in renamed(asked).items():
            if field in known:
                known.setdefault(name, replace(known[field], name=name))
        return known

    def _offsets(self, asked: Mapping[str, Any]) -> dict[str, Offsets]:
        """Offsets of the requested fields whose rows are not the samples' own, by name."""
        return offsets_by_name(asked, self._chosen(asked))

    def _made_of(self, plan: Plan) -> dict[str, MadeOf]:
        """What the fields of samples are made of, but for sparse ones.

        Raises
        ------
        BadParameter
            A row is too long to be fetched as a whole, the server does not tell the rows of a joined dataset, or rows
            are received both decoded and as files.
        """
        names = fields_of(plan)
        asked = {**plan.asked, "fields": names}
        known, stored, offsets, crops = self._known(asked), renamed(asked), self._offsets(asked), self.crops(asked)
        by_key = [info["name"] for text, info in self._joins if join_parts(text).keys is not None]
        found: dict[str, MadeOf] = {}
        for name in names:
            if name in plan.frame.sparse:
                continue
            is_list = name in plan.frame.flat and name not in plan.decoding
            is_cropped = crops is not None and name in crops.fields
            origin, field = self._origin_of(stored.get(name, name))
            if offsets.get(name, 0) != 0 and origin in by_key:
                raise BadParameter(
                    f"cache= cannot be used here: {origin!r} is joined by key, and {name!r} is taken at other rows "
                    "than the sample's own, whose partners the server does not tell. Leave out cache=, or give this "
                    "field the offset 0"
                )
            found[name] = MadeOf(
                origin,
                field,
                None if is_list else known[name].shape,
                offsets.get(name, 0),
                crops.lengths if crops is not None and is_cropped else None,
            )
            is_both = [one for one, made in found.items() if made.is_other_form_of(found[name])]
            if is_both:
                raise BadParameter(
                    f"cache= cannot be used here: {is_both[0]!r} and {name!r} are rows of the same field, once decoded "
                    "and once as files. Leave out cache= or encoded="
                )
            row_bytes = math.prod(known[name].shape) * plan.frame.tensors[name][0].itemsize
            if is_cropped and row_bytes > plan.max_bytes:
                raise BadParameter(
                    f"cache= keeps whole rows, of which parts are cropped, but a row of {name!r} has {row_bytes:,} "
                    f"bytes, and a response may have {plan.max_bytes:,}: leave out cache=, or start the server with a "
                    "larger H5FEED_MAX_BODY_BYTES"
                )
        return found

    def _not_by_id(self, asked: Mapping[str, Any]) -> str:
        """See `Plan.not_by_id`."""
        if asked.get("crop") is not None:
            return CROPPED
        if self._offsets(asked) or renamed(asked):
            return _NOT_BY_ID
        return _JOINED if self._joins else ""

    def _laid_out(self, options: OrderOptions) -> tuple[OrderOptions, Layout | None]:
        """Options for the server, and how to pad or pack here what it sends.

        Raises
        ------
        BadParameter, FieldNotFound, UnsupportedField
        """
        fields = None if options.get("fields") is None else names_of(options.get("fields"))
        layout = layout_of(self.fields, fields, options)
        check_bucket(layout, {name: one for name, one in self.fields.items() if not self._origin_of(name)[0]}, options)
        asked: dict[str, Any] = {name: value for name, value in options.items() if name not in OPTIONS}
        if layout is not None:
            asked |= layout.params
            if fields is None:
                others = [] if layout.pack is not None else self._chosen(options)
                asked["fields"] = list(dict.fromkeys([*others, *layout.fields]))
        elif self._joins and fields is None:
            asked["fields"] = self._chosen(options)
        return cast(OrderOptions, asked), layout


def check_joins_are_used(joins: Iterable[str], how: str | None, options: Mapping[str, Any]) -> None:
    """Check that a model gets fields of each dataset that a loop joins: by default, the inputs of all of them.

    In batches without a loop, a join has an effect without them: rows that have no partner are an error.

    Raises
    ------
    BadParameter
        A join has no effect.
    """
    chosen = field_names(options.get("x"))
    if how is not None or not chosen:
        return
    chosen += field_names(options.get("y"))
    chosen += [options[one] for one in ("sample_weight", "bucket_by", "pack_by") if options.get(one) is not None]
    # Offsets decide which samples there are, also those of fields that a model does not get.
    taken = {} if options.get("offsets") is None else offsets_of(options["offsets"])
    names = list(dict.fromkeys([*chosen, *(own.field for own in taken.values())]))
    for text in joins:
        other = unquote(join_parts(text).dataset)
        if not any(name.startswith(f"{other}{OF_OTHER}") for name in names):
            raise BadParameter(
                f"join={text!r} has no effect: none of the fields {', '.join(map(repr, names))} is of {other!r}. Name "
                f"one, such as {f'{other}{OF_OTHER}…'!r}, or leave out the join"
            )


def fields_of(plan: Plan) -> list[str]:
    """Names of the fields of samples, without what comes with them."""
    beside = {CROP, ROWS + OFFSETS} | plan.frame.masks
    return [name for name in plan.frame.fields if name not in beside]


def without_crops(plan: Plan) -> Plan:
    """The plan for fields that are neither cached nor cropped.

    Raises
    ------
    BadParameter
    """
    if CROP not in plan.frame.tensors:
        return plan
    if plan.params.get("crop_at") == "grid" and plan.frame.sparse:
        raise BadParameter(
            f"cache= keeps no sparse rows, as of {next(iter(plan.frame.sparse))!r}, and a grid of crops needs them for "
            "each cell: leave out this field, or cache="
        )
    params = {name: value for name, value in plan.params.items() if name not in ("crop", "crop_fields", "crop_at")}
    tensors = {name: kind for name, kind in plan.frame.tensors.items() if name != CROP}
    return replace(plan, params=params, frame=replace(plan.frame, tensors=tensors))
