def register_shardings() -> None:
    """Placeholder."""
