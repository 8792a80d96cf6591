"""The methods, one flat file a paper, looked up by name so that none is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module

from .base import Method

METHODS = {"photo_topology": "PhotoTopology", "pm_jdot": "PMJDOT", "sketchembednet": "SketchEmbedNet"}


def get_method(name: str) -> type[Method]:
    """The class of the method called `name`; ValueError names the known ones."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(sorted(METHODS))}, got {name!r}")
    return getattr(import_module(f"{__name__}.{name}"), METHODS[name])
