"""Lightning: trained, checkpointed, gone on with to the last bit, and what its checkpoint holds."""

import lightning
import pytest
import torch
from ecosystem_cases import KINDS, ROWS, adapted, adapter_of, base, same, trained
from torch.utils.data import DataLoader

import spectune


class Module(lightning.LightningModule):
    def __init__(self, kind):
        super().__init__()
        self.model = adapted(base(), kind)

    def training_step(self, rows, index):
        return self.model(input_ids=rows, labels=rows).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(module, folder, epochs, resume=None):
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(ROWS[:4], batch_size=2), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_where_it_stopped(kind, tmp_path):
    whole = Module(kind)
    start = trained(whole.model)
    fit(whole, tmp_path, 2)
    moved = trained(whole.model)
    assert not same(start, moved)
    half = Module(kind)
    fit(half, tmp_path, 1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module(kind)
    fit(resumed, tmp_path, 2, tmp_path / "half.ckpt")
    assert same(trained(resumed.model), moved)
    adapter_of(resumed.model).save(tmp_path / "adapter")
    again = spectune.attach(base(), spectune.Adapter.load(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(again(ROWS).logits, whole.model.eval()(ROWS).logits)
    assert torch.equal(base().state_dict()["model.embed_tokens.weight"], whole.model.get_input_embeddings().weight)
