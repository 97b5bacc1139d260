"""`python3 -m services.setup.install [PART...]`: Kafka's jars, environment, Horovod, this package, its machine code.

Standard library only. Each part is skipped when it is there in the right version, so a second run takes a moment and
an interrupted one goes on where it was. What is slow to make is kept under `${XDG_CACHE_HOME:-~/.cache}/penstock`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from services.setup import doctor
from services.setup.doctor import ROOT, VENV

HERE = Path(__file__).parent
POM = HERE / "kafka-pom.xml"
PARTS = ("kafka", "environment", "horovod", "project", "kernels")
LOCK = ROOT / "requirements.lock"
STAMP = VENV / "penstock.json"
PYTHON = VENV / "bin/python"
KERNELS = (
    *(ROOT / "features" / name for name in ("kernel.py", "timers.py", "json_events.py", "texts.py")),
    *(ROOT / "pipelines" / name for name in ("kafka.py", "seen.py")),
)
HEARTBEAT_S = 30.0
BEGAN = time.monotonic()
CUDA_ARCHITECTURES = "80,90"
TORCH_PROBE = """
import importlib.util as u, sys
v = {}
exec(open(u.find_spec("torch").origin.replace("__init__", "version")).read(), v)
print(v["__version__"], v.get("cuda") or "none", "cp%d%d" % sys.version_info[:2])
"""


class SetupError(Exception):
    """Set-up can't go on; the message is for the user."""


def main(parts: Sequence[str] = PARTS) -> int:
    """Set these parts up, in this order; 0 when it all works."""
    try:
        with _locked(ROOT):
            _set_up(parts)
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up: stopped; run it again to go on", file=sys.stderr)
        return 130
    _say("set-up is complete")
    return 0


def _set_up(parts: Sequence[str]) -> None:
    stamp = _read_stamp()
    wanted = {
        "root": str(ROOT),
        "lock": _digest(LOCK),
        "cuda": str(_nvcc()),
        "project": _digest(ROOT / "pyproject.toml"),
        "kernels": _digest(*KERNELS),
    }
    complete = stamp == wanted and kafka_jars().exists() and PYTHON.exists()
    _prerequisites(() if complete else parts)
    if complete:
        return
    work = {
        "kafka": lambda *_: _jars(),
        "environment": _environment,
        "horovod": _horovod,
        "project": _project,
        "kernels": _kernels,
    }
    for part in parts:
        work[part](stamp, wanted)


def cache() -> Path:
    """Where things that are slow to make are kept, outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock"


def kafka_jars() -> Path:
    """The folder of Kafka's jars, there or not."""
    version = re.search(r"<kafka.version>(.+)</kafka.version>", POM.read_text())
    assert version
    return cache() / "kafka" / version[1]


def _prerequisites(parts: Sequence[str]) -> None:
    """Install what is missing where that is plain, else name all of it before any work starts."""
    missing = [f for f in doctor.prerequisites(parts) if not f.ok]
    packages = sorted({p for f in missing for p in f.apt.split()})
    if packages and os.geteuid() == 0 and shutil.which("apt-get"):
        _say(f"installing {' '.join(packages)}")
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        log = _log("apt")
        for command in ("apt-get -qq update", f"apt-get -qq install -y --no-install-recommends {' '.join(packages)}"):
            with log.open("ab") as out:
                subprocess.run(command.split(), env=env, stdout=out, stderr=out, check=False)
        missing = [f for f in doctor.prerequisites(parts) if not f.ok]
    if missing:
        raise SetupError(f"this machine lacks:\n{doctor.table(missing)}")


def _environment(stamp: dict[str, str], wanted: Mapping[str, str]) -> None:
    """The virtual environment with exactly what the lock names."""
    if stamp.get("root", str(ROOT)) != str(ROOT) or not _starts(PYTHON):
        shutil.rmtree(VENV, ignore_errors=True)
    if not PYTHON.exists():
        stamp.clear()
        found = doctor.find_python()
        assert found
        _say(f"creating .venv with Python {found[1]}")
        _run("venv", [found[0], "-m", "venv", str(VENV)])
    if stamp.get("lock") == wanted["lock"]:
        return
    stamp.clear()
    _write_stamp(stamp)
    _say("installing the packages of requirements.lock")
    _run("packages", [*_uv(), "pip", "sync", "--require-hashes", "--compile-bytecode", *_into(), str(LOCK)])
    _write_stamp(stamp, root=wanted["root"], lock=wanted["lock"])


