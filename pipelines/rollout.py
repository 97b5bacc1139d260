"""Which version serves: a pure function of the serving state and a command.

The evidence of `consider` is a paired comparison on the newest examples, which neither version has trained on: both
scored the same vectors, losses are clipped, and averaged by block of event time because they correlate within one.
By the policy it decides at once, or a trial does: the challenger scores beside the champion, unseen (shadow), then
answers a share of the callers (canary), until it is proven better, or rolled back.

>>> policy = RolloutPolicy.immediate()
>>> state, first = decide(RolloutState(), Command("consider", "1", id="a"), policy, 0)
>>> first.sentence
'promoted version 1: the first one serves without a comparison'
>>> blocks = [{"start": 0, "n": 300, "difference": -0.02}, {"start": 3_600_000, "n": 100, "difference": 0.01}]
>>> evidence = {"champion": "1", "log_loss": 0.4, "champion_log_loss": 0.4125, "blocks": blocks}
>>> decide(state, Command("consider", "2", id="b", evidence=evidence), policy, 1)[1].sentence
'promoted version 2 over 1: log loss .4000 against .4125 on 400 newest examples (difference -.0125 +- .0112 over \
2 hourly blocks)'
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from typing import Any

from pipelines.trial import Trial

DECISIONS_KEPT = 50
PROMOTED, REFUSED, ROLLED_BACK, MOVED, WAITS = "promoted", "refused", "rolled_back", "moved", "waits"
SHADOW, CANARY = "shadow", "canary"
ERROR_RATE, FEW_DAYS = 0.001, 3


@dataclass(frozen=True)
class RolloutPolicy:
    """When a challenger replaces the champion.

    min_examples : newest examples that a comparison needs
    loss_cap : an example's loss is clipped at it (nats) by the evaluation, so that no single one decides; a block
        whose mean difference is beyond it was not clipped and is refused
    margin : the mean difference (nats, challenger minus champion) must lie below it
    share : of the callers that a canary answers; 0: no trial, the evaluation decides
    error : probability of promoting one that is no better, over all looks
    horizon_days : of labelled requests, after which a trial ends without a proof
    shadow_requests, shadow_days : what is seen before callers see the challenger; days with their labels
    max_errors, max_distance, max_slowness : answers that were no number (above one in a thousand); mean distance of the
        scores from the champion's; how many times the champion's time an answer may take
    canary_requests : that it has answered before it is promoted
    guard_requests : what distance and slowness are judged on at least
    max_gap, max_loss : how much further than the champion's the mean score may lie from the mean label, and its mean
        loss be, when a few days are known: more is broken, and needs no proof
    """

    min_examples: int = 200
    loss_cap: float = 4.0
    margin: float = 0.0
    share: float = 0.0
    error: float = 0.05
    horizon_days: int = 250
    shadow_requests: int = 500
    shadow_days: int = 1
    max_errors: int = 3
    max_distance: float = 0.25
    max_slowness: float = 3.0
    canary_requests: int = 100
    guard_requests: int = 200
    max_gap: float = 0.05
    max_loss: float = 0.05

    @classmethod
    def immediate(cls) -> RolloutPolicy:
        """Better on average is enough: a refused version costs a week of learning, the next cut corrects an error."""
        return cls()

    @classmethod
    def standard(cls) -> RolloutPolicy:
        """A tenth of the callers see it before it is proven."""
        return cls(share=0.1)

    @classmethod
    def cautious(cls) -> RolloutPolicy:
        """A week in shadow, few callers, one error in a hundred."""
        return cls(share=0.02, error=0.01, horizon_days=400, shadow_requests=5000, shadow_days=7)


POLICIES = {name: getattr(RolloutPolicy, name) for name in ("immediate", "standard", "cautious")}


@dataclass(frozen=True)
class Command:
    """What somebody asks of the controller. `evidence` and `tags` come with `consider`."""

    command: str
    version: str | None = None
    who: str = ""
    why: str = ""
    id: str = ""
    evidence: Mapping[str, Any] | None = None
    tags: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Decision:
    """What was decided on a command, and why.

    command : the command's id
    against : the champion that the version was compared with; None when no comparison decided
    """

    version: str | None
    action: str
    sentence: str
    command: str
    who: str
    time: int
    cut: int | None = None
    against: str | None = None


@dataclass(frozen=True)
class RolloutState:
    """What serves, and how it came to.

    versions : those that have served, in the order of their promotions
    trial : of the challenger
    share : of the callers, the challenger's
    waiting : the newest command to consider a version that came during the trial
    """

    generation: int = 0
    champion: str | None = None
    versions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()
    trial: Trial | None = None
    share: float = 0.0
    waiting: Command | None = None

    def as_json(self) -> dict[str, Any]:
        """The value of the `state` record in `<uc>.models`."""
        challenger = {self.trial.version: self.share} if self.trial else {}
        return {
            "generation": self.generation,
            "roles": {"champion": self.champion, "challenger": self.trial.version if self.trial else None},
            "phase": self.trial.phase if self.trial else None,
            "shares": ({self.champion: 1.0 - self.share} if self.champion else {}) | challenger,
            "versions": {version: dict(facts) for version, facts in self.versions.items()},
            "trial": self.trial.as_json() if self.trial else None,
            "waiting": asdict(self.waiting) if self.waiting else None,
            "decisions": [asdict(decision) for decision in self.decisions],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RolloutState:
        trial, waiting = data.get("trial"), data.get("waiting")
        return cls(
            data["generation"],
            data["roles"]["champion"],
            dict(data["versions"]),
            tuple(Decision(**decision) for decision in data["decisions"]),
            Trial.from_json(trial) if trial else None,
            data["shares"].get(trial["version"], 0.0) if trial else 0.0,
            Command(**waiting) if waiting else None,
        )

    @property
    def previous(self) -> str | None:
        """The champion before this one, among those not rolled back."""
        before = list(takewhile(lambda version: version != self.champion, self.versions))
        return next((v for v in reversed(before) if "rolled_back" not in self.versions[v]), None)


@dataclass(frozen=True)
class _Verdict:
    """champion : who serves from now on; None: who does. `ends` : the trial does, as with another champion."""

    action: str
    sentence: str
    champion: str | None = None
    against: str | None = None
    trial: Trial | None = None
    waiting: Command | None = None
    ends: bool = False


def decide(state: RolloutState, command: Command, policy: RolloutPolicy, now_ms: int) -> tuple[RolloutState, Decision]:
    """Act on a command.

    A command whose id has been decided changes nothing and gives its decision again. Whatever is wrong with a command
    or its evidence is a refusal with the reason, never an exception.
    """
    for decision in state.decisions:
        if decision.command == command.id:
            return state, decision
    rule = {"consider": _consider, "promote": _promote, "rollback": _rollback}.get(command.command, _unknown)
    verdict = rule(state, command, policy, now_ms)
    version = command.version
    if verdict.action == ROLLED_BACK:
        version = state.trial.version if state.trial else state.champion
    return _act(state, verdict, version, policy, now_ms, command)


def judge(state: RolloutState, evidence: Any, policy: RolloutPolicy, now_ms: int) -> tuple[RolloutState, bool]:
    """Take evidence of the trial in and act when it suffices; says whether it did, or a day of labels became complete.

    evidence : a value of `evidence_contract`; of other versions than those that serve it is ignored
    """
    trial = state.trial
    if trial is None or (evidence.champion, evidence.challenger) != (state.champion, trial.version):
        return state, False
    seen = trial.add(evidence)
    state, told = replace(state, trial=seen), seen.difference.n > trial.difference.n
    verdict = _judged(state, seen, policy)
    if verdict is None:
        return (replace(state, generation=state.generation + 1) if told else state), told
    return _act(state, verdict, trial.version, policy, now_ms, _own(state, trial))[0], True


def _own(state: RolloutState, trial: Trial) -> Command:
    """What the controller does of itself."""
    return Command("judge", trial.version, "control", "", f"trial {trial.version} {state.generation}", tags=trial.tags)


def _act(
    state: RolloutState, verdict: _Verdict, version: str | None, policy: RolloutPolicy, now_ms: int, by: Command
) -> tuple[RolloutState, Decision]:
    cut = _integer(by.tags, "cut")
    decision = Decision(version, verdict.action, verdict.sentence, by.id, by.who, now_ms, cut, verdict.against)
    over = verdict.ends or verdict.champion is not None
    trial, waiting = verdict.trial or (None if over else state.trial), verdict.waiting or state.waiting
    share = policy.share if trial and trial.phase == CANARY else 0.0
    after = replace(_apply(state, by, decision, verdict.champion, now_ms), trial=trial, share=share, waiting=waiting)
    if trial is None and waiting is not None:
        again = replace(waiting, id=f"{waiting.id} again")
        after, _ = decide(replace(after, waiting=None), again, policy, now_ms)
    return after, decision


def _apply(state: RolloutState, by: Command, decision: Decision, champion: str | None, now: int) -> RolloutState:
    state = replace(state, generation=state.generation + 1, decisions=(*state.decisions, decision)[-DECISIONS_KEPT:])
    if champion is None:
        return state
    versions = {version: dict(facts) for version, facts in state.versions.items()}
    if decision.action == ROLLED_BACK:
        versions[str(state.champion)]["rolled_back"] = now
        versions[champion]["since"] = now
    else:
        facts = versions.pop(champion, {})
        facts |= {name: _integer(by.tags, name, facts.get(name)) for name in ("cut", "latest_label_time")}
        facts.pop("rolled_back", None)
        versions[champion] = facts | {"since": now}
    kept = dict(list(versions.items())[-DECISIONS_KEPT:])
    return replace(state, champion=champion, versions=kept | {champion: versions[champion]})


def _unknown(state: RolloutState, command: Command, policy: RolloutPolicy, now: int) -> _Verdict:
    return _Verdict(REFUSED, f"refused {command.command!r}: the commands are consider, promote and rollback")


def _promote(state: RolloutState, command: Command, policy: RolloutPolicy, now: int) -> _Verdict:
    version = command.version
    if not version:
        return _Verdict(REFUSED, "refused to promote: the command names no version")
    if version == state.champion:
        return _Verdict(REFUSED, f"refused version {version}: it serves already")
    over = f" over {state.champion}" if state.champion else ""
    because = f": {command.why}" if command.why else ""
    if state.trial and state.trial.version != version:
        because += f"; the trial of version {state.trial.version} ends"
    return _Verdict(PROMOTED, f"promoted version {version}{over} by hand{because}", version)


def _rollback(state: RolloutState, command: Command, policy: RolloutPolicy, now: int) -> _Verdict:
    because = f": {command.why}" if command.why else ""
    if state.trial:
        sentence = f"rolled back version {state.trial.version}, {state.champion} stays{because}"
        return _Verdict(ROLLED_BACK, sentence, ends=True)
    if state.champion is None or state.previous is None:
        return _Verdict(REFUSED, "refused to roll back: no version served before this one")
    return _Verdict(ROLLED_BACK, f"rolled back version {state.champion} to {state.previous}{because}", state.previous)


def _consider(state: RolloutState, command: Command, policy: RolloutPolicy, now: int) -> _Verdict:
    version = command.version
    if not version:
        return _Verdict(REFUSED, "refused to consider: the command names no version")
    if reason := _settled(state, version):
        return _Verdict(REFUSED, f"refused version {version}: {reason}")
    if state.champion is None:
        return _Verdict(PROMOTED, f"promoted version {version}: the first one serves without a comparison", version)
    if policy.share:
        return _try(state, command, policy, now)
    try:
        evidence = Evidence.parse(command.evidence, policy)
    except ValueError as error:
        return _Verdict(REFUSED, f"refused version {version}: {error}")
    return _compare(version, state.champion, evidence, policy)


def _try(state: RolloutState, command: Command, policy: RolloutPolicy, now: int) -> _Verdict:
    """Begin a trial, or wait for the end of the one that is on."""
    version = str(command.version)
    if state.trial and state.trial.version == version:
        return _Verdict(REFUSED, f"refused version {version}: its trial is on")
    if state.trial:
        instead = f" in place of version {state.waiting.version}" if state.waiting else ""
        sentence = f"version {version} waits{instead}: the trial of version {state.trial.version} is on"
        return _Verdict(WAITS, sentence, waiting=command)
    sentence = f"version {version} scores beside {state.champion}, unseen by callers"
    return _Verdict(MOVED, sentence, trial=Trial(version, SHADOW, now, dict(command.tags or {})))


def _judged(state: RolloutState, trial: Trial, policy: RolloutPolicy) -> _Verdict | None:
    """What the evidence suffices for; None: for nothing yet."""
    version, champion, seen = trial.version, state.champion, trial.difference
    what = f"log loss {_number(seen.mean)} a day over {seen.n} days, {trial.examples:.0f} labelled requests"
    reason = _broken(trial, policy)
    if not reason and seen.is_above(policy.error):
        reason = f"it is worse, {what}"
    if not reason and seen.n >= policy.horizon_days:
        reason = f"it is not proven better, {what}"
    if reason:
        return _Verdict(
            ROLLED_BACK, f"rolled back version {version}, {champion} stays: {reason}", None, champion, ends=True
        )
    if trial.phase == CANARY:
        if not seen.is_below(policy.error) or trial.requests.get("canary", 0.0) < policy.canary_requests:
            return None
        return _Verdict(PROMOTED, f"promoted version {version} over {champion}: {what}", version, champion)
    if trial.requests.get("requests", 0.0) < policy.shadow_requests or seen.n < policy.shadow_days:
        return None
    sentence = f"version {version} answers {policy.share:.0%} of the callers beside {champion}: sound so far, {what}"
    return _Verdict(MOVED, sentence, trial=replace(trial, phase=CANARY))


def _broken(trial: Trial, policy: RolloutPolicy) -> str:
    """What is wrong with a challenger whatever its labels say; empty when nothing is."""
    n, errors = trial.requests.get("requests", 0.0), trial.requests.get("errors", 0.0)
    if errors >= policy.max_errors and errors > n * ERROR_RATE:
        return f"{errors:.0f} of {n:.0f} answers were no number"
    distance, slowness = trial.mean("distance"), math.exp(trial.mean("slowness"))
    if n >= policy.guard_requests and distance > policy.max_distance:
        return f"its scores lie {_number(distance)} from the champion's on average of {n:.0f} requests"
    if n >= policy.guard_requests and slowness > policy.max_slowness:
        return f"it takes {slowness:.1f} times as long as the champion on average of {n:.0f} requests"
    gap, other = (value / max(1.0, trial.examples) for value in (trial.gap, trial.champion_gap))
    if trial.difference.n < FEW_DAYS:
        return ""
    if trial.difference.mean > policy.max_loss:
        return (
            f"its log loss is {_number(trial.difference.mean)} above the champion's, over {trial.examples:.0f} requests"
        )
    if abs(gap) > abs(other) + policy.max_gap:
        mean = f"{_number(gap)} from the mean label, the champion's {_number(other)}"
        return f"its mean score lies {mean}, over {trial.examples:.0f} requests"
    return ""


def _settled(state: RolloutState, version: str) -> str:
    """Why there is nothing to consider; empty when there is."""
    if version == state.champion:
        return "it serves already"
    if version in state.versions:
        return "it has served before; promote it by hand to serve it again"
    for decision in state.decisions:
        if decision.version == version and decision.against == state.champion and decision.against is not None:
            return f"it was compared with version {state.champion} already: {decision.sentence}"
    return ""


def _compare(version: str, champion: str, evidence: Evidence, policy: RolloutPolicy) -> _Verdict:
    if evidence.champion != champion:
        told = f"compared with version {evidence.champion}" if evidence.champion else "evaluated without a champion"
        return _Verdict(REFUSED, f"refused version {version}: {told} but {champion} serves now: consider it again")
    if evidence.n < policy.min_examples:
        few = f"{evidence.n} newest examples are too few, {policy.min_examples} are needed"
        return _Verdict(REFUSED, f"refused version {version}: {few}")
    facts = (
        f"log loss {_number(evidence.log_loss)} against {_number(evidence.champion_log_loss)} on {evidence.n} newest"
        f" examples (difference {evidence.difference})"
    )
    if evidence.mean < policy.margin:
        return _Verdict(PROMOTED, f"promoted version {version} over {champion}: {facts}", version, champion)
    return _Verdict(REFUSED, f"refused version {version}, {champion} stays: {facts}", None, champion)


@dataclass(frozen=True)
class Evidence:
    """A paired comparison.

    n : examples
    mean : mean difference of clipped losses, challenger minus champion, nats
    error : its standard error from the blocks' means; None with a single block
    """

    champion: str | None
    log_loss: float
    champion_log_loss: float
    n: int
    mean: float
    error: float | None
    blocks: int

    @classmethod
    def parse(cls, data: Mapping[str, Any] | None, policy: RolloutPolicy) -> Evidence:
        """Checked evidence; raises ValueError saying what is wrong with it."""
        if not isinstance(data, Mapping):
            raise ValueError("the command carries no evidence")
        champion = data.get("champion")
        if champion is None:
            return cls(None, 0.0, 0.0, 0, 0.0, None, 0)
        blocks = data.get("blocks")
        if not isinstance(blocks, Sequence) or not blocks or not all(isinstance(b, Mapping) for b in blocks):
            raise ValueError("its evidence has no blocks")
        counts = [_count(block) for block in blocks]
        means = [_finite(block, "difference") for block in blocks]
        if any(abs(mean) > policy.loss_cap for mean in means):
            raise ValueError(f"its evidence has a difference beyond {policy.loss_cap:g}: the losses were not clipped")
        mean, error = weighted(counts, means)
        loss, champion_loss = _finite(data, "log_loss"), _finite(data, "champion_log_loss")
        return cls(str(champion), loss, champion_loss, sum(counts), mean, error, len(blocks))

    @property
    def difference(self) -> str:
        spread = f" +- {_number(self.error)}" if self.error is not None else ""
        return f"{_number(self.mean)}{spread} over {self.blocks} hourly block{'s' if self.blocks > 1 else ''}"


def weighted(counts: Sequence[int], means: Sequence[float]) -> tuple[float, float | None]:
    """Mean over all examples from the blocks' means, and its standard error with blocks as clusters.

    >>> weighted([100, 100], [-0.01, -0.03])
    (-0.02, 0.01)
    """
    total, number = sum(counts), len(counts)
    mean = math.fsum(n * m for n, m in zip(counts, means, strict=True)) / total
    if number < 2:
        return mean, None
    spread = math.fsum((n / total * (m - mean)) ** 2 for n, m in zip(counts, means, strict=True))
    return mean, math.sqrt(spread * number / (number - 1))


def _count(block: Mapping[str, Any]) -> int:
    n = block.get("n")
    if not isinstance(n, int) or isinstance(n, bool) or not 0 < n < 2**53:
        raise ValueError(f"its evidence has a block with n = {n!r}")
    return n


def _finite(data: Mapping[str, Any], name: str) -> float:
    value = data.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        raise ValueError(f"its evidence has {name} = {value!r}, which is no finite number")
    return float(value)


def _integer(data: Mapping[str, Any] | None, name: str, default: int | None = None) -> int | None:
    """A tag as an integer: the registry keeps tags as text."""
    value = data.get(name) if isinstance(data, Mapping) else None
    try:
        return int(value) if value is not None else default
    except (TypeError, ValueError, OverflowError):
        return default


def _number(value: float) -> str:
    """Four decimals without the leading zero: `.4312`, `-.0079`."""
    return f"{value:.4f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.4f}"
