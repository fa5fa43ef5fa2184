"""``kvstore tune``: what other policies, capacities, codecs and tiers would have hit of a recorded trace."""
