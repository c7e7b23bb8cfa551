"""What each part of calibration and allocation gains, layer-wise and end to end, one-shot and after fine-tuning.

    python integration/benchmarks/calibration.py digits [gpt] [--budgets 0.25 0.5] [--seeds 0 1 2] [--epochs 2]
        [--parts svd trapezoid ...] [--rules uniform weight ...] [--cache FOLDER]
    python integration/benchmarks/calibration.py sentences --model FOLDER [--budgets 0.25 0.5]

``digits`` and ``gpt`` train small networks of this package's tasks. ``sentences`` takes a folder with a BERT sentence
transformer (``model.safetensors``, ``config.json`` or MiniLM-L6 sizes, ``tokenizer.json``) and embeds docstrings of
installed packages; its figure is the mean cosine to the dense network's embeddings. Needs transformers, tokenizers and
safetensors for that. All products are decomposed within min(m, n) components, unaligned.

Columns: mean relative output error of the layers over held-out inputs of the dense network (own biases included),
figure one-shot, figure after fine-tuning, seconds of compression.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gblr_plugin.calibration.allocation import RULES, allocate
from gblr_plugin.calibration.batches import Calibration
from gblr_plugin.calibration.inputs import evaluating, fitting_mask
from gblr_plugin.calibration.moments import Moments
from gblr_plugin.calibration.sequential import fit_layers
from gblr_plugin.decomposition import decompose
from gblr_plugin.layers.dense import replace_modules, structured_like
from gblr_plugin.matrix.metric import Metric
from gblr_plugin.matrix.structure import StructuredMatrix

Found = dict[str, tuple[StructuredMatrix, Tensor | None]]


@dataclass
class Case:
    """A trained network with what it takes to calibrate, judge and fine-tune it."""

    model: nn.Module
    layers: dict[str, nn.Module]
    calibration: Calibration
    figure: Callable[[nn.Module], float]
    held_out: list[Any]
    row_splits: dict[str, int] = field(default_factory=dict)
    tune: Callable[[nn.Module, int], None] | None = None


# -- networks ----------------------------------------------------------------------------------------------------------


def trained_case(name: str, seed: int, cache: Path | None, batches: int) -> Case:
    """The task's network at the size of the committed configuration, trained or from the cache."""
    from gblr_plugin.run.measure import evaluate
    from gblr_plugin.tasks.digits import DigitsTask
    from gblr_plugin.tasks.text import TextTask

    task: Any
    if name == "digits":
        task = DigitsTask(patch_size=2, dim=32, depth=2, heads=4, mlp_ratio=2, dropout=0.1)
        epochs, rate, tune_rate = 60, 3e-3, 2e-3
    else:
        task = TextTask(train_bytes=300_000, test_bytes=100_000, context=64, dim=96, depth=3, heads=4, mlp_ratio=4)
        epochs, rate, tune_rate = 5, 3e-3, 1e-3
    torch.manual_seed(seed)
    model = task.network()
    data = task.data(seed, 64)

    def fit(net: nn.Module, epochs: int, rate: float) -> None:
        torch.manual_seed(1000 + seed)
        loader = data.train_dataloader()
        steps = epochs * len(loader)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
        net.train()
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(net(x).flatten(0, -2), y.flatten()).backward()
                optimizer.step()
                schedule.step()
        net.eval()

    stored = None if cache is None else cache / f"{name}{seed}.pt"
    if stored is not None and stored.exists():
        model.load_state_dict(torch.load(stored, weights_only=True))
    else:
        fit(model, epochs, rate)
        if stored is not None:
            stored.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), stored)
    loader = data.train_dataloader()
    kept = [batch for _, batch in zip(range(batches), loader, strict=False)]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks")}
    if name == "gpt":  # as in the paper's GPT-2, the attention's output projection stays dense
        layers = {n: m for n, m in layers.items() if not n.endswith("proj")}
    return Case(
        model.eval(),
        layers,
        Calibration(kept, lambda net, batch: F.cross_entropy(net(batch[0]).flatten(0, -2), batch[1].flatten())),
        lambda net: evaluate(net, data.test_dataloader(), task.metric)[task.metric],
        list(data.test_dataloader())[:4],
        {n: 3 for n in layers if n.endswith("qkv")},
        lambda net, epochs: fit(net, epochs, tune_rate),
    )


