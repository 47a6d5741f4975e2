"""The one training loop, its schedules, and how the testbed was trained."""
