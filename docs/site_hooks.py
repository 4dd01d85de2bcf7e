"""What the site needs beyond Markdown."""
