"""What a run is measured by: checks of answers, metrics, held-out evaluation."""
