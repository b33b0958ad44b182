"""What all pages share: templates, security headers, links, error pages, and each page as JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import numpy as np
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from h5feed.errors import BadParameter, FeedError, Overloaded
from h5feed.suggestions import did_you_mean
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ValidationError

from ... import __version__
from ...catalog.dataset import Dataset
from ...catalog.inspections import NotYet
from ...jobs.registry import InProgress, JobState
from ...services import Services
from ..auth import session_cookies_of
from ..dependencies import attempted, job_result
from ..forwarded import here
from ..jobs import accepted
from ..problems import STATUS, bad_parameters, problem, shown_detail, validation_sentence
from ..redaction import without_secrets, without_tokens
from .snippets import Snippet

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

JOB_SECONDS = 1.0
"""How long a page waits for a job before it shows how far that is."""

REFRESH_SECONDS = 2
"""How often a page that waits for a job is loaded again."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "same-origin",
    "cache-control": "no-cache, private",
    "vary": "cookie",
}

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that nobody sees, or that turn the direction of what follows."""

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def link(*parts: object, **query: object) -> str:
    """A path of this server, below its prefix, from its parts, each quoted whole; None and empty texts of the query are
    left out.
    """
    path = here("/") + "/".join(quote(str(part), safe="") for part in parts)
    items: list[tuple[str, str]] = []
    for name, value in query.items():
        values: Sequence[object] = value if isinstance(value, (list, tuple)) else [value]
        items += [(name.rstrip("_"), str(one)) for one in values if one is not None and one != ""]
    return f"{path}?{urlencode(items)}" if items else path


def number(value: object) -> str:
    """A number for people: thousands set apart, floats with four significant digits."""
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}"
    if isinstance(value, (float, np.floating)):
        plain = float(value)
        if math.isfinite(plain) and plain == int(plain) and abs(plain) < 1e6:
            return f"{int(plain):,}"
        return f"{plain:.4g}"
    return str(value)


def exact(value: object) -> str:
    """A number for people, with as many digits as tell a float32 from others."""
    if isinstance(value, (float, np.floating)) and math.isfinite(value):
        plain = f"{float(value):.7g}"
        return plain if "e" in plain else f"{float(plain):,.10g}"
    return number(value)


def counted(count: int, what: str, several: str | None = None) -> str:
    """A number of things: ``1 row``, ``1,797 rows``; `several` is a plural that is not formed with an s."""
    return f"{count:,} {what if count == 1 else several or what + 's'}"


def ordinal(value: int) -> str:
    """``1st``, ``2nd``, ``11th`` …"""
    ending = "th" if value % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(value % 10, "th")
    return f"{value:,}{ending}"


def share(value: float) -> str:
    """A share as per cent."""
    return "0%" if not value else f"{100 * value:.1f}%" if value >= 0.001 else "< 0.1%"


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    scale = min(len(_UNITS) - 1, int(math.log10(max(1, nbytes)) // 3))
    scaled = nbytes / 1000**scale
    return f"{scaled:.0f} {_UNITS[scale]}" if scale == 0 or scaled >= 100 else f"{scaled:.1f} {_UNITS[scale]}"


def printable(value: object) -> object:
    """Text without characters that nobody sees; anything else, and what is markup, as it is."""
    return _CONTROLS.sub("\ufffd", value) if type(value) is str else value


_templates = Environment(
    loader=PackageLoader(__package__),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=printable,
)
_templates.filters |= {"number": number, "counted": counted, "ordinal": ordinal, "share": share, "size": size}
_templates.globals |= {"link": link, "version": __version__}


@dataclass(frozen=True)
class Tab:
    """One of the pages about a dataset."""

    name: str
    url: str


def tabs_of(dataset: str) -> list[Tab]:
    """The pages about a dataset."""
    return [
        Tab("Overview", link("datasets", dataset)),
        Tab("Rows", link("datasets", dataset, "rows")),
        Tab("Splits", link("datasets", dataset, "splits")),
        Tab("Tree", link("datasets", dataset, "tree")),
    ]


@dataclass(frozen=True)
class Page:
    """What is on a page.

    Attributes
    ----------
    template : str
    title : str
    data : dict
        What the page says, and its JSON: no more and no less.
    view : dict
        How it is drawn: charts, links, choices of forms.
    dataset : str or None
        That the page is about.
    tab : str
        Which of the dataset's pages it is.
    snippets : sequence of Snippet
        The same from a program.
    reload : int or None
        Seconds after which it is loaded again.
    """

    template: str
    title: str
    data: dict[str, Any]
    view: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    tab: str = ""
    snippets: Sequence[Snippet] = ()
    reload: int | None = None


def answer(request: Request, page: Page, status: int = 200) -> Response:
    """The page as HTML, or as JSON with ``?format=json``."""
    if wants_json(request):
        said = JSONResponse(plain(page.data)).body
        return Response(_shown(request, bytes(said).decode()), status, _HEADERS, "application/json")
    content = _templates.get_template(page.template).render(
        page=page,
        tabs=[] if page.dataset is None else tabs_of(page.dataset),
        data=page.data,
        view=page.view,
        json_url=_with_json(request),
        can_sign_out=bool(session_cookies_of(request.scope)),
    )
    return HTMLResponse(_shown(request, content).encode("utf-8", "replace"), status, _HEADERS)


def _shown(request: Request, text: str) -> str:
    """A page without the token that somebody may have put where it does not belong."""
    # Pages repeat nothing but what is in the URL or in a form, and are long.
    url = f"{request.url.path}?{request.url.query}"
    return without_tokens(text) if request.method == "POST" or without_tokens(url) != url else text


def wants_json(request: Request) -> bool:
    return request.query_params.get("format") == "json"


def _with_json(request: Request) -> str:
    items = [(name, value) for name, value in request.query_params.multi_items() if name != "format"]
    return without_secrets("?" + urlencode([*items, ("format", "json")]))


def plain(value: Any) -> Any:
    """As JSON has it: arrays as lists, NaN and infinities as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


