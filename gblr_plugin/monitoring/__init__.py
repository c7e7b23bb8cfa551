"""What is recorded of structures while they are learned, and their pictures as arrays; no host is needed for either."""
