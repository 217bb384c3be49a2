"""Test tools for the author of a backend: the null backend, the fake device, strategies for declared inputs."""
