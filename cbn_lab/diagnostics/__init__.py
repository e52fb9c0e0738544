"""What keeps the graph alive: inspection, guard, diagnosis, memory, checklist."""
