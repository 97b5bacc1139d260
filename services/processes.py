"""Keeping processes alive: start in order of need, probe, restart with backoff, leave none behind."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from features.errors import PenstockError, UnavailableError

FIRST_DELAY_S, LONGEST_DELAY_S, HEALTHY_S = 0.2, 30.0, 60.0
PROBE_S = 0.2
ATTEMPTS = 3  # exits before the first readiness that are forgiven
LOG_LIMIT = 20_000_000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

_prctl = ctypes.CDLL(None, use_errno=True).prctl


def die_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the one that started it is gone."""
    _prctl(PR_SET_PDEATHSIG, signum)


@dataclass(frozen=True)
class Service:
    """One process of the stack.

    ready : real probe, called in a thread until it returns True; it may raise OSError or PenstockError while not
    needs : names of services that must be ready before this one starts
    prepare : what must be done before the first start (files, formats)
    after : what must be done when it first answers, before those that need it start
    once : it runs to its end and is ready when it exits with 0; not restarted
    stop : the signal that ends it in good order, `grace_s` later it is killed
    """

    name: str
    command: Sequence[str]
    env: Mapping[str, str]
    ready: Callable[[], bool] = lambda: True
    needs: tuple[str, ...] = ()
    prepare: Callable[[], None] | None = None
    after: Callable[[], None] | None = None
    once: bool = False
    stop: signal.Signals = signal.SIGTERM
    grace_s: float = 10.0
    deadline_s: float = 240.0
    cwd: Path | None = None


@dataclass
class State:
    """What `status` shows of a service; `since` is epoch seconds."""

    state: str = "waiting"
    pid: int | None = None
    restarts: int = 0
    since: float = field(default_factory=time.time)


