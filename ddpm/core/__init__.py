"""The paper: network, diffusion, samplers, bound. Imports itself, torch and NumPy, and raises ValueError."""
