"""How megatrain's own log lines look.  It configures the `megatrain` logger and nothing else."""

import logging
import os
import sys


def setup_logging(level: str | None = None) -> None:
    """Send megatrain's log lines to standard error, each with its rank when there are several.

    `level` defaults to the environment variable MEGATRAIN_LOG, then to INFO.  Calling it again
    changes the level and adds no second handler.
    """
    logger = logging.getLogger("megatrain")
    logger.setLevel((level or os.environ.get("MEGATRAIN_LOG", "INFO")).upper())
    if logger.handlers:
        return
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    where = f" rank {rank}" if world > 1 else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s{where} %(levelname)s %(message)s", datefmt="%H:%M:%S")
    )
    logger.addHandler(handler)
    logger.propagate = False


def get_logger(name: str = "main") -> logging.Logger:
    """Return a logger under `megatrain`, set up; ranks other than 0 say warnings and errors only.

    A script that every rank runs thereby says each thing once.
    """
    setup_logging()
    logger = logging.getLogger(f"megatrain.script.{name}")
    if int(os.environ.get("RANK", "0")) > 0:
        logger.setLevel(logging.WARNING)
    return logger
