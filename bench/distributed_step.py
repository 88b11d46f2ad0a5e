"""Run by torchrun: seconds of UPT's training step on ViT-B/16 geometry, divided over the processes.

    torchrun --nproc-per-node N bench/distributed_step.py CLASSES BATCH ROUNDS FILE

FILE gets the seconds of each round, as JSON. The first process checks loss and gradients against those of one process.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from common import CLOSE, DEVICE, gradients, inputs, model

from upt_fast import DistributedStep
from upt_fast.common.closeness import relative_rms
from upt_fast.distributed import join


def main(classes: int, batch: int, rounds: int, file: Path) -> None:
    group = join(DEVICE)
    upt = model("fast", classes)
    images, labels = inputs(classes, batch)
    step = DistributedStep(upt, group=group)
    own, sizes = images[group.share(batch)], group.sizes(batch)

    def run() -> None:
        upt.zero_grad(set_to_none=True)
        step.backward(own, labels, sizes=sizes)

    torch.manual_seed(0)
    run()
    if group.first:
        found = gradients(upt).clone()
        torch.manual_seed(0)
        upt.zero_grad(set_to_none=True)
        upt.loss_and_logits(images, labels)[0].backward()
        assert relative_rms(found, gradients(upt)) < CLOSE
    seconds = []
    for _ in range(rounds):
        group.any(False)  # all begin together
        start = time.perf_counter()
        run()
        seconds.append(max(group.objects(time.perf_counter() - start)))
    if group.first:
        file.write_text(json.dumps(seconds))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
