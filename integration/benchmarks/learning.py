"""What a learned structure gains over the one it starts from and over rivals, at equal multiply-adds and steps.

Run it with ``python integration/benchmarks/learning.py RESULTS.jsonl``. It trains every arm of ``learning.yaml`` that
RESULTS does not hold, and appends one line a training. ``--only`` chooses tasks, starts, arms, budgets or seeds.
``--table`` prints means and paired differences in place of training.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

import gblr_plugin as gblr
from gblr_plugin.calibration.batches import Calibration
from gblr_plugin.learning.optimizers import split_structure_group
from gblr_plugin.plot.style import ACCENT, HAIR, INK, MUTED, plain_axes
from gblr_plugin.surgery.conversion import prepare
from gblr_plugin.tasks.digits import DigitsTask
from gblr_plugin.tasks.text import TextTask
from gblr_plugin.utils.rates import WarmupCosine

TASKS: dict[str, Any] = {"byte_gpt": TextTask, "digits_vit": DigitsTask}
FIGURE = {"byte_gpt": "perplexity", "digits_vit": "accuracy"}
RISE = 10  # steps in which learning rates rise again after a network was changed


def loss_of(network: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of a batch."""
    x, target = batch
    return F.cross_entropy(network(x).flatten(0, -2), target.flatten())


@torch.no_grad()
def figures(network: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
    """Loss, perplexity and accuracy in percent on held-out data."""
    network.eval()
    loss, right, count = 0.0, 0, 0
    for x, target in loader:
        logits = network(x).flatten(0, -2)
        loss += float(F.cross_entropy(logits, target.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == target.flatten()).sum())
        count += target.numel()
    return {"loss": loss / count, "perplexity": math.exp(loss / count), "accuracy": 100 * right / count}


class Training:
    """AdamW under linear warm-up and cosine decay, over a fixed number of steps.

    Args:
        network: Trained in place.
        data: The task's data.
        setting: Its ``epochs`` and ``lr``.
        weight_decay: Of all parameters.
    """

    def __init__(self, network: nn.Module, data: Any, setting: dict[str, float], weight_decay: float) -> None:
        self.network, self.lr, self.weight_decay = network, setting["lr"], weight_decay
        self._loader = data.train_dataloader()
        self.steps = int(setting["epochs"] * len(self._loader))
        self.step = 0
        self._schedule = WarmupCosine(self.steps, 0.05)
        self._batches = self._forever()
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=self.lr, weight_decay=weight_decay)

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from self._loader

    def changed(self, factors: list[nn.Parameter], pace: float) -> None:
        """Go on with a changed network, whose factors learn at ``pace`` times the rate of the other parameters."""
        kept, ids = self.optimizer.state, {id(factor) for factor in factors}
        rest = [parameter for parameter in self.network.parameters() if id(parameter) not in ids]
        groups = [{"params": rest}, {"params": factors, "lr": pace * self.lr}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)
        self.optimizer.state.update({parameter: kept[parameter] for parameter in rest if parameter in kept})
        self._changed_at = self.step

    _changed_at = -RISE

    def run(self, until: float) -> None:
        """Train until a share of all steps is done."""
        self.network.train()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        while self.step < round(until * self.steps):
            factor = self._schedule(self.step) * min(1.0, (self.step - self._changed_at + 1) / RISE)
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.zero_grad()
            loss_of(self.network, next(self._batches)).backward()
            self.optimizer.step()
            self.step += 1
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def calibration(data: Any) -> Calibration:
    """Eight training batches."""
    batches = iter(data.train_dataloader())
    return Calibration([tuple(next(batches)) for _ in range(8)], loss_of)


def project(training: Training, data: Any, layers: list[str], budget: float, arm: dict[str, Any]) -> None:
    """Put a fixed structure in place of the dense weights."""
    allocation = arm.get("allocation", "sensitivity")
    made = prepare(
        training.network,
        layers,
        family=arm["family"],
        budget=budget,
        calibration=calibration(data),
        allocation=allocation,
    )
    inside = [parameter for layer in made.values() for name, parameter in layer.named_parameters() if name != "bias"]
    training.changed(inside, arm.get("pace", 1))


