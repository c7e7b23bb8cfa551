"""Moments of layers' inputs and loss gradients over training batches, and the split of a budget by them."""
