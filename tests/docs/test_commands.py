"""Every command of docs/commands.md does what the page says, in its order, on a tiny model and a tiny training."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from gblr_plugin.cli import main
from gblr_plugin.compression import folder as folders

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
CONFIG = """\
task: digits_vit
budget: 0.25
model: {dim: 16, depth: 1, heads: 2}
seeds: [0]
dense: {epochs: 1, batch_size: 128}
finetune: {epochs: 1, batch_size: 128}
methods: [{name: gblr}]
latency_batch: [1]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the page takes as given."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    measure = folders.measure_speed
    monkeypatch.setattr(folders, "measure_speed", lambda *given: measure(*given, seconds=0.0))
    words = [f"w{number}" for number in range(60)]
    texts = [" ".join(words[(at * step) % 60] for step in range(3, 12)) for at in range(40)]
    Path("texts.txt").write_text("\n".join(texts[:30]), encoding="utf-8")
    Path("held-out.txt").write_text("\n".join(texts[30:]), encoding="utf-8")
    Path("configs").mkdir()
    Path("configs/digits_vit.yaml").write_text(CONFIG, encoding="utf-8")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=16, **sizes)
    transformers.BertModel(config).save_pretrained("my-model")
    table = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained("my-model")
    return tmp_path


@pytest.mark.parametrize("heading", ["A pretrained model", "A training"])
def test_the_commands_of_a_section(folder, heading, capfd):
    pytest.importorskip("matplotlib")
    pytest.importorskip("onnxruntime")
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = section.split("```shell\n")[1].split("```")[0].replace("\\\n", "").splitlines()
    assert len(lines) >= 6
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
        shown = capfd.readouterr()
        assert shown.out, line
    left = {path.name for path in folder.iterdir()}
    assert left >= ({"my-half", "structure.png", "my-half.onnx"} if heading == "A pretrained model" else {"digits.pt2"})