class Supervisor:
    """Runs services until it is told to stop; `file` always holds its newest state as JSON.

    say : gets a line of progress
    """

    def __init__(
        self,
        services: Sequence[Service],
        logs: Path,
        file: Path,
        say: Callable[[str], None] = print,
    ) -> None:
        self.services = {s.name: s for s in services}
        self.states = {s.name: State() for s in services}
        self.logs, self.file, self.say = logs, file, say
        self.ready = {s.name: asyncio.Event() for s in services}
        self.stopped = {s.name: asyncio.Event() for s in services}
        self.running: dict[str, asyncio.subprocess.Process] = {}
        self.stopping = asyncio.Event()
        self.error = ""
        guard = process_id(os.getppid())
        self.about: dict[str, Any] = {"ready": False, **process_id(os.getpid())}
        self.about |= {"guard": guard["pid"], "guard_created": guard["created"]}

    async def run(self) -> int:
        """Start everything and keep it running; returns 0 after a stop on request, 1 when something can't start."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stopping.set)
        self.logs.mkdir(parents=True, exist_ok=True)
        self._write()
        keepers = [loop.create_task(work) for work in (self._announce(), *map(self._hold, self.services.values()))]
        await self.stopping.wait()
        for keeper in keepers:
            keeper.cancel()
        await asyncio.wait(keepers)
        await asyncio.gather(*(self._stop(s) for s in self.services.values()))
        self._write()
        return 1 if self.error else 0

    async def _announce(self) -> None:
        for event in self.ready.values():
            await event.wait()
        self.about["ready"] = True
        self._write()

    async def _hold(self, service: Service) -> None:
        """Keep a service; when it can't start, the whole stack stops and says why."""
        try:
            await self._keep(service)
        except Exception as error:
            why = str(error) if isinstance(error, PenstockError) else f"{type(error).__name__}: {error}"
            self.error = self.error or f"{service.name}: {why}"
            self.say(f"failed: {self.error}")
            self.stopping.set()

    async def _keep(self, service: Service) -> None:
        for need in service.needs:
            await self.ready[need].wait()
        if service.prepare:
            await asyncio.to_thread(service.prepare)
        delay, early_exits = FIRST_DELAY_S, 0
        while True:
            began = time.monotonic()
            process = await self._start(service)
            await self._until_ready(service, process)
            code = await process.wait()
            self._kill_group(process.pid)
            if service.once and code == 0:
                self._mark(service, "done", None)
                return
            early_exits += not self.ready[service.name].is_set()
            if early_exits == ATTEMPTS or (service.once and code):
                raise UnavailableError(f"it ended with code {code}; {self._tail(service)}")
            if time.monotonic() - began > HEALTHY_S:
                delay = FIRST_DELAY_S
            self.states[service.name].restarts += 1
            self._mark(service, "restarting", None)
            self.say(f"{service.name} ended with code {code}; it starts again in {delay:.1f} s")
            await asyncio.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY_S)

    async def _start(self, service: Service) -> asyncio.subprocess.Process:
        log = self._log(service)
        if log.exists() and log.stat().st_size > LOG_LIMIT:
            log.rename(log.with_suffix(".log.1"))
        with log.open("ab") as out:
            process = await asyncio.create_subprocess_exec(
                *service.command,
                env=dict(service.env),
                cwd=service.cwd,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.running[service.name] = process
        self._mark(service, "starting", process.pid)
        return process

    async def _until_ready(self, service: Service, process: asyncio.subprocess.Process) -> None:
        """Returns when the service answers or its process has ended; raises past its deadline."""
        deadline, why = time.monotonic() + service.deadline_s, "no answer"
        while process.returncode is None:
            if not service.once:
                try:
                    if await asyncio.to_thread(service.ready):
                        break
                except (OSError, PenstockError) as error:
                    why = str(error) or type(error).__name__
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"it is not ready after {service.deadline_s:.0f} s ({why}); {self._tail(service)}"
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), PROBE_S)
        if process.returncode is None or (service.once and process.returncode == 0):
            await self._answers(service, process)

    async def _answers(self, service: Service, process: asyncio.subprocess.Process) -> None:
        self._mark(service, "ready", process.pid)
        if self.ready[service.name].is_set():
            return
        if service.after:
            await asyncio.to_thread(service.after)
        self.say(f"{service.name} {'done' if service.once else 'ready'}")
        self.ready[service.name].set()

    async def _stop(self, service: Service) -> None:
        """Stop a service once those that need it have stopped."""
        for other in self.services.values():
            if service.name in other.needs:
                await self.stopped[other.name].wait()
        process = self.running.get(service.name)
        if process and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(service.stop)
            try:
                await asyncio.wait_for(process.wait(), service.grace_s)
            except TimeoutError:
                self.say(f"{service.name} did not stop in {service.grace_s:.0f} s and is killed")
            self._kill_group(process.pid)
            await process.wait()
        self._mark(service, "stopped", None)
        self.stopped[service.name].set()

    @staticmethod
    def _kill_group(pid: int) -> None:
        """Kill what a service's process has left behind in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def _mark(self, service: Service, state: str, pid: int | None) -> None:
        now = self.states[service.name]
        now.state, now.pid, now.since = state, pid, time.time()
        self._write()

    def _write(self) -> None:
        """Replace the state file; a reader never sees half of it."""
        content = {**self.about, "error": self.error, "services": {name: vars(s) for name, s in self.states.items()}}
        temporary = self.file.with_suffix(".new")
        temporary.write_text(json.dumps(content, indent=1))
        temporary.rename(self.file)

    def _log(self, service: Service) -> Path:
        return self.logs / f"{service.name}.log"

    def _tail(self, service: Service, lines: int = 15) -> str:
        log = self._log(service)
        tail = log.read_text(errors="replace").splitlines()[-lines:] if log.exists() else []
        return f"see {log}\n" + "\n".join(f"    {line}" for line in tail)


def process_id(pid: int) -> dict[str, float]:
    """What identifies a process for as long as the machine runs; a pid alone is reused."""
    return {"pid": pid, "created": psutil.Process(pid).create_time()}


def is_alive(pid: int, created: float) -> bool:
    """Whether the process of `process_id` still runs."""
    try:
        process = psutil.Process(pid)
        return bool(process.create_time() == created) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def guarded(main: Callable[[], int]) -> int:
    """Run `main` in a child process; however that ends, none of its descendants outlives it.

    Orphans of any depth fall to this process (a subreaper), so a supervisor killed with -9 leaves nothing behind
    either. When this process is the one that is killed, the child gets SIGTERM and stops in good order.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        die_with_parent(signal.SIGTERM)
        code = main() if os.getppid() == guard else 1
        sys.stdout.flush()
        os._exit(code)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: os.kill(child, signal.SIGTERM))
    ended = 0
    while ended != child:
        ended, status = os.wait()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    kill_descendants()
    return os.waitstatus_to_exitcode(status)


def kill_descendants(deadline_s: float = 10.0) -> None:
    """Kill every process below this one, and reap them."""
    deadline = time.monotonic() + deadline_s
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=0.1)
        if time.monotonic() > deadline:
            raise UnavailableError(f"processes {[p.pid for p in left]} can't be killed")
