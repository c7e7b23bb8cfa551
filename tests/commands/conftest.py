from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gblr_plugin.cli import main

CONFIG = """\
task: digits_vit
budget: 0.5
model: {dim: 16, depth: 1, heads: 2, held_out: 0.5}
seeds: [0]
dense: {epochs: 1, batch_size: 128}
finetune: {epochs: 1, batch_size: 128}
methods: [{name: gblr}]
latency_batch: [1]
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple]:
    """The command, in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        shown = capfd.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a run that takes seconds."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny decoder with a tokenizer, and the same at half its multiply-adds."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from gblr_plugin.huggingface.compress_folder import CompressSettings, compress_folder

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("decoder") / "dense"
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 61, "n_positions": 16}
    ids = {"bos_token_id": None, "eos_token_id": None}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids)).save_pretrained(folder)
    table = {word: number for number, word in enumerate(["[UNK]", *(f"w{number}" for number in range(60))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)
    half = folder.parent / "half"
    compress_folder(folder, half, CompressSettings(0.5, method="trapezoid"))
    return folder, half


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Lines of words that the decoder knows."""
    words = [f"w{(7 * number + number * number) % 60}" for number in range(400)]
    path = tmp_path / "held-out.txt"
    path.write_text("\n".join(" ".join(words[at : at + 10]) for at in range(0, 400, 10)), encoding="utf-8")
    return path
