"""The version of the library. Knows nothing else."""

__version__ = "0.1.0"
