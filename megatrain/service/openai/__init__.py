"""Completions and chats as OpenAI's clients ask for them.  No torch."""
