"""Training state that knows no layout: saved from any ranks, resumed on any others."""
