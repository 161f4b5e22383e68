"""shardwright: a compiler for parallelism. Names are resolved on first use, so that importing costs nothing.

make_plan, apply_plan, auto_parallelize, plan_model, choose_update (api.py); Plan (planner/plan.py); load_plan, save_plan;
Report (cli/report/notebook.py); export_plan (cli/export.py); keep_pages (profiles/heap.py); the errors.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "make_plan": "api", "apply_plan": "api", "auto_parallelize": "api", "plan_model": "api", "PlanResult": "api",
    "choose_update": "api",
    "Plan": "planner.plan", "load_plan": "planner.planfile", "save_plan": "planner.planfile",
    "Cluster": "planner.cluster", "parse_cluster": "profiles.devices", "ParallelModule": "runtime.module",
    "ShardwrightError": "errors", "CaptureError": "errors", "ClusterError": "errors", "PinError": "errors",
    "PlanError": "errors", "PlanMismatch": "errors", "UsageError": "errors", "UnsupportedOp": "errors",
    "LaunchError": "errors", "Infeasible": "errors", "CheckpointError": "errors",
    "save_checkpoint": "runtime.state", "load_checkpoint": "runtime.state", "finish_saving": "runtime.state",
    "export_safetensors": "runtime.weights", "load_safetensors": "runtime.weights", "keep_pages": "profiles.heap",
    "Report": "cli.report.notebook", "export_plan": "cli.export",
}  # fmt: skip
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shardwright' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
