"""accelerate's FSDP2, by transformers' trainer and ours: two processes train what one trains."""

import pytest
from ecosystem_cases import KINDS
from several import check


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainer", ["plain", "trainer_for"])
def test_fsdp2(kind, trainer, tmp_path):
    check(tmp_path, "fsdp2", kind, trainer)
