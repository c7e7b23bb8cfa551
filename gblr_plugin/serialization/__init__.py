"""Save converted models and load them: safetensors with their structure, never code."""

from .model import load, read_state, save

__all__ = ["load", "read_state", "save"]
