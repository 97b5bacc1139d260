"""Environments of the peers, from their hashed locks; made once and kept with what set-up keeps."""

from __future__ import annotations

from pathlib import Path

from features.errors import UnavailableError
from services.setup import install

HERE = Path(__file__).parent


def python(name: str) -> str:
    """The interpreter of the environment that `<name>.lock` describes, which is installed when it isn't there."""
    lock = HERE / f"{name}.lock"
    folder = install.cache() / "peers" / f"{name}-{install._digest(lock)[:12]}"
    try:
        with install._made(folder) as temporary:
            if temporary:
                install._say(f"installing {name}, a peer, into an environment of its own")
                uv, into = install._uv(), ["--python", str(temporary / "bin/python")]
                venv = [*uv, "venv", "--relocatable", "--allow-existing", "--python", str(install.PYTHON)]
                install._run(name, [*venv, str(temporary)])
                sync = ["pip", "sync", "--require-hashes", "--compile-bytecode"]
                install._run(name, [*uv, *sync, *into, str(lock)])
    except install.SetupError as error:
        raise UnavailableError(str(error)) from None
    return str(folder / "bin/python")
