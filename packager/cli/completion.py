"""What makes a shell complete the command, written by shtab from the parser itself."""

from __future__ import annotations

import argparse

from packager.errors import require_extra

SHELLS = ("bash", "zsh", "tcsh")
_PATHS = {"bundle", "calibration", "map", "model", "output", "path", "profile", "text"}


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script for one of SHELLS. MissingExtraError where shtab is not installed."""
    require_extra("completion", ["shtab"], "completion")
    import shtab

    _complete_files(parser, shtab.FILE)
    return str(shtab.complete(parser, shell))


def _complete_files(parser: argparse.ArgumentParser, how: dict[str, str]) -> None:
    """Mark what takes a path, be it among other things."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _complete_files(verb, how)
        elif action.dest in _PATHS:
            action.complete = how  # type: ignore[attr-defined]
