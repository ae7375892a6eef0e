"""What the help says besides the arguments: what it is for, examples, the keys of `--json`; in 80 columns."""

from __future__ import annotations

ABOUT = """\
Run PyTorch models whose weights do not fit in fast memory, and know beforehand
how fast they will run. No GPU and no weights are needed, but for `run`: the
config.json of a model will do."""

EXAMPLES = {
    "": """\
  How would Wan2.1-14B run in 12 GiB of an RTX 4090?
    taskgraph-offload plan --config tests/configs/wan2.1_14b.json \\
        --budget 12GiB --machine rtx4090
  How much memory is enough for Flux.1-dev?
    taskgraph-offload sweep --config tests/configs/flux1_dev.json \\
        --machine rtx4090""",
    "plan": """\
  taskgraph-offload plan --config tests/configs/flux1_dev.json \\
      --budget 12GiB --machine rtx4090
  taskgraph-offload plan --config tests/configs/llama3_70b.json \\
      --tokens 2048 --budget 30% --machine h100
  taskgraph-offload plan my_models:build --budget 8GiB \\
      --strategy layerwise --option prefetch=2
  taskgraph-offload plan my_models:build --settings offload.yaml \\
      --save plan.yaml --timeline plan.png""",
    "compare": """\
  taskgraph-offload compare --config tests/configs/flux1_dev.json \\
      --budget 12GiB --machine rtx4090
  taskgraph-offload compare my_models:build --budget 8GiB \\
      --strategies auto keep "layerwise prefetch=2 residents=spread"
  taskgraph-offload compare my_models:build --budget 8GiB --json""",
    "sweep": """\
  taskgraph-offload sweep --config tests/configs/wan2.1_14b.json \\
      --machine rtx4090
  taskgraph-offload sweep my_models:build --budgets 4GiB 8GiB 12GiB \\
      --strategies auto sequential --picture sweep.png""",
    "run": """\
  taskgraph-offload run my_models:build --budget 2GiB --device cuda
  taskgraph-offload run my_models:build --budget 50% --device cpu \\
      --link 4 --timeline run.png

On the cpu device, a region of RAM takes the place of the GPU's memory, and
--link that of PCIe. A --config runs with random weights.""",
    "show": """\
  taskgraph-offload show plan.yaml
  taskgraph-offload show plan.yaml --grid
  taskgraph-offload show plan.yaml --text | grep h2d
  taskgraph-offload show plan.yaml --model my_models:build""",
}
FIGURES = "step_seconds, cold_seconds, compute_seconds, stall_seconds, overlap,\n    peak_bytes"
JSON_KEYS = {
    "plan": f"""\
  command, model, trace (fake, real or symbolic), inputs, machine,
  strategy, options, budget_bytes, arena_bytes, activation_bytes,
  margin_bytes, peak_bytes, weight_bytes, resident_bytes,
  streamed_bytes (in each step),
  predicted:
    {FIGURES}
  bound:
    step_seconds, cold_seconds, block_step_seconds, block_cold_seconds
  outlook (or null):
    no_stall_bytes, one_more_gib_step_seconds""",
    "compare": f"""\
  command, model, inputs, machine, budget_bytes,
  rows, the fastest first, each:
    strategy, budget_bytes, bound_seconds, streamed_bytes,
    {FIGURES}, measured_step_seconds (null),
    error (null, or why it does not fit), smallest_bytes (that would do)""",
    "sweep": """\
  command, model, inputs, machine,
  rows, each:
    strategy, budget_bytes, step_seconds (null where it does not fit),
    bound_seconds, peak_bytes
  enough_bytes, for each strategy: the budget from which on more memory makes
    it less than 5% faster""",
    "run": f"""\
  those of plan, and device,
  measured:
    {FIGURES}
  stats:
    h2d_bytes, d2h_bytes, copies, demand_loads, divergences,
    skipped_spills, peak_bytes""",
    "show": """\
  those of plan but inputs, and verified (true),
  tasks of a steady step, in the order of issue, each:
    kind, name, nbytes, text""",
}
