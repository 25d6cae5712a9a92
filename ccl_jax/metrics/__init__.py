"""Anomaly detection metrics: streaming counts, and scores from them."""
