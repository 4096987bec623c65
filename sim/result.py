"""What a run leaves behind: tables and their origin, in memory and as a folder on disk."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from sim.metrics import summarise


class ResultError(ValueError):
    """A result that cannot be, or a run folder that cannot be read."""


@dataclass(frozen=True, slots=True)
class Result:
    """One run.

    ``requests`` has a row per request of the trace, in trace order: ``id``, ``arrival_s`` (the
    moment it reached the cluster), ``recorded_s`` (the trace's), ``admitted_s``,
    ``first_token_s``, ``finish_s`` (NaN where it never happened), ``prompt_tokens``,
    ``output_tokens`` (generated), ``cached_tokens`` (prompt tokens found in the cache at the
    first admission), ``preemptions``, ``engine`` (-1: none), ``state``, ``reason``, and the
    trace's ``session``, ``turn``, ``tenant``, ``slo_class``, ``slo_*_s``.

    ``runs`` has a row per run of equal engine steps: ``engine``, ``start_s``, ``first_s`` (the
    first step's duration), ``slope_s`` (added per further step), ``steps``, ``decodes``,
    ``prefill_tokens`` (of each step), ``waiting``, ``free_blocks``.

    ``engines`` has a row per engine: ``steps``, ``preemptions``, ``evictions``, ``kv_blocks``.

    ``decisions`` is the log of policy calls where it was asked for, else empty.
    """

    requests: pd.DataFrame
    runs: pd.DataFrame
    engines: pd.DataFrame
    meta: Mapping[str, Any]
    decisions: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __post_init__(self) -> None:
        """Check invariant I3."""
        done = self.requests[self.requests["state"] == "finished"]
        ordered = (
            (done["arrival_s"] <= done["admitted_s"])
            & (done["admitted_s"] < done["first_token_s"])
            & (done["first_token_s"] <= done["finish_s"])
        )
        if not bool(ordered.all()):
            name = str(done["id"][~ordered].iloc[0])
            raise ResultError(
                f"request {name}: arrival, admission, first token and finish are not in order"
            )

    def summary(self) -> dict[str, Any]:
        """The figures of the run; see ``sim.metrics.summarise``."""
        return summarise(self)

    def save(self, folder: str | Path, *, config: Mapping[str, Any] | None = None) -> Path:
        """Write the run folder, whole or not at all; an existing one is replaced.

        Args:
            folder: where to; Parquet tables, ``summary.json`` and ``config.yaml``.
            config: the resolved configuration that re-creates the run.
        """
        target = Path(folder)
        check_target(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            for name in ("requests", "runs", "engines", "decisions"):
                table: pd.DataFrame = getattr(self, name)
                if len(table.columns):
                    table.to_parquet(scratch / f"{name}.parquet", index=False)
            text = yaml.safe_dump(dict(config or {}), sort_keys=False)
            (scratch / "config.yaml").write_text(text)
            (scratch / "meta.json").write_text(_json(dict(self.meta)))
            (scratch / "summary.json").write_text(_json(self.summary()))
            scratch.chmod(0o755)
            replace_folder(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return target

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """Read a run folder.

        Raises:
            ResultError: it is not one.
        """
        source = Path(folder)
        if not (source / "summary.json").is_file():
            raise ResultError(f"{source}: not a run folder (no summary.json)")
        tables = {
            name: pd.read_parquet(path) if (path := source / f"{name}.parquet").is_file() else None
            for name in ("requests", "runs", "engines", "decisions")
        }
        missing = [name for name in ("requests", "runs", "engines") if tables[name] is None]
        if missing:
            raise ResultError(f"{source}: {missing[0]}.parquet is missing")
        empty = pd.DataFrame()
        return cls(
            requests=tables["requests"],  # type: ignore[arg-type]
            runs=tables["runs"],  # type: ignore[arg-type]
            engines=tables["engines"],  # type: ignore[arg-type]
            meta=json.loads((source / "meta.json").read_text()),
            decisions=empty if tables["decisions"] is None else tables["decisions"],
        )


def check_target(target: Path) -> None:
    """Refuse to write a run folder over anything else.

    Raises:
        ResultError: there is a file, or a folder with something else in it.
    """
    if not target.exists():
        return
    if not target.is_dir() or (not (target / "summary.json").exists() and any(target.iterdir())):
        raise ResultError(f"{target}: exists and is not a run folder; choose another")


def replace_folder(source: Path, target: Path) -> None:
    """Move a folder to where another one may be; that one is kept if anything goes wrong."""
    earlier = source.with_name(f"{source.name}-earlier")
    moved = target.exists()
    if moved:
        os.replace(target, earlier)
    try:
        os.replace(source, target)
    except BaseException:
        if moved:
            os.replace(earlier, target)
        raise
    if moved:
        shutil.rmtree(earlier, ignore_errors=True)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n"
