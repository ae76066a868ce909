"""One script drives many ranks: commands, their journal, and what happens when a rank is lost."""
