"""Options that several commands take, said once."""

from typing import Annotated

import typer

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout; messages go to stderr.")
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="FOLDER",
        help="Where searches, token shards and tracking live. Default: $THRIFTLM_STORAGE, else "
        "~/thriftlm.",
    ),
]
