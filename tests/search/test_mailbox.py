import asyncio
from typing import Any

import pytest

from sft_ray.search import mailbox as mailbox_module
from sft_ray.search.mailbox import Mailbox

WHOLE = {"halvings": 0, "most_examples": None}


@pytest.fixture(autouse=True)
def _short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox_module, "POLL_SECONDS", 0.02)


async def ready_box(workers: int = 2) -> Mailbox:
    box = Mailbox(workers)
    for rank in range(workers):
        await box.register(rank)
        assert await box.next_assignment(rank, 0) is None
    return box


def test_loading_takes_from_the_last_worker_that_came_up_to_the_last_that_is_ready() -> None:
    async def scenario() -> None:
        box = Mailbox(2)
        await box.register(0)
        await asyncio.sleep(0.1)
        await box.register(1)
        assert await box.next_assignment(0, 0) is None
        assert await box.ready() is None
        await asyncio.sleep(0.05)
        assert await box.next_assignment(1, 0) is None
        told = await box.ready()
        assert told is not None
        assert 0.08 < told["loading"] < 1

    asyncio.run(scenario())


def test_an_assignment_reaches_every_rank_and_goes_on_by_permission() -> None:
    async def scenario() -> None:
        box = await ready_box()
        assert await box.ready()
        await box.assign({"number": 7})
        answers = [await box.next_assignment(rank, 0) for rank in (0, 1)]
        assert answers[0] == answers[1] == (1, {"number": 7, "restarts": 0, **WHOLE})
        assert await box.may_continue(1, 0) is None
        await box.advance(0)
        assert await box.may_continue(1, 0) is True
        assert await box.message(0) is None
        await box.post(1, 0, {"score": 0.5})
        assert await box.message(0) == {"score": 0.5}
        assert await box.may_continue(1, 1) is None

    asyncio.run(scenario())


def test_the_next_assignment_stops_the_previous_one_and_stale_posts_are_ignored() -> None:
    async def scenario() -> None:
        box = await ready_box()
        await box.assign({"number": 1})
        await box.advance(0)
        await box.assign({"number": 2})
        assert await box.may_continue(1, 1) is False
        await box.post(1, 0, {"stale": True})
        await box.post_failure(1, "stale", "")
        await box.advance(0)
        assert await box.message(0) is None
        assert (await box.next_assignment(0, 1)) == (2, {"number": 2, "restarts": 0, **WHOLE})

    asyncio.run(scenario())


def test_a_restarted_group_replays_without_reporting_twice() -> None:
    async def scenario() -> None:
        box = await ready_box()
        await box.assign({"number": 1})
        await box.advance(0)
        await box.post(1, 0, {"score": 1})
        await box.advance(1)
        assert await box.next_assignment(0, 0) is not None
        for rank in (1, 0):
            await box.register(rank)
        assert await box.next_assignment(0, 0) == (1, {"number": 1, "restarts": 1, **WHOLE})
        assert await box.may_continue(1, 1) is True  # permissions hold
        await box.post(1, 0, {"score": "again"})
        await box.post(1, 1, {"score": 2})
        assert [await box.message(0), await box.message(1)] == [{"score": 1}, {"score": 2}]

    asyncio.run(scenario())


@pytest.mark.parametrize("end", [{"paused": True}, {"fault": "not finite"}], ids=["pause", "fault"])
def test_what_ends_a_restarted_trial_is_heard_before_it_has_caught_up(end: dict[str, Any]) -> None:
    async def scenario() -> None:
        box = await ready_box(1)
        await box.assign({"number": 1})
        assert await box.next_assignment(0, 0) is not None
        for index in (0, 1):
            await box.advance(index)
            await box.post(1, index, {"score": index})
        await box.advance(2)
        await box.register(0)
        assert await box.next_assignment(0, 0) is not None
        await box.post(1, 0, end)
        assert await box.message(2) == end
        assert await box.may_continue(1, 1) is False
        assert await box.next_assignment(0, 1) is None  # not handed out again
        await box.post(1, 0, end)
        assert await box.message(3) is None

    asyncio.run(scenario())


def test_a_trial_whose_workers_keep_dying_fails_and_the_slot_lives_on() -> None:
    async def scenario() -> None:
        box = await ready_box(1)
        await box.assign({"number": 1})
        await box.advance(0)
        for _ in range(3):
            await box.next_assignment(0, 0)
            await box.register(0)
        message = await box.message(0)
        assert message is not None
        assert message["failed"] == "its workers died 3 times"
        assert await box.next_assignment(0, 0) is None
        await box.assign({"number": 2})
        assert await box.next_assignment(0, 0) == (2, {"number": 2, "restarts": 0, **WHOLE})

    asyncio.run(scenario())


