"""`python -m services.topics USE_CASE`: create the topics of a use case that aren't there yet."""

from __future__ import annotations

import sys

from features.errors import PenstockError
from features.usecase import UseCase, load
from pipelines.broker import Broker
from services import wiring
from services.settings import Settings

FOREVER = {"retention.ms": "-1", "message.timestamp.type": "CreateTime"}
OWN = ("requests", "predictions", "examples", "cuts", "drift", "rejected")
TopicSettings = dict[str, dict[str, str]]


def topics(use_case: UseCase) -> TopicSettings:
    """Topics with the use case's partition count -> settings.

    Records carry event time, so that a retention by time would delete history.
    """
    return {name: dict(FOREVER) for name in (*use_case.event_topics, *map(use_case.topic, OWN))}


def control_topics(use_case: UseCase) -> TopicSettings:
    """The controller's topics: one partition, whatever the use case has, as one controller decides."""
    return {
        use_case.topic("commands"): dict(FOREVER),
        use_case.topic("evidence"): dict(FOREVER),
        use_case.topic("models"): {**FOREVER, "cleanup.policy": "compact"},
    }


def create_topics(broker: Broker, use_case: UseCase) -> list[str]:
    """Create the missing topics of a use case; returns their names."""
    created = broker.create_topics(topics(use_case), use_case.partitions)
    return created + broker.create_topics(control_topics(use_case), 1)


def create(settings: Settings, name: str) -> list[str]:
    """Create the missing topics on the broker of the settings; returns their names."""
    return create_topics(wiring.broker(settings), load(name))


if __name__ == "__main__":
    try:
        print("created:", ", ".join(create(Settings.load(), sys.argv[1])) or "none")
    except PenstockError as error:
        sys.exit(f"penstock: {error}")