def _uv() -> list[str]:
    """The pinned uv, outside the environment so that a sync doesn't remove it."""
    version = re.search(r"uv==(\S+)", (HERE / "uv.txt").read_text())
    assert version
    folder = cache() / "uv" / version[1]
    with _made(folder) as temporary:
        if temporary:
            _say(f"fetching uv {version[1]}")
            pip = [str(PYTHON), "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--no-compile"]
            _run("uv", [*pip, "--require-hashes", "--target", str(temporary), "-r", str(HERE / "uv.txt")])
    return [str(folder / "bin/uv")]


def _into() -> list[str]:
    return ["--python", str(PYTHON)]


def _jars() -> None:
    with _made(kafka_jars()) as temporary:
        if temporary:
            _say(f"fetching Kafka {kafka_jars().name} with Maven")
            shutil.copy(POM, temporary / "pom.xml")
            goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", "-DoutputDirectory=."]
            _run("kafka", ["mvn", "-q", "-B", "--strict-checksums", *goal], cwd=temporary)


def _horovod(stamp: dict[str, str], wanted: Mapping[str, str]) -> None:
    """Horovod from its wheel, which is built once for each combination of versions."""
    if stamp.get("cuda") == wanted["cuda"]:
        return
    torch, cuda, tag = subprocess.run(
        [str(PYTHON), "-c", TORCH_PROBE], check=True, capture_output=True, text=True
    ).stdout.split()
    nvcc = _nvcc() if cuda != "none" else None
    version = re.search(r"horovod==(\S+)", (HERE / "horovod.txt").read_text())
    assert version
    key = f"{version[1]}-torch{torch}-{tag}-{os.uname().machine}-{_cuda_version(nvcc) if nvcc else 'gloo'}"
    folder = cache() / "horovod" / re.sub(r"[^\w.-]", "_", key)
    with _made(folder) as temporary:
        if temporary:
            _say(f"building Horovod {version[1]} (once; about 5 minutes on 2 cores)")
            _build_horovod(temporary, nvcc)
    wheel = next(folder.glob("horovod-*.whl"))
    _run("horovod", [*_uv(), "pip", "install", "--no-deps", "--compile-bytecode", "--reinstall", *_into(), str(wheel)])
    _run("horovod", [str(PYTHON), "-c", "import horovod.torch as h; h.init(); assert h.gloo_built(); h.shutdown()"])
    _write_stamp(stamp, cuda=wanted["cuda"])


def _build_horovod(out: Path, nvcc: Path | None) -> None:
    """One wheel into `out`, built against the environment's torch.

    The one incompatibility: Horovod's CMake says -std=c++14, torch's headers need C++20. A compiler wrapper swaps the
    flag (nvcc calls the same wrapper with a -std of its own), and undoes -g: 64 MB become 2.
    """
    with tempfile.TemporaryDirectory() as folder:
        wrapper = Path(folder, "cxx")
        wrapper.write_text(
            "#!/bin/sh\n"
            'for a; do shift; case $a in -std=c++14|-std=gnu++14) a=-std=c++20;; esac; set -- "$@" "$a"; done\n'
            f'exec {shlex.quote(os.environ.get("CXX", "g++"))} "$@" -g0\n'
        )
        wrapper.chmod(0o755)
        env = {
            "CXX": str(wrapper),
            "MAKEFLAGS": os.environ.get("MAKEFLAGS", f"-j{os.cpu_count()}"),
            "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
            "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}",
            **{f"HOROVOD_WITH{name}": "1" for name in ("_PYTORCH", "_GLOO", "OUT_TENSORFLOW", "OUT_MXNET", "OUT_MPI")},
            **(_nccl_env(nvcc, Path(folder)) if nvcc else {}),
        }
        pip = [str(PYTHON), "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-binary=:all:"]
        cached = ["--no-cache-dir", "--require-hashes", "-w", str(out), "-r", str(HERE / "horovod.txt")]
        _run("horovod", [*pip, *cached], env=env)


