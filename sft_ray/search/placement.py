"""The room that groups of workers hold in the cluster, given back when their slot has died.

Ray itself frees a placement group when its creator and the whole job have ended.  Ray Train starts
a process per group to look after that, but it hears only of groups whose workers have all come up,
and asks Ray's dashboard, which not every cluster has.  Here the driver looks after all of them.
"""

from __future__ import annotations

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group


def free_what_the_dead_hold() -> None:
    """Remove this job's placement groups whose creators are dead actors."""
    job = ray.get_runtime_context().get_job_id()
    for record in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(record)
        is_there = group.state != PlacementGroupTableData.REMOVED
        if not is_there or group.creator_job_id.hex() != job:
            continue
        creator = ray.ActorID(group.creator_actor_id)
        if creator.is_nil():  # the driver itself
            continue
        if state.actor_table(creator.hex()).get("State") == "DEAD":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
