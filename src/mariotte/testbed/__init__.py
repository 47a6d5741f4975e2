"""A synthetic world, exactly known, and the tiny models trained in its language."""