def _nccl_env(nvcc: Path, folder: Path) -> dict[str, str]:
    """Horovod's settings for NCCL from the wheel beside torch, whose library has no unversioned name."""
    probe = [str(PYTHON), "-c", "import nvidia.nccl as n; print(list(n.__path__)[0])"]
    nccl = Path(subprocess.run(probe, check=True, capture_output=True, text=True).stdout.strip())
    (folder / "nccl").mkdir()
    (folder / "nccl/libnccl.so").symlink_to(nccl / "lib/libnccl.so.2")
    cuda = str(nvcc.resolve().parents[1])
    return {
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_NCCL_LINK": "SHARED",
        "HOROVOD_NCCL_INCLUDE": str(nccl / "include"),
        "HOROVOD_NCCL_LIB": str(folder / "nccl"),
        "CUDA_HOME": cuda,
        "HOROVOD_CUDA_HOME": cuda,
        "HOROVOD_BUILD_CUDA_CC_LIST": CUDA_ARCHITECTURES,
    }


def _nvcc() -> Path | None:
    """CUDA's compiler; with it Horovod is built for NCCL."""
    found = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc")
    return Path(found) if os.path.exists(found) else None


def _cuda_version(nvcc: Path) -> str:
    text = subprocess.run([str(nvcc), "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", text)
    return f"nccl-cuda{release[1] if release else ''}-cc{CUDA_ARCHITECTURES}"


def _project(stamp: dict[str, str], wanted: Mapping[str, str]) -> None:
    """This package, editable, with its console script."""
    if stamp.get("project") == wanted["project"]:
        return
    _say("installing penstock itself")
    _run("project", [*_uv(), "pip", "install", "--no-deps", "--no-build-isolation", *_into(), "-e", str(ROOT)])
    _write_stamp(stamp, project=wanted["project"])


def _kernels(stamp: dict[str, str], wanted: Mapping[str, str]) -> None:
    """The machine code of the window engine and the record reader, which numba keeps beside its source."""
    if stamp.get("kernels") == wanted["kernels"]:
        return
    _say("compiling the window engine")
    compile_all = (
        "from features import engine; from pipelines import kafka, seen;"
        " [m.compile_kernels() for m in (engine, kafka, seen)]"
    )
    _run("kernels", [str(PYTHON), "-c", compile_all])
    _write_stamp(stamp, kernels=wanted["kernels"])


def _run(name: str, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> None:
    """Run a step to its end with a sign of life; raises SetupError with its last words."""
    log = _log(name)
    began = time.monotonic()
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, cwd=cwd, env={**_network_env(), **(env or {})}, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(HEARTBEAT_S)
                if process.poll() is None:
                    _say(f"  still at it after {time.monotonic() - began:.0f} s; its log is {log}")
        finally:
            process.terminate()
    if process.returncode:
        tail = "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-15:])
        raise SetupError(f"{name}: {Path(command[0]).name} failed with code {process.returncode}; see {log}\n{tail}")


def _network_env() -> dict[str, str]:
    """This environment; what it tells pip about indexes and certificates is told to uv too."""
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    pip_to_uv = {
        "PIP_INDEX_URL": "UV_DEFAULT_INDEX",
        "PIP_EXTRA_INDEX_URL": "UV_INDEX",
        "PIP_FIND_LINKS": "UV_FIND_LINKS",
        "PIP_CERT": "SSL_CERT_FILE",
    }
    for pip, uv in pip_to_uv.items():
        if env.get(pip) and uv not in env:
            env[uv] = env[pip]
    env.setdefault("UV_SYSTEM_CERTS", "true")  # as pip does where its own configuration file names a certificate
    return env


def _starts(python: Path) -> bool:
    return python.exists() and subprocess.run([str(python), "-c", ""], check=False, capture_output=True).returncode == 0


def _log(name: str) -> Path:
    folder = cache() / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.log"


def _say(line: str) -> None:
    print(f"[set-up {time.monotonic() - BEGAN:6.1f} s] {line}", flush=True)


def _digest(*files: Path) -> str:
    """Of those that are there: an image's environment is made before the code is copied to it."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.exists())).hexdigest()


def _read_stamp() -> dict[str, str]:
    return dict(json.loads(STAMP.read_text())) if STAMP.exists() else {}


def _write_stamp(stamp: dict[str, str], **done: str) -> None:
    stamp |= done
    STAMP.write_text(json.dumps(stamp, indent=1))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One set-up at a time in a folder; the second one waits."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another set-up is at work in {folder}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[Path | None]:
    """A temporary folder that becomes `folder` when the block ends well; None when `folder` is there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent):
        if folder.exists():
            yield None
            return
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or PARTS))
