"""The configs: PEFT's names, and one sentence for what a method does not have."""

import subprocess
import sys

import pytest
from peft import PeftConfig, PeftType

import spectune
import spectune.peft as sp
from spectune.peft.config import CONFIGS


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_comes_back_as_it_was(config, tmp_path):
    made = config(target_modules=["a", "b"], modules_to_save=["head"], use_dora=True)
    made.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert type(read) is config
    assert read.to_dict() == made.to_dict()
    assert read.peft_type is PeftType(made.peft_type.value)
    assert read.peft_type.value == made.peft_type == str(made.peft_type.value)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: sp.SVFConfig(r=8), r"unexpected keyword argument 'r': SVF trains along all .* LoRAXSConfig"),
        (lambda: sp.SVFTConfig(lora_dropout=0.1), "SVFT has no branch"),
        (lambda: sp.LoRAXSConfig(lora_dropout=0.1), "LoRAXS has no branch"),
        (lambda: sp.SVFConfig(target_module=["x"]), "did you mean 'target_modules'"),
        (lambda: sp.SVFConfig(parametrization="x"), "parametrization of SVF must be one of plain, sigmoid"),
        (lambda: sp.MiLoRAConfig(r=0), "r of MiLoRA must be an integer >= 1"),
        (lambda: sp.MiLoRAConfig(lora_dropout=2), "lora_dropout of MiLoRA must be a number"),
        (lambda: sp.SVFConfig(bias="lora_only"), 'bias must be "none", "all" or "svf_only"'),
        (lambda: sp.SVFConfig(format_version=3), r"format version 3.*reads 2"),
    ],
)
def test_what_a_method_does_not_have_is_told(make, said):
    with pytest.raises(spectune.SpectuneError, match=said):
        make()


def test_importing_spectune_brings_neither_peft_nor_transformers():
    told = "import sys, spectune; print({'peft', 'transformers'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"
