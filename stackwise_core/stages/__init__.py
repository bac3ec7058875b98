"""What a run is, stage by stage, before any of it exists: resolved values, recipes, ids, costs. Needs no torch."""
