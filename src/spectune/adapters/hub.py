"""Adapters on the Hugging Face Hub: a folder of two files and a card that says what it is and how it is used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from spectune.adapters.contents import Contents
from spectune.adapters.folder import CONFIG, WEIGHTS
from spectune.adapters.formats.bilingual import peft_type
from spectune.adapters.formats.peft import is_peft
from spectune.errors import SpectuneError

README = "README.md"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_repository(path: str) -> bool:
    """Whether a path that is no folder here can be a repository's name: "user/name"."""
    return _REPOSITORY.fullmatch(path) is not None


def fetch(name: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Return the folder of a repository's adapter, downloaded or in the cache.

    Raises:
        SpectuneError: there is none, or it cannot be reached or read.
    """
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS, README]
        )
    except LocalEntryNotFoundError:
        raise SpectuneError(
            f"there is no adapter folder {name!r} here, and the hub has no repository of that name that can be "
            "reached: check the name, the connection and HF_HUB_OFFLINE"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SpectuneError(
            f"there is no adapter folder {name!r} here, and it cannot be had from the hub ({_first_line(error)}): "
            "check the name, the revision, and for a private repository the token"
        ) from None
    return Path(found)


def push(
    folder: Path,
    name: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    message: str,
    card: str,
) -> str:
    """Upload an adapter's folder with its card, and return the commit's address.

    Raises:
        SpectuneError: the hub refuses, or cannot be reached.
    """
    (folder / README).write_text(card, encoding="utf-8")
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            allow_patterns=[CONFIG, WEIGHTS, README],
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SpectuneError(
            f"{name!r} could not be pushed to ({_first_line(error)}): check the name, the connection, and that the "
            "token may write there (hf auth login)"
        ) from None
    return str(done.commit_url)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def card_of(
    adapter: Contents,
    name: str,
    *,
    metrics: Mapping[str, float] | None = None,
    datasets: Sequence[str] = (),
    notes: str = "",
) -> str:
    """Return the card of an adapter: what it is, its base, its metrics and data, and how it is used."""
    methods = dict.fromkeys(t.method.name for layer in adapter.layers.values() for t in layer.terms)
    base, in_peft = adapter.base_model, is_peft(adapter)
    kind = "LORA" if in_peft else peft_type(adapter)
    head = ["---", f"library_name: {'peft' if in_peft else 'spectune'}"]
    if base and is_repository(base):
        head += [f"base_model: {base}", "base_model_relation: adapter"]
    head += ["tags:", "- spectune", *(f"- {method}" for method in methods), *(["- peft"] if kind else [])]
    if datasets:
        head += ["datasets:", *(f"- {data}" for data in datasets)]
    body = [
        "---", "", f"# {name.rpartition('/')[2]}", "",
        f"A {' and '.join(methods)} adapter of {adapter.parameter_count():,} parameters on {len(adapter.layers)} layers"
        + (f" of `{base}`." if base else "."),
    ]  # fmt: skip
    body += ["", notes.strip()] if notes.strip() else []
    if metrics:
        body += ["", "| metric | value |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in metrics.items())]
    model = base or "BASE"
    body += [
        "", "## How to use it", "", "```python", "import spectune", "",
        f'model, tokenizer = spectune.load_base("{model}")', f'spectune.attach(model, spectune.Adapter.load("{name}"))',
        "```", "", "On the command line, once it is downloaded:", "", "```sh",
        f"hf download {name} --local-dir adapter", f"spectune chat {model} -a adapter", "```",
    ]  # fmt: skip
    if kind:
        body += [
            "", "With PEFT:", "", "```python", *([] if in_peft else ["import spectune.peft"]),
            "from peft import AutoPeftModelForCausalLM", "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")', "```",
        ]  # fmt: skip
    if in_peft:
        body += [
            "",
            "With vLLM:",
            "",
            "```sh",
            f"vllm serve {model} --enable-lora --lora-modules adapter={name}",
            "```",
        ]
    else:
        body += [
            "", "With vLLM, as a merged model:", "", "```sh",
            f"spectune export adapter merged --format merged --base {model}", "vllm serve merged", "```",
        ]  # fmt: skip
    return "\n".join([*head, *body]) + "\n"
