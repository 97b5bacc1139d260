"""Feast's offline store over the featurizer's files: point-in-time joins by DuckDB's ASOF JOIN.

`feature_store.yaml` names the class here, so Feast's own `get_historical_features` works; our processes call
`historical_features` with a use case's objects. Only files that a committed snapshot vouches for are read, so the
broker is asked for it: a folder alone can't tell a file of a commit that failed from one that counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import duckdb
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.compute as pc
from feast import RepoConfig
from feast.errors import EntityTimestampInferenceException
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel
from pydantic import ConfigDict

from features.errors import ConfigError, InputError, StateError
from features.usecase import UseCase
from features.vectors import empty_row, join_keys
from pipelines.broker import Broker
from pipelines.offline_files import Partition, partitions
from pipelines.tables import arrow_type

NAME: Literal["pipelines.offline_store.PenstockOfflineStore"] = "pipelines.offline_store.PenstockOfflineStore"
BATCH = 10_000  # rows at a time for on-demand functions


class PenstockOfflineStoreConfig(FeastConfigBaseModel):
    """`offline_store` in feature_store.yaml.

    state_url : where the featurizer keeps its files
    kafka_bootstrap ... kafka_cafile : the broker that knows which of them count; or `broker`, an open one
    memory_mb, threads : what a join may use; past it, it goes through temporary files
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    type: Literal["pipelines.offline_store.PenstockOfflineStore"] = NAME
    state_url: str
    kafka_bootstrap: str = ""
    kafka_security: str = "PLAINTEXT"
    kafka_username: str = ""
    kafka_password: str = ""
    kafka_cafile: str = ""
    broker: Any = None
    memory_mb: int = 1024
    threads: int = 2

    @contextmanager
    def connected(self) -> Iterator[Broker]:
        """The broker, for the time of a question."""
        if self.broker is not None:
            yield self.broker
            return
        if "$" in f"{self.state_url}{self.kafka_bootstrap}" or not self.kafka_bootstrap:
            raise ConfigError(
                'offline store: state_url and kafka_bootstrap are not set: eval "$(penstock up --env)" first'
            )
        from pipelines.kafka import KafkaBroker

        names = ("security", "username", "password", "cafile")
        with closing(KafkaBroker(self.kafka_bootstrap, **{n: getattr(self, f"kafka_{n}") for n in names})) as broker:
            yield broker


