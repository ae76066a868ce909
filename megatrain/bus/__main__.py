"""One rank of a driver on this host: `python -m megatrain.bus`, with its options in a variable."""

import sys

from megatrain.bus.rank_job import run
from megatrain.bus.rank_options import RankOptions

sys.exit(run(RankOptions.from_environment()))
