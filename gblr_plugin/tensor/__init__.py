"""The frozen structured weight, a tensor subclass, and its products."""
