"""The methods, one flat file a paper, looked up by name so that none is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module

from .base import Method

#: name -> class, in the module of that name unless _MODULES says otherwise
METHODS = {
    "contrastive": "Contrastive",
    "conv_vae": "ConvVAE",
    "photo_topology": "PhotoTopology",
    "pm_jdot": "PMJDOT",
    "sketchembednet": "SketchEmbedNet",
}
_MODULES = {"contrastive": "sketchembednet_baselines", "conv_vae": "sketchembednet_baselines"}


def get_method(name: str) -> type[Method]:
    """The class of the method called `name`; ValueError names the known ones."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(sorted(METHODS))}, got {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, name)}"), METHODS[name])
