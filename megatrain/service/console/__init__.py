"""The page that people look at: what is trained, served and kept, and a place to try models."""
