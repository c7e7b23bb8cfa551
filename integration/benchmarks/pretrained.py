"""What becomes of pretrained networks: quality and speed of every method under one treatment, beside dense int8.

Run it with ``python integration/benchmarks/pretrained.py RESULTS.jsonl MODEL CALIBRATION HELD_OUT``. MODEL is a folder
of transformers, CALIBRATION and HELD_OUT are text files as ``gblr compress`` takes them. It runs every method that
RESULTS does not hold, on one thread, and appends one line for each. ``--only`` chooses methods, budgets or draws.
``--table`` prints means over the draws in place of that.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gblr_plugin as gblr
from gblr_plugin.compression.inputs import DataReader, kind_of
from gblr_plugin.compression.quality import measure_quality
from gblr_plugin.compression.speed import measure_speed
from gblr_plugin.huggingface.pretrained import load_dense

BUDGETS = {"encoder": (0.5, 0.25), "decoder": (0.8, 0.6, 0.5)}
DRAWS = (0, 1, 2)
FAMILIES = ("gblr", "low_rank", "blast", "block_sparse", "alds")
# Method: what gblr.compress is told. Closed form alone, refined block by block, and the network distilled after that.
METHODS: dict[str, dict[str, Any]] = {
    **{f"{family}, closed form": {"family": family, "refine": 0} for family in FAMILIES},
    **{family: {"family": family} for family in FAMILIES},
    "gblr, int8 factors": {"factor_dtype": "int8"},
    "gblr, recovered": {"recover": 600},
    "gblr, recovered, int8 factors": {"recover": 600, "factor_dtype": "int8"},
}
INT8 = "dense int8"
KEYS = ("model", "method", "budget", "draw")


def quantized(model: nn.Module) -> nn.Module:
    """The dense model with torch's dynamic int8 quantization of its linear layers."""
    found: nn.Module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return found


def one(
    dense: Any, folder: Path, texts: tuple[Path, Path], cell: dict[str, Any], samples: int | None
) -> dict[str, Any]:
    """Compress a copy of the model by one method; what a line of the results says of it."""
    kind, longest = kind_of(dense), getattr(dense.config, "max_position_embeddings", None)
    held_out = DataReader(folder, kind, longest, 256 if kind == "encoder" else 64).read(texts[1], "HELD_OUT")
    stages: dict[str, float] = {}
    if cell["method"] == INT8:
        model = quantized(dense)
    else:
        model = copy.deepcopy(dense)
        batches = DataReader(folder, kind, longest, samples).read(texts[0], "CALIBRATION", cell["draw"])
        report = gblr.compress(model, cell["budget"], batches, seed=cell["draw"], **METHODS[cell["method"]])
        stages = {stage.name: round(stage.seconds, 1) for stage in report.stages}
    quality = measure_quality(kind, dense, model, held_out)
    speed = measure_speed(kind, dense, model, held_out)
    return {
        **cell,
        "metric": quality.metric,
        "before": quality.before,
        "after": quality.after,
        "speedup": speed.speedup,
        "seconds": stages,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the draws, with the smallest and the largest."""
    out: list[str] = []
    for model, budget in sorted({(row["model"], row["budget"]) for row in rows}):
        cells = [row for row in rows if (row["model"], row["budget"]) == (model, budget)]
        counts = list(cells[0]["speedup"])
        out += ["", f"{model} at {budget:.0%}", ""]
        out += [
            "| method | " + cells[0]["metric"] + " | range | " + " | ".join(f"speed at {n}" for n in counts) + " | s |"
        ]
        out += ["|---" * (4 + len(counts)) + "|"]
        for method in dict.fromkeys(row["method"] for row in cells):
            some = [row for row in cells if row["method"] == method]
            after = [row["after"] for row in some]
            speeds = [f"{statistics.median(row['speedup'][count] for row in some):.2f}x" for count in counts]
            seconds = statistics.median(sum(row["seconds"].values()) for row in some)
            shown = f"{min(after):.4g} to {max(after):.4g}" if len(after) > 1 else "one draw"
            out.append(f"| {method} | {statistics.mean(after):.4g} | {shown} | {' | '.join(speeds)} | {seconds:.0f} |")
    return "\n".join(out).strip()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("calibration", type=Path, nargs="?")
    parser.add_argument("held_out", type=Path, nargs="?")
    parser.add_argument("--name", help="of the model in the results; default: its folder's")
    parser.add_argument("--samples", type=int, help="of calibration; default: as gblr compress")
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY=VALUE|VALUE")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    lines = arguments.results.read_text(encoding="utf-8").splitlines() if arguments.results.exists() else []
    rows = [json.loads(line) for line in lines]
    if arguments.table:
        print(table(rows))
        return
    if arguments.held_out is None:
        parser.error("MODEL, CALIBRATION and HELD_OUT are needed")
    torch.set_num_threads(1)
    only = {key: values.split("|") for key, values in (text.split("=", 1) for text in arguments.only)}
    done = {tuple(row[key] for key in KEYS) for row in rows}
    dense = load_dense(arguments.model, "benchmark")
    name = arguments.name or arguments.model.name
    for draw in DRAWS:
        for budget in (1.0, *BUDGETS[kind_of(dense)]):
            for method in METHODS if budget < 1 else (INT8,):
                cell = dict(zip(KEYS, (name, method, budget, draw), strict=True))
                if tuple(cell.values()) in done or any(str(cell[key]) not in allowed for key, allowed in only.items()):
                    continue
                texts = arguments.calibration, arguments.held_out
                row = one(dense, arguments.model, texts, cell, arguments.samples)
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
