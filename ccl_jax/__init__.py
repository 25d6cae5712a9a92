"""Multi-class visual anomaly detection with class-aware contrastive learning, in JAX."""
