"""Learns the structure of layers in training: the widths' proximal step, its thresholds, and the schedule."""
