"""Stochastic depth inside other libraries' trainers; each module needs its own library, where it uses it."""
