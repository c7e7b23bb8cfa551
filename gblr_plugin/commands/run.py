"""``gblr run``: train or load, compress, fine-tune, convert, report."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..utils.arguments import add_command, common_flags
from ..utils.console import captured_output
from .configs import add_config, locate, read
from .jobs import carry_out, output_of

if TYPE_CHECKING:
    from ..run.settings import RunSettings

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``gblr``."""
    parser = add_command(
        commands,
        "run",
        "train or load, compress, fine-tune, convert, report",
        _run,
        flags=common_flags(
            *("set", "dry_run", "fresh", "json", "verbose", "quiet"), output="default: outputs/ and the config's name"
        ),
        examples=(
            "gblr run configs/digits_vit.yaml",
            "gblr run configs/digits_vit.yaml --set seeds=[0] --set methods.0.cooldown=0.4 --output outputs/try",
            "gblr run configs/digits_vit.yaml --dry-run",
            "gblr run --help-config",
        ),
    )
    add_config(parser, _settings)
    trial = parser.add_argument_group("trials of a search")
    trial.add_argument("--trial", action="store_true", help="NNI's parameters in, its results out")
    trial.add_argument("--flops-price", type=float, default=0.0, metavar="P", help="what relative FLOPs of 1 cost")


def _settings() -> type[RunSettings]:
    from ..run.settings import RunSettings

    return RunSettings


def _run(arguments: argparse.Namespace) -> None:
    if arguments.trial:
        return _trial(arguments)
    if arguments.flops_price:
        raise ConfigError("--flops-price goes with --trial")
    settings = read(locate(arguments.config, arguments.set), _settings())

    def prepare() -> Any:
        from ..run.pipeline import prepare_run

        return prepare_run(settings)

    carry_out(
        arguments,
        prepare,
        output_of(arguments),
        lambda output: f"see it with: tensorboard --logdir {output / 'tensorboard'}",
    )


def _trial(arguments: argparse.Namespace) -> None:
    from ..run.search_space import overrides
    from ..run.yaml_config import parse_overrides

    located = locate(arguments.config, arguments.set)
    with captured_output(arguments.verbose):  # importing the hosts is noisy
        from ..run.trial import Trial, next_parameters

        parameters, output = next_parameters(arguments.output)
    parse_overrides(located, overrides(parameters, located.data))
    settings = read(located, _settings())
    carry_out(arguments, lambda: Trial(settings, parameters, arguments.flops_price), output)
