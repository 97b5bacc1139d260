"""`python -m services.topics USE_CASE`: create the topics of a use case that aren't there yet."""

from __future__ import annotations

import sys

from features.errors import PenstockError
from features.usecase import UseCase, load
from services import wiring
from services.settings import Settings

FOREVER = {"retention.ms": "-1", "message.timestamp.type": "CreateTime"}
OWN = ("requests", "predictions", "examples", "cuts", "commands", "rejected")


def topics(use_case: UseCase) -> dict[str, dict[str, str]]:
    """Topic name -> its settings. Records carry event time, so that a retention by time would delete history."""
    plain = (*use_case.event_topics, *map(use_case.topic, OWN))
    compacted = {**FOREVER, "cleanup.policy": "compact"}
    return {**{name: dict(FOREVER) for name in plain}, use_case.topic("models"): compacted}


def create(settings: Settings, name: str) -> list[str]:
    """Create the missing topics with the use case's partition count; returns their names."""
    use_case = load(name)
    return wiring.broker(settings).create_topics(topics(use_case), use_case.partitions)


if __name__ == "__main__":
    try:
        print("created:", ", ".join(create(Settings.load(), sys.argv[1])) or "none")
    except PenstockError as error:
        sys.exit(f"penstock: {error}")
