from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gblr_plugin as gblr


class Run:
    """A small network under a learner and AdamW, on fixed data."""

    def __init__(self, cooldown: int = 12, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))
        self.layers = gblr.prepare(self.model)
        self.optimizer = torch.optim.AdamW(gblr.param_groups(self.model, lr=1e-2))
        goals = {name: gblr.LayerGoal(budget=0.4, group=0) for name in self.layers}
        self.learner = gblr.StructureLearner(self.layers, goals, gblr.Schedule(2, cooldown), **options)
        self.learner.attach_all([self.optimizer])
        self.x, self.y = torch.randn(64, 16), torch.randint(4, (64,))
        self.step = 0

    def loss(self, model: Any = None, rows: Any = None) -> torch.Tensor:
        start = 8 * self.step % 64
        rows = slice(start, start + 8) if rows is None else rows
        return nn.functional.cross_entropy((model or self.model)(self.x[rows]), self.y[rows])

    def train(self, steps: int = 16, poisoned: tuple[int, ...] = (), closure: bool = False) -> None:
        """Optimizer steps; the loss of the poisoned ones is multiplied by NaN."""

        def backward() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = self.loss() * (float("nan") if self.step in poisoned else 1.0)
            self.learner.last_loss = loss.detach()
            loss.backward()
            return loss

        for _ in range(steps):
            if closure:
                self.optimizer.step(backward)
            else:
                backward()
                self.optimizer.step()
            self.step += 1


@pytest.fixture
def make_run() -> type[Run]:
    return Run


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.fixture
def state_of() -> Any:
    return states


class Server:
    """The process of crashing.py."""

    def __init__(self, *modules: str) -> None:
        package = str(Path(gblr.__file__).parents[1])
        path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("crashing.py")), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        while self.process.stdout.readline() not in ("ready\n", ""):
            pass
        assert self.process.poll() is None

    def run(self, job: str, folder: Path, kill_after: float | None = None, fault: str | None = None) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        request = {"job": job, "folder": str(folder), "kill_after": kill_after, "fault": fault}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def finish(self, job: str, folder: Path) -> float:
        answer = self.run(job, folder)
        assert answer["code"] == 0, folder.with_suffix(".log").read_text()
        return float(answer["seconds"])


COMMANDS = ("gblr_plugin.cli", "gblr_plugin.run.pipeline", "gblr_plugin.run.comparison", "gblr_plugin.plot")


@pytest.fixture(scope="session")
def server():
    """One for all: it takes seconds to import the hosts."""
    made = Server(
        "gblr_plugin.lightning",
        "transformers",
        "gblr_plugin.huggingface.compress_folder",
        "gblr_plugin.huggingface.folders",
        *COMMANDS,
    )
    yield made
    made.process.stdin.close()
    made.process.wait(timeout=30)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    """A GPT-2 of one small block in shards."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 60, "n_positions": 16}
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))
    folder = tmp_path_factory.mktemp("gpt2") / "dense"
    network.save_pretrained(folder, max_shard_size="30KB")
    return folder
