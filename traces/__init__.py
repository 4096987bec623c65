"""Request traces: reading public formats, generating synthetic ones, and describing both.

``read`` or ``generate`` makes a ``Trace``; ``stats`` describes it; ``write`` keeps it.
"""

from traces.native import write
from traces.reader import detect, read
from traces.schema import Chains, Trace, TraceError
from traces.stats import stats
from traces.synthetic import generate

__all__ = ["Chains", "Trace", "TraceError", "detect", "generate", "read", "stats", "write"]
