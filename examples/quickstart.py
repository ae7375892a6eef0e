"""The library in ten lines: plan for a budget, print the plan, run the model under it, draw what happened."""

import torch
from tiny_dit import make

import taskgraph_offload as tgo

model, inputs = make("cuda" if torch.cuda.is_available() else "cpu")
plan = tgo.Planner(model, budget_gb="40%", inputs=inputs).plan()
print(plan.explain())
with torch.inference_mode(), tgo.Executor(model, plan) as run:
    for _ in range(4):
        noise = model(*inputs)
    tgo.viz.save_timeline("out/quickstart.png", plan.predict(), run.timeline())
print(f"{tuple(noise.shape)} computed within {plan.budget_bytes / 2**20:.0f} MiB; the picture is out/quickstart.png")
