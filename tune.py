"""Run an experiment's search: `python tune.py experiments/quickstart.yaml search.trials=6`.

The same as `sft-ray search`, as a file that `ray submit cluster.yaml tune.py` can upload.
"""

import sys
from pathlib import Path

import sft_ray
from sft_ray.cli import main

# `ray submit` copies this file alone; the experiments stay with the installed checkout.
QUICKSTART = Path(sft_ray.__file__).parents[1] / "experiments" / "quickstart.yaml"

if __name__ == "__main__":
    main(["search", *(sys.argv[1:] or [str(QUICKSTART)])])
