"""Stands in for a training script in tests of real processes: it reports starts and collisions, and can go on.

    python fake_script.py REPORTS SECONDS --config WORK/arguments.yaml

Needs the standard library only. Its ten steps are folders checkpoint-1 ...; the result depends on the settings only.
"""

import fcntl
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

STEPS = 10


def report(reports: Path, what: str, name: str) -> None:
    descriptor = os.open(reports / what, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, f"{name} {os.getpid()}\n".encode())
    os.close(descriptor)


def main() -> None:
    reports, seconds, work = Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[4]).parent
    name, text = work.name, Path(sys.argv[4]).read_text()
    print("starts", flush=True)
    report(reports, "starts", name)
    with open(reports / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            report(reports, "collisions", name)
        if (work.parents[1] / "runs" / f"{name}.json").exists():
            report(reports, "repeated", name)
        done = [int(path.name.split("-")[1]) for path in work.glob("checkpoint-*")]
        resumed = max(done, default=0)
        for step in range(resumed + 1, STEPS + 1):
            time.sleep(seconds / STEPS)
            (work / f"checkpoint-{step}").mkdir()
        settings = "\n".join(line for line in text.splitlines() if not re.match("output_dir|resume", line))
        value = int(hashlib.sha256(settings.encode()).hexdigest()[:8], 16) / 2**32
        results = {
            "schema_version": 1,
            "status": "finished",
            "started": time.time(),
            "resumed_at_steps": [resumed] if resumed else [],
            "config": {"seed": int(re.search(r"^seed: (\d+)", text, re.M)[1]), "output_dir": str(work)},
            "final": {mode: {"accuracy": value, "loss": 1.0} for mode in ("noise_off", "noise_on")},
            "series": {"train": [], "evaluation": []},
            "train_seconds": seconds,
            "eval_seconds": 0.0,
            "device": "cpu (fake)",
            "versions": {"torch": "2", "gumbel_attention": "0"},
            "git": None,
        }
        temporary = work / "results.tmp"
        temporary.write_text(json.dumps(results))
        temporary.replace(work / "results.json")


main()
