import os
import stat
from pathlib import Path

import pytest

from features.errors import ConfigError
from services.settings import SECRETS, Settings, write_env


def test_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    file.write_text('port_base = 23000\nhome = "/somewhere"\n')
    settings = Settings.load({"PENSTOCK_HOME": str(tmp_path)}, file)
    assert (settings.port_base, settings.home, settings.spool_max_mb) == (23000, tmp_path, 1024)


def test_port_base_places_every_service(tmp_path: Path) -> None:
    settings = Settings.load({"PENSTOCK_HOME": str(tmp_path), "PENSTOCK_PORT_BASE": "23000"}, tmp_path / "none.toml")
    assert settings.kafka_bootstrap == "127.0.0.1:23000"
    assert settings.predictor_port == settings.port("predictor") == 23006
    assert settings.mlflow_url == "http://127.0.0.1:23004"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port_bas = 1", "unknown setting port_bas"),
        ('port_base = "many"', "setting port_base: expected int, got 'many'"),
        ('allow_event_time = "maybe"', "setting allow_event_time: expected bool"),
        ("port_base = ", "not valid TOML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "penstock.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Settings.load({}, file)


def test_secrets_are_made_once_for_the_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path / "home"))
    settings = Settings.load()
    made = settings.make_secrets()
    assert stat.S_IMODE(os.stat(tmp_path / "home/secrets.json").st_mode) == 0o600
    assert len({made.secrets[name] for name in SECRETS}) == len(SECRETS)
    assert made.secrets["redis_password"] in made.redis
    assert made.make_secrets().secrets == made.secrets


def test_containers_take_the_same_secrets_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path / "home"))
    write_env(tmp_path / ".env")
    assert stat.S_IMODE(os.stat(tmp_path / ".env").st_mode) == 0o600
    made = Settings.load().secrets
    for line in (tmp_path / ".env").read_text().splitlines():
        monkeypatch.setenv(*line.split("=", 1))
    monkeypatch.setenv("PENSTOCK_HOME", str(tmp_path / "container"))
    inside = Settings.load().make_secrets()
    assert inside.secrets == made and inside.predictor_token
    assert not (tmp_path / "container").exists()
