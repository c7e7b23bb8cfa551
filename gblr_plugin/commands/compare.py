"""``gblr compare``: many methods at equal multiply-adds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..utils.arguments import add_command, common_flags
from .configs import add_config, locate, read
from .jobs import carry_out, output_of

if TYPE_CHECKING:
    from ..run.comparison_settings import ComparisonSettings

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``gblr``."""
    parser = add_command(
        commands,
        "compare",
        "many methods at equal multiply-adds over several budgets; goes on where it stopped",
        _compare,
        flags=common_flags(
            *("set", "dry_run", "fresh", "json", "verbose", "quiet"), output="default: outputs/ and the config's name"
        ),
        examples=(
            "gblr compare configs/comparison_digits.yaml",
            "gblr compare configs/comparison_digits.yaml --set budgets=[0.5] --set seeds=[0] --dry-run",
        ),
    )
    add_config(parser, _settings)


def _settings() -> type[ComparisonSettings]:
    from ..run.comparison_settings import ComparisonSettings

    return ComparisonSettings


def _compare(arguments: argparse.Namespace) -> None:
    settings = read(locate(arguments.config, arguments.set), _settings())

    def prepare() -> Any:
        from ..run.comparison import Comparison

        return Comparison(settings)

    carry_out(arguments, prepare, output_of(arguments))
