"""The checkpoints that a run keeps in its folder."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pcl.checkpoint import NAMES, CheckpointError, load, wrong_fields


def newest(folder: Path, tell: Callable[[str], Any] = str) -> Path | None:
    """The checkpoint in a run's folder that is furthest on; None if there is none.

    Passes over one that cannot be opened and calls `tell` with a line about it. Opens numbered ones from the newest down to
    the first good one: finding damage means reading the whole file.
    """
    found = []
    for number, path in sorted(_numbered(folder), reverse=True):
        try:
            state = {"steps": 0} | load(path, map_location="meta")
        except CheckpointError as error:
            tell(f"skipped: {error}")
            continue
        if not wrong_fields(state, ["epoch", "steps"]):
            found.append((state["epoch"], state["steps"], path))
            if number < math.inf:
                break
    return max(found)[2] if found else None


def prune(folder: Path, keep: int, keep_every: int) -> None:
    """Remove a run's numbered checkpoints except the `keep` newest (0: all) and those of every `keep_every`-th epoch."""
    numbered = sorted((number, path) for number, path in _numbered(folder) if number < math.inf)
    for epoch, path in numbered[:-keep] if keep else []:
        if not keep_every or (epoch + 1) % keep_every:
            path.unlink()


def _numbered(folder: Path) -> list[tuple[float, Path]]:
    """A run's checkpoints with their numbers; infinity if the name has none."""
    found = [(re.search(r"_(\d+)\.pth", path.name), path) for path in folder.glob(NAMES)]
    return [(int(match[1]) if match else math.inf, path) for match, path in found]
