"""params.yaml to typed sections, or one line per fault. Imports neither torch nor NumPy."""
