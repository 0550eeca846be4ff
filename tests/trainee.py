# SPDX-License-Identifier: Apache-2.0
"""A training that can be killed at any moment, and a server that forks one from a warm process.

To import torch takes seconds, to fork a process that has done so, milliseconds. Run as a program
this file reads jobs, one JSON object a line, and forks a trainee for each.
"""

import json
import os
import sys
import traceback

import torch

import parabola

EVERY = 3  # steps between two checkpoints


def save(path, state):
    """The file is the old checkpoint or the new one, whenever the process dies."""
    torch.save(state, f"{path}.new")
    os.replace(f"{path}.new", path)


def build(options):
    torch.manual_seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(12, 5)
    )
    optimizer = parabola.Shampoo(
        model.parameters(), lr=0.01, block_size=4, update_every=4, start_step=2, **options
    )
    return model, optimizer


def run(path, steps, options, permits, reports):
    """Train to the last step, from the checkpoint if there is one.

    Args:
        path: Of the checkpoint.
        steps: How many in all.
        options: Keywords of Shampoo.
        permits: Descriptor from which every step reads a byte first.
        reports: Descriptor for a byte a moment: r(eady), w(riting a checkpoint), s(tep done).
    """
    torch.set_num_threads(1)
    model, optimizer = build(options)
    start = 0
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        start = saved["step"]
    os.write(reports, b"r")
    for step in range(start + 1, steps + 1):
        os.read(permits, 1)
        x = torch.randn(16, 6)
        loss = (model(x) - x[:, :5].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0 or step == steps:
            os.write(reports, b"w")
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(path, {**parts, "rng": torch.get_rng_state(), "step": step})
        os.write(reports, b"s")


def serve():
    """Fork a trainee a line; print its process id, and when it has ended, how."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                run(**json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
