"""What several test files use; conftest.py holds only fixtures and hooks."""
