"""One way to run a command line: errors become sentences, tracebacks only appear with --debug."""

import os
import sys
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
    try:
        app()
    except UserError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
