"""Find where sampler and trainer differ first: sequence, token, layer, op, by how many ulps, and why."""
