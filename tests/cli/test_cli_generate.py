"""spectune generate."""

import json

from cli.typed import run


def test_generate_with_one_and_with_weighted_adapters(model, adapters):
    plain = json.loads(run("generate", model, "say one", "--json", "--max-new-tokens", "5").stdout)
    none = json.loads(
        run("generate", model, "say one", "-a", adapters["pirate"] + ":0", "--json", "--max-new-tokens", "5").stdout
    )
    assert plain[0]["tokens"] == none[0]["tokens"]
    arguments = ["-a", adapters["pirate"] + ":0.7", "-a", adapters["chef"] + ":0.3"]
    mixed = json.loads(run("generate", model, "say one", "say two", *arguments, "--json").stdout)
    assert [reply["prompt"] for reply in mixed] == ["say one", "say two"]


def test_generate_reads_stdin_and_prints_text(model):
    assert run("generate", model, "--max-new-tokens", "3", stdin="say one\n").stdout.strip()
