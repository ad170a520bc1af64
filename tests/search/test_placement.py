"""Room in the cluster does not stay with the dead."""

import time
from typing import Any

import pytest


@pytest.mark.timeout(300)
def test_a_placement_group_goes_with_the_actor_that_made_it(ray_cluster: None) -> None:
    import ray
    from ray.util.placement_group import placement_group_table

    from sft_ray.search.placement import free_what_the_dead_hold

    @ray.remote(num_cpus=0)
    class Holder:
        def hold(self) -> Any:
            self.group = ray.util.placement_group([{"CPU": 0.01}])
            ray.get(self.group.ready())
            return self.group

    own = ray.util.placement_group([{"CPU": 0.01}])  # the driver's
    dead, alive = Holder.remote(), Holder.remote()
    groups = {"dead": ray.get(dead.hold.remote()), "alive": ray.get(alive.hold.remote())}
    groups["own"] = own
    ray.kill(dead)

    def states() -> dict[str, str]:
        return {name: placement_group_table(group)["state"] for name, group in groups.items()}

    until = time.monotonic() + 30
    while time.monotonic() < until and states()["dead"] != "REMOVED":
        free_what_the_dead_hold()
        time.sleep(0.2)
    try:
        assert states() == {"dead": "REMOVED", "alive": "CREATED", "own": "CREATED"}
    finally:
        ray.kill(alive)
        free_what_the_dead_hold()
        ray.util.remove_placement_group(own)
