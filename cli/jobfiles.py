"""Files that start a plan on several machines: a script for each machine, a SLURM batch file, a Kubernetes PyTorchJob.

Those of schedulers hold the torchrun command of `shardwright run`, the script `shardwright run` itself. What a user named is quoted
for the shell, or written as a JSON string, which is YAML too. Names that a scheduler reads unquoted are checked instead.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LaunchError, UsageError
from ..planner.cluster import Cluster, unlike
from ..planner.plan import Plan
from ..planner.planfile import dump_plan
from .launch import mesh_text

PORT = 29500
HOST_SHARE = 0.9
"""Of a node's memory; the rest is the system's."""
CONFIG_MAP_BYTES = 1_000_000
"""A ConfigMap holds at most 1 MiB (Kubernetes), names and all."""
FOLDER = "/etc/shardwright"
"""Where a container finds the plan."""


@dataclass(frozen=True, slots=True)
class JobShape:
    """What a job asks for: machines, ranks on each, GPUs on each (0: CPU ranks), and bytes of host memory on each (0: unknown)."""

    nodes: int
    per_node: int
    gpus: int
    gpu_resource: str
    memory_bytes: int
    mesh: str


def job_shape(plan: Plan, memory_bytes: int | None = None) -> JobShape:
    """The shape of a plan's job; raises LaunchError where its cluster has no equal machines.

    Host memory is `memory_bytes`, else nine tenths of what a node of the plan's cluster has (its share where less than a node is
    used); of CPU ranks it is their limits.
    """
    cluster, ranks = Cluster.from_dict(plan.cluster), plan.ranks
    if unlike(cluster):
        raise LaunchError(
            f"{cluster.name} has several kinds of devices; files for such a cluster are not supported yet"
        )
    per_node = min(cluster.per_node, ranks)
    if ranks % per_node:
        raise LaunchError(
            f"{ranks} ranks ({mesh_text(plan)}) are not a whole number of nodes of {per_node}; plan again"
        )
    gpu = cluster.device.kind != "cpu"
    if memory_bytes is None and cluster.host is not None and gpu:
        memory_bytes = int(HOST_SHARE * cluster.host.scaled(per_node).host_bytes)
    elif memory_bytes is None and not gpu:
        memory_bytes = per_node * plan.memory_limit_bytes
    resource = "amd.com/gpu" if re.match(r"mi\d", cluster.device.name) else "nvidia.com/gpu"
    return JobShape(ranks // per_node, per_node, per_node if gpu else 0, resource, memory_bytes or 0, mesh_text(plan))


def job_name(text: str) -> str:
    """A name that SLURM and Kubernetes both take unquoted; raises UsageError."""
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", text):
        raise UsageError(f"--name {text!r}: expected at most 42 small letters, digits and dashes, such as llama-8b")
    return text


def shell_file(shape: JobShape, plan: str, rest: Sequence[str]) -> str:
    """A POSIX shell script that is started on every machine; `rest` is what `shardwright run` gets after its own options.

    It starts `shardwright run`, not torchrun, as only that finds the address and the interface by which the others see a machine.
    """
    lines = ["#!/bin/sh", _headline(shape)]
    command = ["shardwright", "run", plan]
    if shape.nodes == 1:
        return _lines([*lines, "set -eu", f"exec {shlex.join([*command, *rest])}"])
    lines += [
        "# On every machine: sh FILE NODE_RANK HOST:PORT, where HOST is the machine with NODE_RANK 0.",
        "set -eu",
        'if [ "$#" -ne 2 ]; then',
        '    echo "usage: $0 NODE_RANK HOST:PORT" >&2',
        "    exit 2",
        "fi",
        f"exec {shlex.join(command)} --nnodes={shape.nodes} --nproc-per-node={shape.per_node} \\",
        f'    --node-rank="$1" --rdzv-endpoint="$2" {shlex.join(rest)}',
    ]
    return _lines(lines)


def slurm_file(shape: JobShape, target: Sequence[str], name: str) -> str:
    """A batch file for `sbatch`: one task a node, which is torchrun."""
    memory = f"{-(-shape.memory_bytes // 2**20)}M" if shape.memory_bytes else "0"  # 0: all of the node's
    lines = [
        "#!/bin/bash",
        _headline(shape),
        f"#SBATCH --job-name={job_name(name)}",
        f"#SBATCH --nodes={shape.nodes}",
        "#SBATCH --ntasks-per-node=1",
        *([f"#SBATCH --gpus-per-node={shape.gpus}"] if shape.gpus else []),
        f"#SBATCH --mem={memory}",
        "#SBATCH --exclusive",
        "set -euo pipefail",
        *_threads(shape),
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"srun --cpu-bind=none torchrun --nnodes={shape.nodes} --nproc-per-node={shape.per_node} \\",
        f'    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:{PORT}" \\',
        f"    {shlex.join(target)}",
    ]
    return _lines(lines)


def kubernetes_file(shape: JobShape, plan: Plan, target: Sequence[str], name: str, image: str) -> str:
    """A ConfigMap with the plan and a PyTorchJob (kubeflow.org/v1) that runs it, as YAML.

    The operator sets RANK (of the pod), MASTER_ADDR and MASTER_PORT, which Kubernetes fills into the arguments. Raises UsageError
    for a plan that no ConfigMap holds.
    """
    text = dump_plan(plan)
    if len(text.encode()) > CONFIG_MAP_BYTES:
        raise UsageError(
            f"the plan has {len(text.encode()):,} bytes, a ConfigMap holds 1 MiB; "
            "put it into the image and use --to shell in the container"
        )
    job_name(name)
    command = [
        "torchrun", f"--nnodes={shape.nodes}", f"--nproc-per-node={shape.per_node}", "--node-rank=$(RANK)",
        "--master-addr=$(MASTER_ADDR)", "--master-port=$(MASTER_PORT)", *(t.replace("$", "$$") for t in target),
    ]  # fmt: skip
    roles = [("Master", 1)] + ([("Worker", shape.nodes - 1)] if shape.nodes > 1 else [])
    lines = [
        _headline(shape),
        "apiVersion: v1",
        "kind: ConfigMap",
        "metadata:",
        f"  name: {name}-plan",
        "data:",
        f"  plan.json: {_quoted(text)}",
        "---",
        "apiVersion: kubeflow.org/v1",
        "kind: PyTorchJob",
        "metadata:",
        f"  name: {name}",
        "spec:",
        "  pytorchReplicaSpecs:",
    ]
    for role, count in roles:
        lines += _replicas(role, count, shape, name, image, command)
    return _lines(lines)


def _replicas(role: str, count: int, shape: JobShape, name: str, image: str, command: Sequence[str]) -> list[str]:
    """One kind of pods; the shared memory of a pod is 64 MB unless a volume of memory takes its place."""
    asked = [f"{shape.gpu_resource}: {shape.gpus}"] if shape.gpus else []
    asked += [f"memory: {-(-shape.memory_bytes // 2**20)}Mi"] if shape.memory_bytes else []
    resources = ["resources:", "  limits:", *(f"    {line}" for line in asked)] if asked else []
    pod = [
        "containers:",
        "  - name: pytorch",
        f"    image: {_quoted(image)}",
        "    command:",
        *(f"      - {_quoted(word)}" for word in command),
        *(f"    {line}" for line in resources),
        "    volumeMounts:",
        f"      - {{name: plan, mountPath: {FOLDER}}}",
        "      - {name: shm, mountPath: /dev/shm}",
        "volumes:",
        f"  - {{name: plan, configMap: {{name: {name}-plan}}}}",
        "  - {name: shm, emptyDir: {medium: Memory}}",
    ]
    head = [f"{role}:", f"  replicas: {count}", "  restartPolicy: Never", "  template:", "    spec:"]
    return [f"    {line}" for line in [*head, *(f"      {line}" for line in pod)]]


def _headline(shape: JobShape) -> str:
    """A comment: the mesh (names of axes come from a file, so only plain characters of them)."""
    mesh = re.sub(r"[^\w =+-]", "?", shape.mesh, flags=re.ASCII)
    return f"# shardwright: {shape.nodes * shape.per_node} ranks ({mesh}), {shape.nodes} x {shape.per_node}"


def _threads(shape: JobShape) -> list[str]:
    """CPU ranks share the cores of their machine, as they do when planned; torchrun would give each one thread."""
    if shape.gpus:
        return []
    share = f"threads=$(( $(nproc) / {shape.per_node} ))"
    return [share, 'export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( threads > 0 ? threads : 1 ))}"']


def _quoted(text: str) -> str:
    return json.dumps(text)


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
