"""What each way of saving keeps of what was trained: `python tests/savers.py` writes the table of docs/saving.md.

Each case trains a step in this process, saves, and is loaded the documented way in another one, which must answer the
same; or saving was refused with a sentence.  Nothing else passes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import safetensors.torch
import torch
import transformers as tf
from torch import Tensor

import spectune
from spectune import Adapter, SpectuneError
from tiny import BERT, TEXT
from training.folder import make_tokenizer

TABLE = Path(__file__).parents[1] / "docs" / "saving.md"
BEGIN, END = "<!-- written by tests/savers.py -->", "<!-- end -->"
NEW = 4  # tokens that a checkpoint has not


class Family(NamedTuple):
    """An architecture: its checkpoint, what is loaded of it, and modules of it by name."""

    make: Callable[[], Any]
    auto: str
    headed: str  # with a head that the checkpoint lacks
    norm: str
    part: str  # the model inside


def _llama() -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, attention_bias=True, tie_word_embeddings=True))


def _gpt2() -> Any:
    shape = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def _bert() -> Any:
    return tf.BertForMaskedLM(tf.BertConfig(**BERT))


def _t5() -> Any:
    shape = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return tf.T5ForConditionalGeneration(tf.T5Config(**shape, decoder_start_token_id=0, pad_token_id=0))


def _qwen3_moe() -> Any:
    experts: Any = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**TEXT, **experts, attention_bias=True))


def _levit() -> Any:
    shape: Any = {"hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
    shape |= {"key_dim": [8, 8, 8], "image_size": 32, "num_labels": 3}
    shape["down_ops"] = [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2], [""]]
    return tf.LevitForImageClassification(tf.LevitConfig(**shape))


_SEQUENCE = "AutoModelForSequenceClassification"
FAMILIES = {
    "Llama": Family(_llama, "AutoModelForCausalLM", _SEQUENCE, "model.norm", "model"),
    "GPT-2": Family(_gpt2, "AutoModelForCausalLM", _SEQUENCE, "transformer.ln_f", "transformer"),
    "BERT": Family(_bert, "AutoModelForMaskedLM", _SEQUENCE, "bert.encoder.layer.0.output.LayerNorm", "bert"),
    "T5": Family(
        _t5, "AutoModelForSeq2SeqLM", "AutoModelForTokenClassification", "encoder.final_layer_norm", "encoder"
    ),
    "Qwen3-MoE": Family(_qwen3_moe, "AutoModelForCausalLM", _SEQUENCE, "model.norm", "model"),
    "LeViT": Family(_levit, "AutoModelForImageClassification", "", "", "levit"),
}
KINDS = {  # what was trained beside layers, with options of `adapt`
    "layers alone": {},
    "a new head": {},
    "a norm by requires_grad": {},
    "a module by name": {"modules_to_save": ["NORM"]},
    "rows of new tokens": {},
    "an embedding": {"modules_to_save": ["EMBEDDING"]},
    "biases": {"bias": "lora_only"},
    "BatchNorm's statistics": {},
}


class Case(NamedTuple):
    """One kind of training in one family, and where its base lies."""

    family: str
    kind: str
    method: str
    root: str

    @property
    def folder(self) -> Path:
        """Where the checkpoint of the base is."""
        return Path(self.root) / f"base-{self.family}"

    @property
    def auto(self) -> Any:
        family = FAMILIES[self.family]
        return getattr(tf, family.headed if self.kind == "a new head" else family.auto)

    def base(self) -> Any:
        """Load the base, as a user does: what the checkpoint has not is drawn anew."""
        options: Any = {"num_labels": 3} if self.kind == "a new head" else {}
        model = self.auto.from_pretrained(self.folder, dtype=torch.float32, **options)
        if self.kind == "rows of new tokens":
            model.resize_token_embeddings(TEXT["vocab_size"] + NEW, mean_resizing=False)
        return model.eval()

    def adapt(self, inside: str = "") -> Any:
        """Load the base and put an adapter on it, or on a part of it."""
        model, family = self.base(), FAMILIES[self.family]
        options = dict(KINDS[self.kind])
        part = next(n for n, _ in model.named_modules() if n == inside or n.endswith(f".{inside}"))
        inner = model.get_submodule(part)
        if options.get("modules_to_save") == ["NORM"]:
            options["modules_to_save"] = [family.norm.removeprefix(f"{part}.")]
        if options.get("modules_to_save") == ["EMBEDDING"]:
            names = [n for n, m in inner.named_modules() if m is model.get_input_embeddings()]
            options["modules_to_save"] = names[:1]
        spectune.adapt(inner, self.method, **options)
        if self.kind == "a norm by requires_grad":
            model.get_submodule(family.norm).requires_grad_(True)
        return model

    def examples(self) -> list[dict[str, Tensor]]:
        """Return what is learned, and asked."""
        draw = torch.Generator().manual_seed(0)
        if self.family == "LeViT":
            return [{"pixel_values": torch.randn(3, 32, 32, generator=draw), "labels": torch.tensor(i)} for i in (0, 2)]
        most = TEXT["vocab_size"] + (NEW if self.kind == "rows of new tokens" else 0)
        found = []
        for i in range(4):
            ids = torch.randint(3, most, (8,), generator=draw)
            ids[2] = most - 1
            labels = ids
            if self.kind == "a new head":
                labels = torch.tensor(i % 3) if "Sequence" in FAMILIES[self.family].headed else ids % 3
            found.append({"input_ids": ids, "labels": labels})
        return found

    def batch(self) -> dict[str, Tensor]:
        return {key: torch.stack([e[key] for e in self.examples()]) for key in self.examples()[0]}


def answer(model: Any, case: Case) -> Tensor:
    """Return the logits."""
    batch = case.batch()
    labels = batch.pop("labels")
    if case.family == "T5" and case.kind != "a new head":
        batch["decoder_input_ids"] = labels
    with torch.no_grad():
        return model.eval()(**batch).logits.detach().clone()


def step(model: Any, case: Case) -> Any:
    """Train a step, in training mode."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-2)
    model.train()(**case.batch()).loss.backward()
    optimizer.step()
    return model.eval()


