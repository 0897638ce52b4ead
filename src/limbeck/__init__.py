"""limbeck: distils diffusion and reward models into small, fast or controllable things."""

__version__ = "0.1.0"