def test_a_trial_without_memory_comes_again_at_half_and_twice_at_most() -> None:
    async def scenario() -> None:
        box = await ready_box(1)
        await box.assign({"number": 1})
        await box.advance(0)
        handed_out = []
        for used in (32, 16, 8):
            answer = await box.next_assignment(0, 0)
            assert isinstance(answer, tuple)
            handed_out.append(answer[1]["most_examples"])
            await box.out_of_memory(1, used)
            await box.register(0)
        assert handed_out == [None, 16, 8]
        message = await box.message(0)
        assert message == {
            "failed": "out of memory at micro-batch 8",
            "traceback": "",
            "fault": True,
        }
        await box.assign({"number": 2})
        assert await box.next_assignment(0, 0) == (2, {"number": 2, "restarts": 0, **WHOLE})

    asyncio.run(scenario())


def test_workers_that_run_out_of_memory_in_one_step_halve_it_once() -> None:
    async def scenario() -> None:
        box = await ready_box()
        await box.assign({"number": 1})
        await box.advance(0)
        for before, used in ((None, 32), (16, 16)):
            for rank in (0, 1):
                answer = await box.next_assignment(rank, 0)
                assert isinstance(answer, tuple)
                assert (answer[1]["most_examples"], answer[1]["halvings"]) == (before, 0)
            for _ in range(2):
                await box.out_of_memory(1, used)
            for rank in (0, 1):
                await box.register(rank)
        await box.killed_for_memory()  # nothing has begun
        answer = await box.next_assignment(0, 0)
        assert isinstance(answer, tuple)
        assert (answer[1]["most_examples"], answer[1]["halvings"]) == (8, 0)

    asyncio.run(scenario())


def test_who_is_killed_for_its_machines_memory_comes_again_at_half_and_twice_at_most() -> None:
    async def scenario() -> None:
        box = await ready_box(1)
        await box.killed_for_memory()  # nothing had begun
        await box.assign({"number": 1})
        await box.advance(0)
        handed_out = []
        for _ in range(3):
            answer = await box.next_assignment(0, 0)
            assert isinstance(answer, tuple)
            handed_out.append(answer[1]["halvings"])
            await box.killed_for_memory()
            await box.register(0)
        assert handed_out == [0, 1, 2]
        message = await box.message(0)
        assert message is not None
        assert message["failed"].startswith("out of memory: Ray ended its worker")
        assert message["fault"]
        await box.assign({"number": 2})
        assert await box.next_assignment(0, 1) == (2, {"number": 2, "restarts": 0, **WHOLE})

    asyncio.run(scenario())


def test_a_worker_that_dies_behind_the_end_of_its_trial_does_not_train_it_again() -> None:
    async def scenario() -> None:
        box = await ready_box(1)
        for number, last in ((1, {"finished": True}), (2, {"score": 1})):
            await box.assign({"number": number})
            await box.advance(0)
            assert await box.next_assignment(0, number - 1) is not None
            await box.post(number, 0, last)
            await box.register(0)
            assert await box.next_assignment(0, number - 1) is None
        await box.advance(1)  # the second one goes on
        assert await box.next_assignment(0, 1) is not None

    asyncio.run(scenario())


def test_trials_without_memory_do_not_break_their_slot() -> None:
    async def scenario() -> None:
        box = await ready_box(1)
        for number in (1, 2, 3):
            await box.assign({"number": number})
            await box.advance(0)
            for _ in range(3):
                assert await box.next_assignment(0, number - 1) is not None
                await box.out_of_memory(number, 8)
                await box.register(0)
            message = await box.message(0)
            assert message is not None
            assert message["failed"].startswith("out of memory")

    asyncio.run(scenario())


def test_a_failed_trial_is_not_handed_out_again() -> None:
    async def scenario() -> None:
        box = await ready_box(1)
        await box.assign({"number": 1})
        await box.post_failure(1, "ValueError: no", "trace")
        assert await box.message(0) == {"failed": "ValueError: no", "traceback": "trace"}
        await box.register(0)
        assert await box.next_assignment(0, 0) is None

    asyncio.run(scenario())


def test_workers_that_never_come_up_break_the_slot() -> None:
    async def scenario() -> None:
        box = Mailbox(1)
        await box.assign({"number": 1})
        for _ in range(7):
            await box.register(0)
        assert await box.ready()
        message = await box.message(0)
        assert message is not None
        assert "died" in message["broken"]

    asyncio.run(scenario())


def test_closing_sends_everybody_home() -> None:
    async def scenario() -> None:
        box = await ready_box(1)
        await box.assign({"number": 1})
        await box.close()
        assert await box.may_continue(1, 0) is False
        assert await box.next_assignment(0, 0) == "go home"

    asyncio.run(scenario())
