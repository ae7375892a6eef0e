"""Find the hooks of other libraries that move or convert weights, and refuse the model by name. Touches nothing.

Recognises hooks by the marks that they leave on modules, so neither accelerate nor diffusers is imported. Other hooks
(a step cache, a user's own) are no concern of this module.
"""

from __future__ import annotations

from torch import nn

from .errors import SettingsError

GROUP_OFFLOADING = ("group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker")
LAYERWISE_CASTING = "layerwise_casting"

REMOVE_ACCELERATE = (
    "Remove the hooks first: pipe.remove_all_hooks() for a pipeline, or "
    "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
)
REMOVE_GROUP_OFFLOADING = f"""Remove the hooks first:
    from diffusers.hooks import HookRegistry
    for name in {GROUP_OFFLOADING}:
        HookRegistry.check_if_exists_or_initialize(model).remove_hook(name, recurse=True)"""
RELOAD_WITHOUT_CASTING = "This hook cannot be removed: load the model again, without enable_layerwise_casting()"


def refuse_foreign_hooks(model: nn.Module) -> None:
    """Raise if a module has a hook that moves or converts its weights during the forward.

    >>> layer = nn.Linear(2, 2)
    >>> refuse_foreign_hooks(layer)
    >>> layer._hf_hook = "what accelerate leaves on a module"
    >>> refuse_foreign_hooks(layer)
    Traceback (most recent call last):
        ...
    taskgraph_offload.errors.SettingsError: Linear has offloading hooks of accelerate, which move its weights. ...
    """
    for name, module in model.named_modules():
        hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", None) or {}
        if "_hf_hook" in vars(module):
            what, advice = "offloading hooks of accelerate, which move its weights", REMOVE_ACCELERATE
        elif not set(GROUP_OFFLOADING).isdisjoint(hooks):
            what, advice = "group offloading hooks of diffusers, which move its weights", REMOVE_GROUP_OFFLOADING
        elif LAYERWISE_CASTING in hooks:
            what, advice = "a layerwise casting hook of diffusers, which converts its weights", RELOAD_WITHOUT_CASTING
        else:
            continue
        raise SettingsError(f"{type(model).__name__}.{name}".rstrip(".") + f" has {what}. {advice}")