# -- savers: each trains and saves, and returns the model as it answered; what loads it is beside it


def _attached(case: Case, folder: Path) -> Any:
    return spectune.attach(case.base(), Adapter.load(folder))


def _from_pretrained(case: Case, folder: Path) -> Any:
    return case.auto.from_pretrained(folder, dtype=torch.float32)


def _adapter(case: Case, folder: Path) -> Any:
    model = step(case.adapt(), case)
    spectune.extract(model).save(folder)
    return model


def _run(case: Case, folder: Path) -> Any:
    from spectune.training.config import load_config
    from spectune.training.run import train_model

    headed = case.kind == "a new head"
    whole: Any = {"a module by name": [FAMILIES[case.family].norm], "an embedding": ["EMBEDDING"]}.get(case.kind, [])
    model, tokenizer = case.base(), make_tokenizer()
    if whole == ["EMBEDDING"]:
        whole = [n for n, m in model.named_modules() if m is model.get_input_embeddings()]
    lines = [{"text": "say one", "label": str(i % 3)} if headed else PROMPT for i in range(6)]
    if headed:
        model.config.id2label, model.config.label2id = {i: str(i) for i in range(3)}, {str(i): i for i in range(3)}
    settings = ["model=m", "data=d", f"output={folder}", f"method={case.method}", "lr=5e-2", "max_steps=2"]
    settings += ["device=cpu", "dtype=fp32", "held_out=0", f"modules_to_save={json.dumps(whole)}"]
    settings += ["task=classify"] if headed else []
    train_model(load_config(None, settings), model, tokenizer, lines, [], _quiet())
    return model


PROMPT = {"prompt": "say one", "completion": "ahoy one"}


def _quiet() -> Any:
    from rich.console import Console

    return Console(quiet=True)


def _save_pretrained(case: Case, folder: Path) -> Any:
    model = step(case.adapt(), case)
    model.save_pretrained(folder)
    return model


def _outer(case: Case, folder: Path) -> Any:
    model = step(case.adapt(FAMILIES[case.family].part), case)
    model.save_pretrained(folder)
    return model


def _pipeline(case: Case, folder: Path) -> Any:
    model = step(case.adapt(), case)
    tf.TextGenerationPipeline(model, make_tokenizer()).save_pretrained(folder)
    return model


def _trainer(case: Case, folder: Path) -> Any:
    return _trained_by(tf.Trainer, tf.TrainingArguments, case, folder)


