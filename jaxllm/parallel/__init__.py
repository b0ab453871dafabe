"""Device meshes, sharding rules and distributed start."""
