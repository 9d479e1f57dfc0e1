"""Compiles the kernels on first use and loads them: once for each compiler, torch and CPU, kept in a cache folder.

A direct call of the compiler, for ninja need not be there. The library is written under a name of its own and then
renamed, so that several processes may build at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCES = ("kernels.cpp", "problem.h", "tile.h", "sweeps.h", "philox.h", "vector.h", "turns.h")
FLAGS = (
    "-std=c++20", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-Wno-psabi", "-fvisibility=hidden",
)  # fmt: skip
"""Never -ffast-math: it lets every thread of the process flush denormals, and forgets infinities."""
OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
"""Tried in turn: not every compiler has all."""
TIMEOUT = 600.0


@functools.cache
def load() -> str | None:
    """Builds the kernels if need be and registers their operators; the reason why there are none, or ``None``."""
    if os.name != "posix":
        return "they are built on POSIX systems only"
    try:
        if os.environ.get("GUMBEL_ATTENTION_NO_BUILD", "0") not in ("", "0"):
            return "GUMBEL_ATTENTION_NO_BUILD is set"
        library = _library()
        if isinstance(library, str):
            return library
        torch.ops.load_library(str(library))
    except Exception as error:  # whatever goes wrong, there are other implementations, and the reason is told
        return f"{type(error).__name__}: {error}"
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``$XDG_CACHE_HOME/gumbel_attention``, or that in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gumbel_attention"


def _library() -> Path | str:
    """The compiled library, or why there is none."""
    compiler = _compiler()
    if compiler is None:
        return "no C++ compiler: neither $CXX nor c++, g++ or clang++ is there"
    folder = cache_folder() / _digest(compiler)
    library = folder / "kernels.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "lock"):
        return library if library.exists() else _build(compiler, library)


def _build(compiler: list[str], library: Path) -> Path | str:
    print("gumbel_attention: compiling the CPU kernels, once, about half a minute", file=sys.stderr, flush=True)
    messages = []
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / "kernels.so"
        for optional in OPTIONAL_FLAGS:
            messages.append(_compile([*compiler, *FLAGS, *optional, *_torch_flags()], built))
            if not messages[-1]:
                os.replace(built, library)
                return library
    return f"{compiler[0]} failed: {messages[0]}"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process builds, the others wait; where files cannot be locked, each builds."""
    import fcntl  # POSIX only

    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(command: list[str], output: Path) -> str:
    """Runs the compiler; the last lines of what it says if it fails, else an empty string."""
    source = Path(__file__).with_name(SOURCES[0])
    try:
        done = subprocess.run(
            [*command, str(source), "-o", str(output), *_libraries()],
            capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no result after {TIMEOUT:.0f} s"
    if done.returncode == 0:
        return ""
    lines = (done.stderr or done.stdout).strip().splitlines()
    errors = [line for line in lines if "error" in line] or lines
    return "\n".join(errors[-5:]) or f"exit status {done.returncode}"


def _compiler() -> list[str] | None:
    """The command of the compiler, ``$CXX`` before others, as a list."""
    given = os.environ.get("CXX", "").split()
    for command in (given,) if given else (["c++"], ["g++"], ["clang++"]):
        if shutil.which(command[0]):
            return command
    return None


def _torch_root() -> Path:
    return Path(torch.__file__).parent


def _torch_flags() -> list[str]:
    include = _torch_root() / "include"
    api = include / "torch" / "csrc" / "api" / "include"
    abi = int(torch.compiled_with_cxx11_abi())
    return [f"-D_GLIBCXX_USE_CXX11_ABI={abi}", "-isystem", str(include), "-isystem", str(api)]


def _libraries() -> list[str]:
    lib = str(_torch_root() / "lib")
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return [f"-L{lib}", "-ltorch_cpu", "-lc10", *undefined]


def _digest(compiler: list[str]) -> str:
    """Names what the library depends on: sources, flags, compiler, torch and the CPU."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    here = Path(__file__).parent
    parts = [
        *((here / name).read_text() for name in SOURCES),
        repr((FLAGS, OPTIONAL_FLAGS, compiler, torch.__version__, str(_torch_root()), platform.machine())),
        version,
        _cpu(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _cpu() -> str:
    """What distinguishes this CPU from others of its machine type: a home folder may be shared between hosts."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip() in wanted}))
