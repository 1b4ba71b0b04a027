"""From prepared data to a network: set-up, one step, curves, the loop."""
