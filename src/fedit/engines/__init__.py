"""Where clients live: `simulation`, all in this process."""
