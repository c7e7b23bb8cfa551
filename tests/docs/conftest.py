"""What the pages take as given: a reader's own network, data and training loop, as small as they can be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gblr_plugin.families import registry


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.proj = nn.Linear(16, 16)
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        x = x + self.proj(torch.sigmoid(query * key) * value)
        return x + self.fc2(F.relu(self.fc1(x)))


class MyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 8, 16, generator=generator)
    return [(x, x[:, :4].argmax(1)) for x in inputs]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 720) -> None:
    data = batches()
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def training_step(batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def training_loop(
    model: nn.Module,
    optimizers: torch.optim.Optimizer,
    training_step: Callable[..., Tensor],
    lr_schedulers: Any = None,
    max_steps: int | None = None,
    max_epochs: int | None = None,
) -> None:
    data = batches()
    for step in range(max_steps or (max_epochs or 1) * len(data)):
        optimizers.zero_grad()
        training_step(data[step % len(data)], model).backward()
        optimizers.step()


def _lightning() -> dict[str, Any]:
    import nni
    import pytorch_lightning as pl
    from torch.utils.data import TensorDataset

    class Module(pl.LightningModule):
        def __init__(self, outer: str | None = None) -> None:
            super().__init__()
            if outer is None:  # names as in the NNI guide: the module is the network
                self.blocks, self.head = (part := MyNetwork()).blocks, part.head
            else:
                setattr(self, outer, MyNetwork())
            self._outer = outer

        def forward(self, x: Tensor) -> Tensor:
            return MyNetwork.forward(self, x) if self._outer is None else getattr(self, self._outer)(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return nni.trace(torch.optim.AdamW)(self.parameters(), lr=1e-3)

    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    data = nni.trace(pl.LightningDataModule.from_datasets)(train_dataset=TensorDataset(x, y), batch_size=8)
    return {"module": Module("network"), "data": data, "Module": Module}


def _lightning_page() -> dict[str, Any]:
    """With the classes that LightningCLI makes, and the page's config beside them."""
    import pytorch_lightning as pl

    names = _lightning()

    class MyModule(pl.LightningModule):
        def __init__(self, lr: float = 1e-3) -> None:
            super().__init__()
            self.network, self.lr = MyNetwork(), lr

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    class MyData(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return names["data"].train_dataloader()

    page = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text(encoding="utf-8")
    Path("config.yaml").write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    return {**names, "MyModule": MyModule, "MyData": MyData}


def _nni() -> dict[str, Any]:
    names = _lightning()
    return {
        "torch": torch,
        "data": names["data"],
        "module": names["Module"](),
        "new_module": names["Module"](),
        "model": MyNetwork(),
        "training_loop": training_loop,
        "training_step": training_step,
    }


def _readme() -> dict[str, Any]:
    import nni
    import pytorch_lightning as pl
    from nni.compression.utils import TorchEvaluator
    from torchao.quantization import quantize_

    import gblr_plugin as gblr

    names, model = _lightning(), MyNetwork()
    optimizer = nni.trace(torch.optim.AdamW)(model.parameters(), lr=1e-3)
    return {
        "gblr": gblr,
        "torch": torch,
        "pl": pl,
        "quantize_": quantize_,
        "model": model,
        "evaluator": TorchEvaluator(training_loop, optimizer, training_step),
        "module": names["module"],
        "datamodule": names["data"],
        "train": train,
        "weight": torch.randn(24, 32),
        "example_input": torch.randn(1, 16),
        "MyNetwork": MyNetwork,
    }


def _models() -> dict[str, Any]:
    names = _lightning()
    tokens = torch.randint(100, (32, 16), generator=torch.Generator().manual_seed(0))
    return {
        "MyLightningModule": lambda: names["Module"]("network"),
        "my_data": names["data"],
        "MyNetwork": MyNetwork,
        "my_batches": batches(),
        "my_tokens": [{"input_ids": row, "labels": row} for row in tokens],
    }


def _data() -> dict[str, Any]:
    """The folders that the page reads, in the present one."""
    from PIL import Image
    from tokenizers import ByteLevelBPETokenizer

    for part in ("train", "val"):
        for name in ("cats", "dogs"):
            folder = Path("my-images") / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (60, 40), (200, 90, 0)).save(folder / "1.jpg")
        (Path("my-text") / part).mkdir(parents=True)
        (Path("my-text") / part / "1.txt").write_text("All happy families are alike.\n" * 20, encoding="utf-8")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(["my-text/train/1.txt"], vocab_size=270, min_frequency=1)
    Path("my-tokenizer").mkdir()
    tokenizer.save_model("my-tokenizer")
    return {}


def _calibration() -> dict[str, Any]:
    return {**_nni(), "MyNetwork": MyNetwork}


def _compress() -> dict[str, Any]:
    """A tiny encoder where the page has a sentence transformer, and the folder that the command would make of it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    from gblr_plugin.huggingface.compress_folder import CompressSettings, compress_folder

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["It works."], vocab_size=270, min_frequency=1, special_tokens=["[PAD]"])
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).save_pretrained("minilm")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token="[PAD]").save_pretrained("minilm")
    compress_folder("minilm", "minilm-half", CompressSettings(0.5, method="trapezoid"))
    return {}


GIVEN = {
    "compress": _compress,
    "README": _readme,
    "calibration": _calibration,
    "nni": _nni,
    "lightning": _lightning_page,
    "models": _models,
    "data": _data,
}


@pytest.fixture
def given_names() -> Callable[[str], dict[str, Any]]:
    """Names that a page takes as given, by the page's stem; made anew at each call."""

    def make(page: str) -> dict[str, Any]:
        torch.manual_seed(0)
        return GIVEN.get(page, dict)()

    return make


@pytest.fixture(autouse=True)
def _left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pages register a family of their own, and silence the log of what stays dense."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    logger = logging.getLogger("gblr_plugin.surgery.selection")
    level = logger.level
    yield
    logger.setLevel(level)
