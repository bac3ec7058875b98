"""Blocks, stacks and racks; how stacks are made, stored and adapted; the types of the stream between them."""
