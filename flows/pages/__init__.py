"""The description of an artifact: gathered once as a JSON document, then shown as tables, as JSON or as a page."""