class PenstockOfflineStore(OfflineStore):
    """What Feast asks of an offline store, as far as rows that a featurizer writes allow."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[Any],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: Any,
        project: str,
        full_feature_names: bool = False,
        **kwargs: Any,
    ) -> RetrievalJob:
        """The features of each row of `entity_df` as they were at its timestamp; see `historical_features`."""
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        return _job(config.offline_store, feature_views, feature_refs, entity_df, on_demand, full_feature_names)

    @staticmethod
    def pull_latest_from_table_or_query(*args: Any, **kwargs: Any) -> RetrievalJob:
        raise ConfigError("nothing to materialize: the featurizer writes the online store as it goes")

    def validate_data_source(self, config: RepoConfig, data_source: Any) -> None:
        """Files come when the featurizer runs."""


def historical_features(use_case: UseCase, config: PenstockOfflineStoreConfig, entity_df: pd.DataFrame) -> pd.DataFrame:
    """All features of a use case, on-demand ones too, as of each row's timestamp.

    Parameters
    ----------
    entity_df : [n] rows with a timestamp (`event_timestamp`, naive is UTC), the entity keys, given and derived, and
        the request's fields that on-demand features read

    Returns
    -------
    The columns of `entity_df`, then the features; [n] rows in the same order. A key without a row, or with one past
    the view's ttl, reads as the empty window.

    Raises
    ------
    InputError : a column that is needed is missing or of the wrong type, or lies before what retention has left
    """
    views = [*use_case.views, *use_case.on_demand]
    refs = [f"{view.name}:{feature.name}" for view in views for feature in view.features]
    return _job(config, use_case.views, refs, entity_df, use_case.on_demand, False).to_df()


class _Job(RetrievalJob):
    """A query that runs when its result is asked for."""

    def __init__(
        self, query: Callable[[], pa.Table], on_demand: list[Any], full_names: bool, metadata: RetrievalMetadata
    ) -> None:
        self._query, self._on_demand = query, on_demand
        self._full_names, self._metadata = full_names, metadata

    @property
    def full_feature_names(self) -> bool:
        return self._full_names

    @property
    def on_demand_feature_views(self) -> list[Any]:
        """Those that Feast applies itself."""
        return self._on_demand

    @property
    def metadata(self) -> RetrievalMetadata:
        return self._metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._query()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._query().to_pandas()


class _Lookup(NamedTuple):
    """One view in a join: `keys` as (column of entity_df, of the files), `features` as (result's name, feature)."""

    view: Any
    keys: list[tuple[str, str]]
    features: list[tuple[str, Any]]


def _job(
    config: PenstockOfflineStoreConfig,
    views: Sequence[Any],
    refs: Sequence[str],
    entity_df: Any,
    on_demand: Sequence[Any],
    full_names: bool,
) -> RetrievalJob:
    if not isinstance(entity_df, pd.DataFrame):
        raise InputError("entity_df must be a DataFrame with an event_timestamp: SQL and date ranges are not supported")
    lookups = [_lookup(view, refs, full_names) for view in views]
    at = _times(entity_df)
    entities = _entities(entity_df, at, lookups)
    ours = [view for view in on_demand if view.mode == "python" and view.singleton]

    def query() -> pa.Table:
        table = pa.Table.from_pandas(entity_df, preserve_index=False)
        for name, column in _join(config, lookups, entities):
            table = table.append_column(name, column)
        for view in ours:
            for name, column in _apply(view, table, refs, full_names):
                table = table.append_column(name, column)
        return table

    keys = [name for name in entity_df.columns if name != at.name]
    metadata = RetrievalMetadata(list(refs), keys, at.min(), at.max())
    return _Job(query, [view for view in on_demand if view not in ours], full_names, metadata)


def _lookup(view: Any, refs: Sequence[str], full_names: bool) -> _Lookup:
    wanted = {
        feature for name, _, feature in (ref.partition(":") for ref in refs) if name == view.projection.name_to_use()
    }
    prefix = f"{view.projection.name_alias or view.name}__" if full_names else ""
    mapped = view.projection.join_key_map or {}
    keys = [(mapped.get(key, key), key) for key in join_keys(view)]
    return _Lookup(view, keys, [(prefix + f.name, f) for f in view.features if f.name in wanted])


def _times(entity_df: pd.DataFrame) -> pd.Series:
    """The timestamps, in UTC."""
    try:
        name = infer_event_timestamp_from_entity_df(dict(entity_df.dtypes))
        times = pd.to_datetime(entity_df[name], utc=True)
    except (EntityTimestampInferenceException, ValueError, TypeError) as error:
        raise InputError(f"entity_df needs a column of timestamps, `event_timestamp`: {error}") from None
    if times.isna().any():
        raise InputError(f"entity_df: {int(times.isna().sum())} rows have no {name}")
    return times


def _entities(entity_df: pd.DataFrame, at: pd.Series, lookups: Sequence[_Lookup]) -> pa.Table:
    """What is joined: row number, time (epoch ms) and the entity keys in the views' types."""
    columns = {" row": pa.array(range(len(entity_df))), " at": pa.array(at.dt.as_unit("ms").astype("int64"))}
    for view, keys, _ in lookups:
        types = {f.name: arrow_type(f.dtype) for f in view.entity_columns}
        for name, key in keys:
            if name not in entity_df:
                raise InputError(f"entity_df has no column {name!r}, the entity key of view {view.name}")
            try:
                columns[name] = pa.array(entity_df[name], types[key], from_pandas=True)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise InputError(f"entity_df: column {name!r} must have type {types[key]}: {error}") from None
    return pa.table(columns)


def _join(
    config: PenstockOfflineStoreConfig, lookups: Sequence[_Lookup], entities: pa.Table
) -> list[tuple[str, pa.ChunkedArray]]:
    """(name, values) of every feature in the order of `entities`; one view after the other, to bound memory."""
    with config.connected() as broker:
        use_cases = {_use_case(lookup) for lookup in lookups}
        found = {use_case: partitions(config.state_url, use_case, broker) for use_case in use_cases}
    columns: list[tuple[str, pa.ChunkedArray]] = []
    with tempfile.TemporaryDirectory(prefix="penstock-join-") as folder, duckdb.connect() as db:
        options = {"memory_limit": f"{config.memory_mb}MB", "threads": config.threads, "temp_directory": folder}
        for option, value in options.items():
            db.execute(f"SET {option} = '{value}'")
        db.register("entities", entities)
        for part in [part for parts in found.values() for part in parts if not part.local][:1]:
            db.register_filesystem(part.fs)
        for lookup in lookups:
            table = _ask(db, lookup, _paths(lookup.view.name, found[_use_case(lookup)], entities), len(entities))
            columns += zip(table.column_names, table.columns, strict=True)
    return columns


def _use_case(lookup: _Lookup) -> str:
    """The source of a view's rows lies below the use case's folder."""
    return str(lookup.view.batch_source.path.split("/")[0])


def _paths(view: str, parts: Sequence[Partition], entities: pa.Table) -> list[str]:
    """The view's files; InputError when the questions reach back before what retention has left."""
    paths = []
    for part in parts:
        files = part.files(view)
        since = max((f.since for f in files), default=0)
        if len(entities) and since > (first := pc.min(entities[" at"]).as_py()):
            left, asked = (pd.Timestamp(t, unit="ms", tz="UTC").isoformat() for t in (since, first))
            raise InputError(f"view {view}: retention has left what is needed from {left} on, asked for {asked}")
        paths += [part.url(f) for f in files]
    return paths


def _ask(db: duckdb.DuckDBPyConnection, lookup: _Lookup, paths: Sequence[str], rows: int) -> pa.Table:
    view, keys, features = lookup
    empty = empty_row(view)
    values = [pa.scalar(empty[f.name], arrow_type(f.dtype)) for _, f in features]
    if not paths:
        return pa.table({name: pa.repeat(v, rows) for (name, _), v in zip(features, values, strict=True)})
    ttl = round((view.ttl or timedelta(0)).total_seconds() * 1000)
    gone = 'r." at" IS NULL' + (f' OR e." at" - r." at" > {ttl}' if ttl else "")
    literals = [_literal(empty[f.name]) for _, f in features]
    columns = [
        f"CASE WHEN {gone} THEN {v} ELSE r.{_quoted(f.name)} END AS {_quoted(n)}"
        for (n, f), v in zip(features, literals, strict=True)
    ]
    same = [f"e.{_quoted(name)} = r.{_quoted(key)}" for name, key in keys]
    query = (
        f"SELECT {', '.join(columns)} FROM entities e ASOF LEFT JOIN "
        '(SELECT *, epoch_ms(event_timestamp) AS " at" FROM read_parquet($paths, union_by_name = true)) r '
        f'ON {" AND ".join([*same, """e." at" >= r." at" """])} ORDER BY e." row"'
    )
    try:
        return db.sql(query, params={"paths": list(paths)}).to_arrow_table()
    except duckdb.IOException as error:
        raise StateError(f"view {view.name}: a file of its rows can't be read: {error}") from None
    except duckdb.BinderException as error:
        raise StateError(
            f"view {view.name}: its rows have other columns than the view, run `penstock backfill`: {error}"
        ) from None


def _literal(value: Any) -> str:
    return "NULL" if value is None else str(value)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _apply(view: Any, table: pa.Table, refs: Sequence[str], full_names: bool) -> list[tuple[str, pa.Array]]:
    """The requested outputs of an on-demand view of single rows, which Feast itself would call with whole columns."""
    asked = {feature for name, _, feature in (r.partition(":") for r in refs) if name == view.projection.name_to_use()}
    wanted = [f for f in view.features if f.name in asked]
    inputs = {name: name for name in view.get_request_data_schema()}
    for source in view.source_feature_view_projections.values():
        prefix = f"{source.name_to_use()}__" if full_names else ""
        inputs |= {f.name: prefix + f.name for f in source.features}
    if missing := sorted(set(inputs.values()) - set(table.column_names)):
        raise InputError(f"entity_df has no column {', '.join(missing)}, which on-demand view {view.name} reads")
    outputs: dict[str, list[Any]] = {f.name: [] for f in wanted}
    given = table.select(list(inputs.values())).rename_columns(list(inputs))
    for batch in given.to_batches(BATCH):
        for row in batch.to_pylist():
            result = view.feature_transformation.udf(row)
            for name, values in outputs.items():
                values.append(result[name])
    prefix = f"{view.projection.name_to_use()}__" if full_names else ""
    return [(prefix + f.name, pa.array(outputs[f.name], arrow_type(f.dtype))) for f in wanted]
