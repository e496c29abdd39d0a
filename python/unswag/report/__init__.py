"""What people are shown of ledgers and results: tables for a terminal, pictures in one style, HTML for a notebook."""
