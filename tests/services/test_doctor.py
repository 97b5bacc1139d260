import socket
from pathlib import Path

import pytest

from services.setup import doctor, install


def put(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_every_missing_prerequisite_is_named_with_its_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = {f.name: f for f in doctor.prerequisites() if not f.ok}
    assert {"Java 17+", "Maven", "C++ compiler", "make", "cmake"} <= set(missing)
    assert all(f.mend and f.mend in doctor.table(missing.values()) for f in missing.values())
    assert not {"Java 17+", "Maven"} & {f.name for f in doctor.prerequisites(("environment", "horovod"))}  # an image's


@pytest.mark.parametrize(
    ("line", "ok"), [('openjdk version "11.0.2"', False), ('openjdk version "21" 2023-09-19', True)]
)
def test_java_must_be_17(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, ok: bool) -> None:
    put(tmp_path, "java", f"echo '{line}' >&2")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    finding = doctor.java()
    assert finding.ok is ok
    assert finding.found == line.split('"')[1]


def test_a_python_that_does_not_start_is_no_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "python3.11", "echo 'not installed' >&2; exit 127")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python3.11"))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(tmp_path / "python3.11"))
    found = doctor.find_python()
    assert found is None or found[0] == "/usr/bin/python3.11"


def test_set_up_names_all_that_is_missing_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(install, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(install, "_environment", lambda *_: pytest.fail("work began"))
    assert install.main() == 1
    said = capsys.readouterr().err
    assert "Maven" in said
    assert "cmake" in said
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_download_leaves_nothing_that_looks_done(tmp_path: Path) -> None:
    target = tmp_path / "jars"

    def interrupted() -> None:
        with install._made(target) as temporary:
            assert temporary
            (temporary / "half.jar").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with install._made(target) as temporary:
        assert temporary
        (temporary / "whole.jar").touch()
    assert [f.name for f in target.iterdir()] == ["whole.jar"]
    with install._made(target) as temporary:
        assert temporary is None


def test_what_pip_is_told_of_the_network_uv_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    monkeypatch.delenv("UV_FIND_LINKS", raising=False)
    assert install._network_env()["UV_FIND_LINKS"] == "/wheels"


def test_this_environment_has_what_the_lock_names() -> None:
    findings = [*doctor.packages(), doctor.horovod(), doctor.jars()]
    assert [f for f in findings if not f.ok] == []


def test_a_taken_port_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path))
        monkeypatch.setenv("PENSTOCK_PORT_BASE", str(port))
        finding = next(f for f in doctor.places() if f.name == f"port {port}")
    assert not finding.ok
    assert "taken by" in finding.found
