"""What `shardwright run` starts on every rank, on the ranks of a pool instead of processes of torchrun."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any


def be_rank(folder: str, arguments: list[str]) -> tuple[int, str, dict[str, Any] | None]:
    """Rank function: exit status of the program of one rank in a folder, what it said on stderr, and rank 0's result."""
    import torch.distributed as dist
    from shardwright.runtime.execute import main

    result, said = Path(f"result{dist.get_rank()}.json"), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(said):
        result.unlink(missing_ok=True)
        status = main([*arguments, f"--result={result}"])
        return status, said.getvalue(), json.loads(result.read_text()) if result.exists() else None
