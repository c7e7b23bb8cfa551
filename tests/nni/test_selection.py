"""Which modules NNI's keys mean, for gblr and for NNI's own compressors."""

from __future__ import annotations

from gblr_plugin.nni.selection import without_gblr_keys


def test_other_compressors_get_a_config_they_accept() -> None:
    given = [
        {"op_names": ["a"], "sparse_ratio": 1, "gblr": {"seed": 1}, "gblr_seed": 1, "target_settings": {"weight": {}}}
    ]
    plain = without_gblr_keys(given)
    assert plain == [{"op_names": ["a"], "sparse_ratio": 1.0, "target_settings": {"weight": {}}}]
    assert isinstance(plain[0]["sparse_ratio"], float)
    assert "gblr" in given[0]
