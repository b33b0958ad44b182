"""Signing in: a form takes one of the server's tokens, and a cookie that no script can read stands for it.

The cookie is no token: it is derived from one, opens only what GET and HEAD ask for, and is sent by pages of this
server alone (SameSite=Strict).
"""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

from fastapi import Request
from fastapi.responses import RedirectResponse, Response
from h5feed.errors import BadParameter, TooLarge, Unauthorized
from starlette.requests import ClientDisconnect

from ...tokens.keyring import Keyring
from ..auth import SIGN_IN, SIGN_OUT, access_of, expiry_of, own_cookies_of, session_cookie, session_cookies_of
from ..forwarded import here, public_origin
from .web import Page, answer, pages

router = pages()

_MAX_FORM_BYTES = 8192


@router.get(SIGN_IN)
async def sign_in_form(request: Request) -> Response:
    """The form; it says so if the one who comes was signed in, and may not any more."""
    data = {"next": _local(request.query_params.get("next", here("/")))}
    expired = access_of(request.scope, _keyring(request)).expired
    if expired is not None:
        data["detail"] = expiry_of(expired)
    return answer(request, Page("sign_in.html", "Sign in", data))


@router.post(SIGN_IN)
async def sign_in(request: Request) -> Response:
    """Check the token, and set the cookie."""
    form = parse_qs(await _body(request), keep_blank_values=True)
    text, following = form.get("token", [""])[0].strip(), _local(form.get("next", [here("/")])[0])
    keyring = _keyring(request)
    token = keyring.by_token(text.encode()) if text else None
    if token is None or token.has_expired() or not _is_own(request):
        detail = "wrong token" if text else "enter a token"
        if token is not None and token.has_expired():
            detail = expiry_of(token)
        return answer(request, Page("sign_in.html", "Sign in", {"next": following, "detail": detail}), 401)
    redirect = RedirectResponse(following, 303, {"cache-control": "no-store"})
    name, value = session_cookie(token, text)
    # Whoever was signed in with another token before is not any more: the new one says what is seen.
    for other in own_cookies_of(request.scope, keyring):
        if other != name:
            redirect.delete_cookie(other, path=here("/"), httponly=True, samesite="strict", secure=_is_secure(request))
    redirect.set_cookie(name, value, httponly=True, samesite="strict", secure=_is_secure(request), path=here("/"))
    return redirect


@router.post(SIGN_OUT)
async def sign_out(request: Request) -> Response:
    """Forget the cookie."""
    if not _is_own(request):
        raise Unauthorized("the request comes from a page of another server: sign out on a page of this one")
    redirect = RedirectResponse(here(SIGN_IN), 303, {"cache-control": "no-store"})
    for name in session_cookies_of(request.scope):
        redirect.delete_cookie(name, path=here("/"), httponly=True, samesite="strict", secure=_is_secure(request))
    return redirect


def _keyring(request: Request) -> Keyring:
    keyring: Keyring = request.app.state.keyring
    return keyring


async def _body(request: Request) -> str:
    data = b""
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > _MAX_FORM_BYTES:
                raise TooLarge(f"the form has more than {_MAX_FORM_BYTES} bytes")
    except ClientDisconnect:
        # An answer for nobody.
        raise BadParameter("the form did not arrive in time") from None
    return data.decode("utf-8", "replace")


def _is_own(request: Request) -> bool:
    """Whether a page of this server sent the form, as far as the browser tells."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    # Browsers send it by TLS and from this machine only.
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == public_origin(request)[1]


def _is_secure(request: Request) -> bool:
    """Whether the browser speaks TLS, with this server or with a proxy before it."""
    return public_origin(request)[0] == "https"


def _local(path: str) -> str:
    """A path on this server; its first page where it leads elsewhere."""
    parts = urlsplit(path.replace("\\", "/"))
    is_ours = path.startswith("/") and not path.replace("\\", "/").startswith("//")
    return path if is_ours and not parts.netloc and path.isprintable() else here("/")