def sentence_case(folder: Path, batches: int) -> Case:
    """A BERT sentence transformer on docstrings of installed packages."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / "model.safetensors").items()}
    model.load_state_dict({k: v for k, v in state.items() if "position_ids" not in k and "pooler" not in k})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))[::7]:
        found = re.findall(r'"""(.{80,600}?)"""', path.read_text(encoding="utf-8", errors="ignore"), re.S)
        texts += [" ".join(text.split()) for text in found[:4]]
        if len(texts) > 900:
            break
    encoded = tokenizer.encode_batch(texts[:900])
    ids = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])

    def embed(net: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        hidden = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        valid = batch["attention_mask"][..., None]
        return F.normalize((hidden * valid).sum(1) / valid.sum(1), dim=1)

    def part(begin: int, end: int) -> dict[str, Tensor]:
        return {"input_ids": ids[begin:end], "attention_mask": mask[begin:end]}

    def forward(net: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        # Gradients along random directions of the embedding: their second moment is the Gauss-Newton matrix.
        y = embed(net, batch)
        return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))).sum()

    test = [part(640, 900)]
    with torch.no_grad():
        wanted = embed(model, test[0])

    @torch.no_grad()
    def figure(net: nn.Module) -> float:
        return float((embed(net, test[0]) * wanted).sum(1).mean())

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("encoder")}
    return Case(
        model, layers, Calibration([part(k, k + 64) for k in range(0, 64 * batches, 64)], forward), figure, test
    )


# -- parts -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def moments_of(case: Case, batches: list[Any], *, masked: bool) -> dict[str, Moments]:
    """Moments of the inputs of each layer in the dense network."""
    moments: dict[str, Moments] = {}
    valid: Tensor | None = None

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            held = moments.setdefault(name, Moments(args[0].shape[-1]))
            held.add(args[0], mask=fitting_mask(valid, args[0]))

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in case.layers.items()]
    with evaluating(case.model):
        for batch in batches:
            valid = case.calibration.valid(batch) if masked else None
            case.calibration.forward(case.model, batch)
    for handle in handles:
        handle.remove()
    return moments


def compress(case: Case, part: str, budgets: Mapping[str, float]) -> Found:
    """One row of the table: each part adds to the one before."""
    method = "svd" if "svd" in part else "gblr" if part == "pursuit" else "trapezoid"

    def fit(name: str, target: Tensor, metric: Metric | Tensor | None) -> StructuredMatrix:
        return decompose(
            target, budgets[name], method=method, calibration=metric, row_splits=case.row_splits.get(name, 1)
        )

    if part in ("svd", "whitened svd", "trapezoid", "padding out"):
        moments = (
            moments_of(case, list(case.calibration.batches), masked=part == "padding out") if part != "svd" else {}
        )
        return {
            name: (
                fit(name, module.weight.detach(), moments[name].second(centred=False)[1] if moments else None),
                module.bias.detach(),  # type: ignore[operator]  # a tensor
            )
            for name, module in case.layers.items()
        }
    calibration = replace(case.calibration, sequential=part != "bias", loss=part in ("loss", "pursuit"))
    return fit_layers(case.model, case.layers, calibration, lambda n, w, h: fit(n, w, h).to(torch.float32))


def layer_error(case: Case, found: Found, moments: Mapping[str, Moments]) -> float:
    """Mean over layers of the relative error of the output, biases included, over held-out inputs."""
    errors = []
    for name, (matrix, bias) in found.items():
        weight, own = case.layers[name].weight.double(), case.layers[name].bias.double()  # type: ignore[operator,union-attr]
        change = weight - matrix.to_dense().double()
        mean = moments[name].mean[0]
        _, covariance = moments[name].second()
        offset = change @ mean + own - (own if bias is None else bias.double())
        lost = ((change @ covariance) * change).sum() + offset.square().sum()
        errors.append(float((lost / ((weight @ covariance) * weight).sum()).sqrt().detach()))
    return sum(errors) / len(errors)


def installed(case: Case, found: Found) -> nn.Module:
    """A copy of the network with structured layers in place; their factors train, their structure does not."""
    model = copy.deepcopy(case.model)
    swaps: dict[int, nn.Module] = {}
    for name, (matrix, bias) in found.items():
        old: Any = model.get_submodule(name)
        if bias is not None:
            old.bias.data.copy_(bias)
        layer = structured_like(old, matrix)
        layer.freeze_structure()
        swaps[id(old)] = layer
    replace_modules(model, swaps)
    return model


def measure(case: Case, label: str, part: str, budgets: Mapping[str, float], epochs: int, seconds: float = 0.0) -> None:
    """Compress, judge, fine-tune, judge; one line."""
    start = time.perf_counter()
    found = compress(case, part, budgets)
    seconds += time.perf_counter() - start
    error = layer_error(case, found, moments_of(case, case.held_out, masked=True))
    model = installed(case, found)
    spent = sum(matrix.stored for matrix, _ in found.values())
    dense = sum(math.prod(matrix.shape) for matrix, _ in found.values())
    once = case.figure(model)
    tuned = math.nan
    if case.tune is not None and epochs:
        case.tune(model, epochs)
        tuned = case.figure(model)
    print(f"{label:34} {spent / dense:6.4f} {error:7.4f} {once:9.4f} {tuned:9.4f} {seconds:7.1f}", flush=True)


PARTS = ("svd", "whitened svd", "trapezoid", "padding out", "bias", "sequential", "loss", "pursuit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=["digits", "gpt", "sentences"])
    parser.add_argument("--model", type=Path, help="folder of the sentence transformer")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="at the same budget for every layer")
    parser.add_argument("--rules", nargs="*", choices=RULES, default=RULES, help="of allocation")
    parser.add_argument("--with-part", choices=PARTS, default="loss", help="how allocated budgets are spent")
    parser.add_argument("--epochs", type=int, default=0, help="of fine-tuning")
    parser.add_argument("--batches", type=int, default=10, help="of calibration")
    parser.add_argument("--cache", type=Path, help="folder of dense networks, trained once")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.cases:
        for seed in options.seeds:
            case = (
                sentence_case(options.model, options.batches)
                if name == "sentences"
                else trained_case(name, seed, options.cache, options.batches)
            )
            print(f"{name} seed {seed}, dense {case.figure(case.model):.4f}")
            print(f"{'':34} {'FLOPs':>6} {'error':>7} {'one-shot':>9} {'tuned':>9} {'s':>7}")
            for budget in options.budgets:
                for part in options.parts:
                    if part != "padding out" or name == "sentences":
                        measure(case, f"{budget:.2f} {part}", part, dict.fromkeys(case.layers, budget), options.epochs)
                for rule in options.rules:
                    start = time.perf_counter()
                    budgets = allocate(
                        case.model,
                        case.layers,
                        budget,
                        rule,
                        calibration=case.calibration,
                        row_splits=case.row_splits,
                    )
                    seconds = time.perf_counter() - start
                    measure(
                        case, f"{budget:.2f} {rule} allocation", options.with_part, budgets, options.epochs, seconds
                    )


if __name__ == "__main__":
    main()