class PageRoute(APIRoute):
    """A route whose errors, and whose waiting for a job, are pages as well."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        models = [parameter.field_info.annotation for parameter in self.dependant.query_params]
        names = {"query": [name for model in models for name in getattr(model, "model_fields", ())]}

        async def handle_page(request: Request) -> Response:
            try:
                return await handle(request)
            except InProgress as progress:
                return waiting(request, progress.state)
            except RequestValidationError as error:
                return failure(request, bad_parameters(error, names))
            except NotYet as late:
                return failure(request, late.problem)
            except FeedError as error:
                return failure(request, error)

        return handle_page


def pages() -> APIRouter:
    """A router of pages, which the OpenAPI description leaves out."""
    return APIRouter(route_class=PageRoute, include_in_schema=False)


def failure(request: Request, error: FeedError) -> Response:
    """An error, as a page that names the bad value and what would be right."""
    if wants_json(request):
        return problem(error)
    status = STATUS[type(error)]
    data = {"status": status, "code": error.code, "detail": shown_detail(error)}
    reload = REFRESH_SECONDS if error.retry_after is not None else None
    title = "Not found" if status == HTTPStatus.NOT_FOUND else "This page cannot be shown"
    return answer(request, Page("error.html", title, data, reload=reload), status)


def waiting(request: Request, state: JobState, dataset: str | None = None) -> Response:
    """202: how far a job is; the page is loaded again until it is done."""
    if wants_json(request):
        return accepted(state)
    data = {
        "job": state.id,
        "status": state.status,
        "done": state.done,
        "total": state.total,
        "unit": state.unit,
        "code": state.code,
        "detail": state.detail,
    }
    reload = None if state.status == "failed" else REFRESH_SECONDS
    page = Page("waiting.html", "Computing …", data, dataset=dataset or state.dataset or None, reload=reload)
    return answer(request, page, 202)


def parsed(model: type[M], request: Request, **more: str) -> M:
    """The query as a model. Empty values, as forms send them for what is not filled in, count as left out.

    Raises
    ------
    BadParameter
    """
    many = {"where", "open"} & model.model_fields.keys()
    given: dict[str, Any] = dict(more)
    for name, value in request.query_params.multi_items():
        if name == "format" or not value.strip():
            continue
        if name in many:
            given.setdefault(name, []).append(value)
        elif name not in model.model_fields:
            raise BadParameter(f"there is no parameter {name!r}: {did_you_mean(name, model.model_fields)}")
        else:
            given[name] = value
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise BadParameter("; ".join(validation_sentence(item) for item in error.errors()[:5])) from None


async def soon(services: Services, work: Callable[[], T]) -> T:
    """What `work` finds, where the job that it needs is over in a moment.

    Raises
    ------
    InProgress
        It takes longer: the page says how far it is.
    """
    for _ in range(2):
        try:
            return await attempted(services, work)
        except InProgress as progress:
            state = await job_result(services, progress.state, JOB_SECONDS)
            if not state.is_over:
                raise InProgress(state) from None
    raise Overloaded("the result was computed but could not be stored; try again in a moment", retry_after=1)


def about(dataset: Dataset) -> dict[str, Any]:
    """What every page about a dataset says of it."""
    return {"dataset": dataset.name, "revision": dataset.revision, "rows": dataset.rows}
