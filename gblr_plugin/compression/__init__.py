"""A pretrained network made smaller in one call: calibrated, refined, recovered, converted, and what became of it."""
