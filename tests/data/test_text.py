import pickle

import pytest
import torch

from gblr_plugin import ConfigError
from gblr_plugin.data.text import TokenFile, Windows, encode, labelled_lines, text_parts

np = pytest.importorskip("numpy")

LINES = [" = Valkyria = \n", " \n", " the cat sat on the mat , the dog did n't .\n"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A GPT-2 tokenizer of vocab.json and merges.txt, trained on a few lines."""
    pytest.importorskip("transformers")
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(LINES * 20, vocab_size=300, min_frequency=1, special_tokens=["<|endoftext|>"])
    trained.save_model(str(folder))
    return GPT2TokenizerFast.from_pretrained(str(folder), local_files_only=True)


@pytest.fixture
def wikitext(tmp_path):
    folder = tmp_path / "wikitext-103-raw"
    folder.mkdir()
    (folder / "wiki.train.raw").write_text("".join(LINES) * 50, encoding="utf-8")
    (folder / "wiki.valid.raw").write_text("".join(LINES), encoding="utf-8")
    return folder


def test_wikitext_is_encoded_once_line_by_line_and_mapped(wikitext, tokenizer, tmp_path, monkeypatch):
    train, held_out = text_parts(str(wikitext), wikitext=True)
    tokens = encode(held_out, tokenizer, tmp_path / "cache")
    expected = [number for line in LINES for number in tokenizer(line)["input_ids"]]
    assert tokens[0 : tokens.numel()].tolist() == expected
    assert tokenizer.decode(expected) == "".join(LINES)
    assert isinstance(tokens._map, np.memmap)
    assert tokens._map.dtype == np.uint16
    assert encode(train, tokenizer, tmp_path / "cache").numel() == 50 * len(expected)
    assert len(list((tmp_path / "cache").iterdir())) == 2

    monkeypatch.setattr("gblr_plugin.data.text._write_tokens", None)  # nothing is encoded again
    assert encode(held_out, tokenizer, tmp_path / "cache").path == tokens.path


def test_other_text_is_encoded_anew(wikitext, tokenizer, tmp_path):
    file = wikitext / "wiki.valid.raw"
    before = encode([file], tokenizer, tmp_path)
    file.write_text("the dog\n", encoding="utf-8")
    after = encode([file], tokenizer, tmp_path)
    assert after.path != before.path
    assert tokenizer.decode(after[0 : after.numel()]) == "the dog\n"


def test_a_failed_encoding_leaves_nothing(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good line\n\xff\xfe")
    with pytest.raises(ConfigError, match=r"a\.txt' is not text in UTF-8"):
        encode([tmp_path / "a.txt"], tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="there is no text in"):
        encode([tmp_path / "a.txt"], tokenizer, tmp_path / "cache")
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot write tokens to .*; set model\.cache"):
        encode([tmp_path / "a.txt"], tokenizer, tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_windows_are_shifted_by_one_token(kind, tmp_path):
    numbers = torch.arange(20, dtype=torch.uint8)
    np.save(tmp_path / "tokens.npy", numbers.numpy().astype(np.uint16))
    tokens = numbers if kind == "memory" else TokenFile(tmp_path / "tokens.npy")
    windows = Windows(tokens, context=6, stride=3)
    assert len(windows) == 5
    x, y = windows[4]
    assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
    assert x.tolist() == [12, 13, 14, 15, 16, 17]
    assert y.tolist() == [13, 14, 15, 16, 17, 18]
    assert len(Windows(tokens[0:6], 6, 3)) == 0


def test_a_token_file_goes_to_other_processes_as_its_path(tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(100_000, dtype=np.uint16) % 500)
    windows = Windows(TokenFile(tmp_path / "tokens.npy"), 8, 1000)
    sent = pickle.dumps(windows)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)[7][0], windows[7][0])
    loader = torch.utils.data.DataLoader(windows, 4, num_workers=2)
    assert torch.equal(torch.cat([x for x, _ in loader]), torch.stack([x for x, _ in windows]))


def test_what_is_no_token_file(tmp_path):
    for name, value in (("a", np.zeros(3)), ("b", np.zeros((2, 2), np.uint16))):
        np.save(tmp_path / f"{name}.npy", value)
        with pytest.raises(ConfigError, match="is no file of tokens"):
            TokenFile(tmp_path / f"{name}.npy")
    np.save(tmp_path / "c.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="is no file of tokens"):
        TokenFile(tmp_path / "c.npy")


def test_own_text_in_files_or_folders(tmp_path):
    (tmp_path / "train" / "deep").mkdir(parents=True)
    for place in ("train/b.txt", "train/deep/a.txt", "train/c.md", "val.txt"):
        (tmp_path / place).write_text("text\n")
    train, held_out = text_parts(str(tmp_path), wikitext=False)
    assert [file.name for file in train] == ["b.txt", "a.txt"]
    assert [file.name for file in held_out] == ["val.txt"]


def test_missing_text_is_one_line_that_says_where(tmp_path):
    with pytest.raises(ConfigError) as caught:
        text_parts(str(tmp_path), wikitext=True)
    assert str(caught.value).startswith(
        f"data: no WikiText-103 in '{tmp_path}': looked for wiki.train.raw and wiki.valid.raw. To get it: wikitext-"
    )
    assert "\n" not in str(caught.value)


def test_labelled_lines_as_in_sst2(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nhide new secretions \t0\ncontains no wit\t1\n")
    (tmp_path / "dev.tsv").write_text('label\tsentence\n1\ta "good" film\n')
    assert labelled_lines(str(tmp_path)) == (
        [("hide new secretions ", "0"), ("contains no wit", "1")],
        [('a "good" film', "1")],
    )
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nno label\n")
    with pytest.raises(ConfigError, match=r"dev\.tsv':2: 1 columns, the header has 2"):
        labelled_lines(str(tmp_path))
    (tmp_path / "dev.tsv").write_text("text\tlabel\na\t1\n")
    with pytest.raises(ConfigError, match="needs the columns sentence and label"):
        labelled_lines(str(tmp_path))
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(ConfigError, match=r"no labelled text .* looked for train\.tsv and dev\.tsv"):
        labelled_lines(str(tmp_path))


def test_a_table_without_a_line(tmp_path):
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("sentence\tlabel\n")
    with pytest.raises(ConfigError, match="has a header and no line"):
        labelled_lines(str(tmp_path))


def test_more_lines_than_are_held_at_a_time(wikitext, tokenizer, tmp_path, monkeypatch):
    train, _ = text_parts(str(wikitext), wikitext=True)
    whole = encode(train, tokenizer, tmp_path / "a")
    monkeypatch.setattr("gblr_plugin.data.text._LINES", 7)
    assert encode(train, tokenizer, tmp_path / "b").path.read_bytes() == whole.path.read_bytes()
