"""A single-node SLURM in a scratch folder, started and stopped by tests: the real controller, daemon and
authentication, as root, no systemd."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={other_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=2
MinJobAge=60
SchedulerParameters=batch_sched_delay=0,sched_interval=2,preempt_reorder_count=1
PriorityType=priority/basic
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=high Nodes={host} MaxTime=60 State=UP PriorityTier=10
"""


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in NEEDED if shutil.which(name) is None]


class Slurm:
    """`with Slurm(folder):` runs the daemons and points SLURM's commands to them."""

    def __init__(self, folder: Path):
        self.folder, self.host = folder, socket.gethostname().partition(".")[0]

    def __enter__(self) -> "Slurm":
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        ports = dict(zip(("port", "other_port"), _free_ports(2)))
        (self.folder / "slurm.conf").write_text(CONFIG.format(host=self.host, folder=self.folder, **ports))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nIgnoreSystemd=yes\n")
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = ["--key-file", key, "--socket", self.folder / "munge.socket", "--pid-file", self.folder / "munge.pid"]
        self._run(
            "munged",
            "--force",
            *munge,
            "--log-file",
            self.folder / "munge.log",
            "--seed-file",
            self.folder / "munge.seed",
        )
        self._run("slurmctld", "-f", self.folder / "slurm.conf")
        time.sleep(2)
        self._run("slurmd", "-f", self.folder / "slurm.conf")
        self._wait_for_node()
        return self

    def __exit__(self, *_) -> None:
        subprocess.run(["scancel", "--user", "root"], capture_output=True)
        time.sleep(1)
        for name in ("slurmd", "slurmctld", "munge"):
            file = self.folder / f"{name}.pid"
            if file.exists():
                _stop(int(file.read_text()))
        os.environ.pop("SLURM_CONF", None)

    def _run(self, *command) -> None:
        result = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert result.returncode == 0, f"{command[0]}: {result.stderr}"

    def _wait_for_node(self) -> None:
        for _ in range(60):
            found = subprocess.run(
                ["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True
            ).stdout.split()
            if "idle" in found:
                return
            subprocess.run(["scontrol", "update", f"nodename={self.host}", "state=resume"], capture_output=True)
            time.sleep(0.5)
        logs = "\n".join(file.read_text()[-1500:] for file in self.folder.glob("slurm*.log"))
        raise AssertionError(f"the node does not come up:\n{logs}")


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _stop(pid: int) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        for _ in range(30):
            time.sleep(0.1)
            if not Path(f"/proc/{pid}").exists():
                return
