"""Storage layouts, plans and products of frozen GBLR matrices. Torch alone; numba and triton are used where present."""
