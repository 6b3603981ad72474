"""What routing costs with your model and library: time and memory compared with PEFT, in one interleaved run."""

from spectr.benchmark.comparison import Outcome, benchmark
from spectr.benchmark.measure import Timing, measure
from spectr.benchmark.subjects import PEERS, Subject, write_lookalikes

__all__ = ["PEERS", "Outcome", "Subject", "Timing", "benchmark", "measure", "write_lookalikes"]
