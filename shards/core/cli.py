"""One way to run a command line: errors become sentences, tracebacks only appear with --debug."""

import os
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from shards.core.errors import UserError

DEBUG_VARIABLE = "ILDM_DEBUG"


def _set_debug(value: bool) -> None:
    if value:
        os.environ[DEBUG_VARIABLE] = "1"


DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the full traceback of an error.", callback=_set_debug, show_default=False)
]


def printable(text: str, *, lines: bool = False) -> str:
    """Foreign text (keys, captions, reasons, names) as a terminal may get it: without control characters, escape sequences,
    marks that turn the direction of writing, and halves of surrogate pairs.

    lines: line breaks stay.
    """
    return "".join(letter if letter.isprintable() or (lines and letter == "\n") else " " for letter in text)


def _lenient_output() -> None:
    """A terminal of another encoding shows what it has not as \\xff, and ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def new_app(help_text: str) -> typer.Typer:
    """A typer application with the settings that all our command lines share."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )


def run(app: typer.Typer) -> None:
    """Runs `app` on sys.argv and exits: 0 done, 1 could not finish, 2 wrong usage, 3 too many failures, 130 interrupted."""
    _lenient_output()
    try:
        app()
    except UserError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"error: {printable(str(error), lines=True)}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
