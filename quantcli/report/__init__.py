"""What a run came to, as rows that a terminal or a page can show."""
