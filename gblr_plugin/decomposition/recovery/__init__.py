"""Exact recovery: finds the components of a matrix that is exactly structured."""
