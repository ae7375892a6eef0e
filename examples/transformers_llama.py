"""Generate text with a Llama whose weights may not all be on the device.

Without --path, the weights are small and random, and the output is compared with the plain model's.

    python examples/transformers_llama.py [--path folder] [--budget 50%]
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import taskgraph_offload as tgo


def main() -> int:
    """Generate plainly, then under a plan; 1 if the tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="a folder with a model for AutoModelForCausalLM.from_pretrained")
    parser.add_argument("--budget", default="50%", help="memory: 50%% of the weights, 12GiB, ...")
    given = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(given.path) if given.path else small_llama()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompt = torch.arange(1, 9, device=device).reshape(1, 8)
    expected = None if given.path else model.to(device).generate(prompt, max_new_tokens=8, do_sample=False)

    inputs = {"input_ids": prompt, "use_cache": True}
    with tgo.offload(model.eval(), given.budget, inputs=inputs) as run:
        print(run.plan.explain())
        tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)
    print("tokens     ", tokens[0].tolist())
    if expected is not None and not torch.equal(tokens, expected):
        print("the tokens differ from the plain model's")
        return 1
    return 0


def small_llama() -> LlamaForCausalLM:
    """A Llama of a few layers with random weights."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=6)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)).eval()


if __name__ == "__main__":
    sys.exit(main())
