"""vLLM's plug-in: SVF, SVFT and LoRA-XS beside LoRA, each as it is. Only vLLM imports it."""

from __future__ import annotations

import logging
import os

from spectune.errors import SpectuneError


def register() -> None:
    """Have vLLM take our adapters' folders where it takes LoRAs; called by vLLM in each of its processes.

    `SPECTUNE_VLLM=off` leaves vLLM as it is; `SPECTUNE_VLLM_BASES=int8` keeps singular vectors in 8 bits.
    """
    if os.environ.get("SPECTUNE_VLLM", "on").lower() in ("off", "0", "false"):
        return
    from spectune.vllm.plugin import patch  # with PyTorch, which a vLLM without us need not wait for

    try:
        patch()
    except SpectuneError as error:  # vLLM itself is to go on
        logging.getLogger("spectune").warning("%s", error)
