"""Stochastic depth in the terms of other libraries. Each module needs its library only where it uses it; `import fxsd` imports none."""
