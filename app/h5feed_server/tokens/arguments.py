"""Command-line arguments of ``h5feed-server token``, in a module that loads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_EXAMPLES = """examples:
  export H5FEED_TOKEN_FILE=/etc/h5feed/tokens
  h5feed-server token create alice                           all datasets, until it is revoked
  h5feed-server token create ci --datasets 'mnist*' --datasets cifar10 --expires 30d
  h5feed-server token list
  h5feed-server token revoke ci
  h5feed-server serve ./data --host 0.0.0.0 --token-file /etc/h5feed/tokens
  h5feed-server token show                                   the token that the server has created itself
"""

_CREATE_EXAMPLES = """examples:
  h5feed-server token create alice --token-file tokens
  h5feed-server token create ci --token-file tokens --datasets 'mnist*' --expires 30d
  h5feed-server token create guest --token-file tokens --datasets 'mnist*' --datasets cifar10 --expires 2027-01-31
  (umask 077; h5feed-server token create bob --token-file tokens > bobs-token)
                      a file that only you can read, for $H5FEED_TOKEN_FILE of Bob's client
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
        help="create, list and revoke tokens of a token file; show the token that the server has created",
        description="Manages the tokens of a token file. Servers that were started with --token-file read it again\n"
        "when it changes. It holds digests of the tokens, not the tokens.",
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
        "Creates a token and prints it. It is shown only now. The file is created if it does not exist,\n"
        "readable by you only.",
    )
    create.add_argument("name", metavar="NAME", help="who or what uses it: letters, digits and . _ @ -")
    create.add_argument(
        "--datasets",
        metavar="PATTERN",
        action="append",
        help="names of the datasets that it opens, with * ? [] as in a shell, quoted; can be repeated (default: all)",
    )
    create.add_argument(
        "--expires",
        metavar="WHEN",
        help="after how long, such as 12h, 30d or 8w, or on which day, such as 2027-01-31 (default: never)",
    )
    listing = add("list", "list the tokens of a token file, not the secrets", _LIST_EXAMPLES)
    revoke = add("revoke", "remove a token from a token file", _REVOKE_EXAMPLES)
    revoke.add_argument("name", metavar="NAME", help="as `token list` shows it")
    for command in (create, listing, revoke):
        command.add_argument("--token-file", metavar="FILE", type=Path, help="default $H5FEED_TOKEN_FILE")
    show = add(
        "show",
        "print the token that the server has created",
        _SHOW_EXAMPLES,
        "Prints the token that the server creates if other machines can reach it and it has no tokens.",
    )
    show.add_argument("--cache-dir", type=Path, help="the server's (default $H5FEED_CACHE_DIR, else ~/.cache/h5feed)")
