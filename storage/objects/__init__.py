"""Artifacts in an object store: made in a scratch folder, sealed by one conditional write, read by ranges."""
