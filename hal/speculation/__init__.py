"""Speculative decoding: proposers, and the runner that composes a target runner with a proposer on the ranks."""
