"""Models of other systems: read into racks, and racks written for them."""
