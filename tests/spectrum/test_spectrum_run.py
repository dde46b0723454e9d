"""The whole report on tiny models: its numbers, its files, and what can be done with them."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import spectune
import tiny
from pages.test_html import check_page
from spectrum.checkpoints import gguf, matrix, saved, sharded, tensors
from spectune.errors import SpectuneError
from spectune.layers.adapted import adapted_layers
from spectune.model.targets import resolve
from spectune.spectrum.checkpoint import open_checkpoint
from spectune.spectrum.collect import collect
from spectune.spectrum.document import GAP, Spectra, describe
from spectune.spectrum.run import report
from spectune.training.config import load_config
from training.folder import make_model, save_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_folder(tmp_path_factory.mktemp("base")))


def trained(method, folder, model=None):
    """Save an adapter that has moved."""
    model = make_model().eval() if model is None else model
    spectune.adapt(model, method)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.adapters.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapter = spectune.extract(model)
    adapter.save(folder)
    return adapter


@pytest.fixture(scope="module")
def all_of_it(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    other = make_model(num_hidden_layers=3)
    other.save_pretrained(folder / "other")
    adapter = trained("lora:rank=2", folder / "adapter")
    out = folder / "out"
    document = report(base, out, compare=str(folder / "other"), adapter=folder / "adapter", low=0.5, high=2.0)
    return document, out, adapter


def exact_values():
    model = make_model()
    return {
        f"{name}.weight": torch.linalg.svdvals(module.weight.double()).detach().numpy()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def test_numbers(all_of_it):
    document, _, _ = all_of_it
    exact = exact_values()
    assert {row.name for row in document.matrices} == set(exact)
    pooled = np.concatenate(list(exact.values()))
    s = document.summary
    assert s.values == len(pooled)
    assert s.share == pytest.approx(((pooled >= 0.5) & (pooled <= 2)).mean())
    assert s.share + s.below + s.above == pytest.approx(1)
    assert s.middle_99 == pytest.approx(np.quantile(pooled, [0.005, 0.995]).tolist(), rel=1e-4)
    shares = [((pooled >= a) & (pooled <= 4 * a)).mean() for a in pooled]
    assert s.best_window.share == pytest.approx(max(shares), abs=2 / len(pooled))
    assert f"{s.share:.1%} of the {len(pooled):,} singular values" in document.answer[0]
    assert "Gemma" not in document.answer[0]  # another range than the article's
    kinds = {kind.kind: kind for kind in document.kinds}
    q = np.concatenate([S for name, S in exact.items() if "q_proj" in name])
    assert kinds["q_proj"].share == pytest.approx(((q >= 0.5) & (q <= 2)).mean())


def test_files(all_of_it):
    document, out, _ = all_of_it
    assert json.loads((out / "spectrum.json").read_text()) == json.loads(document.model_dump_json(exclude_unset=True))
    assert (out / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.tmp"))
    page = (out / "spectrum.html").read_text()
    outline = check_page(page)
    assert len(outline.all("svg")) == 1 + 7 + 4 + 5
    assert not any(word in page for word in (">nan<", ">None<", ">inf<"))
    assert document.answer[0] in page


def test_two_models_side_by_side(all_of_it):
    other = all_of_it[0].compare
    assert other.label == "other"
    assert len(other.pairs) == 14  # two layers of three
    first = next(p for p in other.pairs if p.name == "model.layers.0.self_attn.q_proj.weight")
    S, T = (
        torch.linalg.svdvals(model.model.layers[0].self_attn.q_proj.weight.double()).detach()
        for model in (make_model(), make_model(num_hidden_layers=3))
    )
    assert first.distance == pytest.approx(float((S - T).norm() / S.norm()), abs=1e-5)


def test_what_the_adapter_moved(all_of_it):
    document, _, adapter = all_of_it
    found = {f"{row.kind}{row.layer}": row for row in document.adapter.matrices}
    assert len(found) == 14
    model = make_model()
    W = model.model.layers[1].mlp.up_proj.weight.detach()
    expected = adapter.delta("model.layers.1.mlp.up_proj").norm() / W.norm()
    row = found["up_proj1"]
    assert row.relative_norm == pytest.approx(float(expected), rel=1e-4)
    assert (row.update_rank, "after" in row) == (2, False)
    assert document.adapter.summary.chance == pytest.approx(2 / 32, rel=0.5)


def test_the_ranks_go_back_into_training(base, all_of_it):
    document, out, _ = all_of_it
    config = load_config(out / "overrides.yaml", ["data=x.jsonl", "output=y"])
    assert config.model == base
    methods = resolve(make_model(), config.parsed_method(), config.targets, config.exclude, config.overrides)
    advised = document.recommendation.ranks
    assert {name: method.rank for name, method in methods.items()} == advised
    adapted = spectune.adapt(make_model(), config.parsed_method(), overrides=config.overrides)
    count = spectune.extract(adapted).parameter_count()
    assert count == document.recommendation.lora_parameters


def test_another_method_takes_the_ranks(base, tmp_path):
    report(base, tmp_path, method="dora:inner=pissa", rank=3, ranks=(1, 4), targets=["q_proj", "up_proj"])
    config = load_config(tmp_path / "overrides.yaml", ["data=x.jsonl", "output=y"])
    assert len(config.overrides) == 4
    methods = resolve(make_model(), config.parsed_method(), overrides=config.overrides)
    assert methods["model.layers.0.self_attn.q_proj"].name == "dora"
    assert all(1 <= m.inner.rank <= 4 for m in methods.values())


def test_a_basis_is_found_again_without_the_model(base, tmp_path):
    adapter = trained("svf", tmp_path / "svf")
    document = report(base, tmp_path / "out", adapter=tmp_path / "svf")
    row = next(r for r in document.adapter.matrices if (r.kind, r.layer) == ("q_proj", 0))
    name = "model.layers.0.self_attn.q_proj"
    model = make_model()
    size = adapter.bind(model).delta(name).norm() / model.get_submodule(name).weight.detach().norm()
    assert row.relative_norm == pytest.approx(float(size), rel=1e-3)


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    other = make_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    trained("svf", tmp_path / "svf", other)
    with pytest.raises(SpectuneError, match=r"another base: the weight of 'model\.layers\.0\.mlp\.up_proj'"):
        report(base, tmp_path / "out", adapter=tmp_path / "svf")
    trained("lora:rank=1", tmp_path / "bert", tiny.bert())
    with pytest.raises(SpectuneError, match=r"no layer of the adapter .*'bert\..*': not among the measured matrices"):
        report(base, tmp_path / "out", adapter=tmp_path / "bert")


@pytest.mark.parametrize("without", ["exclude", "not finite", "unreadable"])
def test_layers_of_the_adapter_without_a_matrix_are_named(base, tmp_path, without):
    trained("lora:rank=2", tmp_path / "adapter")
    lost, held = "model.layers.1.mlp.up_proj", make_model().state_dict()
    if without == "not finite":
        held[f"{lost}.weight"][0, 0] = torch.nan
    folder, files = sharded(tmp_path / "model", {name: t for name, t in held.items() if name != "lm_head.weight"})
    if without == "unreadable":
        (folder / files[f"{lost}.weight"]).write_bytes(b"")
    exclude = r".*\.1\.mlp\.up_proj" if without == "exclude" else ""
    document = report(str(folder), tmp_path / "out", adapter=tmp_path / "adapter", exclude=exclude)
    assert len(document.adapter.matrices) == 13
    assert document.adapter.skipped == {lost: "not among the measured matrices"}
    page = (tmp_path / "out" / "spectrum.html").read_text()
    check_page(page)
    assert "Layers left out" in page


def test_a_new_head_is_left_out(tmp_path):
    model = BertForSequenceClassification(BertConfig(**tiny.BERT)).eval()
    model.bert.save_pretrained(tmp_path / "base")
    spectune.adapt(model, "lora:rank=2", overrides={"classifier": spectune.Head()})
    spectune.extract(model).save(tmp_path / "adapter")
    document = report(str(tmp_path / "base"), tmp_path / "out", adapter=tmp_path / "adapter")
    assert len(document.adapter.matrices) == 2 * 6 + 1
    assert list(document.adapter.skipped) == ["classifier"]
    assert "trained whole" in document.adapter.skipped["classifier"]


def test_two_groups_are_found_where_there_are(tmp_path):
    held = tensors()
    for name in held:
        if name.endswith("q_proj.weight"):
            U, _, Vh = torch.linalg.svd(held[name])
            held[name] = U * torch.cat([torch.full((4,), 9.0), torch.full((12,), 1.0)]) @ Vh
    checkpoint = open_checkpoint(str(saved(tmp_path / "model", held)))
    document = describe(Spectra(checkpoint, *collect(checkpoint, tmp_path)))
    assert document.summary.gaps - document.summary.gaps_after_the_first == 2
    row = next(r for r in document.matrices if r.kind == "q_proj")
    assert row.gap > GAP
    assert row.gap_after == 4
    assert "2 of 6 matrices have" in document.answer[2]
    assert "a big group stands apart" in document.answer[2]
    assert "Gemma-2 9B" in document.answer[0]


def test_what_cannot_be_measured_is_marked(tmp_path):
    held = tensors()
    held["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.inf
    document = report(str(saved(tmp_path / "model", held)), tmp_path)
    assert "not finite" in document.skipped["model.layers.0.mlp.up_proj.weight"]
    page = (tmp_path / "spectrum.html").read_text()
    assert "1 tensor could not be measured" in page
    assert "model.layers.0.mlp.up_proj.weight" in page


def test_experts_share_a_row_and_gguf_has_no_overrides(tmp_path):
    held = {f"blk.{i}.ffn_up_exps.weight": torch.stack([matrix(32, 64, 3 * i + j) for j in range(3)]) for i in (0, 1)}
    document = report(str(gguf(tmp_path / "model.gguf", held)), tmp_path)
    assert len(document.matrices) == 6
    assert document.recommendation.ranks == {}
    assert not (tmp_path / "overrides.yaml").exists()
    assert "32 x 64 (3)" in (tmp_path / "spectrum.html").read_text()


def test_degenerate_matrices_have_a_report(tmp_path):
    held = {"layers.0.a.weight": torch.zeros(9, 9), "b.weight": torch.ones(1, 30)}
    document = report(str(saved(tmp_path / "model", held)), tmp_path)
    assert document.summary.fitted == 0
    check_page((tmp_path / "spectrum.html").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 2, "high": 1}, "0 < low < high"),
        ({"rank": 3}, "least <= mean <= greatest"),
        ({"method": "svf"}, "rank"),
        ({"epsilon": 0}, "epsilon in"),
        ({"adapter": "nowhere"}, "there is no adapter folder"),
        ({"compare": "./nowhere"}, "there is no model folder"),
        ({"targets": ["q_proj"], "exclude": ["q_proj"]}, "exclude takes away every target"),
    ],
)
def test_wrong_arguments(base, tmp_path, options, message):
    with pytest.raises(SpectuneError, match=message):
        report(base, tmp_path, **options)
    assert not list(tmp_path.iterdir())  # before anything was measured


def test_without_a_layer_of_the_model_there_is_no_file(tmp_path):
    tiny.vit().save_pretrained(tmp_path / "model")  # transformers calls its layers other than it stores them
    (tmp_path / "values-0.jsonl").write_text("of an earlier run")
    (tmp_path / "overrides.yaml").write_text("of an earlier run")
    document = report(str(tmp_path / "model"), tmp_path)
    assert document.recommendation.without_override == len(document.recommendation.ranks) == 13
    assert not (tmp_path / "overrides.yaml").exists()


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_only_layers_that_the_model_has_are_overridden(architecture, tmp_path):
    model = tiny.ARCHITECTURES[architecture]()
    model.save_pretrained(tmp_path / "model")
    document = report(str(tmp_path / "model"), tmp_path)
    config = load_config(tmp_path / "overrides.yaml", ["data=x.jsonl", "output=y"])
    methods = resolve(model, config.parsed_method(), overrides=config.overrides)  # none that matches nothing
    alone = [name for name in methods if ".experts." not in name]
    assert len(config.overrides) == len(alone) == 8  # not experts, which a checkpoint holds otherwise, and not routers
    lost = document.recommendation.without_override
    assert lost == len(document.recommendation.ranks) - 8
    assert ("not layers under that name" in (tmp_path / "spectrum.html").read_text()) == (lost > 0)
