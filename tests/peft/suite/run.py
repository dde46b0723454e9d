"""PEFT's own tests over our methods: fetched from its source distributions, run with `ours.py` in their place.

    python tests/peft/suite/run.py [--release 0.21.2] [--files custom decoder ...] [-- PYTEST ARGUMENTS]

Nothing of PEFT's is kept in the repository: `pip download` brings each release's tests into a temporary folder, and
`pip install --target` the release itself where another one is installed.  The models that the tests take from a hub are
made here, tiny and random, under their names.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

RELEASES = ("0.21.2", "0.20.0")
FILES = {
    "custom": "test_custom_models.py",
    "config": "test_config.py",
    "decoder": "test_decoder_models.py",
    "encoder_decoder": "test_encoder_decoder_models.py",
    "feature_extraction": "test_feature_extraction_models.py",
    "seq_classifier": "test_seq_classifier.py",
    "auto": "test_auto.py",
}
MAKING_LORA = {  # files whose tests make a LoraConfig themselves
    "initialization": "test_initialization.py",
    "mixed": "test_mixed.py",
    "low_level": "test_low_level_api.py",
    "token_classification": "test_token_classification_qa.py",
}
HERE = Path(__file__).parent
SOURCE = HERE.parents[2] / "src"
SETTINGS = "[pytest]\naddopts = -q -W ignore --tb=short\n"
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1024}
_BERT = {**_SMALL, "intermediate_size": 37}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.2}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 1024, "n_positions": 256}
_OPT = {**_SMALL, "ffn_dim": 37, "word_embed_proj_dim": 32, "max_position_embeddings": 256, "pad_token_id": 1}
_CLIP = {**_BERT, "max_position_embeddings": 77}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "vocab_size": 1024}
_T5 |= {"decoder_start_token_id": 0}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 1024}
_BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 256}
_GEMMA = {**_LLAMA, "head_dim": 8, "sliding_window": 8}
MODELS = {  # by the name that the tests know: the config's class without "Config", the model's, and the sizes
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPT", "OPTForCausalLM", _OPT),
    "peft-internal-testing/opt-125m": ("OPT", "OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPText", "CLIPTextModel", _CLIP),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2", "GPT2LMHeadModel", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJ", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", "LlamaForCausalLM", _LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2", "Qwen2ForCausalLM", _LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3Text", "Gemma3ForCausalLM", _GEMMA),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5", "T5ForConditionalGeneration", _T5,
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("Bart", "BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertModel": ("Bert", "BertModel", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("Roberta", "RobertaModel", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("Deberta", "DebertaModel", _BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2", "DebertaV2Model", _BERT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("Bert", "BertForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "Roberta", "RobertaForSequenceClassification", _BERT,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "Llama", "LlamaForSequenceClassification", _LLAMA,
    ),
}  # fmt: skip

_WHISPER = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 96}
_WHISPER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0}
_WHISPER |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "max_source_positions": 32}
ADAPTERS = {  # folders of ours under the names of LoRAs that the tests know: the base as above, and the task
    "peft-internal-testing/tiny-OPTForCausalLM-lora": ("OPT", "OPTForCausalLM", _OPT, "CAUSAL_LM"),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": ("T5", "T5ForConditionalGeneration", _T5, "SEQ_2_SEQ_LM"),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": (
        "OPT", "OPTForSequenceClassification", _OPT, "SEQ_CLS",
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": (
        "GPT2", "GPT2ForTokenClassification", _GPT, "TOKEN_CLS",
    ),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": ("OPT", "OPTForQuestionAnswering", _OPT, "QUESTION_ANS"),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": ("OPT", "OPTModel", _OPT, "FEATURE_EXTRACTION"),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": (
        "Whisper", "WhisperForConditionalGeneration", _WHISPER, None,
    ),
}  # fmt: skip


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def fetch(release: str, into: Path) -> tuple[Path, list[str]]:
    """Return the folder of a release's tests and what to put in front of the search path so that it is imported."""
    _pip(
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        "peft",
        "--no-build-isolation",
        "-d",
        str(into),
        f"peft=={release}",
    )
    with tarfile.open(into / f"peft-{release}.tar.gz") as archive:
        archive.extractall(into, filter="data")
    tests = into / f"peft-{release}" / "tests"
    (tests / "__init__.py").touch()
    site = into / f"site-{release}"
    wanted = ["parameterized", *([] if version("peft") == release else [f"peft=={release}"])]
    _pip("install", "--quiet", "--no-deps", "--target", str(site), *wanted)
    return tests, [str(site)]


def make_models(into: Path) -> None:
    """Make the models that the tests name, each in the folder of its name."""
    import torch
    import transformers

    for name, (config, model, sizes) in MODELS.items():
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, f"{config}Config")(**sizes))
        made.eval().save_pretrained(into / name)


def make_adapters(into: Path) -> None:
    """Make the folders of adapters that the tests name, with SVF on tiny models."""
    sys.path.insert(0, str(SOURCE))
    import torch
    import transformers
    from peft import get_peft_model

    import spectune.peft

    for name, (config, model, sizes, task) in ADAPTERS.items():
        torch.manual_seed(0)
        base = into / f"{name}-base"
        getattr(transformers, model)(getattr(transformers, f"{config}Config")(**sizes)).save_pretrained(base)
        made = getattr(transformers, model).from_pretrained(base)
        get_peft_model(made, spectune.peft.SVFConfig(task_type=task)).save_pretrained(into / name)


def run(release: str, files: list[str], arguments: list[str], work: Path) -> tuple[str, int]:
    """Run some files of a release's tests, and return a line that says what came of it, and pytest's exit code."""
    tests, first = fetch(release, work)
    files = [name for name in files if (tests / (FILES | MAKING_LORA)[name]).is_file()]  # earlier releases have fewer
    if not files:
        return f"PEFT {release}: has none of these files", 0
    (work / "pytest.ini").write_text(SETTINGS)
    if set(files) - {"custom", "config"}:
        make_models(tests.parent)
    if "auto" in files:
        make_adapters(tests.parent)
    path = os.pathsep.join([*first, str(SOURCE), str(HERE)])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(work / "pytest.ini"),
        "--rootdir",
        str(tests.parent),
        "-p",
        "ours",
    ]
    command += [*(f"tests/{(FILES | MAKING_LORA)[name]}" for name in files), *arguments]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    quiet["IN_PLACE_OF_LORA"] = str(int(files[0] in MAKING_LORA))
    with subprocess.Popen(
        command, cwd=tests.parent, env={**os.environ, "PYTHONPATH": path, **quiet}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    counts = re.findall(r"\d+ (?:passed|failed|skipped|xfailed|error\w*)", "".join(said[-3:]))
    return f"PEFT {release}, {', '.join(files)}: {', '.join(counts)}", process.returncode


def main() -> None:
    """Run what was asked for, and end with a line for each release."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--release", action="append", help="a release of PEFT; several may be given")
    names = [*FILES, *MAKING_LORA]
    parser.add_argument("--files", nargs="*", default=names, choices=names)
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    asked = parser.parse_args(given[:cut])
    parts = [part for kind in (FILES, MAKING_LORA) if (part := [name for name in asked.files if name in kind])]
    outcomes = []
    for release in asked.release or RELEASES:
        for part in parts:  # each with tests of its own, in which nothing is left of the other's
            with tempfile.TemporaryDirectory(prefix="peft-tests-") as work:
                outcomes.append(run(release, part, given[cut + 1 :], Path(work)))
    print("\n" + "\n".join(line for line, _ in outcomes))
    sys.exit(max(code for _, code in outcomes))


if __name__ == "__main__":
    main()
