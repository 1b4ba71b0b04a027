"""How a stage lives and dies: signals, processes, device, resume, tracking. Knows no diffusion."""