def learn(network: nn.Module, data: Any, task: dict[str, Any], setting: Any, budget: float, arm: dict[str, Any]) -> Any:
    """Train GBLR layers whose structure is learned."""
    at_budget = arm["initialiser"] == "gblr"
    settings = gblr.LayerSettings(arm["initialiser"], budget=budget if at_budget else None)
    options: dict[str, Any] = {"calibration": calibration(data), "allocation": "sensitivity"} if at_budget else {}
    layers = prepare(network, task["layers"], settings=settings, **options)
    training = Training(network, data, setting, task["weight_decay"])
    split_structure_group(
        training.optimizer,
        [parameter for layer in layers.values() for parameter in (layer.widths, layer.locations)],
        lr=arm.get("structure_lr", 1.0) * training.lr,
    )
    schedule = gblr.Schedule(
        round(arm.get("warmup", 0.02) * training.steps), max(round(arm.get("cooldown", 0.6) * training.steps), 1)
    )
    goals = {name: gblr.LayerGoal(budget, group="all") for name in layers}
    learner = gblr.StructureLearner(layers, goals, schedule, pace=arm["pace"])
    learner.attach_all([training.optimizer])
    training.run(1.0)
    learner.detach()
    return learner


def one(task: dict[str, Any], job: Any, dense: Callable[[int], nn.Module], cell: dict[str, Any], arm: Any) -> Any:
    """One training; what a line of the results says of it."""
    seed, start, budget = cell["seed"], cell["start"], cell["budget"]
    torch.manual_seed(seed)
    data = job.data(seed, task["batch_size"])
    network = job.network()
    if start == "dense":
        network.load_state_dict(dense(seed).state_dict())
    torch.manual_seed(1000 + seed)
    setting, begun = task["trainings"][start], time.monotonic()
    if "initialiser" in arm:
        learn(network, data, task, setting, budget, arm)
    else:
        training = Training(network, data, setting, task["weight_decay"])
        training.run(arm.get("after", 0.0))
        if "family" in arm:
            project(training, data, task["layers"], budget, arm)
        training.run(1.0)
    network.eval()
    structured = [layer for layer in network.modules() if hasattr(layer, "relative_flops")]
    size = sum(math.prod(layer.matrix_shape) for layer in structured)
    spent = sum(layer.relative_flops * math.prod(layer.matrix_shape) for layer in structured) / size if size else 1.0
    return {**cell, **figures(network, data.val_dataloader()), "spent": spent, "seconds": time.monotonic() - begun}


def dense_networks(name: str, task: dict[str, Any], job: Any, folder: Path) -> Callable[[int], nn.Module]:
    """Trained dense networks by seed, kept in a folder."""

    def trained(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        data, network = job.data(seed, task["batch_size"]), job.network()
        file = folder / f"{name}-{seed}.pt"
        if file.exists():
            network.load_state_dict(torch.load(file))
            return network
        Training(network, data, task["dense"], task["weight_decay"]).run(1.0)
        torch.save(network.state_dict(), file)
        return network

    return trained


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY=VALUE,VALUE")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--against", default="gblr, frozen", metavar="ARM", help="what the table compares with")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the table's first part in place of training")
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    only = {key: values.split("|") for key, values in (text.split("=", 1) for text in arguments.only)}
    lines = arguments.results.read_text(encoding="utf-8").splitlines() if arguments.results.exists() else []
    rows = [json.loads(line) for line in lines]
    if arguments.table:
        print(table(rows, arguments.against))
        return
    if arguments.figure:
        draw(rows, arguments.against, arguments.figure)
        return
    torch.set_num_threads(1)
    keys = ("task", "start", "budget", "arm", "seed")
    done = {tuple(row[key] for key in keys) for row in rows}
    folder = arguments.results.parent / f".{arguments.results.stem}"
    folder.mkdir(exist_ok=True)
    for name, task in config["tasks"].items():
        job = TASKS[name](**task["network"])
        dense = dense_networks(name, task, job, folder)
        for values in [
            dict(zip(keys, (name, start, budget, arm, seed), strict=True))
            for budget in config["budgets"]
            for start in task["trainings"]
            for seed in config["seeds"]
            for arm in config["arms"]
        ]:
            wanted = all(str(values[key]) in allowed for key, allowed in only.items())
            if wanted and tuple(values.values()) not in done:
                arm = dict(config["arms"][values["arm"]])
                if isinstance(arm.get("pace"), dict):
                    arm["pace"] = arm["pace"][values["start"].split(",")[0]]
                row = one(task, job, dense, values, arm)
                with arguments.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


