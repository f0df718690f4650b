"""What a run shows: progress, curves, summary."""
