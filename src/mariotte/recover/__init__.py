"""Recovery: fine-tuning that wins back what compression lost."""
