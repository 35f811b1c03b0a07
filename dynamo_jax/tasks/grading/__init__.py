"""Is this answer right? Extraction, exact and symbolic comparison, and the worker processes that it runs in."""
