"""The default runner of models that turn texts into embeddings: no KV cache, and a pooling in place of a sampler."""
