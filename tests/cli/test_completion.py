"""What a shell completes."""

from spectune.cli.completion import methods, models, settings


def test_keys_and_their_values():
    assert settings("max_l") == ["max_length="]
    assert settings("schedule=c") == ["schedule=cosine", "schedule=constant"]
    assert settings("task=cl") == ["task=classify"]
    assert settings("fused=") == ["fused=true", "fused=false"]
    assert settings("method=pi") == ["method=pissa"]
    assert settings("nothing=") == []
    assert settings("lr=a") == ["lr=auto"]


def test_methods_and_models():
    assert methods("sv") == ["svf", "svft"]
    assert models("mini") == ["minilm-l6"]
