"""The solvers behind ``odeint``: fixed grids, adaptive steps on host and device, Adams, SciPy."""
