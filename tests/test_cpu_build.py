"""Building the CPU kernels: without a compiler, by several processes at once, and never at import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gumbel_attention.impl import cpu
from gumbel_attention.impl.cpu import build

UNAVAILABLE = cpu.available()
COMPILER = build._compiler()
needs_kernels = pytest.mark.skipif(UNAVAILABLE is not None and COMPILER is None, reason=f"{UNAVAILABLE}")


def test_no_compiler_is_a_reason_and_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = build.load.__wrapped__
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert "no C++ compiler" in load()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in load()
    broken = script(tmp_path / "broken", "echo 'kernels.cpp:1:1: error: no such luck' >&2; exit 1")
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("PATH", os.defpath)
    assert "no such luck" in load()
    monkeypatch.setenv("GUMBEL_ATTENTION_NO_BUILD", "1")
    assert "GUMBEL_ATTENTION_NO_BUILD" in load()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def python(program: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment}, cwd=Path(__file__).parents[1],
    )  # fmt: skip


@needs_kernels
def test_two_processes_build_once(tmp_path: Path) -> None:
    """The compiler is a script that takes its time, notes that it ran, and hands out the library already built."""
    assert COMPILER is not None
    built = build.cache_folder() / build._digest(COMPILER) / "kernels.so"
    shutil.copy(built, tmp_path / "ready.so")
    compiler = script(
        tmp_path / "compiler",
        f'[ "$1" = --version ] && exit; echo x >> "{tmp_path}/runs"; sleep 1\n'
        f'while [ "$1" != -o ]; do shift; done; cp "{tmp_path}/ready.so" "$2"',
    )
    changed = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    program = "from gumbel_attention.impl import cpu; print(cpu.available())"
    both = [python(program, **changed) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [out.strip() for out, _ in outputs] == ["None", "None"]
    assert sum("compiling" in err for _, err in outputs) == 1
    assert (tmp_path / "runs").read_text().split() == ["x"]


@needs_kernels
def test_threads_register_the_operators_once() -> None:
    """All ask at once, and registration takes its time."""
    program = """
import threading, time, torch
from gumbel_attention.impl import cpu

calls, results, real = [], [], torch.library.register_fake
torch.library.register_fake = lambda name, *rest: (calls.append(name), time.sleep(0.1), real(name, *rest))
gate = threading.Barrier(4)
threads = [threading.Thread(target=lambda: (gate.wait(), results.append(cpu.available()))) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(results, [name for name in calls if "cpu_" in name])
"""
    out, err = python(program).communicate(timeout=120)
    once = ["gumbel_attention::cpu_forward", "gumbel_attention::cpu_backward"]
    assert out.strip() == f"{[None] * 4} {once}", err


def test_importing_the_library_loads_nothing_of_this() -> None:
    program = "import sys, gumbel_attention; print([m for m in sys.modules if 'impl.cpu' in m])"
    out, err = python(program).communicate(timeout=120)
    assert out.strip() == "[]", err
