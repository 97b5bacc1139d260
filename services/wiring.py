"""Where settings become connections: one constructor for each thing outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.settings import Settings

if TYPE_CHECKING:
    from features.usecase import UseCase
    from pipelines.feature_store import FeatureStore
    from pipelines.kafka import KafkaBroker
    from pipelines.registry import Registry


def broker(settings: Settings) -> KafkaBroker:
    """The Kafka cluster."""
    from pipelines.kafka import KafkaBroker

    return KafkaBroker(
        settings.kafka_bootstrap,
        security=settings.kafka_security,
        username=settings.kafka_username,
        password=settings.kafka_password,
        cafile=settings.kafka_cafile,
    )


def registry(settings: Settings) -> Registry:
    """The model registry."""
    from pipelines.registry import Registry

    return Registry(settings.mlflow_url)


def feature_store(settings: Settings, use_case: UseCase) -> FeatureStore:
    """The online store of a use case."""
    from pipelines.feature_store import FeatureStore, repo_config

    return FeatureStore(use_case, repo_config(settings.redis))
