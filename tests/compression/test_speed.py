import copy

import pytest
import torch
from torch import nn

from gblr_plugin.compression.inputs import DataReader, kind_of
from gblr_plugin.compression.speed import measure_speed
from gblr_plugin.huggingface.pretrained import load_dense


class Counting(nn.Module):
    """Notes the shapes of what a model reads."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, **batch):
        self.seen.append({name: tuple(tensor.shape) for name, tensor in batch.items() if torch.is_tensor(tensor)})
        return self.model(**batch)


@pytest.mark.parametrize(
    ("name", "items", "counts"),
    [("encoder", "texts", [1, 40]), ("images", "images", [1, 8]), ("decoder", "tokens", [1, 16])],
)
def test_one_and_more(dense_folder, data, name, items, counts):
    dense = load_dense(dense_folder(name), "test")
    kind = kind_of(dense)
    batches = DataReader(dense_folder(name), kind, length=None if name == "images" else 16).read(
        data(name, count=40), "--eval"
    )
    networks = [Counting(dense), Counting(copy.deepcopy(dense))]
    speed = measure_speed(kind, *networks, batches, seconds=0.0)
    assert speed.items == items
    assert list(speed.speedup) == counts
    assert all(speed.speedup[n] == speed.dense[n] / speed.compressed[n] > 0 for n in counts)
    assert networks[0].seen == networks[1].seen
    shapes = {next(iter(seen.values())) for seen in networks[0].seen}
    if name == "decoder":
        assert shapes == {(1, 1), (1, 16)}
    else:
        assert {shape[0] for shape in shapes} == set(counts)


def test_a_text_alone_has_no_padding(dense_folder, data):
    dense = Counting(load_dense(dense_folder("encoder"), "test"))
    batches = DataReader(dense_folder("encoder"), "encoder", 32).read(data("encoder", count=20), "--eval")
    measure_speed("encoder", dense, dense, batches, seconds=0.0)
    alone = {seen["input_ids"][1] for seen in dense.seen if seen["input_ids"][0] == 1}
    assert alone == {int(batches[0]["attention_mask"][0].sum())}
