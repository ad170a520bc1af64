"""Fine-tune one configuration: the loop, its marks and the step.

Knows a `World` and a `report` callable and nothing of who runs it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from sft_ray.config import Train
from sft_ray.training import batches, micro_batch
from sft_ray.training.backward import Backward
from sft_ray.training.batches import Trunk
from sft_ray.training.beat import TRAINING, Beat, no_beat
from sft_ray.training.cpu_memory import give_back_free_memory
from sft_ray.training.divergence import DivergenceWatch, GradientWatch, constant_loss
from sft_ray.training.encoding import IntArray
from sft_ray.training.forward import BrokenOffError, evaluate, loss_options
from sft_ray.training.last_state import LastState
from sft_ray.training.optim import build_optimizer, build_schedule, clip_gradients
from sft_ray.training.progress import (
    Best,
    Mark,
    Progress,
    Report,
    schedule_marks,
)
from sft_ray.training.regularize import bind_penalty
from sft_ray.training.resume_state import ResumeState
from sft_ray.training.seeds import derived_seed
from sft_ray.training.setup import Setup
from sft_ray.training.trial_trunks import open_trunks
from sft_ray.training.world import World, resolve_precision

# Steps between two agreements of several workers on what comes next: each of them is a collective.
STEPS_PER_AGREEMENT = 8
# Of a batch of which every worker trains a head by itself.
MOST_EXAMPLES_ALONE = 32
# What comes before the next step; of several workers' wishes the smallest counts.
PAUSE, SAVE, GO_ON = 0, 1, 2


def fit(
    train: Train,
    setup: Setup,
    *,
    objective: str,
    rungs: list[int],
    seed: int,
    report: Report,
    beat: Beat = no_beat,
    last: LastState | None = None,
    resume: ResumeState | None = None,
    halvings: int = 0,
    most_examples: int | None = None,
    end_diverged: bool = False,
    trunks_read: str | None = None,
) -> ResumeState | None:
    """Train `setup.pretrained` from its pristine weights, reporting at every mark.

    A fault of the configuration (a gradient or prediction that is not finite, one example that
    does not fit into memory) is reported once and ends the trial.

    Args:
        train: the configuration.
        objective: the metric that decides which weights are best.
        rungs: percents of the schedule to evaluate at, beside the ends of epochs.
        seed: of order, dropout, and the weights that the checkpoint lacks or that begin anew.
        report: called on every rank with the same mark; must answer the same on all of them:
            True goes on to the next mark, False ends the trial.
        beat: may ask for a pause, on any rank; all of them then stop within
            `STEPS_PER_AGREEMENT` steps, or break an evaluation off, which is then made anew.
        last: where the state is written between two steps whenever that is due.
        resume: state of this very configuration; the trial goes on behind it, with the same
            numbers as if it had never stopped.
        halvings: of the micro-batch, after a kill that left no word of its size.
        most_examples: of a micro-batch, after one that did not fit.
        end_diverged: a trial whose training loss is no better at a third of its schedule than that
            of always answering the same is at fault too.
        trunks_read: of a trial that is to give the same numbers again, see `Progress`; None lets
            costs decide, where `resume` does not say.

    Returns:
        The state to go on from, if the trial was paused; ranks above 0 have none.

    Raises:
        ConfigError: the configuration does not fit the model.
        StepOutOfMemoryError: later than at the probe; the caller may try again with half of its
            micro-batch, from the last state.
    """
    marks = schedule_marks(
        rungs, train.epochs, batches.steps_per_epoch(len(setup.dataset.train), train.batch_size)
    )
    share = -(-train.batch_size // setup.world.size)
    asked = share if train.micro_batch == "auto" else min(share, train.micro_batch)
    try:
        with micro_batch.raised_as_out_of_memory(
            micro_batch.limited(asked, most_examples, halvings)
        ):
            trial = Trial(
                train,
                setup,
                objective,
                seed,
                end_diverged=end_diverged,
                trunks_read=resume.facts.get("trunks_read") if resume else trunks_read,
                beat=beat,
                halvings=halvings,
                most_examples=most_examples,
            )
        with micro_batch.raised_as_out_of_memory(trial.backward.most):
            first_mark = 0 if resume is None else trial.restore(resume)
    except micro_batch.NothingFitsError as error:
        report(Progress(fault=str(error)))  # of a trial that cannot take a single step
        return None
    steps = trial.batches_from(trial.step)
    for index in range(first_mark, len(marks)):
        mark = marks[index]
        trial.clock.enter("train")
        while trial.step < mark.step:
            with micro_batch.raised_as_out_of_memory(trial.backward.most):
                request = trial.request(last)
                fault = None if request == GO_ON else trial.late_fault()
                if fault is None and request == PAUSE:
                    return trial.between_steps()
                if fault is None and request == SAVE:
                    trial.save(last)
                fault = fault or trial.take_step(next(steps))
            if fault is not None:
                here = Mark(100 * trial.step // trial.num_steps, trial.step)
                report(trial.progress(index, here, fault))
                return None
        try:
            with micro_batch.raised_as_out_of_memory(trial.backward.most):
                progress = trial.look(index, mark)
        except BrokenOffError:
            return trial.between_steps()
        if not report(progress) or progress.fault is not None:
            return None
    return None


class Trial:
    """What one trial trains with, and what it has done so far."""

    def __init__(
        self,
        train: Train,
        setup: Setup,
        objective: str,
        seed: int,
        *,
        end_diverged: bool = False,
        trunks_read: str | None = None,
        beat: Beat = no_beat,
        halvings: int = 0,
        most_examples: int | None = None,
    ) -> None:
        self.beat = beat
        self.train, self.task, self.world = train, setup.task, setup.world
        self.pretrained, self.dataset = setup.pretrained, setup.dataset
        self.objective, self.seed, self.pad_token = objective, seed, setup.tokenizer.pad_token_id
        self.clock = _Clock(self.world)
        self.dtype, _ = resolve_precision(train.precision, self.world.device)
        self.loss_options = loss_options(train, setup)
        self.pretrained.reset(
            train.frozen_layers,
            dropout=train.dropout,
            reinit_layers=train.reinit_layers,
            seed=seed,
        )
        self.trunks = open_trunks(train, setup, self.dtype, trunks_read, beat, self.clock.enter)
        self.sharing = sharing_a_step(self.world, self.trunks.train, train.batch_size)
        self.backward = Backward(
            train,
            replace(setup, world=self.sharing),
            self.dtype,
            self.loss_options,
            halvings,
            most_examples,
        )
        self.trainable = list(self.pretrained.trainable().values())
        with micro_batch.raised_as_out_of_memory(self.backward.most):
            self.penalty = bind_penalty(train.regularization, self.pretrained)
            self.optimizer = build_optimizer(train, self.pretrained)
        self.steps_per_epoch = batches.steps_per_epoch(len(self.dataset.train), train.batch_size)
        self.num_steps = self.steps_per_epoch * train.epochs
        self.set_rates = build_schedule(train, self.optimizer, self.num_steps)
        self.scaler = torch.amp.GradScaler(
            self.world.device.type, enabled=self.dtype == torch.float16
        )
        self.step = self.examples_seen = self.tokens = self.positions = 0
        self.best: Best | None = None
        self.last: Progress | None = None
        # Since the previous mark:
        self.count = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        limit = None
        if end_diverged:
            limit = self.constant_loss(setup.constant_losses)
        # fp16 takes an overflow for no fault, and has to know before it takes the step.
        waits = self.world.device.type == "cpu" or self.scaler.is_enabled()
        self.gradients = GradientWatch(self.world.device, waits)
        self.watch = DivergenceWatch(limit, self.num_steps, self.sharing)

    def constant_loss(self, known: dict[str, float | None]) -> float | None:
        """Training loss of the best constant answer, once per kind of loss."""
        key = f"{self.train.label_smoothing} {self.train.class_weights}"
        if key not in known:
            known[key] = constant_loss(self.task, self.dataset, self.loss_options)
        return known[key]

    def batches_from(self, step: int) -> Iterator[IntArray]:
        """The global batches of the whole schedule, without those of the first `step` steps."""
        lengths, size = self.dataset.train.lengths, self.train.batch_size
        first, skipped = divmod(step, self.steps_per_epoch)
        for epoch in range(first, self.train.epochs):
            found = batches.global_batches(lengths, batch_size=size, seed=self.seed, epoch=epoch)
            yield from found[skipped:]
            skipped = 0

    def take_step(self, indices: IntArray) -> str | None:
        """One optimiser step on a global batch; why the configuration cannot go on, or None."""
        world, examples = self.sharing, self.dataset.train
        self.step += 1
        # A generator that follows from the step makes every step one that can be resumed at.
        world.seed(derived_seed(self.seed, "dropout", self.step, world.rank))
        mine = batches.share(indices, examples.lengths[indices], world.rank, world.size)
        count = max(1, int(examples.counts[indices].sum()))
        parts = batches.micro_batches(mine, self.backward.most)
        loss = torch.zeros_like(self.loss_sum)
        for part in parts[:-1]:
            with world.accumulating(self.backward.model):
                loss += self.add_gradients(part, count)
        loss += self.add_gradients(parts[-1], count)
        world.sum_gradients(self.trainable)
        self.loss_sum += loss
        self.scaler.unscale_(self.optimizer)
        self.penalty.add_gradient()
        norm = nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None])
        # The norm is the same on every rank, so all of them stop here or none.
        bad_step = self.gradients.see(self.step, norm)
        if bad_step is None:
            clip_gradients(self.trainable, norm, self.train.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif not self.lower_loss_scale():
            return self.gradient_fault(bad_step)
        self.optimizer.zero_grad(set_to_none=not self.backward.records)
        self.set_rates(self.step)
        self.count += count
        self.examples_seen += len(indices)
        fault = self.watch.see(self.step, loss, count)
        return fault and (self.late_fault() or fault)

    def add_gradients(self, part: IntArray, count: int) -> torch.Tensor:
        """Gradients of one micro-batch, and its summed loss.

        `count` is what the whole global batch is divided by.
        """
        batch = self.backward.collate(part, self.trunks.train)
        layout = batch.one_pass.layout
        self.tokens += int(layout.lengths[: len(part)].sum())
        self.positions += layout.positions
        # The step wants the sum over the global batch divided by its count.
        share, device = self.sharing.averaged_over / count, self.world.device
        factor = torch.full((), share, dtype=torch.float64, device=device)
        return self.backward.add_gradients(batch, self.scaler.scale(factor))

    def late_fault(self) -> str | None:
        """What steps went into that nobody has looked at yet."""
        bad_step = self.gradients.look()
        return None if bad_step is None else self.gradient_fault(bad_step)

    def gradient_fault(self, bad_step: int) -> str:
        """What is said of a step, by its learning rate: that of the configuration, on schedule."""
        self.set_rates(bad_step - 1)
        group = self.optimizer.param_groups[0]  # its own may be lower, by `layer_decay`
        rate = self.train.learning_rate * (group["lr"] / group["initial_lr"])
        return f"loss or gradient not finite at step {bad_step}, learning rate {rate:.3g}"

    def lower_loss_scale(self) -> bool:
        """After fp16 gradients overflowed: leave the step out, go on at half the loss scale."""
        scale = self.scaler.get_scale()
        loss = float(self.sharing.sum(self.loss_sum.clone()))
        if not self.scaler.is_enabled() or scale <= 1 or not math.isfinite(loss):
            return False
        self.scaler.update(scale / 2)
        return True

    def request(self, last: LastState | None) -> int:
        """What comes before the next step; all workers say the same."""
        asked = PAUSE if self.beat(TRAINING) else GO_ON
        if self.world.rank == 0 and last is not None and last.is_due():
            asked = min(asked, SAVE)
        if self.world.size == 1:
            return asked
        return GO_ON if self.step % STEPS_PER_AGREEMENT else self.world.minimum(asked)

    def save(self, last: LastState | None) -> None:
        """Write the state between two steps."""
        state = self.between_steps()
        if state is not None and last is not None:
            last.write(state)
        self.clock.enter("train")

    def between_steps(self) -> ResumeState | None:
        """The state between two steps, on rank 0; every rank has to ask.

        What each rank has summed up stays its own, so that a trial does not depend on when it was
        asked.
        """
        loss_sum, watch = self.sharing.sum(self.loss_sum.clone()), self.watch.state_of_all()
        self.clock.enter("other")
        if self.world.rank > 0:
            return None
        state = self.state()
        state.facts["watch"] = watch
        state.facts["since_mark"]["loss_sum"] = float(loss_sum)
        return state

    def look(self, index: int, mark: Mark) -> Progress:
        """Evaluate on the validation split; the metrics are computed on rank 0."""
        if self.count == 0:  # a short schedule: the previous mark fell on this step too
            assert self.last is not None  # no mark comes before the first step
            self.last = replace(self.last, index=index, percent=mark.percent)
            return self.last
        if (fault := self.late_fault()) is not None:
            return self.progress(index, mark, fault)
        self.clock.enter("eval")
        validation, found = self.dataset.validation, {}
        outputs = evaluate(
            self.pretrained.model,
            self.task,
            validation,
            self.pad_token,
            self.world,
            self.dtype,
            self.beat,
            self.trunks.validation,
        )
        self.pretrained.train()
        give_back_free_memory()  # batches without padding leave gaps of all sizes
        # Every rank has the same outputs, so all of them find a fault or none.
        if not np.isfinite(outputs).all():
            return self.progress(index, mark, f"predictions not finite at step {self.step}")
        if self.world.rank == 0:
            found = self.task.score(outputs, validation, self.dataset.label_set)
            score = found[self.objective]
            sign = self.task.sign(self.objective)
            if self.best is None or sign * score > sign * self.best.score:
                trained = self.pretrained.trainable().items()
                weights = {name: p.detach().to("cpu", copy=True) for name, p in trained}
                self.best = Best(mark.percent, score, found, weights, outputs)
        return self.progress(index, mark, None, found)

    def progress(
        self, index: int, mark: Mark, fault: str | None, found: dict[str, float] | None = None
    ) -> Progress:
        """The report of a mark; what counts since the previous mark begins anew."""
        train_loss = float(self.sharing.sum(self.loss_sum)) / max(self.count, 1)
        penalty = self.penalty.value()
        self.watch.gather()
        self.loss_sum, self.count = torch.zeros_like(self.loss_sum), 0
        self.clock.enter("other")
        self.last = Progress(
            index=index,
            percent=mark.percent,
            step=self.step,
            num_steps=self.num_steps,
            epochs_run=self.step / self.steps_per_epoch,
            metrics=found or {},
            best=self.best,
            train_loss=train_loss,
            penalty=penalty,
            examples_seen=self.examples_seen,
            train_seconds=self.clock.seconds["train"],
            eval_seconds=self.clock.seconds["eval"],
            trunk_seconds=self.clock.seconds["trunk"],
            dtype=str(self.dtype).removeprefix("torch."),
            trunks_read=self.trunks.read,
            micro_batch=self.backward.most,
            padding_share=1 - self.tokens / max(self.positions, 1),
            trained_parameters=sum(parameter.numel() for parameter in self.trainable),
            memory_bytes=self.backward.memory_bytes(self.optimizer_states()),
            fault=fault,
            resume_state=None if fault or self.world.rank else self.state,
        )
        return self.last

    def state(self) -> ResumeState:
        """A copy of all that changes during a trial; equal on all ranks but for what rank 0 keeps.

        Random numbers follow from (seed, step, rank) and need no state.
        """
        tensors: dict[str, torch.Tensor] = {}
        tensors |= {f"weight/{name}": p for name, p in self.pretrained.trainable().items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{k}": t for k, t in slots.items() if t is not None}
        tensors = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
        best = None
        if self.best is not None:
            tensors |= {f"best/{name}": t for name, t in self.best.weights.items()}
            tensors["best_outputs"] = torch.from_numpy(self.best.outputs)
            best = {k: getattr(self.best, k) for k in ("percent", "score", "metrics")}
        facts = {
            "step": self.step,
            "trunks_read": self.trunks.to_ask_for,
            "examples_seen": self.examples_seen,
            "tokens": self.tokens,
            "positions": self.positions,
            "since_mark": {"loss_sum": float(self.loss_sum), "count": self.count},
            "seconds": {name: self.clock.seconds[name] for name in ("train", "eval", "trunk")},
            "last": None if self.last is None else self.last.facts(),
            "best": best,
            "loss_scaler": self.scaler.state_dict(),
            "watch": self.watch.state(),
        }
        return ResumeState(tensors, facts)

    def restore(self, state: ResumeState) -> int:
        """Take up a state; the index of the mark that comes next."""
        facts, is_first = state.facts, self.world.rank == 0
        with torch.no_grad():
            weights = state.part("weight/")
            for name, parameter in self.pretrained.trainable().items():
                parameter.copy_(weights[name])
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in state.part("optimizer/").items():
            i, key = name.split("/")
            slots.setdefault(int(i), {})[key] = tensor.clone()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.step, self.examples_seen = facts["step"], facts["examples_seen"]
        self.tokens, self.positions = facts["tokens"], facts["positions"]
        self.set_rates(self.step)
        self.scaler.load_state_dict(facts["loss_scaler"])
        self.watch.restore(facts["watch"])
        loss_sum = facts["since_mark"]["loss_sum"]
        self.loss_sum.fill_(loss_sum if self.sharing.rank == 0 else 0.0)
        self.count = facts["since_mark"]["count"]
        for name, seconds in facts["seconds"].items():
            self.clock.seconds[name] += seconds  # opening trunks has taken some already
        if facts["best"] is not None and is_first:
            outputs = state.tensors["best_outputs"].numpy()
            self.best = Best(**facts["best"], weights=state.part("best/"), outputs=outputs)
        last = facts["last"]
        if last is None:  # it was paused before its first mark
            return 0
        found = last["metrics"] if is_first else {}
        on_first_rank = self.state if is_first else None
        self.last = Progress(
            **{**last, "metrics": found}, best=self.best, resume_state=on_first_rank
        )
        return int(last["index"]) + 1

    def optimizer_states(self) -> list[torch.Tensor]:
        states = self.optimizer.state.values()
        return [tensor for state in states for tensor in state.values() if torch.is_tensor(tensor)]


def sharing_a_step(world: World, trunk: Trunk | None, batch_size: int) -> World:
    """The workers that share a step: all of them, or none with another.

    Where one token of each example is read, behind all layers, a step trains a head, and a part of
    it takes as long as the whole.  Workers that train the same on one machine get the same bits.
    """
    reads_one = trunk is not None and trunk.most_tokens == 1
    if world.shared is None or not reads_one or batch_size > MOST_EXAMPLES_ALONE:
        return world
    return World(device=world.device)


class _Clock:
    """Seconds spent per activity; entering one ends the other."""

    def __init__(self, world: World) -> None:
        self.seconds = {"train": 0.0, "eval": 0.0, "trunk": 0.0, "other": 0.0}
        self._world = world
        self._activity, self._since = "other", time.monotonic()

    def enter(self, activity: str) -> None:
        self._world.synchronize()
        now = time.monotonic()
        self.seconds[self._activity] += now - self._since
        self._activity, self._since = activity, now
