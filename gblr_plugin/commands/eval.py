"""``gblr eval``: the quality of a pretrained model on a user's data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..utils.arguments import add_command, common_flags, positive
from ..utils.console import captured_output

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``gblr``."""
    parser = add_command(
        commands,
        "eval",
        "measure a pretrained model on held-out data, by itself or beside the dense one",
        _eval,
        flags=common_flags("json", "verbose"),
        examples=(
            "gblr eval path/to/compressed --eval held-out.txt",
            "gblr eval path/to/compressed --against path/to/model --eval held-out.txt --samples 200",
        ),
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, dense or compressed, or a name in the local cache")
    add("--eval", type=Path, required=True, metavar="DATA", help="a text file, JSON lines with a field text, or images")
    add("--against", metavar="DENSE", help="the dense model; needed but for models of language")
    add("--samples", type=positive, metavar="N", help="read of the data; default: 512 texts, 256 sequences or images")
    add("--length", type=positive, metavar="N", help="tokens of a sequence (default: 256), most tokens of a text (128)")
    add("--threads", type=positive, metavar="N", help="default: as torch chooses")


def _eval(arguments: argparse.Namespace) -> None:
    with captured_output(arguments.verbose):  # importing the hosts is noisy
        from ..compression.evaluation import evaluate_folder
        from ..utils.running import torch_threads

        with torch_threads(arguments.threads):
            found = evaluate_folder(
                arguments.model, arguments.eval, arguments.against, arguments.samples, arguments.length
            )
    print(found.to_json() if arguments.json else found)
