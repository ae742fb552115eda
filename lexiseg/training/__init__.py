"""Training: the loop, its settings and schedules, the recipes, and the tasks it trains."""
