"""What is done to a whole model: its layers are chosen, replaced by structured ones, converted, and counted."""
