"""``gblr export``: a file of a model for another runtime."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import ConfigError, GBLRError
from ..utils.arguments import add_command, common_flags, positive
from ..utils.console import captured_output

__all__ = ["add_parser"]

_SUFFIXES = {".onnx": "onnx", ".pt2": "program"}


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of ``gblr``."""
    parser = add_command(
        commands,
        "export",
        "write a model as an ONNX file, a program of torch.export, or a package of AOTInductor",
        _export,
        flags=common_flags("json", "verbose", output="the file: .onnx, or .pt2", required=True),
        examples=(
            "gblr export path/to/compressed --output model.onnx --dynamic",
            "gblr export outputs/digits_vit --output model.pt2",
            "gblr export path/to/compressed --to aoti --length 128 --output model.pt2",
        ),
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder of transformers, compressed or dense, or the output of gblr run")
    add("--to", choices=("onnx", "program", "aoti"), help="default: by the file's name; aoti compiles for this machine")
    add("--batch", type=positive, default=1, metavar="N", help="inputs at once (default: 1)")
    add("--dynamic", action="store_true", help="any number of inputs at once, from 2 on")
    add("--length", type=positive, metavar="N", help="tokens of a text")


def _export(arguments: argparse.Namespace) -> None:
    kind = arguments.to or _SUFFIXES.get(arguments.output.suffix)
    if kind is None:
        raise ConfigError(f"--output: {str(arguments.output)!r} must end in {' or '.join(_SUFFIXES)}")
    batch = max(arguments.batch, 2) if arguments.dynamic else arguments.batch
    with captured_output(arguments.verbose):  # exporters and compilers are noisy
        from ..exporting.files import export_file
        from .networks import opened

        model, inputs = opened(arguments.model, batch, arguments.length)
        try:
            apart = export_file(model, inputs, arguments.output, kind, dynamic=arguments.dynamic)
        except OSError as error:
            raise GBLRError(f"export: cannot write {str(arguments.output)!r}: {error.strerror or error}") from error
    values = {
        "file": str(arguments.output),
        "format": kind,
        "bytes": arguments.output.stat().st_size,
        "inputs": [list(tensor.shape) for tensor in inputs],
        "difference": apart,
    }
    checked = "was not run: onnxruntime is not installed" if apart is None else f"within {apart:.1e} of the model's"
    if arguments.json:
        print(json.dumps(values, indent=2))
    else:
        print(f"{arguments.output}: {values['bytes'] / 2**20:.1f} MiB, outputs {checked}")
