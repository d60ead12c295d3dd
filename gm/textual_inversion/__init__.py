"""A new word: its learned rows, the files that keep them, and the captions that teach it."""
