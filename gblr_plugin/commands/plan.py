"""``gblr plan``: what a run, or a compression, would do to a network: counted, before data or weights are read."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import ConfigError
from ..utils.arguments import add_command, common_flags, positive
from ..utils.console import captured_output
from .configs import locate, read

__all__ = ["add_parser"]

_OF_MODELS = ("budget", "layers", "exclude", "length")


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``gblr``."""
    parser = add_command(
        commands,
        "plan",
        "count what would be compressed, and say what would stay dense and why",
        _plan,
        flags=common_flags("set", "json"),
        examples=(
            "gblr plan configs/vit_base.yaml",
            "gblr plan configs/digits_vit.yaml --set budget=0.5",
            "gblr plan path/to/model --budget 0.5 --exclude '*.0.*'",
        ),
    )
    parser.add_argument("what", metavar="CONFIG|MODEL", help="a YAML file of gblr run, or the folder of a model")
    add = parser.add_argument_group("of a model").add_argument
    add("--budget", type=float, help="relative FLOPs of the layers, in (0, 1]; default: 0.5")
    add("--layers", nargs="+", metavar="PATTERN", help="default: all that can gain")
    add("--exclude", nargs="+", metavar="PATTERN", help="layers that stay dense")
    add("--length", type=positive, metavar="N", help="tokens of the text that is counted")


def _plan(arguments: argparse.Namespace) -> None:
    given = {name: getattr(arguments, name) for name in _OF_MODELS if getattr(arguments, name) is not None}
    if arguments.what.endswith((".yaml", ".yml")):
        if given:
            raise ConfigError(f"plan: --{next(iter(given))} is for a model; a config has its own, see --set")
        counted = _of_config(arguments)
    else:
        if arguments.set:
            raise ConfigError("plan: --set is for a config")
        counted = _of_model(arguments.what, **given)
    print(counted.to_json() if arguments.json else counted)


def _of_config(arguments: argparse.Namespace) -> Any:
    from ..run.settings import RunSettings

    settings = read(locate(arguments.what, arguments.set), RunSettings)
    with captured_output():  # importing the hosts is noisy
        from ..run.counting import count_config

        return count_config(settings)


def _of_model(model: str, **options: Any) -> Any:
    from ..utils.validation import check_share

    budget = options.pop("budget", 0.5)
    check_share("--budget", budget, "relative FLOPs")
    include = options.pop("layers", None)
    with captured_output():  # so is transformers
        from ..compression.planning import plan_folder

        return plan_folder(model, budget, include, **options)
