"""Report: figures, page, catalogue of products."""
