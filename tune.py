"""Run an experiment's search: `python tune.py experiments/quickstart.yaml search.trials=6`.

The same as `sft-ray search`, as a file that `ray submit cluster.yaml tune.py` can upload.  Without
an experiment it takes experiments/sst2.yaml where the cluster has GPUs or can start some, else the
quickstart.  On a machine where Ray runs, the search is a Ray job: it outlives this connection.
"""

import sys

from sft_ray.cli import main
from sft_ray.search.submit import follow_as_job, rejoined, with_experiment

if __name__ == "__main__":
    words = rejoined(sys.argv[1:])
    code = follow_as_job(__file__, words)
    main(["search", *with_experiment(words)]) if code is None else sys.exit(code)
