"""How experiments are run: in this process, or elsewhere."""
