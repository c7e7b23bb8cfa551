"""Save converted models and load them: safetensors with their structure, never code."""

from .model import load_into, read_state, save

__all__ = ["load_into", "read_state", "save"]
