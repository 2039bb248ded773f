"""A run as one self-contained HTML page, and its figures by themselves."""
