"""The table of estimators for a person: --list-estimators, --fetch, and what is said of licences at the start of a run."""

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from extract.estimators.checkpoints import Published, fetch
from extract.estimators.table import ROWS, SETS, EstimatorRow, EstimatorSet


def show() -> None:
    """Prints the table and the sets."""
    console = Console(highlight=False, soft_wrap=False)
    for chosen in SETS.values():
        rows = ", ".join(f"{intrinsic}: {name}" for intrinsic, name in chosen.rows.items())
        console.print(Padding(Text.assemble(("set ", "dim"), (chosen.name, "bold"), f"   {rows}"), (0, 0, 0, 0)))
    console.print()
    for row in ROWS.values():
        licence = (row.licence, "green" if row.free else "yellow")
        console.print(Text.assemble((row.name, "bold"), f"   {', '.join(row.yields)}   ", licence))
        console.print(Padding(Text(_about(row)), (0, 0, 0, 4)))
    console.print(
        "\nA row can be used alone (--estimators ROW), or mixed with others in a .toml: docs/estimators.md. "
        "Weights come with: python -m extract --fetch --estimators SET"
    )


def _about(row: EstimatorRow) -> str:
    """What a row is, where its weights are published, and how it is run."""
    place = [f"{_published(row.weights)}: {', '.join(row.files)}"] if isinstance(row.weights, Published) else []
    size = [f"{row.params_m:g} M parameters"] if row.params_m else []
    memory = [f"about {row.image_mb} MB an image"] if row.image_mb else []
    how = ", ".join([*([row.resolution] if row.resolution else []), f"batches of up to {row.batch}", *size, *memory])
    return "\n".join([row.what, *place, how])


def _published(weights: Published) -> str:
    """Where weights are published; whether fetching them again may bring others."""
    return str(weights) if weights.pinned else f"{weights} (branch {weights.revision}, not pinned)"


def rows_of(chosen: EstimatorSet) -> list[EstimatorRow]:
    """The rows of a set, each once."""
    return list({chosen.rows[name]: chosen.row(name) for name in chosen.rows}.values())


def fetch_all(chosen: EstimatorSet) -> None:
    """Brings the weights of a set onto this machine, and says where they lie. Raises UserError if one cannot be had."""
    for row in rows_of(chosen):
        if row.weights is None:
            print(f"{row.name}: has no weights")
            continue
        folder = fetch(row.weights, row.files, row.name)
        print(f"{row.name}: {folder}" + ("" if row.free else f"   (licence: {row.licence})"))


def notes(chosen: EstimatorSet, demo: bool) -> list[str]:
    """What is to be said before a run. demo: whether it is over the demo world."""
    restricted = [f"the licence of {row.name} is {row.licence}" for row in rows_of(chosen) if not row.free]
    return ([chosen.note] if chosen.note and not demo else []) + restricted
