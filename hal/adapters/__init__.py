"""Adapters (LoRA): PEFT's files, the slots of a model's layers, and the names that an engine knows."""
