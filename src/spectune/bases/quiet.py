"""transformers without its words on the console."""

from __future__ import annotations

from transformers.utils import logging


class quiet:
    """Within the context transformers shows neither progress bars nor warnings."""

    def __enter__(self) -> None:
        self._level, self._bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        logging.set_verbosity(self._level)
        if self._bars:
            logging.enable_progress_bar()
