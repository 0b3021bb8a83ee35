"""A slurm of this machine: `srun`, `scancel` and `scontrol` that do what slurm.sh relies on.

`srun` starts every task as a real process with the variables slurm gives it, `scancel` signals
those processes and `scontrol` notes what is queued again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TOOLS = {
    "srun": """
import json, os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
counts = json.loads(os.environ["FAKE_TASKS_PER_NODE"])
places = [(node, local) for node, tasks in enumerate(counts) for local in range(tasks)]
tasks = []
for rank, (node, local) in enumerate(places):
    values = {
        "SLURM_PROCID": rank, "SLURM_LOCALID": local, "SLURM_NODEID": node,
        "SLURM_STEP_NUM_TASKS": len(places), "SLURM_NTASKS": len(places),
        "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, counts)),
    }
    environment = os.environ | {name: str(value) for name, value in values.items()}
    tasks.append(subprocess.Popen(command, env=environment))
open(os.environ["FAKE_SLURM"] + "/tasks", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks]))
""",
    "scancel": """
import os, signal, sys
assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]], sys.argv
for pid in open(os.environ["FAKE_SLURM"] + "/tasks").read().split():
    os.kill(int(pid), signal.SIGTERM)
""",
    "scontrol": """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print(sys.argv[3].replace(",", "\\n"))
else:
    open(os.environ["FAKE_SLURM"] + "/requeued", "a").write(" ".join(sys.argv[1:]) + "\\n")
""",
}


def fake_slurm(folder: Path, repository: Path, tasks_per_node: list[int]) -> dict[str, str]:
    """Writes the tools into `folder` and returns the environment of a batch script there."""
    for name, code in TOOLS.items():
        path = folder / name
        path.write_text(f"#!{sys.executable}{code}")
        path.chmod(0o755)
    return {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "FAKE_SLURM": str(folder),
        "FAKE_TASKS_PER_NODE": str(tasks_per_node),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": ",".join(["127.0.0.1", *(f"127.0.0.{2 + i}" for i in range(9))]),
        "SLURM_SUBMIT_DIR": str(repository),
        # A batch script is the first of the job's tasks.
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": str(sum(tasks_per_node)),
    }
