"""Networks: multi-resolution fusion, heads, losses and the member files."""
