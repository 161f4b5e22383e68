"""Job files: what they ask for, that a shell and a YAML parser read them, and that nothing a user names breaks out."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import plans
import pytest
from click.testing import CliRunner, Result
from shardwright.cli.jobfiles import job_shape
from shardwright.cli.main import main
from shardwright.errors import LaunchError, ShardwrightError
from shardwright.planner.plan import Plan
from shardwright.planner.planfile import load_plan, parse_plan, save_plan
from shardwright.profiles.devices import parse_cluster

HOSTILE = "a b'; touch broken; \"$(touch broken)`touch broken`\n#SBATCH --x\nkind: Evil"


def on(cluster: str, **sizes: int) -> Plan:
    """The hand-made plan on a named cluster, with other mesh sizes."""
    axes = tuple(msgspec.structs.replace(a, size=sizes.get(a.name, a.size)) for a in plans.plan().mesh)
    source = msgspec.structs.replace(plans.plan().source, batch=8 * axes[0].size)  # 2 microbatches of 4
    return plans.plan(cluster=parse_cluster(cluster).to_dict(), mesh=axes, source=source)


def export(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["export", *arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    save_plan(on("h100-sxm:8x4", dp=8, tp=4), path)
    return path


def shell_reads(path: Path, shell: str) -> None:
    subprocess.run([shell, "-n", str(path)], check=True, timeout=20)


def test_slurm(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "job.sh"
    done = export(
        str(file), "--to", "slurm", "-o", str(out), "--name", "llama-8b", "--memory", "500GiB", "--steps", "7"
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    text = out.read_text()
    for line in ("--job-name=llama-8b", "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--mem=512000M"):
        assert f"\n#SBATCH {line}\n" in text
    assert "torchrun --nnodes=4 --nproc-per-node=8 " in text
    shell_reads(out, "bash")
    assert called(out, tmp_path, shell="bash", SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_ID="42") == [
        "--nnodes=4", "--nproc-per-node=8", "--rdzv-id=42", "--rdzv-backend=c10d", "--rdzv-endpoint=node7:29500",
        "-m", "shardwright.runtime.execute", str(file), "--steps=7",
    ]  # fmt: skip


PROGRAMS = {
    "shardwright": 'printf "%s\\0" "$@"',
    "torchrun": 'printf "%s\\0" "$@"',
    "scontrol": 'test "$*" = "show hostnames node[7-8]" && printf "node7\\nnode8\\n"',
    "srun": 'test "$1" = "--cpu-bind=none" && shift && exec "$@"',
}
"""Stand-ins for what the files start: sh scripts by name."""


def called(script: Path, folder: Path, *arguments: str, shell: str = "sh", **environment: str) -> list[str]:
    """The arguments that shardwright or torchrun gets when the script runs."""
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    own = {"PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin", **environment}
    done = subprocess.run(
        [shell, str(script), *arguments], cwd=folder, env=own, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def test_script_of_several_machines_and_of_one(file: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.sh"
    assert export(str(file), "--to", "shell", "-o", str(script), "--", "train.py", HOSTILE).exit_code == 0
    shell_reads(script, "sh")
    assert called(script, tmp_path, "3", "node0:29500") == [
        "run", str(file), "--nnodes=4", "--nproc-per-node=8", "--node-rank=3", "--rdzv-endpoint=node0:29500", "--", "train.py",
        HOSTILE,
    ]  # fmt: skip
    refused = subprocess.run(["sh", str(script), "0"], capture_output=True, text=True, timeout=20)
    assert (refused.returncode, refused.stderr) == (2, f"usage: {script} NODE_RANK HOST:PORT\n")
    save_plan(on("cpu:4"), file)
    assert export(str(file), "--to", "shell", "-o", str(script)).exit_code == 0
    assert called(script, tmp_path) == ["run", str(file), "--steps=5"]
    assert not (tmp_path / "broken").exists()


Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
"""A label of RFC 1123."""
Quantity = Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(Ki|Mi|Gi)?$")] | Annotated[int, msgspec.Meta(gt=0)]


def fields(title: str, *required: tuple[str, Any], **optional: Any) -> type[msgspec.Struct]:
    """An object of Kubernetes that has these fields and no others."""
    others = [(name, kind, None) for name, kind in optional.items()]
    return msgspec.defstruct(title, [*required, *others], forbid_unknown_fields=True, kw_only=True)


# The part of the API's schemas that the file uses: core/v1, and kubeflow.org_pytorchjobs.yaml of the training operator 1.8.
Metadata = fields("Metadata", ("name", Name))
ConfigMap = fields(
    "ConfigMap",
    ("apiVersion", Literal["v1"]),
    ("kind", Literal["ConfigMap"]),
    ("metadata", Metadata),
    ("data", dict[str, str]),
)
Mount = fields("Mount", ("name", Name), ("mountPath", str))
Volume = fields(
    "Volume", ("name", Name), configMap=fields("Source", ("name", Name)),
    emptyDir=fields("Empty", medium=Literal["", "Memory"]),
)  # fmt: skip
Container = fields(
    "Container", ("name", Literal["pytorch"]), ("image", str), ("command", list[str]), ("volumeMounts", list[Mount]),
    resources=fields("Resources", ("limits", dict[str, Quantity])),
)  # fmt: skip
Template = fields("Template", ("spec", fields("Pod", ("containers", list[Container]), ("volumes", list[Volume]))))
Replica = fields(
    "Replica", ("replicas", Annotated[int, msgspec.Meta(ge=1)]), ("template", Template),
    ("restartPolicy", Literal["Always", "OnFailure", "Never", "ExitCode"]),
)  # fmt: skip
Replicas = dict[Literal["Master", "Worker"], Replica]
PyTorchJob = fields(
    "PyTorchJob", ("apiVersion", Literal["kubeflow.org/v1"]), ("kind", Literal["PyTorchJob"]), ("metadata", Metadata),
    ("spec", fields("Spec", ("pytorchReplicaSpecs", Replicas))),
)  # fmt: skip


def test_kubernetes(file: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    out, image = tmp_path / "job.yaml", 'registry/image:1"\n'
    done = export(str(file), "--to", "kubernetes", "-o", str(out), "--image", image, "--", "train.py", HOSTILE)
    assert done.exit_code == 0, done.stderr
    held, job = yaml.safe_load_all(out.read_text())
    assert parse_plan(held["data"]["plan.json"]) == load_plan(file)
    msgspec.convert(held, ConfigMap)
    msgspec.convert(job, PyTorchJob)
    replicas: dict[str, Any] = job["spec"]["pytorchReplicaSpecs"]
    assert {role: each["replicas"] for role, each in replicas.items()} == {"Master": 1, "Worker": 3}
    pod = replicas["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == image
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert container["resources"]["limits"]["memory"].endswith("Mi")
    *_, script, hostile, option, where = container["command"]
    # Kubernetes reads $(NAME) in a command; two dollars are one.
    assert (script, hostile.replace("$$", "$"), option) == ("train.py", HOSTILE, "--plan")
    assert "$(touch" not in hostile.replace("$$(touch", "")
    assert where == "/etc/shardwright/plan.json"
    assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]} == {"plan", "shm"}
    assert pod["volumes"][0]["configMap"]["name"] == held["metadata"]["name"]


def test_hostile_names_stay_words(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a b'; touch broken; $(touch broken)"
    folder.mkdir()
    moved = shutil.move(file, folder / "plan.json")
    out = tmp_path / "job.sh"
    for form, shell in (("slurm", "bash"), ("shell", "sh")):
        assert export(str(moved), "--to", form, "-o", str(out), "--", HOSTILE).exit_code == 0
        shell_reads(out, shell)
    assert str(moved) in called(out, tmp_path, "0", "h:1")
    for name in ("Llama", "a\nb", "a b", "$(x)", "-a", "x" * 43):
        done = export(str(moved), "--to", "slurm", "--name", name)
        assert done.exit_code == 2, name
        assert "expected at most 42 small letters" in done.stderr
    assert not list(tmp_path.rglob("broken"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "megatron", "--steps", "1"], "--steps belongs to --to shell|slurm|kubernetes, not to megatron"),
        (["--to", "hf", "--", "train.py"], "a script belongs to --to shell|slurm|kubernetes, not to hf"),
        (["--to", "script", "--name", "x"], "--name belongs to --to shell|slurm|kubernetes, not to script"),
        (["--to", "paper"], "--to"),
        (["--to", "kubernetes"], "needs --image"),
        (["--to", "slurm", "--image", "x"], "--image belongs to --to kubernetes"),
        (["--to", "slurm", "--steps", "1", "--", "t.py"], "--steps belongs to the built-in loop"),
        ([], "Missing option '--to'"),
    ],
)
def test_what_cannot_be_written_is_refused(file: Path, arguments: list[str], message: str) -> None:
    done = export(str(file), *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_memory_of_a_machine(file: Path) -> None:
    gpus = job_shape(on("h100-sxm:8x4", dp=8, tp=4))
    half = job_shape(on("h100-sxm:4"))
    assert 0 < half.memory_bytes == pytest.approx(gpus.memory_bytes / 2, rel=1e-6)
    ranks = job_shape(on("cpu:4"))
    assert (ranks.gpus, ranks.memory_bytes) == (0, 4 * plans.plan().memory_limit_bytes)
    assert job_shape(on("mi300x:4")).gpu_resource == "amd.com/gpu"
    found = json.loads(export(str(file), "--to", "shell", "--json").stdout)
    assert (found["nodes"], found["ranks_per_node"], found["memory_bytes_per_node"]) == (4, 8, gpus.memory_bytes)


def test_unlike_devices_and_broken_nodes_are_refused() -> None:
    with pytest.raises(LaunchError, match="several kinds of devices"):
        job_shape(on("h100-sxm:4+a100-sxm-80gb:4", dp=4))
    with pytest.raises(ShardwrightError, match="not a whole number of nodes of 8"):
        job_shape(on("h100-sxm:8x2", dp=6))
