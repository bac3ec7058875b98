"""Artifacts on disk: ids, seals, locks, the activation store. Never imports Prefect."""
