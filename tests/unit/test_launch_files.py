"""The files for schedulers: they parse, and exit codes and signals pass through the launcher."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch._cli import EXIT_REQUEUE
from launch._torchrun import exit_code

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "launch" / "slurm" / "train.sbatch"
K8S = ROOT / "launch" / "k8s" / "train.yaml"


def fake(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run_sbatch(tmp_path: Path, code: int, *arguments: str) -> tuple[int, str]:
    """Run the batch script with stand-ins for Slurm's programs: (its exit code, what they were called with)."""
    calls = tmp_path / "calls"
    calls.touch()
    fake(tmp_path, "srun", f'echo "srun $*" >> {calls}; exit {code}')
    fake(
        tmp_path,
        "scontrol",
        f'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "scontrol $*" >> {calls}; fi',
    )
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    done = subprocess.run(["bash", str(SBATCH), *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, calls.read_text()


def test_sbatch_syntax() -> None:
    assert subprocess.run(["bash", "-n", str(SBATCH)]).returncode == 0
    options = re.findall(r"^#SBATCH --([\w-]+)", SBATCH.read_text(), re.MULTILINE)
    assert {"nodes", "requeue", "signal", "ntasks-per-node"} <= set(options)


def test_sbatch_runs_the_launcher(tmp_path: Path) -> None:
    code, calls = run_sbatch(tmp_path, 0, "configs/run/quickstart.yaml", "optim.lr=1")
    assert code == 0
    assert "--nnodes 2 --nproc-per-node 8" in calls
    assert "--rdzv-endpoint node7:24711 launch/train.py configs/run/quickstart.yaml optim.lr=1" in calls
    assert "requeue" not in calls


@pytest.mark.parametrize(("code", "requeued"), [(EXIT_REQUEUE, True), (1, False), (2, False)])
def test_sbatch_requeues_on_75_alone(tmp_path: Path, code: int, requeued: bool) -> None:
    ended, calls = run_sbatch(tmp_path, code, "a.yaml")
    assert ended == code
    assert ("scontrol requeue 4711" in calls) == requeued


def test_sbatch_wants_a_config(tmp_path: Path) -> None:
    assert run_sbatch(tmp_path, 0) == (2, "")


def test_job_is_consistent() -> None:
    service, job = yaml.safe_load_all(K8S.read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    arguments = container["args"]
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["restartPolicy"] == "Never"
    assert f"--nnodes={spec['completions']}" in arguments
    assert spec["completions"] == spec["parallelism"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in arguments
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{service['metadata']['name']}:29500" in arguments
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_job_policy_knows_the_exit_codes() -> None:
    _, job = yaml.safe_load_all(K8S.read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    actions = {
        code: rule["action"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
        for code in rule["onExitCodes"]["values"]
        if rule["onExitCodes"]["containerName"] == container["name"]
    }
    assert actions == {EXIT_REQUEUE: "Ignore", 2: "FailJob"}


def test_named_files_exist() -> None:
    for text in (SBATCH.read_text(), K8S.read_text()):
        for name in re.findall(r"\blaunch/\w+\.py|configs/run/\w+\.yaml", text):
            assert (ROOT / name).is_file(), name


def test_makefile_names_existing_files() -> None:
    text = (ROOT / "Makefile").read_text()
    for name in re.findall(r"\blaunch/\w+\.py|configs/\w+/\w+\.yaml", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_makefile_refuses_an_old_python(tmp_path: Path) -> None:
    fake(tmp_path, "oldpython", 'if [ "$1" = --version ]; then echo Python 3.9.1; fi; exit 1')
    done = subprocess.run(
        ["make", f"PYTHON={tmp_path}/oldpython", f"VENV={tmp_path}/venv", "install"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "is older than Python 3.11" in done.stderr


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([75], 75), ([75, 75], 75), ([75, -15], 75), ([2, 2], 2), ([1, 75], 1), ([-9], 1), ([-15, -15], 1), ([1], 1)],
)
def test_exit_code_of_a_node(codes: list[int], expected: int) -> None:
    assert exit_code(codes) == expected


WORKER = """
import os, pathlib, signal, sys, time
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.append(1))
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
deadline = time.monotonic() + 60
while not asked and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(0.1)
sys.exit(75 if asked else 1)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["usr1", "term"])
def test_signals_reach_the_workers_and_75_comes_out(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    started = tmp_path / "started"
    started.mkdir()
    command = [
        "launch/_torchrun.py",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "worker.py"),
        str(started),
    ]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(started.iterdir())) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
