"""How long the GBLR tab's server takes to answer, over a log of random structures.

python integration/benchmarks/tensorboard_tab.py --layers 200 --snapshots 500
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tensorboard.backend import application
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

from gblr_plugin.matrix.structure import Intervals, StructuredMatrix
from gblr_plugin.tensorboard import write_structure
from gblr_plugin.tensorboard.plugin import GBLRPluginLoader


def random_matrix(size: int, components: int) -> StructuredMatrix:
    rows, cols = (Intervals(*torch.randint(0, size, (2, components)), size) for _ in range(2))
    return StructuredMatrix.from_factors(rows.support().float(), cols.support().float(), rows, cols)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--snapshots", type=int, default=500)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--size", type=int, default=256)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = {
        f"blocks.{i // 4}.{i % 4}": random_matrix(options.size, options.components) for i in range(options.layers)
    }
    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(str(Path(folder) / "run")) as writer:
            for step in range(options.snapshots):
                # No two records alike: the server keeps what it has decoded, by content.
                layers[f"blocks.0.{step % 4}"] = random_matrix(options.size, options.components)
                write_structure(writer, layers, step, budget=0.5, loss=1 / (step + 1))
        multiplexer = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance={"gblr": 0})
        multiplexer.AddRunsFromDirectory(folder)
        multiplexer.Reload()
        provider = data_provider.MultiplexerDataProvider(multiplexer, folder)
        plugin = GBLRPluginLoader().load(base_plugin.TBContext(data_provider=provider, logdir=folder))
        client = Client(application.TensorBoardWSGI([plugin], "", provider))
        name, middle = next(iter(layers)), options.snapshots // 2
        for route, query in (
            ("runs", {}),
            ("overview", {"run": "run", "step": middle}),
            ("time", {"run": "run"}),
            ("time", {"run": "run", "layer": name}),
            ("layer", {"run": "run", "layer": name, "step": middle}),
        ):
            seconds = []
            for _ in range(5):
                start = time.perf_counter()
                answer = client.get(f"/data/plugin/gblr/{route}", query_string=query)
                seconds.append(time.perf_counter() - start)
                assert answer.status_code == 200
            first, median = 1e3 * seconds[0], 1e3 * statistics.median(seconds)
            label = route + (" of a layer" if route == "time" and "layer" in query else "")
            print(f"{label:<16} first {first:6.0f} ms, median {median:6.0f} ms, {len(answer.get_data()) / 1e3:6.1f} kB")


if __name__ == "__main__":
    main()
