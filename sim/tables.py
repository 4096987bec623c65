"""Tables that fill up during a run, row by row, at little cost per row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sim.request import PS_PER_S


class Columns:
    """A table that grows by packed rows of doubles: times in picoseconds, kept in seconds."""

    def __init__(self, *columns: tuple[str, str]) -> None:
        self._columns = columns
        self._bytes = bytearray()
        self.append = self._bytes.extend

    def table(self) -> pd.DataFrame:
        values = np.frombuffer(bytes(self._bytes)).reshape(-1, len(self._columns))
        return pd.DataFrame(
            {
                name: values[:, i] / PS_PER_S if name.endswith("_s") else values[:, i].astype(kind)
                for i, (name, kind) in enumerate(self._columns)
            }
        )


def labels(values: Sequence[str]) -> pd.Series:
    """A column of texts, few of which differ, in a few bytes per row."""
    return pd.Series(list(values), dtype="category")
