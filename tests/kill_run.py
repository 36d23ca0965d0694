"""Run as a process by test_resume: train 20 steps; with "die", be killed in the middle of the third save.

Writes what was drawn at every step and, at the end, the digest of weights, optimizer and random numbers.
"""

import hashlib
import os
import pickle
import signal
import sys
from pathlib import Path

import torch

from llamita.checkpoint import shards
from llamita.train.compute import Compute
from tests.training import trainer

folder, mode = Path(sys.argv[1]), sys.argv[2]
drawn: list[float] = []
real_write, saves = shards.write, []


def deadly_write(path, pieces, load):
    saves.append(path)
    described = real_write(path, pieces, load)
    if mode == "die" and len(saves) == 3:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return described


shards.write = deadly_write
real_gradients = Compute.gradients


def recorded(compute, batch, *sizes):
    if mode == "die" and batch.first == 15 * 4:
        run.saver.wait()  # which it does not survive
    digest = hashlib.sha256(batch.inputs_BT.numpy().tobytes() + batch.targets_BT.numpy().tobytes()).hexdigest()
    with (folder / "drawn.txt").open("a") as file:
        file.write(f"{batch.first} {digest}\n")
    drawn.append(float(torch.rand(1)))  # training itself draws nothing, yet
    return real_gradients(compute, batch, *sizes)


Compute.gradients = recorded
folder.mkdir(parents=True, exist_ok=True)
run = trainer(folder)
run.fit()
end = {
    "weights": [weight.detach().numpy().tobytes() for weight in run.model.parameters()],
    "optimizer": [value.numpy().tobytes() for kinds in run.optimizer.state_dict().values() for value in kinds.values()],
    "draws": torch.rand(8).numpy().tobytes(),
}
(folder / "end.txt").write_text("\n".join(f"{k} {hashlib.sha256(pickle.dumps(v)).hexdigest()}" for k, v in end.items()))
