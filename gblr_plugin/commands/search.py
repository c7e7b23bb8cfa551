"""``gblr search``: NNI's tuners over runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..utils.arguments import add_command, common_flags
from .configs import add_config, locate, read
from .jobs import carry_out, output_of

if TYPE_CHECKING:
    from ..run.search_settings import SearchSettings

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``gblr``."""
    parser = add_command(
        commands,
        "search",
        "vary a run by NNI's tuners; a Pareto table and figure of the trials",
        _search,
        flags=common_flags(
            *("set", "dry_run", "fresh", "json", "verbose", "quiet"), output="default: outputs/ and the config's name"
        ),
        examples=("gblr search configs/search_digits.yaml --set trials=10", "gblr search --help-config"),
    )
    add_config(parser, _settings)


def _settings() -> type[SearchSettings]:
    from ..run.search_settings import SearchSettings

    return SearchSettings


def _search(arguments: argparse.Namespace) -> None:
    from ..run.search_settings import refuse_plain_experiment

    located = locate(arguments.config, arguments.set)
    refuse_plain_experiment(located)
    read(located, _settings())

    def prepare() -> Any:
        from ..run.search import Search

        return Search(located)

    carry_out(arguments, prepare, output_of(arguments), lambda output: f"the front is drawn in {output / 'search.png'}")
