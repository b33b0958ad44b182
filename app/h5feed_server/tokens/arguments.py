"""Command-line arguments of ``h5feed-server token``, in a module that imports little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_EXAMPLES = """examples:
  export H5FEED_TOKEN_FILE=/etc/h5feed/tokens
  h5feed-server token create alice                           for all datasets, until you revoke it
  h5feed-server token create ci --datasets 'mnist*' --datasets cifar10 --expires 30d
  h5feed-server token list
  h5feed-server token revoke ci
  h5feed-server serve ./data --host 0.0.0.0 --token-file /etc/h5feed/tokens
  h5feed-server token show                                   the token that the server created itself
"""

_CREATE_EXAMPLES = """examples:
  h5feed-server token create alice --token-file tokens
  h5feed-server token create ci --token-file tokens --datasets 'mnist*' --expires 30d
  h5feed-server token create guest --token-file tokens --datasets 'mnist*' --datasets cifar10 --expires 2027-01-31
  (umask 077; h5feed-server token create bob --token-file tokens > bobs-token)
                      writes the token to a file that only you can read, for H5FEED_TOKEN_FILE of Bob's client
"""

_LIST_EXAMPLES = """examples:
  h5feed-server token list --token-file tokens
"""

_REVOKE_EXAMPLES = """examples:
  h5feed-server token revoke alice --token-file tokens
"""

_SHOW_EXAMPLES = """examples:
  h5feed-server token show
  h5feed-server token show --cache-dir /var/cache/h5feed
  docker compose exec h5feed h5feed-server token show
"""


def add_token(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "token",
        help="create, list and revoke tokens; show the token that the server created",
        description="Manages the tokens in a token file, which contains only their digests. Servers that use the file\n"
        "read it again when it changes.",
        epilog=_EXAMPLES,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, about: str, examples: str, description: str | None = None) -> Any:
        return actions.add_parser(
            name, help=about, description=description or f"{about[:1].upper()}{about[1:]}.", epilog=examples
        )

    create = add(
        "create",
        "create a token and print it",
        _CREATE_EXAMPLES,
        "Creates a token and prints it. The token is not shown again. If the file does not exist, it is\n"
        "created, readable only by you.",
    )
    create.add_argument(
        "name", metavar="NAME", help="name of the person or program that uses the token: letters, digits and . _ @ -"
    )
    create.add_argument(
        "--datasets",
        metavar="PATTERN",
        action="append",
        help="limit the token to datasets whose names match this quoted pattern, with * ? [] as in a shell; can be "
        "repeated (default: all datasets)",
    )
    create.add_argument(
        "--expires",
        metavar="WHEN",
        help="when the token expires: a time span such as 12h, 30d or 8w, or the end (UTC) of a day such as "
        "2027-01-31 (default: never)",
    )
    listing = add("list", "list the tokens in a token file, without the secrets", _LIST_EXAMPLES)
    revoke = add("revoke", "remove a token from a token file", _REVOKE_EXAMPLES)
    revoke.add_argument("name", metavar="NAME", help="name of the token, see `token list`")
    for command in (create, listing, revoke):
        command.add_argument("--token-file", metavar="FILE", type=Path, help="token file (default $H5FEED_TOKEN_FILE)")
    show = add(
        "show",
        "print the token that the server created",
        _SHOW_EXAMPLES,
        "Prints the token that the server creates if it serves other machines and no tokens are set.",
    )
    show.add_argument(
        "--cache-dir", type=Path, help="cache folder of the server (default $H5FEED_CACHE_DIR, else ~/.cache/h5feed)"
    )
