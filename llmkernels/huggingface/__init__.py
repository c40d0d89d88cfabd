"""What is for Hugging Face's transformers alone, which has to be installed: caches of keys and values."""

from llmkernels.huggingface.caches import PagedCache, StaticCache

__all__ = ["PagedCache", "StaticCache"]
