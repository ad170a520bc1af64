"""A slot: a Tune trainable that keeps its workers alive for many trials."""

from __future__ import annotations

import json
import threading
import time
import uuid
from typing import Any

import ray
from ray import cloudpickle, tune

from sft_ray.search.launch import run_workers
from sft_ray.search.mailbox import Mailbox
from sft_ray.search.watch import IDLE, MAILBOX, SLOT, WORKERS, Pulse

JOIN_SECONDS = 8.0  # Tune kills the actor at 10
# Any node has this resource of its head: it keeps slots off machines that come and go.
HEAD = {"node:__internal_head__": 0.001}


class Slot(tune.Trainable):
    """Runs one trial after the other on the same workers.

    `step()` is the permission to go to the next mark and returns what was found there.  Trials
    that raise end with a result, so that the slot lives on; only a slot without workers raises.
    """

    def setup(self, config: dict[str, Any], settings: dict[str, Any]) -> None:
        workers, resources = settings["workers"], settings["resources_per_worker"]
        self._began_at = time.monotonic()
        self._returned_at: float | None = None
        self._startup: dict[str, float] | None = None  # until the driver has been told
        self._error: BaseException | None = None
        self._watch, self._name = settings["watch"], uuid.uuid4().hex[:12]
        # As bytes: whoever reads the handle imports Tune.
        handle = cloudpickle.dumps(ray.get_runtime_context().current_actor)
        self._watch.enlist.remote(self._name, handle)
        self._pulse = Pulse(self._watch, self._name, SLOT, WORKERS, handle)
        avoided = ray.get(self._watch.avoided.remote())
        # Without resources it lands in this actor's placement group, on the same node.
        self._mailbox = ray.remote(Mailbox).options(num_cpus=0).remote(workers)
        worker = settings["worker"] | {
            "mailbox": self._mailbox,
            "watch": self._watch,
            "slot": self._name,
        }
        self._thread = threading.Thread(
            target=self._run,
            args=(worker, resources, workers, avoided, settings["ray_storage"]),
            daemon=True,
        )
        self._thread.start()
        self.reset_config(config)

    def _run(self, *arguments: Any) -> None:
        try:
            run_workers(*arguments)
        except BaseException as error:
            self._error = error

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._index, self._seconds_before = 0, 0.0
        self._free_since = self._returned_at
        self._watch.works_on.remote(self._name, new_config["trial_id"])
        ray.get(self._mailbox.assign.remote(new_config["assignment"]))
        return True

    def step(self) -> dict[str, Any]:
        if self._free_since is None:
            ready = self._wait(self._mailbox.ready.remote, (), WORKERS)
            if not ready:
                return self._paused({"paused": True})  # before it began
            self._free_since = time.monotonic()
            before = self._free_since - self._began_at - ready["loading"]
            self._startup = {"workers": before, "loading": ready["loading"]}
        index = self._index
        self._pulse.enter(MAILBOX)
        ray.get(self._mailbox.advance.remote(index))
        message = self._wait(self._mailbox.message.remote, (index,), MAILBOX)
        if "broken" in message:
            self.cleanup()  # Tune does not ask for it after an error
            raise RuntimeError(message["broken"])
        if "paused" in message:
            return self._paused(message)
        self._index += 1
        # A trial that is stopped here leaves its slot free from now on; what follows until the
        # next one runs is the overhead of that one.
        self._returned_at = time.monotonic()
        self._pulse.enter(IDLE)
        message = self._timed(message)
        if self._startup is not None:
            ready = self._returned_at - self._free_since
            message = {**message, "startup": {**self._startup, "ready": ready}}
            self._startup = None
        # As text, because Tune flattens nested results.  Never `done`: the scheduler hears of every
        # message and stops the trial, Tune would not show it a last one.
        return {"message": json.dumps(message)}

    def _timed(self, message: dict[str, Any]) -> dict[str, Any]:
        """With what the trial has taken by now, in other slots before, too."""
        # What the mailbox itself says of a trial's end knows nothing of other slots.
        self._seconds_before = message.get("seconds_before", self._seconds_before)
        here = 0.0 if self._free_since is None else time.monotonic() - self._free_since
        return {**message, "slot_seconds": here + self._seconds_before}

    def _paused(self, message: dict[str, Any]) -> dict[str, Any]:
        """The trial has left its state; a slot whose machines are to be left ends with it."""
        reason = ray.get(self._watch.leave.remote(self._name))
        if reason is not None:
            self.cleanup()
            raise RuntimeError(reason)
        return {"message": json.dumps(self._timed(message))}

    def _wait(self, ask: Any, arguments: tuple[Any, ...], activity: str) -> Any:
        """Poll the mailbox until it answers, as long as there are workers or will be.

        Workers that are not there yet are not waited for once a pause is asked for.
        """
        while True:
            answer = ray.get(ask(*arguments))
            if answer:
                return answer
            if activity == WORKERS:
                if self._pulse.is_to_pause:
                    return answer
            else:
                self._pulse.enter(activity)
            if not self._thread.is_alive():
                raise RuntimeError(f"the slot's workers ended: {self._error}")

    def cleanup(self) -> None:
        """Send the workers home and wait until their resources are free."""
        self._pulse.end()
        self._watch.forget.remote(self._name)
        if self._thread.is_alive():
            ray.get(self._mailbox.close.remote())
            self._thread.join(JOIN_SECONDS)
