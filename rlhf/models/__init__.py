"""Language models: loading, adapters, scalar heads, shared bases, how a model is called, the embedded tiny base.

Nothing is imported here: `transformers` is loaded by the modules that need it.
"""