def _sft(case: Case, folder: Path) -> Any:
    import trl

    return _trained_by(trl.SFTTrainer, trl.SFTConfig, case, folder, processing_class=make_tokenizer())


def _trained_by(kind: Any, arguments: Any, case: Case, folder: Path, **options: Any) -> Any:
    import datasets

    model = case.adapt()
    examples = case.examples()
    if options:
        rows = [{k: v.tolist() for k, v in example.items()} for example in examples]
        examples = datasets.Dataset.from_list(rows)  # type: ignore[assignment]
    settings = {"max_steps": 2, "learning_rate": 5e-2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    settings |= {"save_strategy": "no", **({"bf16": False} if options else {})}
    trainer = kind(model, arguments(str(folder) + "-run", **settings), train_dataset=examples, **options)
    trainer.train()
    trainer.save_model(str(folder))
    return model.eval()


def _exported(case: Case, folder: Path) -> Any:
    model = step(case.adapt(), case)
    spectune.extract(model).export(folder)
    return model


def _by_peft(case: Case, folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(case.base(), folder)


def _from_peft(case: Case, folder: Path) -> Any:
    return spectune.attach(case.base(), Adapter.from_peft(folder))


def _accelerate(case: Case, folder: Path) -> Any:
    model = step(case.adapt(), case)
    accelerate.Accelerator(cpu=True).save_model(model, str(folder))
    model.config.save_pretrained(folder)
    return model


def _safetensors(case: Case, folder: Path) -> Any:
    model = step(case.adapt(), case)
    folder.mkdir()
    safetensors.torch.save_model(model, str(folder / "model.safetensors"))
    return model


def _into_base(case: Case, folder: Path) -> Any:
    model = case.base()
    safetensors.torch.load_model(model, folder / "model.safetensors")
    return model


def _state(case: Case, folder: Path) -> Any:
    model = step(case.adapt(), case)
    folder.mkdir()
    torch.save(model.state_dict(), folder / "state.pt")
    return model


def _into_adapted(case: Case, folder: Path) -> Any:
    model = case.adapt()
    model.load_state_dict(torch.load(folder / "state.pt"))
    return model.eval()


def _merged(case: Case, folder: Path) -> Any:
    model = spectune.merge(step(case.adapt(), case))
    model.save_pretrained(folder)
    return model


# -- libraries around transformers, whose models answer with other things

TEXTS = ["say one", "say hello two", "what is ten"]


def _sentences(case: Case, folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    make_tokenizer().save_pretrained(case.folder)
    body = Transformer(str(case.folder))
    torch.manual_seed(7)
    model = SentenceTransformer(modules=[body, Pooling(32), Dense(32, 16)], device="cpu")
    model.save(str(case.folder) + "-sentences")
    _learn_sentences(_adapted(model, case), lambda: model(model.preprocess(TEXTS))["sentence_embedding"])
    model.save_pretrained(str(folder))
    return model


def _adapted(model: Any, case: Case) -> Any:
    norm = FAMILIES[case.family].norm.partition(".")[2]
    options: Any = {"modules_to_save": [norm]} if case.kind == "a module by name" else {}
    spectune.adapt(model, case.method, **options)
    if case.kind == "a norm by requires_grad":
        model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith(norm))).requires_grad_(True)
    return model


def _learn_sentences(model: Any, forward: Callable[[], Any]) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-2)
    model.train()
    forward().float().pow(3).sum().backward()
    optimizer.step()
    model.eval()


def _read_sentences(case: Case, folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def _embed(model: Any, case: Case) -> Tensor:
    return model.encode(TEXTS, convert_to_tensor=True)


def _setfit(case: Case, folder: Path) -> Any:
    import setfit

    _sentences(case, Path(f"{folder}-before"))  # for the base as a folder of sentence-transformers
    model = setfit.SetFitModel.from_pretrained(f"{case.folder}-sentences", labels=["a", "b", "c"])
    body = model.model_body
    _learn_sentences(_adapted(body, case), lambda: body(body.preprocess(TEXTS))["sentence_embedding"])
    model.model_head.fit(body.encode(TEXTS), ["a", "b", "c"])
    model.save_pretrained(str(folder))
    return model


def _read_setfit(case: Case, folder: Path) -> Any:
    import setfit

    return setfit.SetFitModel.from_pretrained(str(folder))


def _chances(model: Any, case: Case) -> Tensor:
    return torch.as_tensor(model.predict_proba(TEXTS)).float()


def _unet(case: Case, folder: Path) -> Any:
    import diffusers

    torch.manual_seed(0)
    blocks: Any = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "block_out_channels": (8, 16)}
    blocks["up_block_types"] = ("AttnUpBlock2D", "UpBlock2D")
    model = diffusers.UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, attention_head_dim=4, **blocks)
    spectune.adapt(model, case.method)
    if case.kind == "a norm by requires_grad":
        model.conv_norm_out.requires_grad_(True)
    _learn_sentences(model, lambda: _denoise(model, case))
    model.save_pretrained(folder)
    return model


