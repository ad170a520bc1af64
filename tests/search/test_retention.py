"""However many trials there are, only the best models stay on disk."""

from __future__ import annotations

import random
from pathlib import Path

from sft_ray.config import Experiment
from sft_ray.recipes import default_recipe
from sft_ray.run_store import RunStore
from sft_ray.screen import Screen
from sft_ray.search.conductor import Conductor
from sft_ray.search.study import SearchStudy, open_storage
from sft_ray.search.trials import PlannedTrial, is_to_be_saved

TRIALS, KEEP, SLOTS = 500, 5, 3


class CountingStore(RunStore):
    """Counts what it is asked to delete."""

    deletions = 0

    def delete_folder(self, path: str) -> None:
        self.deletions += 1
        super().delete_folder(path)


def model_folders(store: RunStore) -> set[str]:
    assert store.local_root is not None
    return {path.parent.name for path in store.local_root.glob("trials/*/best")}


def finish(conductor: Conductor, store: RunStore, tune_id: str, planned: PlannedTrial) -> None:
    """What a slot does with a trial but train it: the folder of its model, its last mark."""
    score = random.Random(planned.number).random()
    saves = is_to_be_saved(planned.assignment(), score, finished=True)
    if saves:
        with store.replacing_folder(f"{planned.folder}/best") as folder:
            (folder / "model.safetensors").write_bytes(bytes(100))
    message = {
        "index": 0,
        "percent": 100,
        "epochs_run": 1.0,
        "metrics": {"accuracy": score},
        "train_loss": 0.5,
        "fault": None,
        "finished": True,
        "score": score,
        "score_percent": 100,
        "best_metrics": {"accuracy": score},
        "has_checkpoint": saves,
        "slot_seconds": 1.0,
    }
    conductor.on_message(tune_id, message)
    conductor.on_slot_free(tune_id)


def test_five_hundred_trials_leave_as_many_models_as_are_kept(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    tree = tiny_experiment.to_tree()
    tree["search"] |= {"trials": TRIALS, "sampler": "random", "default_recipe": False}
    tree["search"]["space"] = {"train.learning_rate": {"log_uniform": [1e-6, 1e-3]}}
    tree["checkpoint"]["keep"] = KEEP
    experiment = Experiment.from_tree(tree)
    store = CountingStore(str(tmp_path), "many")
    store.pull_journal()
    study = SearchStudy(
        experiment,
        open_storage(store.journal),
        recipe=default_recipe(22_000_000),
        num_layers=6,
        direction="maximize",
        slots=SLOTS,
    )
    screen = Screen(quiet=True)
    conductor = Conductor(
        study, store, screen, "accuracy", SLOTS, lambda: store.push_journal(now=False)
    )
    running: list[tuple[str, PlannedTrial]] = []
    ended, most = 0, 0
    while True:
        while len(running) < SLOTS:
            planned = conductor.next_trial(f"tune {ended + len(running)}")
            if planned is None:
                break
            running.append((f"tune {ended + len(running)}", planned))
        if not running:
            break
        finish(conductor, store, *running.pop(0))
        conductor.settle()
        ended += 1
        most = max(most, len(model_folders(store)))
    assert ended == TRIALS
    assert most <= KEEP + SLOTS
    scores = {n: random.Random(n).random() for n in range(TRIALS)}
    best = sorted(scores, key=lambda number: -scores[number])[:KEEP]
    assert model_folders(store) == {str(number) for number in best}
    assert all(store.is_intact(f"trials/{number}/best") for number in best)
    # Each model that was once kept is deleted once; nothing is asked about the others.
    assert store.deletions < 4 * TRIALS  # a few at each end, not one for every trial before it
