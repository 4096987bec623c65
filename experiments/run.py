"""One run, or with ``-m`` a sweep, by Hydra: ``python -m experiments.run chip=h100``.

The run folder is Hydra's output folder and holds the resolved ``config.yaml``.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments import report
from experiments.composing import explain, prepared
from experiments.console import FULL_ERROR, bar, note, reporting, say_all, stderr, stdout, warn
from experiments.runs import run
from sim.result import Result

__all__ = ["main"]


@hydra.main(config_path="pkg://experiments.conf", config_name="config", version_base="1.3")
def _task(config: DictConfig) -> None:
    out = Path(HydraConfig.get().runtime.output_dir)
    with reporting(full=_wants_traceback):
        try:
            with bar() as update:
                folder = run(config, out, progress=lambda done, total: update("", done, total))
        except BaseException:
            with suppress(OSError):
                out.rmdir()  # what Hydra made for a run that did not happen
            raise
    result = Result.load(folder)
    say_all(warn, report.warnings(result))
    say_all(note, report.notes(result))
    stdout().print(report.page({report.name(result): result}))
    stderr().print(f"wrote {folder}", markup=False)


_wants_traceback = os.environ.get(FULL_ERROR) == "1"


def main() -> None:
    """Entry point: bad input ends in one line and exit code 2."""
    overrides = [text for text in sys.argv[1:] if "=" in text and not text.startswith("-")]
    options = [text for text in sys.argv[1:] if text not in overrides]
    with reporting(full=_wants_traceback):
        ready = prepared(overrides)
        sys.argv[1:] = [*options, *ready]
        os.environ[FULL_ERROR] = "1"  # Hydra hands its exceptions on, and they become one line
        try:
            _task()  # pyright: ignore[reportCallIssue] - Hydra passes the configuration
        except (HydraException, OmegaConfBaseException) as error:
            if _wants_traceback:
                raise
            raise explain(error, ready) from None


if __name__ == "__main__":
    main()
