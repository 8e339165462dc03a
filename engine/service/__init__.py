"""What AsyncRefiner is made of: tickets, the queue in front of the engine, the engine's thread, metrics."""
