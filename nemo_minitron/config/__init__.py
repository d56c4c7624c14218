"""Configuration: Hydra composition with a typed schema behind it.

``schema`` and ``nemo_keys`` import the standard library only and serve ``--help``; ``compose`` brings Hydra.
"""
