"""Federated instruction tuning (2305.05644)."""
