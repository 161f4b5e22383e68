"""Two machines: network namespaces of this one, each with an address of its own and none in common."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toy
from click.testing import CliRunner
from shardwright.cli.main import main
from shardwright.cli.places import interface_of, local_address, split_endpoint
from shardwright.errors import LaunchError

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*words: str) -> None:
    """Run `ip`; raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces joined by a pair of virtual interfaces; skips where that is not permitted."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    names = tuple(f"shardwright{os.getpid()}{end}" for end in "ab")
    ends = tuple(f"sw{os.getpid() % 100_000}{end}" for end in "ab")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for name, end, address in zip(names, ends, ADDRESSES, strict=True):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


def test_addresses() -> None:
    assert split_endpoint("node0:29500") == ("node0", 29500)
    assert split_endpoint("[fe80::1]:1") == ("fe80::1", 1)
    for text in ("node0", "node0:", ":1", "node0:0", "node0:65536", "node0:x", "node0:1²"):
        with pytest.raises(LaunchError, match="expected HOST:PORT"):
            split_endpoint(text)
    assert local_address("127.0.0.1:1") is None  # others cannot use it
    assert interface_of("203.0.113.9") is None
    if sys.platform.startswith("linux"):
        assert interface_of("127.0.0.1") == "lo"


Outcome = tuple[int, str, str]
"""Exit status, stdout, stderr."""


def on_each(hosts: tuple[str, str], command: Callable[[int], list[str]], folder: Path) -> list[Outcome]:
    """Start a command on every host at once; how each one ended."""
    own = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"} | {"OMP_NUM_THREADS": "1"}
    own["PATH"] = f"{Path(sys.executable).parent}:{own['PATH']}"
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *command(node)], env=own | {"XDG_CACHE_HOME": str(folder / host)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for node, host in enumerate(hosts)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def plan_file(folder: Path, cluster: str) -> Path:
    """A plan of the toy model for two CPU ranks."""
    from shardwright.api import plan_model
    from shardwright.planner.planfile import save_plan

    save_plan(plan_model(f"{toy.__file__}:build", cluster, batch=8, pins=["dp=2"]).plan, folder / "plan.json")
    return folder / "plan.json"


@pytest.mark.nightly
def test_two_hosts_run_one_plan(hosts: tuple[str, str], tmp_path: Path) -> None:
    """The whole command on each host; the machine's own name resolves to neither address, as on many machines."""
    file = plan_file(tmp_path, "cpu:2")

    def command(node: int) -> list[str]:
        program = [
            sys.executable,
            "-m",
            "shardwright.cli.main",
            "run",
            str(file),
            "--nnodes",
            "2",
            "--node-rank",
            str(node),
        ]
        return [*program, "--rdzv-endpoint", f"{ADDRESSES[0]}:29500", "--steps", "1", "--timeout", "300", "--json"]

    (status, out, said), (other, silent, also_said) = on_each(hosts, command, tmp_path)
    assert (status, other) == (0, 0), said + also_said
    assert f"--local-addr={ADDRESSES[0]}" in said
    assert f"--local-addr={ADDRESSES[1]}" in also_said
    result = json.loads(out)
    assert result["world_size"] == 2
    assert silent == ""  # rank 0 tells


@pytest.mark.nightly
def test_two_hosts_run_an_exported_script(hosts: tuple[str, str], tmp_path: Path) -> None:
    """What `export --to shell` writes, started with `sh` on each host."""
    file, script = plan_file(tmp_path, "cpu:1x2"), tmp_path / "run.sh"
    done = CliRunner().invoke(main, ["export", str(file), "--to", "shell", "-o", str(script), "--steps", "1"])
    assert done.exit_code == 0, done.stderr
    ended = on_each(hosts, lambda node: ["sh", str(script), str(node), f"{ADDRESSES[0]}:29500"], tmp_path)
    assert [status for status, _, _ in ended] == [0, 0], ended
    (told,) = (out for _, out, _ in ended if out)  # rank 0's
    assert "peak memory, rank 1" in told
