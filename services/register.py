"""`penstock register`: an ONNX model of the user's own becomes a version."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from features.errors import InputError
from features.usecase import load
from pipelines.onnx_model import OnnxModel
from services import wiring
from services.settings import Settings

MODEL, INPUTS, EXAMPLE = FILES = ("model.onnx", "inputs.json", "example.json")


def register(settings: Settings, name: str, folder: Path, learned_until: int) -> str:
    """Register the model in `folder`, once it loads and reads what the use case declares.

    Parameters
    ----------
    folder : holds `model.onnx`; `inputs.json` where it reads other inputs than the use case declares; `example.json`
        where its maker recorded inputs and scores, else two rows are scored here
    learned_until : epoch ms before which labels were learned; newer ones judge it

    Returns
    -------
    the version's number
    """
    if not (folder / MODEL).is_file():
        raise InputError(f"{folder} holds no {MODEL}")
    with tempfile.TemporaryDirectory() as place:
        made = Path(place)
        for file in FILES:
            if (folder / file).exists():
                shutil.copy(folder / file, made)
        if not (made / INPUTS).exists():
            (made / INPUTS).write_text(json.dumps(load(name).inputs.as_json()))
        if not (made / EXAMPLE).exists():
            OnnxModel.record(made)
        OnnxModel.load(made, f"in {folder}")
        tags = {"cut": str(learned_until), "latest_label_time": str(learned_until - 1)}
        return wiring.registry(settings).register(name, made, {}, tags)
