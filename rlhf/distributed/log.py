"""The library's messages: from rank 0 only, above progress bars rather than into them."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from rlhf.distributed.place import is_main

logger = logging.getLogger("rlhf")


class _BesideProgressBars(logging.Handler):
    """Prints above a running progress bar instead of into it, at once also where the output is a file or a pipe."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def setup_logging() -> None:
    """Print the library's messages on rank 0 only, and quieten the libraries below."""
    from transformers.utils import logging as transformers_logging

    logger.handlers = [_BesideProgressBars()]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main() else logging.ERROR)
    transformers_logging.disable_progress_bar()
    for name in ("DeepSpeed", "deepspeed", "transformers", "datasets", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
