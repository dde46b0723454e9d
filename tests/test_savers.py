"""A part of tests/savers.py: what is saved comes back in another process, or saving was refused; the docs say which."""

import pytest
import transformers

import savers

FEW = {
    "`extract(model).save`, read by `attach(base, Adapter.load)`": [("a norm by requires_grad", "BERT")],
    "`spectune train`, the run's folder": [("a new head", "Llama")],
    "`export`, read by PEFT": [("rows of new tokens", "Llama"), ("BatchNorm's statistics", "LeViT")],
    "`model.save_pretrained`": [("a new head", "BERT"), ("BatchNorm's statistics", "LeViT")],
    "`adapt(part)`, then `save_pretrained` of the whole": [("layers alone", "GPT-2"), ("an embedding", "Llama")],
    "transformers' `Trainer.save_model`": [("a module by name", "GPT-2")],
    "accelerate's `save_model`": [("an embedding", "Llama")],
    "`safetensors.torch.save_model`, read by `load_model` into the base": [("biases", "BERT")],
    "`torch.save(model.state_dict())`, read into the adapted model": [("rows of new tokens", "BERT")],
}


def _check(found):
    rows = {row.split(" | ")[0]: row.split(" | ")[1:] for row in savers.TABLE.read_text().splitlines()}
    for (saver, kind, family), text in found.items():
        assert text.startswith(("equal", "refused: ")), (saver, kind, family, text)
        cell = rows[f"| {saver}"][list(savers.KINDS).index(kind)].removesuffix(" |")
        refused = cell == "refused" or (cell.startswith("equal;") and family in cell)
        assert refused == text.startswith("refused"), f"docs/saving.md says {cell!r} of {saver}, {kind}, {family}"


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("method", ["lora:rank=2", "svf"])
def test_what_was_trained_is_what_another_process_loads(tmp_path, method):
    cases = [(saver, *case) for saver, of in FEW.items() for case in of]
    if method != "lora:rank=2":
        cases = [case for case in cases if "run" not in case[0] and "Trainer" not in case[0]]
    _check(savers.outcomes(cases, tmp_path, method))


@pytest.mark.slow
def test_every_way_of_saving_everything(tmp_path):
    _check(savers.outcomes(savers.all_cases(), tmp_path))
