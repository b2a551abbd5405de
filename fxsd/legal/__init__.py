"""May the branch of a residual add run on some of the samples, and does it pay?

In: residual adds of captured graphs, and example inputs. Out: for each a `Region`, what is left out for a dropped
sample, or a sentence why not.
Above: the verbs at the top. Below: `capture`, `find`, `graph` and `run`.
"""

from fxsd.legal.batch import Region, find_regions, find_samples, no_gain

__all__ = ["Region", "find_regions", "find_samples", "no_gain"]
