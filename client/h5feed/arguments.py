"""Command line parsers that suggest the nearest option if one is misspelt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .suggestions import did_you_mean


class CommandParser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that answers an unknown option with a suggestion and all options of the command.

    Descriptions and examples keep their line breaks.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)  # type: ignore[arg-type]

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        command = self
        for word in given:
            command = next(iter(command._commands_named(word)), command)
        # Before anything else: a required option may look missing because it is misspelt.
        for word in given:
            if word == "--":
                break
            name = word.partition("=")[0]
            if name.startswith("--") and not any(known.startswith(name) for known in command.option_names()):
                command.refuse(name)
        return super().parse_args(given, namespace)

    def option_names(self) -> list[str]:
        """The long options."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def refuse(self, name: str) -> NoReturn:
        known = self.option_names()
        said = did_you_mean(name, known, f"the options are {', '.join(known)}")
        self.error(f"unknown option {name}: {said}")

    def _commands_named(self, word: str) -> list[CommandParser]:
        groups = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return [group.choices[word] for group in groups if word in group.choices]