def _read_unet(case: Case, folder: Path) -> Any:
    import diffusers

    return diffusers.UNet2DModel.from_pretrained(folder)


def _denoise(model: Any, case: Case) -> Tensor:
    return model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 5).sample


class Saver(NamedTuple):
    """A way to save, the documented way to load, and the families and kinds that it cannot be tried on."""

    save: Callable[[Case, Path], Any]
    load: Callable[[Case, Path], Any]
    families: Iterable[str] = FAMILIES
    not_of: Iterable[str] = ()
    ask: Callable[[Any, Case], Tensor] = answer
    library: str = "transformers"


_NOT_IN_RUNS = ("a norm by requires_grad", "rows of new tokens", "biases", "BatchNorm's statistics")
_WRITES_TEXT = ("Llama", "GPT-2", "Qwen3-MoE")
_TRANSFORMERS_OWN = ("a new head", "rows of new tokens", "an embedding", "biases", "BatchNorm's statistics")
SAVERS = {
    "`extract(model).save`, read by `attach(base, Adapter.load)`": Saver(_adapter, _attached),
    "`spectune train`, the run's folder": Saver(_run, _attached, _WRITES_TEXT, _NOT_IN_RUNS),
    "`export`, read by PEFT": Saver(_exported, _by_peft),
    "`export`, read by `Adapter.from_peft`": Saver(_exported, _from_peft),
    "`model.save_pretrained`": Saver(_save_pretrained, _from_pretrained),
    "`merge`, then `save_pretrained`": Saver(_merged, _from_pretrained),
    "`adapt(part)`, then `save_pretrained` of the whole": Saver(_outer, _from_pretrained),
    "transformers' `Trainer.save_model`": Saver(_trainer, _from_pretrained),
    "TRL's `SFTTrainer.save_model`": Saver(_sft, _from_pretrained, _WRITES_TEXT, ("a new head",)),
    "a pipeline's `save_pretrained`": Saver(_pipeline, _from_pretrained, _WRITES_TEXT, ("a new head",)),
    "accelerate's `save_model`": Saver(_accelerate, _from_pretrained),
    "`safetensors.torch.save_model`, read by `load_model` into the base": Saver(_safetensors, _into_base),
    "`torch.save(model.state_dict())`, read into the adapted model": Saver(_state, _into_adapted),
    "sentence-transformers' `save_pretrained`": Saver(
        _sentences, _read_sentences, ("BERT",), _TRANSFORMERS_OWN, _embed, "sentence_transformers"
    ),
    "SetFit's `save_pretrained`": Saver(_setfit, _read_setfit, ("BERT",), _TRANSFORMERS_OWN, _chances, "setfit"),
    "diffusers' `save_pretrained`": Saver(
        _unet, _read_unet, ("UNet",), (*_TRANSFORMERS_OWN, "a module by name"), _denoise, "diffusers"
    ),
}


def is_of(family: str, kind: str, saver: Saver) -> bool:
    """Whether a family has a kind and can be saved so, by what is installed."""
    if kind in saver.not_of or importlib.util.find_spec(saver.library) is None:
        return False
    if family == "LeViT":
        return kind in ("layers alone", "BatchNorm's statistics")
    return kind != "BatchNorm's statistics" and not (family == "T5" and kind == "biases")  # it has none


