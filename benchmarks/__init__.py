"""Speed: what the README and RESULTS.md say, as commands; nothing here is a test."""
