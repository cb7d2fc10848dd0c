"""Campaign configuration: models, loading with helpful errors, generated reference."""