def paired(cells: list[dict[str, Any]], reference: str) -> dict[str, tuple[list[float], list[float]]]:
    """By arm its figures, and their differences to the reference seed by seed (percent where it is perplexity)."""
    figure = FIGURE[cells[0]["task"]]
    found: dict[str, dict[int, float]] = {}
    for row in cells:
        found.setdefault(row["arm"], {})[row["seed"]] = row[figure]
    base, percent, result = found.get(reference, {}), figure == "perplexity", {}
    for arm, values in found.items():
        pairs = [(values[seed], base[seed]) for seed in sorted(values) if seed in base]
        gaps = [100 * (a / b - 1) if percent else a - b for a, b in pairs]
        result[arm] = list(values.values()), gaps
    return result


def error_of(gaps: list[float]) -> float:
    """Standard error of a mean."""
    return statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else math.nan


def draw(rows: list[dict[str, Any]], reference: str, path: Path) -> None:
    """Every seed's difference to the reference as a dot, and their mean with its standard error, for each arm."""
    first = rows[0]
    cells = [row for row in rows if all(row[key] == first[key] for key in ("task", "start", "budget"))]
    arms = paired(cells, reference)
    order = sorted((arm for arm in arms if arms[arm][1]), key=lambda arm: -statistics.mean(arms[arm][1]))
    figure = Figure(figsize=(7, 0.38 * len(order) + 1), dpi=160, layout="constrained")
    axes = plain_axes(figure)
    axes.axvline(0, color=HAIR, linewidth=1)
    for y, arm in enumerate(order):
        gaps = arms[arm][1]
        mean, color = statistics.mean(gaps), ACCENT if arm.startswith("gblr") else MUTED
        axes.plot(gaps, [y] * len(gaps), "o", color=color, alpha=0.35, markersize=4, markeredgewidth=0)
        if len(gaps) > 1 and arm != reference:
            axes.errorbar(mean, y, xerr=error_of(gaps), color=color, marker="|", markersize=10, capsize=2)
    axes.set_yticks(range(len(order)), order, fontsize=8.5, color=INK)
    unit = "perplexity, %" if FIGURE[first["task"]] == "perplexity" else "accuracy, points"
    axes.set_xlabel(f"difference to {reference!r} on the same seed ({unit})", fontsize=8, color=MUTED)
    figure.savefig(path)


def table(rows: list[dict[str, Any]], reference: str) -> str:
    """Means of every arm and its paired difference to the reference (percent of perplexity), with standard errors."""
    out = []
    for task, start, budget in sorted({(row["task"], row["start"], row["budget"]) for row in rows}):
        cells = [row for row in rows if (row["task"], row["start"], row["budget"]) == (task, start, budget)]
        out += ["", f"{task}, from {start}, {budget:.1%}", "", f"| arm | mean | against {reference} | seeds |"]
        out += ["|---|---|---|---|"]
        unit = " %" if FIGURE[task] == "perplexity" else ""
        for arm, (values, gaps) in paired(cells, reference).items():
            shown = f"{statistics.mean(gaps):+.2f} ± {error_of(gaps):.2f}{unit}" if gaps else ""
            out.append(f"| {arm} | {statistics.mean(values):.3f} | {shown} | {len(values)} |")
    return "\n".join(out).strip()


if __name__ == "__main__":
    main()
