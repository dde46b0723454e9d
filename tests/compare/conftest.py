"""What trials of a comparison are of: two tiny models and their data, made once."""

import pytest

from compare.tiny_bench import write_data, write_encoder
from training.folder import save_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    write_encoder(path / "encoder")
    save_folder(path / "decoder")
    write_data(path / "data.jsonl")
    return path
