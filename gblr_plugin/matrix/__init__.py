"""Structured matrices: intervals, tiles, masks, metrics, and the trapezoid and low-rank forms."""
