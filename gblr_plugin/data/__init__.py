"""Reads the data sets of the built-in recipes from files that are already there; nothing here downloads."""
