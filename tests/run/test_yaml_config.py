from dataclasses import dataclass, field
from typing import Any

import pytest

from gblr_plugin import ConfigError
from gblr_plugin.run.settings import RunSettings
from gblr_plugin.run.yaml_config import load_yaml, parse_overrides, read_settings


@dataclass
class Inner:
    rate: float = 0.1
    steps: int = 1

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")


@dataclass
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    sizes: list[int] = field(default_factory=list)
    parts: list[Inner] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    switch: bool = False
    maybe: float | None = None


@pytest.fixture
def read(tmp_path):
    def read(text, *overrides, kind=Outer):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        located = load_yaml(path)
        parse_overrides(located, list(overrides))
        return read_settings(kind, located)

    return read


@pytest.fixture
def refused(read, tmp_path):
    def refused(text, *overrides, kind=Outer):
        with pytest.raises(ConfigError) as caught:
            read(text, *overrides, kind=kind)
        message = str(caught.value).replace(f"{tmp_path}/", "")
        assert "\n" not in message
        return message

    return refused


def test_values_of_all_kinds(read):
    settings = read(
        "name: a\ninner: {rate: 2, steps: 3}\nsizes: [1, 2]\nparts: [{steps: 4}]\nextra: {x: [1]}\n"
        "switch: true\nmaybe:\n"
    )
    assert settings == Outer("a", Inner(2.0, 3), [1, 2], [Inner(0.1, 4)], {"x": [1]}, True, None)
    assert isinstance(settings.inner.rate, float)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "+1e-3", ".1e-2", "0.001"])
def test_numbers_with_exponents(read, text):
    settings = read(f"name: a\ninner: {{rate: {text}}}\nextra: {{rate: {text}}}\n", f"maybe={text}")
    assert settings.inner.rate == settings.extra["rate"] == settings.maybe == pytest.approx(1e-3)


def test_words_that_look_like_numbers_stay_words(read):
    assert read("name: e3\nextra: {a: '1e3', b: 1e, c: 3}").extra == {"a": "1e3", "b": "1e", "c": 3}


def test_misspelt_keys_name_place_key_and_nearest(refused):
    assert refused("name: a\nsise: [1]\n").startswith(
        "config.yaml:2: sise: unknown key; did you mean 'sizes'? (allowed: "
    )
    assert refused("name: a\nparts:\n- rate: 1\n- step: 2\n").startswith("config.yaml:4: parts.1.step: unknown key")
    message = refused("task: digits_vit\nbuget: 0.3\n", kind=RunSettings)
    assert "config.yaml:2: buget: unknown key; did you mean 'budget'?" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("inner: {rate: fast}", "inner.rate: need a finite number, got text 'fast'"),
        ("inner: {rate: '0.1'}", "inner.rate: need a finite number, got text '0.1'"),
        ("inner: {rate: .nan}", "inner.rate: need a finite number, got a number nan"),
        ("inner: {rate: .inf}", "inner.rate: need a finite number"),
        ("inner: {rate: true}", "inner.rate: need a finite number, got true or false True"),
        ("inner: {steps: 1.5}", "inner.steps: need a whole number, got a number 1.5"),
        ("inner: {steps: true}", "inner.steps: need a whole number"),
        ("inner: {steps: }", "inner.steps: need a whole number, got nothing"),
        ("inner: 3", "inner: need a table, got a whole number 3"),
        ("inner: [1]", "inner: need a table, got a list [1]"),
        ("sizes: 3", "sizes: need a list"),
        ("sizes: [1, x]", "sizes.1: need a whole number, got text 'x'"),
        ("extra: [1]", "extra: need a table"),
        ("switch: 1", "switch: need true or false"),
        ("maybe: x", "maybe: need a finite number"),
        ("inner: {steps: 0}", "inner: steps must be at least 1, got 0"),
    ],
)
def test_wrong_types_and_values(refused, line, message):
    assert refused(f"name: a\n{line}\n").startswith(f"config.yaml:2: {message}")


def test_missing_key(refused):
    assert refused("sizes: [1]") == "config.yaml: key 'name' is missing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", "config.yaml:2: key 'name' stands twice"),
        ("name: a\ninner:\n  rate: 1\n  rate: 2\n", "config.yaml:4: key 'inner.rate' stands twice"),
        ("name: !!python/object/apply:os.system ['true']", "config.yaml:1: not valid YAML"),
        ("name: !!python/name:os.system", "config.yaml:1: not valid YAML"),
        ("name: [1\n", "config.yaml:2: not valid YAML"),
        ("name: 2024-99-99", "not valid YAML"),
        ("name: \x01", "not valid YAML"),
        ("? [a, b]\n: 1", "config.yaml:1: a key must be one word"),
        ("extra: " + "[" * 30 + "]" * 30, "config.yaml:1: nested deeper than 20 levels"),
        ("[" * 1500, "nested"),
        ("extra: &a [*a]", "nested deeper"),
        (
            "a0: &a0 [1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(8)),
            "more than 100000 values",
        ),
        ("- 1", "a config is a mapping of keys to values, got a list"),
        ("", "a config is a mapping of keys to values, got nothing"),
        ("x" * 1_000_001, "larger than 1000000 bytes"),
    ],
)
def test_malformed_files(refused, text, message):
    assert message in refused(text)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_yaml(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_yaml(tmp_path / "binary.yaml")


def test_overrides(read):
    settings = read(
        "name: a\nsizes: [1, 2]\nparts: [{steps: 4}]\n",
        "sizes.1=5",
        "parts.0.rate=1e-2",
        "inner.steps=7",
        "extra.deep.er=[1, {a: b}]",
        "name=x=y",
        "maybe=null",
    )
    assert settings.sizes == [1, 5]
    assert settings.parts == [Inner(0.01, 4)]
    assert settings.inner == Inner(0.1, 7)
    assert settings.extra == {"deep": {"er": [1, {"a": "b"}]}}
    assert (settings.name, settings.maybe) == ("x=y", None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.step=1", "--set inner.step=1: inner.step: unknown key; did you mean 'steps'?"),
        ("inner.steps=x", "--set inner.steps=x: inner.steps: need a whole number, got text 'x'"),
        ("inner.steps=0", "--set inner.steps=0: inner: steps must be at least 1"),
        ("inner.steps", "--set inner.steps: need key.sub=value"),
        ("=3", "--set =3: need key.sub=value"),
        ("sizes.7=1", "--set sizes.7=1: '7' is no index of a list of 2"),
        ("sizes.x=1", "--set sizes.x=1: 'x' is no index"),
        ("sizes.0.a=1", "--set sizes.0.a=1: 'sizes.0' is not a table"),
        ("name.a.b=1", "--set name.a.b=1: 'a' is inside a value that is not a table"),
        ("sizes=[", "--set sizes=[: "),
        ("name=!!python/name:os.system", "not valid YAML"),
    ],
)
def test_bad_overrides(refused, override, message):
    assert message in refused("name: a\nsizes: [1, 2]\ninner: {rate: 1}\n", override)
