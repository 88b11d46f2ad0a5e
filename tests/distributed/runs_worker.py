"""Run by torchrun, or alone: several runs of train() in float64, one after another.

torchrun --nproc-per-node N runs_worker.py FILE     a JSON list of settings
"""

import json
import sys
from pathlib import Path

from upt_fast.train import TrainConfig, setup, train

load_for = setup.load_for


def load_in_float64(name, pretrained, precision, device, cache_dir, quick_gelu, options):
    """The command line has no float64."""
    clip, options = load_for(name, pretrained, precision, device, cache_dir, quick_gelu, options)
    return clip, {"dtype": "fp64", **options}


if __name__ == "__main__":
    setup.load_for = load_in_float64
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        train(TrainConfig.from_dict(settings))