def outcomes(cases: Iterable[tuple[str, str, str]], root: Path, method: str = "lora:rank=2") -> dict[Any, str]:
    """Return "equal", "refused: why" or what is wrong, by saver, kind and family."""
    found, waiting = {}, []
    for number, key in enumerate(cases):
        saver, kind, family = key
        case = Case(family, kind, method, str(root))
        _write_base(case)
        folder = root / f"case-{number}"
        torch.manual_seed(number)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = SAVERS[saver].save(case, folder)
        except Exception as error:
            known = isinstance(error, SpectuneError)
            found[key] = f"refused: {error}" if known else f"WRONG: {type(error).__name__}: {str(error)[:200]}"
            continue
        with torch.no_grad():
            asked = SAVERS[saver].ask(model, case)
        if SAVERS[saver].library == "transformers":
            torch.manual_seed(50 + number)
            far = (answer(case.base(), case) - asked).abs().max() / asked.abs().max()
            assert far > 3e-2, f"{key}: the step did nothing"
        safetensors.torch.save_file({"answer": asked.contiguous()}, f"{folder}.answer")
        waiting.append((key, case, str(folder)))
    if waiting:
        (root / "waiting.json").write_text(json.dumps([(key[0], case, folder) for key, case, folder in waiting]))
        command = [sys.executable, "-W", "ignore", __file__, "--load", str(root)]
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        told = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
        assert told.returncode == 0, told.stderr[-3000:]
        errors = json.loads((root / "errors.json").read_text())
        for (key, _, _), error in zip(waiting, errors, strict=True):
            found[key] = "equal" if error is None else f"WRONG: {error}"
    return found


def _write_base(case: Case) -> None:
    if case.family not in FAMILIES or case.folder.exists():
        return
    torch.manual_seed(0)
    model = FAMILIES[case.family].make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name.lower():
                parameter.mul_(4)
    model.save_pretrained(case.folder)


def load_all(root: Path) -> None:
    """Load what was saved, in this process, and write how far each answer is off, or None."""
    found = []
    for number, (saver, fields, folder) in enumerate(json.loads((root / "waiting.json").read_text())):
        case, asked = Case(*fields), safetensors.torch.load_file(f"{folder}.answer")["answer"]
        torch.manual_seed(1000 + number)
        try:
            with torch.no_grad():
                error = SAVERS[saver].ask(SAVERS[saver].load(case, Path(folder)), case) - asked
            error = float(error.abs().max() / asked.abs().max())
            found.append(None if error < 1e-3 else f"off by {error:.1e}")
        except Exception as problem:
            found.append(f"{type(problem).__name__}: {str(problem)[:200]}")
    (root / "errors.json").write_text(json.dumps(found))


@cache
def all_cases() -> list[tuple[str, str, str]]:
    """Return every saver with every kind in every family that has it."""
    return [(s, k, f) for s, saver in SAVERS.items() for k in KINDS for f in saver.families if is_of(f, k, saver)]


def table(found: dict[Any, str]) -> str:
    """Return the outcomes as a table of Markdown: where families differ, those that were refused are named."""
    rows = []
    for saver in SAVERS:
        cells = []
        for kind in KINDS:
            words = {f: text.partition(":")[0] for (s, k, f), text in found.items() if (s, k) == (saver, kind)}
            refused = [f for f, word in words.items() if word != "equal"]
            mixed = refused and len(refused) < len(words)
            cells.append(f"equal; {', '.join(refused)}: refused" if mixed else next(iter(words.values()), ""))
        rows.append(f"| {saver} | {' | '.join(cells)} |")
    return "\n".join([f"| | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}", *rows])


def write(found: dict[Any, str]) -> None:
    """Put the table and the sentences of what was refused into docs/saving.md."""
    wrong = {key: text for key, text in found.items() if not text.startswith(("equal", "refused: "))}
    assert not wrong, wrong
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    made = f"{BEGIN}\n\n{table(found)}\n\n{END}"
    TABLE.write_text(before + made + after, encoding="utf-8")


def main() -> None:
    """Try everything and write the table, or what the arguments say a part of, and print it."""
    tf.utils.logging.disable_progress_bar()
    tf.utils.logging.set_verbosity_error()
    names = sys.argv[1:]
    cases = [case for case in all_cases() if not names or any(n in " ".join(case) for n in names)]
    with tempfile.TemporaryDirectory() as root:
        found = outcomes(cases, Path(root))
    for key, text in found.items():
        if text != "equal":
            print(*key, "->", text)
    print(sum(text == "equal" for text in found.values()), "equal of", len(found))
    if not names:
        write(found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        load_all(Path(sys.argv[2]))
    else:
        main()
