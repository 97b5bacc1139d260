"""`<uc>_features`, a catch-up every quarter of an hour for teams without the process that always runs, `<uc>_backfill`,
on demand, and `<uc>_housekeeping`, once a day."""

from __future__ import annotations

from airflow.sdk import Param
from factory import LONG, at, call, dag, features, use_cases

FEATURES = """
Brings the features and labels of **{name}** up to the end that its topics have now
(`penstock run featurizer+joiner {name} --once`). Instead of the process that `penstock up` runs all the time: where
that runs, a run says so and ends. Paused until it is wanted. A run that is repeated goes on from the last commit.
"""
BACKFILL = """
Computes a new or changed view of **{name}** over history with the engine that serves it (`penstock backfill`); the
running featurizer takes it over. A run that is repeated, or was stopped, goes on from its last commit.
"""
HOUSEKEEPING = """
Merges small offline files of **{name}**, removes offline rows by `offline_keep_days`, versions that never served by
`registry_keep_days`, backfills that were taken over, and dead online keys (`penstock housekeeping`). Safe beside
everything; a repeated run finds nothing left to do.
"""
DAY = {"type": ["null", "string"], "format": "date"}
PARAMS = {
    "view": Param(
        type="string",
        pattern="^[A-Za-z_][A-Za-z0-9_]{0,63}$",
        description="The stream feature view that is new or was changed, by its name in features/.",
    ),
    "from": Param(None, **DAY, description="A day in UTC: events before it don't count. Empty: all count."),
    "until": Param(None, **DAY, description="A day in UTC: stop there, a later run goes on. Empty: to the end."),
}
# Values get to the command by the environment, each as one argument: the shell never reads them as code.
VALUES = {"VIEW": "{{ params.view }}", "FROM": "{{ params['from'] or '' }}", "UNTIL": "{{ params.until or '' }}"}
OPTIONS = '"--view=$VIEW" ${FROM:+"--from=$FROM"} ${UNTIL:+"--until=$UNTIL"}'

for name in use_cases():
    alone = {"max_active_runs": 1}
    with dag(name, "features", FEATURES, schedule=at("*/15 * * * *"), is_paused_upon_creation=True, **alone):
        doc = "Runs featurizer and joiner to the end of their input and tells how far they are."
        command = f"exec penstock run featurizer+joiner {name} --once"
        call("catch_up", doc, command, "upkeep", 4, outlets=[features(name)])
    with dag(name, "backfill", BACKFILL, schedule=None, params=PARAMS, **alone):
        doc = "Computes the view and waits until the running featurizer serves it."
        more = {"env": VALUES, "append_env": True, "outlets": [features(name)]}
        call("backfill", doc, f"exec penstock backfill {name} {OPTIONS}", "upkeep", 24, pool_slots=LONG, **more)
    with dag(name, "housekeeping", HOUSEKEEPING, schedule=at("30 4 * * *"), **alone):
        doc = "One round; tells what it merged and removed."
        call("housekeeping", doc, f"exec penstock housekeeping {name}", "upkeep", 4)
