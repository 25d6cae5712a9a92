"""Records, layouts, the generated benchmark and the input pipeline; no JAX in here."""
