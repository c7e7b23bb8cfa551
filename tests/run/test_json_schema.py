"""What the schema says of a config, and that the reader of configs agrees."""

import json
from pathlib import Path

import pytest
import yaml

from gblr_plugin import ConfigError
from gblr_plugin.run.comparison_settings import ComparisonSettings
from gblr_plugin.run.json_schema import json_schema
from gblr_plugin.run.search_settings import SearchSettings
from gblr_plugin.run.settings import RunSettings
from gblr_plugin.run.yaml_config import Located, load_yaml, read_settings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
KINDS = {"comparison": ComparisonSettings, "search": SearchSettings}


def test_types_ranges_defaults_and_meanings():
    schema = json_schema(RunSettings)
    assert (schema["type"], schema["required"], schema["additionalProperties"]) == ("object", ["task"], False)
    dense = schema["properties"]["dense"]["properties"]
    assert dense["lr"] == {
        "type": "number",
        "exclusiveMinimum": 0.0,
        "description": "Peak learning rate of AdamW.",
        "default": 1e-3,
    }
    assert schema["properties"]["threads"]["anyOf"][1] == {"type": "null"}
    method = schema["properties"]["methods"]["items"]
    assert method["required"] == ["name"]
    assert method["properties"]["start"]["enum"] == ["trained", "initial"]
    assert schema["properties"]["methods"]["default"][0]["name"] == "gblr"


@pytest.mark.parametrize("kind", [RunSettings, ComparisonSettings, SearchSettings])
def test_every_key_is_explained_and_all_of_it_is_json(kind):
    def tables(schema):
        if isinstance(schema, dict):
            yield from (schema["properties"],) if "properties" in schema and "type" in schema else ()
            for inner in schema.values():
                yield from tables(inner)
        elif isinstance(schema, list):
            for inner in schema:
                yield from tables(inner)

    schema = json.loads(json.dumps(json_schema(kind)))
    for properties in tables(schema):
        for key, about in properties.items():
            assert about.get("description"), key
            assert ":func:" not in about["description"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_this_repository_hold(path):
    jsonschema = pytest.importorskip("jsonschema")
    kind = KINDS.get(path.stem.partition("_")[0], RunSettings)
    jsonschema.validate(load_yaml(path).data, json_schema(kind))


@pytest.mark.parametrize(
    "wrong",
    [
        "dense: {lr: 0}",
        "dense: {epochs: 0}",
        "threads: 1025",
        "budget: 1.5",
        "seeds: [-1]",
        "methods: [{name: gblr, start: begun}]",
        "latency: [1]",
        "dense: []",
    ],
)
def test_the_schema_and_the_reader_refuse_the_same(wrong):
    jsonschema = pytest.importorskip("jsonschema")
    data = {"task": "digits_vit", "budget": 0.5, **yaml.safe_load(wrong)}
    with pytest.raises(ConfigError):
        read_settings(RunSettings, Located("here", data, {}))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, json_schema(RunSettings))
