"""Run as a process by test_resume: train 20 steps; with "die", be killed in the middle of the third save.

Writes what was drawn at every step and, at the end, the digest of weights, optimizer and random numbers.
"""

import hashlib
import os
import pickle
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch

from llamita.train import loop, state
from tests.training import trainer

folder, mode = Path(sys.argv[1]), sys.argv[2]
real_save, saves = safetensors.torch.save_model, []


def deadly_save(model, path):
    saves.append(path)
    real_save(model, path)
    if mode == "die" and len(saves) == 3:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


state.safetensors.torch.save_model = deadly_save
real_accumulate = loop.accumulate


def recorded(model, batch, *args):
    digest = hashlib.sha256(batch.inputs_BT.numpy().tobytes() + batch.targets_BT.numpy().tobytes()).hexdigest()
    with (folder / "drawn.txt").open("a") as file:
        file.write(f"{batch.first} {digest}\n")
    return real_accumulate(model, batch, *args)


loop.accumulate = recorded
folder.mkdir(parents=True, exist_ok=True)
torch.rand(5 if mode == "die" else 0)  # the global generator must come from the checkpoint, not from chance
run = trainer(folder)
run.fit()
end = {
    "weights": [weight.detach().numpy().tobytes() for weight in run.model.parameters()],
    "optimizer": [
        [value.numpy().tobytes() for slot in part["state"].values() for value in slot.values()]
        for part in run.optimizer.state_dict()
    ],
    "draws": torch.rand(8).numpy().tobytes(),
}
(folder / "end.txt").write_text("\n".join(f"{k} {hashlib.sha256(pickle.dumps(v)).hexdigest()}" for k, v in end.items()))
