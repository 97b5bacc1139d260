"""One training job: what `penstock train` hands to the Horovod ranks, as one JSON file."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from features.errors import ConfigError
from features.usecase import ModelInputs


@dataclass(frozen=True)
class Recipe:
    """How to train.

    epochs : over the examples before the held-out part
    rate : learning rate for one rank's batch, multiplied by the ranks
    finish_rate : the same for the last pass, over all examples
    batch : examples per rank and step
    weight_decay : of weight matrices, embeddings excepted; what is known is few days, and their rows are alike
    warm_up : part of a pass in which the rate rises
    target_weight : of the mean loss on the other targets, beside the label's
    members, hidden, trees : the net's shape
    compression : of what ranks send each other: none, fp16 or powersgd:RANK
    """

    epochs: int = 3
    rate: float = 1e-3
    finish_rate: float = 2.5e-4
    batch: int = 256
    weight_decay: float = 10.0
    warm_up: float = 0.1
    target_weight: float = 3.0
    members: int = 4
    hidden: tuple[int, ...] = (192, 96)
    trees: int = 200
    compression: str = "none"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"none|fp16|powersgd:[1-9]\d*", self.compression):
            raise ConfigError(
                f"compression {self.compression!r}: write none, fp16 or powersgd:RANK, such as powersgd:4"
            )

    @classmethod
    def from_scratch(cls, online: OnlineRecipe | None = None) -> Recipe:
        """For a use case's first version, of the net that goes on learning by `online`. Rates and weight decay stay
        this recipe's own: weights of few days need another regime than weights of a stream."""
        return replace(cls(), **{name: getattr(online, name) for name in NET}) if online else cls()

    def warm(self) -> Recipe:
        """For a version that starts from the champion's weights."""
        return replace(self, epochs=1, rate=2.5e-4)


@dataclass(frozen=True)
class OnlineRecipe:
    """How the net learns from a stream.

    first : examples after which it first learns, in `epochs` passes at `first_rate`, and again when there are twice as
        many, until `last_start`: what little data teaches is better learned anew than unlearned
    rate : learning rate afterwards
    batch : examples a step
    replay : batches of earlier examples for each new one
    memory : the newest so many examples are replayed
    refit : examples after which the trees are grown anew
    calibrate : the newest so many examples, as scored before they were learned, say how members and trees are blended
    """

    first: int = 2_000
    last_start: int = 32_000
    epochs: int = 3
    first_rate: float = 1e-3
    rate: float = 5e-4
    batch: int = 256
    replay: int = 4
    memory: int = 400_000
    refit: int = 20_000
    calibrate: int = 40_000
    weight_decay: float = 0.1
    target_weight: float = 3.0
    members: int = 4
    hidden: tuple[int, ...] = (192, 96)
    trees: int = 200


NET = ("members", "hidden", "trees", "target_weight")  # what both recipes say of the net


@dataclass(frozen=True)
class Champion:
    """The version a job starts from and is compared with: its files, and the cut (epoch ms) it learned up to."""

    version: str
    folder: str
    cut: int


@dataclass(frozen=True)
class Job:
    """A retrain up to a cut; all times epoch ms.

    files : URLs of the archive files that are closed; rank 0's list is the one that counts
    inputs : what the model reads
    targets : what it foretells beside the label
    result : folder that gets the version's files, evaluation.json and, when all is done, result.json
    champion : the version to compare with
    warm_start : start from the champion's weights; its declaration must be this one
    range_from, cut : label times trained on, half-open
    holdout : the last so many ms before the cut are scored before they are trained on
    max_examples : the newest so many are used
    seed : of weights, permutations and dropout
    settings : what a search found for it, as `pipelines.learners` reads them; the version carries them
    row_log : folder for the rows each rank took, step by step, or empty
    """

    files: tuple[str, ...]
    inputs: ModelInputs
    result: str
    cut: int
    targets: tuple[str, ...] = ()
    range_from: int = 0
    holdout: int = 86_400_000
    champion: Champion | None = None
    warm_start: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    max_examples: int = 500_000
    seed: int = 0
    settings: str = ""
    row_log: str = ""

    @property
    def declaration(self) -> dict[str, Any]:
        """What weights fit: the inputs, and the shape of the net. A version carries it."""
        recipe = self.recipe
        shape = {"members": recipe.members, "hidden": list(recipe.hidden), "trees": recipe.trees}
        return self.inputs.as_json() | {"targets": list(self.targets)} | shape

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self) | {"inputs": self.inputs.as_json()}, indent=1))

    @classmethod
    def load(cls, path: Path) -> Job:
        data: dict[str, Any] = json.loads(path.read_text())
        data["files"], data["targets"] = tuple(data["files"]), tuple(data["targets"])
        data["inputs"] = ModelInputs.from_json(data["inputs"])
        data["champion"] = Champion(**data["champion"]) if data["champion"] else None
        data["recipe"] = Recipe(**data["recipe"] | {"hidden": tuple(data["recipe"]["hidden"])})
        return cls(**data)
