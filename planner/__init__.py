"""Model + machine -> plan -> artifact."""
