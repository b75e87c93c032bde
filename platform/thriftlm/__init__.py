"""thriftlm: the lowest loss for the dollars you have.

The folders are the way through the tool: planning, training, search, review.
"""

__version__ = "0.1.0"
