"""The settings file: what it says is what the planner does."""

import pytest
import torch
from taskgraph_offload.planner.settings import read_settings

import taskgraph_offload as tgo

GOOD = """\
# how to run it on the small machine
budget: 800MiB
machine:
  name: mine
  h2d_bytes_per_second: 12e9
  d2h_bytes_per_second: 12000000000
  latency_seconds: 0
  compute_flops: 1e14
  memory_bytes_per_second: 9.5e11
strategy: layerwise
options: {residents: spread, prefetch: 2}
blocks: ["layers.*", head]
entry: forward
margin: 1MiB
"""


def test_every_key_is_read(tmp_path):
    path = tmp_path / "offload.yaml"
    path.write_text(GOOD)
    settings = read_settings(path)
    assert settings.budget == "800MiB"
    assert settings.machine == tgo.Machine("mine", 12e9, 12e9, 0, 1e14, 9.5e11)
    assert (settings.strategy, settings.options) == ("layerwise", {"residents": "spread", "prefetch": 2})
    assert (settings.blocks, settings.entry, settings.margin) == (("layers.*", "head"), "forward", "1MiB")


def test_a_planner_from_settings_plans_what_they_say(tmp_path):
    path = tmp_path / "offload.yaml"
    path.write_text("budget: 60KiB\nmachine: rtx4090\nstrategy: layerwise\noptions:\n  prefetch: 2\nmargin: 0\n")
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
    inputs = (torch.ones(1, 64),)
    plan = tgo.Planner.from_settings(path, model, inputs=inputs).plan()
    same = tgo.Planner(model, "60KiB", inputs=inputs, machine="rtx4090", strategy="layerwise", prefetch=2, margin=0)
    assert plan == same.plan()


def test_a_planner_needs_a_budget(tmp_path):
    path = tmp_path / "offload.yaml"
    path.write_text("machine: rtx4090\n")
    with pytest.raises(tgo.SettingsError, match="budget"):
        tgo.Planner.from_settings(path, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "options", ["prefetch: 0", "ratio: 1", "ratio: 0.25", "ratio: null", "residents: leading", "residents: null"]
)
def test_what_an_option_accepts_is_read(tmp_path, options):
    path = tmp_path / "offload.yaml"
    path.write_text(f"strategy: layerwise\noptions: {{{options}}}\n")
    assert read_settings(path).strategy == "layerwise"


def test_yaml_reads_words_as_words(tmp_path):
    """YAML 1.1 would read these as true, as 754 seconds and as a day."""
    path = tmp_path / "offload.yaml"
    for word in ("yes", "12:34", "2024-01-01"):
        path.write_text(f"blocks: [{word}]\n")
        assert read_settings(path).blocks == (word,)


COMPONENTS = """
budget: 30%
strategy: layerwise
options: {prefetch: 2}
components:
  transformer: {options: {prefetch: 3, residents: spread}}
  vae:
    strategy: resident
    entry: decode
"""


def test_a_component_has_what_is_said_for_it_over_what_is_said_for_all(tmp_path):
    path = tmp_path / "offload.yaml"
    path.write_text(COMPONENTS)
    assert read_settings(path).options == {"prefetch": 2}
    assert read_settings(path, "transformer").options == {"prefetch": 3, "residents": "spread"}
    vae = read_settings(path, "vae")
    assert (vae.strategy, vae.options, vae.entry, vae.budget) == ("resident", {}, "decode", "30%")
    with pytest.raises(tgo.SettingsError, match=r"no component 'unet'; there are transformer, vae"):
        read_settings(path, "unet")
